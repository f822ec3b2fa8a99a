"""Ranking: the allocations ``global`` and ``standardised``, which take what scores least over all layers.

Letters: L layers, H query heads, C channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import Tensor

from seap_ray.config import AllocationSection
from seap_ray.core.architecture import Shape
from seap_ray.core.moments import SITES, Site
from seap_ray.core.plan import best_heads, by_moe_expert
from seap_ray.core.reach import caps
from seap_ray.core.scores import LayerScores, normalised
from seap_ray.core.shares import with_remainder
from seap_ray.core.widths import WidthConstraints


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The next narrower width of a layer's attention or MLP, and what it costs."""

    lost_score: float
    """Sum of the scores of the units that go."""
    columns: int
    """Columns of ``o_proj`` or ``down_proj`` that go."""
    weights: int
    """Weights saved."""
    width: dict[str, int]
    """Fields of ``Shape`` that it changes."""


RANKING_VALUES: Mapping[str, Callable[[_Candidate], float]] = {
    "global": lambda candidate: candidate.lost_score / candidate.weights,
    "standardised": lambda candidate: candidate.lost_score / candidate.columns,
}
"""Allocations that rank what may go over all layers, and the value that they rank it by, the least first."""


@dataclass(frozen=True, slots=True)
class _RankedCandidate:
    """A narrower width of one layer, with its place in the ranking."""

    value: float
    layer: int
    site: Site
    width: dict[str, int]


def greedy_shapes(
    constraints_L: Sequence[WidthConstraints],
    allocation: AllocationSection,
    ranking: Iterable[_RankedCandidate],
    ratio: float,
) -> list[Shape]:
    """Take narrower widths by their value over all layers, the least first, while they fit the budget.

    ``global`` ranks by normalised score divided by the parameters saved (the SEAP paper's AL ranks by score alone),
    ``standardised`` by the mean standardised score of the columns, whatever they save (FLAP's AL-AM).
    """
    target = ratio * sum(constraints.size for constraints in constraints_L)
    cap_L = caps(constraints_L, allocation)
    shapes = [constraints.original for constraints in constraints_L]
    # Sites whose next narrower width did not fit; later ones lose still more.
    stopped: set[tuple[int, Site]] = set()
    removed = 0

    # Layer and site settle equal values, so that the order is a pure function of the scores.
    for candidate in sorted(ranking, key=lambda candidate: (candidate.value, candidate.layer, candidate.site)):
        if (candidate.layer, candidate.site) in stopped:
            continue
        constraints = constraints_L[candidate.layer]
        old = shapes[candidate.layer]
        new = replace(old, **candidate.width)
        after = removed + constraints.removed(new) - constraints.removed(old)
        is_over_budget = after > target + constraints.tile_cost / 2
        is_over_cap = constraints.removed(new) > cap_L[candidate.layer] * constraints.size
        if is_over_budget or is_over_cap:
            stopped.add((candidate.layer, candidate.site))
            continue

        shapes[candidate.layer] = new
        removed = after

    # Layers that lost nothing stay whole: the remainder is taken from the others.
    may_change = [shape != constraints.original for constraints, shape in zip(constraints_L, shapes, strict=True)]
    return with_remainder(constraints_L, allocation, shapes, may_change, ratio)


def ranked_candidates(
    constraints_L: Sequence[WidthConstraints], scores_L: Sequence[LayerScores], kind: str, comparable: bool
) -> list[_RankedCandidate]:
    """List the ways to narrow every layer, in the order they must be taken.

    A later way never has less value than an earlier one of the same layer and site.
    """
    # Standardised scores compare between layers already.
    made_comparable = normalised if kind == "global" and not comparable else lambda score: score

    ranked: list[_RankedCandidate] = []
    for constraints, (head_H, channel_C) in zip(constraints_L, scores_L, strict=True):
        candidates: dict[Site, list[_Candidate]] = {
            "attn": _attention_candidates(constraints, made_comparable(head_H)),
            "mlp": _mlp_candidates(constraints, made_comparable(channel_C)),
        }

        for site in SITES:
            # A running maximum: a step that is worth less than one before it waits for that one.
            values = accumulate(map(RANKING_VALUES[kind], candidates[site]), max)
            for value, candidate in zip(values, candidates[site], strict=True):
                ranked.append(_RankedCandidate(value, constraints.layer, site, candidate.width))
    return ranked


def _attention_candidates(constraints: WidthConstraints, score_H: Tensor) -> list[_Candidate]:
    """List the steps from each option of a layer's attention to the next narrower one."""
    # Score that stays with each option, by its best units.
    kept_score: dict[tuple[int, int], float] = {}
    for option in constraints.options:
        _, heads = best_heads(score_H, constraints.original, option)
        kept_score[option] = float(score_H[list(heads)].sum())

    return [
        _Candidate(
            lost_score=kept_score[wide] - kept_score[narrow],
            columns=(wide[0] * wide[1] - narrow[0] * narrow[1]) * constraints.architecture.head_dim,
            weights=constraints.attention_cost(wide) - constraints.attention_cost(narrow),
            width={"groups": narrow[0], "heads_per_group": narrow[1]},
        )
        for wide, narrow in pairwise(constraints.options)
    ]


def _mlp_candidates(constraints: WidthConstraints, score_C: Tensor) -> list[_Candidate]:
    """List the steps from each number of channels to the next one, a tile narrower.

    All MoE experts of a layer lose a channel together, each its least.
    """
    # Position by position, the least channels of all MoE experts together.
    ascending_C = by_moe_expert(score_C).sort(1).values.sum(0)

    n = constraints.original.channels
    cost = constraints.channel_cost
    return [
        _Candidate(
            lost_score=float(ascending_C[n - wide : n - narrow].sum()),
            columns=wide - narrow,
            weights=(wide - narrow) * cost,
            width={"channels": narrow},
        )
        for wide, narrow in pairwise(constraints.channel_options)
    ]
