"""Calls to models: what a client reads about an error before the first reply, and after it. No engine runs here."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from serve.choice import Chooser
from serve.errors import ApiError, DeadlyRequestError
from serve.schedule import QueueFullError

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]

WHOLE = ["data: 1\n\n", "data: 2\n\n"]
REFUSAL = 'data: {"error": {"message": "too long", "code": 400, "param": "prompt"}}\n\n'
FAILURE = 'data: {"error": {"message": "secret detail", "code": 500}}\n\n'


class Replies:
    """The replies of a call: texts, and exceptions that are raised in their place."""

    def __init__(self, *outcomes, delay_s=0.0):
        self.outcomes = iter(outcomes)
        self.delay_s = delay_s
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(self.delay_s)
        outcome = next(self.outcomes, StopAsyncIteration())
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def cancel(self):
        self.is_cancelled = True


def calls(replies, *, timeout_s=5.0):
    from serve.model_calls import ModelCalls

    watch = SimpleNamespace(
        is_up=lambda model: True, is_gone=lambda model: False, doubt=lambda model: None, alarm=lambda: None
    )
    method = SimpleNamespace(remote=lambda body, info: replies)
    chooser = Chooser(["general", "sums"], None, watch, threshold=None, named_falls_back=True)
    return ModelCalls(lambda model: SimpleNamespace(chat=method), chooser, watch, timeout_s=timeout_s)


def start(replies, **settings):
    return asyncio.run(calls(replies, **settings).start("chat", SimpleNamespace(model="sums"), ["a"]))


def streamed(*outcomes):
    """The events of a stream whose first reply is there already, and whether the call was given up."""
    replies = Replies(*outcomes)

    async def collect():
        return [event async for event in calls(replies).events("data: 0\n\n", replies, "sums", "r1")]

    return asyncio.run(collect()), replies.is_cancelled


def test_the_first_reply_comes_with_the_rest_of_the_stream():
    replies = Replies(*WHOLE)
    decision, first, rest = start(replies)
    assert (decision.model, first) == ("sums", WHOLE[0])
    assert rest is replies and not replies.is_cancelled


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [
        (QueueFullError("sums"), 429, "model_busy"),
        (DeadlyRequestError(), 500, "engine_died"),
        (TimeoutError(), 503, "model_busy"),
        (REFUSAL, 400, None),
        (FAILURE, 500, None),
    ],
)
def test_an_error_before_the_first_reply_has_a_status_and_ends_the_call(outcome, status, code):
    replies = Replies(outcome)
    with pytest.raises(ApiError) as refused:
        start(replies)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert "secret" not in refused.value.message and replies.is_cancelled


SPELLED = {"response_format": SimpleNamespace(type="json_object")}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, None),
        ({"response_format": SimpleNamespace(type="text")}, None),
        ({"tool_choice": "auto", "structured_outputs": None}, None),
        (SPELLED, "response_format"),
        ({"structured_outputs": SimpleNamespace(regex="[A-Z]")}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": SimpleNamespace(type="function")}, "tool_choice"),
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_form_that_the_vocabulary_cannot_spell_is_the_requests_fault(fields, param, is_stream):
    """vLLM ends such a request as it ends one that fails by a fault of its own."""
    from ray.exceptions import RayTaskError
    from vllm.exceptions import GenerationError

    if is_stream:
        outcome = "data: " + json.dumps({"error": {"message": str(GenerationError()), "code": 500}}) + "\n\n"
    else:
        outcome = RayTaskError("chat", "a traceback", GenerationError())
    with pytest.raises((ApiError, RayTaskError)) as refused:
        asyncio.run(calls(Replies(outcome)).start("chat", SimpleNamespace(model="sums", **fields), ["a"]))
    if param:
        assert (refused.value.status, refused.value.param) == (400, param)
        assert refused.value.message.startswith(f"{param}: no token of this model's vocabulary")
    else:
        assert getattr(refused.value, "status", 500) == 500


def test_a_form_that_cannot_be_spelled_to_its_end_ends_a_stream_with_an_error_that_says_so():
    from vllm.exceptions import GenerationError

    replies = Replies(WHOLE[0], "data: " + json.dumps({"error": {"message": str(GenerationError()), "code": 500}}))

    async def collect():
        stream = calls(replies).events("data: 0\n\n", replies, "sums", "r1", constraint="response_format")
        return [event async for event in stream]

    *_, last = asyncio.run(collect())
    error = json.loads(last.removeprefix("data: ").split("\n\n")[0])["error"]
    assert error["param"] == "response_format" and error["type"] == "invalid_request_error"


def test_vllms_flags_are_named_as_our_keys():
    from serve.replies import with_our_keys

    message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    keys = "serve.engine.enable_auto_tool_choice and serve.engine.tool_call_parser"
    assert with_our_keys(message) == f'"auto" tool choice requires {keys} to be set'
    assert with_our_keys("You must set `--reasoning-parser`") == "You must set `serve.engine.reasoning_parser`"
    assert with_our_keys("--trust-remote-code") == "--trust-remote-code", "no key: it is refused"
    assert with_our_keys("a -- b, --help and x--dtype-y") == "a -- b, --help and x--dtype-y"


def test_a_model_that_gives_no_first_reply_in_time_is_busy():
    replies = Replies(*WHOLE, delay_s=5)
    with pytest.raises(ApiError, match=r"gave no token in 0\.05 s"):
        start(replies, timeout_s=0.05)
    assert replies.is_cancelled


def test_a_whole_stream_is_passed_on_as_it_is():
    assert streamed(*WHOLE) == (["data: 0\n\n", *WHOLE], False)


def test_an_error_in_a_stream_is_its_last_event():
    from vllm.v1.engine.exceptions import EngineDeadError

    for outcome, status in ((FAILURE, "server_error"), (EngineDeadError(), "overloaded_error")):
        events, is_cancelled = streamed(WHOLE[0], outcome)
        assert events[:2] == ["data: 0\n\n", WHOLE[0]] and is_cancelled
        error, end = events[2].removeprefix("data: ").split("\n\ndata: ")
        assert json.loads(error)["error"]["type"] == status and end == "[DONE]\n\n"
        assert "secret" not in error
