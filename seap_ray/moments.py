"""Moments: the one sufficient statistic of a stream of activations. Partial moments add up to the whole.

Letters: N tokens, D columns of a site.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import Self, TypeVar

import torch
from torch import Tensor

Site = str
"""``attn`` is the input of ``o_proj``, ``mlp`` the input of ``down_proj``, of a mixture of experts ``mlp.0``, ``mlp.1``
and so on, each with the tokens that were routed to it. ``block`` is a decoder layer as a whole; its one column is the
cosine of what goes in and what comes out."""
SITES: tuple[Site, ...] = ("attn", "mlp")
"""Inputs of a weight whose columns can be cut: what has scores, norms and a mean to compensate with."""
RECORDED: tuple[Site, ...] = (*SITES, "block")
"""Everything that calibration records."""


def chosen(x_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """The rows that are named; without names, all."""
    return x_ND if rows_N is None else x_ND.index_select(0, rows_N)


def two_pass(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviations of each column, float64.

    In float32 a short prompt's variance is off by 1e-7; the second pass also subtracts the mean's own rounding (Chan,
    Golub & LeVeque 1983, the corrected two-pass algorithm).
    """
    divisor = max(
        len(x_ND), 1
    )  # a batch may hold no token that counts: sequences of one token, with the first left out
    mean_D = x_ND.sum(0, dtype=torch.float64) / divisor
    deviation_ND = x_ND - mean_D
    return mean_D, deviation_ND.square().sum(0) - deviation_ND.sum(0).square() / divisor


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviations of D columns over ``count`` tokens."""

    count: int
    mean_D: Tensor
    """float64"""
    m2_D: Tensor
    """float64, sum over tokens of (x - mean)^2"""

    @classmethod
    def of(cls, x_ND: Tensor, rows_N: Tensor | None = None) -> "Moments":
        """Moments of one batch, or of the tokens in it that ``rows_N`` names, in float64 on the device of ``x_ND``."""
        if x_ND.is_cuda:
            from seap_ray import kernels  # Triton is there with a GPU alone

            return cls(len(x_ND if rows_N is None else rows_N), *kernels.moments(x_ND, rows_N))
        x_ND = chosen(x_ND, rows_N)
        return cls(len(x_ND), *two_pass(x_ND))

    def __add__(self, other: Self) -> Self:
        """Moments of both streams together (Chan, Golub & LeVeque, the parallel variance)."""
        if not self.count or not other.count:
            return self if self.count else other
        n = self.count + other.count
        delta_D = other.mean_D - self.mean_D
        mean_D = self.mean_D + delta_D * (other.count / n)
        m2_D = self.m2_D + other.m2_D + delta_D.square() * (self.count * other.count / n)
        return replace(self, count=n, mean_D=mean_D, m2_D=m2_D)

    def cpu(self) -> Self:
        return replace(self, mean_D=self.mean_D.cpu(), m2_D=self.m2_D.cpu())

    @property
    def var_D(self) -> Tensor:
        """Population variance, float64; of no tokens, zero."""
        return self.m2_D / max(self.count, 1)

    @property
    def square_D(self) -> Tensor:
        """Mean square, E[x^2] = Var[x] + E[x]^2, float64."""
        return self.var_D + self.mean_D.square()


@dataclass(frozen=True, slots=True)
class Covariance(Moments):
    """Moments with all pairs of columns: what least squares and the optimal brain surgeon need."""

    comoment_DD: Tensor
    """Sum over tokens of (x - mean) (x - mean)^T, float64 when merged; its diagonal is ``m2_D`` but for rounding."""

    @classmethod
    def of(cls, x_ND: Tensor, rows_N: Tensor | None = None) -> "Covariance":
        """Of one batch: its moments, as ever, and the product of the deviations in float32 (float64 for float64)."""
        moments = Moments.of(x_ND, rows_N)
        deviation_ND = (chosen(x_ND, rows_N) - moments.mean_D).to(torch.promote_types(x_ND.dtype, torch.float32))
        return cls(moments.count, moments.mean_D, moments.m2_D, deviation_ND.T @ deviation_ND)

    def __add__(self, other: Self) -> Self:
        """Covariance of both streams together: Chan's update, with an outer product for the square."""
        if not self.count or not other.count:
            return self if self.count else other
        moments = Moments.__add__(self, other)
        delta_D = (other.mean_D - self.mean_D).to(self.comoment_DD.dtype)
        comoment_DD = (self.comoment_DD + other.comoment_DD).addr_(
            delta_D, delta_D, alpha=self.count * other.count / moments.count
        )
        return replace(moments, comoment_DD=comoment_DD)

    def cpu(self) -> Self:
        return replace(Moments.cpu(self), comoment_DD=self.comoment_DD.cpu())

    @property
    def covariance_DD(self) -> Tensor:
        """Population covariance, in the dtype of the co-moment."""
        return self.comoment_DD / self.count


Statistics = Mapping[tuple[int, Site], Moments]
"""Moments of every (layer, site)."""
Part = TypeVar("Part")


def tree_sum(parts: Iterable[Part], add: Callable[[Part, Part], Part] = add) -> Part:
    """Add up in a tree whose shape depends on the number of parts alone, holding log2(parts) of them at a time.

    A fixed shape gives the same bytes whatever finished first. Raises ValueError for no parts.
    """
    stack: list[tuple[int, Part]] = []
    for part in parts:
        height = 0
        while stack and stack[-1][0] == height:
            part = add(stack.pop()[1], part)
            height += 1
        stack.append((height, part))
    if not stack:
        raise ValueError("no moments to add")
    total = stack.pop()[1]
    while stack:
        total = add(stack.pop()[1], total)
    return total


def pooled(parts: list[Moments], weights: list[float]) -> Moments:
    """Moments of the weighted mixture of several streams, the spread between their means included.

    Each stream counts by its weight, not by its length: var = sum w (var_i + (mean_i - mean)^2), w normalised to 1.
    """
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    means_PD = torch.stack([part.mean_D for part in parts])
    variances_PD = torch.stack([part.var_D for part in parts])
    mean_D = shares @ means_PD
    var_D = shares @ (variances_PD + (means_PD - mean_D).square())
    count = sum(part.count for part in parts)
    return Moments(count, mean_D, var_D * count)


def mixed(parts: Sequence[Statistics], weights: Sequence[float]) -> Statistics:
    """``pooled``, of every site of several tasks' statistics."""
    return {key: pooled([part[key] for part in parts], shares(parts, weights, key)) for key in parts[0]}


def shares(parts: Sequence[Statistics], weights: Sequence[float], key: tuple[int, Site]) -> list[float]:
    """What each stream is of the mixture at a site: of an expert's, by how much of the stream is routed to it."""
    layer, _ = key
    routed = [w * part[key].count / part[layer, "attn"].count for w, part in zip(weights, parts, strict=True)]
    return routed if sum(routed) else list(weights)


def pooled_covariance(parts: Iterable[Covariance], weights: Sequence[float]) -> Covariance:
    """As ``pooled``, of covariances: C = sum w (C_i + (mean_i - mean) (mean_i - mean)^T); two matrices at a time."""
    pairs = zip(parts, weights, strict=True)
    first, so_far = next(pairs)
    count, mean_D, covariance_DD = first.count, first.mean_D, first.covariance_DD
    for part, weight in pairs:
        share, delta_D = weight / (so_far + weight), part.mean_D - mean_D
        covariance_DD.lerp_(part.covariance_DD, share).addr_(delta_D, delta_D, alpha=share * (1 - share))
        count, mean_D, so_far = count + part.count, mean_D + share * delta_D, so_far + weight
    comoment_DD = covariance_DD * count
    return Covariance(count, mean_D, comoment_DD.diagonal().clone(), comoment_DD)
