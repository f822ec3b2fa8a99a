"""Served: vLLM itself with dense and compacted models: prefill, decoding, and how long an engine takes to start.

Every model has an engine in a process of its own, as a service has it, and vLLM's own random weights.
"""

import copy
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from seap_ray.benchmarks.gpu.decoding import ALLOCATIONS, RATIOS, SPEEDUPS, compacted, decoding_limit, speed_row
from seap_ray.benchmarks.gpu.device import DTYPE, HAS_GPU, SIZES, Ceilings, flops, row
from seap_ray.benchmarks.load import Load, answer
from seap_ray.benchmarks.measure import Row, alternate

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [*SIZES.decoding]}
"""Decoding as CUDA graphs of vLLM's own kernels; nothing is compiled."""
ROUNDS = 3


def served_rows(of: Ceilings) -> Iterator[Row]:
    """Prefill, and decoding: the seconds of whole replies less those of their first tokens."""
    for name, config in SIZES.models.items():
        configs = {"dense": config} | {f"{ratio:.0%}": compacted(config, ratio, "logistic") for ratio in RATIOS}
        with ExitStack() as started:
            engines = {case: started.enter_context(engine(one)) for case, one in configs.items()}
            yield from _served_rows(name, configs, engines, of)


def _served_rows(name: str, configs: dict[str, Any], engines: dict[str, Any], of: Ceilings) -> Iterator[Row]:
    with torch.device("meta"):
        models = {case: AutoModelForCausalLM.from_config(one, dtype=DTYPE) for case, one in configs.items()}
    prefills = {(B, T): Load(B, T, 1) for B, T in [*SIZES.prompts, *((B, SIZES.context) for B in SIZES.decoding)]}
    replies = {B: Load(B, SIZES.context, 1 + SIZES.reply) for B in SIZES.decoding}
    for B, T in SIZES.prompts:
        found = _seconds(engines, prefills[B, T])
        for case, ratio in zip([*engines][1:], RATIOS, strict=True):
            limit = of.flops_per_s / flops(models[case].get_decoder(), T)
            named = f"prefill {B} x {T}, {name}, {ratio:.0%} logistic, vLLM"
            yield speed_row(named, {"dense": found["dense"], "cut": found[case]}, B * T, limit=limit)
    for B in SIZES.decoding:
        first, whole = _seconds(engines, prefills[B, SIZES.context]), _seconds(engines, replies[B])
        found = {
            case: [(both - one) / SIZES.reply for one, both in zip(first[case], whole[case], strict=True)]
            for case in engines
        }
        for case, ratio in zip([*engines][1:], RATIOS, strict=True):
            named, target = f"decoding {B} at {SIZES.context}, {name}, {ratio:.0%} logistic, vLLM", SPEEDUPS[ratio]
            limit = decoding_limit(models[case], B, of)
            times = {"dense": found["dense"], "cut": found[case]}
            yield speed_row(named, times, B, limit=limit, target=target if B == 1 else "")


def _seconds(engines: dict[str, Any], load: Load) -> dict[str, Any]:
    vocabulary = min(config.vocab_size for config in SIZES.models.values())
    turns = {case: partial(answer, llm, load, vocabulary) for case, llm in engines.items()}
    return {**alternate(turns, ROUNDS).seconds}


def starts_rows(_of: Ceilings) -> Iterator[Row]:
    """Starting an engine as vLLM does by default, which compiles; layers that differ are compiled one by one."""
    name, whole = next(iter(SIZES.models.items()))
    config = copy.deepcopy(whole)
    config.num_hidden_layers = SIZES.layers
    configs: dict[str, Any] = {"dense": config}
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
                        baseline=seconds["dense"],
                        unit="s",
                        ratios=[found / seconds["dense"]],
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
