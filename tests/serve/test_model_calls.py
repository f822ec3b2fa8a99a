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
