"""Layers: what the charts of plans and scores have in common."""

from collections.abc import Mapping, Sequence

from seap_ray.core.architecture import Architecture
from seap_ray.report.charts import HeatMap

BLOCKS = {"heads": "attention", "channels": "MLP"}
"""Blocks of a layer by the units that plans remove from them."""

UnitGroup = tuple[int, str, int]
"""Layer, kind of unit, and how many of them the layer has before it is pruned."""


def unit_groups(architecture: Architecture, unit: str) -> list[UnitGroup]:
    """Return the units of one kind in every layer; the channels of all MoE experts count."""
    groups: list[UnitGroup] = []
    for i, layer in enumerate(architecture.layers):
        # A dense layer has 0 MoE experts and one MLP. Heads are not multiplied: the experts share the attention.
        n_experts = max(layer.n_experts, 1) if unit == "channels" else 1
        groups.append((i, unit, n_experts * getattr(layer.shape, unit)))
    return groups


def layer_map(title: str, columns: Mapping[str, Sequence[float | None]], highest: float, digits: int) -> HeatMap:
    """Return a map with a row for every layer; ``columns`` has the numbers of all layers by name."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    layers = [str(layer) for layer in range(len(rows))]
    return HeatMap(title, "", "layer", list(columns), layers, rows, (0, highest), digits)
