"""Bodies of requests, from the route to the call of a model: what is refused there, and where. No engine runs here."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from serve.errors import ApiError, add_handlers

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]

ASK = {"role": "user", "content": "20 - 14 ="}


@pytest.fixture(scope="module")
def http() -> TestClient:
    """An application with the request classes of the routes, which answers what they make of a body."""
    from ray.serve.llm.openai_api_models import CompletionRequest

    from serve.ingress import RouteRequest
    from serve.messages import ChatRequest

    app = FastAPI()
    add_handlers(app)

    @app.post("/chat")
    async def chat(body: ChatRequest) -> Any:
        return body.messages

    @app.post("/completions")
    async def completions(body: CompletionRequest) -> Any:
        return body.prompt

    @app.post("/route")
    async def route(body: RouteRequest) -> Any:
        return body.prompt

    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "body", "place", "message"),
    [
        ("chat", {"messages": [ASK, {"role": "user", "content": ["a", 5]}]}, "messages[1].content[1]", "should be a"),
        ("chat", {"messages": None}, "messages", "Input should be a valid list"),
        ("chat", {"messages": [ASK], "tools": [{"type": "search"}]}, "tools[0].type", "Input should be 'function'"),
        (
            "chat",
            {"messages": [ASK], "tools": [{"type": "function", "function": {}}]},
            "tools[0].function.name",
            "Field required",
        ),
        ("chat", {"messages": [ASK], "response_format": {"type": "nope"}}, "response_format.type", "Input should be"),
        ("chat", {"messages": [ASK], "stop": 5}, "stop", "Input should be a valid"),
        ("chat", {"messages": [ASK], "logit_bias": {"5": "x"}}, "logit_bias.5", "Input should be a valid number"),
        ("chat", {}, "messages", "Field required"),
        ("completions", {"prompt": 5}, "prompt", "Input should be a valid"),
        ("completions", {"prompt": [5, -1]}, "prompt[1]", "Input should be greater than or equal to 0"),
        ("completions", {"prompt": [[5], [6, -1]]}, "prompt[0]", "Input should be a valid integer"),
        ("route", {"prompt": 5}, "prompt", "Input should be a valid"),
        ("route", {"messages": 5}, "messages", "Input should be a valid list"),
    ],
)
def test_a_fault_is_told_by_its_place_in_the_body(http, path, body, place, message):
    reply = http.post(f"/{path}", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, place)
    assert error["message"].startswith(f"{place}: {message}"), error["message"]


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [5, 6], [[5, 6], [7]]])
def test_a_prompt_of_any_form_is_routed_as_it_is_completed(http, prompt):
    for path in ("completions", "route"):
        assert http.post(f"/{path}", json={"prompt": prompt}).json() == prompt


def refusal(method: str, body: Any, *, can_chat: bool = True) -> ApiError:
    """What an ingress that calls no model answers."""
    from serve.ingress import ExpertIngress

    ingress: Any = SimpleNamespace(_service=SimpleNamespace(can_chat=can_chat))
    request: Any = SimpleNamespace(state=SimpleNamespace())
    with pytest.raises(ApiError) as refused:
        asyncio.run(getattr(ExpertIngress, method)(ingress, body, request))
    assert refused.value.status == 400
    return refused.value


def test_a_chat_with_models_that_have_no_template_is_told_where_to_go():
    from serve.messages import ChatRequest

    error = refusal("answer_chat", ChatRequest(messages=[ASK]), can_chat=False)
    assert error.message == "the models have no chat template, so they continue texts alone: use /v1/completions"


def test_a_template_or_embeddings_of_the_requests_own_are_refused_by_name():
    from ray.serve.llm.openai_api_models import CompletionRequest

    from serve.messages import ChatRequest

    assert refusal("answer_chat", ChatRequest(messages=[ASK], chat_template="{{ messages }}")).param == "chat_template"
    assert refusal("answer_completion", CompletionRequest(prompt_embeds="AAAA")).param == "prompt_embeds"


def test_models_chat_where_one_has_a_template():
    from serve.ingress import Service

    def service(*templates: bool) -> Any:
        experts = tuple(SimpleNamespace(has_chat_template=template) for template in templates)
        return Service(experts, None, None, True, True, None, 1, 1, 1.0)

    assert service(True, True).can_chat and not service(False, False).can_chat


# --- a header that warns ---------------------------------------------------------------------------------------------


def replies_to(prompts: list[Any], *, is_stream: bool) -> list[Any]:
    """What an ingress answers to completions with these prompts, of a model trained with token 1 in front."""
    from serve.choice import Decision
    from serve.ingress import ExpertIngress, Service
    from serve.prompts import PromptBeginning

    async def start(method: str, body: Any, prompts: Any) -> Any:
        whole = SimpleNamespace(model_dump_json=lambda: "{}")
        return Decision("general", "named"), "data: {}" if is_stream else whole, None

    ingress: Any = object.__new__(ExpertIngress)
    ingress._service = Service((), None, None, True, True, None, 1, 16, 1.0, PromptBeginning((1,)))
    ingress._calls = SimpleNamespace(start=start, events=lambda *arguments, **settings: iter(()))
    ingress._count = lambda decision: None
    ingress._has_warned = False
    ingress._judging = None
    request: Any = SimpleNamespace(state=SimpleNamespace(), headers={})

    async def ask() -> list[Any]:
        from ray.serve.llm.openai_api_models import CompletionRequest

        return [await ingress.answer_completion(CompletionRequest(prompt=prompt), request) for prompt in prompts]

    return asyncio.run(ask())


@pytest.mark.parametrize("is_stream", [False, True])
def test_ids_without_the_beginning_token_have_a_header_that_warns(is_stream):
    alone, several, whole, text = replies_to([[5, 6], [[1, 5], [6]], [1, 5], "a"], is_stream=is_stream)
    assert alone.headers["x-seap-warning"].startswith("the beginning token (1) is missing in 1 of 1 prompts of")
    assert several.headers["x-seap-warning"].startswith("the beginning token (1) is missing in 1 of 2 prompts of")
    assert "x-seap-warning" not in whole.headers and "x-seap-warning" not in text.headers
    assert {reply.headers["x-seap-expert"] for reply in (alone, several, whole, text)} == {"general"}


def test_the_log_has_the_warning_once(caplog):
    import logging

    logger = logging.getLogger("ray.serve")
    # Ray's loggers may hand nothing on to the root's handlers, where caplog's is.
    logger.addHandler(caplog.handler)
    try:
        replies_to([[5, 6], [[5], [6]], [[7], [8], [9]]], is_stream=False)
    finally:
        logger.removeHandler(caplog.handler)
    warnings = {record.getMessage() for record in caplog.records if "prompts of token ids" in record.getMessage()}
    assert len(warnings) == 1, "each of the three has another number of prompts"
