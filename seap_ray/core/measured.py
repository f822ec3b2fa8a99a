"""Measured: the allocation of that name, the widths whose measured rises of the loss add up to the least.

Letters: L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from seap_ray.config import AllocationSection
from seap_ray.core import knapsack
from seap_ray.core.architecture import Shape
from seap_ray.core.reach import allowed_shapes, check_measured_reach, units_saved, unprotected
from seap_ray.core.sensitivity import Sensitivities
from seap_ray.core.shares import check_met, weights_removed
from seap_ray.core.targets import Target
from seap_ray.core.widths import WidthConstraints


@dataclass(frozen=True, slots=True)
class _MeasuredOption(knapsack.Option):
    """Widths that a layer may take, the weights that they save, and by how much the loss rises with them."""

    shape: Shape


def measured_shapes(
    constraints_L: Sequence[WidthConstraints],
    allocation: AllocationSection,
    ratio: float,
    target: Target | None,
    sensitivities: Sensitivities,
    stock: bool,
) -> list[Shape]:
    """Return the widths whose summed rise is least. Raises ConfigError where no widths meet the ratio or target."""
    # A target has a check of its own.
    check_measured_reach(constraints_L, allocation, ratio if target is None else 0.0, stock)
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
    _, _, may_change = unprotected(allocation, len(constraints_L))
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
    for shape, weights in allowed_shapes(constraints, allocation).items():
        rise = attn_rise[shape.groups, shape.heads_per_group] + mlp_rise[shape.channels]
        saved = weights if target is None else units_saved(constraints, shape, target)
        options.append(_MeasuredOption(saved, rise, shape))
    return options


# --- a ratio ----------------------------------------------------------------------------------------------------------


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
    check_met(sum(option.saved for option in options), total, ratio, tile)
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
        off = abs(weights_removed(constraints_L, [shape] * len(constraints_L)) - target)
        return max(off - half_tiles, 0), math.fsum(rises_by_shape[shape]), off

    # A bias of an earlier compensation may keep a width from saving anything in some layer.
    shapes = [shape for shape, rises in rises_by_shape.items() if len(rises) == len(constraints_L)]
    return [min(shapes, key=rank)] * len(constraints_L)


# --- a target ---------------------------------------------------------------------------------------------------------


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
        raise target.out_of_reach(target.dense - most)

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
    return max(units_saved(constraints, one_less, target), 1)


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
        raise target.out_of_reach(target.dense - max(saved_by_shape[shape] for shape in shapes))
    best = min(within, key=lambda shape: (math.fsum(rises_by_shape[shape]), saved_by_shape[shape]))
    return [best] * len(constraints_L)
