"""Correction: how much of an error that a map says should be undone, by tokens that the map was not fitted on."""

from torch import Tensor

from seap_ray.core.moments import Covariance
from seap_ray.core.reconstruction import error_map

CORRECTION_RIDGES = (1e-2, 1e-1, 1.0, 10.0)
"""Relative ridges to choose from. An error is noise for the most part, so that they are larger than for repairs."""


def choose_correction(
    fitted: Covariance, held_out: Covariance, n_inputs: int, *, has_intercept: bool = True
) -> tuple[float, float]:
    """Choose the ridge and the share of an error map that leave the least error on held-out tokens.

    With m = X x + b for the map and e for the error, a share s leaves E|e - s m|^2, which is least at
    s = E(e m) / E|m|^2, taken between 0 and 1.

    Args:
        fitted: Moments and co-moments of S inputs and, behind them, O errors, of the tokens that maps are fitted on.
        held_out: The same of other tokens.
        n_inputs: Number S of inputs.
        has_intercept: Whether there may be a bias.

    Returns:
        One of ``CORRECTION_RIDGES``, and the share; 0 where every map makes held-out tokens worse.

    Raises:
        torch.linalg.LinAlgError: A ridge is too small.
    """
    # Second moments hold the means, which a map without intercept has to say, too.
    mean_D = held_out.mean_D
    moment_DD = held_out.covariance_DD.double() + mean_D[:, None] * mean_D

    choices: list[tuple[float, float, float]] = []
    for ridge in CORRECTION_RIDGES:
        weight_OS, bias_O = error_map(fitted, n_inputs, ridge=ridge, has_intercept=has_intercept)
        overlap, size = _overlap_and_size(weight_OS, bias_O, mean_D, moment_DD, n_inputs)
        share = min(1.0, max(0.0, overlap / size)) if size > 0 else 0.0
        choices.append((2 * share * overlap - share * share * size, ridge, share))
    _, ridge, share = max(choices)
    return ridge, share


def _overlap_and_size(
    weight_OS: Tensor, bias_O: Tensor, mean_D: Tensor, moment_DD: Tensor, n_inputs: int
) -> tuple[float, float]:
    """Return E(e m) and E|m|^2 of a map m = X x + b over tokens with these means and second moments."""
    mapped_mean_O = weight_OS @ mean_D[:n_inputs]
    overlap = (weight_OS * moment_DD[n_inputs:, :n_inputs]).sum() + bias_O @ mean_D[n_inputs:]
    spread = ((weight_OS @ moment_DD[:n_inputs, :n_inputs]) * weight_OS).sum()
    size = spread + 2 * (bias_O @ mapped_mean_O) + bias_O @ bias_O
    return float(overlap), float(size)
