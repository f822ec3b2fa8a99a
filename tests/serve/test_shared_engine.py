"""Several experts in one engine, served by ``jobs/deploy.py``: their replies, and what a kill does to them."""

import asyncio
import itertools
import re
import signal
import time
from collections import Counter

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import seap_ray.models.hf  # noqa: F401
from tests.support.browser import open_page, send
from tests.support.served import KEY, TASKS, Service, chat, command_of, questions

# The time of a test counts what its fixtures take: a run and a start, each at its longest.
pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

MODELS = ("general", *TASKS, "sort")
BEFORE = "the answer to the question before this one was wrong, so think of it as long as you need to. "
"""So long that the prefix cache holds it; to every expert it means something else."""
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def service(served_run, tmp_path_factory):
    more = {
        "serve.experts": list(MODELS[1:]),
        "serve.num_cpus": 1,
        "serve.max_queued_requests": 100,
        "serve.engine.block_size": 32,
        "serve.pack.max_wait_s": 0.2,
    }
    made = Service(served_run, tmp_path_factory.mktemp("service") / "log", **more)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def expected(served_run):
    """``expected[model, text]``: what transformers says, greedily."""
    found = {}
    for model in MODELS:
        folder = served_run / "experts" / "0.20" / model
        tokenizer = AutoTokenizer.from_pretrained(folder)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for text in TEXTS:
            ids = tokenizer.apply_chat_template(chat(text), return_tensors="pt", return_dict=False)
            with torch.inference_mode():
                out = reference.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False)[0, ids.shape[1] :]
            found[model, text] = tokenizer.decode(out, skip_special_tokens=True)
    return found


TEXTS = [before + text for before in ("", BEFORE) for task in TASKS for text in questions(task, 3)]


async def ask(http, model, text):
    body = {"model": model, "messages": chat(text), "max_tokens": MAX_TOKENS, "temperature": 0}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-seap-expert"] == reply.json()["model"] == model
    return reply.json()["choices"][0]["message"]["content"]


async def load(service, asked, concurrency=24, meanwhile=None):
    headers, turn = {"authorization": f"Bearer {KEY}"}, asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=600) as http:

        async def one(model, text):
            async with turn:
                return await ask(http, model, text)

        replies = [asyncio.ensure_future(one(*pair)) for pair in asked]
        if meanwhile:
            await meanwhile
        return await asyncio.gather(*replies)


def test_models_of_one_shape_have_one_engine_and_the_log_says_why(service):
    assert "one engine for 4 models of equal shapes: there is room for 1 engine" in service.log.read_text()
    assert len(service.processes("EngineCore")) == 1
    with service.http() as http:
        cards = {card["id"]: card["metadata"] for card in http.get("/v1/models").json()["data"]}
    assert [name for name in MODELS if cards[name]["resident"]] and all(cards[name]["up"] for name in MODELS)


def test_under_a_mixed_load_with_the_prefix_cache_every_reply_is_its_own_experts(service, expected):
    asked = [*itertools.product(MODELS, TEXTS)] * 6
    asked = [asked[i * 7 % len(asked)] for i in range(len(asked))]  # 7 and the length have no common divisor
    assert asyncio.run(load(service, asked)) == [expected[pair] for pair in asked]
    assert len(set(expected.values())) > len(TEXTS), "experts that say the same could be mistaken for one another"
    deadline = time.monotonic() + 60  # Ray's agents collect every few seconds
    with service.http() as http:
        while time.monotonic() < deadline:
            text = http.get("/metrics").text
            hits = sum(map(float, re.findall(r"^ray_vllm_prefix_cache_hits\S* ([0-9.e+]+)$", text, re.M)))
            swaps = sum(map(float, re.findall(r"^seap_swaps_total\S* ([0-9.e+]+)$", text, re.M)))
            if hits and swaps >= len(MODELS):
                break
            time.sleep(1)
    assert hits > 1000 and swaps >= len(MODELS)
    for name in ("seap_swap_seconds_bucket", "seap_wait_seconds_bucket", "seap_waiting", "seap_resident"):
        assert name in text, name


def test_a_stream_names_its_expert_in_every_piece(service):
    body = {"model": "sort", "messages": chat(TEXTS[0]), "max_tokens": 8, "stream": True, "ignore_eos": True}
    with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as reply:
        named = re.findall(r'"model":"(\w+)"', "\n".join(reply.iter_lines()))
    assert len(named) >= 8 and set(named) == {"sort"}


def test_an_engine_that_is_killed_under_load_comes_back_and_every_request_is_answered_by_its_own_expert(
    service, expected
):
    async def kill():
        for _ in range(2):
            await asyncio.sleep(1.5)
            (engine,) = service.processes("EngineCore")
            engine.send_signal(signal.SIGKILL)
            while [p.pid for p in service.processes("EngineCore")] in ([], [engine.pid]):
                await asyncio.sleep(0.2)

    asked = [*itertools.product(TEXTS, MODELS)] * 3
    asked = [(model, text) for text, model in asked]
    assert asyncio.run(load(service, asked, meanwhile=kill())) == [expected[pair] for pair in asked]
    servers = service.processes("SharedEngineServer")
    assert len(servers) == 1 and any("EngineCore" in " ".join(command_of(p)) for p in servers[0].children(True))


def test_more_requests_than_may_wait_are_told_to_come_back(service):
    async def rush(n):
        headers, limits = {"authorization": f"Bearer {KEY}"}, httpx.Limits(max_connections=n)
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=300, limits=limits) as http:
            body = {"model": "sort", "prompt": "sort cba:", "max_tokens": 40, "ignore_eos": True}
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(n)))

    replies = asyncio.run(rush(250))
    codes = Counter(reply.status_code for reply in replies)
    assert set(codes) == {200, 429} and codes[200] >= 16 + 100, codes
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 429)


def test_the_playground_tells_which_expert_is_in_the_engine(service):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with open_page(service.url, http_credentials={"username": "x", "password": KEY}) as page:
        for model in ("sort", "general"):
            page.select_option("#model", model)
            send(page, TEXTS[0])
            sync_api.expect(page.locator("#resident")).to_contain_text(f"{model} is loaded", timeout=20_000)
