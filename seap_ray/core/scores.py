"""Scores: moments and weight norms in, importance per column, query head and channel out.

Letters: O output features, D columns of a site, H query heads, d head dimension, E MoE experts, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from seap_ray.core.moments import Moments, Site, Statistics, blocks

LayerScores = tuple[Tensor, Tensor]
"""Scores of one layer's query heads (H,) and channels: (C,), of a mixture of experts (E, C)."""
PRIOR_TOKENS = 64
"""Tokens at which an MoE expert's own statistics and the average of all count the same."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Column norms of one ``o_proj`` or ``down_proj`` weight, (D,), float64."""

    l1_D: Tensor
    """L1 norm of each column."""
    l2_squared_D: Tensor
    """Squared L2 norm of each column."""

    @classmethod
    def of(cls, weight_OD: Tensor) -> "Norms":
        """Compute the norms of a weight's columns.

        Args:
            weight_OD: The weight, (O, D), in any floating dtype.

        Returns:
            Norms in float64: float16 norms of 4,096 columns take only some 200 distinct values, and tie.
        """
        l1_D = weight_OD.new_zeros(weight_OD.shape[1], dtype=torch.float64)
        # Both may begin as the same zeros: the sums below are new tensors.
        l2_squared_D = l1_D
        # Some rows at a time in float64; the block is a copy, so squaring it in place is free.
        for rows_OD in blocks(weight_OD):
            l1_D = l1_D + rows_OD.abs().sum(0)
            l2_squared_D = l2_squared_D + rows_OD.square_().sum(0)
        return cls(l1_D, l2_squared_D)


WeightNorms = Mapping[tuple[int, Site], Norms]
"""Norms of every (layer, site)."""
Score = Callable[[Moments, Norms], Tensor]
"""Importance of each column, (D,), float64, by its moments and its weight's norms."""


def wifv(moments: Moments, norms: Norms) -> Tensor:
    """Return SEAP's s_F and FLAP's weighted input feature variance: Var[x] ||w||_2^2 (arXiv 2503.07605, eq. 11)."""
    return moments.var_D * norms.l2_squared_D


def wifn(moments: Moments, norms: Norms) -> Tensor:
    """Return SEAP's s_W as the paper has it: E[x^2] ||w||_1 (arXiv 2503.07605, eq. 12)."""
    return moments.square_D * norms.l1_D


def wanda_sp(moments: Moments, norms: Norms) -> Tensor:
    """Return Wanda-sp: RMS[x] ||w||_1 (FLAP's structured form of arXiv 2306.11695)."""
    return moments.square_D.sqrt() * norms.l1_D


def energy(moments: Moments, norms: Norms) -> Tensor:
    """Return E[x^2] ||w||_2^2: the output error of cutting a column with no bias to repair its mean."""
    return moments.square_D * norms.l2_squared_D


def official_wifn(moments: Moments, norms: Norms) -> Tensor:
    """Return what the SEAP authors' code computes under the name WIFN: RMS[x] ||w||_2^2."""
    return moments.square_D.sqrt() * norms.l2_squared_D


def magnitude(moments: Moments, norms: Norms) -> Tensor:
    """Return ||w||_2, which needs no data."""
    return norms.l2_squared_D.sqrt()


SCORES: dict[str, Score] = {score.__name__: score for score in (wifv, wifn, wanda_sp, energy, official_wifn, magnitude)}
"""Scores of single columns, by the name that the configuration has for them."""


def random_score(n: int, seed: int, *, layer: int, site: Site) -> Tensor:
    """Draw the score ``random``, a floor for all others: uniform in (0, 1), the same in every process.

    Args:
        n: Number of columns.
        seed: Seed of the run or the model.
        layer: Number of the layer.
        site: The site; every (layer, site) has its own numbers.

    Returns:
        Scores, (n,), float64.
    """
    # Random reads a string's characters; its hash would differ from process to process.
    generator = Random(f"{seed} {layer} {site}")
    return torch.tensor([generator.random() for _ in range(n)], dtype=torch.float64)


def shrunk(experts: Sequence[Moments]) -> list[Moments]:
    """Return the moments of a layer's MoE experts, each believed as far as it has tokens: n of n + ``PRIOR_TOKENS``.

    For the rest a column's variance and squared mean are the average over all of the layer's MoE experts, by their
    tokens, so that a rarely routed one is ranked by its weights, and not by noise.
    """
    # At least 1, as no token may have been routed at all.
    total = max(sum(moments.count for moments in experts), 1)
    average_var = sum(moments.count * moments.var_D.mean() for moments in experts) / total
    average_square = sum(moments.count * moments.mean_D.square().mean() for moments in experts) / total

    def shrink(moments: Moments) -> Moments:
        """Move one expert's moments towards the average; the sign of its means stays."""
        belief = moments.count / (moments.count + PRIOR_TOKENS)
        var_D = belief * moments.var_D + (1 - belief) * average_var
        mean_D = (belief * moments.mean_D.square() + (1 - belief) * average_square).sqrt().copysign(moments.mean_D)
        # An expert without tokens has the average too, so it may not count as empty.
        return Moments(max(moments.count, 1), mean_D, var_D * max(moments.count, 1))

    return [shrink(moments) for moments in experts]


def column_scores(score: Score, statistics: Statistics, norms: WeightNorms, keys: Sequence[tuple[int, Site]]) -> Tensor:
    """Score the columns of one layer's site.

    Args:
        score: One of ``SCORES``.
        statistics: Moments by (layer, site).
        norms: Weight norms by (layer, site).
        keys: The site's key; of a mixture's ``mlp`` those of all its MoE experts.

    Returns:
        Scores, (D,), float64; with several keys (E, C), of shrunk moments; none of a layer without the site.
    """
    if not keys:
        return torch.zeros(0, dtype=torch.float64)
    if len(keys) == 1:
        return score(statistics[keys[0]], norms[keys[0]])
    # An MoE expert sees the tokens that are routed to it alone, at times few.
    experts = shrunk([statistics[key] for key in keys])
    return torch.stack([score(moments, norms[key]) for moments, key in zip(experts, keys, strict=True)])


def reap(moments: Moments) -> Tensor:
    """Return REAP's score of MoE experts: the mean, over the tokens that are routed to one, of its gate times the norm
    of its output (Lasby et al., arXiv 2510.13999).

    Args:
        moments: Moments of a layer's site ``experts``.

    Returns:
        Scores, (E,), float64; of an expert without a token, zero.
    """
    gated_E, share_E = moments.mean_D.chunk(2)
    return torch.where(share_E > 0, gated_E / share_E, 0.0)


def expert_scores(columns_EC: Tensor, moments: Moments) -> Tensor:
    """Score MoE experts by their columns: an expert's columns together, times the share of tokens routed to it.

    By ``energy`` this is what the layer's squared error rises by for the expert's removal, as far as its columns do not
    correlate and its gate is one.

    Args:
        columns_EC: Scores of the columns of each expert, (E, C).
        moments: Moments of the layer's site ``experts``.

    Returns:
        Scores, (E,), float64.
    """
    _, share_E = moments.mean_D.chunk(2)
    return columns_EC.sum(1) * share_E


def scores_of_experts(
    name: str, statistics: Statistics, norms: WeightNorms, keys: Sequence[tuple[int, Site]]
) -> Tensor:
    """Score the MoE experts of one layer.

    Args:
        name: ``reap``, or one of ``SCORES``, by whose columns they are scored (``expert_scores``).
        statistics: Moments by (layer, site).
        norms: Weight norms by (layer, site).
        keys: Keys of the sites of all MoE experts of the layer.

    Returns:
        Scores, (E,), float64.
    """
    layer, _ = keys[0]
    routing = statistics[layer, "experts"]
    if name == "reap":
        return reap(routing)
    return expert_scores(column_scores(SCORES[name], statistics, norms, keys), routing)


def head_scores(score_D: Tensor, head_dim: int) -> Tensor:
    """Sum each query head's columns (SEAP, arXiv 2503.07605, eq. 13): (H * d,) -> (H,)."""
    return score_D.reshape(-1, head_dim).sum(1)


def normalised(score: Tensor) -> Tensor:
    """Divide scores by their mean, so that layers and sites can be compared; all zeros stay zeros."""
    mean = score.mean()
    # Of a layer without the site there are none, and no mean.
    return score / mean if mean > 0 else torch.zeros_like(score)


def standardised(score_D: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation, as FLAP compares layers and sites.

    Scores that are all equal become zeros. FLAP's code squares the scores of ``o_proj`` once more before this, which
    its paper does not say; we do not.
    """
    # Of a single score the deviation is NaN, which is not above zero either.
    spread = score_D.std()
    return (score_D - score_D.mean()) / spread if spread > 0 else torch.zeros_like(score_D)
