"""Route: what the endpoint and its router add to a request, and what an expert saves.

The same model in vLLM's own server, dense and cut, stands beside our service, which picks the expert by the prompt.
Every engine has one thread. The model is that of the suite ``serve``; the run and the service are made by the jobs, as
a user makes them.
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
from benchmarks.serve import save_dense
from benchmarks.startup import JOBS, run_python
from seap_ray.config import Config, load_config
from seap_ray.demo import skills
from seap_ray.errors import IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.routing.router import Router
from seap_ray.storage.run import Run

SUITE = "route"
KEY = "a-key-of-this-benchmark"
TASKS = ("facts", "logic")
RATIO = 0.5
TOKEN_ROUNDS = 200
"""Rounds of single requests of one token."""
REPLY_ROUNDS = 20
"""Rounds of single requests of whole replies."""
TOKENS = 48
"""Tokens of a whole reply."""
CLIENTS = 16
"""Clients of a crowd, which ask at the same time."""
REQUESTS = 32
"""Requests that a crowd has in all."""
START_S = 300
"""Seconds that a server has to start."""
STOP_S = 120
"""Seconds that a server has to end."""
KV_CACHE_BYTES = 1 << 28
"""Bytes of every engine's keys and values; enough for all clients."""


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows: the router alone, requests of one token, whole replies, a crowd."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        base = _save_base(Path(folder) / "base")
        settings = _settings(Path(folder), base)
        run_python([str(JOBS / "prune.py"), *settings])
        run = Run.of(load_config(settings))
        # One expert is served beside the general model; the other task is what the router tells it from.
        task = TASKS[0]
        expert = Path(str(run.expert(RATIO, task)))
        prompts = _prompts(task)
        urls = {
            "ours": running.enter_context(_our_service(settings)),
            "expert": running.enter_context(_vllm_server(expert)),
            "dense": running.enter_context(_vllm_server(base)),
        }

        yield _router_row(Router.load(run.router), prompts)
        # In our service an expert has its task's name, in vLLM's own server the folder's.
        named = {"expert": str(expert), "ours": task, "auto": "auto"}
        first = _latencies(urls, prompts, named, 1, TOKEN_ROUNDS)
        yield from _first_rows(first)
        models = {"expert": str(expert), "dense": str(base), "auto": "auto"}
        yield from _reply_rows(first, _latencies(urls, prompts, models, TOKENS, REPLY_ROUNDS))
        yield from _crowd_rows(urls, prompts, models, config)


# --- rows ------------------------------------------------------------------------------------------------------------


def _router_row(router: Router, prompts: list[str]) -> Row:
    timings = alternate({"route": lambda: [router.route(prompt) for prompt in prompts]}, 5)
    ms_per_prompt = 1e3 * timings.median("route") / len(prompts)
    return Row.of(SUITE, "the router alone, a prompt", ours=ms_per_prompt, unit="ms")


def _first_rows(first: Rounds) -> Iterator[Row]:
    """Yield what endpoint and router add to a request of one token."""
    for name, baseline, compared in (
        ("ours", "expert", "the expert named, beside vLLM's own server"),
        ("auto", "ours", "auto, beside the expert named"),
    ):
        yield Row.of(
            SUITE,
            f"a request of one token, {compared}",
            baseline=1e3 * first.median(baseline),
            ours=1e3 * first.median(name),
            unit="ms",
            ratios=first.ratios(name, baseline),
        )

    added = _added_ms(first, "ours")
    yield Row.of(SUITE, "added by the router, median of pairs", ours=median(added), unit="ms", target="ours <= 2")
    yield Row.of(SUITE, "added by the router, standard error", ours=_standard_error(added), unit="ms")
    endpoint = median(_added_ms(first, "expert"))
    yield Row.of(SUITE, "added by endpoint and router, median of pairs", ours=endpoint, unit="ms")


def _added_ms(first: Rounds, baseline: str) -> list[float]:
    """Return the milliseconds that ``auto`` takes more than a baseline, pair by pair."""
    pairs = zip(first.seconds["auto"], first.seconds[baseline], strict=True)
    return [1e3 * (auto - other) for auto, other in pairs]


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the values' median, as if they were normal: their spread is taken by quartiles."""
    low, _, high = quantiles(values, n=4)
    # A normal's quartiles are 1.349 deviations apart, and a median's error is 1.2533 times a mean's.
    return 1.2533 * (high - low) / 1.349 / len(values) ** 0.5


def _reply_rows(first: Rounds, whole: Rounds) -> Iterator[Row]:
    """Yield the speed of whole replies, and after how many tokens an expert has earned what the endpoint adds."""
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
    # What the cut saves in every token of a reply.
    saved_ms = 1e3 * (whole.median("dense") - whole.median("expert")) / TOKENS

    yield Row.of(
        SUITE,
        "tokens after which the expert has earned what endpoint and router add",
        ours=median(_added_ms(first, "expert")) / saved_ms,
        unit="tokens",
    )


def _crowd_rows(
    urls: Mapping[str, str], prompts: list[str], models: Mapping[str, str], config: Config
) -> Iterator[Row]:
    """Yield the throughput that many clients see at a time."""
    contestants: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        contestants[name] = partial(_send_crowd, _url(urls, name), model, prompts)
    timings = alternate(contestants, config.benchmarks.rounds)

    for baseline, compared in (("dense", "the dense model"), ("expert", "the same expert")):
        yield Row.of(
            SUITE,
            f"{CLIENTS} clients, replies of {TOKENS} tokens: auto, beside vLLM's own server with {compared}",
            baseline=REQUESTS * TOKENS / timings.median(baseline),
            ours=REQUESTS * TOKENS / timings.median("auto"),
            unit="tokens/s",
            ratios=timings.speedups("auto", baseline),
        )


# --- requests --------------------------------------------------------------------------------------------------------


def _url(urls: Mapping[str, str], name: str) -> str:
    """Return the address of a contestant; ``auto`` is a model of our service."""
    return urls["ours" if name == "auto" else name]


def _latencies(
    urls: Mapping[str, str], prompts: list[str], models: Mapping[str, str], tokens: int, rounds: int
) -> Rounds:
    """Return the seconds of single requests, one at a time."""
    with ExitStack() as clients:
        contestants: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            http = clients.enter_context(httpx.Client(base_url=_url(urls, name), headers=_headers(), timeout=300))
            contestants[name] = partial(_ask, http, model, itertools.cycle(prompts), tokens)
        return alternate(contestants, rounds)


def _ask(http: httpx.Client, model: str, prompts: Iterator[str], tokens: int) -> None:
    with _transport_errors():
        _check(http.post("/v1/completions", json=_body(model, next(prompts), tokens)))


@contextmanager
def _transport_errors() -> Iterator[None]:
    """Turn errors of HTTP inside the block into IncompleteError."""
    try:
        yield
    except httpx.HTTPError as error:
        raise IncompleteError(f"route: a server does not answer ({type(error).__name__} {error})") from None


def _send_crowd(url: str, model: str, prompts: list[str]) -> None:
    """Send all requests of a crowd, and wait for the replies."""

    async def ask(http: httpx.AsyncClient, waiting: Iterator[str]) -> None:
        """Be one client: take a prompt after the other until none waits."""
        for prompt in waiting:
            _check(await http.post("/v1/completions", json=_body(model, prompt, TOKENS)))

    async def ask_all() -> None:
        """Run all clients at the same time."""
        async with httpx.AsyncClient(base_url=url, headers=_headers(), timeout=300) as http:
            # All clients take from one iterator, so that none is idle while requests are left.
            waiting = itertools.islice(itertools.cycle(prompts), REQUESTS)
            await asyncio.gather(*(ask(http, waiting) for _ in range(CLIENTS)))

    with _transport_errors():
        asyncio.run(ask_all())


def _headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


def _body(model: str, prompt: str, tokens: int) -> dict[str, object]:
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def _check(reply: httpx.Response) -> None:
    """Raise IncompleteError for a reply that is an error, or of another expert."""
    if reply.status_code != 200:
        raise IncompleteError(f"route: a request was answered with {reply.status_code}: {reply.text[:200]}")
    expert = reply.headers.get("x-seap-expert", TASKS[0])  # vLLM's own server names none
    if expert != TASKS[0]:
        raise IncompleteError(f"route: a prompt of {TASKS[0]} went to {expert}, so there is nothing to compare")


def _prompts(task: str) -> list[str]:
    return [row["question"] for row in skills.rows(task, 100, split="test", seed=1)]


# --- the run and the servers -----------------------------------------------------------------------------------------


def _save_base(folder: Path) -> Path:
    """Write the dense model with the demo's tokenizer."""
    save_dense(folder)
    AutoTokenizer.from_pretrained(Checkpoint.open("demo").folder).save_pretrained(folder)
    return folder


def _settings(folder: Path, base: Path) -> list[str]:
    """Return the run's and the service's settings as arguments of the jobs."""
    settings = {
        "run.storage": str(folder),
        "run.name": "route",
        "model.source": str(base),
        "model.dtype": "bfloat16",
        "tasks": TASKS,
        "corpus.samples": 200,
        "calibration.statistics": "moments",
        # What can be made of moments; covariances would take longer than the rest.
        "pruning.score": "wifv",
        "pruning.compensation": "mean",
        "pruning.ratio": RATIO,
        "pruning.baselines": {},
        "evaluation.samples": 0,
        "serve.experts": TASKS[:1],
        "serve.packing": "separate",
        "serve.num_cpus": 1,
        # The router never falls back to the general model.
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


def _our_service(arguments: list[str]) -> AbstractContextManager[str]:
    port = _free_port()
    command = [sys.executable, str(JOBS / "deploy.py"), *arguments, f"serve.port={port}"]
    return _running(command, port, "/readyz")


def _vllm_server(folder: Path) -> AbstractContextManager[str]:
    port = _free_port()
    options = ["--enforce-eager", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    server = "vllm.entrypoints.openai.api_server"  # the command `vllm` does not know its build for CPUs
    command = [sys.executable, "-m", server, "--model", str(folder), "--host", "127.0.0.1"]
    return _running([*command, "--port", str(port), *options], port, "/health")


@contextmanager
def _running(command: list[str], port: int, ready_path: str) -> Iterator[str]:
    """Start a server as a process of its own, and yield its address once it is ready."""
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_S
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=JOBS.parent, env=_environment(), stdout=log, stderr=log)
        try:
            # It may end before it is ready, or never be.
            while not _is_ready(f"{url}{ready_path}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last_output = log.read().decode(errors="replace")[-500:]
                    raise IncompleteError(f"route: {' '.join(command[:3])} did not start: {last_output}")
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
    with socket.socket() as probe:
        # The system chooses; the port is free again when the socket is closed.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
