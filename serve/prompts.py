"""Prompts: the texts of a request by which it is routed, from the forms that OpenAI's API allows."""

from collections.abc import Iterable
from typing import Any

from serve.choice import Prompt


def prompts_of(prompt: Any) -> list[Prompt]:
    """Return the prompts of a completion as a list. OpenAI allows text or token ids, alone or in a list."""
    if not isinstance(prompt, list):
        return [prompt or ""]

    # A list of numbers is one prompt, a list of such lists several.
    is_token_ids = bool(prompt) and isinstance(prompt[0], int)
    return [prompt] if is_token_ids else prompt


def first_user_text(messages: Iterable[Any]) -> str:
    """Return the user's first message, by which a conversation is routed, so that it stays with its expert."""
    for message in messages:
        # ``/v1/route`` takes any list, so an item need not be a message.
        if isinstance(message, dict) and message.get("role") == "user":
            return _text_of(message.get("content"))
    return ""


def _text_of(content: Any) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""

    # Parts that are no text, such as pictures, say nothing to the router.
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(part for part in parts if isinstance(part, str))
