"""Allocation: how the widths of all layers, or the layers that go as a whole, meet a budget of parameters.

Under ``uniform`` and ``logistic`` (``core.shares``) the widths depend on the ratio alone, so all checkpoints of one
ratio have equal shapes. ``global`` and ``standardised`` (``core.ranking``) rank what may go over all layers by its
scores. ``measured`` (``core.measured``) chooses the widths whose measured rises of the loss add up to the least.
``depth`` drops whole layers.

Letters: L layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core import sparsity
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.experts import choose_count, expert_counts, layers_with, removed_share
from seap_ray.core.measured import measured_shapes
from seap_ray.core.ranking import RANKING_VALUES, greedy_shapes, ranked_candidates
from seap_ray.core.reach import (
    allowed_shapes,
    caps,
    check_budget,
    check_measured_reach,
    check_reach,
    droppable,
    relative_sizes,
    units_saved,
    unprotected,
)
from seap_ray.core.scores import LayerScores
from seap_ray.core.sensitivity import Sensitivities
from seap_ray.core.shares import even_shapes, official_shapes
from seap_ray.core.targets import BELOW_LARGEST, Target, least_cut
from seap_ray.core.widths import WidthConstraints, widest_unit
from seap_ray.errors import ConfigError


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
    check_budget(pruning)
    if pruning.budget == "official" and (architecture.family.mixer or architecture.why_whole_attention):
        raise ConfigError(
            f"pruning.budget: official cuts every layer's attention and MLP by one share, and layers of a "
            f"{architecture.family_name} model have parts that stay whole; use exact"
        )
    if target is None and ratio == 0 and pruning.budget == "exact":
        return [constraints.original for constraints in constraints_L]
    if allocation.kind == "measured":
        if sensitivities is None:
            raise ValueError("allocation.kind: measured needs sensitivities")
        return measured_shapes(constraints_L, allocation, ratio, target, sensitivities, stock)

    if pruning.budget == "official":
        cut_at: Callable[[float], list[Shape]] = partial(official_shapes, architecture, allocation)
    elif allocation.kind in RANKING_VALUES:
        if target is None:
            check_reach(constraints_L, allocation, ratio)
        ranking = ranked_candidates(constraints_L, scores_L, allocation.kind, comparable)
        cut_at = partial(greedy_shapes, constraints_L, allocation, ranking)
    else:
        cut_at = partial(even_shapes, constraints_L, allocation, stock)

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
        ConfigError: Protection leaves too few layers, or none can go.
    """
    check_droppable(architecture)
    if target is not None:
        return _least_dropped(target, architecture, pruning, influence_L)
    relative_size_L, may_go = droppable(architecture, pruning, ratio)
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
        check_droppable(architecture)
        droppable(architecture, pruning, ratio)
    elif pruning.mlp_unit == "expert":
        choose_count(architecture, pruning, ratio=ratio)
    elif pruning.allocation.kind in RANKING_VALUES:
        check_budget(pruning)
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
        check_reach(constraints_L, pruning.allocation, ratio)
    # Of what ``auto`` judges, ``measured`` reaches farthest.
    elif pruning.allocation.kind in ("measured", "auto"):
        if pruning.allocation.kind == "measured":
            check_measurable(architecture)
        check_budget(pruning)
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
        check_measured_reach(constraints_L, pruning.allocation, ratio, stock)
    else:
        # These allocations read no scores, so the choice itself is the check.
        choose_shapes(architecture, pruning, ratio=ratio, adds_biases=adds_biases, scores_L=(), stock=stock)


def check_droppable(architecture: Architecture) -> None:
    """Raise ConfigError where no whole layer can go: others need what it makes, or are given inputs by its number."""
    if architecture.family.whole_attention:
        raise ConfigError(
            f"pruning.allocation.kind: depth is not for a {architecture.family_name} model, whose layers take keys and "
            "values from others, and inputs by their numbers; choose another kind"
        )


def check_measurable(architecture: Architecture) -> None:
    """Raise ConfigError where what cuts cost cannot be measured: gradients go from layer to layer alone."""
    if architecture.family.whole_attention:
        raise ConfigError(
            f"pruning.allocation.kind: measured is not for a {architecture.family_name} model, whose layers also share "
            "keys and values; use auto, global or uniform"
        )


# --- targets instead of ratios ----------------------------------------------------------------------------------------


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
        raise target.out_of_reach(least)


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
    if pruning.mlp_unit == "expert":
        n_experts = choose_count(architecture, pruning, ratio=0.0, target=target)
        return math.ceil(removed_share(architecture, n_experts) * 1e4) / 1e4
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
        raise target.out_of_reach(target.cost_of(_largest_cut(cut_at, largest), adds_biases=adds_biases))
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
        room += units_saved(constraints, shape, target)

    # Layers whose next tile may still fit.
    open_layers = {*range(len(shapes))}
    while open_layers:
        layer = max(open_layers, key=lambda i: (constraints_L[i].removed(shapes[i]) / constraints_L[i].size, i))
        constraints = constraints_L[layer]
        shape = shapes[layer]
        wider = [channels for channels in constraints.channel_options if channels > shape.channels]
        after = replace(shape, channels=min(wider, default=shape.channels))
        cost = units_saved(constraints, shape, target) - units_saved(constraints, after, target)
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
    relative_size_L, may_go = droppable(architecture, pruning, 0.0)

    def cost(dropped: Sequence[int]) -> int:
        """Return what the layers that stay take."""
        return target.cost((i, layer) for i, layer in enumerate(architecture.layers) if i not in dropped)

    def dropped_at(ratio: float) -> tuple[int, ...]:
        """Return the layers that go at a ratio."""
        return choose_dropped(architecture, pruning, ratio=ratio, influence_L=influence_L)

    largest = sum(relative_size_L[layer] for layer in may_go) / architecture.n_layers
    dropped = least_cut(dropped_at, lambda dropped: cost(dropped) <= target.limit, largest)
    if dropped is None:
        raise target.out_of_reach(cost(dropped_at(largest)))
    return dropped


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
    if pruning.mlp_unit == "expert":
        fewest = expert_counts(architecture, pruning)[-1]
        return target.cost(enumerate(layers_with(architecture, fewest)))

    check_budget(pruning)
    if kind in ("measured", "auto"):
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=stock)
        check_measured_reach(constraints_L, pruning.allocation, 0.0, stock)
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
    _, _, may_change = unprotected(allocation, len(constraints_L))
    saved = 0
    for layer in may_change:
        constraints = constraints_L[layer]
        narrower = allowed_shapes(constraints, allocation)
        saved += max((units_saved(constraints, shape, target) for shape in narrower), default=0)
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
        _, _, layers = unprotected(allocation, len(constraints_L))
    cap_L = [1.0] * len(constraints_L) if allocation.kind == "depth" else caps(constraints_L, allocation)
    return sparsity.largest_ratio(relative_sizes(constraints_L), cap_L, layers)
