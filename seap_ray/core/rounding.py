"""Rounding: a weight and second moments of its input in; integer codes, scales and zero points out. Pure arithmetic.

A stored weight is s (c - z): small integers c, the codes, and for every output and group of columns a scale s and a
zero point z. Rounding to nearest takes every column by itself. GPTQ (arXiv 2210.17323) rounds one column after another,
and each makes up for the errors of those before, so that the mean square of the output's error,
tr((W - Q) H (W - Q)^T) with the second moments H of the input, becomes small.

Letters: O output features, D input columns, G groups of columns, B columns of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.1
"""Share of the mean of H's diagonal that is added to it. GPTQ itself has 0.01; from few tokens a column on, as experts
have them, this one leaves less error on other tokens, and from many the two are alike (docs/results.md)."""
BLOCK_COLUMNS = 128
"""Columns whose errors reach the columns behind them together, in one product of matrices."""


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """The numbers that a weight may become: s (c - z), c an integer of some bits."""

    scale_OG: Tensor
    """Scale s of every output and group of columns, (O, G), in the type that it is stored in; above zero."""
    zero_OG: Tensor
    """Zero point z, (O, G), int8; zero where the grid is symmetric."""
    bits: int
    """Bits of a code, from 2 to 8."""
    columns: int
    """Neighbouring columns that share a scale."""

    @classmethod
    def of(
        cls,
        weight_OD: Tensor,
        *,
        bits: int,
        columns: int | None = None,
        is_symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
    ) -> "IntegerGrid":
        """Choose scales by which the largest and the least weight of every group are in reach.

        Args:
            weight_OD: The weight, (O, D).
            bits: Bits of a code.
            columns: Columns of a group; None: all of them.
            is_symmetric: Whether zero points are 0, and a group reaches as far to either side.
            scale_dtype: Type of the scales, to which they are rounded before anything is rounded by them.

        Returns:
            The grid, as compressed-tensors computes it from the least and the largest weight.

        Raises:
            ValueError: The groups do not divide the columns.
        """
        n_columns = weight_OD.shape[1]
        columns = columns or n_columns
        if n_columns % columns:
            raise ValueError(f"{n_columns} columns are no multiple of a group of {columns}")

        groups_OGC = weight_OD.unflatten(1, (-1, columns)).to(torch.promote_types(weight_OD.dtype, torch.float32))
        # Zero is always in reach, also where all weights of a group have one sign.
        least_OG = groups_OGC.amin(2).clamp(max=0)
        largest_OG = groups_OGC.amax(2).clamp(min=0)
        if is_symmetric:
            largest_OG = torch.maximum(largest_OG, -least_OG)
            least_OG = -largest_OG

        scale_OG = ((largest_OG - least_OG) / (2**bits - 1)).to(scale_dtype)
        # A group of zeros, or of numbers too small for the type, has any scale.
        scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
        lowest = -(2 ** (bits - 1))
        if is_symmetric:
            return cls(scale_OG, torch.zeros_like(scale_OG, dtype=torch.int8), bits, columns)

        zero_OG = (lowest - least_OG / scale_OG).round().clamp(lowest, -lowest - 1)
        return cls(scale_OG, zero_OG.to(torch.int8), bits, columns)

    def codes(self, weight_OD: Tensor) -> Tensor:
        """Return the codes of a weight rounded to nearest, (O, D), int8; what is out of reach gets the outermost."""
        dtype = torch.promote_types(weight_OD.dtype, torch.float32)
        groups_OGC = weight_OD.to(dtype).unflatten(1, (-1, self.columns))
        return self._nearest(groups_OGC, self.scale_OG[..., None], self.zero_OG[..., None]).flatten(1).to(torch.int8)

    def values(self, codes_OD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that codes stand for, (O, D), in ``dtype``."""
        groups_OGC = codes_OD.unflatten(1, (-1, self.columns)).to(dtype) - self.zero_OG[..., None].to(dtype)
        return (groups_OGC * self.scale_OG[..., None].to(dtype)).flatten(1)

    def _nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes, in the weight's type."""
        lowest = -(2 ** (self.bits - 1))
        return (weight / scale.to(weight)).round_().add_(zero.to(weight)).clamp_(lowest, -lowest - 1)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """How errors of columns that are rounded already change those that are not: what GPTQ needs of an input.

    H, its columns in the order of rounding, is V diag(d) V^T with an upper triangular V that has ones on its diagonal.
    When the columns before column i have the errors w_k - q_k, the best value of w_i, all later columns being free, is
    w_i + sum_{k < i} (w_k - q_k) V_ki. This is GPTQ without the inverse of H, as Babai's nearest plane (arXiv
    2507.18553).
    """

    order_D: Tensor
    """Columns in the order in which they are rounded, int64."""
    feedback_DD: Tensor
    """V, float64."""

    @classmethod
    def of(cls, moments_DD: Tensor, *, damping: float = DAMPING, by_size: bool = True) -> "ErrorFeedback":
        """Factorise the second moments of an input.

        Args:
            moments_DD: H, (D, D), symmetric: second moments, or the covariance where a bias takes up the mean error.
            damping: Share of the mean of the diagonal that is added to the diagonal.
            by_size: Round the columns of large second moments first, while the others can make up for it; otherwise
                in their own order.

        Returns:
            The feedback.

        Raises:
            torch.linalg.LinAlgError: H is not positive definite: the damping is too small.
        """
        size_D = moments_DD.diagonal().double()
        # Stable, so that equal columns keep their order.
        order_D = size_D.argsort(descending=True, stable=True) if by_size else torch.arange(len(size_D))
        damped_DD = moments_DD[order_D[:, None], order_D].double()
        mean = float(size_D.mean())
        # An input that is always zero says nothing: every column is rounded to nearest.
        damped_DD.diagonal().add_(damping * mean if mean > 0 else 1.0)

        # Cholesky's factor is a lower one. With rows and columns in reverse it is the upper one, back in order.
        upper_DD = torch.linalg.cholesky(damped_DD.flip(0, 1)).flip(0, 1)
        return cls(order_D, upper_DD.div_(upper_DD.diagonal().clone()))


def gptq(weight_OD: Tensor, grid: IntegerGrid, feedback: ErrorFeedback) -> Tensor:
    """Round a weight column by column, each column with the errors of those before in it.

    With second moments that are diagonal this is rounding to nearest, ``IntegerGrid.codes``.

    Args:
        weight_OD: The weight, (O, D).
        grid: The numbers that it may become.
        feedback: What the second moments of its input say, (D, D).

    Returns:
        Codes, (O, D), int8. All is computed in float32, of a float64 weight in float64.
    """
    dtype = torch.promote_types(weight_OD.dtype, torch.float32)
    # A row for each column, in the order of rounding: rows are contiguous.
    order_D = feedback.order_D
    weight_DO = weight_OD.T[order_D].to(dtype, copy=True)
    scale_GO = grid.scale_OG.T.to(dtype).contiguous()
    zero_GO = grid.zero_OG.T.to(dtype).contiguous()
    V_DD = feedback.feedback_DD.to(dtype)

    wanted_DO = weight_DO.clone()
    codes_DO = torch.empty_like(weight_DO, dtype=torch.int8)
    groups = (order_D // grid.columns).tolist()
    for start in range(0, len(groups), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(groups))
        # What the block's columns have lost, w - q.
        error_BO = weight_DO[start:stop]
        for i in range(start, stop):
            scale_O = scale_GO[groups[i]]
            zero_O = zero_GO[groups[i]]
            code_O = grid._nearest(wanted_DO[i], scale_O, zero_O)
            codes_DO[i] = code_O
            error_BO[i - start].sub_(code_O.sub_(zero_O).mul_(scale_O))
            wanted_DO[i + 1 : stop].addr_(V_DD[i, i + 1 : stop], error_BO[i - start])
        wanted_DO[stop:].addmm_(V_DD[start:stop, stop:].T, error_BO)

    codes_OD = torch.empty(weight_OD.shape, dtype=torch.int8)
    codes_OD[:, order_D] = codes_DO.T
    return codes_OD


def rounding_error(moments_DD: Tensor, weight_OD: Tensor, rounded_OD: Tensor) -> float:
    """Return the mean square of the output's error, summed over outputs: tr((W - Q) H (W - Q)^T), in float64."""
    error_OD = weight_OD.double() - rounded_OD.double()
    return float(((error_OD @ moments_DD.double()) * error_OD).sum())
