"""Guard: agreements of experts with the reference in; which experts are demoted, and since when, out.

An expert whose replies the reference would not have given is demoted: the reference answers in its place. It comes back
when enough of its replies, which nobody then gets, are good again, or when an operator says so.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.evidence import Evidence

WINDOW = 200
"""Replies over which the figures that are told are averaged."""
State = Literal["auto", "promoted", "demoted"]
"""What an operator may say about an expert: to judge it by its replies, or to keep it where it is put."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an expert's reply compares with what the reference would have said after the same words."""

    share: float
    """Share of the reply's tokens that are the reference's likeliest, too."""
    gap: float
    """Mean log probability of the tokens by the expert, less that by the reference, in nats."""
    divergence: float | None = None
    """Mean Kullback-Leibler divergence of the expert from the reference over the likeliest tokens, in nats a token: a
    lower bound, since all others count as one token. None where that was not given."""


@dataclass
class Standing:
    """What is known of one expert. It changes with every reply that is judged."""

    floor: float | None
    """Least mean share of agreement; None where no promise was made, and nothing is decided."""
    error_probability: float
    state: State = "auto"
    is_demoted: bool = False
    n_judged: int = 0
    recent: deque[Agreement] = field(default_factory=lambda: deque(maxlen=WINDOW))
    evidence: Evidence | None = None
    """For the next change: that it is below the floor, or while it is demoted above it."""

    def __post_init__(self) -> None:
        self._begin()

    def note(self, agreement: Agreement) -> bool:
        """Take a judged reply into account, and return whether that changes where the expert's requests go."""
        self.n_judged += 1
        self.recent.append(agreement)
        if self.evidence is None:
            return False

        self.evidence = self.evidence.after(agreement.share)
        if self.state != "auto" or self.evidence.wealth < 1 / self.error_probability:
            return False
        self.is_demoted = not self.is_demoted
        self._begin()
        return True

    def put(self, state: State) -> None:
        """Do as an operator says. ``auto`` leaves the expert where it is, and judges it anew."""
        self.state = state
        if state != "auto":
            self.is_demoted = state == "demoted"
        self._begin()

    def _begin(self) -> None:
        """Forget the evidence: what was seen before the change speaks for the other side."""
        if self.floor is not None:
            self.evidence = Evidence("above" if self.is_demoted else "below", self.floor)

    @property
    def agreement(self) -> float | None:
        """Mean share of agreement over the last ``WINDOW`` replies; None before the first."""
        return mean(agreement.share for agreement in self.recent)

    def to_json(self) -> dict[str, Any]:
        """Return the standing as ``/v1/guard`` tells it; means are over the last ``WINDOW`` replies."""
        known = [agreement.divergence for agreement in self.recent if agreement.divergence is not None]
        return {
            "state": self.state,
            "demoted": self.is_demoted,
            "floor": self.floor,
            "judged": self.n_judged,
            "agreement": self.agreement,
            "gap": mean(agreement.gap for agreement in self.recent),
            "divergence": mean(known),
            # As a share of what a decision takes.
            "evidence": self.evidence and min(1.0, self.evidence.wealth * self.error_probability),
        }


class Guard:
    """The standings of all experts by their names. ``floors`` has an entry for each."""

    def __init__(self, floors: Mapping[str, float | None], *, error_probability: float):
        self.standings = {name: Standing(floor, error_probability) for name, floor in floors.items()}

    @property
    def demoted(self) -> frozenset[str]:
        """Names of the experts whose requests the reference answers."""
        return frozenset(name for name, standing in self.standings.items() if standing.is_demoted)


def mean(values: Iterable[float]) -> float | None:
    """Return the mean of some numbers; None for none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
