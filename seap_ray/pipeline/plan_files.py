"""Plan files: a plan as JSON for people and as tensors of kept indices for programs."""

from typing import Any

import torch
from safetensors.torch import save_file

from seap_ray.core.architecture import Architecture
from seap_ray.core.plan import Kept, Plan
from seap_ray.storage.files import atomic_write, write_json
from seap_ray.storage.paths import StoragePath


def save_plan(plan: Plan, architecture: Architecture, path: StoragePath) -> None:
    """Write ``<name>.json`` for people and ``<name>.safetensors`` with the kept indices, int32.

    A channel of an MoE expert has the number that it would have if all MoE experts lay one after another. Where whole
    MoE experts go, those that stay are named, too.
    """
    indices: dict[str, torch.Tensor] = {}
    for layer, kept in _by_layer(plan).items():
        width = architecture.layers[layer].shape.channels
        channels: list[int] = []
        experts = kept.experts or range(len(kept.channels))
        for expert, kept_channels in zip(experts, kept.channels, strict=True):
            channels += [expert * width + channel for channel in kept_channels]

        indices[f"layers.{layer}.groups"] = torch.tensor(kept.groups, dtype=torch.int32)
        indices[f"layers.{layer}.heads"] = torch.tensor(kept.heads, dtype=torch.int32)
        indices[f"layers.{layer}.channels"] = torch.tensor(channels, dtype=torch.int32)
        if kept.experts:
            indices[f"layers.{layer}.experts"] = torch.tensor(kept.experts, dtype=torch.int32)

    # The JSON comes last, when the indices are there.
    with atomic_write(path.with_suffix(".safetensors")) as temporary:
        save_file(indices, temporary)
    write_json(path, describe_plan(plan, architecture))


def _by_layer(plan: Plan) -> dict[int, Kept]:
    """Return what is kept of every layer of the base, in order; of a layer that goes as a whole, nothing."""
    kept = dict(zip(plan.layers, plan.kept, strict=True))
    dropped = dict.fromkeys(plan.dropped, Kept((), (), ()))

    # Dropped layers lie between kept ones.
    return dict(sorted((kept | dropped).items()))


def describe_plan(plan: Plan, architecture: Architecture) -> dict[str, Any]:
    """Return what a plan does, without its indices; ``layers`` has the widths of every layer of the base."""
    widths: list[dict[str, int]] = []
    for kept in _by_layer(plan).values():
        # A layer that keeps all of its MoE experts says nothing of them.
        experts = {"experts": len(kept.experts)} if kept.experts else {}
        widths.append({"heads": len(kept.heads), "kv_heads": len(kept.groups), "channels": kept.n_channels, **experts})

    # Plans that drop no layer say nothing of them.
    kept_layers = {"kept_layers": list(plan.layers)} if plan.dropped else {}

    # Nothing was judged of what the settings left open to nobody.
    judged = {"judged": list(plan.judged)} if plan.judged else {}
    predicted = {"predicted": list(plan.predicted)} if plan.predicted else {}

    target = {"target": plan.target.to_json(plan.target.cost(plan.layers_after(architecture)))} if plan.target else {}

    return {
        "name": plan.name,
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(architecture),
        **target,
        "compensation": plan.compensation.name,
        **plan.provenance,
        **kept_layers,
        **judged,
        **predicted,
        "layers": widths,
    }
