"""Choice: a request's model and prompts in, the model that answers and why out."""

import asyncio
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ray.util import metrics

from seap_ray.config import AUTO, GENERAL
from seap_ray.routing.router import MAX_PROMPT_CHARACTERS, Router
from serve.errors import ApiError
from serve.watch import Watch

Prompt = str | list[int]
"""Text or token ids."""
RESTART_S = 10
"""For a model that is being started again, in Retry-After."""
ROUTING_THREADS = 2
"""Routing is short; long prompts of some clients are not to hold up the others."""


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


class Chooser:
    """Knows the models, asks the router, and stands in for what is down. ``router`` is None where no expert is served,
    ``threshold`` where the fitted one holds."""

    def __init__(
        self,
        models: Collection[str],
        router: Router | None,
        watch: Watch,
        *,
        threshold: float | None,
        fallback_named: bool,
    ):
        self._models, self._router, self._watch = models, router, watch
        self._fallback_named = fallback_named
        self.threshold = router.threshold if router and threshold is None else threshold
        self._routing = ThreadPoolExecutor(ROUTING_THREADS, "routing")
        self._seconds = metrics.Histogram(
            "seap_route_seconds", "Time to route a request's prompts", [1e-4 * 2**i for i in range(12)]
        )

    async def choose(self, model: str | None, prompts: Sequence[Prompt]) -> Decision:
        """Raises ApiError 404 for a model that is not served, 503 for one that is down and not stood in for."""
        if model in (None, AUTO):
            decision = await asyncio.get_running_loop().run_in_executor(self._routing, self._route, prompts)
        elif model in self._models:
            decision = Decision(model, "named")
        else:
            names = ", ".join([AUTO, *self._models])
            raise ApiError(404, f"there is no model {model!r}; models are {names}", code="model_not_found")
        return decision if self._watch.is_up(decision.model) else self.instead(decision)

    def instead(self, decision: Decision) -> Decision:
        """The general model, while the one that was chosen is down. Raises ApiError 503 when it cannot stand in."""
        may = decision.model != GENERAL and (self._fallback_named or decision.reason != "named")
        if may and self._watch.is_up(GENERAL):
            return replace(decision, model=GENERAL, reason="expert_down")
        raise ApiError(503, f"{decision.model} is being started again", code="model_down", retry_after=RESTART_S)

    def _route(self, prompts: Sequence[Prompt]) -> Decision:
        """One model for all prompts of a request: the general one where their tasks differ."""
        if self._router is None:
            return Decision(GENERAL, "no_router")
        started = time.perf_counter()
        decisions = [self._route_one(self._router, prompt) for prompt in prompts or [""]]
        self._seconds.observe(time.perf_counter() - started)
        if len({decision.model for decision in decisions}) > 1:
            return Decision(GENERAL, "mixed")
        return min(decisions, key=lambda decision: decision.confidence or 0)

    def _route_one(self, router: Router, prompt: Prompt) -> Decision:
        text = prompt if isinstance(prompt, str) else router.decode(prompt[:MAX_PROMPT_CHARACTERS])
        route = router.route(text, threshold=self.threshold)
        if route.task is None:
            return Decision(GENERAL, route.reason, None, route.confidence, route.probabilities)
        if route.task not in self._models:
            return Decision(GENERAL, "not_served", route.task, route.confidence, route.probabilities)
        return Decision(route.task, route.reason, route.task, route.confidence, route.probabilities)
