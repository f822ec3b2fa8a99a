"""Moments: the one sufficient statistic of a stream of activations. Partial moments add up to the whole.

Letters: N tokens, D columns of a site.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Site = Literal["attn", "mlp", "block"]
"""``attn`` is the input of ``o_proj``, ``mlp`` the input of ``down_proj``. ``block`` is a decoder layer as a whole; its
one column is the cosine of what goes in and what comes out."""
SITES: tuple[Site, ...] = ("attn", "mlp")
"""Inputs of a weight whose columns can be cut: what has scores, norms and a mean to compensate with."""
RECORDED: tuple[Site, ...] = (*SITES, "block")
"""Everything that calibration records."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and summed squared deviations of D columns over ``count`` tokens."""

    count: int
    mean_D: Tensor
    """float64"""
    m2_D: Tensor
    """float64, sum over tokens of (x - mean)^2"""

    @classmethod
    def of(cls, x_ND: Tensor) -> "Moments":
        """Moments of one batch, two passes, in float64 on the device of ``x_ND``.

        In float32 a short prompt's variance is off by 1e-7; the second pass also subtracts the mean's own rounding
        (Chan, Golub & LeVeque 1983, the corrected two-pass algorithm).
        """
        n = x_ND.shape[0]
        divisor = max(n, 1)  # a batch may hold no token that counts: sequences of one token, with the first left out
        mean_D = x_ND.sum(0, dtype=torch.float64) / divisor
        deviation_ND = x_ND - mean_D
        m2_D = deviation_ND.square().sum(0) - deviation_ND.sum(0).square() / divisor
        return cls(n, mean_D, m2_D)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both streams together (Chan, Golub & LeVeque, the parallel variance)."""
        if not self.count or not other.count:
            return self if self.count else other
        n = self.count + other.count
        delta_D = other.mean_D - self.mean_D
        mean_D = self.mean_D + delta_D * (other.count / n)
        m2_D = self.m2_D + other.m2_D + delta_D.square() * (self.count * other.count / n)
        return Moments(n, mean_D, m2_D)

    def cpu(self) -> "Moments":
        return Moments(self.count, self.mean_D.cpu(), self.m2_D.cpu())

    @property
    def var_D(self) -> Tensor:
        """Population variance, float64."""
        return self.m2_D / self.count

    @property
    def square_D(self) -> Tensor:
        """Mean square, E[x^2] = Var[x] + E[x]^2, float64."""
        return self.var_D + self.mean_D.square()


Statistics = Mapping[tuple[int, Site], Moments]
"""Moments of every (layer, site)."""


def tree_sum(parts: Iterable[Moments]) -> Moments:
    """Add up in a tree whose shape depends on the number of parts alone, holding log2(parts) of them at a time.

    A fixed shape gives the same bytes whatever finished first. Raises ValueError for no parts.
    """
    stack: list[tuple[int, Moments]] = []
    for part in parts:
        height = 0
        while stack and stack[-1][0] == height:
            part = stack.pop()[1] + part
            height += 1
        stack.append((height, part))
    if not stack:
        raise ValueError("no moments to add")
    total = stack.pop()[1]
    while stack:
        total = stack.pop()[1] + total
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
