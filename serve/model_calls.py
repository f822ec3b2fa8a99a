"""Model calls: sends a request to the chosen model, to its replacement where that is dead, and says what went wrong."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from vllm.exceptions import GenerationError
from vllm.v1.engine.exceptions import EngineDeadError

from serve.choice import RESTART_S, Chooser, Decision, Prompt
from serve.errors import UNUSABLE, ApiError, DeadlyRequestError, ModelDownError, to_api_error
from serve.replies import error_in, is_engine_death, joined, with_our_keys
from serve.schedule import QueueFullError
from serve.watch import Watch

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1
"""Value of Retry-After for a full queue."""
PATIENCE_S = 1.0
"""Seconds after which a waiting request checks whether its model is there at all."""
DEAD = (ModelDownError, EngineDeadError, RayActorError, ActorUnavailableError, DeploymentUnavailableError)
"""Exceptions of a call to a replica whose engine or process died."""


class ModelCalls:
    """Calls to the models: the first reply of a request, then the stream of the others.

    ``handle_of`` returns Serve's handle of a model. ``timeout_s`` is the longest wait for a first reply.
    """

    def __init__(
        self, handle_of: Callable[[str], DeploymentHandle], chooser: Chooser, watch: Watch, *, timeout_s: float
    ):
        self._handle_of = handle_of
        self._chooser = chooser
        self._watch = watch
        self._timeout_s = timeout_s

    async def start(
        self, method: str, body: Any, prompts: Sequence[Prompt]
    ) -> tuple[Decision, Any, DeploymentResponseGenerator]:
        """Choose a model and wait for its first reply; where it turns out to be dead, that of its replacement.

        Raises:
            ApiError: No model answers, or the one that does refuses the request.
        """
        decision = await self._chooser.choose(body.model, prompts)
        is_first_attempt = True

        # It ends: the only replacement is the general model, and that has none.
        while True:
            try:
                first, replies = await self._call(method, body, decision.model)
                return decision, first, replies
            except DEAD as error:
                self._note_death(decision.model, error)
                # A model that is still up has lost one replica of several, and another may answer.
                if not (is_first_attempt and self._watch.is_up(decision.model)):
                    decision = self._chooser.replacement(decision)

                is_first_attempt = False

    async def events(
        self,
        first: str,
        replies: DeploymentResponseGenerator,
        model: str,
        request_id: str,
        *,
        constraint: str | None = None,
    ) -> AsyncIterator[str]:
        """Yield server-sent events. The status has been sent already, so an engine that fails now is an event, too.

        ``constraint`` is what ``constraint_in`` returns for the request.
        """
        is_whole = False
        try:
            yield first
            async for chunk in replies:
                text = joined(chunk)
                # An error below 500 is vLLM's refusal in the form that clients know, so it passes as it is.
                if (error := error_in(text)) and error["code"] >= 500:
                    raise refused(error, constraint)

                yield text

            is_whole = True
            return
        except DEAD as error:
            # No second attempt: another model would begin anew in the middle of what the client has read.
            self._note_death(model, error)
            refusal = ApiError(503, f"{model} failed while it answered", code="model_down")
        except Exception as error:
            refusal = to_api_error(error, request_id)
        finally:
            # Also where the client has left, which ends this generator in the middle.
            if not is_whole:
                _abandon(replies)

        yield f"data: {json.dumps(refusal.body)}\n\ndata: [DONE]\n\n"

    def _note_death(self, model: str, error: Exception) -> None:
        """Log that a model is down, and have its state queried."""
        logger.warning(f"{model} is down ({type(error).__name__})")
        # A ModelDownError comes from the state that is known already. The others are news.
        if not isinstance(error, ModelDownError):
            self._watch.doubt(model)
        self._watch.alarm()

    async def _call(self, method: str, body: Any, model: str) -> tuple[Any, DeploymentResponseGenerator]:
        """Send a request to a model, and return its first reply (text if it is a stream) and the rest.

        Raises:
            ApiError: The model refuses the request, is busy, or an engine dies at it.
        """
        body.model = model
        constraint = constraint_in(body)
        # No headers are handed on: engines need none of them, least of all the client's key.
        replies = getattr(self._handle_of(model), method).remote(body, None)
        try:
            async with asyncio.timeout(self._timeout_s):
                first = await self._first_reply_unless_gone(model, replies)

            first = joined(first)
            if error := error_in(first):
                raise refused(error, constraint)
            return first, replies
        except BaseException as error:  # a client that leaves cancels this task, which is no Exception
            _abandon(replies)
            if refusal := self._refusal(model, error, constraint):
                raise refusal from None

            raise

    def _refusal(self, model: str, error: BaseException, constraint: str | None) -> ApiError | None:
        """Return what the client reads about an error of a call; None for one that is handled elsewhere."""
        if constraint and isinstance(error, RayTaskError) and isinstance(error.cause, GenerationError):
            return _unspellable(constraint)

        if isinstance(error, BackPressureError | QueueFullError):
            message = f"{model} has as many requests as it can hold"
            return ApiError(429, message, code="model_busy", retry_after=RETRY_AFTER_S)

        if isinstance(error, DeadlyRequestError):  # another attempt would kill another engine
            return ApiError(500, "the engine dies at this request", code="engine_died")

        if isinstance(error, TimeoutError):
            message = f"{model} gave no token in {self._timeout_s:g} s"
            return ApiError(503, message, code="model_busy", retry_after=RESTART_S)

        if isinstance(error, RayTaskError) and isinstance(error.cause, UNUSABLE):
            # The client reads the kind alone: vLLM's words at a fault of its own may name files and code.
            logger.error("vLLM could not use a request", exc_info=error)
            return ApiError(400, f"vLLM cannot use this request ({type(error.cause).__name__})")
        return None

    async def _first_reply_unless_gone(self, model: str, replies: DeploymentResponseGenerator) -> Any:
        """Wait for the first reply of a model.

        Raises:
            ModelDownError: No replica is left. Serve itself would keep the request until there is one again.
        """
        first = asyncio.ensure_future(anext(replies))
        try:
            while True:
                # Unlike ``wait_for`` this leaves the task alone when the time is over.
                done, _ = await asyncio.wait({first}, timeout=PATIENCE_S)
                if done:
                    break

                if self._watch.is_gone(model):
                    raise ModelDownError(model)

                self._watch.alarm()

            return first.result()
        finally:
            first.cancel()  # does nothing to one that is done


def constraint_in(body: Any) -> str | None:
    """Return the field of a request that binds its reply to a form, such as JSON; None where none does."""
    # Text is the form that every reply has.
    format_type = getattr(getattr(body, "response_format", None), "type", "text")
    if format_type != "text":
        return "response_format"
    if getattr(body, "structured_outputs", None) is not None:
        return "structured_outputs"

    # "none" and "auto" leave the form of the reply to the model.
    if getattr(body, "tool_choice", None) not in (None, "none", "auto"):
        return "tool_choice"
    return None


def _unspellable(constraint: str) -> ApiError:
    """Return the error for a reply that cannot have the form that a field of the request asks for.

    vLLM checks that the form is a form, not that there are tokens to write it with. Where none may come next, it takes
    one that may not, and its grammar ends the request as an internal error.
    """
    message = f"{constraint}: no token of this model's vocabulary can begin or continue a reply of this form"
    return ApiError(400, message, param=constraint)


def refused(error: dict[str, Any], constraint: str | None = None) -> Exception:
    """Return the exception for an error of vLLM, at a request with or without a ``constraint`` on its reply.

    The client reads vLLM's words where it refuses a request. Where vLLM itself fails, they go to the log alone.
    """
    code = error["code"]
    message = error["message"]
    if code < 500:
        return ApiError(code, with_our_keys(message), param=error.get("param"))
    if is_engine_death(error):
        return EngineDeadError()
    if constraint and message == str(GenerationError()):
        return _unspellable(constraint)

    logger.error(f"vLLM failed at a request, and its engine is alive: {message}")
    return ApiError(code, "vLLM failed at this request", retry_after=RETRY_AFTER_S if code == 503 else None)


def _abandon(replies: DeploymentResponseGenerator) -> None:
    """Have vLLM stop working on a request that nobody waits for any more."""
    with suppress(Exception):  # `cancel` raises the error of a call that has failed by itself once more
        replies.cancel()
