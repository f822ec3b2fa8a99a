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

from seap_ray.core.moments import Covariance

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative ridges to choose from."""
DEFAULT_RIDGE = 1e-2
"""Relative ridge where there are no held-out tokens to choose on: near the best from two tokens a column on."""
OBS_STEPS = 64
"""Steps in which the optimal brain surgeon goes through a site of many columns."""
JUDGED_OUTPUTS = 256
"""Outputs that a ridge is chosen on: the error is a sum over outputs, and a share of them ranks ridges alike."""


def ridged(covariance_DD: Tensor, ridge: float, *, mean_D: Tensor | None = None) -> Tensor:
    """Return C + R, where R is every column's own variance times ``ridge``, so that no column's unit matters.

    It makes C positive definite, also for fewer tokens than columns, from a ridge of 1e-5 on, where the rounding of
    float32 co-moments no longer counts. Columns that never vary get 1: they say nothing, whatever they get. Without an
    intercept, where ``mean_D`` is given, such a column takes its place and gets the square of its mean times ``ridge``.
    """
    variance_D = covariance_DD.diagonal()
    constant_D = torch.ones_like(variance_D)
    if mean_D is not None:
        constant_D = torch.where(mean_D != 0, mean_D.square() * ridge, constant_D)
    return covariance_DD + torch.diag(torch.where(variance_D > 0, variance_D * ridge, constant_D))


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
    weight_OS, bias_O, _ = _affine(covariance, weight_OD, kept_S, ridge)
    return weight_OS, bias_O


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
    weight_OS, bias_O, factor_SS = _affine(covariance, weight_OD, kept_S, ridge, has_intercept=False)
    if factor_SS is None:
        return weight_OS

    guess_S = _guess_of_one(covariance.mean_D[kept_S], factor_SS)
    return weight_OS.addr_(bias_O, guess_S)


def _guess_of_one(mean_S: Tensor, factor_SS: Tensor) -> Tensor:
    """Return the weights with which columns are nearest to the constant 1, given the Cholesky factor of C + R."""
    solved_S = torch.cholesky_solve(mean_S[:, None], factor_SS)[:, 0]
    return solved_S / (1 + mean_S @ solved_S)


def _affine(
    covariance: Covariance, weight_OD: Tensor, kept_S: Tensor, ridge: float, *, has_intercept: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return weight and bias of ``least_squares``, and the Cholesky factor of C_SS + R; None where all is kept."""
    cut_P = _complement(kept_S, weight_OD.shape[1])
    weight_OD = weight_OD.double()
    weight_OS = weight_OD[:, kept_S]
    weight_OP = weight_OD[:, cut_P]
    if not cut_P.numel():
        return weight_OS, weight_OD.new_zeros(weight_OD.shape[0]), None

    C_DD = covariance.covariance_DD.double()
    # Two triangular solves instead of an inverse.
    mean_S = None if has_intercept else covariance.mean_D[kept_S]
    factor_SS = torch.linalg.cholesky(ridged(C_DD[kept_S[:, None], kept_S], ridge, mean_D=mean_S))
    added_OS = torch.cholesky_solve((weight_OP @ C_DD[cut_P[:, None], kept_S]).T, factor_SS).T
    bias_O = weight_OP @ covariance.mean_D[cut_P] - added_OS @ covariance.mean_D[kept_S]
    return weight_OS + added_OS, bias_O, factor_SS


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


def _complement(kept_S: Tensor, width: int) -> Tensor:
    """Return the indices below ``width`` that are not in ``kept_S``, ascending."""
    cut_D = torch.ones(width, dtype=torch.bool)
    cut_D[kept_S] = False
    return cut_D.nonzero().squeeze(1)


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

    errors = {
        ridge: error_of(held_out, weight_OD, kept_S, least_squares(fitted, weight_OD, kept_S, ridge=ridge))
        for ridge in RIDGES
    }
    return min(RIDGES, key=errors.__getitem__)


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
    C_DD = covariance.covariance_DD.double()
    weight_OD = weight_OD.double()
    total = _total(C_DD, weight_OD)
    mean_D = None if has_bias else covariance.mean_D
    factor_DD = torch.linalg.cholesky(ridged(C_DD, ridge, mean_D=mean_D))
    inverse_DD = torch.cholesky_inverse(factor_DD)
    if mean_D is not None:
        # The inverse of C + R + mu mu^T by Sherman & Morrison, as in ``least_squares_without_bias``.
        total = total + (weight_OD @ mean_D).square().sum()
        solved_D = torch.cholesky_solve(mean_D[:, None], factor_DD)[:, 0]
        inverse_DD.addr_(solved_D, solved_D, alpha=-1 / (1 + float(mean_D @ solved_D)))

    left_U = torch.arange(weight_OD.shape[1] // block)
    at_a_time = max(1, left_U.numel() // OBS_STEPS)
    scores_U = torch.zeros(left_U.numel(), dtype=torch.float64)
    reached = 0.0

    # Units that go leave the inverse covariance and the weight smaller, until none is left.
    while left_U.numel():
        error_U = _added_errors(inverse_DD, weight_OD, block)
        # Stable: of units with equal errors the first goes first.
        go_U = torch.sort(error_U, stable=True).indices[:at_a_time]
        for u in go_U.tolist():
            # Later scores are above earlier ones, also where rounding says otherwise.
            reached = max(float(error_U[u] / total), reached * (1 + 1e-12))
            scores_U[left_U[u]] = reached

        stay_U = _complement(go_U, left_U.numel())
        inverse_DD, weight_OD = _without(inverse_DD, weight_OD, _columns(go_U, block), _columns(stay_U, block))
        left_U = left_U[stay_U]
    return scores_U


def _added_errors(inverse_DD: Tensor, weight_OD: Tensor, block: int) -> Tensor:
    """Return what each block that is left would add to the error if it went next."""
    # Of single columns the blocks of the inverse are its diagonal.
    if block == 1:
        return weight_OD.square().sum(0) / inverse_DD.diagonal()
    inverse_UBB = torch.stack([inverse_DD[at, at] for at in _blocks(weight_OD.shape[1], block)])
    weight_UBO = weight_OD.T.reshape(-1, block, weight_OD.shape[0])
    return (weight_UBO * torch.linalg.solve(inverse_UBB, weight_UBO)).sum((1, 2))


def _without(inverse_DD: Tensor, weight_OD: Tensor, go_D: Tensor, stay_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse covariance and least squares weight of the columns that stay, by block elimination."""
    gone_BD = inverse_DD[go_D]
    solved_BD = torch.linalg.solve(gone_BD[:, go_D], gone_BD[:, stay_D])
    weight_OS = weight_OD[:, stay_D] - weight_OD[:, go_D] @ solved_BD
    return inverse_DD[stay_D[:, None], stay_D] - gone_BD[:, stay_D].T @ solved_BD, weight_OS


def _columns(units_U: Tensor, block: int) -> Tensor:
    """Return the columns of some units."""
    return (units_U[:, None] * block + torch.arange(block)).flatten()


BIAS_SCORES = ("obs",)
"""Scores that depend on whether the compensation has a bias."""
UNIT_SCORES: dict[str, Callable[..., Tensor]] = {score.__name__: score for score in (block_wifv, obs)}
"""Scores of whole units, which need a covariance. As shares of an output's variance they compare between layers."""
