"""python -m benchmarks.endpoint_overhead [config=ray_config.yaml] [dotted.key=value ...]

What routing adds to a request, and how much of an engine's throughput reaches a client of the HTTP endpoint.

Serves the general model and one expert of a finished run on this machine, then, in turns, so that the machine's moods
fall on both sides:
  * single requests of one token with the expert named and with `auto`: the difference is the router;
  * many clients at a time through HTTP and by Serve's own handle of the engine's deployment: the ratio is the ingress.

With PIN=1 the engines keep the first core to themselves, as where they have a device of their own.
"""

import asyncio
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import psutil
from ray import serve
from ray.serve.llm.openai_api_models import ChatCompletionRequest

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.cluster import connect
from seap_ray.pipeline.shards import Manifest
from seap_ray.storage.run import Run
from serve.application import application, prepare
from serve.deployment import NAME, _await_ready
from serve.engines import engine_groups
from serve.gate import prepare_environment

KEY = "a-key-of-the-benchmark"
PAIRS = 300
"""Pairs of single requests."""
WARM_UPS = 20
"""Pairs before those that count."""
ROUNDS = 5
CLIENTS = 48
REQUESTS = 144
TOKENS = (16, 112)
"""Shortest and longest reply; replies of one length would end together, and the engine wait for the next wave."""
SETTINGS = ["serve.num_cpus=0.25", "serve.max_ongoing_requests=64", "serve.packing=separate"]


def main(arguments: list[str]) -> None:
    """Start the service, measure, print the results as JSON, and stop the service."""
    config = load_config([*SETTINGS, *arguments])
    task = (config.serve.experts or [config.tasks[0].name])[0]
    # One expert and the general model, whatever the config serves.
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"experts": (task,)})})
    run = Run.of(config)
    manifest = Manifest.read(run.shards(task))
    if manifest is None:
        raise ConfigError(f"{run.root}: {task} has no shards; make the run first")
    prompts = manifest.read_prompts(run)

    # Before the service is prepared, which reads it.
    os.environ["SEAP_API_KEYS"] = KEY
    service = prepare(config)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    prepare_environment()
    connect("local")
    # The same steps as in a deployment, but this process goes on.
    groups, _ = engine_groups(config, service.experts)
    serve.start(http_options={"port": config.serve.port})
    target = serve.RunTarget(application(config, service, groups), name=NAME)
    serve.run_many([target], wait_for_applications_running=False)
    _await_ready([group.name for group in groups])
    if os.environ.get("PIN"):
        pin()
    print(json.dumps(asyncio.run(measure(f"http://127.0.0.1:{config.serve.port}", task, prompts)), indent=2))
    serve.shutdown()


def pin() -> None:
    """Keep engines on the first core and all else on the others, as where an engine has a device of its own."""
    first, *others = sorted(psutil.Process().cpu_affinity())
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        is_engine = "EngineCore" in command
        if is_engine or "ray::" in command or "raylet" in command or process.pid == os.getpid():
            for thread in process.threads():
                os.sched_setaffinity(thread.id, [first] if is_engine else others)


async def measure(url: str, task: str, prompts: list[str]) -> dict[str, Any]:
    """Measure routing and throughput at an address."""
    headers = {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0)  # as many connections as there are clients
    async with aiohttp.ClientSession(url, headers=headers, connector=connector) as http:
        return {
            "routing_ms": await routing(http, task, prompts),
            "throughput": {
                "streams": await throughput(http, task, prompts, stream=True),
                "whole_replies": await throughput(http, task, prompts, stream=False),
            },
        }


def chat_body(model: str, prompt: str, n_tokens: int, **more: Any) -> dict[str, Any]:
    """Return the body of a chat with a greedy reply of ``n_tokens``."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": n_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def routing(http: aiohttp.ClientSession, task: str, prompts: list[str]) -> dict[str, Any]:
    """Return the milliseconds of a request of one token, one at a time, in pairs whose order alternates."""
    taken_ms: dict[str, list[float]] = {"auto": [], task: []}
    # Pairs below 0 warm up.
    for i in range(-WARM_UPS, PAIRS):
        prompt = prompts[i % len(prompts)]
        # Who comes first alternates, so that neither always finds a warm cache.
        for model in (("auto", task), (task, "auto"))[i % 2]:
            started = time.perf_counter()
            async with http.post("/v1/chat/completions", json=chat_body(model, prompt, 1)) as reply:
                await reply.read()
                assert reply.status == 200, await reply.text()
            if i >= 0:
                taken_ms[model].append((time.perf_counter() - started) * 1e3)

    named = taken_ms[task]
    auto = taken_ms["auto"]
    added = [auto_ms - named_ms for auto_ms, named_ms in zip(auto, named, strict=True)]

    return {
        "named": _quantiles(named),
        "auto": _quantiles(auto),
        "added_p50": round(statistics.median(auto) - statistics.median(named), 2),
        "added_by_pair_p50": round(statistics.median(added), 2),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(values), 2), "p99": round(statistics.quantiles(values, n=100)[98], 2)}


async def throughput(http: aiohttp.ClientSession, task: str, prompts: list[str], *, stream: bool) -> dict[str, Any]:
    """Return the tokens per second of chats through HTTP and by the engine's handle, in turns."""
    handle: Any = serve.get_deployment_handle(f"ExpertServer:{task}", NAME).options(stream=True)

    async def by_http(prompt: str, n_tokens: int) -> None:
        """Ask the endpoint."""
        async with http.post("/v1/chat/completions", json=chat_body("auto", prompt, n_tokens, stream=stream)) as reply:
            text = await reply.read()
            assert reply.status == 200 and b"error" not in text, text[-300:]

    async def by_handle(prompt: str, n_tokens: int) -> None:
        """Ask the engine's deployment, past proxy and ingress."""
        request = ChatCompletionRequest(**chat_body(task, prompt, n_tokens, stream=stream))
        chunks = [chunk async for chunk in handle.chat.remote(request, None)]
        assert chunks and not hasattr(chunks[-1], "error"), chunks[-1]

    senders = {"http": by_http, "handle": by_handle}
    rates: dict[str, list[float]] = {name: [] for name in senders}
    for i in range(-1, ROUNDS):  # the first warms up
        for name in (("http", "handle"), ("handle", "http"))[i % 2]:
            rate = await _rate(senders[name], prompts)
            if i >= 0:
                rates[name].append(rate)

    ratios = [http_rate / rate for http_rate, rate in zip(rates["http"], rates["handle"], strict=True)]
    return {
        "clients": CLIENTS,
        "tokens_per_reply": TOKENS,
        **{f"{name}_tokens_per_s": round(statistics.median(rate)) for name, rate in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }


async def _rate(send: Callable[[str, int], Awaitable[None]], prompts: list[str]) -> float:
    """Return the tokens per second that all clients together receive."""
    # The same lengths in every round.
    lengths = [random.Random(i).randint(*TOKENS) for i in range(REQUESTS)]
    waiting = iter([(prompts[i % len(prompts)], length) for i, length in enumerate(lengths)])

    async def client() -> None:
        """Send one request after the other until none waits."""
        for prompt, length in waiting:
            await send(prompt, length)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sum(lengths) / (time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1:])
