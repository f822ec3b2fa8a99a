"""Reach: which widths layers may take, which layers may be cut at all, and which ratios they can give together.

Letters: L layers.
"""

import math
from collections.abc import Sequence

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core import sparsity
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.targets import Target
from seap_ray.core.widths import WidthConstraints
from seap_ray.errors import ConfigError

ROUNDING = 1e-12
"""A ratio may be beyond the largest one by this much: what sums of floats are off by."""

DEEP_MODEL = 24
"""Layers from which ``auto`` protects two layers at each end instead of one."""


# --- what layers can give ---------------------------------------------------------------------------------------------


def relative_sizes(constraints_L: Sequence[WidthConstraints]) -> list[float]:
    """Return the sizes of the layers relative to their mean: each 1 where all are alike."""
    mean = sum(constraints.size for constraints in constraints_L) / len(constraints_L)
    return [constraints.size / mean for constraints in constraints_L]


def caps(constraints_L: Sequence[WidthConstraints], allocation: AllocationSection) -> list[float]:
    """Return the largest share that each layer may give."""
    return [min(allocation.max_sparsity, constraints.cap) for constraints in constraints_L]


def allowed_shapes(constraints: WidthConstraints, allocation: AllocationSection) -> dict[Shape, int]:
    """Return the narrower widths that a layer's cap allows, and the weights that they save.

    Widths that save nothing, because of biases that a cut layer gets, are left out.
    """
    # The cap holds as a tile does: without part of one more, a ratio just under the cap could not be met.
    most = min(allocation.max_sparsity, constraints.cap) * constraints.size + constraints.tile_cost
    return {shape: removed for shape, removed in constraints.removed_by_shape() if 0 < removed <= most}


def units_saved(constraints: WidthConstraints, shape: Shape, target: Target | None) -> int:
    """Return what a layer's widths save: weights, or of a target its unit."""
    if target is None:
        return constraints.removed(shape)
    layer = constraints.layer
    architecture = constraints.architecture
    after = architecture.resized(layer, shape, adds_biases=constraints.adds_biases)
    return target.layer_cost(layer, architecture.layers[layer]) - target.layer_cost(layer, after)


# --- protected layers -------------------------------------------------------------------------------------------------


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


def unprotected(allocation: AllocationSection, n_layers: int) -> tuple[int, int, range]:
    """Return how many first and last layers the user's own numbers protect, and the layers between.

    Under ``auto`` none is: influences or measured rises of the loss alone decide.
    """
    first = 0 if allocation.protect_first == "auto" else allocation.protect_first
    last = 0 if allocation.protect_last == "auto" else allocation.protect_last
    return first, last, range(first, max(n_layers - last, first))


def droppable(architecture: Architecture, pruning: PruningSection, ratio: float) -> tuple[list[float], range]:
    """Return the relative sizes of all layers, and the layers that the user's own numbers do not protect.

    Raises ConfigError where these are too few for the ratio.
    """
    check_budget(pruning)
    # Layers that stay must split over the ranks, too.
    relative_size_L = relative_sizes(WidthConstraints.of(architecture, pruning, adds_biases=False))
    n_layers = architecture.n_layers
    allocation = pruning.allocation

    first, last, may_go = unprotected(allocation, n_layers)
    protected_weights = [relative_size_L[layer] for layer in range(n_layers) if layer not in may_go]
    largest = sum(relative_size_L[layer] for layer in may_go) / n_layers
    # Too few only where one more layer, if it could go, would come nearer to the ratio.
    if len(protected_weights) > 1 and (ratio - largest) * n_layers > min(protected_weights) / 2 + ROUNDING:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what {first} + {last} protected layers allow; the largest is "
            f"{rounded_down(largest)}"
        )
    return relative_size_L, may_go


# --- checks -----------------------------------------------------------------------------------------------------------


def check_budget(pruning: PruningSection) -> None:
    """Raise ConfigError for the official budget under an allocation that the authors' code does not have."""
    kind = pruning.allocation.kind
    if pruning.budget == "official" and kind not in ("uniform", "logistic"):
        raise ConfigError(f"pruning.budget: official goes with allocation uniform or logistic, not {kind}")


def check_reach(constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, ratio: float) -> None:
    """Raise ConfigError for a ratio beyond what all layers together can give."""
    cap_L = caps(constraints_L, allocation)
    largest = sparsity.largest_ratio(relative_sizes(constraints_L), cap_L, range(len(constraints_L)))
    if ratio > largest + ROUNDING:
        raise ConfigError(
            f"pruning.ratio: {ratio:g} is beyond what the layers can give; the largest is {rounded_down(largest)}"
        )


def check_measured_reach(
    constraints_L: Sequence[WidthConstraints], allocation: AllocationSection, ratio: float, stock: bool
) -> None:
    """Raise ConfigError for a ratio beyond what layers can give that the user's own numbers do not protect."""
    n_layers = len(constraints_L)
    first, last, may_change = unprotected(allocation, n_layers)
    if stock and ratio and len(may_change) < n_layers:
        raise ConfigError(
            "export.format: stock needs equal widths, but pruning.allocation.protect_first and protect_last keep "
            "layers whole; use export.format=seap or set both to 0"
        )

    cap_L = caps(constraints_L, allocation)
    largest = sparsity.largest_ratio(relative_sizes(constraints_L), cap_L, may_change)
    if ratio > largest + ROUNDING:
        limit = f"{first} + {last} protected layers allow" if first + last else "the layers can give"
        raise ConfigError(f"pruning.ratio: {ratio:g} is beyond what {limit}; the largest is {rounded_down(largest)}")


def rounded_down(ratio: float) -> str:
    """Format a ratio so that it is not above the one it stands for, and can be asked for."""
    return f"{math.floor(ratio * 1e4) / 1e4:g}"
