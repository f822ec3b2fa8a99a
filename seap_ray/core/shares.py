"""Shares: the allocations ``uniform`` and ``logistic``, a share of every layer's weights and the widths nearest to it.

Letters: L layers.
"""

from collections.abc import Sequence

from seap_ray.config import AllocationSection
from seap_ray.core import sparsity
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.reach import caps, check_reach, protected_layers, relative_sizes, rounded_down
from seap_ray.core.widths import WidthConstraints
from seap_ray.errors import ConfigError


def layer_sparsity(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, ratio: float
) -> list[float]:
    """Return the share of its own weights that every layer gives under ``uniform`` or ``logistic``.

    Raises:
        ConfigError: Caps and protected layers do not allow the ratio.
    """
    relative_size_L = relative_sizes(constraints_L)
    cap_L = caps(constraints_L, allocation)

    if allocation.kind == "uniform":
        check_reach(constraints_L, allocation, ratio)
        return sparsity.uniform(relative_size_L, ratio, cap_L)

    first, last = protected_layers(relative_size_L, allocation, ratio, cap_L)
    return sparsity.logistic(relative_size_L, ratio, cap_L, k=allocation.k, x0=allocation.x0, first=first, last=last)


def even_shapes(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, stock: bool, ratio: float
) -> list[Shape]:
    """Return the widths of a ratio under ``uniform`` or ``logistic``. Raises ConfigError where it cannot be met."""
    # Shares are computed for stock checkpoints, too: that checks the ratio.
    shares_L = layer_sparsity(constraints_L, allocation, ratio)
    if stock and allocation.kind == "uniform":
        return [constraints.nearest(ratio) for constraints in constraints_L]
    return _rounded_shapes(constraints_L, allocation, shares_L, ratio)


def official_shapes(architecture: Architecture, allocation: AllocationSection, ratio: float) -> list[Shape]:
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
    return n - min(int(n * share), n - 1) if n else 0


# --- rounding ---------------------------------------------------------------------------------------------------------


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
    return with_remainder(constraints_L, allocation, shapes, may_change, ratio)


def with_remainder(
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
    removed = weights_removed(constraints_L, shapes)

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

    # Layers differ in it where some have MoE experts and others none.
    check_met(removed, total, ratio, max(constraints.tile_cost for constraints in constraints_L))
    return shapes


def check_met(removed: float, total: int, ratio: float, tile: int) -> None:
    """Raise ConfigError with the ratio reached where it is not within a tile of the one that was asked for."""
    # A whole tile, not half of one: caps and floors may keep layers from the last half.
    if abs(ratio * total - removed) > tile:
        reached = removed / total
        raise ConfigError(
            f"pruning.ratio: {ratio:g} cannot be met with pruning.attention_unit and pruning.align as they are; "
            f"{rounded_down(reached)} can"
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

    channels = constraints.channels(shape.channels - more / constraints.channel_cost)
    return Shape(shape.groups, shape.heads_per_group, channels)


def weights_removed(constraints_L: Sequence[WidthConstraints], shapes: Sequence[Shape]) -> int:
    """Return how many weights these widths save in all layers together."""
    return sum(constraints.removed(shape) for constraints, shape in zip(constraints_L, shapes, strict=True))
