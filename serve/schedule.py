"""Schedule: decides whose turn it is where several experts share an engine. It has no engine and no clock of its own.

The expert in the engine is served first. Its turn ends when no request waits for it, or when its time slice is over
and a request for another expert has waited for the bound. Running requests are then finished, and the next turn goes
to the expert whose oldest request has waited longest. So no request is overtaken for ever: beyond the bound, first
come is first served.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field


class QueueFullError(Exception):
    """The queue of an expert holds as many requests as it may."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests may run and wait, and for how long."""

    running: int
    """Requests that run at a time, all of one expert."""
    waiting: int
    """Requests that may wait for each expert."""
    max_wait_s: float
    """Seconds after which a waiting request may end another expert's turn."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Factors of the waiting time, by expert; 1 where an expert is not named."""


@dataclass(frozen=True, slots=True)
class Admit:
    """A step of the schedule: start this request, which is for the expert in the engine."""

    request: Hashable


@dataclass(frozen=True, slots=True)
class Swap:
    """A step of the schedule: put this expert into the engine, since no request runs."""

    expert: str


class Schedule:
    """The requests that run and wait, and the expert in the engine (``resident``)."""

    def __init__(self, experts: Iterable[str], resident: str, limits: Limits, now: float = 0.0):
        self.resident = resident
        self.since = now
        self._limits = limits
        self._waiting: dict[str, deque[tuple[float, Hashable]]] = {expert: deque() for expert in experts}
        self._running: set[Hashable] = set()
        # Whether a request was admitted in this turn. A turn that ends before was a swap for nothing.
        self._has_served = False

    @property
    def waiting(self) -> dict[str, int]:
        """Number of requests that wait, by expert."""
        return {expert: len(queue) for expert, queue in self._waiting.items()}

    @property
    def running(self) -> int:
        """Number of requests that run."""
        return len(self._running)

    def offer(self, request: Hashable, expert: str, now: float) -> None:
        """Add a request that has arrived. Raises QueueFullError when the expert's queue is full."""
        queue = self._waiting[expert]
        # A request for the expert in the engine may be admitted at once, so it does not count as waiting.
        room = self._limits.running - self.running if expert == self.resident else 0
        if len(queue) >= self._limits.waiting + room:
            raise QueueFullError(expert)

        queue.append((now, request))

    def leave(self, request: Hashable) -> None:
        """Remove a request that is answered, or whose client has left."""
        if request in self._running:
            return self._running.remove(request)

        # Which expert it was for is not noted; queues are short, for they are bounded.
        for expert, queue in self._waiting.items():
            self._waiting[expert] = deque(item for item in queue if item[1] != request)

    def drop(self, expert: str) -> list[Hashable]:
        """Remove and return all requests that wait for an expert."""
        requests = [request for _, request in self._waiting[expert]]
        self._waiting[expert].clear()
        return requests

    def swapped(self, expert: str, now: float) -> None:
        """Begin the turn of the expert that has just been put into the engine, in which nothing runs.

        A request that ran in an engine that died is not waited for: it may learn of that late.
        """
        self._running.clear()
        self.resident = expert
        self.since = now
        self._has_served = False

    def next(self, now: float, time_slice_s: float) -> Admit | Swap | None:
        """Return the next step; None where there is none until a request arrives or leaves.

        A request that is admitted runs until it leaves.
        """
        queue = self._waiting[self.resident]
        others = self._waits_of_others(now)

        # All three, so that a swap neither comes too early nor is for nothing.
        is_bound_reached = max(others.values(), default=0.0) >= self._limits.max_wait_s
        is_slice_over = now - self.since >= time_slice_s and self._has_served
        is_turn_over = others and is_bound_reached and is_slice_over
        if queue and not is_turn_over:
            if self.running >= self._limits.running:
                return None

            _, request = queue.popleft()
            self._has_served = True
            self._running.add(request)
            return Admit(request)

        # Weights are not changed under requests that run.
        if not others or self.running:
            return None

        # Of two that have waited equally long the name decides, so that the order is always the same.
        return Swap(max(others, key=lambda expert: (others[expert], expert)))

    def _waits_of_others(self, now: float) -> dict[str, float]:
        """Return the weighted seconds that the oldest request of every other expert has waited."""
        waits = {}
        for expert, queue in self._waiting.items():
            if queue and expert != self.resident:
                arrived, _ = queue[0]
                waits[expert] = (now - arrived) * self._limits.weights.get(expert, 1.0)
        return waits
