"""Repairs: cut models in, the same out with what compensation makes of their layers, computed side by side.

Covariances make a repair slow, and their memory is a layer's: one Ray task a layer, for all models that are run
together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from torch import Tensor

from seap_ray.models.export import CheckpointExport
from seap_ray.models.records import task_memory
from seap_ray.pipeline.cluster import work_task


@dataclass(frozen=True, eq=False)
class RepairedExport(CheckpointExport):
    """A cut model whose output modules other Ray tasks repair, a layer each, for all models that are run together."""

    place: int = 0
    """Which of these models this is."""
    repairs: Mapping[int, Any] = field(default_factory=dict)
    """Reference to what ``_repair_layer`` returns, by the layer in the base."""

    def repaired(self, layer: int, module: str) -> dict[str, Tensor]:
        """Return the tensors that compensation makes of an output module, by kind, as soon as they are there."""
        by_model = ray.get(self.repairs[self.plan.layers[layer]])
        tensors: dict[str, Tensor] = by_model[self.place][module]
        return tensors


def with_repairs(exports: tuple[CheckpointExport, ...]) -> tuple[CheckpointExport, ...]:
    """Start the repair of models in Ray tasks, where covariances make it slow; others are repaired as they are run."""
    if all(export.plan.compensation.required != "covariance" for export in exports):
        return exports

    architecture = exports[0].base.architecture
    task = work_task(_repair_layer, memory=task_memory(architecture))
    shared = ray.put(exports)
    repairs = {layer: task.remote(shared, layer) for layer in range(architecture.n_layers)}

    repaired: list[CheckpointExport] = []
    for place, export in enumerate(exports):
        repaired.append(
            RepairedExport(export.base, export.plan, corrections=export.corrections, place=place, repairs=repairs)
        )
    return tuple(repaired)


def _repair_layer(exports: Sequence[CheckpointExport], layer: int) -> list[dict[str, dict[str, Tensor]]]:
    """Return what compensation makes of a layer's output modules, by module and kind, for every model."""
    by_model: list[dict[str, dict[str, Tensor]]] = []
    # Allocations that are judged side by side keep the same of many a layer.
    repaired: dict[tuple[object, ...], dict[str, dict[str, Tensor]]] = {}
    for export in exports:
        plan = export.plan
        # A layer that goes as a whole, or stays as it is, needs no repair.
        if layer not in plan.layers or not export.compensates(plan.layers.index(layer)):
            by_model.append({})
            continue

        new_layer = plan.layers.index(layer)
        # Statistics are large: two are the same where they are one object.
        way = (plan.compensation.name, plan.kept[new_layer], id(export.statistics))
        if way not in repaired:
            modules = export.base.architecture.modules(layer).values()
            repaired[way] = {module: export.repaired(new_layer, module) for module in modules}
        by_model.append(repaired[way])
    return by_model
