"""Scores: moments and weight norms in, importance per column, query head and channel out.

Letters: D columns of a site, H query heads, d head dimension. ``l1_D`` and ``l2_D`` are the L1 and the squared L2 norm
of each column of the ``o_proj`` or ``down_proj`` weight, float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from seap_ray.core.moments import Moments, Site, Statistics, blocks

PRIOR = 64
"""Tokens at which an expert's own statistics and the average of all count the same."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Column norms of one weight of shape (out, D)."""

    l1_D: Tensor
    l2_D: Tensor
    """Squared L2 norm."""

    @classmethod
    def of(cls, weight_OD: Tensor) -> "Norms":
        """In float64: float16 norms of 4,096 columns take only some 200 distinct values, and tie."""
        l1_D = l2_D = weight_OD.new_zeros(weight_OD.shape[1], dtype=torch.float64)
        for rows_OD in blocks(weight_OD):
            l1_D = l1_D + rows_OD.abs().sum(0)
            l2_D = l2_D + rows_OD.square_().sum(0)
        return cls(l1_D, l2_D)


WeightNorms = Mapping[tuple[int, Site], Norms]
"""Norms of every (layer, site)."""


def wifv(moments: Moments, norms: Norms) -> Tensor:
    """SEAP's s_F and FLAP's weighted input feature variance: Var[x] ||w||_2^2 (arXiv 2503.07605, eq. 11)."""
    return moments.var_D * norms.l2_D


def wifn(moments: Moments, norms: Norms) -> Tensor:
    """SEAP's s_W as the paper has it: E[x^2] ||w||_1 (eq. 12)."""
    return moments.square_D * norms.l1_D


def wanda_sp(moments: Moments, norms: Norms) -> Tensor:
    """Wanda-sp: RMS[x] ||w||_1 (FLAP's structured form of arXiv 2306.11695)."""
    return moments.square_D.sqrt() * norms.l1_D


def energy(moments: Moments, norms: Norms) -> Tensor:
    """E[x^2] ||w||_2^2: the output error of cutting a column with no bias to repair its mean."""
    return moments.square_D * norms.l2_D


def official_wifn(moments: Moments, norms: Norms) -> Tensor:
    """What the SEAP authors' code computes under the name WIFN: RMS[x] ||w||_2^2."""
    return moments.square_D.sqrt() * norms.l2_D


def magnitude(moments: Moments, norms: Norms) -> Tensor:
    """||w||_2, no data."""
    return norms.l2_D.sqrt()


SCORES: dict[str, Callable[[Moments, Norms], Tensor]] = {
    score.__name__: score for score in (wifv, wifn, wanda_sp, energy, official_wifn, magnitude)
}


def random_score(n: int, seed: int, *, layer: int, site: Site) -> Tensor:
    """Uniform in (0, 1), a site's own, the same in every process: the score ``random``, a floor for all others."""
    generator = Random(f"{seed} {layer} {site}")
    return torch.tensor([generator.random() for _ in range(n)], dtype=torch.float64)


def trusted(experts: Sequence[Moments]) -> list[Moments]:
    """Moments of a mixture's experts, each believed as far as it has tokens: n of n + ``PRIOR``.

    For the rest a column's variance and squared mean are the average over all of the layer's experts, by their tokens,
    so that a rarely routed expert is ranked by its weights, and not by noise.
    """
    total = max(sum(of.count for of in experts), 1)
    usual_var = sum(of.count * of.var_D.mean() for of in experts) / total
    usual_mean = sum(of.count * of.mean_D.square().mean() for of in experts) / total

    def believed(of: Moments) -> Moments:
        own = of.count / (of.count + PRIOR)
        var_D = own * of.var_D + (1 - own) * usual_var
        mean_D = (own * of.mean_D.square() + (1 - own) * usual_mean).sqrt().copysign(of.mean_D)
        return Moments(max(of.count, 1), mean_D, var_D * max(of.count, 1))

    return [believed(of) for of in experts]


def column_scores(
    score: Callable[[Moments, Norms], Tensor], of: Statistics, norms: WeightNorms, keys: Sequence[tuple[int, Site]]
) -> Tensor:
    """Scores of a site's columns (D,); ``keys`` of all experts of a mixture: (E, C)."""
    if len(keys) == 1:
        return score(of[keys[0]], norms[keys[0]])
    experts = trusted([of[key] for key in keys])
    return torch.stack([score(expert, norms[key]) for expert, key in zip(experts, keys, strict=True)])


def head_scores(score_D: Tensor, head_dim: int) -> Tensor:
    """Sum each query head's columns (paper, eq. 13): (H * d,) -> (H,)."""
    return score_D.reshape(-1, head_dim).sum(1)


def normalised(score: Tensor) -> Tensor:
    """Divide by the mean, so that layers and sites can be compared; all zeros stay zeros."""
    mean = score.mean()
    return score / mean if mean > 0 else torch.zeros_like(score)


def standardised(score_D: Tensor) -> Tensor:
    """FLAP's way to compare layers and sites: less the mean, over the standard deviation; all equal become zeros.

    FLAP's code squares the scores of ``o_proj`` once more before this, which its paper does not say; we do not.
    """
    spread = score_D.std()
    return (score_D - score_D.mean()) / spread if spread > 0 else torch.zeros_like(score_D)
