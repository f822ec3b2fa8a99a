"""Prompts: the prompts of a text completion, from the forms that OpenAI's API allows."""

from typing import Any

from serve.choice import Prompt


def prompts_of(prompt: Any) -> list[Prompt]:
    """Return the prompts of a completion as a list. OpenAI allows text or token ids, alone or in a list."""
    if not isinstance(prompt, list):
        return [prompt or ""]

    # A list of numbers is one prompt, a list of such lists several.
    is_token_ids = bool(prompt) and isinstance(prompt[0], int)
    return [prompt] if is_token_ids else prompt
