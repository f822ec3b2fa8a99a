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

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core import sparsity
from seap_ray.core.architecture import Architecture, Layer, Shape
from seap_ray.core.moments import SITES, Site
from seap_ray.core.scores import normalised
from seap_ray.errors import ConfigError

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
    def whole(cls, architecture: Architecture, layer: int) -> "Kept":
        given, experts = architecture.layers[layer].shape, max(architecture.n_experts, 1)
        channels = tuple(range(given.channels)) * experts
        return cls(tuple(range(given.groups)), tuple(range(given.heads)), channels, experts)

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

    def cuts(self, layer: int, architecture: Architecture) -> bool:
        return self.kept[layer].shape != architecture.layers[self.layers[layer]].shape

    def cut(self, layer: int, architecture: Architecture) -> Layer:
        """What a layer of the checkpoint is, with the biases that compensation gives it."""
        compensated = self.compensation != "none"
        return architecture.cut(self.layers[layer], self.kept[layer].shape, compensated=compensated)

    def planned(self, architecture: Architecture) -> float:
        """Share of the decoder layers' weights that goes, added biases counted against it."""
        after = sum(architecture.layer_parameters(self.cut(layer, architecture)) for layer in range(len(self.kept)))
        return 1 - after / architecture.decoder_parameters


@dataclass(frozen=True, slots=True)
class Rules:
    """What widths a layer may take."""

    architecture: Architecture
    layer: int
    size: int
    """Weights of the layer as it is given."""
    options: tuple[tuple[int, int], ...]
    """Allowed (groups, heads per group), most parameters first."""
    tile: int
    """Kept channels are a multiple of this, or all."""
    compensated: bool

    @classmethod
    def of(
        cls, architecture: Architecture, pruning: PruningSection, *, compensated: bool, stock: bool = False
    ) -> tuple["Rules", ...]:
        """Those of every layer; ``stock`` allows only head counts that a family's config accepts: the hidden size's
        divisors.

        Raises ConfigError where a layer's heads or channels cannot be split over ``tensor_parallel`` ranks.
        """
        dense, unit = architecture.dense, pruning.attention_unit
        options_L = [_attention_options(layer.shape, dense, unit) for layer in architecture.layers]
        if architecture.mixes_windows and len({groups for groups, _ in chain.from_iterable(options_L)}) > 1:
            head = "head or none" if dense.heads_per_group > 1 else "none"
            raise ConfigError(
                f"pruning.attention_unit: {unit} leaves layers with unequal numbers of key-value "
                f"heads, which no engine serves beside the sliding windows that some layers of this "
                f"{architecture.family} have; choose {head}"
            )
        tile = architecture.align(pruning.align) * pruning.tensor_parallel
        sizes = map(architecture.layer_parameters, architecture.layers)
        allowed_L = (_allowed(architecture, i, options, pruning, tile, stock) for i, options in enumerate(options_L))
        return tuple(
            cls(architecture, layer, size, options, tile, compensated)
            for layer, (size, options) in enumerate(zip(sizes, allowed_L, strict=True))
        )

    @property
    def given(self) -> Shape:
        return self.architecture.layers[self.layer].shape

    @property
    def tile_cost(self) -> int:
        return self.tile * self.architecture.channel_cost

    def attention_cost(self, option: tuple[int, int]) -> int:
        return self.architecture.attention_parameters(Shape(*option, 0))

    def removed(self, shape: Shape) -> int:
        """Weights fewer than in the layer as it is given, biases counted against it."""
        cut = self.architecture.cut(self.layer, shape, compensated=self.compensated)
        return self.size - self.architecture.layer_parameters(cut)

    @property
    def cap(self) -> float:
        """Largest share that the layer can give: one option of attention and one tile of channels stay."""
        smallest = Shape(*self.options[-1], min(self.tile, self.given.channels))
        return max(self.removed(smallest), 0) / self.size

    def channels(self, wanted: float) -> int:
        """The allowed channel count nearest to ``wanted``."""
        full = self.given.channels
        tiled = min(max(round(wanted / self.tile), 1) * self.tile, full)
        return full if abs(full - wanted) < abs(tiled - wanted) else tiled

    def nearest(self, share: float, carry: float = 0.0) -> Shape:
        """Allowed widths nearest to giving ``share`` of the layer's weights, and ``carry`` weights more."""
        architecture, given = self.architecture, self.given
        attention = self.attention_cost((given.groups, given.heads_per_group))
        option = min(self.options, key=lambda o: abs(self.attention_cost(o) - (1 - share) * attention))
        missing = len(architecture.bias_keys) - len(architecture.layers[self.layer].biases)
        added = architecture.hidden_size * missing * self.compensated
        cut = share * self.size + carry + added - (attention - self.attention_cost(option))
        return Shape(*option, self.channels(given.channels - cut / architecture.channel_cost))


def _splits(groups: int, heads_per_group: int, ranks: int) -> bool:
    """Whether vLLM can share these heads out: key-value heads are split, or where there are fewer, repeated."""
    return (groups % ranks == 0 or ranks % groups == 0) and groups * heads_per_group % ranks == 0


def _attention_options(given: Shape, dense: Shape, unit: str) -> Sequence[tuple[int, int]]:
    """What a layer's attention may become; under ``head`` its groups stay where the dense model has several heads in
    one, also in a layer that is left with one."""
    groups, heads = given.groups, given.heads_per_group
    if unit == "none":
        return [(groups, heads)]
    if unit == "head" and dense.heads_per_group > 1:
        return [(groups, n) for n in range(heads, 0, -1)]
    return [(n, heads) for n in range(groups, 0, -1)]


def _allowed(
    architecture: Architecture,
    layer: int,
    options: Sequence[tuple[int, int]],
    pruning: PruningSection,
    tile: int,
    stock: bool,
) -> tuple[tuple[int, int], ...]:
    """Those of the options that the ranks can share, and a stock checkpoint can have."""
    given, ranks = architecture.layers[layer].shape, pruning.tensor_parallel
    allowed = tuple(
        (groups, heads)
        for groups, heads in options
        if _splits(groups, heads, ranks) and not (stock and architecture.hidden_size % (groups * heads))
    )
    # A layer may also stay as it is, so what it has must split, too.
    whole = _splits(given.groups, given.heads_per_group, ranks) and not given.channels % ranks
    if not allowed or not whole or tile > architecture.dense.channels:
        raise ConfigError(
            f"pruning.tensor_parallel: {ranks} ranks with tiles of {tile} channels do not fit the {given.heads} heads, "
            f"{given.groups} key-value heads and {given.channels} channels of layer {layer}"
        )
    return allowed


def ratio_of(shapes: Sequence[Shape], architecture: Architecture, *, compensated: bool) -> float:
    """Share of the decoder layers' weights that these widths, one of each layer, save."""
    cut = (architecture.cut(layer, shape, compensated=compensated) for layer, shape in enumerate(shapes))
    return 1 - sum(map(architecture.layer_parameters, cut)) / architecture.decoder_parameters


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
    """Widths of every layer for a ratio of the model as it is given; ``stock`` asks for the same ones in all layers.

    ``scores_L`` count under ``global`` and ``standardised`` alone. The latter takes standardised ones, which may be
    negative; the former divides those of a layer by their mean, unless they are ``comparable`` as they are. Raises
    ConfigError where floors, caps and protection do not allow the ratio.
    """
    rules_L, allocation = Rules.of(architecture, pruning, compensated=compensated, stock=stock), pruning.allocation
    _check_budget(pruning)
    if pruning.budget == "official":
        return _official(architecture, allocation, ratio)
    if ratio == 0:
        return [rules.given for rules in rules_L]
    if allocation.kind in VALUES:
        _check_reach(rules_L, allocation, ratio)
        return _greedy(rules_L, allocation, ratio, _steps(rules_L, scores_L, allocation.kind, comparable))
    shares = layer_sparsity(rules_L, allocation, ratio)
    if stock and allocation.kind == "uniform":
        return [rules.nearest(ratio) for rules in rules_L]
    return _fitted(rules_L, allocation, shares, ratio)


def choose_dropped(
    architecture: Architecture, pruning: PruningSection, *, ratio: float, influence_L: Sequence[float]
) -> tuple[int, ...]:
    """Layers that go under ``depth``, ascending: those of least influence, the deeper one of two equal ones.

    As many as come nearest to the ratio, fewer of two as near; one stays. ``protect_first`` and ``protect_last`` hold
    where they are numbers; ``max_sparsity`` is not for layers that go as a whole. Raises ConfigError where these leave
    too few.
    """
    weight_L, may_go = _may_go(architecture, pruning, ratio)
    order = sorted(may_go, key=lambda layer: (influence_L[layer], -layer))[: architecture.n_layers - 1]
    gone = [*accumulate((weight_L[layer] for layer in order), initial=0.0)]
    n_dropped = min(range(len(gone)), key=lambda n: abs(gone[n] - ratio * architecture.n_layers))
    return tuple(sorted(order[:n_dropped]))


def _may_go(architecture: Architecture, pruning: PruningSection, ratio: float) -> tuple[list[float], range]:
    """Relative sizes of all layers, and those that are not protected by the user's own word."""
    _check_budget(pruning)
    weight_L = _weights(Rules.of(architecture, pruning, compensated=False))  # who stays must split over the ranks, too
    allocation, n_layers = pruning.allocation, architecture.n_layers
    first, last = (0 if n == "auto" else n for n in (allocation.protect_first, allocation.protect_last))
    may_go = range(first, max(n_layers - last, first))
    stay = [weight_L[layer] for layer in range(n_layers) if layer not in may_go]
    largest = sum(weight_L[layer] for layer in may_go) / n_layers
    if (
        len(stay) > 1 and (ratio - largest) * n_layers > min(stay) / 2
    ):  # one more, if only it could go, would come nearer
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what {first} + {last} protected layers allow; the largest is "
            f"{_rounded_down(largest)}"
        )
    return weight_L, may_go


def check_ratio(
    architecture: Architecture, pruning: PruningSection, *, ratio: float, compensated: bool, stock: bool = False
) -> None:
    """Raises ConfigError, before there is a statistic, for a ratio or a budget that no scores could give a plan."""
    if stock and len({layer.shape for layer in architecture.layers}) > 1:
        raise ConfigError(
            "export.format: stock needs equal widths, but layers of this model, which is compacted already, differ; "
            "use export.format=seap"
        )
    if pruning.allocation.kind == "depth":
        _may_go(architecture, pruning, ratio)
    elif pruning.allocation.kind in VALUES:
        _check_budget(pruning)
        rules_L = Rules.of(architecture, pruning, compensated=compensated, stock=stock)
        _check_reach(rules_L, pruning.allocation, ratio)
    else:
        choose_shapes(architecture, pruning, ratio=ratio, compensated=compensated, scores_L=(), stock=stock)


def _check_budget(pruning: PruningSection) -> None:
    kind = pruning.allocation.kind
    if pruning.budget == "official" and kind not in ("uniform", "logistic"):
        raise ConfigError(f"pruning.budget: official goes with allocation uniform or logistic, not {kind}")


def _weights(rules_L: Sequence[Rules]) -> list[float]:
    """Sizes of the layers relative to their mean: each 1 where all are alike."""
    mean = sum(rules.size for rules in rules_L) / len(rules_L)
    return [rules.size / mean for rules in rules_L]


def _caps(rules_L: Sequence[Rules], allocation: AllocationSection) -> list[float]:
    """The largest share that each layer may give."""
    return [min(allocation.max_sparsity, rules.cap) for rules in rules_L]


def _check_reach(rules_L: Sequence[Rules], allocation: AllocationSection, ratio: float) -> None:
    largest = sparsity.reach(_weights(rules_L), _caps(rules_L, allocation), range(len(rules_L)))
    if ratio > largest + 1e-12:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what the layers can give; the largest is {_rounded_down(largest)}"
        )


def _rounded_down(ratio: float) -> str:
    """A ratio to show that is not above the one it stands for, so that it can be asked for."""
    return f"{math.floor(ratio * 1e4) / 1e4:g}"


def layer_sparsity(rules_L: Sequence[Rules], allocation: AllocationSection, ratio: float) -> list[float]:
    """Share of every layer's own weights under ``uniform`` or ``logistic``."""
    weight_L, cap_L = _weights(rules_L), _caps(rules_L, allocation)
    if allocation.kind == "uniform":
        _check_reach(rules_L, allocation, ratio)
        return sparsity.uniform(weight_L, ratio, cap_L)
    first, last = protected(weight_L, allocation, ratio, cap_L)
    return sparsity.logistic(weight_L, ratio, cap_L, k=allocation.k, x0=allocation.x0, first=first, last=last)


def protected(
    weight_L: Sequence[float], allocation: AllocationSection, ratio: float, cap_L: Sequence[float]
) -> tuple[int, int]:
    """First and last layers that stay whole; an ``auto`` one yields, the last layers first, to a ratio beyond it."""
    n_layers = len(cap_L)
    usual = 2 if n_layers >= 24 else 1
    first = usual if allocation.protect_first == "auto" else allocation.protect_first
    last = usual if allocation.protect_last == "auto" else allocation.protect_last

    def too_many() -> bool:
        return ratio > sparsity.reach(weight_L, cap_L, range(first, max(n_layers - last, first))) + 1e-12

    while too_many() and allocation.protect_last == "auto" and last and last >= first:
        last -= 1
        if too_many() and allocation.protect_first == "auto" and first:
            first -= 1
    while too_many() and allocation.protect_last == "auto" and last:
        last -= 1
    while too_many() and allocation.protect_first == "auto" and first:
        first -= 1
    return first, last


def _official(architecture: Architecture, allocation: AllocationSection, ratio: float) -> list[Shape]:
    """The authors' rounding: whole heads and channels, rounded down, no tiles, no carry; one of each stays."""
    shares = [ratio] * architecture.n_layers
    if allocation.kind == "logistic":
        first, last = (2 if n == "auto" else n for n in (allocation.protect_first, allocation.protect_last))
        shares = sparsity.official_logistic(
            architecture.n_layers, ratio, k=allocation.k, x0=allocation.x0, first=first, last=last
        )
    return [
        Shape(
            of.groups - min(int(of.groups * share), of.groups - 1),
            of.heads_per_group,
            of.channels - min(int(of.channels * share), of.channels - 1),
        )
        for of, share in zip((layer.shape for layer in architecture.layers), shares, strict=True)
    ]


def _fitted(
    rules_L: Sequence[Rules], allocation: AllocationSection, sparsity_L: Sequence[float], ratio: float
) -> list[Shape]:
    """Round every layer's share to allowed widths; what rounding leaves over is carried on, then evened out.

    Attention takes the option nearest to the layer's share, channels the rest (method: heads are coarse, tiles fine).
    """
    shapes: list[Shape] = []
    carry = 0.0
    for rules, share in zip(rules_L, sparsity_L, strict=True):
        shape = rules.nearest(share, carry) if share else rules.given
        carry += share * rules.size - rules.removed(shape)
        shapes.append(shape)
    return _evened(rules_L, allocation, shapes, [share > 0 for share in sparsity_L], ratio)


def _evened(
    rules_L: Sequence[Rules], allocation: AllocationSection, shapes: list[Shape], active_L: Sequence[bool], ratio: float
) -> list[Shape]:
    """Move tiles, in the deepest layers that have room, until the total is within half a tile of the target.

    The cap holds as a tile does: a layer may give part of one more, or a ratio just under the cap could not be met.
    Raises ConfigError with the ratio reached where no layer has room.
    """
    total, removed = sum(rules.size for rules in rules_L), _removed(rules_L, shapes)
    for rules, cap in reversed([*zip(rules_L, _caps(rules_L, allocation), strict=True)]):
        if not active_L[rules.layer]:
            continue
        missing, shape = ratio * total - removed, shapes[rules.layer]
        more = min(missing, cap * rules.size - rules.removed(shape) + rules.tile_cost / 2)
        channels = rules.channels(shape.channels - more / rules.architecture.channel_cost)
        moved = Shape(shape.groups, shape.heads_per_group, channels)
        gained = rules.removed(moved) - rules.removed(shape)
        if abs(missing - gained) < abs(missing):
            shapes[rules.layer] = moved
            removed += gained
    if abs(ratio * total - removed) > rules_L[0].tile_cost:
        reached = removed / total
        raise ConfigError(
            f"pruning.ratio: {ratio:g} cannot be met with pruning.attention_unit and pruning.align as they are; "
            f"{_rounded_down(reached)} can"
        )
    return shapes


def _removed(rules_L: Sequence[Rules], shapes: Sequence[Shape]) -> int:
    return sum(rules.removed(shape) for rules, shape in zip(rules_L, shapes, strict=True))


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


def _greedy(
    rules_L: Sequence[Rules], allocation: AllocationSection, ratio: float, steps: Sequence[_Step]
) -> list[Shape]:
    """Take steps by their value over all layers, the least first, while they fit the budget.

    ``global`` ranks by normalised score per weight (the paper's AL, by score per cost and not by score),
    ``standardised`` by the mean standardised score of the columns, whatever they cost (FLAP's AL-AM).
    """
    target, caps = ratio * sum(rules.size for rules in rules_L), _caps(rules_L, allocation)
    shapes = [rules.given for rules in rules_L]
    stopped: set[tuple[int, Site]] = set()
    removed = 0
    for step in sorted(steps, key=lambda step: (step.value, step.layer, step.site)):
        if (step.layer, step.site) in stopped:
            continue
        rules, old = rules_L[step.layer], shapes[step.layer]
        new = replace(old, **step.width)
        after = removed + rules.removed(new) - rules.removed(old)
        if after > target + rules.tile_cost / 2 or rules.removed(new) > caps[step.layer] * rules.size:
            stopped.add((step.layer, step.site))
            continue
        shapes[step.layer], removed = new, after
    active_L = [shape != rules.given for rules, shape in zip(rules_L, shapes, strict=True)]
    return _evened(rules_L, allocation, shapes, active_L, ratio)


def _steps(rules_L: Sequence[Rules], scores_L: Sequence[LayerScores], kind: str, comparable: bool) -> list[_Step]:
    """Ways to narrow every layer, in the order they must be taken: a later one never has less value than an earlier."""
    made_comparable = normalised if kind == "global" and not comparable else lambda score: score
    steps: list[_Step] = []
    for rules, (head_H, channel_C) in zip(rules_L, scores_L, strict=True):
        ways: dict[Site, list[_Way]] = {
            "attn": _narrower_attention(rules, made_comparable(head_H)),
            "mlp": _narrower_mlp(rules, made_comparable(channel_C)),
        }
        for site in SITES:
            values = accumulate(map(VALUES[kind], ways[site]), max)
            steps += [_Step(value, rules.layer, site, way.width) for value, way in zip(values, ways[site], strict=True)]
    return steps


def _narrower_attention(rules: Rules, score_H: Tensor) -> list[_Way]:
    architecture, kept = rules.architecture, {}
    for option in rules.options:
        kept[option] = float(score_H[list(_best_heads(score_H, rules.given, option)[1])].sum())
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
    ascending_C, n = _by_expert(score_C).sort(1).values.sum(0), rules.given.channels
    widths = [n, *range((n - 1) // rules.tile * rules.tile, 0, -rules.tile)]
    cost = rules.architecture.channel_cost
    return [
        _Way(float(ascending_C[n - a : n - b].sum()), a - b, (a - b) * cost, {"channels": b})
        for a, b in pairwise(widths)
    ]


def keep(shape: Shape, given: Shape, head_H: Tensor, channel_C: Tensor) -> Kept:
    """The best units for these widths. Ties go to the higher index, so the choice is a pure function of the scores."""
    groups, heads = _best_heads(head_H, given, (shape.groups, shape.heads_per_group))
    channels = [_top(channel_C, shape.channels) for channel_C in _by_expert(channel_C)]
    return Kept(groups, heads, tuple(chain.from_iterable(channels)), len(channels))


def _by_expert(channel_C: Tensor) -> Tensor:
    """Scores of channels, expert by expert (E, C); a layer that is no mixture is one."""
    return channel_C if channel_C.ndim > 1 else channel_C[None]


def _best_heads(head_H: Tensor, given: Shape, option: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n_groups, n_heads = option
    score_KG = head_H.reshape(given.groups, given.heads_per_group)
    best = [_top(score_G, n_heads) for score_G in score_KG]
    groups = _top(torch.stack([score_KG[k, list(best[k])].sum() for k in range(given.groups)]), n_groups)
    heads = tuple(k * given.heads_per_group + h for k in groups for h in best[k])
    return groups, heads


def _top(score: Tensor, n: int) -> tuple[int, ...]:
    order = torch.sort(score, stable=True).indices[score.numel() - n :]
    return tuple(order.sort().values.tolist())
