"""Judging: the ingress's side of the guard, which judges some requests once they are answered."""

import asyncio
import logging
import random
import time
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from serve.choice import Decision
from serve.errors import ApiError
from serve.guard_server import GuardSettings
from serve.replies import error_in, joined
from serve.shadow import Call, Sample, judge

logger = logging.getLogger("ray.serve")

AT_A_TIME = 2
"""Requests that are judged at a time: judging must not keep clients waiting."""
WAITING = 32
"""Requests that may wait to be judged. Further ones are left out, since any share of them shows the same."""
MORE_OFTEN = 10
"""Times as many requests are judged of a demoted expert: to come back takes more replies than to go."""
PATIENCE_S = 120.0
"""Seconds that judging one request, or a word from the guard, may take."""
REFRESH_S = 1.0
"""Seconds between two looks at who is demoted."""


class Judging:
    """Judges a share of the requests by the reference, and hands the figures to the guard.

    ``guard`` is the guard's handle, and ``call`` sends a request to a model.
    """

    def __init__(self, guard: DeploymentHandle, settings: GuardSettings, call: Call):
        self._guard = guard
        self._settings = settings
        self._call = call
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._n_waiting = 0
        self._demoted: frozenset[str] = frozenset()
        self._asked_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._judged = metrics.Counter("seap_shadow_total", "Replies that were to be judged", ("expert", "outcome"))

    def sample(self, decision: Decision, method: str, body: Any) -> Sample | None:
        """Return what is to be judged of a request: nothing of most of them, by ``serve.guard.share``."""
        # A demoted expert is judged on, so that it can come back.
        is_demoted = decision.reason == "demoted"
        expert = decision.instead_of if is_demoted else decision.model
        share = self._settings.share * (MORE_OFTEN if is_demoted else 1)
        if expert is None or expert not in self._settings.floors or random.random() >= share:
            return None
        return Sample.of(expert, method, body)

    async def observe(self, sample: Sample) -> None:
        """Judge a sample in its turn."""
        outcome = "left_out"
        if self._n_waiting < WAITING:
            self._n_waiting += 1
            try:
                async with self._turns:
                    outcome = await self._judge(sample)
            finally:
                self._n_waiting -= 1
        self._judged.inc(tags={"expert": sample.expert, "outcome": outcome})

    async def _judge(self, sample: Sample) -> str:
        """Judge a sample, and return what became of it in a word."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                agreement = await judge(sample, self._settings.reference, self._call)
                if agreement is None:
                    return "empty"
                await self._guard.note.remote(sample.expert, agreement)
        except Exception as error:
            # An engine that is down, a prompt that leaves no room: neither says anything about the expert's words.
            logger.info(f"a reply of {sample.expert} was not judged ({type(error).__name__})")
            return "failed"
        return "judged"

    def demoted(self) -> frozenset[str]:
        """Return who was demoted when the guard was asked last, and ask it again where that is a while ago."""
        is_due = time.monotonic() - self._asked_at >= REFRESH_S
        if is_due and (self._asking is None or self._asking.done()):
            self._asked_at = time.monotonic()
            self._asking = asyncio.ensure_future(self._ask())
        return self._demoted

    async def _ask(self) -> None:
        try:
            self._demoted = await asyncio.wait_for(self._guard.demoted.remote(), PATIENCE_S)
        except Exception as error:  # the guard is being started again: who was demoted stays so
            logger.info(f"no word from the guard ({type(error).__name__})")


async def call_whole(handle: DeploymentHandle, method: str, model: str, request: Any) -> Any:
    """Return a model's whole reply to a request. Raises ApiError for one that is none."""
    request.model = model
    replies = getattr(handle, method).remote(request, None)
    reply = joined(await anext(replies))
    if error := error_in(reply):
        raise ApiError(error["code"], error["message"])
    return reply
