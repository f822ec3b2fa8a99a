"""Guard server: the service's one process that knows who is demoted. The ingress judges, this one counts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.util import metrics

from serve.guard import Agreement, Guard, Standing, State

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """What the guard goes by."""

    reference: str
    """Name of the model that judges."""
    floors: Mapping[str, float | None]
    """Every expert's least mean share of agreement; None where nothing was promised."""
    error_probability: float
    share: float
    """Share of the requests to experts that are judged."""


class GuardServer:
    """The standings of all experts, for every ingress."""

    def __init__(self, *, settings: GuardSettings) -> None:
        self._settings = settings
        self._guard = Guard(settings.floors, error_probability=settings.error_probability)
        tags = ("expert",)
        self._agreement = metrics.Gauge("seap_agreement", "Share of an expert's tokens that are its reference's", tags)
        self._demoted = metrics.Gauge("seap_demoted", "1 for an expert that the reference answers for", tags)
        for name in settings.floors:
            self._demoted.set(0, tags={"expert": name})

    async def note(self, expert: str, agreement: Agreement) -> None:
        """Take a judged reply of an expert into account."""
        standing = self._guard.standings[expert]
        has_changed = standing.note(agreement)
        self._agreement.set(standing.agreement or 0.0, tags={"expert": expert})
        if has_changed:
            self._announce(expert, standing)

    async def demoted(self) -> frozenset[str]:
        """Return the names of the demoted experts."""
        return self._guard.demoted

    async def put(self, expert: str, state: State) -> dict[str, Any]:
        """Do as an operator says, and return the expert's standing."""
        standing = self._guard.standings[expert]
        was_demoted = standing.is_demoted
        standing.put(state)
        if standing.is_demoted != was_demoted:
            self._announce(expert, standing)
        return standing.to_json()

    async def to_json(self) -> dict[str, Any]:
        """Return what ``/v1/guard`` tells."""
        settings = self._settings
        return {
            "reference": settings.reference,
            "share": settings.share,
            "error_probability": settings.error_probability,
            "experts": {name: standing.to_json() for name, standing in self._guard.standings.items()},
        }

    def _announce(self, expert: str, standing: Standing) -> None:
        """Tell the log and the metrics where an expert's requests go from now on."""
        self._demoted.set(int(standing.is_demoted), tags={"expert": expert})
        who = f"{self._settings.reference} answers for it" if standing.is_demoted else "it answers again"
        logger.warning(f"{expert}: {who}; {standing.to_json()}")
