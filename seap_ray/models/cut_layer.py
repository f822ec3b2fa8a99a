"""Cut layer: a dense model's decoder layer that computes what the cut layer will, before that is written.

A cut layer computes what the dense one does with zeros in the columns that go.

Letters: O output features, D input columns, S kept columns, E MoE experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seap_ray.core.architecture import split_moe_expert
from seap_ray.core.slicing import kept_indices
from seap_ray.models.export import CheckpointExport


def cut_parameters(block: Any, export: CheckpointExport, layer: int) -> dict[str, Tensor]:
    """Return parameters with which a layer of the base computes what the cut layer will.

    Args:
        block: The base's layer.
        export: The cut model, which has this layer.
        layer: Number of the layer in the base.

    Returns:
        Parameters by their name in the layer: weights of output modules, of their own shapes, with zeros in the columns
        that go, and biases, which the layer may not have.
    """
    architecture = export.base.architecture
    new_layer = export.plan.layers.index(layer)
    kept = export.plan.kept[new_layer]
    parameters: dict[str, Tensor] = {}

    # MoE experts are one module in transformers, and come after the others.
    for module in architecture.modules(layer).values():
        if split_moe_expert(module)[1] is not None:
            continue
        own_OD = block.get_submodule(module).weight
        kept_S = kept_indices(kept, architecture.family.columns[module], architecture.head_dim).to(own_OD.device)
        compensated = export.compensated(new_layer, module)
        weight_OS = compensated.get("weight", own_OD[:, kept_S])
        weight_OD = torch.zeros_like(own_OD)
        weight_OD[:, kept_S] = weight_OS.to(own_OD)
        parameters[f"{module}.weight"] = weight_OD
        if "bias" in compensated:
            parameters[f"{module}.bias"] = compensated["bias"].to(own_OD)

    if architecture.layers[layer].n_experts:
        parameters[f"{architecture.family.experts}.down_proj"] = _cut_experts(block, export, new_layer)
    return parameters


def _cut_experts(block: Any, export: CheckpointExport, new_layer: int) -> Tensor:
    """Return the output weights of all MoE experts, as their module has them, with zeros in the columns that go."""
    family = export.base.architecture.family
    experts = block.get_submodule(family.experts)
    own_EOD = experts.down_proj.mT if family.has_transposed_experts else experts.down_proj
    weight_EOD = torch.zeros_like(own_EOD)
    for expert, channels in enumerate(export.plan.kept[new_layer].channels):
        kept_S = torch.tensor(channels, device=own_EOD.device)
        compensated = export.compensated(new_layer, family.down_proj.format(e=expert))
        weight_OS = compensated.get("weight", own_EOD[expert][:, kept_S])
        weight_EOD[expert][:, kept_S] = weight_OS.to(own_EOD)
    return weight_EOD.mT if family.has_transposed_experts else weight_EOD


@contextmanager
def replaced_parameters(block: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a layer other parameters inside the block."""
    with ExitStack() as restored:
        for path, tensor in parameters.items():
            name, _, kind = path.rpartition(".")
            module = block.get_submodule(name)
            restored.callback(setattr, module, kind, getattr(module, kind))
            setattr(module, kind, nn.Parameter(tensor, requires_grad=False))
        yield
