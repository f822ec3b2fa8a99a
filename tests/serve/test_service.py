"""The whole service: a run made by the job, served by ``jobs/deploy.py``, called by the clients that people use."""

import asyncio
import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import seap_ray.models.hf  # noqa: F401
from seap_ray.demo import skills
from seap_ray.storage.digests import digest_of_file
from tests.support.browser import open_page, send
from tests.support.served import (
    KEY,
    METRICS_S,
    ROOM,
    ROOT,
    START_S,
    TASKS,
    Service,
    arguments,
    chat,
    command_of,
    environment,
    questions,
)

openai = pytest.importorskip("openai")
# The time of a test counts what its fixtures take: a run and a start, each at its longest.
pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def service(served_run, tmp_path_factory):
    made = Service(served_run, tmp_path_factory.mktemp("service") / "log", **{"serve.packing": "separate"})
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_every_model_and_auto_are_listed(client):
    models = list(client.models.list())
    assert all(1.7e9 < model.created < time.time() for model in models)
    cards = {model.id: model.metadata for model in models}
    assert set(cards) == {"auto", "general", *TASKS}
    assert cards["reverse"]["task"] == "reverse" and cards["reverse"]["ratio"] == 0.2 and cards["reverse"]["chat"]
    assert client.models.retrieve("general").id == "general"


@pytest.mark.parametrize("model", ["general", *TASKS])
def test_a_named_model_is_obeyed_and_answers_as_in_transformers(client, served_run, model):
    folder = served_run / "experts" / "0.20" / model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text in (questions("arithmetic", 1)[0], questions("reverse", 1)[0]):
        ids = tokenizer.apply_chat_template(chat(text), return_tensors="pt", return_dict=False)
        out = reference.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(out, skip_special_tokens=True)
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=chat(text), max_tokens=24, temperature=0
        )
        reply = raw.parse()
        assert (reply.model, reply.choices[0].message.content) == (model, expected)
        assert (raw.headers["x-seap-expert"], raw.headers["x-seap-reason"]) == (model, "named")
        assert raw.headers["x-request-id"] and "x-seap-confidence" not in raw.headers


@pytest.mark.parametrize("task", TASKS)
def test_auto_goes_to_the_expert_of_the_prompts_task(client, task):
    for text in questions(task):
        raw = client.chat.completions.with_raw_response.create(
            model="auto", messages=chat(text), max_tokens=2, temperature=0
        )
        assert (raw.headers["x-seap-expert"], raw.headers["x-seap-reason"]) == (task, "routed")
        assert raw.headers["x-seap-task"] == task and 0.5 < float(raw.headers["x-seap-confidence"]) <= 1
        assert raw.parse().model == task


def test_a_text_completion_is_the_same_whole_and_streamed(client):
    asked = {"model": "auto", "prompt": questions("reverse", 1)[0], "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True))
    assert whole.object == "text_completion" and whole.choices[0].text and len(pieces) > 3
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert {whole.model, *(piece.model for piece in pieces)} == {"reverse"}


def test_a_text_completion_is_routed_as_a_chat_is(service):
    with service.http() as http:
        for prompt in (questions("reverse", 1), questions("reverse", 1)[0]):
            reply = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0})
            assert reply.json()["model"] == reply.headers["x-seap-expert"] == "reverse"
        mixed = [questions("reverse", 1)[0], questions("arithmetic", 1)[0]]
        reply = http.post("/v1/completions", json={"model": "auto", "prompt": mixed, "max_tokens": 4})
        assert (reply.headers["x-seap-expert"], reply.headers["x-seap-reason"]) == ("general", "mixed")


def test_serves_own_list_of_routes_is_not_told(service):
    with httpx.Client(base_url=service.url) as http:
        assert http.get("/-/routes").status_code == 404
        assert "seap" not in http.get("/-/healthz").text


def test_no_process_of_the_cluster_has_the_keys(service):
    """From their start on; Serve's own processes and the engines are among them."""
    # The driver itself was given them, and started the others without.
    started = [process for process in service.processes("") if "jobs/deploy.py" not in command_of(process)]
    environments = [process.environ() for process in started]
    assert sum("PATH" in environment for environment in environments) > 10  # titles of processes hide some
    assert not any(KEY in text for environment in environments for text in environment.values())


def test_token_ids_are_routed_by_their_text(service, served_run):
    ids = AutoTokenizer.from_pretrained(served_run / "experts/0.20/general").encode(questions("arithmetic", 1)[0])
    with service.http() as http:
        reply = http.post("/v1/completions", json={"prompt": ids, "max_tokens": 1})
        assert reply.headers["x-seap-expert"] == "arithmetic"


def test_ids_that_lack_the_beginning_token_are_answered_with_a_warning(service, served_run):
    tokenizer = AutoTokenizer.from_pretrained(served_run / "experts/0.20/general")
    whole = tokenizer.encode(questions("arithmetic", 1)[0])
    assert whole[0] == tokenizer.bos_token_id
    with service.http() as http:
        for body in ({"prompt": whole[1:]}, {"prompt": [whole, whole[1:]]}, {"prompt": whole[1:], "stream": True}):
            reply = http.post("/v1/completions", json={**body, "max_tokens": 1})
            assert (
                reply.status_code == 200 and f"token ({whole[0]}) is missing in 1 of" in reply.headers["x-seap-warning"]
            )
        for prompt in (whole, [whole, whole], questions("arithmetic", 1)[0]):
            assert (
                "x-seap-warning" not in http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).headers
            )


def test_a_task_without_an_expert_and_a_strange_prompt_go_to_the_general_model(service):
    with service.http() as http:
        route = http.post("/v1/route", json={"prompt": questions("sort", 1)[0]}).json()
        assert (route["model"], route["task"], route["reason"]) == ("general", "sort", "not_served")
        route = http.post("/v1/route", json={"prompt": "Write a letter to my landlord about the heating."}).json()
        assert (route["model"], route["task"], route["reason"]) == ("general", None, "unlike")


def test_a_route_tells_what_a_request_would_do(service):
    text = questions("arithmetic", 1)[0]
    with service.http() as http:
        for asked in ({"prompt": text}, {"messages": chat(text)}, {"messages": chat([{"type": "text", "text": text}])}):
            route = http.post("/v1/route", json=asked).json()
            assert route["model"] == route["task"] == "arithmetic"
            assert set(route["probabilities"]) == {*TASKS, "sort"}
            assert sum(route["probabilities"].values()) == pytest.approx(1)
            assert route["confidence"] == max(route["probabilities"].values())


def test_a_conversation_stays_with_its_expert(service):
    later = [
        *chat(questions("reverse", 1)[0]),
        {"role": "assistant", "content": "x"},
        *chat(questions("arithmetic")[0]),
    ]
    with service.http() as http:
        assert http.post("/v1/route", json={"messages": later}).json()["model"] == "reverse"


def test_a_stream_gives_the_same_text_piece_by_piece_and_its_usage(client):
    text = questions("reverse", 1)[0]
    asked = {"model": "auto", "messages": chat(text), "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    joined = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert joined == whole.choices[0].message.content and len(pieces) > 3
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {piece.model for piece in pieces} == {"reverse"}


# --- lm-eval as a client ---------------------------------------------------------------------------------------------


@pytest.fixture
def lm_eval_client(service, monkeypatch):
    """``lm_eval_client(model=..., ...)``: lm-eval's own client of the service, with more of its arguments."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    settings = {
        "base_url": f"{service.url}/v1/completions",
        "tokenizer": str(ROOT / "seap_ray" / "demo" / "model"),
        "tokenizer_backend": "huggingface",  # as `auto` finds out in a few requests that the service refuses
        "max_length": 256,
        "num_concurrent": 8,
    }
    return lambda **more: LocalCompletionsAPI(**{**settings, **more})


def test_lm_eval_scores_auto_as_it_is_only_with_the_beginning_token(lm_eval_client, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    page = (ROOT / "docs" / "serving.md").read_text()
    (task,) = re.findall(r"^```yaml\n(task: .*?)^```$", page, re.DOTALL | re.MULTILINE)
    folder = tmp_path / "judged"
    folder.mkdir()
    (folder / "arithmetic.yaml").write_text(task)
    rows = skills.rows("arithmetic", 40, split="test", seed=1)
    (folder / "arithmetic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def score(**arguments):
        done = simple_evaluate(
            lm_eval_client(model="auto", **arguments),
            tasks=["demo_arithmetic"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
        return done["results"]["demo_arithmetic"]["exact_match,words"]

    right = score(add_bos_token=True)
    assert right >= 0.9 and score() < right - 0.3
    assert score(tokenized_requests=False) == pytest.approx(right, abs=0.03), "vLLM adds the token to a text"


def test_lm_evals_log_likelihoods_are_those_of_the_model(lm_eval_client, served_run):
    from lm_eval.api.instance import Instance

    folder = served_run / "experts" / "0.20" / "reverse"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = skills.rows("reverse", 6, split="test", seed=2)
    pairs = [(row["question"], f" {row['answer']}") for row in rows]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    given = lm_eval_client(model="reverse", add_bos_token=True).loglikelihood(requests)
    for (question, answer), (log_likelihood, _) in zip(pairs, given, strict=True):
        ids = torch.tensor([tokenizer.encode(question + answer)])
        start = len(tokenizer.encode(question))
        with torch.no_grad():
            log_p = reference(ids).logits[0, :-1].log_softmax(-1)
        expected = log_p[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()
        assert log_likelihood == pytest.approx(expected.item(), abs=0.02)

    # The page says so: places are counted without the token that vLLM adds.
    by_text = lm_eval_client(model="reverse", tokenized_requests=False).loglikelihood(requests)
    assert any(abs(wrong[0] - right[0]) > 0.1 for wrong, right in zip(by_text, given, strict=True))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_request_keeps_the_id_that_it_comes_with(service):
    with service.http(headers={"x-request-id": "a-request-of-mine"}) as http:
        for reply in (http.get("/v1/models"), http.post("/v1/route", json={}), http.get("/nowhere")):
            assert reply.headers.get_list("x-request-id") == ["a-request-of-mine"]


def test_an_unknown_model_is_404_and_the_models_are_named(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'nope'; models are auto, general"):
        client.chat.completions.create(model="nope", messages=chat("a"))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_without_a_valid_key_only_health_is_answered(service):
    with httpx.Client(base_url=service.url) as http, service.http() as keyed:
        paths = keyed.get("/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/route", "/metrics", "/"} <= set(paths)
        unlisted = dict.fromkeys(("/openapi.json", "/docs", "/x"), {"get": 0})
        for path, methods in {**paths, **unlisted}.items():
            for method in methods:
                for headers in ({}, {"authorization": "Bearer wrong"}):
                    reply = http.request(method, path, headers=headers, json={} if method == "post" else None)
                    assert (
                        (reply.status_code in (200, 503))
                        if path in ("/healthz", "/readyz")
                        else (reply.status_code == 401)
                    ), path


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat/completions", {"messages": []}, 400, "empty conversation"),
        ("chat/completions", {"messages": "x"}, 400, "messages: Input should be a valid list"),
        ("chat/completions", {"messages": chat("a"), "n": 17}, 400, "at most 16 sequences"),
        ("completions", {"prompt": ["a"] * 17}, 400, "at most 16 sequences"),
        ("completions", {"prompt": [[5]] * 17}, 400, "at most 16 sequences"),
        ("route", {"prompt": ["a"] * 17}, 400, "at most 16 sequences"),
        ("completions", {"prompt": "a" * 5000}, 400, "maximum context length is 256 tokens"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature must be non-negative"),
        ("completions", {"prompt": [10**6]}, 400, "out of vocabulary"),
        ("completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, 400, "regex"),
        ("completions", {"prompt": "a" * (1 << 20)}, 413, "larger than 1,048,576 bytes"),
        ("route", {}, 400, "one of prompt and messages"),
    ],
)
def test_a_bad_request_is_told_why(service, path, body, status, message):
    with service.http() as http:
        reply = http.post(f"/v1/{path}", json=body)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"] and "Traceback" not in reply.text


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "a" * 5000, "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
FIELDS = (
    "model messages prompt max_tokens temperature top_p top_k n stop stream stream_options logprobs top_logprobs seed "
    "echo suffix logit_bias response_format tools tool_choice user prompt_logprobs min_tokens bad_words best_of "
    "chat_template chat_template_kwargs structured_outputs priority allowed_token_ids vllm_xargs kv_transfer_params"
).split()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["chat/completions", "completions", "route"]),
    st.dictionaries(st.sampled_from(FIELDS), HOSTILE, max_size=3),
    st.booleans(),
)
def test_no_values_make_it_fail(service, path, fields, is_sound_otherwise):
    sound = {"max_tokens": 1, **({"messages": chat("a")} if path.startswith("chat") else {"prompt": "a"})}
    body = json.dumps({**(sound if is_sound_otherwise else {}), **fields})
    with service.http(headers={"content-type": "application/json"}) as http:
        reply = http.post(f"/v1/{path}", content=body)
    assert reply.status_code < 500, f"{body} -> {reply.text}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"[" * 200_000,
        b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages":[{"role":"user","content":"a"}],"metadata":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        json.dumps({"messages": chat("a")}).encode("utf-16"),
        b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1e400}',
        b'{"messages":[{"role":"user","content":"a"}],"max_tokens":' + b"9" * 5000 + b"}",
    ],
    ids=range(11),
)
def test_no_malformed_body_makes_it_fail(service, body):
    with service.http(headers={"content-type": "application/json"}) as http:
        for path in ("chat/completions", "completions", "route"):
            reply = http.post(f"/v1/{path}", content=body)
            assert 400 <= reply.status_code < 500 or reply.status_code == 200, reply.text


@pytest.mark.skipif(not shutil.which("schemathesis", path=Path(sys.executable).parent), reason="needs schemathesis")
def test_schemathesis_finds_no_server_error(service, tmp_path):
    """From the OpenAPI schema that the service itself publishes."""
    command = ["schemathesis", "run", f"{service.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"]
    options = [
        "--checks",
        "not_a_server_error",
        "--phases",
        "examples,fuzzing",
        "--max-examples",
        "25",
        "--request-timeout",
        "120",
        "--no-color",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# --- pressure --------------------------------------------------------------------------------------------------------


async def stream(http, text):
    """Status of one streamed chat, and whether what began also ended."""
    body = {"model": "auto", "messages": chat(text), "max_tokens": 40, "temperature": 0, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json={**body, "ignore_eos": True}) as reply:
        text = (await reply.aread()).decode()
        if reply.status_code == 200:
            return 200, text.endswith("data: [DONE]\n\n") and "error" not in text
        return reply.status_code, int(reply.headers["retry-after"]) >= 1


async def rush(service, n):
    limits = httpx.Limits(max_connections=n)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=120, limits=limits) as http:
        texts = questions("arithmetic", 20)
        return Counter(await asyncio.gather(*(stream(http, texts[i % 20]) for i in range(n))))


GROWTH = {"EngineCore": 1.5}
"""An engine fills a cache of oneDNN, whose size is bounded, in its first 15 rounds. All else stays as it is."""


def resident(service):
    """Bytes of every process that a request passes: proxy, ingress, engines and their servers."""
    names = ("ProxyActor", "ExpertIngress", "ExpertServer", "EngineCore")
    found = {name: service.processes(name) for name in names}
    assert [len(found[name]) for name in names] == [1, 1, 3, 3], found
    return {(name, p.pid): p.memory_info().rss for name in names for p in found[name]}


def test_under_pressure_every_client_gets_a_whole_reply_or_is_told_to_come_back(service):
    asyncio.run(rush(service, 200))
    before = resident(service)
    for _ in range(3):
        outcomes = asyncio.run(rush(service, 200))
        assert {status for status, _ in outcomes} <= {200, 429, 503} and all(sound for _, sound in outcomes), outcomes
        # More than run at a time; of the places for those that wait, questions about the engine take some.
        assert outcomes[200, True] > ROOM["serve.max_ongoing_requests"] and outcomes[429, True] >= 1, outcomes
    after = resident(service)
    grown = {process: after[process] / before[process] for process in before}
    assert all(ratio < GROWTH.get(name, 1.1) for (name, _), ratio in grown.items()), grown
    with service.http() as http:
        assert http.post("/v1/completions", json={"prompt": "1", "max_tokens": 1}).status_code == 200


def generated(service, model):
    """Tokens that a model's engine has generated by Ray's metrics, once they stand still."""
    counts = [-1.0, -2.0, -3.0, -4.0]
    with service.http() as http:
        while len(set(counts[-4:])) > 1:
            time.sleep(1.5 * METRICS_S)
            pattern = rf'^ray_vllm_generation_tokens_total\{{.*model_name="{model}".*\}} ([0-9.e+]+)$'
            counts.append(sum(map(float, re.findall(pattern, http.get("/metrics").text, re.M))))
    return counts[-1]


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_leaves_ends_its_generation(service, leaves):
    """And one that stays has every token: what is counted is what was generated."""
    body = {"model": "general", "prompt": "1", "max_tokens": 120, "n": 16, "stream": True, "ignore_eos": True}

    async def client(http):
        async with http.stream("POST", "/v1/completions", json={**body, "temperature": 1}) as reply:
            assert reply.status_code == 200
            async for _ in reply.aiter_lines():
                if leaves:
                    return

    async def clients():
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=120) as http:
            await asyncio.gather(*(client(http) for _ in range(8)))

    before = generated(service, "general")
    asyncio.run(clients())
    tokens, whole = generated(service, "general") - before, 8 * 16 * 120
    assert 0 < tokens < 0.9 * whole if leaves else tokens >= 0.99 * whole, (tokens, whole)


def test_metrics_tell_where_prompts_went(service):
    deadline = time.monotonic() + 60  # Ray's agents collect every few seconds
    with service.http() as http:
        while time.monotonic() < deadline:
            text = http.get("/metrics").text
            found = re.findall(r'^seap_route_total\{.*expert="(\w+)".*reason="(\w+)"', text, re.M)
            if ("arithmetic", "routed") in found and "seap_refused_total{" in text:
                break
            time.sleep(1)
    assert {("arithmetic", "routed"), ("reverse", "routed"), ("general", "mixed")} <= set(found)
    for name in ("seap_route_confidence_bucket", "seap_route_seconds_bucket", "seap_refused_total", "ray_serve_"):
        assert name in text, name
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 20
    assert KEY not in text


def test_the_playground_works_in_a_browser(service):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    text = questions("reverse", 1)[0]
    with open_page(service.url, http_credentials={"username": "x", "password": KEY}) as page:
        send(page, text)
        sync_api.expect(page.locator("body")).to_contain_text("Routed to reverse")
        sync_api.expect(page.locator("body")).to_contain_text("finished", timeout=60_000)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_an_expert_that_dies_is_stood_in_for_and_comes_back(service):
    """Its engine is killed under load: nobody sees an error, the other models answer as before."""
    texts = {task: questions(task, 1)[0] for task in TASKS}
    stop, seen, streams = time.monotonic() + 400, [], []
    calm = threading.Event()

    def pause():
        """Once the stand-in answers, clients leave the engine that starts again its share of the cores."""
        time.sleep(1 if calm.is_set() else 0.05)

    def follow(task):
        """Streams: whole, or ended by an error that says so, but never cut."""
        body = {"model": "auto", "messages": chat(texts[task]), "max_tokens": 60, "ignore_eos": True, "stream": True}
        with service.http() as http:
            while time.monotonic() < stop and not back.is_set():
                with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                    lines = [line for line in reply.iter_lines() if line]
                broken = [json.loads(line[6:])["error"] for line in lines if line.startswith('data: {"error"')]
                kind = "ended" if lines[-1] == "data: [DONE]" else "cut"
                streams.append((task, reply.status_code, kind, *(error["code"] for error in broken)))
                if calm.is_set():
                    pause()

    def ask(task, model):
        with service.http() as http:
            while time.monotonic() < stop and not back.is_set():
                reply = http.post(
                    "/v1/chat/completions",
                    json={"model": model, "messages": chat(texts[task]), "max_tokens": 8, "temperature": 0},
                )
                told = reply.headers
                seen.append((task, model, reply.status_code, told.get("x-seap-expert"), told.get("x-seap-reason")))
                pause()

    back = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(ask, task, model) for task in TASKS for model in ("auto", task)]
        loads += [pool.submit(ask, "reverse", "general"), *(pool.submit(follow, task) for task in TASKS)]
        time.sleep(2)
        engine = next(
            child
            for replica in service.processes("ExpertServer:arithmetic")
            for child in replica.children(recursive=True)
            if "EngineCore" in " ".join(command_of(child))
        )
        engine.send_signal(signal.SIGKILL)
        try:
            with service.http() as http:
                while ("arithmetic", "auto", 200, "general", "expert_down") not in seen:
                    assert time.monotonic() < stop, Counter(seen)
                    time.sleep(0.1)
                time.sleep(3)
                calm.set()
                while not http.get("/v1/models/arithmetic").json()["metadata"]["up"]:
                    assert time.monotonic() < stop, "the expert did not come back"
                    time.sleep(0.5)
                n = len(seen)
                while ("arithmetic", "auto", 200, "arithmetic", "routed") not in seen[n:]:
                    assert time.monotonic() < stop, Counter(seen[n:])
                    time.sleep(0.1)
        finally:
            back.set()
        for load in loads:
            load.result()
    assert {status for _, _, status, _, _ in seen} == {200}, Counter(seen)
    others = Counter(outcome for outcome in seen if outcome[0] != "arithmetic")
    assert set(others) == {
        ("reverse", "auto", 200, "reverse", "routed"),
        ("reverse", "reverse", 200, "reverse", "named"),
        ("reverse", "general", 200, "general", "named"),
    }, others
    assert ("arithmetic", "arithmetic", 200, "general", "expert_down") in seen
    assert {outcome for outcome in streams if outcome[0] == "reverse"} == {("reverse", 200, "ended")}
    assert {outcome for outcome in streams if outcome[0] == "arithmetic"} - {("arithmetic", 200, "ended")} <= {
        ("arithmetic", 200, "ended", "model_down")
    }


def knock(service):
    """What a client hears, again and again, until nobody is there."""
    heard = []
    with service.http() as http:
        while True:
            try:
                heard.append(http.post("/v1/completions", json={"prompt": "1", "max_tokens": 1}))
            except httpx.TransportError:
                return heard
            time.sleep(0.02)


def test_a_stop_lets_streams_end_tells_new_clients_so_and_leaves_no_process(service):
    """The last test of this service."""
    with service.http() as http, concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"model": "general", "prompt": "1", "max_tokens": 240, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            engines = service.processes("EngineCore")
            assert len(engines) == 3
            # To the whole group, as `timeout` sends it: Ray's own processes would end at once and cut the stream off.
            os.killpg(service.process.pid, signal.SIGTERM)
            knocking = pool.submit(knock, service)
            assert [line for line in lines if line][-1] == "data: [DONE]"
            service.process.send_signal(signal.SIGTERM)  # as `timeout` and impatient people do
    assert service.process.wait(120) == 0
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive
    refused = [reply for reply in knocking.result() if reply.status_code != 200]
    assert refused and {reply.status_code for reply in refused} == {503}, Counter(reply.text for reply in refused)
    assert all(reply.json()["error"]["message"] and int(reply.headers["retry-after"]) > 0 for reply in refused)


# --- Ray Serve's own command, and no keys ----------------------------------------------------------------------------


def test_serve_run_serves_without_keys_this_machine_alone_and_a_planted_expert_is_demoted(served_run, tmp_path):
    """Serve listens on its own port there. Under the name of a task lie weights that its expert does not have."""
    run = tmp_path / "planted"
    shutil.copytree(served_run, run, ignore=shutil.ignore_patterns("experts", "records", "statistics", "shards"))
    for name in ("general", "arithmetic"):
        shutil.copytree(served_run / "experts" / "0.20" / name, run / "experts" / "0.20" / name)
    _spoil(run / "experts" / "0.20" / "arithmetic")

    settings = {
        "run.storage": str(run.parent),
        "run.name": run.name,
        "serve.experts": ["arithmetic"],
        "serve.auth": "none",
        "serve.guard.share": 1,
        "serve.guard.floor": 0.8,
    }
    command = [Path(sys.executable).parent / "serve", "run", "serve.app:build", *arguments(**settings)]
    log = tmp_path / "log"
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", 8000)):
            pytest.skip("port 8000, which `serve run` listens on, is taken")
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "serve.num_cpus=0.25"], cwd=ROOT, stdout=out, stderr=out, env=environment()
        )
    try:
        with httpx.Client(base_url="http://127.0.0.1:8000", timeout=60) as http:
            deadline = time.monotonic() + START_S
            while not _is_ready(http):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            reply = http.post(
                "/v1/chat/completions", json={"messages": chat(questions("reverse", 1)[0]), "max_tokens": 4}
            )
            assert (reply.status_code, reply.json()["model"]) == (200, "general")
            assert reply.headers["x-seap-reason"] == "not_served"
            assert http.get("/-/routes").status_code == 404
            for foreign in ({"host": "rebound.example"}, {"x-forwarded-for": "10.0.0.7"}):
                assert http.get("/v1/models", headers=foreign).status_code == 403
            _check_demotion(http)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def _spoil(folder):
    """Turn the sign of every MLP's output, and state the new file's hash."""
    manifest = json.loads((folder / "seap.json").read_text())
    for name, about in manifest["files"].items():
        tensors = load_file(folder / name)
        for tensor in (tensor for key, tensor in tensors.items() if key.endswith("down_proj.weight")):
            tensor.neg_()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        about["digest"] = digest_of_file(folder / name)
        about["bytes"] = (folder / name).stat().st_size
    (folder / "seap.json").write_text(json.dumps(manifest))


def _check_demotion(http):
    """Requests to a planted expert: it is demoted within a few, no request fails, and an operator has the last word."""
    reasons = []
    for text in questions("arithmetic", 40):
        reply = http.post("/v1/chat/completions", json={"messages": chat(text), "max_tokens": 8, "temperature": 0.7})
        assert reply.status_code == 200
        reasons.append((reply.headers["x-seap-expert"], reply.headers["x-seap-reason"]))
        if reasons[-1][1] == "demoted":
            break
        time.sleep(0.3)
    assert reasons[0] == ("arithmetic", "routed") and reasons[-1] == ("general", "demoted"), reasons

    standing = http.get("/v1/guard").json()["experts"]["arithmetic"]
    assert standing["demoted"] and standing["agreement"] < 0.8 == standing["floor"]
    # The judged replies are greedy and of the expert itself, and what they show is a number of nats.
    assert standing["judged"] >= 2 and standing["divergence"] > 0

    unknown = http.post("/v1/guard", json={"model": "sort", "state": "auto"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")
    assert http.post("/v1/guard", json={"model": "arithmetic", "state": "nope"}).status_code == 400
    told = http.post("/v1/guard", json={"model": "arithmetic", "state": "promoted"}).json()
    assert (told["state"], told["demoted"]) == ("promoted", False)
    deadline = time.monotonic() + 30
    while _reason(http) != "routed":
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _reason(http):
    text = questions("arithmetic", 1)[0]
    reply = http.post("/v1/chat/completions", json={"messages": chat(text), "max_tokens": 2})
    return reply.headers["x-seap-reason"]


def _is_ready(http):
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
