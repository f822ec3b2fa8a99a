"""Messages: checks the messages of a chat, and reads their text as vLLM does."""

from collections.abc import Iterable
from typing import Any

from pydantic import model_validator
from ray.serve.llm.openai_api_models import ChatCompletionRequest

from serve.errors import ApiError

TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
    "tool_reference": "name",
}
"""Key of the text in a content part, by the part's type: the types that vLLM reads without a picture or a sound."""
STRING_KEYS = ("name", "tool_call_id", "reasoning", "reasoning_content")
"""Keys of a message that hold a string, or null."""
MAY_BE_NULL = ("assistant", "function")
"""Roles whose content may be null: these messages may consist of a call alone."""


class ChatRequest(ChatCompletionRequest):
    """A chat completion with its messages as the client wrote them.

    vLLM declares contents and tool calls as iterables. Pydantic leaves lazy iterators there, which raise at a wrong
    part only when they are read, can be read once, and refuse types of parts that vLLM itself can read.
    """

    messages: list[dict[str, Any]]  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _check_messages(cls, data: Any) -> Any:
        """Refuse wrong messages before vLLM's own validators, some of which stumble over them."""
        if isinstance(data, dict) and "messages" in data:
            check_messages(data["messages"])
        return data


def check_messages(messages: Any) -> None:
    """Check the messages of a chat.

    Raises:
        ApiError: 400 with the first wrong place, such as ``messages[0].content[1]``.
    """
    _check(isinstance(messages, list), "messages", "Input should be a valid list")
    _check(len(messages) > 0, "messages", "an empty conversation has nothing to answer")

    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        _check(isinstance(message, dict), place, "should be an object with a role and a content")
        _check(isinstance(message.get("role"), str), f"{place}.role", "should be a string")
        _check_content(message, f"{place}.content")
        _check_tool_calls(message.get("tool_calls"), f"{place}.tool_calls")
        for key in STRING_KEYS:
            _check(isinstance(message.get(key), str | None), f"{place}.{key}", "should be a string")


def first_user_text(messages: Iterable[dict[str, Any]]) -> str:
    """Return the user's first message, by which a conversation is routed, so that it stays with its expert."""
    for message in messages:
        if message["role"] == "user":
            return _text_of(message.get("content"))
    return ""


def _text_of(content: str | list[Any] | None) -> str:
    """Return the text of a message's content. The texts of several parts are joined as vLLM joins them: those that are
    not empty, with a line break between them."""
    if isinstance(content, str):
        return content

    texts = [part if isinstance(part, str) else part[TEXT_KEYS[part["type"]]] for part in content or []]
    return "\n".join(filter(None, texts))


def _check_content(message: dict[str, Any], place: str) -> None:
    """Check a message's content: a text, or a list of parts that are all text. It may be left out, as in vLLM."""
    content = message.get("content", "")
    if isinstance(content, str) or (content is None and message["role"] in MAY_BE_NULL):
        return

    _check(isinstance(content, list), place, "should be a string or a list of parts")
    for index, part in enumerate(content):
        _check_part(part, f"{place}[{index}]")


def _check_part(part: Any, place: str) -> None:
    """Check a part of a message's content: a string, or an object of a type that holds text."""
    if isinstance(part, str):
        return

    _check(isinstance(part, dict), place, "should be a string or an object with a type and a text")
    kind = part.get("type")
    types = f"types of text are {', '.join(TEXT_KEYS)}"
    # A list or an object as the type could not be looked up.
    _check(isinstance(kind, str), f"{place}.type", f"should be a string; {types}")
    _check(kind in TEXT_KEYS, place, f"the model reads text alone, and {kind[:40]!r} is no type of text; {types}")

    key = TEXT_KEYS[kind]
    _check(isinstance(part.get(key), str), f"{place}.{key}", "should be a string")


def _check_tool_calls(calls: Any, place: str) -> None:
    """Check the tool calls of a message: a list of calls of functions, or null."""
    _check(isinstance(calls, list | None), place, "should be a list of tool calls")

    for index, call in enumerate(calls or []):
        at = f"{place}[{index}]"
        _check(isinstance(call, dict), at, "should be an object with a function")
        _check(call.get("type", "function") == "function", f"{at}.type", "should be 'function'")

        function = call.get("function")
        _check(isinstance(function, dict), f"{at}.function", "should be an object with a name and arguments")
        _check(isinstance(function.get("name"), str), f"{at}.function.name", "should be a string")
        # Text as OpenAI has it, an object as templates of the hub have it.
        is_readable = isinstance(function.get("arguments"), str | dict | None)
        _check(is_readable, f"{at}.function.arguments", "should be a string of JSON, or an object")


def _check(condition: bool, place: str, fault: str) -> None:
    """Raise ApiError 400 about a place in the body where the condition does not hold."""
    if not condition:
        raise ApiError(400, f"{place}: {fault}", param=place)
