"""Allocation: how the widths of all layers, or the layers that go as a whole, meet a budget of parameters.

Under ``uniform`` and ``logistic`` the widths depend on the ratio alone, so all checkpoints of one ratio have equal
shapes. ``global`` and ``standardised`` rank what may go over all layers by its scores. ``measured`` chooses the widths
whose measured rises of the loss add up to the least. ``depth`` drops whole layers.

Letters: L layers, H query heads, C channels.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, pairwise, product

from torch import Tensor

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core import knapsack, sparsity
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.moments import SITES, Site
from seap_ray.core.plan import best_heads, by_moe_expert
from seap_ray.core.scores import LayerScores, normalised
from seap_ray.core.sensitivity import Sensitivities
from seap_ray.core.targets import BELOW_LARGEST, Target, least_cut
from seap_ray.core.widths import WidthConstraints, widest_unit
from seap_ray.errors import ConfigError

ROUNDING = 1e-12
"""A ratio may be beyond the largest one by this much: what sums of floats are off by."""
DEEP_MODEL = 24
"""Layers from which ``auto`` protects two layers at each end instead of one."""

# --- what callers ask for --------------------------------------------------------------------------------------------


def choose_shapes(
    architecture: Architecture,
    pruning: PruningSection,
    *,
    ratio: float,
    adds_biases: bool,
    scores_L: Sequence[LayerScores],
    comparable: bool = False,
    stock: bool = False,
    sensitivities: Sensitivities | None = None,
    target: Target | None = None,
) -> list[Shape]:
    """Choose the widths of every layer for a ratio, or for a target.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration.
        ratio: Share of the model's decoder weights that shall go, from 0 to 1.
        adds_biases: Whether cut layers get output biases, which count against what they save.
        scores_L: Scores of every layer's heads and channels. They count under ``global``, which divides those of a
            layer by their mean, and ``standardised``, which takes standardised ones that may be negative.
        comparable: Under ``global`` the scores compare between layers as they are.
        stock: Ask for the same widths in all layers, as an ordinary checkpoint has.
        sensitivities: Measured rises of the loss, which ``measured`` alone needs.
        target: What the model may take; then the smallest ratio that meets it takes the place of ``ratio``.

    Returns:
        Widths of every layer. They meet the ratio within one tile of channels (``pruning.budget: official``: as
        the authors' rounding does). They take no more than a target, and where there is room at most a tile less.

    Raises:
        ConfigError: Floors, caps, protection or alignment do not allow the ratio or the target.
        ValueError: Sensitivities are needed and missing, or lack a site that may be cut.
    """
    allocation = pruning.allocation
    constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
    _check_budget(pruning)
    if target is None and ratio == 0 and pruning.budget == "exact":
        return [constraints.original for constraints in constraints_L]
    if allocation.kind == "measured":
        if sensitivities is None:
            raise ValueError("allocation.kind: measured needs sensitivities")
        return _measured_shapes(constraints_L, allocation, ratio, target, sensitivities, stock)

    if pruning.budget == "official":
        cut_at: Callable[[float], list[Shape]] = partial(_official_shapes, architecture, allocation)
    elif allocation.kind in RANKING_VALUES:
        if target is None:
            _check_reach(constraints_L, allocation, ratio)
        ranking = _ranked_candidates(constraints_L, scores_L, allocation.kind, comparable)
        cut_at = partial(_greedy_shapes, constraints_L, allocation, ranking)
    else:
        cut_at = partial(_even_shapes, constraints_L, allocation, stock)

    if target is None:
        return cut_at(ratio)
    return _least_shapes(target, cut_at, pruning, adds_biases=adds_biases, stock=stock)


def choose_dropped(
    architecture: Architecture,
    pruning: PruningSection,
    *,
    ratio: float,
    influence_L: Sequence[float],
    target: Target | None = None,
) -> tuple[int, ...]:
    """Choose the layers that go under ``depth``: those of least influence, of two equal ones the deeper one.

    So many layers go as come nearest to the ratio, fewer of two that are as near; one stays. ``protect_first`` and
    ``protect_last`` hold where they are numbers; ``max_sparsity`` is not for layers that go as a whole.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration.
        ratio: Share of the model's decoder weights that shall go.
        influence_L: Influence of every layer (ShortGPT's Block Influence, arXiv 2403.03853).
        target: What the model may take; then the fewest layers go that meet it, whatever the ratio.

    Returns:
        Numbers of the layers, ascending.

    Raises:
        ConfigError: Protection leaves too few layers.
    """
    if target is not None:
        return _least_dropped(target, architecture, pruning, influence_L)
    relative_size_L, may_go = _droppable(architecture, pruning, ratio)
    # The deeper of two equal layers sorts first; the slice leaves one layer of all.
    order = sorted(may_go, key=lambda layer: (influence_L[layer], -layer))[: architecture.n_layers - 1]
    # Weights gone, in mean layers, after dropping none, one, two, ... layers of the order.
    gone = [*accumulate((relative_size_L[layer] for layer in order), initial=0.0)]
    # min takes the first of equal distances: fewer layers.
    n_dropped = min(range(len(gone)), key=lambda n: abs(gone[n] - ratio * architecture.n_layers))
    return tuple(sorted(order[:n_dropped]))


def check_ratio(
    architecture: Architecture, pruning: PruningSection, *, ratio: float, adds_biases: bool, stock: bool = False
) -> None:
    """Check, before there is a statistic, that some scores could give a plan for a ratio.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration.
        ratio: Share of the model's decoder weights that shall go.
        adds_biases: Whether cut layers get output biases.
        stock: Whether all layers must have the same widths.

    Raises:
        ConfigError: No scores could give a plan for this ratio or budget.
    """
    if stock and len({layer.shape for layer in architecture.layers}) > 1:
        raise ConfigError(
            "export.format: stock needs equal widths, but layers of this model, which is compacted already, differ; "
            "use export.format=seap"
        )

    # Sizes alone say which ratios are within reach; scores only choose among what may go.
    if pruning.allocation.kind == "depth":
        _droppable(architecture, pruning, ratio)
    elif pruning.allocation.kind in RANKING_VALUES:
        _check_budget(pruning)
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
        _check_reach(constraints_L, pruning.allocation, ratio)
    # Of what ``auto`` judges, ``measured`` reaches farthest.
    elif pruning.allocation.kind in ("measured", "auto"):
        _check_budget(pruning)
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
        _check_measured_reach(constraints_L, pruning.allocation, ratio, stock)
    else:
        # These allocations read no scores, so the choice itself is the check.
        choose_shapes(architecture, pruning, ratio=ratio, adds_biases=adds_biases, scores_L=(), stock=stock)


# --- targets instead of ratios ---------------------------------------------------------------------------------------


def check_target(
    architecture: Architecture, pruning: PruningSection, target: Target, *, adds_biases: bool, stock: bool = False
) -> None:
    """Check, before there is a statistic, that some scores could give a plan for a target.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration.
        target: What the model may take.
        adds_biases: Whether cut layers get output biases.
        stock: Whether all layers must have the same widths.

    Raises:
        ConfigError: The model takes no more than that before the cut, or more after every cut.
    """
    if target.excess <= 0:
        raise ConfigError(
            f"pruning.target.{target.kind}: {target.shown(target.limit)} is met without a cut: the model has "
            f"{target.shown(target.dense)}"
        )
    least = _least_cost(architecture, pruning, target, adds_biases=adds_biases, stock=stock)
    if least > target.limit:
        raise _out_of_reach(target, least)


def even_ratio(
    architecture: Architecture, pruning: PruningSection, target: Target, *, adds_biases: bool, stock: bool = False
) -> float:
    """Return the ratio that stands for a target: the smallest at which evenly cut layers meet it.

    It depends on sizes alone, so that it is known before any work. Where the unit of attention is ``auto``, attention
    stays whole, unless the target is then out of reach.

    Args:
        architecture: The model before the cut.
        pruning: The ``pruning`` section of the configuration.
        target: What the model may take.
        adds_biases: Whether cut layers get output biases.
        stock: Whether all layers must have the same widths.

    Returns:
        A ratio, rounded up to four decimals; the largest one where evenly cut layers cannot meet the target.

    Raises:
        ConfigError: The model's heads or channels do not suit the section.
    """
    unit = pruning.attention_unit
    largest = 0.0
    for each in ("none", widest_unit(architecture)) if unit == "auto" else (unit,):
        allocation = pruning.allocation.model_copy(update={"kind": "uniform"})
        even = pruning.model_copy(update={"allocation": allocation, "attention_unit": each, "budget": "exact"})
        most = _largest_ratio(architecture, even, adds_biases=adds_biases, stock=stock)
        largest = max(largest, math.floor(most * 1e4) / 1e4)

        def cut_at(ratio: float, even: PruningSection = even) -> tuple[float, list[Shape]]:
            """Return a ratio rounded up, and the evenly cut widths."""
            # Rounded to a part of a decimal first, since 0.07 times ten thousand is above 700.
            rounded = math.ceil(round(ratio * 1e4, 6)) / 1e4
            return rounded, choose_shapes(
                architecture, even, ratio=rounded, adds_biases=adds_biases, scores_L=(), stock=stock
            )

        cut = least_cut(cut_at, lambda cut: target.is_met(cut[1], adds_biases=adds_biases), largest)
        if cut is not None:
            return cut[0]
    return largest


def _least_shapes(
    target: Target,
    cut_at: Callable[[float], list[Shape]],
    pruning: PruningSection,
    *,
    adds_biases: bool,
    stock: bool,
) -> list[Shape]:
    """Return the widths of the smallest ratio that meets a target. Raises ConfigError where none does."""
    architecture = target.architecture
    largest = _largest_ratio(architecture, pruning, adds_biases=adds_biases, stock=stock)
    shapes = least_cut(cut_at, partial(target.is_met, adds_biases=adds_biases), largest)
    if shapes is None:
        # Where no ratio at all can be met, this says why.
        raise _out_of_reach(target, target.cost_of(_largest_cut(cut_at, largest), adds_biases=adds_biases))
    # Layers of a stock checkpoint stay alike, and the authors' rounding knows no tiles.
    if stock or pruning.budget == "official":
        return shapes
    constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases)
    return _with_room_filled(target, constraints_L, shapes)


def _with_room_filled(
    target: Target, constraints_L: Sequence[WidthConstraints], shapes: Sequence[Shape]
) -> list[Shape]:
    """Give tiles of channels back while the target is met: units of attention may have saved much more than it asks.

    Layers that gave most come first, the deeper ones of equals.
    """
    shapes = list(shapes)
    room = -target.excess
    for constraints, shape in zip(constraints_L, shapes, strict=True):
        room += _units_saved(constraints, shape, target)

    # Layers whose next tile may still fit.
    open_layers = {*range(len(shapes))}
    while open_layers:
        layer = max(open_layers, key=lambda i: (constraints_L[i].removed(shapes[i]) / constraints_L[i].size, i))
        constraints = constraints_L[layer]
        shape = shapes[layer]
        wider = [channels for channels in constraints.channel_options if channels > shape.channels]
        after = replace(shape, channels=min(wider, default=shape.channels))
        cost = _units_saved(constraints, shape, target) - _units_saved(constraints, after, target)
        if not wider or cost > room:
            open_layers.remove(layer)
        else:
            shapes[layer] = after
            room -= cost
    return shapes


def _largest_cut(cut_at: Callable[[float], list[Shape]], largest: float) -> list[Shape]:
    """Return the widths of the largest ratio, or of one near to it. Raises ConfigError where none of these can be."""
    for part in BELOW_LARGEST[:-1]:
        try:
            return cut_at(part * largest)
        except ConfigError:
            continue
    return cut_at(BELOW_LARGEST[-1] * largest)


def _least_dropped(
    target: Target, architecture: Architecture, pruning: PruningSection, influence_L: Sequence[float]
) -> tuple[int, ...]:
    """Return the fewest layers whose loss meets a target. Raises ConfigError where too few may go."""
    relative_size_L, may_go = _droppable(architecture, pruning, 0.0)

    def cost(dropped: Sequence[int]) -> int:
        """Return what the layers that stay take."""
        return target.cost((i, layer) for i, layer in enumerate(architecture.layers) if i not in dropped)

    def dropped_at(ratio: float) -> tuple[int, ...]:
        """Return the layers that go at a ratio."""
        return choose_dropped(architecture, pruning, ratio=ratio, influence_L=influence_L)

    largest = sum(relative_size_L[layer] for layer in may_go) / architecture.n_layers
    dropped = least_cut(dropped_at, lambda dropped: cost(dropped) <= target.limit, largest)
    if dropped is None:
        raise _out_of_reach(target, cost(dropped_at(largest)))
    return dropped


def _out_of_reach(target: Target, least: int) -> ConfigError:
    """Return the error for a target below what the largest cut leaves."""
    extreme = "largest" if target.kind == "latency" else "smallest"
    return ConfigError(
        f"pruning.target.{target.kind}: {target.shown(target.limit)} is out of reach; the {extreme} within reach is "
        f"{target.shown(least)}"
    )


def _least_cost(
    architecture: Architecture, pruning: PruningSection, target: Target, *, adds_biases: bool, stock: bool
) -> int:
    """Return the least that the model can take, by sizes alone. Raises ConfigError where no ratio can be met."""
    kind = pruning.allocation.kind
    if kind == "depth":
        even_L = [0.0] * architecture.n_layers
        largest = _largest_ratio(architecture, pruning, adds_biases=adds_biases, stock=stock)
        dropped = choose_dropped(architecture, pruning, ratio=largest, influence_L=even_L)
        return target.cost((i, layer) for i, layer in enumerate(architecture.layers) if i not in dropped)

    _check_budget(pruning)
    if kind in ("measured", "auto"):
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
        _check_measured_reach(constraints_L, pruning.allocation, 0.0, stock)
        return target.dense - _most_saved(constraints_L, pruning.allocation, target)

    # What ranks by scores reaches as far as an even cut.
    if kind in RANKING_VALUES:
        pruning = pruning.model_copy(update={"allocation": pruning.allocation.model_copy(update={"kind": "uniform"})})
    largest = _largest_ratio(architecture, pruning, adds_biases=adds_biases, stock=stock)
    shapes = _largest_cut(
        lambda ratio: choose_shapes(
            architecture, pruning, ratio=ratio, adds_biases=adds_biases, scores_L=(), stock=stock
        ),
        largest,
    )
    return target.cost_of(shapes, adds_biases=adds_biases)


def _most_saved(constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, target: Target) -> int:
    """Return the most that the layers together can save of a target."""
    _, _, may_change = _unprotected(allocation, len(constraints_L))
    saved = 0
    for layer in may_change:
        constraints = constraints_L[layer]
        narrower = _allowed_shapes(constraints, allocation)
        saved += max((_units_saved(constraints, shape, target) for shape in narrower), default=0)
    return saved


def _largest_ratio(architecture: Architecture, pruning: PruningSection, *, adds_biases: bool, stock: bool) -> float:
    """Return the largest ratio that an allocation can be asked for."""
    # The authors' rounding leaves one head and one channel at any ratio below 1.
    if pruning.budget == "official":
        return 1 - 1e-6
    constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
    allocation = pruning.allocation
    layers = range(len(constraints_L))
    if allocation.kind in ("logistic", "depth"):
        _, _, layers = _unprotected(allocation, len(constraints_L))
    cap_L = [1.0] * len(constraints_L) if allocation.kind == "depth" else _caps(constraints_L, allocation)
    return sparsity.largest_ratio(_relative_sizes(constraints_L), cap_L, layers)


def _units_saved(constraints: WidthConstraints, shape: Shape, target: Target | None) -> int:
    """Return what a layer's widths save: weights, or of a target its unit."""
    if target is None:
        return constraints.removed(shape)
    layer = constraints.layer
    architecture = constraints.architecture
    after = architecture.resized(layer, shape, adds_biases=constraints.adds_biases)
    return target.layer_cost(layer, architecture.layers[layer]) - target.layer_cost(layer, after)


# --- shares of layers ------------------------------------------------------------------------------------------------


def layer_sparsity(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, ratio: float
) -> list[float]:
    """Return the share of its own weights that every layer gives under ``uniform`` or ``logistic``.

    Raises:
        ConfigError: Caps and protected layers do not allow the ratio.
    """
    relative_size_L = _relative_sizes(constraints_L)
    cap_L = _caps(constraints_L, allocation)

    if allocation.kind == "uniform":
        _check_reach(constraints_L, allocation, ratio)
        return sparsity.uniform(relative_size_L, ratio, cap_L)

    first, last = protected_layers(relative_size_L, allocation, ratio, cap_L)
    return sparsity.logistic(relative_size_L, ratio, cap_L, k=allocation.k, x0=allocation.x0, first=first, last=last)


def protected_layers(
    relative_size_L: Sequence[float], allocation: AllocationSection, ratio: float, cap_L: Sequence[float]
) -> tuple[int, int]:
    """Return how many first and last layers stay whole.

    An ``auto`` number yields to a ratio beyond it, the last layers first.

    Args:
        relative_size_L: Size of every layer relative to their mean.
        allocation: The numbers that the configuration has.
        ratio: Share of all weights that shall go.
        cap_L: Largest share that each layer may give.

    Returns:
        Numbers of first and of last layers.
    """
    n_layers = len(cap_L)
    first_yields = allocation.protect_first == "auto"
    last_yields = allocation.protect_last == "auto"
    automatic = 2 if n_layers >= DEEP_MODEL else 1
    first = automatic if allocation.protect_first == "auto" else allocation.protect_first
    last = automatic if allocation.protect_last == "auto" else allocation.protect_last

    def too_many() -> bool:
        """Return whether the other layers cannot give the ratio."""
        active = range(first, max(n_layers - last, first))
        return ratio > sparsity.largest_ratio(relative_size_L, cap_L, active) + ROUNDING

    # Both ends yield in turn while the last end has at least as many.
    while too_many() and last_yields and last and last >= first:
        last -= 1
        if too_many() and first_yields and first:
            first -= 1
    while too_many() and last_yields and last:
        last -= 1
    while too_many() and first_yields and first:
        first -= 1
    return first, last


def _check_budget(pruning: PruningSection) -> None:
    """Raise ConfigError for the official budget under an allocation that the authors' code does not have."""
    kind = pruning.allocation.kind
    if pruning.budget == "official" and kind not in ("uniform", "logistic"):
        raise ConfigError(f"pruning.budget: official goes with allocation uniform or logistic, not {kind}")


def _check_reach(constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, ratio: float) -> None:
    """Raise ConfigError for a ratio beyond what all layers together can give."""
    cap_L = _caps(constraints_L, allocation)
    largest = sparsity.largest_ratio(_relative_sizes(constraints_L), cap_L, range(len(constraints_L)))
    if ratio > largest + ROUNDING:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what the layers can give; the largest is {_rounded_down(largest)}"
        )


def _droppable(architecture: Architecture, pruning: PruningSection, ratio: float) -> tuple[list[float], range]:
    """Return the relative sizes of all layers, and the layers that the user's own numbers do not protect.

    Raises ConfigError where these are too few for the ratio.
    """
    _check_budget(pruning)
    # Layers that stay must split over the ranks, too.
    relative_size_L = _relative_sizes(WidthConstraints.of(architecture, pruning, adds_biases=False))
    n_layers = architecture.n_layers
    allocation = pruning.allocation

    first, last, may_go = _unprotected(allocation, n_layers)
    protected_weights = [relative_size_L[layer] for layer in range(n_layers) if layer not in may_go]
    largest = sum(relative_size_L[layer] for layer in may_go) / n_layers
    # Too few only where one more layer, if it could go, would come nearer to the ratio.
    if len(protected_weights) > 1 and (ratio - largest) * n_layers > min(protected_weights) / 2 + ROUNDING:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what {first} + {last} protected layers allow; the largest is "
            f"{_rounded_down(largest)}"
        )
    return relative_size_L, may_go


def _unprotected(allocation: AllocationSection, n_layers: int) -> tuple[int, int, range]:
    """Return how many first and last layers the user's own numbers protect, and the layers between.

    Under ``auto`` none is: influences or measured rises of the loss alone decide.
    """
    first = 0 if allocation.protect_first == "auto" else allocation.protect_first
    last = 0 if allocation.protect_last == "auto" else allocation.protect_last
    return first, last, range(first, max(n_layers - last, first))


def _check_measured_reach(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, ratio: float, stock: bool
) -> None:
    """Raise ConfigError for a ratio beyond what layers can give that the user's own numbers do not protect."""
    n_layers = len(constraints_L)
    first, last, may_change = _unprotected(allocation, n_layers)
    if stock and ratio and len(may_change) < n_layers:
        raise ConfigError(
            "export.format: stock needs equal widths, but pruning.allocation.protect_first and protect_last keep "
            "layers whole; use export.format=seap or set both to 0"
        )

    cap_L = _caps(constraints_L, allocation)
    largest = sparsity.largest_ratio(_relative_sizes(constraints_L), cap_L, may_change)
    if ratio > largest + ROUNDING:
        limit = f"{first} + {last} protected layers allow" if first + last else "the layers can give"
        raise ConfigError(f"pruning.ratio: {ratio:g} is beyond what {limit}; the largest is {_rounded_down(largest)}")


def _relative_sizes(constraints_L: Sequence[WidthConstraints]) -> list[float]:
    """Return the sizes of the layers relative to their mean: each 1 where all are alike."""
    mean = sum(constraints.size for constraints in constraints_L) / len(constraints_L)
    return [constraints.size / mean for constraints in constraints_L]


def _caps(constraints_L: Sequence[WidthConstraints], allocation: AllocationSection) -> list[float]:
    """Return the largest share that each layer may give."""
    return [min(allocation.max_sparsity, constraints.cap) for constraints in constraints_L]


def _rounded_down(ratio: float) -> str:
    """Format a ratio so that it is not above the one it stands for, and can be asked for."""
    return f"{math.floor(ratio * 1e4) / 1e4:g}"


# --- shares to widths ------------------------------------------------------------------------------------------------


def _official_shapes(architecture: Architecture, allocation: AllocationSection, ratio: float) -> list[Shape]:
    """Round as the authors' code does: whole heads and channels, down, no tiles, no carry; one of each stays."""
    shares_L = [ratio] * architecture.n_layers
    if allocation.kind == "logistic":
        # The authors' code protects two layers at each end, however deep the model is.
        first = 2 if allocation.protect_first == "auto" else allocation.protect_first
        last = 2 if allocation.protect_last == "auto" else allocation.protect_last
        shares_L = sparsity.official_logistic(
            architecture.n_layers, ratio, k=allocation.k, x0=allocation.x0, first=first, last=last
        )

    shapes: list[Shape] = []
    for layer, share in zip(architecture.layers, shares_L, strict=True):
        groups = _less_share(layer.shape.groups, share)
        shapes.append(Shape(groups, layer.shape.heads_per_group, _less_share(layer.shape.channels, share)))
    return shapes


def _less_share(n: int, share: float) -> int:
    """Return how many of ``n`` are left without a share of them, rounded down; one stays."""
    return n - min(int(n * share), n - 1)


def _even_shapes(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, stock: bool, ratio: float
) -> list[Shape]:
    """Return the widths of a ratio under ``uniform`` or ``logistic``. Raises ConfigError where it cannot be met."""
    # Shares are computed for stock checkpoints, too: that checks the ratio.
    shares_L = layer_sparsity(constraints_L, allocation, ratio)
    if stock and allocation.kind == "uniform":
        return [constraints.nearest(ratio) for constraints in constraints_L]
    return _rounded_shapes(constraints_L, allocation, shares_L, ratio)


def _rounded_shapes(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, shares_L: Sequence[float], ratio: float
) -> list[Shape]:
    """Round every layer's share to allowed widths; what rounding leaves over is carried on, then evened out."""
    shapes: list[Shape] = []
    # Weights that layers so far should have given and did not.
    carry = 0.0

    for constraints, share in zip(constraints_L, shares_L, strict=True):
        # A layer without a share is protected: it takes no part of the carry either.
        shape = constraints.nearest(share, carry) if share else constraints.original
        carry += share * constraints.size - constraints.removed(shape)
        shapes.append(shape)

    may_change = [share > 0 for share in shares_L]
    return _with_remainder(constraints_L, allocation, shapes, may_change, ratio)


def _with_remainder(
    constraints_L: Sequence[WidthConstraints],
    allocation: AllocationSection,
    shapes: list[Shape],
    may_change_L: Sequence[bool],
    ratio: float,
) -> list[Shape]:
    """Move tiles of channels until the total is within half a tile of the target, the deepest layers first.

    Raises ConfigError with the ratio reached where no layer has room.
    """
    total = sum(constraints.size for constraints in constraints_L)
    target = ratio * total
    removed = _removed(constraints_L, shapes)

    shapes = list(shapes)
    for layer in reversed(range(len(shapes))):
        if not may_change_L[layer]:
            continue
        constraints = constraints_L[layer]
        shape = shapes[layer]
        missing = target - removed
        moved = _with_fewer_channels(constraints, allocation, shape, missing)
        gained = constraints.removed(moved) - constraints.removed(shape)
        # A layer without room, or one that would overshoot by more than is missing, stays.
        if abs(missing - gained) < abs(missing):
            shapes[layer] = moved
            removed += gained

    _check_met(removed, total, ratio, constraints_L[0].tile_cost)
    return shapes


def _check_met(removed: float, total: int, ratio: float, tile: int) -> None:
    """Raise ConfigError with the ratio reached where it is not within a tile of the one that was asked for."""
    # A whole tile, not half of one: caps and floors may keep layers from the last half.
    if abs(ratio * total - removed) > tile:
        reached = removed / total
        raise ConfigError(
            f"pruning.ratio: {ratio:g} cannot be met with pruning.attention_unit and pruning.align as they are; "
            f"{_rounded_down(reached)} can"
        )


def _with_fewer_channels(
    constraints: WidthConstraints, allocation: AllocationSection, shape: Shape, missing: float
) -> Shape:
    """Return the widths with so many channels fewer as save the missing weights, or as the layer's cap allows.

    A negative number gives channels back. The cap holds as a tile does: a layer may give part of one more, or a ratio
    just under the cap could not be met.
    """
    cap = min(allocation.max_sparsity, constraints.cap)
    room = cap * constraints.size - constraints.removed(shape) + constraints.tile_cost / 2
    more = min(missing, room)

    channels = constraints.channels(shape.channels - more / constraints.architecture.channel_cost)
    return Shape(shape.groups, shape.heads_per_group, channels)


def _removed(constraints_L: Sequence[WidthConstraints], shapes: Sequence[Shape]) -> int:
    """Return how many weights these widths save in all layers together."""
    return sum(constraints.removed(shape) for constraints, shape in zip(constraints_L, shapes, strict=True))


# --- scores to widths ------------------------------------------------------------------------------------------------


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


def _greedy_shapes(
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
    cap_L = _caps(constraints_L, allocation)
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
    return _with_remainder(constraints_L, allocation, shapes, may_change, ratio)


def _ranked_candidates(
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
    cost = constraints.architecture.channel_cost
    return [
        _Candidate(
            lost_score=float(ascending_C[n - wide : n - narrow].sum()),
            columns=wide - narrow,
            weights=(wide - narrow) * cost,
            width={"channels": narrow},
        )
        for wide, narrow in pairwise(constraints.channel_options)
    ]


# --- measured rises of the loss to widths ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _MeasuredOption(knapsack.Option):
    """Widths that a layer may take, the weights that they save, and by how much the loss rises with them."""

    shape: Shape


def _measured_shapes(
    constraints_L: Sequence[WidthConstraints],
    allocation: AllocationSection,
    ratio: float,
    target: Target | None,
    sensitivities: Sensitivities,
    stock: bool,
) -> list[Shape]:
    """Return the widths whose summed rise is least. Raises ConfigError where no widths meet the ratio or target."""
    # A target has a check of its own.
    _check_measured_reach(constraints_L, allocation, ratio if target is None else 0.0, stock)
    options_L = _measured_options(constraints_L, allocation, sensitivities, target)
    if target is not None:
        choose_within = _equal_shapes_within if stock else _least_rise_shapes_within
        return choose_within(constraints_L, options_L, target)
    choose = _equal_shapes if stock else _least_rise_shapes
    return choose(constraints_L, options_L, ratio)


def _measured_options(
    constraints_L: Sequence[WidthConstraints],
    allocation: AllocationSection,
    sensitivities: Sensitivities,
    target: Target | None,
) -> list[list[_MeasuredOption]]:
    """List the widths that every layer may take, the whole ones first; protected layers have no others."""
    _, _, may_change = _unprotected(allocation, len(constraints_L))
    options_L: list[list[_MeasuredOption]] = []
    for layer, constraints in enumerate(constraints_L):
        options = [_MeasuredOption(0, 0.0, constraints.original)]
        if layer in may_change:
            options += _narrower_options(constraints, allocation, sensitivities, target)
        options_L.append(options)
    return options_L


def _narrower_options(
    constraints: WidthConstraints,
    allocation: AllocationSection,
    sensitivities: Sensitivities,
    target: Target | None,
) -> list[_MeasuredOption]:
    """List the narrower widths that a layer's cap allows; rises of attention and MLP add up."""
    architecture = constraints.architecture
    layer = constraints.layer
    original = constraints.original
    attn_shapes = [Shape(*option, original.channels) for option in constraints.options]
    mlp_shapes = [replace(original, channels=channels) for channels in constraints.channel_options]
    attn_rises = sensitivities.rises(architecture, layer, "attn", attn_shapes)
    mlp_rises = sensitivities.rises(architecture, layer, "mlp", mlp_shapes)
    attn_rise = dict(zip(constraints.options, attn_rises, strict=True))
    mlp_rise = dict(zip(constraints.channel_options, mlp_rises, strict=True))

    options: list[_MeasuredOption] = []
    for shape in _allowed_shapes(constraints, allocation):
        rise = attn_rise[shape.groups, shape.heads_per_group] + mlp_rise[shape.channels]
        options.append(_MeasuredOption(_units_saved(constraints, shape, target), rise, shape))
    return options


def _allowed_shapes(constraints: WidthConstraints, allocation: AllocationSection) -> list[Shape]:
    """List the narrower widths that a layer's cap allows.

    Widths that save nothing, because of biases that a cut layer gets, are left out.
    """
    # The cap holds as a tile does: without part of one more, a ratio just under the cap could not be met.
    most = min(allocation.max_sparsity, constraints.cap) * constraints.size + constraints.tile_cost
    every = [Shape(*option, channels) for option, channels in product(constraints.options, constraints.channel_options)]
    return [shape for shape in every if 0 < constraints.removed(shape) <= most]


def _least_rise_shapes(
    constraints_L: Sequence[WidthConstraints], options_L: Sequence[Sequence[_MeasuredOption]], ratio: float
) -> list[Shape]:
    """Choose the widths with the least summed rise of all that meet the ratio within half a tile.

    Raises ConfigError with the ratio reached where no widths are within a tile.
    """
    total = sum(constraints.size for constraints in constraints_L)
    target = ratio * total
    tile = constraints_L[0].tile_cost

    # Coarse units of attention may leave no choice within half a tile; a window of everything has one.
    window = tile / 2
    chosen = knapsack.choose(options_L, low=target - window, high=target + window)
    while chosen is None:
        window *= 2
        chosen = knapsack.choose(options_L, low=target - window, high=target + window)

    options = [options[place] for options, place in zip(options_L, chosen, strict=True)]
    _check_met(sum(option.saved for option in options), total, ratio, tile)
    return [option.shape for option in options]


def _equal_shapes(
    constraints_L: Sequence[WidthConstraints], options_L: Sequence[Sequence[_MeasuredOption]], ratio: float
) -> list[Shape]:
    """Choose one shape for all layers: the least summed rise of those that meet the ratio within half a tile a layer.

    Where none does, the nearest one.
    """
    target = ratio * sum(constraints.size for constraints in constraints_L)
    half_tiles = sum(constraints.tile_cost for constraints in constraints_L) / 2
    rises_by_shape: dict[Shape, list[float]] = {}
    for option in chain.from_iterable(options_L):
        rises_by_shape.setdefault(option.shape, []).append(option.rise)

    def rank(shape: Shape) -> tuple[float, float, float]:
        """Return what to minimise: how far off beyond half a tile, then the rise, then how far off."""
        off = abs(_removed(constraints_L, [shape] * len(constraints_L)) - target)
        return max(off - half_tiles, 0), math.fsum(rises_by_shape[shape]), off

    # A bias of an earlier compensation may keep a width from saving anything in some layer.
    shapes = [shape for shape, rises in rises_by_shape.items() if len(rises) == len(constraints_L)]
    return [min(shapes, key=rank)] * len(constraints_L)


def _least_rise_shapes_within(
    constraints_L: Sequence[WidthConstraints], options_L: Sequence[Sequence[_MeasuredOption]], target: Target
) -> list[Shape]:
    """Choose the widths with the least summed rise of all that meet a target and save a tile more at most.

    Where no choice is as near, those a little farther off count, too. Raises ConfigError for a target out of reach.
    """
    most = 0
    for options in options_L:
        most += max(option.saved for option in options)
    if most < target.excess:
        raise _out_of_reach(target, target.dense - most)

    window = float(max(_tile_saved(constraints, target) for constraints in constraints_L))
    chosen = knapsack.choose(options_L, low=target.excess, high=target.excess + window)
    while chosen is None:
        window *= 2
        chosen = knapsack.choose(options_L, low=target.excess, high=target.excess + window)
    return [options[place].shape for options, place in zip(options_L, chosen, strict=True)]


def _tile_saved(constraints: WidthConstraints, target: Target) -> int:
    """Return what the first tile of a layer's channels saves of a target, at least 1."""
    original = constraints.original
    one_less = replace(original, channels=max(original.channels - constraints.tile, 1))
    return max(_units_saved(constraints, one_less, target), 1)


def _equal_shapes_within(
    constraints_L: Sequence[WidthConstraints], options_L: Sequence[Sequence[_MeasuredOption]], target: Target
) -> list[Shape]:
    """Choose one shape for all layers: the least summed rise of those that meet a target, then the widest.

    Raises ConfigError for a target out of reach.
    """
    rises_by_shape: dict[Shape, list[float]] = {}
    saved_by_shape: dict[Shape, int] = {}
    for option in chain.from_iterable(options_L):
        rises_by_shape.setdefault(option.shape, []).append(option.rise)
        saved_by_shape[option.shape] = saved_by_shape.get(option.shape, 0) + option.saved

    # A bias of an earlier compensation may keep a width from saving anything in some layer.
    shapes = [shape for shape, rises in rises_by_shape.items() if len(rises) == len(constraints_L)]
    within = [shape for shape in shapes if saved_by_shape[shape] >= target.excess]
    if not within:
        raise _out_of_reach(target, target.dense - max(saved_by_shape[shape] for shape in shapes))
    best = min(within, key=lambda shape: (math.fsum(rises_by_shape[shape]), saved_by_shape[shape]))
    return [best] * len(constraints_L)
