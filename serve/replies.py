"""Replies: reads vLLM's replies, whole or in chunks of a stream, and the errors in them."""

import json
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError


def joined(reply: Any) -> Any:
    """Return a chunk of a stream as one text; a reply that is no stream is returned as it is."""
    # Ray Serve LLM batches the events of a stream into lists; a whole reply comes as a list of one.
    if isinstance(reply, list):
        is_text = all(isinstance(item, str) for item in reply)
        return "".join(reply) if is_text else reply[0]
    return reply


def error_in(reply: Any) -> dict[str, Any] | None:
    """Return the error that a reply, or an event of a stream, consists of; None where there is none."""
    if isinstance(reply, str):
        # In the JSON of a text this would be escaped, so it is never a model's own words.
        start = reply.find('data: {"error"')
        if start < 0:
            return None

        event = reply[start + len("data: ") :].partition("\n\n")[0]
        return json.loads(event)["error"]

    error = getattr(reply, "error", None)
    return error and error.model_dump()


def is_engine_death(error: dict[str, Any]) -> bool:
    """Return whether an error of vLLM says that its engine is dead."""
    # By the words: the exception's type is lost on the way into a reply.
    return str(EngineDeadError()) in error["message"]
