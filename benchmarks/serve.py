"""Serve: vLLM with a model of 270 million parameters, dense beside cut ones, prefill and decoding, in one process.

Weights are random and every engine has all cores in its turn; prompts and replies are of fixed lengths. What the HTTP
endpoint adds is measured by the suite ``route`` and by ``python -m benchmarks.endpoint_overhead``.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from benchmarks.load import Load, answer
from benchmarks.measure import Row, alternate
from benchmarks.merge import random_statistics
from benchmarks.shapes import Align, plan_of
from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, finish, write_tensors
from seap_ray.storage.paths import LocalPath

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
CUTS: list[tuple[float, str, Align]] = [
    (0.2, "logistic", "auto"),
    (0.2, "uniform", "auto"),
    (0.5, "logistic", "auto"),
    (0.5, "uniform", "auto"),
    (0.5, "logistic", 16),  # `uniform` has the same widths whatever the tile: half of 2816 is a multiple of 128
    (0.5, "logistic", 64),
    (0.5, "logistic", 128),
]
"""Ratio, allocation and tile of channels of every cut model."""
TARGETS = {0.5: "ratio >= 1.4"}
LOADS = (Load(1, 512, 1), Load(8, 256, 1), Load(1, 16, 48), Load(16, 16, 24))
KV_CACHE_BYTES = 1 << 28
"""Bytes of an engine's keys and values; enough for every load."""


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows, measured in a process of its own.

    vLLM changes its process's environment and torch's threads for good.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield from pool.submit(measure_loads, config.benchmarks.rounds).result()


def measure_loads(rounds: int) -> list[Row]:
    """Start an engine for every model, and measure every load."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base = save_dense(Path(folder) / DENSE)
        models = {DENSE: base}
        for ratio, kind, align in CUTS:
            models[f"{ratio:.0%} {kind}, align {align}"] = _save_cut(base, ratio, kind, align)
        # All engines live at the same time, so that they can take turns.
        engines = {name: start_engine(path) for name, path in models.items()}
        checkpoints = {name: Checkpoint.open(str(path)) for name, path in models.items()}

    measured: list[Row] = []
    for load in LOADS:
        measured += _load_rows(load, engines, checkpoints, rounds)
    return measured


def _load_rows(
    load: Load, engines: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], rounds: int
) -> Iterator[Row]:
    contestants = {name: partial(answer, llm, load, MODEL.vocab_size) for name, llm in engines.items()}
    timings = alternate(contestants, rounds)
    # An engine that was bound by its weights alone would gain in their proportion.
    dense_rate = load.tokens / timings.median(DENSE)
    weights = {name: _multiplied_parameters(checkpoint, load) for name, checkpoint in checkpoints.items()}
    # Names and cuts are in the same order.
    cut_names = [name for name in engines if name != DENSE]

    for name, (ratio, _, _) in zip(cut_names, CUTS, strict=True):
        yield Row.of(
            SUITE,
            f"{load.name}, {name}",
            baseline=dense_rate,
            ours=load.tokens / timings.median(name),
            unit="tokens/s",
            ratios=timings.speedups(name, DENSE),
            limit=dense_rate * weights[DENSE] / weights[name],
            limit_name="dense, by the weights that are left",
            target=TARGETS.get(ratio, ""),
            why="what an engine does beside products of weights does not shrink with them",
        )


def _multiplied_parameters(checkpoint: Checkpoint, load: Load) -> int:
    """Return the number of parameters that a measured token is multiplied with."""
    left_out = ["embed_tokens"]
    if load.is_prefill:  # the last token alone meets the head
        left_out.append("lm_head")
    n_parameters = 0
    for name, info in checkpoint.tensors.items():
        if not any(module in name for module in left_out):
            n_parameters += prod(info.shape)
    return n_parameters


def start_engine(folder: Path) -> Any:
    """Start vLLM in this process with the model in a folder."""
    from vllm import LLM

    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def save_dense(folder: Path) -> Path:
    """Write the dense model, of random weights in bfloat16, and return its folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _save_cut(base_folder: Path, ratio: float, kind: str, align: Align) -> Path:
    """Write a cut of the dense model beside it, and return its folder."""
    base = Checkpoint.open(str(base_folder))
    export = CheckpointExport(base, plan_of(MODEL, ratio, kind, align), random_statistics(base.architecture))
    folder = LocalPath(base_folder.with_name(f"{ratio}-{kind}-{align}"))
    files = export.files(10**10)  # all in one
    hashes = {name: write_tensors(export, outputs, folder / name) for name, outputs in files.items()}
    finish(export, folder, files, {"files": hashes})
    return folder
