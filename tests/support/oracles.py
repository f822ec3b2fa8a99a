"""Oracles: slow and plain computations that results are compared with."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import seap_ray.models.hf  # noqa: F401  (registers the classes that load a cut checkpoint)
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.moments import Moments
from seap_ray.core.plan import Plan
from seap_ray.models.export import CheckpointExport
from seap_ray.models.loading import decoder_of
from tests.support.builders import mixture_in, output_modules

# --- moments ---------------------------------------------------------------------------------------------------------


FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "embedding_norm", "norm_f")
"""Names of the norm behind the last layer."""


class InputsOf(TorchFunctionMode):
    """Keeps what some weights are multiplied with inside, by ``linear`` or by ``@``, by the place of their memory."""

    def __init__(self, weights: Iterable[torch.Tensor]):
        super().__init__()
        self.by_place: dict[int, list[torch.Tensor]] = {weight.data_ptr(): [] for weight in weights}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (functional.linear, torch.Tensor.matmul) and args[1].data_ptr() in self.by_place:
            self.by_place[args[1].data_ptr()].append(args[0].detach())
        # All of a Llama 4's experts at once: they read zeros of the tokens that are not theirs.
        if function is torch.bmm and args[1].data_ptr() in self.by_place:
            for x_ND, weight_DO in zip(args[0].detach(), args[1], strict=True):
                self.by_place[weight_DO.data_ptr()].append(x_ND[x_ND.any(1)])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def two_pass(model: nn.Module, sequences: Sequence[Sequence[int]], skip_first: bool = False) -> dict:
    """Return (count, mean, m2) of all activations by (layer, site), float64, from hooks of our own and batches of one.

    Inputs and outputs of layers are the hidden states that transformers itself returns; the last output is taken before
    the final norm.
    """
    seen: dict = {}
    last: list = []
    handles = [
        block.get_submodule(module).register_forward_hook(
            lambda _module, inputs, _output, key=(layer, site): seen.setdefault(key, []).append(
                inputs[0].flatten(0, -2).double()
            )
        )
        for layer, block in enumerate(decoder_of(model).layers)
        for site, module in output_modules(model, layer).items()
    ]
    decoder = decoder_of(model)
    norm = next(getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name))
    mixtures = {layer: mixture.experts for layer, block in enumerate(decoder.layers) if (mixture := mixture_in(block))}
    experts = [(layer, e, weight) for layer, module in mixtures.items() for e, weight in enumerate(by_columns(module))]
    spy = InputsOf(weight for _, _, weight in experts)
    routed: dict[int, Any] = {}
    for layer, module in mixtures.items():
        handles.append(
            module.register_forward_pre_hook(lambda _module, inputs, layer=layer: routed.update({layer: inputs}))
        )
    handles.append(norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0])))
    for sequence in sequences:
        with spy:
            ids_BT = torch.tensor([sequence], device=model.device)
            shown = model(ids_BT, output_hidden_states=True).hidden_states
        for layer, inputs in {**routed}.items():
            seen.setdefault((layer, "experts"), []).append(contributions(mixtures[layer], *inputs))
        states = [state[0].double() for state in (*shown[:-1], last.pop())]
        assert len(states) == len(decoder.layers) + 1
        for layer, (x_TD, y_TD) in enumerate(pairwise(states)):
            cosine_T = (x_TD * y_TD).sum(1) / (x_TD.square().sum(1) * y_TD.square().sum(1)).sqrt()
            seen.setdefault((layer, "block"), []).append(cosine_T[:, None])
    for handle in handles:
        handle.remove()
    for layer, e, weight in experts:
        none = torch.empty(0, weight.shape[1], dtype=torch.float64)
        seen[layer, f"mlp.{e}"] = [none, *(x_ND.double() for x_ND in spy.by_place[weight.data_ptr()])]
    reference = {}
    for key, parts in seen.items():
        x_ND = torch.cat([part.cpu()[int(skip_first) :] for part in parts])
        mean_D = x_ND.mean(0) if len(x_ND) else torch.zeros(x_ND.shape[1], dtype=torch.float64)
        reference[key] = (x_ND.shape[0], mean_D, (x_ND - mean_D).square().sum(0))
    return reference


def by_columns(experts: Any) -> torch.Tensor:
    """Return the down projections of all MoE experts, (E, O, D), whichever way round the family has them; a view."""
    is_transposed = type(experts).__name__ in ("GptOssExperts", "Llama4TextExperts")
    return experts.down_proj.mT if is_transposed else experts.down_proj


def contributions(experts: Any, x_TD: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
    """Return the norm of what each expert adds for each token, by the experts' own module with that expert alone.

    Behind these columns are those that say which tokens are routed to it, (T, 2 E).
    """
    n_experts = len(experts.down_proj)
    if not routed:  # a Llama 4's experts get all tokens once for each of them, weighed already
        norms_TE = experts(x_TD).double().norm(dim=1).unflatten(0, (n_experts, -1)).T
        return torch.cat([norms_TE, (norms_TE > 0).double()], dim=1)

    chosen_TK, gates_TK = routed
    norms_TE = torch.zeros(len(x_TD), n_experts, dtype=torch.float64)
    for expert in range(n_experts):
        for chosen_T, gates_T in zip(chosen_TK.T, gates_TK.T, strict=True):
            tokens = (chosen_T == expert).nonzero().flatten()
            alone = experts(x_TD[tokens], torch.full((len(tokens), 1), expert), gates_T[tokens, None])
            norms_TE[tokens, expert] = alone.double().norm(dim=1)
    return torch.cat([norms_TE, (norms_TE > 0).double()], dim=1)


def assert_close(moments: dict, reference: dict, tolerance: float = 1e-9) -> None:
    """Compare moments with (count, mean, m2) of the same sites."""
    assert moments.keys() == reference.keys()
    for key, (count, mean_D, m2_D) in reference.items():
        assert moments[key].count == count
        # A mean may be near zero, so its error is relative to the column's root mean square.
        scale_D = (m2_D / max(count, 1) + mean_D.square()).sqrt()
        assert ((moments[key].mean_D - mean_D).abs() <= tolerance * scale_D).all()
        if count > 1:  # a column may be all zeros behind a ReLU
            assert ((moments[key].m2_D - m2_D).abs() <= tolerance * m2_D).all()


def as_tuples(moments: dict[tuple, Moments]) -> dict:
    """Return moments as (count, mean, m2)."""
    return {key: (part.count, part.mean_D, part.m2_D) for key, part in moments.items()}


def assert_equal(one: dict, other: dict) -> None:
    """Compare moments, and covariances where they are such, bit by bit."""
    assert one.keys() == other.keys()
    for key, moments in other.items():
        assert type(one[key]) is type(moments) and one[key].count == moments.count
        for part in ("mean_D", "m2_D", *(["comoment_DD"] if hasattr(moments, "comoment_DD") else [])):
            assert torch.equal(getattr(one[key], part), getattr(moments, part)), (key, part)


# --- cut models ------------------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def columns(units: tuple[int, ...], width: int = 1) -> list[int]:
    """Return the columns of units that are ``width`` columns each."""
    return [unit * width + i for unit in units for i in range(width)]


def sites(model: Any, plan: Plan, head_dim: int) -> Iterator[tuple[int, str, nn.Linear, list[int], list[int]]]:
    """Yield layer, site, module, and the kept and the cut columns of the module's input."""
    for layer, (block, kept) in enumerate(zip(decoder_of(model).layers, plan.kept, strict=True)):
        modules = output_modules(model, layer)
        kept_columns = {"attn": columns(kept.heads, head_dim), "mlp": list(kept.channels[0])}
        for site, module in modules.items():
            linear = block.get_submodule(module)
            cut = set(range(linear.in_features)) - set(kept_columns[site])
            yield layer, site, linear, kept_columns[site], sorted(cut)


def experts_of(model: Any, plan: Plan) -> Iterator[tuple[Any, list[list[int]]]]:
    """Yield the experts of every MoE layer, and the channels that each of them keeps."""
    for block, kept in zip(decoder_of(model).layers, plan.kept, strict=True):
        if len(kept.channels) > 1:
            yield mixture_in(block).experts, [list(channels) for channels in kept.channels]


@torch.no_grad()
def narrow_experts(model: Any, plan: Plan) -> None:
    """Leave the kept channels of every expert."""
    for experts, kept in experts_of(model, plan):
        numbers = range(len(kept))
        if type(experts).__name__ == "GptOssExperts":
            pairs = [[2 * channel + i for channel in channels for i in (0, 1)] for channels in kept]
            for name in ("gate_up_proj", "gate_up_proj_bias"):
                narrowed = [getattr(experts, name)[e][..., pairs[e]] for e in numbers]
                setattr(experts, name, nn.Parameter(torch.stack(narrowed)))
            experts.down_proj = nn.Parameter(torch.stack([experts.down_proj[e][kept[e]] for e in numbers]))
            continue
        if type(experts).__name__ == "Llama4TextExperts":
            gates, ups = experts.gate_up_proj.chunk(2, dim=2)
            gate_ups = [torch.cat([gates[e][:, kept[e]], ups[e][:, kept[e]]], dim=1) for e in numbers]
            experts.gate_up_proj = nn.Parameter(torch.stack(gate_ups))
            experts.down_proj = nn.Parameter(torch.stack([experts.down_proj[e][kept[e]] for e in numbers]))
            continue
        gates, ups = experts.gate_up_proj.chunk(2, dim=1)
        gate_ups = [torch.cat([gates[e][kept[e]], ups[e][kept[e]]]) for e in numbers]
        experts.gate_up_proj = nn.Parameter(torch.stack(gate_ups))
        experts.down_proj = nn.Parameter(torch.stack([experts.down_proj[e][:, kept[e]] for e in numbers]))
        experts.intermediate_dim = len(kept[0])


def replaced_mean(export: CheckpointExport, layer: int, site: str) -> torch.Tensor:
    """Return what cut activations are replaced by: their mean, or zero."""
    assert export.statistics is not None
    mean_D = export.statistics[layer, site].mean_D  # type: ignore[index]
    is_compensated = site == "attn" or not export.base.architecture.n_experts
    return mean_D if export.plan.compensation.name == "mean" and is_compensated else torch.zeros_like(mean_D)


def with_replaced_activations(model: Any, export: CheckpointExport) -> Any:
    """Replace every cut activation by its mean, or by zero, right before ``o_proj`` and ``down_proj``."""
    head_dim = export.base.architecture.head_dim
    for layer, site, linear, _, cut in sites(model, export.plan, head_dim):
        mean_D = replaced_mean(export, layer, site)

        def replace(_module: nn.Module, inputs: Any, cut=cut, mean_D=mean_D) -> Any:
            """Put the mean in the place of the cut columns of an input."""
            x_BTD = inputs[0].clone()
            x_BTD[..., cut] = mean_D[cut].to(x_BTD.dtype)
            return (x_BTD,)

        linear.register_forward_pre_hook(replace)
    for experts, kept in experts_of(model, export.plan):  # whose cut channels give nothing
        weight_EOD = by_columns(experts).detach()
        cut = torch.ones_like(weight_EOD, dtype=torch.bool)
        for e, channels in enumerate(kept):
            cut[e, :, channels] = False
        weight_EOD[cut] = 0
    return model


def with_split_products(model: Any, export: CheckpointExport) -> Any:
    """Replace as ``with_replaced_activations`` does, the product taken apart.

    It is kept columns times their activations, plus cut columns times their means.
    """
    head_dim, given = export.base.architecture.head_dim, export.base.architecture.layers
    for layer, site, linear, kept, cut in sites(model, export.plan, head_dim):
        weight_OD, bias_O = linear.weight, linear.bias
        # In a mixture attention alone gets a bias.
        has_bias = site == "attn" or not export.base.architecture.n_experts
        if export.plan.compensation.name == "mean" and has_bias and export.plan.kept[layer].shape != given[layer].shape:
            bias_O = weight_OD[:, cut] @ replaced_mean(export, layer, site)[cut]
            bias_O = bias_O if linear.bias is None else bias_O + linear.bias

        def forward(x_BTD: torch.Tensor, kept=kept, weight_OD=weight_OD, bias_O=bias_O) -> torch.Tensor:
            """Multiply the kept columns alone."""
            return functional.linear(x_BTD[..., kept], weight_OD[:, kept], bias_O)

        linear.forward = forward  # type: ignore[method-assign]
    narrow_experts(model, export.plan)
    return model


# --- colours ---------------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, ``#rgb`` or ``#rrggbb``, as WCAG 2 defines it."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def ratio_of(shapes: Sequence[Shape], architecture: Architecture, *, adds_biases: bool) -> float:
    """Return the share of the decoder layers' weights that these widths save.

    Args:
        shapes: Widths of every layer.
        architecture: The model before the cut.
        adds_biases: Whether cut layers get output biases, which count against the share.

    Returns:
        A share from 0 to 1.
    """
    layers = (architecture.resized(layer, shape, adds_biases=adds_biases) for layer, shape in enumerate(shapes))
    return 1 - sum(map(architecture.layer_parameters, layers)) / architecture.decoder_parameters
