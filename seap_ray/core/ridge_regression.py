"""Ridge regression: normal equations and inverses of covariances, in no more digits than a weight needs.

Weights of 16 bits are computed in float32 where that is as good as their own digits, and in float64 where it is not;
all others in float64. Whether float32 is good enough, one step of iterative refinement tells for a few outputs or
columns: the residual in float64, by the covariance itself, and what the float32 factor makes of it (Higham, Accuracy
and Stability of Numerical Algorithms, chapter 12). Refining everything would take as long as float64 from the start,
since right-hand sides and their solutions are most of the work.

Letters: O output features, D input columns, S kept and P cut columns, N outputs or columns that are looked at, R rows
of a covariance that are picked at a time.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from seap_ray.core.moments import Covariance

PROBES = 16
"""Outputs or columns by which float32 is judged, evenly spread."""
TOLERANCE = 1 / 16
"""Error that counts as none, as a part of the spacing of the numbers in a weight's dtype."""
ROWS = 512
"""Rows of a covariance that are picked or converted at a time: with fewer a product by them is slower."""

COLUMNS = 256
"""Columns that are factored at a time; all else of a factor is products, which are several times as fast."""

Result = TypeVar("Result")


# --- what is solved, and in which dtype ------------------------------------------------------------------------------


def working_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtypes to compute in, one after another until the result is accurate enough for one of ``dtype``."""
    # A weight of 32 bits has every digit of a float32 factor, so that none of them may be wrong.
    return (torch.float32, torch.float64) if torch.finfo(dtype).bits < 32 else (torch.float64,)


def first_accurate(dtype: torch.dtype, attempt: Callable[[torch.dtype], Result | None]) -> Result:
    """Return what ``attempt`` makes in the first of ``working_dtypes`` in which it succeeds.

    Args:
        dtype: The weight's dtype.
        attempt: Computes in a dtype; None, or torch.linalg.LinAlgError, where that has too few digits.

    Raises:
        torch.linalg.LinAlgError: The last attempt does.
    """
    *fast, exact = working_dtypes(dtype)
    for working_dtype in fast:
        with suppress(torch.linalg.LinAlgError):
            result = attempt(working_dtype)
            if result is not None:
                return result

    result = attempt(exact)
    assert result is not None, "float64 is taken as it is"
    return result


def complement(kept_S: Tensor, width: int) -> Tensor:
    """Return the indices below ``width`` that are not in ``kept_S``, ascending, on its device."""
    is_cut_D = torch.ones(width, dtype=torch.bool, device=kept_S.device)
    is_cut_D[kept_S] = False
    return is_cut_D.nonzero().squeeze(1)


def ridge_diagonal(variance_D: Tensor, ridge: float, mean_D: Tensor | None = None) -> Tensor:
    """Return the diagonal of R: every column's variance times ``ridge``, and something for columns that never vary.

    They get 1, or where ``mean_D`` is given the square of their mean times ``ridge``, unless that is 0.
    """
    constant_D = torch.ones_like(variance_D)
    if mean_D is not None:
        constant_D = torch.where(mean_D != 0, mean_D.square() * ridge, constant_D)
    return torch.where(variance_D > 0, variance_D * ridge, constant_D)


def variances(covariance: Covariance) -> Tensor:
    """Return the diagonal of C, (D,), float64; of C itself nothing else is computed."""
    return covariance.comoment_DD.diagonal().double() / max(covariance.count, 1)


def factor_in_place(matrix_DD: Tensor) -> Tensor:
    """Put the Cholesky factor of a symmetric matrix in its place, and return it; above the diagonal all stays.

    Block of columns by block of columns, from the left (Golub & Van Loan, Matrix Computations, section 4.2.6). Raises
    torch.linalg.LinAlgError where the matrix is not positive definite.
    """
    for first in range(0, len(matrix_DD), COLUMNS):
        end = min(first + COLUMNS, len(matrix_DD))
        done_DK = matrix_DD[first:, :first]
        matrix_DD[first:, first:end].addmm_(done_DK, done_DK[: end - first].T, alpha=-1)

        root_BB = torch.linalg.cholesky(matrix_DD[first:end, first:end])
        matrix_DD[first:end, first:end] = root_BB
        below_DB = matrix_DD[end:, first:end]
        below_DB.copy_(torch.linalg.solve_triangular(root_BB.T, below_DB, upper=True, left=False))
    return matrix_DD


def solve_rows(rows_NS: Tensor, factor_SS: Tensor) -> Tensor:
    """Return Y (L L^T)^-1 for rows Y and a Cholesky factor L, by two triangular solves."""
    half_NS = torch.linalg.solve_triangular(factor_SS.T, rows_NS, upper=True, left=False)
    # In place: rows are as large as the weight.
    return torch.linalg.solve_triangular(factor_SS, half_NS, upper=False, left=False, out=half_NS)


def _probes(n: int) -> slice:
    """Return which of n outputs or columns are looked at."""
    return slice(None, None, max(1, n // PROBES))


def _times_moments(rows_ND: Tensor, covariance: Covariance, mean_D: Tensor | None) -> Tensor:
    """Return Y C for rows Y, or where the mean is given Y (C + mu mu^T), float64."""
    product_ND = rows_ND @ covariance.comoment_DD.double() / max(covariance.count, 1)
    return product_ND if mean_D is None else product_ND.addr_(rows_ND @ mean_D, mean_D)


# --- the regression of cut columns on kept ones ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NormalEquations:
    """C_SS and W_P C_PS of a site, in one dtype."""

    covariance_SS: Tensor
    lost_OS: Tensor
    """W_P C_PS."""

    @classmethod
    def of(
        cls, covariance: Covariance, weight_OP: Tensor, kept_S: Tensor, cut_P: Tensor, dtype: torch.dtype
    ) -> "NormalEquations":
        """Pick C_SS and C_PS out of a covariance, some rows at a time: neither C nor C_PS is ever copied as a whole."""
        weight_OP = weight_OP.to(dtype)
        covariance_SS = weight_OP.new_empty(len(kept_S), len(kept_S))
        lost_OS = weight_OP.new_empty(len(weight_OP), len(kept_S))
        for first in range(0, len(kept_S), ROWS):
            at = slice(first, first + ROWS)
            rows_RD = covariance.comoment_DD.index_select(0, kept_S[at]).div_(max(covariance.count, 1)).to(dtype)
            torch.index_select(rows_RD, 1, kept_S, out=covariance_SS[at])
            # C is symmetric: its rows of kept columns are its columns.
            torch.mm(weight_OP, rows_RD.index_select(1, cut_P).T, out=lost_OS[:, at])
        return cls(covariance_SS, lost_OS)

    def factor(self, ridge_S: Tensor) -> Tensor:
        """Return the Cholesky factor of C_SS + R. Raises torch.linalg.LinAlgError where there is none."""
        ridged_SS = self.covariance_SS.clone()
        ridged_SS.diagonal().add_(ridge_S)
        return factor_in_place(ridged_SS)

    def error(self, added_OS: Tensor) -> Tensor:
        """Return the mean square of W_P x_P - X x_S for centred x, summed over outputs, less that of W_P x_P alone."""
        product_OS = (added_OS @ self.covariance_SS).sub_(self.lost_OS, alpha=2)
        return product_OS.mul_(added_OS).sum(dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Solution:
    """The affine map of the kept columns for one ridge."""

    weight_OS: Tensor
    """W_S + X, (O, S), float64; without an intercept it carries the bias, too."""
    bias_O: Tensor
    """W_P mu_P - X mu_S, (O,), float64."""
    ridge_S: Tensor
    """Diagonal of R."""
    factor_SS: Tensor
    """Cholesky factor of C_SS + R, in the dtype that was computed in."""
    guess_S: Tensor | None
    """Weights with which the kept columns are nearest to the constant 1; None with an intercept."""


class RidgeRegression:
    """The regression of a site's output on its kept columns, for one ridge after another.

    In memory are, beside the covariance, S x S numbers three times at most, and O x S numbers four times.
    """

    def __init__(
        self, covariance: Covariance, weight_OD: Tensor, kept_S: Tensor, *, has_intercept: bool = True
    ) -> None:
        """Begin with a site.

        Args:
            covariance: Moments and co-moments of its input; all is computed on their device.
            weight_OD: The unpruned weight, (O, D).
            kept_S: Indices of the columns that stay, int64.
            has_intercept: Whether there may be a bias.
        """
        device = covariance.mean_D.device
        self.covariance = covariance
        self.has_intercept = has_intercept
        self.kept_S = kept_S.to(device)
        self.cut_P = complement(self.kept_S, weight_OD.shape[1])
        self.weight_OS = weight_OD.to(device).index_select(1, self.kept_S)
        self.weight_OP = weight_OD.to(device).index_select(1, self.cut_P)
        self._equations: dict[torch.dtype, NormalEquations] = {}
        # Where float32 was accurate it is so for larger ridges, and where it was not it is not for smaller ones.
        self._accurate_from = float("inf")
        self._inaccurate_up_to = 0.0

    def solve(self, ridge: float) -> Solution:
        """Return the map for a ridge relative to each column's variance.

        Raises torch.linalg.LinAlgError where C_SS + R is not positive definite: the ridge is too small.
        """

        def attempt(dtype: torch.dtype) -> Solution | None:
            """Solve in a dtype; None where that has too few digits."""
            if dtype == torch.float64:
                # No attempt in float32 has succeeded.
                self._inaccurate_up_to = max(ridge, self._inaccurate_up_to)
                return self._solve(ridge, dtype)
            if ridge <= self._inaccurate_up_to:
                return None

            solution = self._solve(ridge, dtype)
            if ridge < self._accurate_from:
                if not self._is_accurate(solution):
                    return None
                self._accurate_from = ridge
            return solution

        return first_accurate(self.weight_OS.dtype, attempt)

    def equations(self, dtype: torch.dtype) -> NormalEquations:
        """Return the normal equations in a dtype, which are kept for the next ridge."""
        if dtype not in self._equations:
            picked = NormalEquations.of(self.covariance, self.weight_OP, self.kept_S, self.cut_P, dtype)
            self._equations[dtype] = picked
        return self._equations[dtype]

    def _solve(self, ridge: float, dtype: torch.dtype) -> Solution:
        mean_S = self.covariance.mean_D[self.kept_S]
        variance_S = variances(self.covariance)[self.kept_S]
        ridge_S = ridge_diagonal(variance_S, ridge, None if self.has_intercept else mean_S)

        equations = self.equations(dtype)
        factor_SS = equations.factor(ridge_S)
        added_OS = solve_rows(equations.lost_OS, factor_SS).double()
        bias_O = self.weight_OP.double() @ self.covariance.mean_D[self.cut_P] - added_OS @ mean_S
        weight_OS = added_OS.add_(self.weight_OS)
        if self.has_intercept:
            return Solution(weight_OS, bias_O, ridge_S, factor_SS, None)

        guess_S = _guess_of_one(mean_S, factor_SS)
        return Solution(weight_OS.addr_(bias_O, guess_S), bias_O, ridge_S, factor_SS, guess_S)

    def _is_accurate(self, solution: Solution) -> bool:
        """Return whether one step of refinement would change the weights of some outputs by next to nothing."""
        probed = _probes(len(self.weight_OP))
        weight_NS = solution.weight_OS[probed]
        added_NS = weight_NS - self.weight_OS[probed]

        # What is wrong with the map, in the columns of the whole input.
        gap_ND = weight_NS.new_empty(len(weight_NS), len(self.kept_S) + len(self.cut_P))
        gap_ND[:, self.kept_S] = -added_NS
        gap_ND[:, self.cut_P] = self.weight_OP[probed].double()
        mean_D = self.covariance.mean_D
        residual_ND = _times_moments(gap_ND, self.covariance, None if self.has_intercept else mean_D)
        residual_NS = residual_ND[:, self.kept_S] - added_NS * solution.ridge_S
        step_NS = solve_rows(residual_NS.to(solution.factor_SS.dtype), solution.factor_SS).double()
        if solution.guess_S is not None:
            step_NS.addr_(step_NS @ mean_D[self.kept_S], solution.guess_S, alpha=-1)

        tolerance = TOLERANCE * torch.finfo(self.weight_OS.dtype).eps
        # A step that is not finite is not within it.
        return bool((step_NS.norm(dim=0) <= tolerance * weight_NS.norm(dim=0)).all())


def _guess_of_one(mean_S: Tensor, factor_SS: Tensor) -> Tensor:
    """Return the weights with which columns are nearest to the constant 1, given the Cholesky factor of C + R."""
    solved_S = solve_rows(mean_S[None].to(factor_SS.dtype), factor_SS)[0].double()
    return solved_S / (1 + mean_S @ solved_S)


# --- the inverse of a whole site -------------------------------------------------------------------------------------


def ridged_inverse(covariance: Covariance, ridge_D: Tensor, *, mean_D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the inverse of C + R, or where ``mean_D`` is given of C + R + mu mu^T.

    Args:
        covariance: Moments and co-moments of a site's input.
        ridge_D: Diagonal of R.
        mean_D: The mean, where second moments take the place of the covariance.
        dtype: What is computed in; two matrices of D x D are in memory beside the covariance.

    Returns:
        The inverse, (D, D), symmetric.

    Raises:
        torch.linalg.LinAlgError: C + R is not positive definite in this dtype.
    """
    ridged_DD = torch.empty_like(covariance.comoment_DD, dtype=dtype)
    for first in range(0, len(ridged_DD), ROWS):
        at = slice(first, first + ROWS)
        ridged_DD[at] = covariance.comoment_DD[at] / max(covariance.count, 1)
    ridged_DD.diagonal().add_(ridge_D)

    factor_DD = factor_in_place(ridged_DD)
    # The transposed factor is laid out as LAPACK has it, so that its copy is not transposed.
    inverse_DD = torch.cholesky_inverse(factor_DD.T, upper=True)
    if mean_D is not None:
        # By Sherman & Morrison's formula.
        solved_D = solve_rows(mean_D[None].to(dtype), factor_DD)[0]
        inverse_DD.addr_(solved_D, solved_D, alpha=-1 / (1 + float(mean_D @ solved_D.double())))
    return inverse_DD


def is_accurate_inverse(
    inverse_DD: Tensor, covariance: Covariance, ridge_D: Tensor, *, mean_D: Tensor | None, dtype: torch.dtype
) -> bool:
    """Return whether one step of refinement would change some diagonal elements of an inverse by next to nothing.

    Args:
        inverse_DD: What ``ridged_inverse`` returned.
        covariance: Moments and co-moments of a site's input.
        ridge_D: Diagonal of R.
        mean_D: As for ``ridged_inverse``.
        dtype: The weight's, whose digits decide what next to nothing is.
    """
    probed_N = torch.arange(len(ridge_D), device=ridge_D.device)[_probes(len(ridge_D))]
    rows_ND = inverse_DD.index_select(0, probed_N).double()
    residual_ND = -_times_moments(rows_ND, covariance, mean_D) - rows_ND * ridge_D
    # The columns of the identity, less what the inverse makes of them.
    residual_ND.scatter_add_(1, probed_N[:, None], torch.ones_like(residual_ND[:, :1]))

    step_N = (residual_ND * rows_ND).sum(1)
    diagonal_N = rows_ND.gather(1, probed_N[:, None])[:, 0]
    return bool((step_N.abs() <= TOLERANCE * torch.finfo(dtype).eps * diagonal_N).all())


def are_accurate_errors(
    error_O: Tensor, weight_OD: Tensor, covariance: Covariance, ridge_D: Tensor, *, mean_D: Tensor | None
) -> bool:
    """Return whether errors that have been added up while all columns went are what they must be, for some outputs.

    Args:
        error_O: By output, the sum of the squares that ``Elimination.remove`` returned, float64.
        weight_OD: The unpruned weight.
        covariance: Moments and co-moments of a site's input.
        ridge_D: Diagonal of R.
        mean_D: As for ``ridged_inverse``.
    """
    probed = _probes(len(weight_OD))
    weight_ND = weight_OD[probed].to(ridge_D)
    # W (C + R) W^T: what is left of the output when all columns are gone, and what the ridge adds.
    product_ND = _times_moments(weight_ND, covariance, mean_D) + weight_ND * ridge_D
    expected_N = (product_ND * weight_ND).sum(1)
    tolerance = TOLERANCE * torch.finfo(weight_OD.dtype).eps
    return bool(((error_O[probed] - expected_N).abs() <= tolerance * expected_N).all())
