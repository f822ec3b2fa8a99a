"""Route: what the endpoint and its router add to a request, and what an expert saves: the same model in vLLM's own
server, dense and cut, beside ours, which picks the expert by the prompt. Every engine has one thread.

The model is that of the suite ``serve``; the run and the service are made by the jobs, as a user makes them.
"""

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import httpx
from transformers import AutoTokenizer

from benchmarks.measure import Rounds, Row, alternate
from benchmarks.serve import dense
from benchmarks.startup import JOBS, run_python
from seap_ray.config import Config, load_config
from seap_ray.demo import skills
from seap_ray.errors import IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.routing.router import Router
from seap_ray.storage.run import Run

SUITE, KEY = "route", "a-key-of-this-benchmark"
TASKS, RATIO = ("facts", "logic"), 0.5
PAIRS, LONG = 200, 20
"""Rounds of single requests: of one token, and of whole replies."""
TOKENS = 48
"""Of a whole reply."""
CLIENTS, REQUESTS = 16, 32
"""Of a crowd: how many ask at a time, and how many requests they have in all."""
START_S, STOP_S = 300, 120
"""Seconds that a server has to start, and to end."""
KV_CACHE_BYTES = 1 << 28
"""Of every engine; enough for all clients."""


def rows(config: Config) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        base = _base(Path(folder) / "base")
        made = _config(Path(folder), base)
        run_python([str(JOBS / "prune.py"), *made])
        run, task = Run.of(load_config(made)), TASKS[0]
        expert, prompts = Path(str(run.expert(RATIO, task))), _prompts(task)
        urls = {
            "ours": running.enter_context(_ours(made)),
            "expert": running.enter_context(_vllm(expert)),
            "dense": running.enter_context(_vllm(base)),
        }
        yield _router_row(Router.load(run.router), prompts)
        first = _latencies(urls, prompts, {"expert": str(expert), "ours": task, "auto": "auto"}, 1, PAIRS)
        yield from _first_rows(first)
        whole = _latencies(urls, prompts, {"expert": str(expert), "dense": str(base), "auto": "auto"}, TOKENS, LONG)
        yield from _whole_rows(first, whole)
        yield from _crowd_rows(urls, prompts, {"expert": str(expert), "dense": str(base), "auto": "auto"}, config)


# --- rows ------------------------------------------------------------------------------------------------------------


def _router_row(router: Router, prompts: list[str]) -> Row:
    found = alternate({"route": lambda: [router.route(prompt) for prompt in prompts]}, 5)
    of_one = 1e3 / len(prompts)
    return Row.of(SUITE, "the router alone, a prompt", ours=of_one * found.median("route"), unit="ms")


def _first_rows(first: Rounds) -> Iterator[Row]:
    for name, baseline, told in (
        ("ours", "expert", "the expert named, beside vLLM's own server"),
        ("auto", "ours", "auto, beside the expert named"),
    ):
        yield Row.of(
            SUITE,
            f"a request of one token, {told}",
            baseline=1e3 * first.median(baseline),
            ours=1e3 * first.median(name),
            unit="ms",
            ratios=first.ratios(name, baseline),
        )
    added = _added(first, "ours")
    yield Row.of(SUITE, "added by the router, median of pairs", ours=median(added), unit="ms", target="ours <= 2")
    yield Row.of(SUITE, "added by the router, standard error", ours=_standard_error(added), unit="ms")
    endpoint = median(_added(first, "expert"))
    yield Row.of(SUITE, "added by endpoint and router, median of pairs", ours=endpoint, unit="ms")


def _added(first: Rounds, baseline: str) -> list[float]:
    """Milliseconds that ``auto`` takes more, pair by pair."""
    pairs = zip(first.seconds["auto"], first.seconds[baseline], strict=True)
    return [1e3 * (auto - other) for auto, other in pairs]


def _standard_error(values: Sequence[float]) -> float:
    """Of a median, as of normal values: their spread by quartiles."""
    low, _, high = quantiles(values, n=4)
    return 1.2533 * (high - low) / 1.349 / len(values) ** 0.5


def _whole_rows(first: Rounds, whole: Rounds) -> Iterator[Row]:
    yield Row.of(
        SUITE,
        f"a reply of {TOKENS} tokens: auto, experts cut by {RATIO:.0%}, beside vLLM's own server with the dense model",
        baseline=TOKENS / whole.median("dense"),
        ours=TOKENS / whole.median("auto"),
        unit="tokens/s",
        ratios=whole.speedups("auto", "dense"),
        limit=TOKENS / whole.median("expert"),
        limit_name="the expert in vLLM's own server",
    )
    saved = 1e3 * (whole.median("dense") - whole.median("expert")) / TOKENS
    yield Row.of(
        SUITE,
        "tokens after which the expert has earned what endpoint and router add",
        ours=median(_added(first, "expert")) / saved,
        unit="tokens",
    )


def _crowd_rows(
    urls: Mapping[str, str], prompts: list[str], models: Mapping[str, str], config: Config
) -> Iterator[Row]:
    contestants = {
        name: partial(_crowd, urls["ours" if name == "auto" else name], model, prompts)
        for name, model in models.items()
    }
    found = alternate(contestants, config.benchmarks.rounds)
    for baseline, told in (("dense", "the dense model"), ("expert", "the same expert")):
        yield Row.of(
            SUITE,
            f"{CLIENTS} clients, replies of {TOKENS} tokens: auto, beside vLLM's own server with {told}",
            baseline=REQUESTS * TOKENS / found.median(baseline),
            ours=REQUESTS * TOKENS / found.median("auto"),
            unit="tokens/s",
            ratios=found.speedups("auto", baseline),
        )


# --- requests --------------------------------------------------------------------------------------------------------


def _latencies(
    urls: Mapping[str, str], prompts: list[str], models: Mapping[str, str], tokens: int, rounds: int
) -> Rounds:
    """Seconds of single requests, one at a time."""
    with ExitStack() as opened:
        contestants: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            url = urls["ours" if name == "auto" else name]
            http = opened.enter_context(httpx.Client(base_url=url, headers=_headers(), timeout=300))
            contestants[name] = partial(_ask, http, model, itertools.cycle(prompts), tokens)
        return alternate(contestants, rounds)


def _ask(http: httpx.Client, model: str, prompts: Iterator[str], tokens: int) -> None:
    with _answering():
        _check(http.post("/v1/completions", json=_body(model, next(prompts), tokens)))


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise IncompleteError(f"route: a server does not answer ({type(error).__name__} {error})") from None


def _crowd(url: str, model: str, prompts: list[str]) -> None:
    async def client(http: httpx.AsyncClient, todo: Iterator[str]) -> None:
        for prompt in todo:
            _check(await http.post("/v1/completions", json=_body(model, prompt, TOKENS)))

    async def clients() -> None:
        async with httpx.AsyncClient(base_url=url, headers=_headers(), timeout=300) as http:
            todo = itertools.islice(itertools.cycle(prompts), REQUESTS)
            await asyncio.gather(*(client(http, todo) for _ in range(CLIENTS)))

    with _answering():
        asyncio.run(clients())


def _headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def _body(model: str, prompt: str, tokens: int) -> dict[str, object]:
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def _check(reply: httpx.Response) -> None:
    if reply.status_code != 200:
        raise IncompleteError(f"route: a request was answered with {reply.status_code}: {reply.text[:200]}")
    if (told := reply.headers.get("x-seap-expert", TASKS[0])) != TASKS[0]:
        raise IncompleteError(f"route: a prompt of {TASKS[0]} went to {told}, so there is nothing to compare")


def _prompts(task: str) -> list[str]:
    return [row["question"] for row in skills.rows(task, 100, split="test", seed=1)]


# --- the run and the servers -----------------------------------------------------------------------------------------


def _base(folder: Path) -> Path:
    dense(folder)
    AutoTokenizer.from_pretrained(Checkpoint.open("demo").folder).save_pretrained(folder)
    return folder


def _config(folder: Path, base: Path) -> list[str]:
    settings = {
        "run.storage": str(folder),
        "run.name": "route",
        "model.source": str(base),
        "model.dtype": "bfloat16",
        "tasks": TASKS,
        "corpus.samples": 200,
        "calibration.statistics": "moments",
        "pruning.score": "wifv",
        "pruning.compensation": "mean",
        "pruning.ratio": RATIO,
        "pruning.baselines": {},
        "evaluation.samples": 0,
        "serve.experts": TASKS[:1],
        "serve.packing": "separate",
        "serve.num_cpus": 1,
        "serve.router.threshold": 0,
        "serve.engine.enable_prefix_caching": False,
        "serve.engine.kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "RAY_ADDRESS": "local",
        "SEAP_API_KEYS": KEY,
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a server of vLLM then computes in its core's process, as ours do
    }


def _ours(arguments: list[str]) -> AbstractContextManager[str]:
    port = _free_port()
    return _served([sys.executable, str(JOBS / "deploy.py"), *arguments, f"serve.port={port}"], port, "/readyz")


def _vllm(folder: Path) -> AbstractContextManager[str]:
    port = _free_port()
    options = ["--enforce-eager", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    server = "vllm.entrypoints.openai.api_server"  # the command `vllm` does not know its build for CPUs
    command = [sys.executable, "-m", server, "--model", str(folder), "--host", "127.0.0.1"]
    return _served([*command, "--port", str(port), *options], port, "/health")


@contextmanager
def _served(command: list[str], port: int, ready: str) -> Iterator[str]:
    """A server as a process of its own, once it is ready, by its address."""
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=JOBS.parent, env=_environment(), stdout=log, stderr=log)
        try:
            while not _is_ready(f"{url}{ready}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    told = log.read().decode(errors="replace")[-500:]
                    raise IncompleteError(f"route: {' '.join(command[:3])} did not start: {told}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
