"""Experts that share an engine, against an engine each and against the dense model alone.

    python -m benchmarks.shared_engine run.name=demo               the service under load, several mixes of traffic
    python -m benchmarks.shared_engine swap run.name=demo          swaps alone, against the bytes that they move
    python -m benchmarks.shared_engine faults run.name=demo        the engine is killed again and again under load

The dense model is the general one of a ratio of 0: `python jobs/prune.py "pruning.ratio=[0, 0.2]" ...`. Every reply of
the shared engine is compared with that of the expert's own.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch

from seap_ray.config import GENERAL, Config, load_config
from seap_ray.core.plan import Kept
from seap_ray.core.slicing import slice_tensor
from seap_ray.demo import skills
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import SHARED
from seap_ray.storage.files import read_json
from seap_ray.storage.run import Run

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-of-this-benchmark"
TASKS = ("arithmetic", "reverse", "sort", "logic", "facts", "prose")
REQUESTS, CLIENTS, MAX_TOKENS = 700, 48, 24
MIXES = {"one": [1.0], "hot": [0.9], "zipf": [1 / rank for rank in range(1, 20)], "uniform": [1.0] * 20}
"""Shares of the models, in their order; what is left of 1 is spread evenly over the others."""
BEFORE = "the answer to the question before this one was wrong, so think of it as long as you need to. "
"""Long enough for the prefix cache to hold it."""


def main(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "swap":
        return swaps(load_config(arguments[1:]))
    if arguments and arguments[0] == "faults":
        return faults(arguments[1:])
    config = load_config(arguments)
    ratio, models = config.serve.ratio or 0.2, models_of(config)
    replies: dict[str, dict[str, list[str]]] = {}
    rows = []
    for mode, more in (
        ("shared", ["serve.packing=shared", "serve.num_cpus=1"]),
        ("separate", ["serve.packing=separate", f"serve.num_cpus={min(0.25, 2 / len(models)):.2f}"]),
        ("dense", ["serve.ratio=0", "serve.experts=[]", "serve.num_cpus=1"]),
    ):
        with_ratio = more if mode == "dense" else [*more, f"serve.ratio={ratio}"]
        with Served([*arguments, *with_ratio]) as served:
            replies[mode] = {}
            for mix, shares in MIXES.items():
                asked = traffic(models, shares)
                asked = [(GENERAL, text) for _, text in asked] if mode == "dense" else asked
                before = served.swaps()
                texts, seconds, waits = asyncio.run(load(served.url, asked))
                replies[mode][mix] = texts
                rows.append(
                    {
                        "mode": mode,
                        "mix": mix,
                        "requests/s": REQUESTS / seconds,
                        "p50 s": waits[len(waits) // 2],
                        "p99 s": waits[int(len(waits) * 0.99)],
                        "swaps": served.swaps() - before,
                        "start s": served.start_s,
                        "memory MB": served.memory() / 1e6,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    pairs = [pair for mix in MIXES for pair in zip(replies["shared"][mix], replies["separate"][mix], strict=True)]
    print(f"{sum(a == b for a, b in pairs)} of {len(pairs)} replies of the shared engine are those of an engine each")


def models_of(config: Config) -> list[str]:
    made = Run.of(config).experts(config.serve.ratio or 0.2).glob("*/seap.json")
    names = sorted(path.parent.name for path in made)
    return [GENERAL, *(name for name in names if name in [task.name for task in config.tasks])]


def traffic(models: list[str], shares: list[float]) -> list[tuple[str, str]]:
    """Which model each request names, and its prompt: of any task, so that all models see all kinds."""
    rng, rest = random.Random(0), len(models) - len(shares)
    weights = [*shares[: len(models)], *([(1 - sum(shares)) / rest] * rest if rest > 0 else [])]
    prompts = [row["question"] for task in TASKS for row in skills.rows(task, 40, split="test", seed=1)]
    return [(rng.choices(models, weights)[0], rng.choice(prompts)) for _ in range(REQUESTS)]


async def load(
    url: str, asked: list[tuple[str, str]], meanwhile: Coroutine[Any, Any, None] | None = None
) -> tuple[list[str], float, list[float]]:
    """Replies, seconds for all of them, and the sorted time of each."""
    turn, waits, headers = asyncio.Semaphore(CLIENTS), [], {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600) as http:

        async def one(model: str, text: str) -> str:
            body = {"model": model, "prompt": text, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
            async with turn:
                started = time.perf_counter()
                reply = await http.post("/v1/completions", json=body)
                waits.append(time.perf_counter() - started)
            assert reply.status_code == 200 and reply.json()["model"] == model, reply.text
            return reply.json()["choices"][0]["text"]

        started = time.perf_counter()
        replies = asyncio.gather(*(one(*pair) for pair in asked))
        if meanwhile:
            await meanwhile
        texts = await replies
        return texts, time.perf_counter() - started, sorted(waits)


class Served:
    """``jobs/deploy.py`` as a process of its own."""

    def __init__(self, arguments: Sequence[str]):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        settings = [f"serve.port={self.url.rpartition(':')[2]}", "serve.max_queued_requests=1000"]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "jobs/deploy.py", *arguments, *settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_ADDRESS": "local", "SEAP_API_KEYS": KEY},
        )
        assert self.process.stdout
        for line in self.process.stdout:
            if "are served at" in line or "is served at" in line:
                break
        assert self.process.poll() is None
        self.start_s = time.perf_counter() - started

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def memory(self) -> int:
        """Bytes of the engines and their servers; what processes share is divided among them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        names = ("ExpertServer", "SharedEngineServer", "EngineCore")
        return sum(p.memory_full_info().pss for p in children if any(name in " ".join(p.cmdline()) for name in names))

    def swaps(self) -> float:
        return self.metric("seap_swaps_total")

    def metric(self, name: str) -> float:
        """Summed over its labels."""
        time.sleep(12)  # Ray's agents collect every ten seconds
        page = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name}{{"))

    def engines(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in children if "EngineCore" in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


# --- faults ----------------------------------------------------------------------------------------------------------


def faults(arguments: Sequence[str], kills: int = 12) -> None:
    """Every model is asked in turns, half of the prompts with a beginning in common; then again while engines die."""
    models = models_of(load_config(arguments))
    prompts = [before + text for _, text in traffic(models[:1], [1.0])[:20] for before in ("", BEFORE)]
    asked = [*itertools.product(models, prompts)] * 10
    asked = [asked[i * 11 % len(asked)] for i in range(len(asked))]  # 11 and the length have no common divisor
    with Served([*arguments, "serve.packing=shared", "serve.num_cpus=1", "serve.engine.block_size=32"]) as served:
        first, _, _ = asyncio.run(load(served.url, asked))
        said = dict(zip(asked, first, strict=True))
        same = sum(said[pair] == text for pair, text in zip(asked, first, strict=True))
        queries, hits = (served.metric(f"ray_vllm_prefix_cache_{name}_total") for name in ("queries", "hits"))
        print(f"{same} of {len(asked)} replies are those of the same prompt and expert, in {served.swaps():.0f} swaps;")
        print(f"{hits:,.0f} of {queries:,.0f} tokens of prompts came from the prefix cache")
        again, seconds, _ = asyncio.run(load(served.url, asked, kill(served, kills)))
        same = sum(said[pair] == text for pair, text in zip(asked, again, strict=True))
        print(f"{same} of {len(asked)} are, too, in {seconds:.0f} s while its engine was killed {kills} times")


async def kill(served: Served, kills: int) -> None:
    """Engines, at work, in a swap or while they start: after 0.05 to 4 s, every third after 6 to 12."""
    rng = random.Random(3)
    for i in range(kills):
        await asyncio.sleep(rng.uniform(0.05, 4) if i % 3 else rng.uniform(6, 12))
        ended = served.engines()
        for engine in ended:
            engine.kill()
        while not {engine.pid for engine in served.engines()} - {engine.pid for engine in ended}:
            await asyncio.sleep(0.1)


# --- swaps alone -----------------------------------------------------------------------------------------------------


def swaps(config: Config, rounds: int = 10) -> None:
    """Seconds of a swap, of copying the same bytes, and of gathering them from the dense model in memory."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    from seap_ray.vllm_plugin.plugin import LOAD_FORMAT

    run = Run.of(config)
    folders = [path.parent for path in sorted(run.experts(config.serve.ratio or 0.2).glob("*/seap.json"))]
    folders = [folder for folder in folders if read_json(folder / "seap.json")["plan"]["kind"] != "baseline"][:2]
    files = sorted(folders[0].glob("*.safetensors"))
    n_bytes = sum(file.stat().st_size for file in files if not file.name.startswith(SHARED))
    copied, source = torch.empty(n_bytes, dtype=torch.uint8), torch.ones(n_bytes, dtype=torch.uint8)
    found: dict[str, list[float]] = {}
    for load_format in (LOAD_FORMAT, "auto"):
        llm = LLM(
            str(folders[0]),
            dtype=config.model.dtype,
            enforce_eager=True,
            load_format=load_format,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 26,
        )
        for i in range(rounds):
            timed(found, "copy of the same bytes", partial(copied.copy_, source))
            to = {"weights_path": str(folders[(i + 1) % 2])}
            timed(found, load_format, partial(llm.collective_rpc, "reload_weights", kwargs=to))
        del llm
    gather(config, run, folders[0], found, rounds)
    about = {
        name: {"median ms": 1e3 * median(times), "MB/s": n_bytes / median(times) / 1e6} for name, times in found.items()
    }
    print(
        json.dumps(
            {"MB moved": n_bytes / 1e6, "MB of all": sum(file.stat().st_size for file in files) / 1e6} | about, indent=2
        )
    )


def gather(config: Config, run: Run, folder: Path, found: dict[str, list[float]], rounds: int) -> None:
    """The kept rows and columns of every module that is cut, from dense tensors in memory."""
    from safetensors.torch import load_file

    base = Checkpoint.open(config.model.source)
    architecture, name = base.architecture, folder.name
    indices = load_file(run.plan(config.serve.ratio or 0.2, name).with_suffix(".safetensors"))
    tensors = {name: base.read(name) for name in base.tensors}

    def once() -> None:
        for layer in range(architecture.n_layers):
            units = {
                unit: tuple(indices[f"layers.{layer}.{unit}"].tolist()) for unit in ("groups", "heads", "channels")
            }
            kept = Kept(**units)
            for module in (*architecture.layout.rows, *architecture.layout.columns):
                dense = tensors[architecture.tensor(layer, module)]
                torch.cat([*slice_tensor(architecture, layer, module, "weight", dense, kept)])

    for _ in range(rounds):
        timed(found, "gather from the dense model in memory", once)


def timed(found: dict[str, list[float]], name: str, act: Callable[[], object]) -> None:
    started = time.perf_counter()
    act()
    found.setdefault(name, []).append(time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1:])
