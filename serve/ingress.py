"""Ingress: one OpenAI endpoint in front of all models; ``model: "auto"`` goes to the expert of the prompt's task."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from ray.util import metrics
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from vllm.v1.engine.exceptions import EngineDeadError

from seap_ray.router import Router
from serve.errors import ApiError, add_handlers, known
from serve.experts import GENERAL, Expert
from serve.gate import Gate
from serve.node_metrics import gather
from serve.watch import Watch

AUTO = "auto"
RETRY_AFTER_S = 1
"""For a queue that is full."""
RESTART_S = 10
"""For a model that is being started again."""
PATIENCE_S = 2.0
"""After which a request that waits asks whether its model is there at all."""
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ModelDownError(Exception):
    """No replica of a model is running."""


@dataclass(frozen=True, slots=True)
class Service:
    """What the ingress is told about the service. ``key_hashes`` are None when authentication is off."""

    experts: tuple[Expert, ...]
    router: Path | None
    threshold: float | None
    fallback_named: bool
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
        self._page = Path(__file__).with_name("playground.html").read_text()
        deployments = {model: handle.deployment_name for model, handle in llm_deployments.items()}
        self._watch = Watch(deployments, serve.get_replica_context().app_name)
        self._routes = metrics.Counter("seap_route_total", "Requests by the model that answers", ("expert", "reason"))
        self._confidences = metrics.Histogram(
            "seap_route_confidence", "Probability of the likeliest task", [i / 20 for i in range(1, 21)]
        )
        self._seconds = metrics.Histogram(
            "seap_route_seconds", "Time to choose a model", [1e-4 * 2**i for i in range(12)]
        )
        self._refusals = metrics.Counter("seap_refused_total", "Requests refused for want of room", ("status",))

    # --- choosing a model --------------------------------------------------------------------------------------------

    async def _decide(self, model: str | None, prompts: Sequence[str]) -> Decision:
        """Raises ApiError 404 for a model that is not served."""
        started = time.perf_counter()
        if model in (None, AUTO):
            decision = await asyncio.to_thread(self._route, prompts)
        elif model in self._model_cards:
            decision = Decision(model, "named")
        else:
            names = ", ".join([AUTO, *self._model_cards])
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")
        if not self._watch.is_up(decision.model):
            decision = self._instead(decision)
        self._seconds.observe(time.perf_counter() - started)
        return decision

    def _route(self, prompts: Sequence[str]) -> Decision:
        if self._router is None:
            return Decision(GENERAL, "no_router")
        decisions = [self._route_one(prompt) for prompt in prompts] or [self._route_one("")]
        if len({decision.model for decision in decisions}) > 1:
            return Decision(GENERAL, "mixed")
        return min(decisions, key=lambda decision: decision.confidence)

    def _route_one(self, prompt: str) -> Decision:
        route = self._router.route(prompt, threshold=self._service.threshold)
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
        for message in body.messages:
            if not isinstance(message.get("content"), str | None):
                message["content"] = list(message["content"])  # pydantic's iterator can be read once only
        return await self._answer("chat", body, request, [_opening(body.messages)], n_prompts=1)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """A text completion, OpenAI's and vLLM's parameters; `model` may be `auto`."""
        prompts = self._texts(body.prompt)
        return await self._answer("completions", body, request, prompts, n_prompts=len(prompts))

    def _texts(self, prompt: Any) -> list[str]:
        """Prompts as text: of OpenAI's four kinds, two are of token ids."""
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        if prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        decode = self._router.decode if self._router else lambda ids: ""
        return [text if isinstance(text, str) else decode(text) for text in prompt]

    async def _answer(
        self,
        method: str,
        body: ChatCompletionRequest | CompletionRequest,
        request: Request,
        prompts: list[str],
        *,
        n_prompts: int,
    ) -> Response:
        request.state.is_parsed = True
        limit = self._service.max_sequences
        if n_prompts * max(body.n or 1, getattr(body, "best_of", None) or 1) > limit:
            raise ApiError(400, f"n: at most {limit} sequences (prompts times n) a request", param="n")
        decision = await self._decide(body.model, prompts)
        try:
            first, rest = await self._first(method, body, request, decision.model)
        except _DEAD as error:
            known(error, request.headers.get("x-request-id", ""))
            self._watch.doubt(decision.model)
            decision = self._instead(decision)
            first, rest = await self._first(method, body, request, decision.model)
        self._count(decision)
        if not isinstance(first, str | list):
            return Response(first.model_dump_json(), media_type="application/json", headers=decision.headers)
        events = self._events(first, rest, decision.model, request)
        return StreamingResponse(events, media_type="text/event-stream", headers=decision.headers)

    async def _first(self, method: str, body: Any, request: Request, model: str) -> tuple[Any, AsyncIterator[Any]]:
        """The first of what ``model`` gives, and the rest. Raises ApiError for what it refuses."""
        body.model = model
        replies = self._get_response(body=body, call_method=method, raw_request=request)
        try:
            async with asyncio.timeout(self._service.timeout_s):
                first = await self._unless_down(model, asyncio.ensure_future(anext(replies)))
        except TimeoutError:
            raise ApiError(504, f"{model} gave no token in {self._service.timeout_s:g} s") from None
        except BackPressureError:
            self._refusals.inc(tags={"status": "429"})
            message = f"{model} has as many requests as it can hold"
            raise ApiError(429, message, code="model_busy", retry_after=RETRY_AFTER_S) from None
        if error := getattr(first[0] if isinstance(first, list) else first, "error", None):
            raise _refused(error)
        return first, replies

    async def _unless_down(self, model: str, first: asyncio.Future[Any]) -> Any:
        """Wait for ``first``, and see now and then that it can come: Serve keeps requests for a model that has no
        replica until there is one. Raises ModelDownError."""
        try:
            while not first.done():
                await asyncio.wait({first}, timeout=PATIENCE_S)
                if not first.done():
                    await asyncio.to_thread(self._watch.look)
                    if not self._watch.is_up(model):
                        raise ModelDownError(model)
            return first.result()
        finally:
            first.cancel()

    async def _events(self, first: Any, rest: AsyncIterator[Any], model: str, request: Request) -> AsyncIterator[str]:
        """Server-sent events. The status is out already, so an engine that dies now is an event as well."""
        done = "data: [DONE]\n\n"
        try:
            yield _joined(first)
            async for chunk in rest:
                yield _joined(chunk)
            return
        except _DEAD as error:
            known(error, request.headers.get("x-request-id", ""))
            self._watch.doubt(model)
            refusal = ApiError(503, f"{model} died while it answered", code="model_down")
        except Exception as error:
            refusal = known(error, request.headers.get("x-request-id", ""))
        yield f"data: {json.dumps(refusal.body)}\n\n{done}"

    def _count(self, decision: Decision) -> None:
        self._routes.inc(tags={"expert": decision.model, "reason": decision.reason})
        if decision.confidence is not None:
            self._confidences.observe(decision.confidence)

    # --- everything else ---------------------------------------------------------------------------------------------

    async def route(self, body: RouteRequest) -> JSONResponse:
        """The model that a prompt would go to, and why, without generating."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "one of prompt and messages is needed", param="prompt")
        prompts = self._texts(body.prompt) if body.messages is None else [_opening(body.messages)]
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
        return JSONResponse({"object": "list", "data": [self._auto_card, *map(_card, self._service.experts)]})

    async def model_data(self, model: str) -> JSONResponse:
        """One model."""
        cards = {card["id"]: card for card in [self._auto_card, *map(_card, self._service.experts)]}
        if model not in cards:
            names = ", ".join(cards)
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")
        return JSONResponse(cards[model])

    @property
    def _auto_card(self) -> dict[str, Any]:
        tasks = [expert.name for expert in self._service.experts if expert.kind == "expert"]
        about = {"kind": "router", "tasks": tasks, "threshold": self._threshold}
        return {"id": AUTO, "object": "model", "owned_by": "seap_ray", "metadata": about}

    async def healthz(self) -> PlainTextResponse:
        """Whether this process answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self) -> JSONResponse:
        """Whether prompts are answered: the general model is up. 503 until then."""
        await asyncio.to_thread(self._watch.look)
        up = {model: self._watch.is_up(model) for model in self._model_cards}
        return JSONResponse({"ready": up[GENERAL], "models": up}, 200 if up[GENERAL] else 503)

    async def metrics(self) -> PlainTextResponse:
        """Prometheus metrics of the service, gathered from Ray's agent on every node."""
        return PlainTextResponse(await gather(ray.nodes()), media_type="text/plain; version=0.0.4")

    async def playground(self) -> HTMLResponse:
        """A page to try it out."""
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})


_DEAD = (ModelDownError, EngineDeadError, RayActorError, ActorUnavailableError, DeploymentUnavailableError)
"""What a call to a replica whose engine or process died raises."""


def _opening(messages: Iterable[Any]) -> str:
    """The first message of the user: what a conversation is routed by, so that it stays with its expert."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str | None):
                return content or ""
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            return "\n".join(part for part in parts if isinstance(part, str))
    return ""


def _refused(error: Any) -> ApiError:
    """What vLLM refuses, in its own words; where it fails, its words are for the log."""
    if error.code >= 500:
        return ApiError(500, "the model could not answer this request")
    return ApiError(error.code, error.message, param=error.param)


def _joined(chunk: str | list[str]) -> str:
    return chunk if isinstance(chunk, str) else "".join(chunk)


def _card(expert: Expert) -> dict[str, Any]:
    return {"id": expert.name, "object": "model", "owned_by": "seap_ray", "metadata": expert.card}


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
