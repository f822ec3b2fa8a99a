"""Ingress: one OpenAI-compatible endpoint for all models. ``model: "auto"`` goes to the expert of the prompt's task."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from ray.util import metrics
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from vllm.v1.engine.exceptions import EngineDeadError

from seap_ray.config import AUTO, GENERAL
from seap_ray.routing.router import Router
from serve.choice import RESTART_S, Chooser, Decision, Prompt
from serve.errors import (
    UNUSABLE,
    ApiError,
    DeadlyRequestError,
    ModelDownError,
    add_handlers,
    to_api_error,
)
from serve.experts import Expert
from serve.gate import Gate
from serve.node_metrics import gather
from serve.replies import error_in, is_engine_death, joined
from serve.schedule import QueueFullError
from serve.watch import Watch

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1
"""Value of Retry-After for a full queue."""
PATIENCE_S = 1.0
"""Seconds after which a waiting request checks whether its model is there at all."""
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the playground, which fetches nothing from other sites."""


@dataclass(frozen=True, slots=True)
class Service:
    """Settings of the ingress. ``key_hashes`` is None when authentication is off."""

    experts: tuple[Expert, ...]
    router: Path | None
    threshold: float | None
    fallback_named: bool
    is_single: bool
    key_hashes: tuple[bytes, ...] | None
    max_body_bytes: int
    max_sequences: int
    timeout_s: float
    is_shared: bool = False
    """Whether all models share an engine, whose server restarts it itself when it dies."""


class RouteRequest(BaseModel):
    """Body of ``/v1/route``: a prompt, or the messages of a chat, to be routed and not answered."""

    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None


class ExpertIngress(OpenAiIngress):
    """The ingress of ``ray.serve.llm`` with a router, a fallback and limits."""

    def __init__(
        self, llm_deployments: dict[str, DeploymentHandle], model_cards: dict[str, Any], *, service: Service
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._service = service
        self._page = Path(__file__).with_name("playground.html").read_text()
        deployments = {model: handle.deployment_name for model, handle in llm_deployments.items()}
        is_single = service.is_single and not service.is_shared
        self._watch = Watch(deployments, serve.get_replica_context().app_name, is_single=is_single)
        self._chooser = Chooser(
            llm_deployments,
            Router.load(service.router) if service.router else None,
            self._watch,
            threshold=service.threshold,
            fallback_named=service.fallback_named,
        )
        self._routes = metrics.Counter("seap_route_total", "Requests by the model that answers", ("expert", "reason"))
        self._confidences = metrics.Histogram(
            "seap_route_confidence", "Probability of the likeliest task", [i / 20 for i in range(1, 21)]
        )
        self._refusals = metrics.Counter("seap_refused_total", "Requests refused for want of room", ("status",))

    # --- answering ---------------------------------------------------------------------------------------------------

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a chat completion with OpenAI's and vLLM's parameters; `model` may be `auto`."""
        request.state.is_parsed = True
        for message in body.messages:
            if not isinstance(message, dict):  # a form that vLLM knows for one family, and ours do not read
                raise ApiError(400, "messages: each should have a role and a content", param="messages")
            for key in ("content", "tool_calls"):
                # Pydantic leaves an iterator here, which can be read once only and cannot be sent to an engine.
                if not isinstance(message.get(key), str | None):
                    message[key] = list(message[key])
        return await self._answer("chat", body, request, [_first_user_text(body.messages)])

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Answer a text completion with OpenAI's and vLLM's parameters; `model` may be `auto`."""
        request.state.is_parsed = True
        return await self._answer("completions", body, request, _prompts(body.prompt))

    async def _answer(
        self, method: str, body: ChatCompletionRequest | CompletionRequest, request: Request, prompts: list[Prompt]
    ) -> Response:
        """Choose a model, and return its whole reply or its stream."""
        best_of = getattr(body, "best_of", None)  # no field of a chat, so there it may be of any type
        n_each = max(body.n or 1, best_of if isinstance(best_of, int) else 1)
        self._check_sequences(len(prompts) * n_each)
        try:
            decision, first, replies = await self._start_reply(method, body, prompts)
        except ApiError as error:
            if "retry-after" in error.headers:
                self._refusals.inc(tags={"status": str(error.status)})
            raise
        self._count(decision)

        if not isinstance(first, str):  # no stream
            return Response(first.model_dump_json(), media_type="application/json", headers=decision.headers)
        events = self._events(first, replies, decision.model, request)
        return StreamingResponse(events, media_type="text/event-stream", headers=decision.headers)

    async def _start_reply(
        self, method: str, body: Any, prompts: list[Prompt]
    ) -> tuple[Decision, Any, DeploymentResponseGenerator]:
        """Choose a model and wait for its first reply; where it turns out to be dead, that of its replacement."""
        decision = await self._chooser.choose(body.model, prompts)
        is_first_attempt = True
        while True:
            try:
                first, replies = await self._call(method, body, decision.model)
                return decision, first, replies
            except _DEAD as error:
                self._note_death(decision.model, error)
                # A model that is still up has lost one replica of several, and another may answer.
                if not (is_first_attempt and self._watch.is_up(decision.model)):
                    decision = self._chooser.replacement(decision)
                is_first_attempt = False

    def _check_sequences(self, n: int) -> None:
        """Raise ApiError 400 for a request that asks for more sequences than it may."""
        if n > self._service.max_sequences:
            message = f"at most {self._service.max_sequences} sequences (prompts times n) a request"
            raise ApiError(400, message, param="n")

    def _note_death(self, model: str, error: Exception) -> None:
        """Log that a model is down, and have its state queried."""
        logger.warning(f"{model} is down ({type(error).__name__})")
        if not isinstance(error, ModelDownError):
            self._watch.doubt(model)
        self._watch.alarm()

    async def _call(self, method: str, body: Any, model: str) -> tuple[Any, DeploymentResponseGenerator]:
        """Send a request to a model, and return its first reply (text if it is a stream) and the rest.

        Raises:
            ApiError: The model refuses the request, is busy, or an engine dies at it.
        """
        body.model = model
        # No headers are handed on: engines need none of them, least of all the client's key.
        replies = getattr(self._get_configured_serve_handle(model), method).remote(body, None)
        try:
            async with asyncio.timeout(self._service.timeout_s):
                first = await self._first_reply_unless_gone(model, replies)
            first = joined(first)
            if error := error_in(first):
                raise _refused(error)
            return first, replies
        except BaseException as error:
            _abandon(replies)
            if isinstance(error, BackPressureError | QueueFullError):
                message = f"{model} has as many requests as it can hold"
                raise ApiError(429, message, code="model_busy", retry_after=RETRY_AFTER_S) from None
            if isinstance(error, DeadlyRequestError):  # another attempt would kill another engine
                raise ApiError(500, "the engine dies at this request", code="engine_died") from None
            if isinstance(error, TimeoutError):
                message = f"{model} gave no token in {self._service.timeout_s:g} s"
                raise ApiError(503, message, code="model_busy", retry_after=RESTART_S) from None
            if isinstance(error, RayTaskError) and isinstance(error.cause, UNUSABLE):
                logger.error("vLLM could not use a request", exc_info=error)
                raise ApiError(400, f"vLLM cannot use this request ({type(error.cause).__name__})") from None
            raise

    async def _first_reply_unless_gone(self, model: str, replies: DeploymentResponseGenerator) -> Any:
        """Wait for the first reply of a model.

        Raises:
            ModelDownError: No replica is left. Serve itself would keep the request until there is one again.
        """
        first = asyncio.ensure_future(anext(replies))
        try:
            while True:
                done, _ = await asyncio.wait({first}, timeout=PATIENCE_S)
                if done:
                    break
                if self._watch.is_gone(model):
                    raise ModelDownError(model)
                self._watch.alarm()
            return first.result()
        finally:
            first.cancel()

    async def _events(
        self, first: str, replies: DeploymentResponseGenerator, model: str, request: Request
    ) -> AsyncIterator[str]:
        """Yield server-sent events. The status has been sent already, so an engine that fails now is an event, too."""
        is_whole = False
        try:
            yield first
            async for chunk in replies:
                text = joined(chunk)
                if (error := error_in(text)) and error["code"] >= 500:
                    raise _refused(error)
                yield text
            is_whole = True
            return
        except _DEAD as error:
            self._note_death(model, error)
            refusal = ApiError(503, f"{model} failed while it answered", code="model_down")
        except Exception as error:
            refusal = to_api_error(error, request.headers.get("x-request-id", ""))
        finally:
            if not is_whole:
                _abandon(replies)
        yield f"data: {json.dumps(refusal.body)}\n\ndata: [DONE]\n\n"

    def _count(self, decision: Decision) -> None:
        """Add a decision to the metrics."""
        self._routes.inc(tags={"expert": decision.model, "reason": decision.reason})
        if decision.confidence is not None:
            self._confidences.observe(decision.confidence)

    # --- everything else ---------------------------------------------------------------------------------------------

    async def route(self, body: RouteRequest) -> JSONResponse:
        """Return the model that a prompt would go to, and why, without generating."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "one of prompt and messages is needed", param="prompt")
        prompts = _prompts(body.prompt) if body.messages is None else [_first_user_text(body.messages)]
        self._check_sequences(len(prompts))
        decision = await self._chooser.choose(body.model, prompts)
        content = {
            "model": decision.model,
            "task": decision.task,
            "reason": decision.reason,
            "confidence": decision.confidence,
            "threshold": self._chooser.threshold,
            "probabilities": decision.probabilities,
        }
        return JSONResponse(content, headers=decision.headers)

    async def models(self) -> JSONResponse:
        """List all models, and `auto`, in OpenAI's form."""
        return JSONResponse({"object": "list", "data": list((await self._cards()).values())})

    async def model_data(self, model: str) -> JSONResponse:
        """Return one model in OpenAI's form."""
        cards = await self._cards()
        if model not in cards:
            names = ", ".join(cards)
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")
        return JSONResponse(cards[model])

    async def _cards(self) -> dict[str, dict[str, Any]]:
        """Return all models in OpenAI's form, by name, with their state as metadata."""
        experts = self._service.experts
        shared_states = await self._shared_states()

        tasks = [expert.name for expert in experts if expert.kind == "expert"]
        auto = {"kind": "router", "tasks": tasks, "threshold": self._chooser.threshold}
        cards = [_card(AUTO, max(expert.created for expert in experts), auto)]
        for expert in experts:
            state = {"up": self._watch.is_up(expert.name)} | shared_states.get(expert.name, {})
            cards.append(_card(expert.name, expert.created, {**expert.card, **state}))
        return {card["id"]: card for card in cards}

    async def _shared_states(self) -> dict[str, dict[str, Any]]:
        """Return, for models that share an engine, which is in it, how many requests wait, and which are not up."""
        if not self._service.is_shared:
            return {}
        try:
            handle = self._default_serve_handles[GENERAL]
            state = await asyncio.wait_for(handle.residence.remote(), PATIENCE_S)
        except Exception:  # the engine is being started, and cannot answer yet
            return {}
        states: dict[str, dict[str, Any]] = {}
        for model, n_waiting in state["waiting"].items():
            states[model] = {"resident": model == state["resident"], "waiting": n_waiting}
        for model in state["failed"]:
            states[model]["up"] = False
        return states

    async def healthz(self) -> PlainTextResponse:
        """Answer that this process is alive."""
        return PlainTextResponse("ok\n")

    async def readyz(self) -> JSONResponse:
        """Answer whether prompts are answered, that is whether the general model is up; 503 while it is not."""
        self._watch.alarm()  # so that the next request gets a newer state
        is_ready = self._watch.is_up(GENERAL)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(self) -> PlainTextResponse:
        """Return the Prometheus metrics of the service, gathered from Ray's agent on every node."""
        return PlainTextResponse(
            await gather(await asyncio.to_thread(ray.nodes)), media_type="text/plain; version=0.0.4"
        )

    async def playground(self) -> HTMLResponse:
        """Return the playground, a page to try the service."""
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})


_DEAD = (ModelDownError, EngineDeadError, RayActorError, ActorUnavailableError, DeploymentUnavailableError)
"""Exceptions of a call to a replica whose engine or process died."""


def _abandon(replies: DeploymentResponseGenerator) -> None:
    """Have vLLM stop working on a request that nobody waits for any more."""
    with suppress(Exception):  # `cancel` raises the error of a call that has failed by itself once more
        replies.cancel()


def _card(name: str, created: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of OpenAI's list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "seap_ray", "metadata": metadata}


def _prompts(prompt: Any) -> list[Prompt]:
    """Return the prompts of a completion as a list. OpenAI allows text or token ids, alone or in a list."""
    if not isinstance(prompt, list):
        return [prompt or ""]
    is_token_ids = bool(prompt) and isinstance(prompt[0], int)
    return [prompt] if is_token_ids else prompt


def _first_user_text(messages: Iterable[Any]) -> str:
    """Return the user's first message, by which a conversation is routed, so that it stays with its expert."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "user":
            return _text_of(message.get("content"))
    return ""


def _text_of(content: Any) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(part for part in parts if isinstance(part, str))


def _refused(error: dict[str, Any]) -> Exception:
    """Return the exception for an error of vLLM.

    The client reads vLLM's words where it refuses a request. Where vLLM itself fails, they go to the log alone.
    """
    code = error["code"]
    message = error["message"]
    if code < 500:
        return ApiError(code, message, param=error.get("param"))
    if is_engine_death(error):
        return EngineDeadError()
    logger.error(f"vLLM failed at a request, and its engine is alive: {message}")
    return ApiError(code, "vLLM failed at this request", retry_after=RETRY_AFTER_S if code == 503 else None)


ENDPOINTS = {
    # Method of ExpertIngress -> its route.
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "route": lambda app: app.post("/v1/route"),
    "healthz": lambda app: app.get("/healthz"),
    "readyz": lambda app: app.get("/readyz"),
    "metrics": lambda app: app.get("/metrics"),
    "playground": lambda app: app.get("/", response_class=HTMLResponse),
}


def make_ingress(service: Service) -> type:
    """Return the deployment class of the ingress. It has the routes of ``ENDPOINTS`` and no others."""
    app = FastAPI(title="seap_ray", docs_url=None, redoc_url=None)
    add_handlers(app)
    app.add_middleware(Gate, key_hashes=service.key_hashes, max_body_bytes=service.max_body_bytes)
    return make_fastapi_ingress(ExpertIngress, endpoint_map=ENDPOINTS, app=app)
