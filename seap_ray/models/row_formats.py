"""Row formats: rows of a common layout in; the templates of a task that they stand for, and messages of any form, out.

A new layout is a row of ``FORMATS``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seap_ray.errors import DataError
from seap_ray.models.row_values import JSON, Row
from seap_ray.tasks import CorpusFormat

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Roles of a chat template by the names that files have for them."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a message's content parts that are text."""
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
"""Columns in which conversations are looked for."""


class NotTextError(ValueError):
    """A message is more than a role and a text, so that its row can be neither calibrated nor judged on."""


OPENAI_KEYS = ("role", "content")
SHAREGPT_KEYS = ("from", "value")


@dataclass(frozen=True)
class Format:
    """A layout of rows that was recognised."""

    name: str
    """Name of the layout, a value of ``Task.format``."""
    templates: Mapping[str, str]
    """Fields of the task that the layout stands for: question and answer, or messages, and perhaps system."""
    description: str
    """What was recognised, and by which columns."""

    def line(self, task: str) -> str:
        """Return a line for people."""
        return f"tasks.{task}: {self.description}"


@dataclass(frozen=True)
class _Layout:
    """A row of ``FORMATS``."""

    needs: str
    """What rows of the layout have, in words."""
    recognise: Callable[[Sequence[Row]], Format | None]
    """Returns the format of rows that are of this layout, None for others. Raises ValueError where a part of them
    has no place in it."""


def recognise(rows: Sequence[Row], format: CorpusFormat = "auto", *, task: str = "") -> Format | None:
    """Return the format of rows by their columns; None where it is none of ``FORMATS``.

    Args:
        rows: The first rows of a corpus.
        format: The only format that is tried; ``auto`` tries all.
        task: Name of the task, for errors.

    Raises:
        DataError: The rows are not of the format that is named, or hold more than it has a place for.
    """
    names = FORMATS if format == "auto" else [format]
    for name in names:
        try:
            recognised = FORMATS[name].recognise(rows)
        except ValueError as error:
            raise DataError(f"tasks.{task}.format: {name}: {error}") from None
        if recognised:
            return recognised

    # Without any row there is nothing to be told.
    if format == "auto" or not rows:
        return None
    raise DataError(f"tasks.{task}.format: {format} needs {FORMATS[format].needs}; the columns are {_columns(rows)}")


def _columns(rows: Sequence[Row]) -> str:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return ", ".join(names)


def _has_column(rows: Sequence[Row], column: str) -> bool:
    return any(column in row for row in rows)


# --- conversations ---------------------------------------------------------------------------------------------------


def _recognise_messages(rows: Sequence[Row]) -> Format | None:
    return _recognise_conversations(rows, "messages", OPENAI_KEYS, "OpenAI messages")


def _recognise_sharegpt(rows: Sequence[Row]) -> Format | None:
    return _recognise_conversations(rows, "sharegpt", SHAREGPT_KEYS, "ShareGPT conversations")


def _recognise_conversations(rows: Sequence[Row], name: str, keys: tuple[str, str], title: str) -> Format | None:
    for column in CONVERSATION_COLUMNS:
        values = [_turns(row.get(column)) for row in rows]
        conversations = [value for value in values if value]
        if not conversations or not all(_has_turns(conversation, keys) for conversation in conversations):
            continue

        templates = {"messages": "{{ " + column + " }}"}
        # Datasets of this kind may have their system message apart.
        has_system = any(isinstance(row.get("system"), str) for row in rows)
        if has_system:
            templates["system"] = "{{ system }}"

        source = f"{title} ({', '.join(keys)}) in the column {column}"
        return Format(name, templates, source + (", their system message in the column system" if has_system else ""))
    return None


def _turns(conversation: Any) -> Any:
    """Return the list of a conversation that is JSON text, as tables of text have it; anything else as it is."""
    if not isinstance(conversation, str) or not conversation.lstrip().startswith("["):
        return conversation
    try:
        return JSON.decode(conversation.strip())
    except (ValueError, RecursionError):
        return conversation


def _has_turns(conversation: Any, keys: tuple[str, str]) -> bool:
    """Return whether a value is a list of turns with these keys; the second, the text, may be left out of some."""
    if not isinstance(conversation, list) or not all(isinstance(turn, Mapping) for turn in conversation):
        return False
    return all(keys[0] in turn for turn in conversation) and any(keys[1] in turn for turn in conversation)


def as_messages(conversation: Any) -> list[dict[str, str]]:
    """Return a conversation as messages of ``role`` and ``content``.

    Args:
        conversation: A list of turns, OpenAI's (role, content) or ShareGPT's (from, value), or that list as JSON text.
            A content is a text, null, or a list of parts that are text, which are joined by line breaks as vLLM does.

    Raises:
        NotTextError: A role is unknown, or a turn holds what is no text; it names the turn.
        ValueError: It is no list of messages.
    """
    turns = _turns(conversation)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"a conversation is a list of messages, not {_kind(turns)}")

    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(_as_message(turn))
        except NotTextError as error:
            raise NotTextError(f"message {number}: {error}") from None
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def _as_message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a message is a mapping with role and content, not {_kind(turn)}")
    if "role" not in turn and "from" not in turn:
        raise ValueError(f"neither role nor from is among its keys: {', '.join(map(str, turn))}")

    role_key, content_key = OPENAI_KEYS if "role" in turn else SHAREGPT_KEYS
    # Calls have a form of their own in every template, which no content has.
    if turn.get("tool_calls") or turn.get("function_call"):
        raise NotTextError("its tool calls are no part of its content, and only role and content are read")
    return {"role": _role(turn[role_key]), "content": _text(turn.get(content_key))}


def _role(name: Any) -> str:
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise NotTextError(f"the role {name!r} is none of {', '.join(ROLES)}")
    return ROLES[name.lower()]


def _text(content: Any) -> str:
    """Return the text of a message's content."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        texts = [_part_text(part) for part in content]
        return "\n".join(text for text in texts if text is not None)
    raise ValueError(f"its content is neither a text nor a list of parts but {_kind(content)}")


def _part_text(part: Any) -> str | None:
    """Return the text of a content part; None where it is null, which vLLM leaves out."""
    if isinstance(part, str):
        return part

    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in TEXT_PARTS:
        raise NotTextError(f"a part of type {kind!r} of its content is no text")

    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the text of a part of its content is {_kind(text)}")
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"{value!r:.40}"


# --- instructions ----------------------------------------------------------------------------------------------------


def _recognise_alpaca(rows: Sequence[Row]) -> Format | None:
    if not rows or not all(_is_instruction(row) for row in rows):
        return None
    if any(row.get("history") for row in rows):
        raise ValueError("earlier turns in the column history have no place in it; write a template for messages")

    question = "{{ instruction }}"
    columns = ["instruction", "output"]
    # The input stands on a line of its own behind the instruction, as LLaMA-Factory joins them.
    if _has_column(rows, "input"):
        question += "{% if input %}\n{{ input }}{% endif %}"
        columns.insert(1, "input")

    templates = {"question": question, "answer": "{{ output }}"}
    if any(isinstance(row.get("system"), str) for row in rows):
        templates["system"] = "{{ system }}"
        columns.append("system")
    return Format("alpaca", templates, f"Alpaca rows ({', '.join(columns)})")


def _is_instruction(row: Row) -> bool:
    return isinstance(row.get("instruction"), str) and "output" in row


FORMATS: dict[str, _Layout] = {
    "messages": _Layout("conversations of role and content in a column messages", _recognise_messages),
    "sharegpt": _Layout("conversations of from and value in a column conversations", _recognise_sharegpt),
    "alpaca": _Layout("the columns instruction, output and perhaps input", _recognise_alpaca),
}
"""Layouts that are recognised, in the order in which they are tried."""
