"""Checkpoints: oracles that a compacted checkpoint is compared with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import seap_ray.models.hf  # noqa: F401  (registers the classes that load a compacted checkpoint)
from seap_ray.core.plan import Plan
from seap_ray.models.export import CheckpointExport
from tests.support.builders import (
    output_modules,
)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def columns(units: tuple[int, ...], width: int = 1) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


def sites(model: Any, plan: Plan, head_dim: int) -> Iterator[tuple[int, str, nn.Linear, list[int], list[int]]]:
    """Layer, site, module, kept columns and cut columns of its input."""
    modules = output_modules(model)
    for layer, (block, kept) in enumerate(zip(model.get_decoder().layers, plan.kept, strict=True)):
        of_site = {"attn": columns(kept.heads, head_dim), "mlp": list(kept.channels[0])}
        for site, module in modules.items():
            linear, of = block.get_submodule(module), of_site[site]
            yield layer, site, linear, of, sorted(set(range(linear.in_features)) - set(of))


def experts_of(model: Any, plan: Plan) -> Iterator[tuple[Any, list[list[int]]]]:
    """The experts of every layer of a mixture, and the channels that each of them keeps."""
    for block, kept in zip(model.get_decoder().layers, plan.kept, strict=True):
        if len(kept.channels) > 1:
            yield block.mlp.experts, [list(channels) for channels in kept.channels]


@torch.no_grad()
def narrow_experts(model: Any, plan: Plan) -> None:
    """Leave the kept channels of every expert."""
    for experts, kept in experts_of(model, plan):
        gates, ups = experts.gate_up_proj.chunk(2, dim=1)
        of = range(len(kept))
        whole = [torch.cat([gates[e][kept[e]], ups[e][kept[e]]]) for e in of]
        experts.gate_up_proj = nn.Parameter(torch.stack(whole))
        experts.down_proj = nn.Parameter(torch.stack([experts.down_proj[e][:, kept[e]] for e in of]))
        experts.intermediate_dim = len(kept[0])


def replaced_mean(export: CheckpointExport, layer: int, site: str) -> torch.Tensor:
    assert export.statistics is not None
    mean_D = export.statistics[layer, site].mean_D  # type: ignore[index]
    return mean_D if export.plan.compensation.name == "mean" else torch.zeros_like(mean_D)


def with_replaced_activations(model: Any, export: CheckpointExport) -> Any:
    """Every cut activation gives way to its mean, or to zero, right before ``o_proj`` and ``down_proj``."""
    head_dim = export.base.architecture.head_dim
    for layer, site, linear, _, cut in sites(model, export.plan, head_dim):
        mean_D = replaced_mean(export, layer, site)

        def replace(_module: nn.Module, inputs: Any, cut=cut, mean_D=mean_D) -> Any:
            x_BTD = inputs[0].clone()
            x_BTD[..., cut] = mean_D[cut].to(x_BTD.dtype)
            return (x_BTD,)

        linear.register_forward_pre_hook(replace)
    for experts, kept in experts_of(model, export.plan):  # whose cut channels give nothing
        cut = torch.ones_like(experts.down_proj, dtype=torch.bool)
        for e, channels in enumerate(kept):
            cut[e, :, channels] = False
        experts.down_proj.data[cut] = 0
    return model


def with_split_products(model: Any, export: CheckpointExport) -> Any:
    """The same, the product taken apart: kept columns times their activations, plus cut columns times their means."""
    head_dim, given = export.base.architecture.head_dim, export.base.architecture.layers
    for layer, site, linear, kept, cut in sites(model, export.plan, head_dim):
        weight_OD, bias_O = linear.weight, linear.bias
        if export.plan.compensation.name == "mean" and export.plan.kept[layer].shape != given[layer].shape:
            bias_O = weight_OD[:, cut] @ replaced_mean(export, layer, site)[cut]
            bias_O = bias_O if linear.bias is None else bias_O + linear.bias

        def forward(x_BTD: torch.Tensor, kept=kept, weight_OD=weight_OD, bias_O=bias_O) -> torch.Tensor:
            return functional.linear(x_BTD[..., kept], weight_OD[:, kept], bias_O)

        linear.forward = forward  # type: ignore[method-assign]
    narrow_experts(model, export.plan)
    return model
