"""Replicas of a shared engine: each expert has its own, so that they seldom swap; and what all of them say together.

Serve's own routers know no experts, or place them by a hash, which gives one replica many and another none.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


def home(place: int, n_experts: int, n_replicas: int) -> range:
    """Return which replicas are an expert's own: all have as many experts as others, or one more.

    Args:
        place: The expert's place among all that share the engine, from 0.
        n_experts: Experts that share the engine.
        n_replicas: Its replicas, at least 1.
    """
    # With more replicas than experts, an expert has several; the first experts may have one more.
    return range(place % n_replicas, n_replicas, n_experts)


class ExpertReplicaRouter(RequestRouter):
    """Serve's choice of a replica for a request: the expert's own, unless others have much less to do."""

    def initialize_state(self, experts: Sequence[str], spill: int) -> None:  # type: ignore[override]
        """Take what the deployment's config says.

        Args:
            experts: Names of all experts that share the engine.
            spill: Requests that an expert's own replicas may have more than another before that one is used, too.
        """
        self._places = {expert: place for place, expert in enumerate(experts)}
        self._spill = spill

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in the order in which Serve tries them: of each list the one with the least to do."""
        place = self._places.get(_expert_of(pending_request))
        if place is None or not candidate_replicas:  # a question about the engine, which any replica answers
            return [candidate_replicas]

        # Every router has the same replicas, and so the same order.
        replica_ids = sorted(self.curr_replicas, key=lambda replica_id: replica_id.unique_id)
        own_ids = {replica_ids[i] for i in home(place, len(self._places), len(replica_ids))}
        own = [replica for replica in candidate_replicas if replica.replica_id in own_ids]
        others = [replica for replica in candidate_replicas if replica.replica_id not in own_ids]
        if not own or self._least_load(own) - self._least_load(others, default=self._least_load(own)) > self._spill:
            return [candidate_replicas]
        return [own, others]

    def _least_load(self, replicas: Iterable[RunningReplica], default: int = 0) -> int:
        """Return the fewest requests that a replica has, as far as is known here."""
        loads = (self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in replicas)
        return min(loads, default=default)


def joined_states(replicas: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the state of every expert of a shared engine from what its replicas say of theirs.

    An expert is resident where it is in any of them, and down where none can load it.
    """
    states: dict[str, dict[str, Any]] = {}
    for replica in replicas:
        for expert, n_waiting in replica["waiting"].items():
            state = states.setdefault(expert, {"resident": False, "waiting": 0})
            state["resident"] |= expert == replica["resident"]
            state["waiting"] += n_waiting

    for expert, state in states.items():
        if all(expert in replica["failed"] for replica in replicas):
            state["up"] = False
    return states


def _expert_of(request: PendingRequest | None) -> Any:
    """Return the expert that a call names; None for a call that is no request for a reply."""
    return getattr(request.args[0], "model", None) if request and request.args else None
