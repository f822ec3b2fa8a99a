"""Ingress: one OpenAI-compatible endpoint for all models. ``model: "auto"`` goes to the expert of the prompt's task."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import CompletionRequest
from ray.util import metrics
from starlette.background import BackgroundTask
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from seap_ray.config import AUTO
from seap_ray.routing.expected_quality import KeptQuality
from seap_ray.routing.router import Router
from seap_ray.storage.paths import StoragePath
from serve.choice import Chooser, Decision, Prompt
from serve.errors import ApiError, add_handlers
from serve.experts import Expert
from serve.gate import Gate, check_operator
from serve.guard import State
from serve.guard_server import GuardSettings
from serve.judging import Judging, call_whole
from serve.keys import ApiKeys
from serve.messages import ChatRequest, check_messages, first_user_text
from serve.model_calls import PATIENCE_S, ModelCalls, constraint_in
from serve.node_metrics import gather
from serve.prompts import PromptBeginning, prompts_of
from serve.replicas import joined_states
from serve.watch import Watch

logger = logging.getLogger("ray.serve")

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the playground, which fetches nothing from other sites."""


@dataclass(frozen=True, slots=True)
class Service:
    """Settings of the ingress."""

    experts: tuple[Expert, ...]
    router: StoragePath | None
    """Folder of the router; None where no expert is served."""
    threshold: float | None
    """The value of ``serve.router.threshold``; None for the router's fitted one."""
    named_falls_back: bool
    """Whether the general model also stands in for an expert that a request names; for a routed one it always does."""
    has_one_replica: bool
    """Whether each model has one engine at most, so that a failed request says that the model is down."""
    keys: ApiKeys | None
    """The API keys, as hashes; None when authentication is off."""
    max_body_bytes: int
    max_sequences: int
    timeout_s: float
    beginning: PromptBeginning = PromptBeginning()
    """How prompts of token ids begin where nothing is missing."""
    is_shared: bool = False
    """Whether all models share an engine, whose server restarts it itself when it dies."""
    guard: GuardSettings | None = None
    """What experts are judged by; None where none is."""
    kept: KeptQuality | None = None
    """What the models keep of the dense one's quality, by which prompts are routed; None where that was not judged."""
    operators: ApiKeys | None = None
    """The keys of those who may demote experts; None where every key may."""

    @property
    def main(self) -> str:
        """Name of the model that answers what no expert does."""
        return self.experts[0].name

    @property
    def can_chat(self) -> bool:
        """Whether the models have a chat template. They have the dense model's tokenizer, so all or none do."""
        return any(expert.has_chat_template for expert in self.experts)


class RouteRequest(BaseModel):
    """Body of ``/v1/route``: a prompt, or the messages of a chat, to be routed and not answered."""

    prompt: str | list[int] | list[list[int]] | list[str] | None = None
    messages: list[Any] | None = None
    model: str | None = None


class GuardRequest(BaseModel):
    """Body of ``POST /v1/guard``: what an operator says about an expert."""

    model: str
    state: State


class ExpertIngress(OpenAiIngress):
    """The ingress of ``ray.serve.llm`` with a router, a fallback and limits."""

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle],
        model_cards: dict[str, Any],
        *,
        service: Service,
        guard: DeploymentHandle | None = None,
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._service = service
        self._guard = guard
        self._judging = Judging(guard, service.guard, self._call_whole) if guard and service.guard else None
        self._page = Path(__file__).with_name("playground.html").read_text()
        self._has_warned = False

        deployments = {model: handle.deployment_name for model, handle in llm_deployments.items()}
        # A shared engine restarts itself, so a failed request is no reason to take its models for down.
        is_evidence = service.has_one_replica and not service.is_shared
        self._watch = Watch(deployments, serve.get_replica_context().app_name, has_one_replica=is_evidence)
        self._chooser = Chooser(
            llm_deployments,
            Router.load(service.router) if service.router else None,
            self._watch,
            threshold=service.threshold,
            named_falls_back=service.named_falls_back,
            kept=service.kept,
            main=service.main,
            reference=service.guard.reference if service.guard else service.main,
            demoted=self._judging.demoted if self._judging else frozenset,
        )
        self._calls = ModelCalls(
            self._get_configured_serve_handle, self._chooser, self._watch, timeout_s=service.timeout_s
        )

        self._routes = metrics.Counter("seap_route_total", "Requests by the model that answers", ("expert", "reason"))
        self._confidences = metrics.Histogram(
            "seap_route_confidence", "Probability of the likeliest task", [i / 20 for i in range(1, 21)]
        )
        self._refusals = metrics.Counter("seap_refused_total", "Requests refused for want of room", ("status",))

    # --- answering ---------------------------------------------------------------------------------------------------

    async def answer_chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat completion with OpenAI's and vLLM's parameters; `model` may be `auto`."""
        request.state.is_parsed = True  # from here on an error is ours: see ``to_api_error``
        if body.chat_template:
            raise ApiError(400, "chat_template: the models' own is used, and no other", param="chat_template")
        if not self._service.can_chat:
            message = "the models have no chat template, so they continue texts alone: use /v1/completions"
            raise ApiError(400, message, param="messages")

        return await self._answer("chat", body, request, [first_user_text(body.messages)])

    async def answer_completion(self, body: CompletionRequest, request: Request) -> Response:
        """Answer a text completion with OpenAI's and vLLM's parameters; `model` may be `auto`."""
        request.state.is_parsed = True  # as in ``answer_chat``
        if body.prompt_embeds:
            raise ApiError(400, "prompt_embeds: prompts are texts or token ids here", param="prompt_embeds")

        return await self._answer("completions", body, request, prompts_of(body.prompt))

    async def _answer(
        self, method: str, body: ChatRequest | CompletionRequest, request: Request, prompts: list[Prompt]
    ) -> Response:
        """Choose a model, and return its whole reply or its stream."""
        best_of = getattr(body, "best_of", None)  # no field of a chat, so there it may be of any type
        n_each = max(body.n or 1, best_of if isinstance(best_of, int) else 1)
        self._check_sequences(len(prompts) * n_each)

        try:
            decision, first, replies = await self._calls.start(method, body, prompts)
        except ApiError as error:
            # Refused for want of room are those that may come back; the others are wrong requests.
            if "retry-after" in error.headers:
                self._refusals.inc(tags={"status": str(error.status)})
            raise

        self._count(decision)
        headers = decision.headers | self._warning_headers(prompts)

        # Once the client has its reply, some requests are judged.
        sample = self._judging and self._judging.sample(decision, method, body)
        after = BackgroundTask(self._judging.observe, sample) if self._judging and sample else None

        if not isinstance(first, str):  # no stream
            return Response(first.model_dump_json(), media_type="application/json", headers=headers, background=after)

        # The first event is here already, so an error before it still has a status of its own.
        request_id = request.headers.get("x-request-id", "")
        events = self._calls.events(first, replies, decision.model, request_id, constraint=constraint_in(body))
        return StreamingResponse(events, media_type="text/event-stream", headers=headers, background=after)

    async def _call_whole(self, method: str, model: str, request: Any) -> Any:
        """Send a request of our own to a model, and return its whole reply."""
        return await call_whole(self._get_configured_serve_handle(model), method, model, request)

    def _warning_headers(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """Return the response header that warns about prompts of token ids; the log has the first such warning."""
        warning = self._service.beginning.warning(prompts)
        if warning is None:
            return {}

        # Who sends such prompts sends many, and every one has the header.
        if not self._has_warned:
            logger.warning(f"{warning}; further such requests are not logged")
            self._has_warned = True
        return {"x-seap-warning": warning}

    def _check_sequences(self, n: int) -> None:
        """Raise ApiError 400 for a request that asks for more sequences than it may."""
        if n > self._service.max_sequences:
            message = f"at most {self._service.max_sequences} sequences (prompts times n) a request"
            raise ApiError(400, message, param="n")

    def _count(self, decision: Decision) -> None:
        """Add a decision to the metrics."""
        self._routes.inc(tags={"expert": decision.model, "reason": decision.reason})
        if decision.confidence is not None:  # no router was needed
            self._confidences.observe(decision.confidence)

    # --- everything else ---------------------------------------------------------------------------------------------

    async def route(self, body: RouteRequest) -> JSONResponse:
        """Return the model that a prompt would go to, and why, without generating."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "one of prompt and messages is needed", param="prompt")

        if body.messages is None:
            prompts = prompts_of(body.prompt)
        else:
            check_messages(body.messages)
            prompts = [first_user_text(body.messages)]

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

    async def guard(self) -> JSONResponse:
        """Return how every expert's replies agree with the reference's, and which experts are demoted."""
        handle = self._known_guard()
        return JSONResponse(await handle.to_json.remote())

    async def put_guard(self, body: GuardRequest, request: Request) -> JSONResponse:
        """Demote an expert, bring it back, or let its replies decide again."""
        check_operator(request)
        handle = self._known_guard()
        experts = self._service.guard.floors if self._service.guard else {}
        if body.model not in experts:
            message = f"model: there is no expert {body.model!r}; experts are {', '.join(experts)}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return JSONResponse(await handle.put.remote(body.model, body.state))

    def _known_guard(self) -> DeploymentHandle:
        """Return the guard's handle. Raises ApiError 404 where experts are not judged."""
        if self._guard is None:
            raise ApiError(404, "experts are not judged here: serve.guard.share is 0, or no expert is served")
        return self._guard

    async def list_models(self) -> JSONResponse:
        """List all models, and `auto`, in OpenAI's form."""
        return JSONResponse({"object": "list", "data": list((await self._cards()).values())})

    async def show_model(self, model: str) -> JSONResponse:
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
        standings = await self._standings()

        tasks = [expert.name for expert in experts if expert.kind == "expert"]
        auto = {"kind": "router", "tasks": tasks, "threshold": self._chooser.threshold}
        # ``auto`` is no checkpoint and has no date of its own: it gets that of the newest model.
        cards = [_card(AUTO, max(expert.created for expert in experts), auto)]
        for expert in experts:
            # What the shared engine itself says wins: its replica may be up while one of its experts cannot be loaded.
            state = {"up": self._watch.is_up(expert.name)} | shared_states.get(expert.name, {})
            state |= standings.get(expert.name, {})
            cards.append(_card(expert.name, expert.created, {**expert.card, **state}))

        return {card["id"]: card for card in cards}

    async def _shared_states(self) -> dict[str, dict[str, Any]]:
        """Return, for models that share an engine, which is in it, how many requests wait, and which are not up."""
        if not self._service.is_shared:
            return {}

        try:
            # All models have the handle of the one engine, so any of them would do.
            handle = self._default_serve_handles[self._service.main]
            responses = handle.broadcast("residence")
            replies = await responses.results_async(timeout_s=PATIENCE_S, return_exceptions=True)
        except Exception:  # the engine is being started, and cannot answer yet
            return {}

        return joined_states([reply for reply in replies if isinstance(reply, dict)])

    async def _standings(self) -> dict[str, dict[str, Any]]:
        """Return, for every expert that was judged, how often it agrees with which reference, and who is demoted."""
        if self._guard is None:
            return {}

        try:
            about = await asyncio.wait_for(self._guard.to_json.remote(), PATIENCE_S)
        except Exception:  # the guard is being started again
            return {}

        standings: dict[str, dict[str, Any]] = {}
        for model, standing in about["experts"].items():
            if standing["judged"]:
                figures = {key: standing[key] for key in ("agreement", "judged", "demoted")}
                standings[model] = {**figures, "reference": about["reference"]}
        return standings

    async def healthz(self) -> PlainTextResponse:
        """Answer that this process is alive."""
        return PlainTextResponse("ok\n")

    async def readyz(self) -> JSONResponse:
        """Answer whether prompts are answered, that is whether the model that answers all is up; 503 until it is."""
        self._watch.alarm()  # so that the next request gets a newer state
        is_ready = self._watch.is_up(self._service.main)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(self) -> PlainTextResponse:
        """Return the Prometheus metrics of the service, gathered from Ray's agent on every node."""
        # In a thread: it waits for Ray's head node, and this event loop answers all other requests meanwhile.
        nodes = await asyncio.to_thread(ray.nodes)
        return PlainTextResponse(await gather(nodes), media_type="text/plain; version=0.0.4")

    async def playground(self) -> HTMLResponse:
        """Return the playground, a page to try the service."""
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})


def _card(name: str, created: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of OpenAI's list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "seap_ray", "metadata": metadata}


ENDPOINTS = {
    # Method of ExpertIngress -> its route.
    "answer_chat": lambda app: app.post("/v1/chat/completions"),
    "answer_completion": lambda app: app.post("/v1/completions"),
    "list_models": lambda app: app.get("/v1/models"),
    "show_model": lambda app: app.get("/v1/models/{model:path}"),
    "route": lambda app: app.post("/v1/route"),
    "guard": lambda app: app.get("/v1/guard"),
    "put_guard": lambda app: app.post("/v1/guard"),
    "healthz": lambda app: app.get("/healthz"),
    "readyz": lambda app: app.get("/readyz"),
    "metrics": lambda app: app.get("/metrics"),
    "playground": lambda app: app.get("/", response_class=HTMLResponse),
}


def make_ingress(service: Service) -> type:
    """Return the deployment class of the ingress. It has the routes of ``ENDPOINTS`` and no others."""
    # FastAPI's pages of documentation would load scripts from another site.
    app = FastAPI(title="seap_ray", docs_url=None, redoc_url=None)
    add_handlers(app)
    app.add_middleware(Gate, keys=service.keys, operators=service.operators, max_body_bytes=service.max_body_bytes)
    return make_fastapi_ingress(ExpertIngress, endpoint_map=ENDPOINTS, app=app)
