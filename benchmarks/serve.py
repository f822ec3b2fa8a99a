"""Serve: vLLM with a model of 270 million parameters, dense beside cut ones, prefill and decoding, in one process.

Weights are random and every engine has all cores in its turn; prompts and replies are of fixed lengths.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from benchmarks.load import Load, answer
from benchmarks.measure import Row, alternate
from benchmarks.merge import random_statistics
from benchmarks.shapes import plan_of
from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, finish, write_tensors

SUITE = "serve"
MODEL = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_attention_heads=16,
    num_hidden_layers=16,
    vocab_size=32000,
    max_position_embeddings=1024,
)
DENSE = "dense"
CUTS: list[tuple[float, str, int | Literal["auto"]]] = [
    (0.2, "logistic", "auto"),
    (0.2, "uniform", "auto"),
    (0.5, "logistic", "auto"),
    (0.5, "uniform", "auto"),
    (0.5, "logistic", 16),  # `uniform` has the same widths whatever the tile: half of 2816 is a multiple of 128
    (0.5, "logistic", 64),
    (0.5, "logistic", 128),
]
TARGETS = {0.5: "ratio >= 1.4"}
LOADS = (Load(1, 512, 1), Load(8, 256, 1), Load(1, 16, 48), Load(16, 16, 24))


def rows(config: Config) -> Iterator[Row]:
    """In a process of its own: vLLM changes its process's environment and torch's threads for good."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        yield from own.submit(measured, config.benchmarks.rounds).result()


def measured(rounds: int) -> list[Row]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base = dense(Path(folder) / DENSE)
        models = {DENSE: base} | {f"{cut[0]:.0%} {cut[1]}, align {cut[2]}": _cut(base, *cut) for cut in CUTS}
        engines = {name: engine(path) for name, path in models.items()}
        sizes = {name: Checkpoint.open(str(path)) for name, path in models.items()}
    return [row for load in LOADS for row in _rows(load, engines, sizes, rounds)]


def _rows(load: Load, engines: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], rounds: int) -> Iterator[Row]:
    found = alternate({name: partial(answer, llm, load, MODEL.vocab_size) for name, llm in engines.items()}, rounds)
    tokens_per_s = load.tokens / found.median(DENSE)
    weights = {name: _weights_met(checkpoint, load) for name, checkpoint in checkpoints.items()}
    for name, (ratio, *_) in zip([*engines][1:], CUTS, strict=True):
        yield Row.of(
            SUITE,
            f"{load.name}, {name}",
            baseline=tokens_per_s,
            ours=load.tokens / found.median(name),
            unit="tokens/s",
            ratios=found.speedups(name, DENSE),
            limit=tokens_per_s * weights[DENSE] / weights[name],
            limit_name="dense, by the weights that are left",
            target=TARGETS.get(ratio, ""),
            why="what an engine does beside products of weights does not shrink with them",
        )


def _weights_met(checkpoint: Checkpoint, load: Load) -> int:
    """Parameters that a measured token is multiplied with: in a prefill, the last one alone meets the head."""
    left_out = {"embed_tokens", *(["lm_head"] if load.is_prefill else [])}
    return sum(
        prod(info.shape) for name, info in checkpoint.tensors.items() if not any(one in name for one in left_out)
    )


def engine(folder: Path) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def dense(folder: Path) -> Path:
    """Write the model, of random weights in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _cut(folder: Path, ratio: float, kind: str, align: int | Literal["auto"]) -> Path:
    base = Checkpoint.open(str(folder))
    export = CheckpointExport(base, plan_of(MODEL, ratio, kind, align), random_statistics(base.architecture))
    out = folder.with_name(f"{ratio}-{kind}-{align}")
    files = export.files(10**10)
    finish(export, out, files, {"files": {n: write_tensors(export, of, out / n) for n, of in files.items()}})
    return out
