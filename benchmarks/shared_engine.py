"""Experts that share an engine, against an engine each and against the dense model alone.

    python -m benchmarks.shared_engine run.name=demo               the service under load, several mixes of traffic
    python -m benchmarks.shared_engine swap run.name=demo          swaps alone, against the bytes that they move
    python -m benchmarks.shared_engine faults run.name=demo        the engine is killed again and again under load
    python -m benchmarks.shared_engine replicas OLD run.name=demo  four replicas, by this build and by another checkout

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
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
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
DEFAULT_RATIO = 0.2
REQUESTS = 700
CLIENTS = 48
REPLICAS = 4
MAX_TOKENS = 24
MIXES = {"one": [1.0], "hot": [0.9], "zipf": [1 / rank for rank in range(1, 20)], "uniform": [1.0] * 20}
"""Shares of the models, in their order; what is left of 1 is spread evenly over the others."""
LONG_PREFIX = "the answer to the question before this one was wrong, so think of it as long as you need to. "
"""Beginning of a prompt that is long enough for the prefix cache to hold it."""
METRICS_S = 12
"""Seconds after which metrics are those of now: Ray's agents collect every ten."""
KILLS = 12
SWAPS = 10

Request = tuple[str, str]
"""The model that a request names, and its prompt."""


def main(arguments: Sequence[str]) -> None:
    """Measure what the first argument names, or the service under load."""
    if arguments and arguments[0] == "swap":
        measure_swaps(load_config(arguments[1:]))
    elif arguments and arguments[0] == "faults":
        measure_faults(arguments[1:])
    elif arguments and arguments[0] == "replicas":
        measure_replicas(Path(arguments[1]), arguments[2:])
    else:
        measure_mixes(arguments)


# --- the service under load ------------------------------------------------------------------------------------------


def measure_mixes(arguments: Sequence[str]) -> None:
    """Print a line for every kind of service and mix of traffic, and how many replies are the same."""
    config = load_config(arguments)
    models = served_models(config)
    # Engines of their own share two cores.
    share_of_cpus = min(0.25, 2 / len(models))
    ratio = f"serve.ratio={config.serve.ratio or DEFAULT_RATIO}"
    settings_by_mode = {
        "shared": ["serve.packing=shared", "serve.num_cpus=1", ratio],
        "separate": ["serve.packing=separate", f"serve.num_cpus={share_of_cpus:.2f}", ratio],
        "dense": ["serve.ratio=0", "serve.experts=[]", "serve.num_cpus=1"],
    }
    replies: dict[str, list[str]] = {mode: [] for mode in settings_by_mode}

    for mode, settings in settings_by_mode.items():
        with DeployedService([*arguments, *settings]) as service:
            for mix, shares in MIXES.items():
                requests = traffic(models, shares)
                if mode == "dense":
                    # The dense model answers everything.
                    requests = [(GENERAL, prompt) for _, prompt in requests]
                swaps_before = service.swaps()
                load = asyncio.run(send_all(service.url, requests))
                replies[mode] += load.replies
                measured = {
                    "mode": mode,
                    "mix": mix,
                    "requests/s": REQUESTS / load.seconds,
                    "p50 s": load.waits[len(load.waits) // 2],
                    "p99 s": load.waits[int(len(load.waits) * 0.99)],
                    "swaps": service.swaps() - swaps_before,
                    "start s": service.start_s,
                    "memory MB": service.memory() / 1e6,
                }
                print(json.dumps(measured), flush=True)

    n_same = _n_equal(replies["shared"], replies["separate"])
    print(f"{n_same} of {len(replies['shared'])} replies of the shared engine are those of an engine each")


def measure_replicas(old: Path, arguments: Sequence[str]) -> None:
    """Print swaps and waits of a shared engine of several replicas under even traffic, few clients and many."""
    models = served_models(load_config(arguments))
    settings = [f"serve.{kind}_replicas={REPLICAS}" for kind in ("min", "max")]
    settings += ["serve.packing=shared", f"serve.num_cpus={2 / REPLICAS}"]
    for build in (old, ROOT):
        with DeployedService([*arguments, *settings], build) as service:
            for clients in (REPLICAS, CLIENTS):
                before = service.swaps()
                load = asyncio.run(send_all(service.url, traffic(models, MIXES["uniform"]), clients=clients))
                measured = {
                    "build": str(build),
                    "clients": clients,
                    "requests": len(load.replies),
                    "requests/s": len(load.replies) / load.seconds,
                    "p50 s": load.waits[len(load.waits) // 2],
                    "p99 s": load.waits[int(len(load.waits) * 0.99)],
                    "swaps per 1,000": 1000 * (service.swaps() - before) / len(load.replies),
                }
                print(json.dumps(measured), flush=True)


def served_models(config: Config) -> list[str]:
    """Return the general model and the experts of the config's tasks that the run has."""
    names = {folder.name for folder in _expert_folders(config)}
    tasks = {task.name for task in config.tasks}
    return [GENERAL, *sorted(names & tasks)]


def _expert_folders(config: Config) -> list[Path]:
    """Return the folders of all finished checkpoints of the ratio that is served, sorted."""
    experts = Path(str(Run.of(config).experts(config.serve.ratio or DEFAULT_RATIO)))
    return [path.parent for path in sorted(experts.glob("*/seap.json"))]


def traffic(models: list[str], shares: list[float]) -> list[Request]:
    """Return which model each request names, and its prompt: of any task, so that all models see all kinds."""
    rng = random.Random(0)
    # More shares than models are cut off.
    weights = shares[: len(models)]
    n_others = len(models) - len(weights)
    if n_others:
        weights = [*weights, *([(1 - sum(shares)) / n_others] * n_others)]

    prompts: list[str] = []
    for task in TASKS:
        prompts += [row["question"] for row in skills.rows(task, 40, split="test", seed=1)]
    return [(rng.choices(models, weights)[0], rng.choice(prompts)) for _ in range(REQUESTS)]


@dataclass(frozen=True)
class LoadResult:
    """What came of many requests."""

    replies: list[str]
    seconds: float
    """Seconds for all of them."""
    waits: list[float]
    """Seconds of each, sorted."""


async def send_all(
    url: str,
    requests: Sequence[Request],
    meanwhile: Coroutine[Any, Any, None] | None = None,
    *,
    clients: int = CLIENTS,
) -> LoadResult:
    """Send requests, as many at a time as there are clients, while ``meanwhile`` runs."""
    turn = asyncio.Semaphore(clients)
    waits: list[float] = []
    headers = {"authorization": f"Bearer {KEY}"}

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600) as http:

        async def send(model: str, prompt: str) -> str:
            """Send one request when it is its turn, and return its reply."""
            body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
            async with turn:
                started = time.perf_counter()
                reply = await http.post("/v1/completions", json=body)
                waits.append(time.perf_counter() - started)
            assert reply.status_code == 200 and reply.json()["model"] == model, reply.text
            return reply.json()["choices"][0]["text"]

        started = time.perf_counter()
        replies = asyncio.gather(*(send(*request) for request in requests))
        if meanwhile:
            await meanwhile
        return LoadResult(await replies, time.perf_counter() - started, sorted(waits))


def _n_equal(replies: Sequence[str], others: Sequence[str]) -> int:
    """Return how many replies are the same as those in another list, one by one."""
    return sum(reply == other for reply, other in zip(replies, others, strict=True))


class DeployedService:
    """``jobs/deploy.py`` as a process of its own, until the block ends."""

    def __init__(self, arguments: Sequence[str], build: Path = ROOT):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        self.url = f"http://127.0.0.1:{port}"
        settings = [f"serve.port={port}", "serve.max_queued_requests=1000"]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "jobs/deploy.py", *arguments, *settings],
            cwd=build,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_ADDRESS": "local", "SEAP_API_KEYS": KEY, "PYTHONPATH": str(build)},
        )
        assert self.process.stdout
        # The line that the service prints when it is ready.
        for line in self.process.stdout:
            if "are served at" in line or "is served at" in line:
                break

        assert self.process.poll() is None
        self.start_s = time.perf_counter() - started

    def __enter__(self) -> "DeployedService":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def memory(self) -> int:
        """Return the bytes of the engines and their servers; what processes share is divided among them."""
        names = ("ExpertServer", "SharedEngineServer", "EngineCore")
        n_bytes = 0
        for process in self._children():
            if any(name in _command_line(process) for name in names):
                n_bytes += process.memory_full_info().pss
        return n_bytes

    def swaps(self) -> float:
        """Return the number of swaps so far."""
        return self.metric("seap_swaps_total")

    def metric(self, name: str) -> float:
        """Return the value of a counter of the service, summed over its labels."""
        time.sleep(METRICS_S)
        page = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=60).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name}{{"))

    def engines(self) -> list[psutil.Process]:
        """Return the processes of vLLM's engines."""
        return [process for process in self._children() if "EngineCore" in _command_line(process)]

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


# --- faults ----------------------------------------------------------------------------------------------------------


def measure_faults(arguments: Sequence[str]) -> None:
    """Ask every model in turns, half of the prompts with a beginning in common; then again while engines die."""
    models = served_models(load_config(arguments))
    prompts: list[str] = []
    # Twenty prompts, with and without the beginning.
    for _, prompt in traffic(models[:1], [1.0])[:20]:
        prompts += [prompt, LONG_PREFIX + prompt]
    requests = [*itertools.product(models, prompts)] * 10
    # Every eleventh: 11 and the length have no common divisor, so that each request comes once.
    requests = [requests[i * 11 % len(requests)] for i in range(len(requests))]

    settings = ["serve.packing=shared", "serve.num_cpus=1", "serve.engine.block_size=32"]
    with DeployedService([*arguments, *settings]) as service:
        first = asyncio.run(send_all(service.url, requests))
        reply_of = dict(zip(requests, first.replies, strict=True))
        # A prompt has one reply, whatever was in the engine before.
        expected = [reply_of[request] for request in requests]
        n_same = _n_equal(first.replies, expected)
        queries = service.metric("ray_vllm_prefix_cache_queries_total")
        hits = service.metric("ray_vllm_prefix_cache_hits_total")
        print(
            f"{n_same} of {len(requests)} replies are those of the same prompt and expert, in "
            f"{service.swaps():.0f} swaps;"
        )
        print(f"{hits:,.0f} of {queries:,.0f} tokens of prompts came from the prefix cache")

        again = asyncio.run(send_all(service.url, requests, kill_engines(service, KILLS)))
        n_same = _n_equal(again.replies, expected)
        print(
            f"{n_same} of {len(requests)} are, too, in {again.seconds:.0f} s while its engine was killed {KILLS} times"
        )


async def kill_engines(service: DeployedService, kills: int) -> None:
    """Kill engines at work, in a swap or while they start: after 0.05 to 4 s, every third after 6 to 12."""
    rng = random.Random(3)
    for i in range(kills):
        await asyncio.sleep(rng.uniform(0.05, 4) if i % 3 else rng.uniform(6, 12))
        killed = service.engines()
        for engine in killed:
            engine.kill()
        # The next kill is of another engine.
        killed_ids = {engine.pid for engine in killed}
        while not {engine.pid for engine in service.engines()} - killed_ids:
            await asyncio.sleep(0.1)


# --- swaps alone -----------------------------------------------------------------------------------------------------


def measure_swaps(config: Config) -> None:
    """Print the seconds of a swap, of copying the same bytes, and of gathering them from the dense model in memory."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    from seap_ray.vllm_plugin.plugin import LOAD_FORMAT

    folders = [folder for folder in _expert_folders(config) if not _is_baseline(folder)][:2]
    files = sorted(folders[0].glob("*.safetensors"))
    n_bytes = sum(file.stat().st_size for file in files if not file.name.startswith(SHARED))
    copied = torch.empty(n_bytes, dtype=torch.uint8)
    source = torch.ones(n_bytes, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {}

    # Our loader reads what differs, vLLM's own everything.
    for load_format in (LOAD_FORMAT, "auto"):
        llm = LLM(
            str(folders[0]),
            dtype=config.model.dtype,
            enforce_eager=True,
            load_format=load_format,
            max_model_len=64,
            kv_cache_memory_bytes=1 << 26,
        )
        for i in range(SWAPS):
            _time(seconds, "copy of the same bytes", partial(copied.copy_, source))
            # Back and forth between two experts.
            target = {"weights_path": str(folders[(i + 1) % 2])}
            _time(seconds, load_format, partial(llm.collective_rpc, "reload_weights", kwargs=target))
        del llm  # before the next one is there

    gather = _gather_from_dense(config, folders[0].name)
    for _ in range(SWAPS):
        _time(seconds, "gather from the dense model in memory", gather)

    report: dict[str, Any] = {
        "MB moved": n_bytes / 1e6,
        "MB of all": sum(file.stat().st_size for file in files) / 1e6,
    }
    print(json.dumps(report | _rates(seconds, n_bytes), indent=2))


def _is_baseline(folder: Path) -> bool:
    """Return whether a checkpoint is a baseline, which is not served."""
    return read_json(folder / "seap.json")["plan"]["kind"] == "baseline"


def _rates(seconds: Mapping[str, list[float]], n_bytes: int) -> dict[str, dict[str, float]]:
    rates: dict[str, dict[str, float]] = {}
    for name, times in seconds.items():
        rates[name] = {"median ms": 1e3 * median(times), "MB/s": n_bytes / median(times) / 1e6}
    return rates


def _gather_from_dense(config: Config, expert: str) -> Callable[[], None]:
    """Return a call that gathers an expert's rows and columns of every cut module from dense tensors in memory."""
    from safetensors.torch import load_file

    base = Checkpoint.open(config.model.source)
    architecture = base.architecture
    plan_file = Run.of(config).plan(config.serve.ratio or DEFAULT_RATIO, expert).with_suffix(".safetensors")
    indices = load_file(str(plan_file))
    tensors = {name: base.read(name) for name in base.tensors}

    def gather() -> None:
        """Gather layer by layer."""
        for layer in range(architecture.n_layers):
            groups, heads, channels = (
                tuple(indices[f"layers.{layer}.{unit}"].tolist()) for unit in ("groups", "heads", "channels")
            )
            kept = Kept(groups, heads, (channels,))
            for module in (*architecture.family.rows, *architecture.family.columns):
                dense = tensors[architecture.tensor(layer, module)]
                torch.cat([*slice_tensor(architecture, layer, module, "weight", dense, kept)])

    return gather


def _time(seconds: dict[str, list[float]], name: str, work: Callable[[], object]) -> None:
    """Add the seconds of a call to those of its name."""
    started = time.perf_counter()
    work()
    seconds.setdefault(name, []).append(time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1:])
