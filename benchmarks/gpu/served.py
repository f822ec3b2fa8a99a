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

from benchmarks.gpu.decoding import ALLOCATIONS, RATIOS, SPEEDUPS, cut_config, decoding_limit, speed_row
from benchmarks.gpu.device import DTYPE, HAS_GPU, SIZES, Ceilings, flops_per_token, gpu_row
from benchmarks.load import Load, answer
from benchmarks.measure import Row, alternate

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [*SIZES.decoding]}
"""Decoding as CUDA graphs of vLLM's own kernels; nothing is compiled."""
ROUNDS = 3
DENSE = "dense"


def served_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield prefill, and decoding: the seconds of whole replies less those of their first tokens."""
    for name, config in SIZES.models.items():
        configs = {DENSE: config}
        for ratio in RATIOS:
            configs[f"{ratio:.0%} logistic"] = cut_config(config, ratio, "logistic")
        with torch.device("meta"):  # for their sizes alone
            models = {
                case: AutoModelForCausalLM.from_config(case_config, dtype=DTYPE)
                for case, case_config in configs.items()
            }

        with ExitStack() as running:
            engines = {case: running.enter_context(engine(case_config)) for case, case_config in configs.items()}
            for B, T in SIZES.prompts:
                limits: dict[str, float] = {}
                for case, model in models.items():
                    limits[case] = ceilings.flops_per_s / flops_per_token(model.get_decoder(), T)
                yield from _rows(f"prefill {B} x {T}, {name}", _seconds(engines, Load(B, T, 1)), B * T, limits)
            for B in SIZES.decoding:
                limits = {case: decoding_limit(model, B, ceilings) for case, model in models.items()}
                targets = list(SPEEDUPS.values()) if B == 1 else []
                case_name = f"decoding {B} at {SIZES.context}, {name}"
                yield from _rows(case_name, _seconds_per_step(engines, B), B, limits, targets)


def _seconds_per_step(engines: Mapping[str, Any], B: int) -> dict[str, list[float]]:
    """Return the seconds of a decoding step in each round: of whole replies, less those of their first tokens."""
    first = _seconds(engines, Load(B, SIZES.context, 1))
    whole = _seconds(engines, Load(B, SIZES.context, 1 + SIZES.reply))
    steps: dict[str, list[float]] = {}
    for case in engines:
        pairs = zip(first[case], whole[case], strict=True)
        steps[case] = [(whole_s - first_s) / SIZES.reply for first_s, whole_s in pairs]
    return steps


def _rows(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    tokens: int,
    limits: Mapping[str, float],
    targets: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield a row of every cut model beside the dense one."""
    cut_cases = [case for case in seconds if case != DENSE]
    for case, target in zip_longest(cut_cases, targets, fillvalue=""):
        times = {DENSE: seconds[DENSE], "cut": seconds[case]}
        yield speed_row(f"{name}, {case}, vLLM", times, tokens, limit=limits[case], target=target)


def _seconds(engines: Mapping[str, Any], load: Load) -> Mapping[str, Sequence[float]]:
    # The same prompts for all models.
    vocabulary = min(config.vocab_size for config in SIZES.models.values())
    contestants = {case: partial(answer, llm, load, vocabulary) for case, llm in engines.items()}
    return alternate(contestants, ROUNDS).seconds


def starts_rows(_ceilings: Ceilings) -> Iterator[Row]:
    """Yield starts of an engine as vLLM does by default, which compiles; layers that differ are compiled one by one."""
    name, whole = next(iter(SIZES.models.items()))
    config = copy.deepcopy(whole)
    config.num_hidden_layers = SIZES.layers
    configs: dict[str, Any] = {DENSE: config}
    for kind in ALLOCATIONS:
        configs[f"{RATIOS[-1]:.0%} {kind}"] = cut_config(config, RATIOS[-1], kind)

    # What vLLM compiles is kept in a folder, which is empty the first time.
    with TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache
        try:
            for when in ("with nothing cached", "again"):
                seconds = {case: _start_seconds(case_config) for case, case_config in configs.items()}
                for case, case_seconds in seconds.items():
                    yield gpu_row(
                        f"start of an engine, {SIZES.layers} layers of {name}, {case}, {when}",
                        ours=case_seconds,
                        baseline=seconds[DENSE],
                        unit="s",
                        ratios=[case_seconds / seconds[DENSE]],
                    )
        finally:
            del os.environ["VLLM_CACHE_ROOT"]


def _start_seconds(config: Any) -> float:
    started = time.perf_counter()
    with engine(config, compilation_config={}):
        return time.perf_counter() - started


@contextmanager
def engine(config: Any, **more: Any) -> Iterator[Any]:
    """Start vLLM with a model of a configuration, and yield its ``LLM``; ``more`` are arguments of that."""
    # A process that is forked could not use a GPU that this one has used.
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    B = SIZES.decoding[-1]
    T = SIZES.context
    longest_prompt = max(length for _, length in (*SIZES.prompts, (B, T)))
    settings = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": not HAS_GPU,
        "compilation_config": GRAPHS if HAS_GPU else {},
        "kv_cache_memory_bytes": SIZES.served_cache,
        # Several engines share the device; the cache's size is set in bytes.
        "gpu_memory_utilization": 0.1,
        "max_model_len": longest_prompt + 2 * SIZES.reply,
        "max_num_seqs": B,
        "max_num_batched_tokens": B * (T + SIZES.reply),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    # vLLM finds the class of the model by this name.
    saved = copy.deepcopy(config)
    saved.architectures = saved.architectures or ["LlamaForCausalLM"]

    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        llm: Any = LLM(folder, **{**settings, **more})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
