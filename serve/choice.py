"""Choice: decides which model answers a request, from the model that it names and its prompts."""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ray.util import metrics

from seap_ray.config import AUTO, GENERAL
from seap_ray.routing.expected_quality import KeptQuality
from seap_ray.routing.router import MAX_PROMPT_CHARACTERS, Router
from serve.errors import ApiError
from serve.watch import Watch

Prompt = str | list[int]
"""Text or token ids."""
RESTART_S = 10
"""Value of Retry-After for a model that is being restarted."""
ROUTING_THREADS = 2
"""Threads that route. Routing is short, and with two a client's long prompt does not hold up the others."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Which model answers, and why.

    ``task`` is the one that the router assigned the prompt to, None where it did not decide.
    """

    model: str
    reason: str
    task: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    instead_of: str | None = None
    """The expert in whose place the model answers; None where it answers for itself."""

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that tell the client about the decision."""
        headers = {"x-seap-expert": self.model, "x-seap-reason": self.reason}
        if self.task is not None:
            headers["x-seap-task"] = self.task
        if self.confidence is not None:
            headers["x-seap-confidence"] = f"{self.confidence:.4f}"
        return headers


class Chooser:
    """Chooses a model for every request, and another in place of an expert that is down or demoted.

    ``router`` is None where no expert is served. An expert answers where the router's confidence is at least
    ``threshold``; where that is None, where ``kept`` expects it to do no worse than the general model, and without
    ``kept`` by the router's fitted threshold.
    ``main`` answers what no expert does, and ``reference`` for demoted experts, which ``demoted`` returns.
    """

    def __init__(
        self,
        models: Collection[str],
        router: Router | None,
        watch: Watch,
        *,
        threshold: float | None,
        named_falls_back: bool,
        kept: KeptQuality | None = None,
        main: str = GENERAL,
        reference: str = GENERAL,
        demoted: Callable[[], Collection[str]] = frozenset,
    ):
        self._main = main
        self._reference = reference
        self._demoted = demoted
        self._models = models
        self._router = router
        self._watch = watch
        self._named_falls_back = named_falls_back
        self._kept = kept if threshold is None else None
        fitted = router.threshold if router and not self._kept else None
        self.threshold = fitted if threshold is None else threshold
        self._routing = ThreadPoolExecutor(ROUTING_THREADS, "routing")
        self._seconds = metrics.Histogram(
            "seap_route_seconds", "Time to route a request's prompts", [1e-4 * 2**i for i in range(12)]
        )

    async def choose(self, model: str | None, prompts: Sequence[Prompt]) -> Decision:
        """Return the model for a request that names ``model``, or None or ``auto``, and has these prompts.

        Raises:
            ApiError: 404 for a model that is not served, 503 for one that is down and has no replacement.
        """
        if model in (None, AUTO):
            # In a thread: the event loop has other requests, and a long prompt takes milliseconds.
            decision = await asyncio.get_running_loop().run_in_executor(self._routing, self._route, prompts)
        elif model in self._models:
            decision = Decision(model, "named")
        else:
            names = ", ".join([AUTO, *self._models])
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")

        if decision.model in self._demoted() and self._may_fall_back(decision) and self._watch.is_up(self._reference):
            return replace(decision, model=self._reference, reason="demoted", instead_of=decision.model)
        return decision if self._watch.is_up(decision.model) else self.replacement(decision)

    def replacement(self, decision: Decision) -> Decision:
        """Return the general model in place of the chosen one, which is down.

        Raises:
            ApiError: 503 when the general model may not answer for it, or is down as well.
        """
        if decision.model != self._main and self._may_fall_back(decision) and self._watch.is_up(self._main):
            return replace(decision, model=self._main, reason="expert_down", instead_of=decision.model)

        raise ApiError(503, f"{decision.model} is being started again", code="model_down", retry_after=RESTART_S)

    def _may_fall_back(self, decision: Decision) -> bool:
        """Return whether another model may answer: who names an expert may not want it, ``auto`` leaves the choice."""
        return self._named_falls_back or decision.reason != "named"

    def _route(self, prompts: Sequence[Prompt]) -> Decision:
        """Return one model for all prompts of a request: the general one where their tasks differ."""
        if self._router is None:
            return Decision(self._main, "no_router")

        started = time.perf_counter()
        decisions = [self._route_one(self._router, prompt) for prompt in prompts or [""]]
        self._seconds.observe(time.perf_counter() - started)

        # One request goes to one engine.
        if len({decision.model for decision in decisions}) > 1:
            return Decision(self._main, "mixed")
        # The least sure of them speaks for the request.
        return min(decisions, key=lambda decision: decision.confidence or 0)

    def _route_one(self, router: Router, prompt: Prompt) -> Decision:
        """Return the router's decision about one prompt."""
        # The router reads no more than this many characters, so as many tokens are enough.
        text = prompt if isinstance(prompt, str) else router.decode(prompt[:MAX_PROMPT_CHARACTERS])
        route = router.route(text, threshold=0.0 if self._kept else self.threshold)
        if route.task is None:
            return Decision(self._main, route.reason, None, route.confidence, route.probabilities)
        if self._kept and not self._kept.prefers_expert(route.task, route.probabilities):
            return Decision(self._main, "unsure", None, route.confidence, route.probabilities)
        if route.task not in self._models:
            return Decision(self._main, "not_served", route.task, route.confidence, route.probabilities)
        return Decision(route.task, route.reason, route.task, route.confidence, route.probabilities)
