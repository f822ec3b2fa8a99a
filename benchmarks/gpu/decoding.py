"""Decoding: what transformers computes of a prompt, and of the next tokens, as CUDA graphs.

Letters: B sequences, T tokens of each, H heads, D columns.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, Cache, LlamaConfig, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.gpu.device import DEVICE, DTYPE, HAS_GPU, SIZES, Ceilings, built, emptied, flops, now, row
from benchmarks.measure import Row, alternate
from benchmarks.shapes import plan_of
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport

CAUSAL = "causal_sdpa"
"""Attention that is given no mask, since all positions are real; while a graph is captured, transformers makes one."""
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


PAST = SIZES.context - 1
RATIOS, ALLOCATIONS = (0.2, 0.5), ("uniform", "logistic")
SPEEDUPS = {0.2: "ratio >= 1.17", 0.5: "ratio >= 1.48"}
"""The paper's, at batch 1."""


def prefill_rows(of: Ceilings) -> Iterator[Row]:
    """Prefill of dense and compacted models as CUDA graphs, so that launching costs neither anything."""
    for name, config in SIZES.models.items():
        dense = built(config, attn_implementation=CAUSAL)
        for ratio, kind in itertools.product(RATIOS, ALLOCATIONS):
            cut = built(compacted(config, ratio, kind), attn_implementation=CAUSAL)
            for B, T in SIZES.prompts:
                found = timed({"dense": captured(dense, B, T, 0), "cut": captured(cut, B, T, 0)}, 1)
                limit = of.flops_per_s / flops(cut.get_decoder(), T)
                yield speed_row(
                    f"prefill {B} x {T}, {name}, {ratio:.0%} {kind}, transformers", found, B * T, limit=limit
                )
            del cut
            emptied()
        del dense
        emptied()


def compacted(config: LlamaConfig, ratio: float, kind: str) -> Any:
    """The configuration of an expert; which units it keeps does not matter."""
    values = {**config.to_dict(), "model_type": "llama"}
    export = CheckpointExport(Checkpoint(Path(), values, {}, ""), plan_of(config, ratio, kind))
    return AutoConfig.for_model(**{key: value for key, value in export.config().items() if key != "auto_map"})


def decoding_limit(model: Any, B: int, of: Ceilings) -> float:
    per_step = weight_bytes(model) + B * SIZES.context * cache_bytes(model)
    return of.bytes_per_s * B / per_step


def timed(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step in each round, which is some steps of decoding, or one prefill."""

    def repeated(step: Callable[[], object]) -> None:
        for _ in range(repeats):
            step()

    found = alternate({name: partial(repeated, step) for name, step in steps.items()}, SIZES.rounds, now=now)
    names = [*steps]
    steps.clear()
    emptied()
    return {name: [seconds / repeats for seconds in found.seconds[name]] for name in names}


def speed_row(name: str, found: Mapping[str, Sequence[float]], tokens: int, *, limit: float, target: str = "") -> Row:
    return row(
        name,
        ours=tokens / median(found["cut"]),
        baseline=tokens / median(found["dense"]),
        unit="tokens/s",
        ratios=[dense / cut for dense, cut in zip(found["dense"], found["cut"], strict=True)],
        limit=limit,
        limit_name="product in bfloat16" if "prefill" in name else "reading weights and cache at the speed of a copy",
        target=target,
        why="narrower products reach less of the memory's speed, and what lies between them does not shrink",
    )


class Context(StaticLayer):
    """Keys and values of ``past`` positions and of the tokens given, always the same ones: each step costs as much.

    With no past, what a prompt writes.
    """

    is_compileable = False

    def __init__(self, past: int):
        super().__init__(max_cache_len=past)
        self.past = past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        (B, H, T, D), device, dtype = key_states.shape, key_states.device, key_states.dtype
        self.keys, self.values = torch.randn(2, B, H, self.past + T, D, device=device, dtype=dtype).unbind()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        keys[:, :, self.past :] = key_states
        values[:, :, self.past :] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past + query_length, 0


def captured(model: Any, B: int, T: int, past: int) -> Callable[[], object]:
    """A forward pass with a greedy choice at the end: on a GPU as a graph, which is replayed."""
    ids_BT = torch.randint(model.config.vocab_size, (B, T), device=DEVICE)
    cache = Cache(layers=[Context(past) for _ in model.get_decoder().layers])

    @torch.inference_mode()
    def step() -> Tensor:
        out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    return graphed(step, ids_BT, cache)


def graphed(step: Callable[[], object], *read: object) -> Callable[[], object]:
    """A step as a graph, with what it reads, which must outlive it; without a GPU the step itself."""
    if not HAS_GPU:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replayed, graph, *read)


def _replayed(graph: torch.cuda.CUDAGraph, *_read: object) -> None:
    graph.replay()


def weight_bytes(model: Any) -> int:
    """What every decoding step reads: all but the embeddings."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name)


def cache_bytes(model: Any) -> int:
    """Of one position in all layers."""
    of_keys = sum(layer.self_attn.k_proj.out_features for layer in model.get_decoder().layers)
    return 2 * of_keys * DTYPE.itemsize
