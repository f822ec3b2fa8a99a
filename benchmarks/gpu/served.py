"""Served: vLLM itself with dense and compacted models: prefill, decoding, and how long an engine takes to start.

Every model has an engine in a process of its own, as a service has it, and vLLM's own random weights.

Letters: B requests, T tokens of each.
"""

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import zip_longest
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.decoding import ALLOCATIONS, RATIOS, SPEEDUPS, compacted, decoding_limit, speed_row
from benchmarks.gpu.device import DTYPE, HAS_GPU, SIZES, Ceilings, flops, row
from benchmarks.load import Load, answer
from benchmarks.measure import Row, alternate

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [*SIZES.decoding]}
"""Decoding as CUDA graphs of vLLM's own kernels; nothing is compiled."""
ROUNDS, DENSE = 3, "dense"


def served_rows(of: Ceilings) -> Iterator[Row]:
    """Prefill, and decoding: the seconds of whole replies less those of their first tokens."""
    for name, config in SIZES.models.items():
        configs = {DENSE: config} | {f"{ratio:.0%} logistic": compacted(config, ratio, "logistic") for ratio in RATIOS}
        with torch.device("meta"):
            models = {case: AutoModelForCausalLM.from_config(one, dtype=DTYPE) for case, one in configs.items()}
        with ExitStack() as started:
            engines = {case: started.enter_context(engine(one)) for case, one in configs.items()}
            for B, T in SIZES.prompts:
                limits = {case: of.flops_per_s / flops(model.get_decoder(), T) for case, model in models.items()}
                yield from _rows(f"prefill {B} x {T}, {name}", _seconds(engines, Load(B, T, 1)), B * T, limits)
            for B in SIZES.decoding:
                first, whole = (_seconds(engines, Load(B, SIZES.context, 1 + more)) for more in (0, SIZES.reply))
                steps = {
                    case: [(all_of - one) / SIZES.reply for one, all_of in zip(first[case], whole[case], strict=True)]
                    for case in engines
                }
                limits = {case: decoding_limit(model, B, of) for case, model in models.items()}
                targets = [*SPEEDUPS.values()] if B == 1 else []
                yield from _rows(f"decoding {B} at {SIZES.context}, {name}", steps, B, limits, targets)


def _rows(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    tokens: int,
    limits: Mapping[str, float],
    targets: Sequence[str] = (),
) -> Iterator[Row]:
    """Of every cut model beside the dense one."""
    for case, target in zip_longest([case for case in seconds if case != DENSE], targets, fillvalue=""):
        times = {DENSE: seconds[DENSE], "cut": seconds[case]}
        yield speed_row(f"{name}, {case}, vLLM", times, tokens, limit=limits[case], target=target)


def _seconds(engines: Mapping[str, Any], load: Load) -> Mapping[str, Sequence[float]]:
    vocabulary = min(config.vocab_size for config in SIZES.models.values())
    turns = {case: partial(answer, llm, load, vocabulary) for case, llm in engines.items()}
    return alternate(turns, ROUNDS).seconds


def starts_rows(_of: Ceilings) -> Iterator[Row]:
    """Starting an engine as vLLM does by default, which compiles; layers that differ are compiled one by one."""
    name, whole = next(iter(SIZES.models.items()))
    config = copy.deepcopy(whole)
    config.num_hidden_layers = SIZES.layers
    configs: dict[str, Any] = {DENSE: config}
    configs |= {f"{RATIOS[-1]:.0%} {kind}": compacted(config, RATIOS[-1], kind) for kind in ALLOCATIONS}
    with TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache
        try:
            for when in ("with nothing cached", "again"):
                seconds = {case: _start(one) for case, one in configs.items()}
                for case, found in seconds.items():
                    yield row(
                        f"start of an engine, {SIZES.layers} layers of {name}, {case}, {when}",
                        ours=found,
                        baseline=seconds[DENSE],
                        unit="s",
                        ratios=[found / seconds[DENSE]],
                    )
        finally:
            del os.environ["VLLM_CACHE_ROOT"]


def _start(config: Any) -> float:
    started = time.perf_counter()
    with engine(config, compilation_config={}):
        return time.perf_counter() - started


@contextmanager
def engine(config: Any, **more: Any) -> Iterator[Any]:
    """vLLM with a model of this configuration."""
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    B, T = SIZES.decoding[-1], SIZES.context
    settings = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": not HAS_GPU,
        "compilation_config": GRAPHS if HAS_GPU else {},
        "kv_cache_memory_bytes": SIZES.served_cache,
        "gpu_memory_utilization": 0.1,
        "max_model_len": max(length for _, length in (*SIZES.prompts, (B, T))) + 2 * SIZES.reply,
        "max_num_seqs": B,
        "max_num_batched_tokens": B * (T + SIZES.reply),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    named = copy.deepcopy(config)
    named.architectures = named.architectures or ["LlamaForCausalLM"]
    with TemporaryDirectory() as folder:
        named.save_pretrained(folder)
        llm: Any = LLM(folder, **{**settings, **more})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
