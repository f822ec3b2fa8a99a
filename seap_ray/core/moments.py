"""Moments: the one sufficient statistic of a stream of activations. Partial moments add up to the whole.

Letters: N tokens, D columns of a site.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import Self, TypeVar

import torch
from torch import Tensor

Site = str
"""``attn`` is the input of ``o_proj``, ``mlp`` the input of ``down_proj``, of a mixture of experts ``mlp.0``, ``mlp.1``
and so on, each with the tokens that were routed to it. ``block`` is a decoder layer as a whole; its one column is the
cosine of what goes in and what comes out. ``experts`` is the routing of a layer with MoE experts: its columns are for
every MoE expert its gate times the norm of its output, 0 for tokens that are not routed to it, and behind these for
every MoE expert 1 for tokens that are, 0 for others."""
SITES: tuple[Site, ...] = ("attn", "mlp")
"""Inputs of a weight whose columns can be cut: what has scores, norms and a mean to compensate with."""
RECORDED: tuple[Site, ...] = (*SITES, "block")
"""What calibration records of every model; of a mixture ``experts``, too."""


BLOCK = {"cpu": 1 << 16}
"""Elements that are made float64 at a time, by device: half a megabyte, which a core's cache holds."""
DEFAULT_BLOCK = 1 << 26
"""Elements of a block on other devices."""
PANEL = 256
"""Columns of a panel of a product with itself. On a CPU core it takes 0.58 of the whole product's time for 2,048 and
8,192 columns and 0.63 for 1,536; panels of 512 take 0.63, 0.59 and 0.69, of 128 0.61, 0.61 and 0.63."""


def blocks(x_ND: Tensor, rows_N: Tensor | None = None) -> Iterator[Tensor]:
    """Yield a tensor in float64, some rows at a time; the blocks are copies, the caller's to change.

    Args:
        x_ND: The tensor, (N, D), in any floating dtype.
        rows_N: Indices of the rows to yield, ascending; None for all.

    Yields:
        Blocks of at most ``BLOCK`` elements, (rows, D).
    """
    n_rows = max(1, BLOCK.get(x_ND.device.type, DEFAULT_BLOCK) // x_ND.shape[1])
    parts_ND = (part_ND for run_ND in _runs(x_ND, rows_N) for part_ND in run_ND.split(n_rows))
    yield from (part_ND.to(torch.float64, copy=True) for part_ND in parts_ND if len(part_ND))


def _runs(x_ND: Tensor, rows_N: Tensor | None) -> Iterable[Tensor]:
    """Return the rows, on a CPU run by run of neighbours, which padding alone interrupts: nothing is gathered."""
    if rows_N is None:
        return [x_ND]
    if not x_ND.is_cpu:
        return [x_ND.index_select(0, rows_N)]
    # A gap between neighbours begins a new run.
    breaks = (rows_N.diff() > 1).nonzero().squeeze(1) + 1
    return (x_ND.narrow(0, int(run[0]), len(run)) for run in rows_N.tensor_split(breaks) if len(run))


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviations of D columns over ``count`` tokens."""

    count: int
    """Number of tokens."""
    mean_D: Tensor
    """Mean of each column, (D,), float64."""
    m2_D: Tensor
    """Sum over tokens of (x - mean)^2, (D,), float64."""

    @classmethod
    def of(cls, x_ND: Tensor, rows_N: Tensor | None = None) -> "Moments":
        """Compute the moments of one batch.

        On a CPU this is one pass over the memory, a block at a time, less the first block's mean. The mean of a part of
        the data is so near that of all that the final subtraction costs no more digits than there are blocks.

        Args:
            x_ND: Activations, (N, D), in any floating dtype.
            rows_N: Indices of the tokens that count, ascending; None for all.

        Returns:
            Moments in float64 on the device of ``x_ND``.
        """
        if x_ND.is_cuda:
            from seap_ray.core import kernels  # Triton is there with a GPU alone

            return cls(len(x_ND if rows_N is None else rows_N), *kernels.moments(x_ND, rows_N))

        shift_D = total_D = square_D = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float64)
        n = 0
        # Rows are summed less the first block's mean, which keeps digits where a mean is far from zero.
        for block_ND in blocks(x_ND, rows_N):
            if not n:
                shift_D = block_ND.mean(0)
            n += len(block_ND)
            # The block is a copy: both steps may change it in place.
            total_D = total_D + block_ND.sub_(shift_D).sum(0)
            square_D = square_D + block_ND.square_().sum(0)
        offset_D = total_D / max(n, 1)  # a batch may hold no token that counts, if those at position 0 are left out
        # Rounding may leave the difference of two sums just below zero.
        return cls(n, shift_D + offset_D, (square_D - total_D * offset_D).clamp_(min=0))

    def __add__(self, other: Self) -> Self:
        """Return the moments of both streams together (Chan, Golub & LeVeque, the parallel variance)."""
        if not self.count or not other.count:
            return self if self.count else other

        n = self.count + other.count
        delta_D = other.mean_D - self.mean_D
        mean_D = torch.add(self.mean_D, delta_D, alpha=other.count / n)
        m2_D = (self.m2_D + other.m2_D).addcmul_(delta_D, delta_D, value=self.count * other.count / n)
        return replace(self, count=n, mean_D=mean_D, m2_D=m2_D)

    def to_cpu_async(self) -> Self:
        """Start a copy to the CPU and return it; from a GPU it is there when the current stream has been waited for."""
        mean_D = self.mean_D.to("cpu", non_blocking=True)
        m2_D = self.m2_D.to("cpu", non_blocking=True)
        return replace(self, mean_D=mean_D, m2_D=m2_D)

    @property
    def var_D(self) -> Tensor:
        """Population variance, (D,), float64; of no tokens, zero."""
        return self.m2_D / max(self.count, 1)

    @property
    def square_D(self) -> Tensor:
        """Mean square, E[x^2] = Var[x] + E[x]^2, (D,), float64."""
        return self.var_D + self.mean_D.square()


@dataclass(frozen=True, slots=True)
class Covariance(Moments):
    """Moments with all pairs of columns: what least squares and the optimal brain surgeon need."""

    comoment_DD: Tensor
    """Sum over tokens of (x - mean) (x - mean)^T, (D, D), float64 when merged; its diagonal is ``m2_D`` but for
    rounding."""

    @classmethod
    def of(cls, x_ND: Tensor, rows_N: Tensor | None = None) -> "Covariance":
        """Compute the covariance of one batch.

        Moments are those of ``Moments.of``. The product of the deviations is in float32 (float64 for float64). For
        bfloat16 on a GPU, where that product would take several times as long as the layer, it is ``split_product``.

        Args:
            x_ND: Activations, (N, D), in any floating dtype.
            rows_N: Indices of the tokens that count, ascending; None for all.

        Returns:
            The covariance on the device of ``x_ND``.
        """
        moments = Moments.of(x_ND, rows_N)
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        deviation_ND = x_ND.new_empty(moments.count, x_ND.shape[1], dtype=dtype)
        first = 0
        for block_ND in blocks(x_ND, rows_N):
            deviation_ND[first : first + len(block_ND)] = block_ND.sub_(moments.mean_D)
            first += len(block_ND)

        is_split = x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and moments.count
        comoment_DD = split_product(deviation_ND) if is_split else self_product(deviation_ND)
        return cls(moments.count, moments.mean_D, moments.m2_D, comoment_DD)

    def __add__(self, other: Self) -> Self:
        """Return the covariance of both streams together: Chan's update, with an outer product for the square."""
        if not self.count or not other.count:
            return self if self.count else other

        return self._added(other, self.comoment_DD + other.comoment_DD)

    def __iadd__(self, other: Self) -> Self:
        """Return the same as ``__add__``, in the memory of this covariance's matrix where both have tokens.

        The matrix changes: nothing else may use it.
        """
        if not self.count or not other.count:
            return self if self.count else other
        return self._added(other, self.comoment_DD.add_(other.comoment_DD))

    def _added(self, other: Self, sum_DD: Tensor) -> Self:
        """Return the covariance of both streams together, in the memory of the sum of their matrices."""
        moments = Moments.__add__(self, other)
        delta_D = (other.mean_D - self.mean_D).to(sum_DD.dtype)
        comoment_DD = sum_DD.addr_(delta_D, delta_D, alpha=self.count * other.count / moments.count)
        return replace(moments, comoment_DD=comoment_DD)

    def without(self, part: Self) -> Self:
        """Return the covariance of the tokens of a stream that are not in ``part``: Chan's update, undone."""
        count = self.count - part.count
        mean_D = (self.count * self.mean_D - part.count * part.mean_D) / count
        delta_D = part.mean_D - mean_D
        weight = count * part.count / self.count

        comoment_DD = (self.comoment_DD - part.comoment_DD).addr_(delta_D, delta_D, alpha=-weight)
        # Rounding may leave a column that hardly varies just below zero.
        m2_D = (self.m2_D - part.m2_D - weight * delta_D.square()).clamp_min(0)
        return replace(self, count=count, mean_D=mean_D, m2_D=m2_D, comoment_DD=comoment_DD)

    def to_cpu_async(self) -> Self:
        """Start a copy of the moments to the CPU, and wait for the matrix."""
        # The matrix is too large for the pinned memory that a copy without waiting would keep.
        return replace(Moments.to_cpu_async(self), comoment_DD=self.comoment_DD.cpu())

    @property
    def covariance_DD(self) -> Tensor:
        """Population covariance, (D, D), in the dtype of the co-moment; of no tokens, zero."""
        return self.comoment_DD / max(self.count, 1)


def self_product(x_ND: Tensor) -> Tensor:
    """Return ``x_ND.T @ x_ND``. On a CPU it is computed panel by panel, from the diagonal on, and mirrored."""
    if not x_ND.is_cpu:
        return x_ND.T @ x_ND

    n_columns = x_ND.shape[1]
    product_DD = x_ND.new_empty(n_columns, n_columns)
    for first in range(0, n_columns, PANEL):
        panel = slice(first, first + PANEL)
        beyond = slice(first + PANEL, None)
        torch.mm(x_ND[:, panel].T, x_ND[:, first:], out=product_DD[panel, first:])
        product_DD[beyond, panel] = product_DD[panel, beyond].T
    return product_DD


def split_product(x_ND: Tensor) -> Tensor:
    """Return ``x_ND.T @ x_ND`` of float32 on a GPU by three products in bfloat16.

    Each number is taken as a sum of a large and a small one in bfloat16; the product of the small ones is left out. An
    element is off by up to 1.6e-4 of the two columns' lengths (8192 tokens on an H200), in float32 by 0.7e-4 in five
    times the time. The error of a correlation that is estimated from as many tokens is some 1e-2.
    """
    large_ND = x_ND.bfloat16()
    small_ND = (x_ND - large_ND).bfloat16()
    mixed_DD = torch.mm(large_ND.T, small_ND, out_dtype=torch.float32)
    # In place: each of these matrices is as large as the covariance.
    return torch.mm(large_ND.T, large_ND, out_dtype=torch.float32).add_(mixed_DD).add_(mixed_DD.T)


Statistics = Mapping[tuple[int, Site], Moments]
"""Moments of every (layer, site)."""
Part = TypeVar("Part")


def tree_sum(parts: Iterable[Part], add: Callable[[Part, Part], Part] = add) -> Part:
    """Add parts up in a tree whose shape depends on their number alone.

    A fixed shape gives the same bytes whatever finished first.

    Args:
        parts: What to add, taken one after another; log2 of their number are held at a time.
        add: Adds two parts.

    Returns:
        The sum.

    Raises:
        ValueError: There are no parts.
    """
    # Sums of 2^height parts, the highest first.
    stack: list[tuple[int, Part]] = []
    for part in parts:
        height = 0
        # Two sums of one height make one of the next, like carrying in binary.
        while stack and stack[-1][0] == height:
            part = add(stack.pop()[1], part)
            height += 1
        stack.append((height, part))
    if not stack:
        raise ValueError("no moments to add")
    # What is left are sums of different heights, the latest on top.
    total = stack.pop()[1]
    while stack:
        total = add(stack.pop()[1], total)
    return total


def pooled(parts: list[Moments], weights: list[float]) -> Moments:
    """Return the moments of several streams pooled by weight, the spread between their means included.

    Each stream counts by its weight, not by its length: var = sum w (var_i + (mean_i - mean)^2), w normalised to 1.

    Args:
        parts: Moments of each stream.
        weights: Weight of each stream.

    Returns:
        Moments with the streams' tokens added up as ``count``.
    """
    # Divided by their sum, so that only the ratios of the weights matter.
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    means_PD = torch.stack([part.mean_D for part in parts])
    variances_PD = torch.stack([part.var_D for part in parts])

    mean_D = shares @ means_PD
    var_D = shares @ (variances_PD + (means_PD - mean_D).square())
    # Moments hold sums of squares, from which ``var_D`` divides the count out again.
    count = sum(part.count for part in parts)
    return Moments(count, mean_D, var_D * count)


def pooled_statistics(parts: Sequence[Statistics], weights: Sequence[float]) -> Statistics:
    """Return the moments (``pooled``) of every (layer, site) of several tasks' statistics.

    Args:
        parts: Statistics of each task.
        weights: Weight of each task.

    Returns:
        Statistics of the tasks as one stream.
    """
    statistics: dict[tuple[int, Site], Moments] = {}
    for key in parts[0]:
        moments = [part[key] for part in parts]
        statistics[key] = pooled(moments, stream_shares(parts, weights, key))
    return statistics


def stream_shares(parts: Sequence[Statistics], weights: Sequence[float], key: tuple[int, Site]) -> list[float]:
    """Return the weight of each stream at a site.

    At a site of an MoE expert a stream counts by how much of it is routed there.
    """
    # Attention and blocks see every token, in whichever layer they are, an MoE expert those that are routed to it; at
    # all other sites the quotient is 1.
    routed = [w * part[key].count / _n_tokens(part) for w, part in zip(weights, parts, strict=True)]
    # Where no stream is routed to the expert, all of these are 0.
    return routed if sum(routed) else list(weights)


def _n_tokens(statistics: Statistics) -> int:
    """Return how many tokens statistics are of."""
    # An MoE expert counts those of its tokens alone.
    return max(moments.count for moments in statistics.values())


def pooled_covariance(parts: Iterable[Covariance], weights: Sequence[float]) -> Covariance:
    """Return the covariance of several streams pooled by weight: sum w (C_i + (mean_i - mean) (mean_i - mean)^T).

    Args:
        parts: Covariance of each stream, taken one after another, so that two matrices are held at a time.
        weights: Weight of each stream.

    Returns:
        Covariance with the streams' tokens added up as ``count``.
    """
    pairs = zip(parts, weights, strict=True)
    first, total_weight = next(pairs)
    count = first.count
    mean_D = first.mean_D
    # A quotient and so a copy, which may change in place.
    covariance_DD = first.covariance_DD

    # One stream after another: what is pooled so far counts by the weights that are in it.
    for part, weight in pairs:
        share = weight / (total_weight + weight)
        delta_D = part.mean_D - mean_D
        covariance_DD.lerp_(part.covariance_DD, share).addr_(delta_D, delta_D, alpha=share * (1 - share))
        count += part.count
        mean_D = mean_D + share * delta_D
        total_weight += weight

    comoment_DD = covariance_DD.mul_(count)
    # A clone, since the diagonal is a view of the matrix.
    return Covariance(count, mean_D, comoment_DD.diagonal().clone(), comoment_DD)
