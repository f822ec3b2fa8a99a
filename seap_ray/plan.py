"""Plan: which key-value groups, query heads and channels of every layer stay, or under ``depth`` which layers.

First the widths (``Shape`` per layer) that meet a parameter budget after rounding, then the best units for them.
Under ``uniform`` and ``logistic`` the widths depend on the ratio alone, so all experts of one ratio have equal shapes.

Letters: L layers, K key-value groups, H query heads, C channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from seap_ray import sparsity
from seap_ray.architecture import Architecture, Shape
from seap_ray.config import AllocationSection, PruningSection
from seap_ray.errors import ConfigError
from seap_ray.moments import SITES, Site
from seap_ray.scores import normalised

LayerScores = tuple[Tensor, Tensor]
"""Scores of one layer's query heads (H,) and channels (C,), of a mixture (E, C) of E experts."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Indices, ascending, of what stays in one layer. Kept heads lie in kept groups, equally many in each."""

    groups: tuple[int, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    """Of a mixture those of each expert, one expert after another, equally many."""
    experts: int = 1

    @classmethod
    def whole(cls, architecture: Architecture) -> "Kept":
        dense, experts = architecture.dense, max(architecture.n_experts, 1)
        channels = tuple(range(dense.channels)) * experts
        return cls(tuple(range(dense.groups)), tuple(range(dense.heads)), channels, experts)

    @property
    def shape(self) -> Shape:
        return Shape(len(self.groups), len(self.heads) // len(self.groups), len(self.channels) // self.experts)

    def of(self, expert: int | None) -> "Kept":
        """With the channels of one expert alone."""
        if expert is None:
            return self
        width = len(self.channels) // self.experts
        return replace(self, channels=self.channels[expert * width : (expert + 1) * width], experts=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """One expert's cut."""

    name: str
    requested: float
    """Ratio that was asked for."""
    compensation: str
    kept: tuple[Kept, ...]
    provenance: dict[str, Any]
    """Score, allocation, tasks and statistics that it was made from."""
    dropped: tuple[int, ...] = ()
    """Layers of the base that go as a whole; ``kept`` has the others, in their order."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The base's layer that each entry of ``kept`` is cut from."""
        return tuple(layer for layer in range(len(self.kept) + len(self.dropped)) if layer not in self.dropped)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(kept.shape for kept in self.kept)

    def cuts(self, layer: int, dense: Shape) -> bool:
        return self.kept[layer].shape != dense

    def planned(self, architecture: Architecture) -> float:
        """Share of the decoder layers' weights that goes, added biases counted against it."""
        return ratio_of(self.shapes, architecture, compensated=self.compensation != "none")


@dataclass(frozen=True, slots=True)
class Rules:
    """What widths a layer may take."""

    architecture: Architecture
    options: tuple[tuple[int, int], ...]
    """Allowed (groups, heads per group), most parameters first."""
    tile: int
    """Kept channels are a multiple of this, or all."""
    bias: int
    """Weights that compensation adds to a cut layer."""

    @classmethod
    def of(
        cls, architecture: Architecture, pruning: PruningSection, *, compensated: bool, stock: bool = False
    ) -> "Rules":
        """``stock`` allows only head counts that the family's own config accepts: divisors of the hidden size.

        Raises ConfigError where the model's heads or channels cannot be split over ``tensor_parallel`` ranks.
        """
        dense, ranks = architecture.dense, pruning.tensor_parallel
        if architecture.mixes_windows and _unequal_groups(dense, pruning.attention_unit):
            head = "head or none" if dense.heads_per_group > 1 else "none"
            raise ConfigError(
                f"pruning.attention_unit: {pruning.attention_unit} leaves layers with unequal numbers of key-value "
                f"heads, which no engine serves beside the sliding windows that some layers of this "
                f"{architecture.family} have; choose {head}"
            )
        tile = architecture.align(pruning.align) * ranks
        options = [
            (groups, heads)
            for groups, heads in _attention_options(dense, pruning.attention_unit)
            if _splits(groups, heads, ranks) and not (stock and architecture.hidden_size % (groups * heads))
        ]
        # A layer may also stay as it is, so the dense widths must split, too.
        whole = _splits(dense.groups, dense.heads_per_group, ranks) and not dense.channels % ranks
        if not options or not whole or tile > dense.channels:
            raise ConfigError(
                f"pruning.tensor_parallel: {ranks} ranks with tiles of {tile} channels do not fit {dense.heads} heads, "
                f"{dense.groups} key-value heads and {dense.channels} channels"
            )
        return cls(architecture, tuple(options), tile, architecture.compensation_parameters * compensated)

    @property
    def tile_cost(self) -> int:
        return self.tile * self.architecture.channel_cost

    def attention_cost(self, option: tuple[int, int]) -> int:
        return self.architecture.attention_parameters(Shape(*option, 0))

    def removed(self, shape: Shape) -> int:
        """Weights fewer than in the dense layer, biases counted against it."""
        of = self.architecture.layer_parameters
        dense = self.architecture.dense
        return of(dense) - of(shape) - self.bias * (shape != dense)

    @property
    def cap(self) -> float:
        """Largest share that a layer can give: one option of attention and one tile of channels stay."""
        smallest = Shape(*self.options[-1], self.tile)
        return self.removed(smallest) / self.architecture.layer_parameters(self.architecture.dense)

    def channels(self, wanted: float) -> int:
        """The allowed channel count nearest to ``wanted``."""
        full = self.architecture.dense.channels
        tiled = min(max(round(wanted / self.tile), 1) * self.tile, full)
        return full if abs(full - wanted) < abs(tiled - wanted) else tiled


def _splits(groups: int, heads_per_group: int, ranks: int) -> bool:
    """Whether vLLM can share these heads out: key-value heads are split, or where there are fewer, repeated."""
    return (groups % ranks == 0 or ranks % groups == 0) and groups * heads_per_group % ranks == 0


def _unequal_groups(dense: Shape, unit: str) -> bool:
    return len({groups for groups, _ in _attention_options(dense, unit)}) > 1


def _attention_options(dense: Shape, unit: str) -> list[tuple[int, int]]:
    groups, heads = dense.groups, dense.heads_per_group
    if unit == "none":
        return [(groups, heads)]
    if unit == "head" and heads > 1:
        return [(groups, n) for n in range(heads, 0, -1)]
    return [(n, heads) for n in range(groups, 0, -1)]


def ratio_of(shapes: Sequence[Shape], architecture: Architecture, *, compensated: bool) -> float:
    """Share of the decoder layers' weights that these widths save."""
    dense, bias = architecture.dense, architecture.compensation_parameters * compensated
    after = sum(architecture.layer_parameters(shape) + bias * (shape != dense) for shape in shapes)
    return 1 - after / architecture.decoder_parameters


def choose_shapes(
    architecture: Architecture,
    pruning: PruningSection,
    *,
    ratio: float,
    compensated: bool,
    scores_L: Sequence[LayerScores],
    comparable: bool = False,
    stock: bool = False,
) -> list[Shape]:
    """Widths of every layer for a ratio; ``stock`` asks for the same ones in all layers.

    ``scores_L`` count under ``global`` and ``standardised`` alone. The latter takes standardised ones, which may be
    negative; the former divides those of a layer by their mean, unless they are ``comparable`` as they are. Raises
    ConfigError where floors, caps and protection do not allow the ratio.
    """
    rules, allocation = Rules.of(architecture, pruning, compensated=compensated, stock=stock), pruning.allocation
    _check_budget(pruning)
    if pruning.budget == "official":
        return _official(rules, allocation, ratio)
    if ratio == 0:
        return [architecture.dense] * architecture.n_layers
    cap = min(allocation.max_sparsity, rules.cap)
    if allocation.kind in VALUES:
        _check_reach(ratio, cap)
        return _greedy(rules, ratio, cap, _steps(rules, scores_L, allocation.kind, comparable))
    shares = layer_sparsity(architecture.n_layers, allocation, ratio, cap)
    if stock and allocation.kind == "uniform":
        return [_nearest(rules, ratio)] * architecture.n_layers
    return _fitted(rules, shares, ratio, cap)


def choose_dropped(
    architecture: Architecture, pruning: PruningSection, *, ratio: float, influence_L: Sequence[float]
) -> tuple[int, ...]:
    """Layers that go under ``depth``, ascending: those of least influence, the deeper one of two equal ones.

    As many as come nearest to the ratio, fewer of two as near. ``protect_first`` and ``protect_last`` hold where they
    are numbers; ``max_sparsity`` is not for layers that go as a whole. Raises ConfigError where these leave too few.
    """
    n_layers, n_dropped = architecture.n_layers, _n_dropped(architecture, pruning, ratio)
    first, last = _explicit(pruning.allocation)
    order = sorted(range(first, n_layers - last), key=lambda layer: (influence_L[layer], -layer))
    return tuple(sorted(order[:n_dropped]))


def _n_dropped(architecture: Architecture, pruning: PruningSection, ratio: float) -> int:
    _check_budget(pruning)
    Rules.of(architecture, pruning, compensated=False)  # layers that stay must split over the ranks, too
    n_layers, (first, last) = architecture.n_layers, _explicit(pruning.allocation)
    nearest = min(range(n_layers), key=lambda n: abs(n - ratio * n_layers))
    may_go = max(n_layers - first - last, 0)
    if nearest > may_go:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what {first} + {last} protected layers allow; the largest is "
            f"{_rounded_down(may_go / n_layers)}"
        )
    return nearest


def _explicit(allocation: AllocationSection) -> tuple[int, int]:
    """First and last layers that must stay by the user's own word."""
    first, last = (0 if n == "auto" else n for n in (allocation.protect_first, allocation.protect_last))
    return first, last


def check_ratio(
    architecture: Architecture, pruning: PruningSection, *, ratio: float, compensated: bool, stock: bool = False
) -> None:
    """Raises ConfigError, before there is a statistic, for a ratio or a budget that no scores could give a plan."""
    if pruning.allocation.kind == "depth":
        _n_dropped(architecture, pruning, ratio)
    elif pruning.allocation.kind in VALUES:
        _check_budget(pruning)
        rules = Rules.of(architecture, pruning, compensated=compensated, stock=stock)
        _check_reach(ratio, min(pruning.allocation.max_sparsity, rules.cap))
    else:
        choose_shapes(architecture, pruning, ratio=ratio, compensated=compensated, scores_L=(), stock=stock)


def _check_budget(pruning: PruningSection) -> None:
    kind = pruning.allocation.kind
    if pruning.budget == "official" and kind not in ("uniform", "logistic"):
        raise ConfigError(f"pruning.budget: official goes with allocation uniform or logistic, not {kind}")


def _check_reach(ratio: float, cap: float) -> None:
    if ratio > cap:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what a layer can give; the largest is {_rounded_down(cap)}"
        )


def _rounded_down(ratio: float) -> str:
    """A ratio to show that is not above the one it stands for, so that it can be asked for."""
    return f"{math.floor(ratio * 1e4) / 1e4:g}"


def layer_sparsity(n_layers: int, allocation: AllocationSection, ratio: float, cap: float) -> list[float]:
    """Share of every layer under ``uniform`` or ``logistic``."""
    if allocation.kind == "uniform":
        _check_reach(ratio, cap)
        return sparsity.uniform(n_layers, ratio)
    first, last = protected(n_layers, allocation, ratio, cap)
    return sparsity.logistic(n_layers, ratio, k=allocation.k, x0=allocation.x0, first=first, last=last, cap=cap)


def protected(n_layers: int, allocation: AllocationSection, ratio: float, cap: float) -> tuple[int, int]:
    """First and last layers that stay whole; an ``auto`` one yields, the last layers first, to a ratio beyond it."""
    usual = 2 if n_layers >= 24 else 1
    first = usual if allocation.protect_first == "auto" else allocation.protect_first
    last = usual if allocation.protect_last == "auto" else allocation.protect_last

    def too_many() -> bool:
        return ratio * n_layers > (n_layers - first - last) * cap

    while too_many() and allocation.protect_last == "auto" and last and last >= first:
        last -= 1
        if too_many() and allocation.protect_first == "auto" and first:
            first -= 1
    while too_many() and allocation.protect_last == "auto" and last:
        last -= 1
    while too_many() and allocation.protect_first == "auto" and first:
        first -= 1
    return first, last


def _official(rules: Rules, allocation: AllocationSection, ratio: float) -> list[Shape]:
    """The authors' rounding: whole heads and channels, rounded down, no tiles, no carry; one of each stays."""
    architecture, dense = rules.architecture, rules.architecture.dense
    shares = sparsity.uniform(architecture.n_layers, ratio)
    if allocation.kind == "logistic":
        first, last = (2 if n == "auto" else n for n in (allocation.protect_first, allocation.protect_last))
        shares = sparsity.official_logistic(
            architecture.n_layers, ratio, k=allocation.k, x0=allocation.x0, first=first, last=last
        )
    return [
        Shape(
            dense.groups - min(int(dense.groups * share), dense.groups - 1),
            dense.heads_per_group,
            dense.channels - min(int(dense.channels * share), dense.channels - 1),
        )
        for share in shares
    ]


def _fitted(rules: Rules, sparsity_L: Sequence[float], ratio: float, cap: float) -> list[Shape]:
    """Round every layer's share to allowed widths; what rounding leaves over is carried on, then evened out.

    Attention takes the option nearest to the layer's share, channels the rest (method: heads are coarse, tiles fine).
    """
    full = rules.architecture.layer_parameters(rules.architecture.dense)
    shapes: list[Shape] = []
    carry = 0.0
    for share in sparsity_L:
        shape = _nearest(rules, share, carry) if share else rules.architecture.dense
        carry += share * full - rules.removed(shape)
        shapes.append(shape)
    return _evened(rules, shapes, [share > 0 for share in sparsity_L], ratio, cap)


def _nearest(rules: Rules, share: float, carry: float = 0.0) -> Shape:
    """Allowed widths nearest to giving ``share`` of a layer's weights, and ``carry`` weights more."""
    architecture, dense = rules.architecture, rules.architecture.dense
    attention = rules.attention_cost((dense.groups, dense.heads_per_group))
    option = min(rules.options, key=lambda o: abs(rules.attention_cost(o) - (1 - share) * attention))
    wanted = share * architecture.layer_parameters(dense) + carry + rules.bias
    cut = wanted - (attention - rules.attention_cost(option))
    return Shape(*option, rules.channels(dense.channels - cut / architecture.channel_cost))


def _evened(rules: Rules, shapes: list[Shape], active_L: list[bool], ratio: float, cap: float) -> list[Shape]:
    """Move tiles, in the deepest layers that have room, until the total is within half a tile of the target.

    The cap holds as a tile does: a layer may give part of one more, or a ratio just under the cap could not be met.
    Raises ConfigError with the ratio reached where no layer has room.
    """
    target = ratio * rules.architecture.decoder_parameters
    largest = cap * rules.architecture.layer_parameters(rules.architecture.dense)
    for layer in reversed(range(len(shapes))):
        if not active_L[layer]:
            continue
        missing = target - sum(map(rules.removed, shapes))
        shape = shapes[layer]
        more = min(missing, largest - rules.removed(shape) + rules.tile_cost / 2)
        channels = rules.channels(shape.channels - more / rules.architecture.channel_cost)
        moved = Shape(shape.groups, shape.heads_per_group, channels)
        if abs(missing - rules.removed(moved) + rules.removed(shape)) < abs(missing):
            shapes[layer] = moved
    removed = sum(map(rules.removed, shapes))
    if abs(target - removed) > rules.tile_cost:
        reached = removed / rules.architecture.decoder_parameters
        raise ConfigError(
            f"pruning.ratio: {ratio:g} cannot be met with pruning.attention_unit and pruning.align as they are; "
            f"{_rounded_down(reached)} can"
        )
    return shapes


@dataclass(frozen=True, slots=True)
class _Way:
    """One next narrower width of a layer's attention or MLP, and what it costs."""

    lost: float
    """Score that goes."""
    columns: int
    """Columns of ``o_proj`` or ``down_proj`` that go."""
    weights: int
    """Weights saved."""
    width: dict[str, int]
    """Fields of ``Shape`` that it changes."""


VALUES: Mapping[str, Callable[[_Way], float]] = {
    "global": lambda way: way.lost / way.weights,
    "standardised": lambda way: way.lost / way.columns,
}
"""Allocations that rank what may go over all layers, and the value that they rank it by, the least first."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A way of one layer, with its place in the ranking."""

    value: float
    layer: int
    site: Site
    width: dict[str, int]


def _greedy(rules: Rules, ratio: float, cap: float, steps: Sequence[_Step]) -> list[Shape]:
    """Take steps by their value over all layers, the least first, while they fit the budget.

    ``global`` ranks by normalised score per weight (the paper's AL, by score per cost and not by score),
    ``standardised`` by the mean standardised score of the columns, whatever they cost (FLAP's AL-AM).
    """
    architecture, dense = rules.architecture, rules.architecture.dense
    target = ratio * architecture.decoder_parameters
    largest = cap * architecture.layer_parameters(dense)
    shapes = [dense] * architecture.n_layers
    stopped: set[tuple[int, Site]] = set()
    removed = 0
    for step in sorted(steps, key=lambda step: (step.value, step.layer, step.site)):
        if (step.layer, step.site) in stopped:
            continue
        old = shapes[step.layer]
        new = replace(old, **step.width)
        after = removed + rules.removed(new) - rules.removed(old)
        if after > target + rules.tile_cost / 2 or rules.removed(new) > largest:
            stopped.add((step.layer, step.site))
            continue
        shapes[step.layer], removed = new, after
    return _evened(rules, shapes, [shape != dense for shape in shapes], ratio, cap)


def _steps(rules: Rules, scores_L: Sequence[LayerScores], kind: str, comparable: bool) -> list[_Step]:
    """Ways to narrow every layer, in the order they must be taken: a later one never has less value than an earlier."""
    made_comparable = normalised if kind == "global" and not comparable else lambda score: score
    steps: list[_Step] = []
    for layer, (head_H, channel_C) in enumerate(scores_L):
        ways: dict[Site, list[_Way]] = {
            "attn": _narrower_attention(rules, made_comparable(head_H)),
            "mlp": _narrower_mlp(rules, made_comparable(channel_C)),
        }
        for site in SITES:
            values = accumulate(map(VALUES[kind], ways[site]), max)
            steps += [_Step(value, layer, site, way.width) for value, way in zip(values, ways[site], strict=True)]
    return steps


def _narrower_attention(rules: Rules, score_H: Tensor) -> list[_Way]:
    architecture, kept = rules.architecture, {}
    for option in rules.options:
        kept[option] = float(score_H[list(_best_heads(score_H, architecture.dense, option)[1])].sum())
    return [
        _Way(
            lost=kept[wide] - kept[narrow],
            columns=(wide[0] * wide[1] - narrow[0] * narrow[1]) * architecture.head_dim,
            weights=rules.attention_cost(wide) - rules.attention_cost(narrow),
            width={"groups": narrow[0], "heads_per_group": narrow[1]},
        )
        for wide, narrow in pairwise(rules.options)
    ]


def _narrower_mlp(rules: Rules, score_C: Tensor) -> list[_Way]:
    """All experts of a mixture lose a channel together, each its least."""
    ascending_C, n = _by_expert(score_C).sort(1).values.sum(0), rules.architecture.dense.channels
    widths = [n, *range((n - 1) // rules.tile * rules.tile, 0, -rules.tile)]
    cost = rules.architecture.channel_cost
    return [
        _Way(float(ascending_C[n - a : n - b].sum()), a - b, (a - b) * cost, {"channels": b})
        for a, b in pairwise(widths)
    ]


def keep(shape: Shape, dense: Shape, head_H: Tensor, channel_C: Tensor) -> Kept:
    """The best units for these widths. Ties go to the higher index, so the choice is a pure function of the scores."""
    groups, heads = _best_heads(head_H, dense, (shape.groups, shape.heads_per_group))
    channels = [_top(channel_C, shape.channels) for channel_C in _by_expert(channel_C)]
    return Kept(groups, heads, tuple(chain.from_iterable(channels)), len(channels))


def _by_expert(channel_C: Tensor) -> Tensor:
    """Scores of channels, expert by expert (E, C); a layer that is no mixture is one."""
    return channel_C if channel_C.ndim > 1 else channel_C[None]


def _best_heads(head_H: Tensor, dense: Shape, option: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n_groups, n_heads = option
    score_KG = head_H.reshape(dense.groups, dense.heads_per_group)
    best = [_top(score_G, n_heads) for score_G in score_KG]
    groups = _top(torch.stack([score_KG[k, list(best[k])].sum() for k in range(dense.groups)]), n_groups)
    heads = tuple(k * dense.heads_per_group + h for k in groups for h in best[k])
    return groups, heads


def _top(score: Tensor, n: int) -> tuple[int, ...]:
    order = torch.sort(score, stable=True).indices[score.numel() - n :]
    return tuple(order.sort().values.tolist())
