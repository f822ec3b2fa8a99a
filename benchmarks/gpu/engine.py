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
    captured,
    compacted,
    decoding_limit,
    graphed,
    speed_row,
    timed,
)
from benchmarks.gpu.device import DEVICE, HAS_GPU, SIZES, Ceilings, built, emptied, row
from benchmarks.measure import Row

Kernel = Callable[..., Any]


def normed(x_BD: Tensor, residual_BD: Tensor, weight_D: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of what a layer so far adds up to, and the sum."""
    sum_BD = residual_BD + x_BD
    wide_BD = sum_BD.float()
    wide_BD = wide_BD * torch.rsqrt(wide_BD.square().mean(-1, keepdim=True) + eps)
    return weight_D * wide_BD.to(x_BD.dtype), sum_BD


def turned(x_BHD: Tensor, cos_D: Tensor, sin_D: Tensor) -> Tensor:
    first, second = x_BHD.chunk(2, dim=-1)
    return x_BHD * cos_D + torch.cat([-second, first], dim=-1) * sin_D


def entered(qkv_BD: Tensor, cos_D: Tensor, sin_D: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor) -> Tensor:
    """Queries (B, H, 1, D), turned to the last position; its keys and values are written."""
    groups, width = keys_BGTD.shape[1], keys_BGTD.shape[3]
    qkv_BHD = qkv_BD.view(len(qkv_BD), -1, width)
    keys_BGTD[:, :, -1] = turned(qkv_BHD[:, -2 * groups : -groups], cos_D, sin_D)
    values_BGTD[:, :, -1] = qkv_BHD[:, -groups:]
    return turned(qkv_BHD[:, : -2 * groups], cos_D, sin_D)[:, :, None]


def gated(gate_up_BD: Tensor) -> Tensor:
    gate_BD, up_BD = gate_up_BD.chunk(2, dim=-1)
    return functional.silu(gate_BD) * up_BD


@cache
def compiled() -> tuple[Kernel, ...]:
    """The kernels, for any width; a batch of one is compiled on its own."""
    torch._dynamo.config.recompile_limit = 64
    return tuple(torch.compile(kernel, dynamic=True, fullgraph=True) for kernel in (normed, entered, gated))


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
        attention, mlp = block.self_attn, block.mlp
        return cls(
            (block.input_layernorm.weight, block.post_attention_layernorm.weight),
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            (attention.o_proj.weight, attention.o_proj.bias),
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            (mlp.down_proj.weight, mlp.down_proj.bias),
        )


class Engine:
    """Of a model in transformers, with copies of the weights that it joins."""

    def __init__(self, model: Any, *, is_compiled: bool):
        self.decoder, self.head = model.get_decoder(), model.lm_head.weight
        self.layers = [Layer.of(block) for block in self.decoder.layers]
        self.eps = torch.tensor(model.config.rms_norm_eps, device=self.head.device)
        kernels: tuple[Kernel, ...] = compiled() if is_compiled else (normed, entered, gated)
        self.normed, self.entered, self.gated = kernels

    @torch.inference_mode()
    def step(self, ids_B: Tensor, contexts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits (B, V) of tokens at the last position of each layer's keys and values."""
        x_BD = self.decoder.embed_tokens(ids_B)
        last = torch.full((1, 1), contexts[0][0].shape[2] - 1, device=ids_B.device)
        cos_D, sin_D = (part[0, 0] for part in self.decoder.rotary_emb(x_BD, last))
        residual_BD = torch.zeros_like(x_BD)
        for layer, (keys_BGTD, values_BGTD) in zip(self.layers, contexts, strict=True):
            normed_BD, residual_BD = self.normed(x_BD, residual_BD, layer.norms[0], self.eps)
            query_BH1D = self.entered(functional.linear(normed_BD, layer.qkv), cos_D, sin_D, keys_BGTD, values_BGTD)
            is_grouped = query_BH1D.shape[1] != keys_BGTD.shape[1]
            seen_BH1D = functional.scaled_dot_product_attention(
                query_BH1D, keys_BGTD, values_BGTD, enable_gqa=is_grouped
            )
            x_BD = functional.linear(seen_BH1D.flatten(1), *layer.o)
            normed_BD, residual_BD = self.normed(x_BD, residual_BD, layer.norms[1], self.eps)
            x_BD = functional.linear(self.gated(functional.linear(normed_BD, layer.gate_up)), *layer.down)
        normed_BD, _ = self.normed(x_BD, residual_BD, self.decoder.norm.weight, self.eps)
        return functional.linear(normed_BD, self.head)


# --- rows ------------------------------------------------------------------------------------------------------------


def engine_rows(of: Ceilings) -> Iterator[Row]:
    """Decoding by an engine's kernels as CUDA graphs: dense beside compacted, and beside transformers' own kernels."""
    for name, config in SIZES.models.items():
        dense = built(config, attn_implementation=CAUSAL)
        served = Engine(dense, is_compiled=HAS_GPU)
        yield row(
            f"logits of {name}, engine beside transformers, bfloat16", ours=difference(dense, served), unit="relative"
        )
        for B in SIZES.decoding:
            found = timed({"cut": engine_step(dense, served, B), "dense": captured(dense, B, 1, PAST)}, SIZES.steps)
            named = f"decoding {B} at {SIZES.context}, {name}, engine beside transformers"
            yield speed_row(named, found, B, limit=decoding_limit(dense, B, of))
        for ratio, kind in itertools.product(RATIOS, ALLOCATIONS):
            cut = built(compacted(config, ratio, kind), attn_implementation=CAUSAL)
            ours, named = Engine(cut, is_compiled=HAS_GPU), f"{name}, {ratio:.0%} {kind}, engine"
            yield row(f"logits of {named} beside transformers, bfloat16", ours=difference(cut, ours), unit="relative")
            for B in SIZES.decoding:
                steps = {"dense": engine_step(dense, served, B), "cut": engine_step(cut, ours, B)}
                found, target = timed(steps, SIZES.steps), SPEEDUPS[ratio] if B == 1 else ""
                limit = decoding_limit(cut, B, of)
                yield speed_row(f"decoding {B} at {SIZES.context}, {named}", found, B, limit=limit, target=target)
            del cut, ours, steps
            emptied()
        del dense, served
        emptied()


def engine_step(model: Any, engine: Engine, B: int) -> Callable[[], object]:
    """A step of the engine with a greedy choice at its end, as ``captured`` has it of transformers."""
    ids_B, contexts = _random_context(model, B)
    return graphed(lambda: engine.step(ids_B, contexts).argmax(-1), ids_B, contexts)


def _random_context(model: Any, B: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Token ids, and keys and values of all layers."""
    contexts = []
    for block in model.get_decoder().layers:
        D = block.self_attn.head_dim
        shape = B, block.self_attn.k_proj.out_features // D, SIZES.context, D
        contexts.append(
            (torch.randn(shape, device=DEVICE, dtype=model.dtype), torch.randn(shape, device=DEVICE, dtype=model.dtype))
        )
    return torch.randint(model.config.vocab_size, (B,), device=DEVICE), contexts


@torch.inference_mode()
def difference(model: Any, engine: Engine) -> float:
    """Of the engine's logits from transformers', over these."""
    ids_B, contexts = _random_context(model, 2)
    layers: list[Any] = [Context(PAST) for _ in contexts]
    for layer, (keys, values) in zip(layers, contexts, strict=True):
        layer.keys, layer.values, layer.is_initialized = keys.clone(), values.clone(), True
    cache = Cache(layers=layers)
    expected_BV = model(input_ids=ids_B[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    difference_BV = engine.step(ids_B, contexts) - expected_BV
    return float(difference_BV.double().norm() / expected_BV.double().norm())
