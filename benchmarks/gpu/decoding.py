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

from benchmarks.gpu.device import (
    DEVICE,
    DTYPE,
    HAS_GPU,
    SIZES,
    Ceilings,
    build_model,
    flops_per_token,
    free_memory,
    gpu_row,
    now,
)
from benchmarks.measure import Row, alternate
from benchmarks.shapes import plan_of
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.model_sources import parse_model_source

CAUSAL = "causal_sdpa"
"""Attention that is given no mask, since all positions are real; while a graph is captured, transformers makes one."""
AttentionInterface.register(CAUSAL, sdpa_attention_forward)

PAST = SIZES.context - 1
RATIOS = (0.2, 0.5)
ALLOCATIONS = ("uniform", "logistic")
SPEEDUPS = {0.2: "ratio >= 1.17", 0.5: "ratio >= 1.48"}
"""The paper's, at batch 1."""
WARM_UPS = 3
"""Runs before a graph is captured, as PyTorch asks for."""


def prefill_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield prefill of dense and compacted models as CUDA graphs, so that launching costs neither anything."""
    for name, config in SIZES.models.items():
        dense = build_model(config, attn_implementation=CAUSAL)
        for ratio, kind in itertools.product(RATIOS, ALLOCATIONS):
            cut = build_model(cut_config(config, ratio, kind), attn_implementation=CAUSAL)
            for B, T in SIZES.prompts:
                steps = {"dense": captured_step(dense, B, T, 0), "cut": captured_step(cut, B, T, 0)}
                seconds = time_steps(steps, 1)
                limit = ceilings.flops_per_s / flops_per_token(cut.get_decoder(), T)
                case = f"prefill {B} x {T}, {name}, {ratio:.0%} {kind}, transformers"
                yield speed_row(case, seconds, B * T, limit=limit)
            del cut  # before the next one is made
            free_memory()
        del dense
        free_memory()


def cut_config(config: LlamaConfig, ratio: float, kind: str) -> Any:
    """Return the configuration of a compacted model; which units it keeps does not matter."""
    base = Checkpoint(Path(), {**config.to_dict(), "model_type": "llama"}, {}, parse_model_source("."))
    exported = CheckpointExport(base, plan_of(config, ratio, kind)).config()
    # Its classes are registered, so that the code beside a checkpoint is not needed.
    return AutoConfig.for_model(**{key: value for key, value in exported.items() if key != "auto_map"})


def decoding_limit(model: Any, B: int, ceilings: Ceilings) -> float:
    """Return the tokens per second at which a copy would read the weights and the cache."""
    per_step = weight_bytes(model) + B * SIZES.context * cache_bytes(model)
    return ceilings.bytes_per_s * B / per_step


def weight_bytes(model: Any) -> int:
    """Return the bytes of weights that every decoding step reads: all but the embeddings."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name)


def cache_bytes(model: Any) -> int:
    """Return the bytes of keys and values of one position in all layers."""
    # Keys and values are as wide as each other.
    columns = sum(layer.self_attn.k_proj.out_features for layer in model.get_decoder().layers)
    return 2 * columns * DTYPE.itemsize


def time_steps(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of a step in each round.

    Args:
        steps: Steps by name. It is empty afterwards, so that the graphs' memory is free again.
        repeats: Steps of a round.
    """

    def repeat(step: Callable[[], object]) -> None:
        """Run a step as often as a round has it."""
        for _ in range(repeats):
            step()

    timings = alternate({name: partial(repeat, step) for name, step in steps.items()}, SIZES.rounds, now=now)
    # A graph keeps the memory that it was captured with.
    steps.clear()
    free_memory()
    seconds_per_step: dict[str, list[float]] = {}
    for name, seconds in timings.seconds.items():
        seconds_per_step[name] = [round_seconds / repeats for round_seconds in seconds]
    return seconds_per_step


def speed_row(name: str, seconds: Mapping[str, Sequence[float]], tokens: int, *, limit: float, target: str = "") -> Row:
    """Make a row of the rates of ``cut`` and ``dense``, which take ``seconds`` for ``tokens``."""
    return gpu_row(
        name,
        ours=tokens / median(seconds["cut"]),
        baseline=tokens / median(seconds["dense"]),
        unit="tokens/s",
        # Rates are compared, so the ratio of seconds is turned over.
        ratios=[dense / cut for dense, cut in zip(seconds["dense"], seconds["cut"], strict=True)],
        limit=limit,
        limit_name="product in bfloat16" if "prefill" in name else "reading weights and cache at the speed of a copy",
        target=target,
        why="narrower products reach less of the memory's speed, and what lies between them does not shrink",
    )


# --- steps of transformers -------------------------------------------------------------------------------------------


class Context(StaticLayer):
    """Keys and values of ``past`` positions and of the tokens given, always the same ones: each step costs as much.

    With no past it holds what a prompt writes.
    """

    is_compileable = False

    def __init__(self, past: int):
        super().__init__(max_cache_len=past)
        self.past = past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make keys and values, (B, H, past + T, D), by the first ones that come."""
        B, H, T, D = key_states.shape
        shape = (2, B, H, self.past + T, D)
        self.keys, self.values = torch.randn(shape, device=key_states.device, dtype=key_states.dtype).unbind()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens' keys and values behind the past, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self.keys
        values = self.values
        assert keys is not None and values is not None
        keys[:, :, self.past :] = key_states
        values[:, :, self.past :] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of positions before the tokens given."""
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions are seen, and the first of them."""
        return self.past + query_length, 0


def captured_step(model: Any, B: int, T: int, past: int) -> Callable[[], object]:
    """Return a forward pass with a greedy choice at its end, on a GPU as a graph that is replayed.

    Args:
        model: A causal language model.
        B: Sequences.
        T: Tokens of each.
        past: Positions before them.
    """
    ids_BT = torch.randint(model.config.vocab_size, (B, T), device=DEVICE)
    cache = Cache(layers=[Context(past) for _ in model.get_decoder().layers])

    @torch.inference_mode()
    def step() -> Tensor:
        """Run the model, and choose the next token."""
        out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    return as_graph(step, ids_BT, cache)


def as_graph(step: Callable[[], object], *inputs: object) -> Callable[[], object]:
    """Return a step as a CUDA graph; without a GPU the step itself.

    Args:
        step: What to capture.
        inputs: What the step reads, which must live as long as the graph.
    """
    if not HAS_GPU:
        return step
    # Warmed up on a stream of its own, as capturing asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()

    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, *inputs)


def _replay(graph: torch.cuda.CUDAGraph, *_inputs: object) -> None:
    graph.replay()
