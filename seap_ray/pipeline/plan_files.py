"""Plan files: a plan as JSON for people and as tensors of kept indices for programs."""

from typing import Any

import torch
from safetensors.torch import save_file

from seap_ray.core.architecture import Architecture
from seap_ray.core.plan import Kept, Plan
from seap_ray.storage.files import atomic_write, write_json
from seap_ray.storage.paths import StoragePath


def save_plan(plan: Plan, architecture: Architecture, path: StoragePath) -> None:
    """``<name>.json`` for people, ``<name>.safetensors`` with the kept indices, int32.

    A channel of a mixture's expert has the number that it would have if all experts lay one after another.
    """
    indices = {}
    for layer, kept in _by_layer(plan).items():
        width, given = len(kept.channels) // kept.experts, architecture.layers[layer].shape
        channels = [c + i // max(width, 1) * given.channels for i, c in enumerate(kept.channels)]
        for unit, of in (("groups", kept.groups), ("heads", kept.heads), ("channels", channels)):
            indices[f"layers.{layer}.{unit}"] = torch.tensor(of, dtype=torch.int32)
    with atomic_write(path.with_suffix(".safetensors")) as temporary:
        save_file(indices, temporary)
    write_json(path, describe_plan(plan, architecture))


def _by_layer(plan: Plan) -> dict[int, Kept]:
    """What is kept of every layer of the base: of one that goes as a whole, nothing."""
    of = dict(zip(plan.layers, plan.kept, strict=True)) | dict.fromkeys(plan.dropped, Kept((), (), ()))
    return dict(sorted(of.items()))


def describe_plan(plan: Plan, architecture: Architecture) -> dict[str, Any]:
    """What a plan does, without its indices; widths are those of every layer of the base."""
    of = _by_layer(plan).values()
    widths = [{"heads": len(k.heads), "kv_heads": len(k.groups), "channels": len(k.channels) // k.experts} for k in of]
    kept_layers = {"kept_layers": list(plan.layers)} if plan.dropped else {}
    return {
        "name": plan.name,
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(architecture),
        "compensation": plan.compensation,
        **plan.provenance,
        **kept_layers,
        "layers": widths,
    }
