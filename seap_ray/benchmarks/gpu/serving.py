"""Serving: decoding as an engine does it, with joined products and few kernels, dense and compacted.

Letters: B sequences, V tokens of the vocabulary, D columns.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from seap_ray.benchmarks.gpu.decoding import (
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
from seap_ray.benchmarks.gpu.device import DEVICE, HAS_GPU, SIZES, Ceilings, built, emptied, row
from seap_ray.benchmarks.gpu.engine import Engine
from seap_ray.benchmarks.measure import Row


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
