"""Watch: knows which models can answer right now, from Serve's own status and from requests that just failed."""

import logging
import threading
import time
from collections.abc import Mapping

from ray import serve
from ray.serve.schema import ReplicaState

logger = logging.getLogger("ray.serve")

PERIOD_S = 2.0
"""Seconds between two queries of Serve's status. A query takes a tenth of a CPU second, so none is made without an
alarm."""
DOUBT_S = 5.0
"""Seconds for which a failed request counts more than the status, which learns of a death a little later."""


class Watch:
    """The state of the models, without waiting: a thread of its own queries Serve, from an alarm until all are up.

    ``has_one_replica`` says that every model has one replica, so that a failed request is evidence about the model.
    """

    def __init__(self, deployments: Mapping[str, str], app_name: str, *, has_one_replica: bool):
        self._deployments = dict(deployments)
        self._app_name = app_name
        self._has_one_replica = has_one_replica
        # Until the first query all count as down: the ingress may start before its models.
        self._down = frozenset(deployments)
        self._gone: frozenset[str] = frozenset()
        self._doubted: dict[str, float] = {}

        # The sets above are replaced and never changed, so who reads them needs no lock.
        self._alarm = threading.Event()
        self._alarm.set()
        threading.Thread(target=self._follow, name="watch", daemon=True).start()

    def is_up(self, model: str) -> bool:
        """Return whether a new request may go to the model."""
        return model not in self._down and self._doubted.get(model, 0) < time.monotonic()

    def is_gone(self, model: str) -> bool:
        """Return whether no replica is left to answer requests sent earlier. One that is stopping still does."""
        return model in self._gone

    def doubt(self, model: str) -> None:
        """Note that a request to ``model`` failed in the way of one whose engine died."""
        # Of several replicas the others may be well, so there the status alone counts.
        if self._has_one_replica:
            self._doubted[model] = time.monotonic() + DOUBT_S
        self._alarm.set()

    def alarm(self) -> None:
        """Have Serve queried, because something takes long."""
        self._alarm.set()

    def _follow(self) -> None:
        """Query Serve after every alarm, and again until all models are up."""
        while self._alarm.wait():
            self._alarm.clear()  # before the query, so that an alarm during it leads to another one
            try:
                self._query()
            except Exception as error:  # the controller is being restarted; the last state stays
                logger.warning(f"no status from Serve ({error})")
                self._alarm.set()

            # Nobody may ask for a model that is down, and it should be seen to come up.
            if not all(map(self.is_up, self._deployments)):
                self._alarm.set()

            time.sleep(PERIOD_S)

    def _query(self) -> None:
        """Read the state of every model from Serve."""
        status = serve.status().applications[self._app_name].deployments
        replicas = {model: status[name].replica_states for model, name in self._deployments.items() if name in status}
        self._down = frozenset(model for model, states in replicas.items() if not states.get(ReplicaState.RUNNING))
        self._gone = frozenset(model for model in self._down if not replicas[model].get(ReplicaState.STOPPING))
