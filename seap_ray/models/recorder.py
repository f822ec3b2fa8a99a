"""Recorder: hooks on decoder layers and their ``o_proj`` and ``down_proj`` that turn activations into moments.

Letters in names of tensors: B sequences, T positions, N real tokens, D columns of a site.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional

from seap_ray.core.families import Family, family_of
from seap_ray.core.inputs import input_modules
from seap_ray.core.moments import Covariance, Moments, Site, blocks
from seap_ray.errors import DataError

SiteMoments = dict[tuple[int, Site], Moments]
"""Moments by layer and site; some may be a ``Covariance``."""
MIN_NORM_PRODUCT = 1e-16
"""The cosine of a vector of zeros is zero, not NaN."""


@contextmanager
def recording(
    decoder: Any, rows_N: Tensor | None, *, covariances: Container[int] = (), inputs: bool = False
) -> Iterator[SiteMoments]:
    """Add every forward pass of ``decoder`` that happens inside to the yielded moments.

    The hooks are gone afterwards, also after an error.

    Args:
        decoder: The model without its head.
        rows_N: The tokens that count, as ``batching.counted_rows`` returns them. No other is read at all, so whatever
            stands at padding, NaN included, is left out.
        covariances: Layers that have a ``Covariance`` of each of their sites.
        inputs: Whether these layers have one of each of their other inputs (``INPUTS``), too.
    """
    recorded: SiteMoments = {}
    family = family_of(decoder.config.model_type)
    with ExitStack() as hooks:
        for layer, block in enumerate(decoder.layers):
            is_covariance = layer in covariances
            settings = {"covariance": is_covariance, "inputs": inputs and is_covariance}
            hooks.enter_context(recording_layer(block, family, layer, rows_N, recorded, **settings))
        yield recorded


@contextmanager
def recording_layer(
    block: Any,
    family: Family,
    layer: int,
    rows_N: Tensor | None,
    recorded: SiteMoments,
    *,
    covariance: bool,
    inputs: bool = False,
) -> Iterator[None]:
    """Add every forward pass of one decoder layer that happens inside to ``recorded``, as ``recording`` does."""
    statistic = Covariance if covariance else Moments
    with ExitStack() as hooks:
        # Of a mixture's layers without experts the last one is theirs.
        modules: dict[Site, str] = {
            "attn" if unit == "heads" else "mlp": module for module, unit in family.columns.items()
        }
        # Layers of hybrids have some of these modules, and others others.
        present = dict(block.named_modules())
        modules = {site: module for site, module in modules.items() if module in present}
        if family.is_moe and family.experts in present:
            modules.pop("mlp", None)  # each expert is a site of its own
            experts_hook = _experts_hook(recorded, family, layer, rows_N, statistic)
            hooks.callback(present[family.experts].register_forward_pre_hook(experts_hook).remove)

        for site, module in modules.items():
            input_hook = _input_hook(recorded, (layer, site), rows_N, statistic)
            hooks.callback(block.get_submodule(module).register_forward_pre_hook(input_hook).remove)

        # All modules of an input get the same tensor, so the first of them stands for all.
        for site, (module, *_) in input_modules(family).items() if inputs else ():
            input_hook = _input_hook(recorded, (layer, site), rows_N, Covariance)
            hooks.callback(block.get_submodule(module).register_forward_pre_hook(input_hook).remove)

        block_hook = _block_hook(recorded, (layer, "block"), rows_N)
        hooks.callback(block.register_forward_hook(block_hook, with_kwargs=True).remove)
        yield


def _input_hook(
    recorded: SiteMoments, key: tuple[int, Site], rows_N: Tensor | None, statistic: type[Moments]
) -> Callable[..., None]:
    """Make a hook that records the input of a linear layer."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the moments of the module's input."""
        _add(recorded, key, statistic.of(*_by_token(inputs[0], rows_N)))

    return hook


def _experts_hook(
    recorded: SiteMoments, family: Family, layer: int, rows_N: Tensor | None, statistic: type[Moments]
) -> Callable[..., None]:
    """Make a hook for the experts of an MoE layer, which are one module in transformers.

    It computes what each expert's ``down_proj`` sees of the tokens that are routed to it, and how much each adds to
    what the layer gives.
    """

    def hook(experts: Any, inputs: tuple[Tensor, ...]) -> None:
        """Add the moments of every expert's hidden activations."""
        n_experts = len(experts.gate_up_proj)
        routed_E = (_weighed_inputs if family.weighs_inputs else _chosen_inputs)(inputs, n_experts, rows_N)
        gated_EN: list[Tensor] = []
        is_chosen_EN: list[Tensor] = []
        for expert, routed in enumerate(routed_E):
            # An expert's gate and up projections are one matrix of J = 2 C rows.
            gate_up_RJ = _product(experts, family, "gate_up_proj", expert, routed.x_RD)
            hidden_RC = _gated(experts, gate_up_RJ)
            _add(recorded, (layer, f"mlp.{expert}"), statistic.of(hidden_RC))

            output_RD = _product(experts, family, "down_proj", expert, hidden_RC)
            dtype = torch.promote_types(output_RD.dtype, torch.float32)
            norms_R = vector_norm(output_RD, dim=1, dtype=dtype)
            gated_N = norms_R.new_zeros(len(routed.is_chosen_N))
            gated_N[routed.is_chosen_N] = norms_R if routed.gates_R is None else routed.gates_R.to(dtype) * norms_R
            gated_EN.append(gated_N)
            is_chosen_EN.append(routed.is_chosen_N.to(dtype))

        _add(recorded, (layer, "experts"), Moments.of(torch.stack([*gated_EN, *is_chosen_EN], dim=1)))

    return hook


@dataclass(frozen=True, slots=True)
class _Routed:
    """The tokens that an MoE expert is given."""

    x_RD: Tensor
    """What it reads of them."""
    is_chosen_N: Tensor
    """Which of the tokens that count they are, (N,), bool."""
    gates_R: Tensor | None = None
    """What the router weighs its outputs with; None where it has weighed the inputs."""


def _chosen_inputs(inputs: tuple[Tensor, ...], n_experts: int, rows_N: Tensor | None) -> Iterator[_Routed]:
    """Yield each MoE expert's tokens where the module gets the tokens, and the K experts and gates of each."""
    x_ND, chosen_NK, gates_NK = (_counted_tokens(x, rows_N) for x in inputs)
    for expert in range(n_experts):
        is_chosen_NK = chosen_NK == expert
        is_chosen_N = is_chosen_NK.any(1)
        yield _Routed(x_ND[is_chosen_N], is_chosen_N, gates_NK[is_chosen_NK])


def _weighed_inputs(inputs: tuple[Tensor, ...], n_experts: int, rows_N: Tensor | None) -> Iterator[_Routed]:
    """Yield each MoE expert's tokens where the module gets all tokens for every expert, those not chosen as zeros."""
    for copy in inputs[0].chunk(n_experts):
        x_ND = _counted_tokens(copy, rows_N)
        is_chosen_N = x_ND.any(1)
        yield _Routed(x_ND[is_chosen_N], is_chosen_N)


def _gated(experts: Any, gate_up_RJ: Tensor) -> Tensor:
    """Return what MoE experts make of their gate and way up, as transformers computes it."""
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(gate_up_RJ)
    # Llama 4's have no such method.
    gate_RC, up_RC = gate_up_RJ.chunk(2, dim=-1)
    return up_RC * experts.act_fn(gate_RC)


def _product(experts: Any, family: Family, name: str, expert: int, x_RD: Tensor) -> Tensor:
    """Return what a projection of one MoE expert gives, as transformers computes it."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if family.mlp_bias else None
    return functional.linear(x_RD, weight.mT if family.has_transposed_experts else weight, bias)


def _block_hook(recorded: SiteMoments, key: tuple[int, Site], rows_N: Tensor | None) -> Callable[..., None]:
    """Make a hook that records the cosine of a layer's input and output, token by token.

    1 less its mean is the Block Influence of ShortGPT (arXiv:2403.03853).
    """

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
        """Add the moments of the cosines, which are one column."""
        # Families differ in how a layer is called and in what it returns.
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        # Under device_map, accelerate moves inputs after the hooks have seen them.
        x_ND, counted_N = _by_token(before.to(after.device), rows_N)
        cosine_N = token_cosines(x_ND, after.detach().flatten(0, -2), counted_N)
        _add(recorded, key, Moments.of(cosine_N[:, None]))

    return hook


def token_cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """Return the cosine of x and y at each token that counts, float64."""
    if x_ND.is_cuda:
        from seap_ray.core import kernels  # Triton is there with a GPU alone

        return kernels.cosines(x_ND, y_ND, rows_N)
    # Block by block, so that the float64 copies stay in a core's cache.
    pairs = zip(blocks(x_ND, rows_N), blocks(y_ND, rows_N), strict=True)
    return torch.cat([x_ND.new_empty(0, dtype=torch.float64), *(_cosine(x, y) for x, y in pairs)])


def _cosine(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    # The product is written over x, which is a copy.
    norms_N = vector_norm(x_ND, dim=1) * vector_norm(y_ND, dim=1)
    return x_ND.mul_(y_ND).sum(1) / norms_N.clamp_(min=MIN_NORM_PRODUCT)


def _by_token(x: Tensor, rows_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a site's input token by token, and which tokens count: None for all."""
    x_ND = x.detach().flatten(0, -2)
    return x_ND, None if rows_N is None else rows_N.to(x_ND.device, non_blocking=True)


def _counted_tokens(x: Tensor, rows_N: Tensor | None) -> Tensor:
    """Return the tokens that count of a site's input."""
    x_ND, counted_N = _by_token(x, rows_N)
    return x_ND if counted_N is None else x_ND[counted_N]


def _add(recorded: SiteMoments, key: tuple[int, Site], moments: Moments) -> None:
    # What came first stands first: the order of a sum decides its last digits.
    # In the memory of its matrix, if it has one: nothing else uses it yet.
    if key in recorded:
        recorded[key] += moments
    else:
        recorded[key] = moments


def added(total: SiteMoments, part: SiteMoments) -> SiteMoments:
    """Return the moments of two disjoint sets of tokens together; ``total`` may be empty."""
    return {key: total[key] + part[key] for key in part} if total else part


def on_cpu(recorded: SiteMoments) -> SiteMoments:
    """Copy moments to the CPU and check them there: what is not finite stays so in a sum.

    Raises:
        DataError: Activations are not finite; it names the first layer and site.
    """
    copies = {key: moments.to_cpu_async() for key, moments in recorded.items()}
    # The copies are asynchronous: one wait a device, not one a tensor.
    for device in {moments.mean_D.device for moments in recorded.values() if moments.mean_D.is_cuda}:
        torch.cuda.current_stream(device).synchronize()

    for (layer, site), moments in copies.items():
        if not torch.isfinite(moments.m2_D).all():
            raise DataError(f"activations of layer {layer}, site {site}, are not finite")
    return copies


@contextmanager
def error_context(prefix: str) -> Iterator[None]:
    """Put ``prefix`` before the message of a DataError that is raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{prefix}: {error}") from None
