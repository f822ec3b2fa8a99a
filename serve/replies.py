"""Replies: what vLLM gives, whole or in pieces of a stream, and the errors that are in it."""

import json
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError


def joined(reply: Any) -> Any:
    """A piece of a stream as one text; what is no stream stays."""
    if isinstance(reply, list):
        return "".join(map(str, reply)) if all(isinstance(item, str) for item in reply) else reply[0]
    return reply


def error_in(reply: Any) -> dict[str, Any] | None:
    """vLLM's error, whether it is a reply or an event of a stream."""
    if isinstance(reply, str):
        start = reply.find('data: {"error"')
        return json.loads(reply[start + 6 :].partition("\n\n")[0])["error"] if start >= 0 else None
    error = getattr(reply, "error", None)
    return error and error.model_dump()


def tells_of_death(error: dict[str, Any]) -> bool:
    """Whether vLLM's error says that its engine is dead."""
    return str(EngineDeadError()) in error["message"]
