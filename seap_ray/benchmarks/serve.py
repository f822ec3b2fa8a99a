"""Serve: vLLM with a model of 270 million parameters, dense beside cut ones, prefill and decoding, in one process.

Weights are random and every engine has all cores in its turn; prompts and replies are of fixed lengths.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from seap_ray.benchmarks.measure import Rounds, Row, alternate
from seap_ray.benchmarks.merge import random_statistics
from seap_ray.benchmarks.shapes import plan_of
from seap_ray.checkpoint import Checkpoint
from seap_ray.compaction import Compaction, finish, write_tensors
from seap_ray.config import Config

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
CUTS = [
    *itertools.product((0.2,), ("logistic", "uniform"), ("auto",)),
    *itertools.product((0.5,), ("logistic", "uniform"), (16, 64, 128)),
]
TARGETS = {0.5: "ratio >= 1.4"}


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one length that come at once, and how much of them is measured: their prompts or their replies."""

    requests: int
    prompt: int
    reply: int

    @property
    def name(self) -> str:
        if self.is_prefill:
            return f"prefill of {self.requests} x {self.prompt} tokens"
        return f"{self.requests} x {self.reply} tokens at {self.prompt}"

    @property
    def is_prefill(self) -> bool:
        return self.reply == 1

    @property
    def tokens(self) -> int:
        return self.requests * (self.prompt if self.is_prefill else self.reply)


LOADS = (Load(1, 512, 1), Load(8, 256, 1), Load(1, 16, 48), Load(16, 16, 24))


def rows(config: Config) -> Iterator[Row]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    with tempfile.TemporaryDirectory() as folder:
        models = {DENSE: _dense(Path(folder) / DENSE)} | {
            f"{ratio:.0%} {kind}, align {align}": _cut(Path(folder), ratio, kind, align) for ratio, kind, align in CUTS
        }
        base, engines = Checkpoint.open(str(models[DENSE])), {name: engine(path) for name, path in models.items()}
        sizes = {name: _parameters_read(path) for name, path in models.items()}
    for load in LOADS:
        contestants = {name: partial(answer, llm, load, base.config["vocab_size"]) for name, llm in engines.items()}
        found = alternate(contestants, config.benchmarks.rounds)
        for name, (ratio, *_) in zip([*models][1:], CUTS, strict=True):
            yield _row(load, name, found, sizes[DENSE] / sizes[name], TARGETS.get(ratio, ""))


def _row(load: Load, name: str, found: Rounds, most: float, target: str) -> Row:
    dense = load.tokens / found.median(DENSE)
    return Row.of(
        SUITE,
        f"{load.name}, {name}",
        baseline=dense,
        ours=load.tokens / found.median(name),
        unit="tokens/s",
        ratios=found.speedups(name, DENSE),
        limit=dense * most,
        limit_name="by the weights that are left",
        target=target,
        why="what an engine does beside products of weights does not shrink with them",
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


def answer(llm: Any, load: Load, vocab_size: int) -> None:
    """Prompts of random tokens, and greedy replies of the length that is asked for."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (load.requests, load.prompt), generator=generator)
    sampling = SamplingParams(max_tokens=load.reply, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": prompt} for prompt in ids.tolist()], sampling, use_tqdm=False)


def _dense(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODEL, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _cut(folder: Path, ratio: float, kind: str, align: Any) -> Path:
    base = Checkpoint.open(str(folder / DENSE))
    compaction = Compaction(base, plan_of(MODEL, ratio, kind, align), random_statistics(base.architecture))
    out = folder / f"{ratio}-{kind}-{align}"
    files = compaction.files(10**10)
    finish(compaction, out, files, {"files": {n: write_tensors(compaction, of, out / n) for n, of in files.items()}})
    return out


def _parameters_read(folder: Path) -> int:
    """Parameters that a token passes: all but the embeddings, of which it is one row."""
    found = Checkpoint.open(str(folder)).tensors.items()
    return sum(int(torch.tensor(info.shape).prod()) for name, info in found if "embed_tokens" not in name)
