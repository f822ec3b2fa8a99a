"""Schedule: requests of several experts in, whose turn at one engine it is out. No engine and no clock: time is told.

The expert in the engine is served first. Its turn ends when nobody waits for it, or when its time slice is over and
a request for another has waited for the bound; what runs then ends, and the next turn is that of the expert whose
oldest request has waited longest. So nobody is overtaken for ever: beyond the bound, who came first is first.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field


class QueueFullError(Exception):
    """As many requests wait for an expert as may."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests run and wait, and for how long."""

    running: int
    """At a time, all of one expert."""
    waiting: int
    """For each expert."""
    max_wait_s: float
    """After which a request may end another expert's turn."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of experts whose waiting counts for more, or less, than 1."""


@dataclass(frozen=True, slots=True)
class Admit:
    """Begin with this request, of the expert in the engine."""

    request: Hashable


@dataclass(frozen=True, slots=True)
class Swap:
    """Nothing runs: put this expert into the engine."""

    expert: str


class Schedule:
    """What runs, and what waits for whom. ``resident`` is the expert in the engine."""

    def __init__(self, experts: Iterable[str], resident: str, limits: Limits, now: float = 0.0):
        self.resident, self.since, self._limits = resident, now, limits
        self._waiting: dict[str, deque[tuple[float, Hashable]]] = {expert: deque() for expert in experts}
        self._running: set[Hashable] = set()
        self._has_served = False  # in this turn; one that ended before would be a swap for nothing

    @property
    def waiting(self) -> dict[str, int]:
        """Number of requests that wait for each expert."""
        return {expert: len(queue) for expert, queue in self._waiting.items()}

    @property
    def running(self) -> int:
        return len(self._running)

    def offer(self, request: Hashable, expert: str, now: float) -> None:
        """A request has come. Raises QueueFullError."""
        queue = self._waiting[expert]
        room = self._limits.running - self.running if expert == self.resident else 0
        if len(queue) >= self._limits.waiting + room:
            raise QueueFullError(expert)
        queue.append((now, request))

    def leave(self, request: Hashable) -> None:
        """A request is answered, or nobody waits for its answer any more."""
        if request in self._running:
            return self._running.remove(request)
        for expert, queue in self._waiting.items():
            self._waiting[expert] = deque(item for item in queue if item[1] != request)

    def drop(self, expert: str) -> list[Hashable]:
        """The requests that wait for an expert, which wait no more."""
        requests = [request for _, request in self._waiting[expert]]
        self._waiting[expert].clear()
        return requests

    def swapped(self, expert: str, now: float) -> None:
        self.resident, self.since, self._has_served = expert, now, False

    def next(self, now: float, time_slice_s: float) -> Admit | Swap | None:
        """What to do now; None: nothing until a request comes or leaves. What is admitted runs until it leaves."""
        own = self._waiting[self.resident]
        others = {e: self._waited(e, now) for e, queue in self._waiting.items() if queue and e != self.resident}
        is_bound = max(others.values(), default=0.0) >= self._limits.max_wait_s
        is_over = others and is_bound and now - self.since >= time_slice_s and self._has_served
        if own and not is_over:
            if self.running >= self._limits.running:
                return None
            self._has_served = True
            self._running.add(own[0][1])
            return Admit(own.popleft()[1])
        if not others or self.running:
            return None
        return Swap(max(others, key=lambda expert: (others[expert], expert)))

    def _waited(self, expert: str, now: float) -> float:
        """Seconds that the oldest request has waited, weighted."""
        return (now - self._waiting[expert][0][0]) * self._limits.weights.get(expert, 1.0)
