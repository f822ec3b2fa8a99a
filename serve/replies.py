"""Replies: reads vLLM's replies, whole or in chunks of a stream, and the errors in them."""

import json
import re
from dataclasses import fields
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.v1.engine.exceptions import EngineDeadError

from seap_ray.config.schema import NOT_FOR_ENGINES

FLAG = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
"""A flag of vLLM's command line, as its messages name it."""
ARGUMENTS = (*fields(AsyncEngineArgs), *fields(FrontendArgs))
ENGINE_KEYS = frozenset(argument.name for argument in ARGUMENTS) - {*NOT_FOR_ENGINES}
"""Arguments of vLLM that the section ``serve.engine`` may set."""


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


def with_our_keys(message: str) -> str:
    """Return a message of vLLM with our keys in place of its command line's flags, which nobody here can set."""

    def key(flag: re.Match[str]) -> str:
        """Return the key for a flag; one that no key stands for stays."""
        name = flag[1].replace("-", "_")
        return f"serve.engine.{name}" if name in ENGINE_KEYS else flag[0]

    return FLAG.sub(key, message)
