"""Ingress: one OpenAI endpoint in front of all models; ``model: "auto"`` goes to the expert of the prompt's task."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
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

from seap_ray.router import LONGEST, Router
from serve.errors import UNUSABLE, ApiError, add_handlers, known
from serve.experts import GENERAL, Expert
from serve.gate import Gate
from serve.node_metrics import gather
from serve.watch import Watch

logger = logging.getLogger("ray.serve")

Prompt = str | list[int]
AUTO = "auto"
RETRY_AFTER_S = 1
"""For a queue that is full."""
RESTART_S = 10
"""For a model that is being started again."""
PATIENCE_S = 1.0
"""After which a request that waits asks whether its model is there at all."""
ROUTING_THREADS = 2
"""Routing is short; long prompts of some clients are not to hold up the others."""
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ModelDownError(Exception):
    """No replica of a model is running, or its engine just failed."""


@dataclass(frozen=True, slots=True)
class Service:
    """What the ingress is told about the service. ``key_hashes`` are None when authentication is off."""

    experts: tuple[Expert, ...]
    router: Path | None
    threshold: float | None
    fallback_named: bool
    is_single: bool
    key_hashes: tuple[bytes, ...] | None
    max_body_bytes: int
    max_sequences: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Which model answers, and why. ``task`` is what the router took the prompt for, None where it did not decide."""

    model: str
    reason: str
    task: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        told = {"x-seap-expert": self.model, "x-seap-reason": self.reason}
        if self.task is not None:
            told["x-seap-task"] = self.task
        if self.confidence is not None:
            told["x-seap-confidence"] = f"{self.confidence:.4f}"
        return told


class RouteRequest(BaseModel):
    """A prompt, or the messages of a chat, to be routed and not answered."""

    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None


class ExpertIngress(OpenAiIngress):
    """``ray.serve.llm``'s ingress, with a router, a fallback and limits."""

    def __init__(
        self, llm_deployments: dict[str, DeploymentHandle], model_cards: dict[str, Any], *, service: Service
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._service = service
        self._router = Router.load(service.router) if service.router else None
        self._routing = ThreadPoolExecutor(ROUTING_THREADS, "routing")
        self._page = Path(__file__).with_name("playground.html").read_text()
        deployments = {model: handle.deployment_name for model, handle in llm_deployments.items()}
        self._watch = Watch(deployments, serve.get_replica_context().app_name, is_single=service.is_single)
        self._routes = metrics.Counter("seap_route_total", "Requests by the model that answers", ("expert", "reason"))
        self._confidences = metrics.Histogram(
            "seap_route_confidence", "Probability of the likeliest task", [i / 20 for i in range(1, 21)]
        )
        self._seconds = metrics.Histogram(
            "seap_route_seconds", "Time to choose a model", [1e-4 * 2**i for i in range(12)]
        )
        self._refusals = metrics.Counter("seap_refused_total", "Requests refused for want of room", ("status",))

    # --- choosing a model --------------------------------------------------------------------------------------------

    async def _decide(self, model: str | None, prompts: Sequence[Prompt]) -> Decision:
        """Raises ApiError 404 for a model that is not served."""
        if model in (None, AUTO):
            decision = await asyncio.get_running_loop().run_in_executor(self._routing, self._route, prompts)
        elif model in self._model_cards:
            decision = Decision(model, "named")
        else:
            names = ", ".join([AUTO, *self._model_cards])
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")
        return decision if self._watch.is_up(decision.model) else self._instead(decision)

    def _route(self, prompts: Sequence[Prompt]) -> Decision:
        started = time.perf_counter()
        if self._router is None:
            return Decision(GENERAL, "no_router")
        decisions = [self._route_one(prompt) for prompt in prompts or [""]]
        self._seconds.observe(time.perf_counter() - started)
        if len({decision.model for decision in decisions}) > 1:
            return Decision(GENERAL, "mixed")
        return min(decisions, key=lambda decision: decision.confidence)

    def _route_one(self, prompt: Prompt) -> Decision:
        text = prompt if isinstance(prompt, str) else self._router.decode(prompt[:LONGEST])
        route = self._router.route(text, threshold=self._service.threshold)
        seen = {"confidence": route.confidence, "probabilities": route.probabilities}
        if route.task is None:
            return Decision(GENERAL, route.reason, None, **seen)
        if route.task not in self._model_cards:
            return Decision(GENERAL, "not_served", route.task, **seen)
        return Decision(route.task, route.reason, route.task, **seen)

    def _instead(self, decision: Decision) -> Decision:
        """The general model, while the one that was chosen is down. Raises ApiError 503 when it cannot stand in."""
        may = decision.model != GENERAL and (self._service.fallback_named or decision.reason != "named")
        if may and self._watch.is_up(GENERAL):
            return replace(decision, model=GENERAL, reason="expert_down")
        self._refusals.inc(tags={"status": "503"})
        raise ApiError(503, f"{decision.model} is being started again", code="model_down", retry_after=RESTART_S)

    # --- answering ---------------------------------------------------------------------------------------------------

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """A chat completion, OpenAI's and vLLM's parameters; `model` may be `auto`."""
        request.state.is_parsed = True
        for message in body.messages:
            if not isinstance(message, dict):  # a form of one family's own, which none of ours reads
                raise ApiError(400, "messages: each should have a role and a content", param="messages")
            for key in ("content", "tool_calls"):
                if not isinstance(message.get(key), str | None):
                    message[key] = list(message[key])  # pydantic's iterator can be read once, and not be sent
        return await self._answer("chat", body, request, [_opening(body.messages)])

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """A text completion, OpenAI's and vLLM's parameters; `model` may be `auto`."""
        request.state.is_parsed = True
        return await self._answer("completions", body, request, _prompts(body.prompt))

    async def _answer(
        self, method: str, body: ChatCompletionRequest | CompletionRequest, request: Request, prompts: list[Prompt]
    ) -> Response:
        self._check_number(len(prompts) * max(body.n or 1, getattr(body, "best_of", None) or 1))
        decision = await self._decide(body.model, prompts)
        while True:
            try:
                first, replies = await self._first(method, body, decision.model)
                break
            except _DEAD as error:
                self._died(decision.model, error)
                decision = self._instead(decision)
        self._count(decision)
        if not isinstance(first, str):
            return Response(first.model_dump_json(), media_type="application/json", headers=decision.headers)
        events = self._events(first, replies, decision.model, request)
        return StreamingResponse(events, media_type="text/event-stream", headers=decision.headers)

    def _check_number(self, n: int) -> None:
        if n > self._service.max_sequences:
            message = f"at most {self._service.max_sequences} sequences (prompts times n) a request"
            raise ApiError(400, message, param="n")

    def _died(self, model: str, error: Exception) -> None:
        logger.warning(f"{model} is down ({type(error).__name__})")
        if not isinstance(error, ModelDownError):
            self._watch.doubt(model)
        self._watch.alarm()

    async def _first(self, method: str, body: Any, model: str) -> tuple[Any, DeploymentResponseGenerator]:
        """The first of what ``model`` gives, text if it is a stream, and the rest. Raises ApiError for a refusal."""
        body.model = model
        # No headers go along: engines need none of them, least of all the client's key.
        replies = getattr(self._get_configured_serve_handle(model), method).remote(body, None)
        try:
            async with asyncio.timeout(self._service.timeout_s):
                first = await self._unless_gone(model, replies)
            first = _joined(first)
            if error := _error_in(first):
                raise _refused(error)
            return first, replies
        except BaseException as error:
            _abandon(replies)
            if isinstance(error, BackPressureError):
                self._refusals.inc(tags={"status": "429"})
                message = f"{model} has as many requests as it can hold"
                raise ApiError(429, message, code="model_busy", retry_after=RETRY_AFTER_S) from None
            if isinstance(error, TimeoutError):
                self._refusals.inc(tags={"status": "503"})
                message = f"{model} gave no token in {self._service.timeout_s:g} s"
                raise ApiError(503, message, code="model_busy", retry_after=RESTART_S) from None
            if isinstance(error, RayTaskError) and isinstance(error.cause, UNUSABLE):
                logger.error("vLLM could not use a request", exc_info=error)
                raise ApiError(400, f"vLLM cannot use this request ({type(error.cause).__name__})") from None
            raise

    async def _unless_gone(self, model: str, replies: DeploymentResponseGenerator) -> Any:
        """Wait for the first reply, and see now and then that one can come: Serve keeps requests for a model without a
        replica until there is one. Raises ModelDownError."""
        first = asyncio.ensure_future(anext(replies))
        try:
            while not (await asyncio.wait({first}, timeout=PATIENCE_S))[0]:
                if self._watch.is_gone(model):
                    raise ModelDownError(model)
                self._watch.alarm()
            return first.result()
        finally:
            first.cancel()

    async def _events(
        self, first: str, replies: DeploymentResponseGenerator, model: str, request: Request
    ) -> AsyncIterator[str]:
        """Server-sent events. The status is out already, so an engine that fails now is an event as well."""
        is_whole = False
        try:
            yield first
            async for chunk in replies:
                text = _joined(chunk)
                if (error := _error_in(text)) and error["code"] >= 500:
                    raise ModelDownError(model)
                yield text
            is_whole = True
            return
        except _DEAD as error:
            self._died(model, error)
            refusal = ApiError(503, f"{model} failed while it answered", code="model_down")
        except Exception as error:
            refusal = known(error, request.headers.get("x-request-id", ""))
        finally:
            if not is_whole:
                _abandon(replies)
        yield f"data: {json.dumps(refusal.body)}\n\ndata: [DONE]\n\n"

    def _count(self, decision: Decision) -> None:
        self._routes.inc(tags={"expert": decision.model, "reason": decision.reason})
        if decision.confidence is not None:
            self._confidences.observe(decision.confidence)

    # --- everything else ---------------------------------------------------------------------------------------------

    async def route(self, body: RouteRequest) -> JSONResponse:
        """The model that a prompt would go to, and why, without generating."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "one of prompt and messages is needed", param="prompt")
        prompts = _prompts(body.prompt) if body.messages is None else [_opening(body.messages)]
        self._check_number(len(prompts))
        decision = await self._decide(body.model, prompts)
        told = {
            "model": decision.model,
            "task": decision.task,
            "reason": decision.reason,
            "confidence": decision.confidence,
            "threshold": self._threshold,
            "probabilities": decision.probabilities,
        }
        return JSONResponse(told, headers=decision.headers)

    @property
    def _threshold(self) -> float | None:
        if self._service.threshold is not None or self._router is None:
            return self._service.threshold
        return self._router.threshold

    async def models(self) -> JSONResponse:
        """All models, and `auto`, as OpenAI lists them."""
        return JSONResponse({"object": "list", "data": list(self._cards.values())})

    async def model_data(self, model: str) -> JSONResponse:
        """One model."""
        cards = self._cards
        if model not in cards:
            names = ", ".join(cards)
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")
        return JSONResponse(cards[model])

    @property
    def _cards(self) -> dict[str, dict[str, Any]]:
        tasks = [expert.name for expert in self._service.experts if expert.kind == "expert"]
        about: dict[str, dict[str, Any]] = {AUTO: {"kind": "router", "tasks": tasks, "threshold": self._threshold}}
        about |= {e.name: {**e.card, "up": self._watch.is_up(e.name)} for e in self._service.experts}
        return {
            name: {"id": name, "object": "model", "owned_by": "seap_ray", "metadata": metadata}
            for name, metadata in about.items()
        }

    async def healthz(self) -> PlainTextResponse:
        """Whether this process answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self) -> JSONResponse:
        """Whether prompts are answered: the general model is up. 503 while it is not."""
        self._watch.alarm()  # for the next one who asks
        is_ready = self._watch.is_up(GENERAL)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(self) -> PlainTextResponse:
        """Prometheus metrics of the service, gathered from Ray's agent on every node."""
        return PlainTextResponse(
            await gather(await asyncio.to_thread(ray.nodes)), media_type="text/plain; version=0.0.4"
        )

    async def playground(self) -> HTMLResponse:
        """A page to try it out."""
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})


_DEAD = (ModelDownError, EngineDeadError, RayActorError, ActorUnavailableError, DeploymentUnavailableError)
"""What a call to a replica whose engine or process died raises."""


def _abandon(replies: DeploymentResponseGenerator) -> None:
    """End what vLLM does for a request that nobody waits for any more."""
    with suppress(Exception):  # of a call that failed by itself, which `cancel` raises once more
        replies.cancel()


def _prompts(prompt: Any) -> list[Prompt]:
    """OpenAI's four kinds as one: text and token ids, alone or in a list."""
    if not isinstance(prompt, list):
        return [prompt or ""]
    return [prompt] if prompt and isinstance(prompt[0], int) else prompt


def _opening(messages: Iterable[Any]) -> str:
    """The first message of the user: what a conversation is routed by, so that it stays with its expert."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if not isinstance(content, list):
                return content if isinstance(content, str) else ""
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            return "\n".join(part for part in parts if isinstance(part, str))
    return ""


def _joined(reply: Any) -> Any:
    """A piece of a stream as one text; what is no stream stays."""
    if isinstance(reply, list):
        return "".join(map(str, reply)) if all(isinstance(item, str) for item in reply) else reply[0]
    return reply


def _error_in(reply: Any) -> dict[str, Any] | None:
    """vLLM's error, whether it is a reply or an event of a stream."""
    if isinstance(reply, str):
        start = reply.find('data: {"error"')
        return json.loads(reply[start + 6 :].partition("\n\n")[0])["error"] if start >= 0 else None
    error = getattr(reply, "error", None)
    return error and error.model_dump()


def _refused(error: dict[str, Any]) -> Exception:
    """What vLLM refuses, in its own words; where it fails, its words are for the log."""
    if error["code"] >= 500:
        return ModelDownError(error["message"])
    return ApiError(error["code"], error["message"], param=error.get("param"))


ENDPOINTS = {
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
    """The deployment class with its routes; only they exist."""
    app = FastAPI(title="seap_ray", docs_url=None, redoc_url=None)
    add_handlers(app)
    app.add_middleware(Gate, key_hashes=service.key_hashes, max_body_bytes=service.max_body_bytes)
    return make_fastapi_ingress(ExpertIngress, endpoint_map=ENDPOINTS, app=app)
