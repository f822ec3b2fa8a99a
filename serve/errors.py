"""Errors: turns whatever goes wrong into OpenAI's error form, without a traceback."""

import logging
from collections.abc import Sequence
from pickle import PicklingError
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from vllm.exceptions import VLLMClientError

logger = logging.getLogger("ray.serve")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""OpenAI's error types by HTTP status."""

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Exceptions of vLLM's own classes while they parse a body: the body is at fault."""
UNUSABLE = (ValueError, TypeError)
"""Exceptions of vLLM at values that its validation lets through. Any other is a fault of the service."""


class ModelDownError(Exception):
    """No replica of a model runs, or the model cannot be loaded into the engine that it shares."""


class DeadlyRequestError(Exception):
    """Every engine that had the request died."""


class ApiError(Exception):
    """A refusal that the client reads. ``retry_after`` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API has it."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def to_api_error(error: Exception, request_id: str, *, is_parsed: bool = True) -> ApiError:
    """Return an error as the client may see it. One that is not expected is logged under the request's id.

    ``is_parsed`` is False while vLLM's own classes parse the request's body.
    """
    if isinstance(error, ApiError):
        return error

    # The client reads what it can fix; the first fault is enough.
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is no JSON ({first.get('ctx', {}).get('error', first['msg'])})")

        where = _place(first["loc"], error.body)
        return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)
    # FastAPI and cloudpickle make errors of their own of it.
    if isinstance(error, RecursionError | PicklingError) or isinstance(error.__cause__, RecursionError):
        return ApiError(400, "the request is nested too deeply")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, VLLMClientError):
        return ApiError(400, str(error).splitlines()[0], param=getattr(error, "parameter", None))

    # All else is unexpected, and its words may tell of files and code, so they go to the log alone.
    logger.error(f"request {request_id} failed", exc_info=error)
    if not is_parsed and isinstance(error, UNREADABLE):
        return ApiError(400, f"vLLM cannot use this request ({type(error).__name__})")
    return ApiError(500, f"internal error; the log has it under request {request_id}")


def _place(location: Sequence[int | str], body: Any) -> str:
    """Return where in a body pydantic found a fault, such as ``tools[0].function.name``.

    Of a location it leaves out what the client did not write: FastAPI's "body", and the types that a value might have.
    """
    place = ""
    value = body
    for step in location:
        if isinstance(step, int) and isinstance(value, list):
            place += f"[{step}]"
            value = value[step] if step < len(value) else None
        elif isinstance(value, dict) and step in value:
            place += f".{step}"
            value = value[step]
        elif isinstance(value, dict) and step == location[-1]:  # the client should have written it
            place += f".{step}"

    return place.removeprefix(".")


def add_handlers(app: FastAPI) -> None:
    """Have an app answer its errors in OpenAI's form."""

    async def respond(request: Request, error: Exception) -> JSONResponse:
        """Answer one error."""
        return to_api_error(error, request.headers.get("x-request-id", "")).response

    # These are answered inside the app; any other error reaches the gate, which answers it in the same form.
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, respond)
