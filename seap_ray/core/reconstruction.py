"""Reconstruction: a covariance and a weight in; what the kept columns can say of the cut ones out. Pure arithmetic.

A site's input x has mean mu and covariance C. Of its columns S stay and P go. The best affine guess of what the cut
columns gave, W_P x_P, from x_S is W_P (mu_P + A (x_S - mu_S)) with A = C_PS (C_SS + R)^-1; it goes into the weight and
the bias of what stays, and the model is no larger for it. In the best linear guess, without an intercept, second
moments C + mu mu^T take the place of C.

Letters: O output features, D input columns, S kept and P cut columns, U units (heads, groups, channels) of b columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seap_ray.core.elimination import Elimination
from seap_ray.core.moments import Covariance
from seap_ray.core.ridge_regression import (
    NormalEquations,
    RidgeRegression,
    are_accurate_errors,
    first_accurate,
    is_accurate_inverse,
    ridge_diagonal,
    ridged_inverse,
    variances,
    working_dtypes,
)

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative ridges to choose from."""
DEFAULT_RIDGE = 1e-2
"""Relative ridge where there are no held-out tokens to choose on: near the best from two tokens a column on."""
OBS_STEPS = 64
"""Steps in which the optimal brain surgeon goes through a site of many columns."""
MAX_RISES = 2
"""Ridges in a row that are worse than the best one, after which no smaller one is tried."""
JUDGED_OUTPUTS = 256
"""Outputs that a ridge is chosen on: the error is a sum over outputs, and a share of them ranks ridges alike."""


def ridged(covariance_DD: Tensor, ridge: float, *, mean_D: Tensor | None = None) -> Tensor:
    """Return C + R, where R is every column's own variance times ``ridge``, so that no column's unit matters.

    It makes C positive definite, also for fewer tokens than columns, from a ridge of 1e-5 on, where the rounding of
    float32 co-moments no longer counts. Columns that never vary get 1: they say nothing, whatever they get. Without an
    intercept, where ``mean_D`` is given, such a column takes its place and gets the square of its mean times ``ridge``.
    """
    ridged_DD = covariance_DD.clone()
    ridged_DD.diagonal().add_(ridge_diagonal(covariance_DD.diagonal(), ridge, mean_D))
    return ridged_DD


def least_squares(covariance: Covariance, weight_OD: Tensor, kept_S: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the weight of the kept columns and the bias that stand for all columns.

    They are W_S + X and W_P mu_P - X mu_S, with X = W_P C_PS (C_SS + R)^-1: the affine map of x_S that is nearest to
    W x over the calibration tokens, but for the ridge R. With all columns kept: the weight itself, and zero.

    Args:
        covariance: Moments and co-moments of the module's input, D columns.
        weight_OD: The unpruned weight, (O, D).
        kept_S: Indices of the columns that stay, int64.
        ridge: Ridge relative to each column's variance.

    Returns:
        Weight, (O, S), and bias, (O,), float64.

    Raises:
        torch.linalg.LinAlgError: C_SS + R is not positive definite: the ridge is too small.
    """
    if len(kept_S) == weight_OD.shape[1]:
        return weight_OD.double(), weight_OD.new_zeros(len(weight_OD), dtype=torch.float64)
    solution = RidgeRegression(covariance, weight_OD, kept_S).solve(ridge)
    return solution.weight_OS, solution.bias_O


def least_squares_without_bias(covariance: Covariance, weight_OD: Tensor, kept_S: Tensor, *, ridge: float) -> Tensor:
    """Return the weight of the kept columns that stands for all columns, where no bias can be added.

    With second moments G = C + mu mu^T it is W_S + W_P G_PS (G_SS + R)^-1: the linear map of x_S that is nearest to W x
    over the calibration tokens, but for the ridge R. By Sherman & Morrison's formula that is the affine map of
    ``least_squares`` with its bias b carried by the columns themselves, W' + b g^T with
    g = (C_SS + R)^-1 mu_S / (1 + s) and s = mu_S^T (C_SS + R)^-1 mu_S. It adds ||b||^2 / (1 + s) to the mean squared
    error, ridge included. With all columns kept: the weight itself.

    Args:
        covariance: Moments and co-moments of the module's input, D columns.
        weight_OD: The unpruned weight, (O, D).
        kept_S: Indices of the columns that stay, int64.
        ridge: Ridge relative to each column's variance, as with a bias: the mean is as free as an intercept.

    Returns:
        Weight, (O, S), float64.

    Raises:
        torch.linalg.LinAlgError: C_SS + R is not positive definite: the ridge is too small.
    """
    if len(kept_S) == weight_OD.shape[1]:
        return weight_OD.double()
    return RidgeRegression(covariance, weight_OD, kept_S, has_intercept=False).solve(ridge).weight_OS


def error_map(joint: Covariance, n_inputs: int, *, ridge: float, has_intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Return the map of some columns that is nearest to the other ones.

    It is X = C_OS (C_SS + R)^-1 with the bias mu_O - X mu_S; without an intercept second moments take the place of C,
    and the bias is zero.

    Args:
        joint: Moments and co-moments of S inputs and, behind them, O outputs.
        n_inputs: Number S of inputs.
        ridge: Ridge relative to each input's variance.
        has_intercept: Whether there may be a bias.

    Returns:
        Weight, (O, S), and bias, (O,), float64.

    Raises:
        torch.linalg.LinAlgError: C_SS + R is not positive definite: the ridge is too small.
    """
    C_DD = joint.covariance_DD.double()
    mean_S = joint.mean_D[:n_inputs]
    mean_O = joint.mean_D[n_inputs:]
    ridged_SS = ridged(C_DD[:n_inputs, :n_inputs], ridge, mean_D=None if has_intercept else mean_S)
    wanted_SO = C_DD[:n_inputs, n_inputs:]
    if not has_intercept:
        ridged_SS = ridged_SS + torch.outer(mean_S, mean_S)
        wanted_SO = wanted_SO + torch.outer(mean_S, mean_O)

    weight_OS = torch.cholesky_solve(wanted_SO, torch.linalg.cholesky(ridged_SS)).T
    return weight_OS, mean_O - weight_OS @ mean_S if has_intercept else torch.zeros_like(mean_O)


def choose_ridge(fitted: Covariance, held_out: Covariance, weight_OD: Tensor) -> float:
    """Choose the ridge with the least error on held-out tokens, for the better half of the columns by ``wifv``.

    The error is measured on ``JUDGED_OUTPUTS`` of the outputs, evenly spread.

    Args:
        fitted: Covariance of the tokens that the map is fitted on.
        held_out: Covariance of the other tokens.
        weight_OD: The unpruned weight, (O, D).

    Returns:
        One of ``RIDGES``.
    """
    # Every n-th output.
    weight_OD = weight_OD[:: max(1, weight_OD.shape[0] // JUDGED_OUTPUTS)]
    # Columns by wifv, ascending; the better half stays.
    order_D = (fitted.var_D * weight_OD.double().square().sum(0)).argsort(stable=True)
    kept_S = order_D[order_D.numel() // 2 :].sort().values

    regression = RidgeRegression(fitted, weight_OD, kept_S)
    # The precision of the first attempt: errors of ridges are far more apart than its rounding.
    cut_P = regression.cut_P
    test = NormalEquations.of(held_out, regression.weight_OP, kept_S, cut_P, working_dtypes(weight_OD.dtype)[0])
    drift_D = held_out.mean_D - fitted.mean_D

    errors: dict[float, float] = {}
    n_rises = 0
    # From the largest ridge on the error falls to its least and rises after it. Small ridges lose most digits and so
    # take longest: after two that are worse than the best one, they are left out.
    for ridge in sorted(RIDGES, reverse=True):
        added_OS = regression.solve(ridge).weight_OS - regression.weight_OS
        offset_O = regression.weight_OP.double() @ drift_D[cut_P] - added_OS @ drift_D[kept_S]
        errors[ridge] = float(test.error(added_OS.to(test.covariance_SS)) + offset_O.square().sum())
        n_rises = n_rises + 1 if errors[ridge] > min(errors.values()) else 0
        if n_rises == MAX_RISES:
            break
    # Of ridges with equal errors the smallest.
    return min(sorted(errors), key=errors.__getitem__)


def error_of(covariance: Covariance, weight_OD: Tensor, kept_S: Tensor, repaired: tuple[Tensor, Tensor]) -> float:
    """Return the mean square of W x - (W' x_S + b') over the tokens of ``covariance``, summed over outputs.

    Args:
        covariance: Covariance of the module's input.
        weight_OD: The unpruned weight W, (O, D).
        kept_S: Indices of the columns that stay.
        repaired: W', (O, S), and b', (O,).

    Returns:
        The error, in squared units of the output.
    """
    new_OS, bias_O = repaired
    # A clone, since ``double`` returns a float64 weight itself, and it changes below.
    gap_OD = weight_OD.double().clone()
    # What is wrong with the map, in the columns of the whole input.
    gap_OD[:, kept_S] -= new_OS.double()

    offset_O = gap_OD @ covariance.mean_D - bias_O.double()
    return float(((gap_OD @ covariance.covariance_DD.double()) * gap_OD).sum() + offset_O.square().sum())


def _total(covariance_DD: Tensor, weight_OD: Tensor) -> Tensor:
    """Return the variance of the site's output, summed over outputs: tr(W C W^T)."""
    # Never zero: units of a site that never varies have shares of 0, not NaN.
    return ((weight_OD @ covariance_DD) * weight_OD).sum().clamp_min(torch.finfo(torch.float64).tiny)


def _blocks(width: int, block: int) -> list[slice]:
    """Return the columns of every unit as slices."""
    return [slice(start, start + block) for start in range(0, width, block)]


def block_wifv(covariance: Covariance, weight_OD: Tensor, *, block: int, ridge: float, has_bias: bool = True) -> Tensor:
    """Return the error of cutting each block with the best constant repair: tr(W_B C_BB W_B^T).

    ``wifv`` is the diagonal of this, and like it the same with a bias and without.

    Args:
        covariance: Covariance of the module's input.
        weight_OD: The unpruned weight, (O, D).
        block: Columns of a unit.
        ridge: Not used: every score of ``UNIT_SCORES`` is called alike.
        has_bias: Not used either.

    Returns:
        Error of each unit, (U,), float64, as a share of the variance of the site's output.
    """
    C_DD = covariance.covariance_DD.double()
    weight_OD = weight_OD.double()
    error_U = torch.stack([_total(C_DD[at, at], weight_OD[:, at]) for at in _blocks(weight_OD.shape[1], block)])
    return error_U / _total(C_DD, weight_OD)


def obs(covariance: Covariance, weight_OD: Tensor, *, block: int, ridge: float, has_bias: bool = True) -> Tensor:
    """Return the error that each block adds when it goes, in the greedy order of a structured optimal brain surgeon.

    After every step the weights that are left are the least squares ones, so what a block adds is what the others
    cannot say: tr(W_B ((C + R)^-1_BB)^-1 W_B^T) (Hassibi & Stork 1993; for blocks ZipLM, arXiv 2302.04089). Scores rise
    strictly along the order, so the best k of them are what is left when all others are gone. One block goes at a time;
    of many single columns one in ``OBS_STEPS``.

    Without a bias nothing makes up for means: second moments C + mu mu^T take the place of C, here and in the output's
    variance, which becomes its mean square.

    Args:
        covariance: Covariance of the module's input.
        weight_OD: The unpruned weight, (O, D).
        block: Columns of a unit.
        ridge: Ridge relative to each column's variance.
        has_bias: Whether the compensation has a bias.

    Returns:
        Error of each unit, (U,), float64, as a share of the variance of the site's output.
    """
    mean_D = None if has_bias else covariance.mean_D
    ridge_D = ridge_diagonal(variances(covariance), ridge, mean_D)

    def attempt(dtype: torch.dtype) -> Tensor | None:
        """Compute in a dtype; None where that has too few digits."""
        inverse_DD = ridged_inverse(covariance, ridge_D, mean_D=mean_D, dtype=dtype)
        if dtype != torch.float64 and not is_accurate_inverse(
            inverse_DD, covariance, ridge_D, mean_D=mean_D, dtype=weight_OD.dtype
        ):
            return None

        scores_U, error_O = _greedy_scores(inverse_DD, weight_OD, block, ridge_D)
        # What the inverse hardly shows: columns that go last have lost digits to all others.
        if dtype != torch.float64 and not are_accurate_errors(error_O, weight_OD, covariance, ridge_D, mean_D=mean_D):
            return None
        return scores_U

    return first_accurate(weight_OD.dtype, attempt)


def _greedy_scores(inverse_DD: Tensor, weight_OD: Tensor, block: int, ridge_D: Tensor) -> tuple[Tensor, Tensor]:
    """Take out all units in the greedy order.

    Returns:
        The score of each unit by the error that it would have added, (U,), and what all added to each output, (O,).
    """
    n_units = weight_OD.shape[1] // block
    elimination = Elimination(inverse_DD, weight_OD, block=block, at_a_time=max(1, n_units // OBS_STEPS))
    scores = [0.0] * n_units
    reached = 0.0
    error_D = torch.zeros_like(ridge_D)
    error_O = ridge_D.new_zeros(len(weight_OD))
    while elimination.n_left:
        places_U, added_U = elimination.cheapest()
        columns_G = elimination.columns(places_U)
        units = (columns_G[::block] // block).tolist()
        for unit, added in zip(units, added_U.tolist(), strict=True):
            # Later scores are above earlier ones, also where rounding says otherwise.
            reached = max(added, reached * (1 + 1e-12))
            scores[unit] = reached
        error_GO = elimination.remove(places_U).double().square_()
        error_D[columns_G] = error_GO.sum(1)
        error_O += error_GO.sum(0)

    # All errors are tr(W (C + R) W^T) together: the variance of the output, and what the ridge adds to it.
    norm_D = weight_OD.to(ridge_D).square().sum(0)
    total = (error_D - ridge_D * norm_D).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return error_D.new_tensor(scores) / total, error_O


BIAS_SCORES = ("obs",)
"""Scores that depend on whether the compensation has a bias."""
UNIT_SCORES: dict[str, Callable[..., Tensor]] = {score.__name__: score for score in (block_wifv, obs)}
"""Scores of whole units, which need a covariance. As shares of an output's variance they compare between layers."""
