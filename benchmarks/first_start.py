"""python -m benchmarks.first_start [LAYERS]

What vLLM's own compiling adds to the start of an engine, where all layers are alike and where all differ.

A Llama of the widths of SmolLM2-135M with random weights: dense, and cut by a half evenly and along the logistic curve.
Each starts uncompiled, compiled with nothing cached, and compiled again; and says how fast it decodes a request. On a
CPU the service compiles nothing (``serve.engine.enforce_eager``); on a GPU vLLM compiles by default.
"""

import copy
import json
import os
import sys
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from transformers import LlamaConfig

from benchmarks.gpu.decoding import cut_config
from benchmarks.gpu.served import engine
from benchmarks.load import Load, answer
from benchmarks.measure import alternate

SHAPE = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=4096
)
RATIO = 0.5
ROUNDS = 5
CASES: dict[str, dict[str, Any]] = {
    "uncompiled": {"enforce_eager": True},
    "compiled, nothing cached": {"enforce_eager": False, "compilation_config": {}},
    "compiled again": {"enforce_eager": False, "compilation_config": {}},
}
"""Arguments of an engine, in the order in which engines are started."""


def main(n_layers: int) -> None:
    """Print a line of JSON for every model: by case the seconds of a start and the tokens per second of one request."""
    dense = copy.deepcopy(SHAPE)
    dense.num_hidden_layers = n_layers
    configs: dict[str, Any] = {"dense": dense}
    for kind in ("uniform", "logistic"):
        configs[kind] = cut_config(dense, RATIO, kind)

    for name, config in configs.items():
        print(json.dumps({name: _measure(config)}), flush=True)


def _measure(config: Any) -> dict[str, dict[str, float]]:
    """Return seconds and tokens per second by case."""
    measured: dict[str, dict[str, float]] = {}
    # What vLLM compiles is kept in a folder, which is empty the first time.
    with TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache
        try:
            for case, arguments in CASES.items():
                started = time.perf_counter()
                with engine(config, max_model_len=256, **arguments) as llm:
                    seconds = time.perf_counter() - started
                    measured[case] = {"start s": round(seconds, 1), "tokens/s": round(_tokens_per_s(llm), 1)}
        finally:
            del os.environ["VLLM_CACHE_ROOT"]
    return measured


def _tokens_per_s(llm: Any) -> float:
    """Return the rate of decoding one request: of 33 tokens, less the seconds of the first one."""
    contestants = {str(n): partial(answer, llm, Load(1, 64, n), SHAPE.vocab_size) for n in (1, 33)}
    timings = alternate(contestants, ROUNDS)
    return 32 / (timings.median("33") - timings.median("1"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
