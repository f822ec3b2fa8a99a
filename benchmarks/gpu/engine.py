"""Engine: a decoding step of a Llama, dense or compacted, as an inference engine runs it.

Projections that read the same are one product, what lies between products is one kernel each, and only the new token's
keys and values are written. Those kernels are compiled once for all widths, so layers may differ as they like.

Letters: B sequences, H heads, G key-value heads, T positions, D columns, V tokens of the vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from benchmarks.gpu.decoding import (
    ALLOCATIONS,
    CAUSAL,
    PAST,
    RATIOS,
    SPEEDUPS,
    Context,
    as_graph,
    captured_step,
    cut_config,
    decoding_limit,
    speed_row,
    time_steps,
)
from benchmarks.gpu.device import DEVICE, HAS_GPU, SIZES, Ceilings, build_model, free_memory, gpu_row
from benchmarks.measure import Row

Kernel = Callable[..., Any]
RECOMPILE_LIMIT = 64
"""Versions of a kernel that torch.compile may keep."""

# --- kernels ---------------------------------------------------------------------------------------------------------


def add_and_norm(x_BD: Tensor, residual_BD: Tensor, weight_D: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of what the layers so far add up to, and that sum."""
    sum_BD = residual_BD + x_BD
    wide_BD = sum_BD.float()
    wide_BD = wide_BD * torch.rsqrt(wide_BD.square().mean(-1, keepdim=True) + eps)
    return weight_D * wide_BD.to(x_BD.dtype), sum_BD


def rotate(x_BHD: Tensor, cos_D: Tensor, sin_D: Tensor) -> Tensor:
    """Return heads under a rotary embedding."""
    first, second = x_BHD.chunk(2, dim=-1)
    return x_BHD * cos_D + torch.cat([-second, first], dim=-1) * sin_D


def rotate_and_cache(qkv_BD: Tensor, cos_D: Tensor, sin_D: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor) -> Tensor:
    """Return queries (B, H, 1, D), rotated to the last position; write its keys and values."""
    groups = keys_BGTD.shape[1]
    width = keys_BGTD.shape[3]
    qkv_BHD = qkv_BD.view(len(qkv_BD), -1, width)  # queries, keys, values
    keys_BGTD[:, :, -1] = rotate(qkv_BHD[:, -2 * groups : -groups], cos_D, sin_D)
    values_BGTD[:, :, -1] = qkv_BHD[:, -groups:]
    return rotate(qkv_BHD[:, : -2 * groups], cos_D, sin_D)[:, :, None]


def silu_and_mul(gate_up_BD: Tensor) -> Tensor:
    """Return the gated activations of an MLP."""
    gate_BD, up_BD = gate_up_BD.chunk(2, dim=-1)
    return functional.silu(gate_BD) * up_BD


@cache
def compiled_kernels() -> tuple[Kernel, ...]:
    """Compile the kernels for any width; a batch of one is compiled on its own."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    kernels = (add_and_norm, rotate_and_cache, silu_and_mul)
    return tuple(torch.compile(kernel, dynamic=True, fullgraph=True) for kernel in kernels)


# --- the engine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights and biases of a decoder layer's four products, and the scales of its two norms."""

    norms: tuple[Tensor, Tensor]
    qkv: Tensor
    o: tuple[Tensor, Tensor | None]
    gate_up: Tensor
    down: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, block: Any) -> "Layer":
        """Join the weights of a decoder layer of transformers."""
        attention = block.self_attn
        mlp = block.mlp
        return cls(
            (block.input_layernorm.weight, block.post_attention_layernorm.weight),
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            (attention.o_proj.weight, attention.o_proj.bias),
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            (mlp.down_proj.weight, mlp.down_proj.bias),
        )


class Engine:
    """An engine for a Llama of transformers, with copies of the weights that it joins."""

    def __init__(self, model: Any, *, is_compiled: bool):
        self.decoder = model.get_decoder()
        self.head = model.lm_head.weight
        self.layers = [Layer.of(block) for block in self.decoder.layers]
        self.eps = torch.tensor(model.config.rms_norm_eps, device=self.head.device)
        plain: tuple[Kernel, ...] = (add_and_norm, rotate_and_cache, silu_and_mul)
        self.add_and_norm, self.rotate_and_cache, self.silu_and_mul = compiled_kernels() if is_compiled else plain

    @torch.inference_mode()
    def step(self, ids_B: Tensor, contexts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute a decoding step.

        Args:
            ids_B: Token ids at the last position.
            contexts: Keys and values of each layer, (B, G, T, D) both; those of the last position are written.

        Returns:
            Logits (B, V).
        """
        x_BD = self.decoder.embed_tokens(ids_B)
        # All sequences are at the same position.
        last = torch.full((1, 1), contexts[0][0].shape[2] - 1, device=ids_B.device)
        cos_D, sin_D = (part[0, 0] for part in self.decoder.rotary_emb(x_BD, last))
        # The residual sum is added where the next norm is taken, as engines do.
        residual_BD = torch.zeros_like(x_BD)

        for layer, (keys_BGTD, values_BGTD) in zip(self.layers, contexts, strict=True):
            normed_BD, residual_BD = self.add_and_norm(x_BD, residual_BD, layer.norms[0], self.eps)
            qkv_BD = functional.linear(normed_BD, layer.qkv)
            query_BH1D = self.rotate_and_cache(qkv_BD, cos_D, sin_D, keys_BGTD, values_BGTD)
            is_grouped = query_BH1D.shape[1] != keys_BGTD.shape[1]
            seen_BH1D = functional.scaled_dot_product_attention(
                query_BH1D, keys_BGTD, values_BGTD, enable_gqa=is_grouped
            )
            x_BD = functional.linear(seen_BH1D.flatten(1), *layer.o)

            normed_BD, residual_BD = self.add_and_norm(x_BD, residual_BD, layer.norms[1], self.eps)
            gated_BD = self.silu_and_mul(functional.linear(normed_BD, layer.gate_up))
            x_BD = functional.linear(gated_BD, *layer.down)

        normed_BD, _ = self.add_and_norm(x_BD, residual_BD, self.decoder.norm.weight, self.eps)
        return functional.linear(normed_BD, self.head)


# --- rows ------------------------------------------------------------------------------------------------------------


def engine_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield decoding by an engine's kernels as CUDA graphs: compacted beside dense, and beside transformers' own."""
    for name, config in SIZES.models.items():
        dense = build_model(config, attn_implementation=CAUSAL)
        dense_engine = Engine(dense, is_compiled=HAS_GPU)
        yield _difference_row(f"{name}, engine beside transformers", dense, dense_engine)
        # Our kernels beside transformers', for the dense model.
        for B in SIZES.decoding:
            steps = {"cut": engine_step(dense, dense_engine, B), "dense": captured_step(dense, B, 1, PAST)}
            seconds = time_steps(steps, SIZES.steps)
            case = f"decoding {B} at {SIZES.context}, {name}, engine beside transformers"
            yield speed_row(case, seconds, B, limit=decoding_limit(dense, B, ceilings))

        for ratio, kind in itertools.product(RATIOS, ALLOCATIONS):
            cut = build_model(cut_config(config, ratio, kind), attn_implementation=CAUSAL)
            cut_engine = Engine(cut, is_compiled=HAS_GPU)
            cut_name = f"{name}, {ratio:.0%} {kind}, engine"
            yield _difference_row(f"{cut_name} beside transformers", cut, cut_engine)
            for B in SIZES.decoding:
                steps = {"dense": engine_step(dense, dense_engine, B), "cut": engine_step(cut, cut_engine, B)}
                seconds = time_steps(steps, SIZES.steps)
                target = SPEEDUPS[ratio] if B == 1 else ""
                limit = decoding_limit(cut, B, ceilings)
                case = f"decoding {B} at {SIZES.context}, {cut_name}"
                yield speed_row(case, seconds, B, limit=limit, target=target)
            del cut, cut_engine, steps  # before the next one is made
            free_memory()
        del dense, dense_engine
        free_memory()


def _difference_row(name: str, model: Any, engine: Engine) -> Row:
    return gpu_row(f"logits of {name}, bfloat16", ours=difference(model, engine), unit="relative")


def engine_step(model: Any, engine: Engine, B: int) -> Callable[[], object]:
    """Return a step of the engine with a greedy choice at its end, as ``captured_step`` has it of transformers."""
    ids_B, contexts = _random_context(model, B)
    return as_graph(lambda: engine.step(ids_B, contexts).argmax(-1), ids_B, contexts)


def _random_context(model: Any, B: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return token ids, and keys and values of all layers."""
    contexts: list[tuple[Tensor, Tensor]] = []
    for block in model.get_decoder().layers:
        D = block.self_attn.head_dim
        shape = (B, block.self_attn.k_proj.out_features // D, SIZES.context, D)
        keys_BGTD = torch.randn(shape, device=DEVICE, dtype=model.dtype)
        values_BGTD = torch.randn(shape, device=DEVICE, dtype=model.dtype)
        contexts.append((keys_BGTD, values_BGTD))
    return torch.randint(model.config.vocab_size, (B,), device=DEVICE), contexts


@torch.inference_mode()
def difference(model: Any, engine: Engine) -> float:
    """Return how far the engine's logits are from transformers', over the length of these."""
    ids_B, contexts = _random_context(model, 2)
    # Both see the same past; each writes into its own copy.
    layers: list[Any] = [Context(PAST) for _ in contexts]
    for layer, (keys_BGTD, values_BGTD) in zip(layers, contexts, strict=True):
        layer.keys = keys_BGTD.clone()
        layer.values = values_BGTD.clone()
        layer.is_initialized = True

    past = Cache(layers=layers)
    expected_BV = model(input_ids=ids_B[:, None], past_key_values=past, use_cache=True).logits[:, -1]
    difference_BV = engine.step(ids_B, contexts) - expected_BV
    return float(difference_BV.double().norm() / expected_BV.double().norm())
