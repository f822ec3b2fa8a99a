"""The messages of a chat: what is refused and where, and the text that the router reads. No engine runs here."""

import collections.abc
import pickle
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from serve.errors import ApiError

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]

ASK = {"role": "user", "content": "20 - 14 ="}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
READABLE = [
    ("a", "a"),
    ([{"type": "text", "text": "a"}], "a"),
    ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "a\nb"),
    (["a", {"type": "text", "text": "b"}, "c"], "a\nb\nc"),
    ([{"type": "refusal", "refusal": "no"}, {"type": "thinking", "thinking": "hm"}], "no\nhm"),
    ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "a"),
    ([{"type": "tool_reference", "name": "f"}], "f"),
    ([{"type": "text", "text": ""}, "a", ""], "a"),
    ([], ""),
    ("", ""),
]
"""Contents that vLLM can read, and their text."""


def parsed(*messages: Any) -> Any:
    from serve.messages import ChatRequest

    return ChatRequest.model_validate({"messages": [*messages], "model": "auto"})


def iterables(kind: Any, seen: frozenset = frozenset()) -> list[Any]:
    """Types within a type that pydantic reads lazily."""
    found = [kind] if get_origin(kind) in (collections.abc.Iterable, collections.abc.Iterator) else []
    for argument in get_args(kind):
        found += iterables(argument, seen)
    if isinstance(kind, type) and kind not in seen:
        if hasattr(kind, "model_fields"):
            inner = [field.annotation for field in kind.model_fields.values()]
        else:
            inner = [*get_type_hints(kind).values()] if hasattr(kind, "__required_keys__") else []
        for each in inner:
            found += iterables(each, seen | {kind})
    return found


def test_no_field_of_a_request_is_read_lazily():
    """A field that vLLM adds as an iterable ends up here."""
    from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

    from serve.messages import ChatRequest

    assert iterables(ChatCompletionRequest), "the test finds none where there are"
    assert iterables(ChatRequest) == iterables(CompletionRequest) == []


@pytest.mark.parametrize(("content", "text"), READABLE)
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool", "developer", "critic"])
def test_content_that_vllm_reads_is_passed_on_as_it_is_and_read_alike(role, content, text):
    from vllm.renderers.chat_utils import parse_chat_messages

    from serve.messages import first_user_text

    request = parsed({"role": role, "content": content}, ASK)
    assert pickle.loads(pickle.dumps(request)).messages == [{"role": role, "content": content}, ASK]
    assert first_user_text(request.messages) == (text if role == "user" else ASK["content"])

    config = SimpleNamespace(multimodal_config=None, enable_prompt_embeds=False, is_multimodal_model=False)
    conversation, *_ = parse_chat_messages(request.messages, config, content_format="string")
    assert conversation[0]["content"] == text, "vLLM's own text, which its chat template prints"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (5, "messages[1].content: should be a string or a list of parts"),
        (None, "messages[1].content: should be a string or a list of parts"),
        ({"type": "text", "text": "a"}, "messages[1].content: should be a string or a list of parts"),
        (["a", None], "messages[1].content[1]: should be a string or an object"),
        (["a", 5], "messages[1].content[1]: should be a string or an object"),
        ([["a"]], "messages[1].content[0]: should be a string or an object"),
        ([{"text": "a"}], "messages[1].content[0].type: should be a string; types of text are text, input_text"),
        ([{"type": ["text"], "text": "a"}], "messages[1].content[0].type: should be a string"),
        ([{"type": "text"}], "messages[1].content[0].text: should be a string"),
        ([{"type": "text", "text": None}], "messages[1].content[0].text: should be a string"),
        ([{"type": "text", "text": ["a"]}], "messages[1].content[0].text: should be a string"),
        ([{"type": "refusal", "text": "a"}], "messages[1].content[0].refusal: should be a string"),
        (
            ["a", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}],
            "messages[1].content[1]: the model reads text alone, and 'image_url' is no type of text",
        ),
        ([{"type": "input_image", "image_url": "x"}], "messages[1].content[0]: the model reads text alone"),
        ([{"type": "input_audio", "input_audio": {}}], "messages[1].content[0]: the model reads text alone"),
        ([{"type": "file", "file": {}}], "messages[1].content[0]: the model reads text alone"),
        ([{"type": "x" * 999}], f"messages[1].content[0]: the model reads text alone, and '{'x' * 40}' is no type"),
    ],
)
def test_content_that_no_model_here_reads_is_400_with_its_place(content, place):
    with pytest.raises(ApiError) as refused:
        parsed(ASK, {"role": "user", "content": content})
    assert refused.value.status == 400 and refused.value.message.startswith(place)
    assert refused.value.param == place.partition(":")[0]


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("a", "messages[1]: should be an object"),
        ({"content": "a"}, "messages[1].role"),
        ({"role": None, "content": "a"}, "messages[1].role"),
        ({"role": "user", "content": "a", "name": 5}, "messages[1].name"),
        ({"role": "tool", "content": "a", "tool_call_id": 5}, "messages[1].tool_call_id"),
        ({"role": "assistant", "content": "a", "reasoning": ["b"]}, "messages[1].reasoning"),
        ({"role": "assistant", "tool_calls": 5}, "messages[1].tool_calls: should be a list"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls: should be a list"),
        ({"role": "assistant", "tool_calls": [CALL, 5]}, "messages[1].tool_calls[1]: should be an object"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function: should be"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[1].tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "messages[1].tool_calls[0].type"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_message_that_no_template_could_print_is_400_with_its_place(message, place):
    with pytest.raises(ApiError) as refused:
        parsed(ASK, message)
    assert refused.value.status == 400 and refused.value.message.startswith(place)


@pytest.mark.parametrize("messages", [None, {}, "a", 5])
def test_messages_that_are_no_list_are_400(messages):
    from serve.messages import ChatRequest

    with pytest.raises(ApiError, match="^messages: Input should be a valid list"):
        ChatRequest.model_validate({"messages": messages})


def test_an_empty_conversation_is_400():
    with pytest.raises(ApiError, match="^messages: an empty conversation"):
        parsed()


def test_a_reply_as_the_openai_client_dumps_it_is_a_message_of_the_next_request():
    """Its keys without a value are null."""
    openai = pytest.importorskip("openai")
    reply = openai.types.chat.ChatCompletionMessage(role="assistant", content=None)
    nulls = dict.fromkeys(["refusal", "annotations", "audio", "function_call", "tool_calls"])
    request = parsed(ASK, reply.model_dump() | nulls, {"role": "assistant", "content": "a"} | nulls, ASK)
    assert [message.get("content") for message in request.messages] == [ASK["content"], None, "a", ASK["content"]]


def test_a_tool_call_and_its_result_are_passed_on():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": [{"type": "text", "text": "6"}], "tool_call_id": "1"}
    assert parsed(ASK, call, result).messages == [ASK, call, result]


def test_thoughts_under_their_old_name_are_known():
    (message,) = parsed({"role": "assistant", "content": "a", "reasoning_content": "b"}).messages
    assert message == {"role": "assistant", "content": "a", "reasoning": "b"}
