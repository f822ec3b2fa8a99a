"""Watch: which models can answer right now, from Serve's own status and from requests that just failed."""

import logging
import threading
import time
from collections.abc import Mapping

from ray import serve

logger = logging.getLogger("ray.serve")

PERIOD_S = 2.0
"""Between two looks at Serve's status, each a tenth of a second of CPU: there are none without an alarm."""
DOUBT_S = 5.0
"""How long a failed request is believed over the status, which learns of a death a little later."""


class Watch:
    """What is known of the models. Nobody waits for it: its own thread asks Serve, from an alarm until all is well.

    ``is_single`` says that a model has one replica, so that a failed request speaks for the model.
    """

    def __init__(self, deployments: Mapping[str, str], app_name: str, *, is_single: bool):
        self._deployments, self._app_name, self._is_single = dict(deployments), app_name, is_single
        self._down = frozenset(deployments)  # until the first look: the ingress may start before its models
        self._gone: frozenset[str] = frozenset()
        self._doubted: dict[str, float] = {}
        self._alarm = threading.Event()
        self._alarm.set()
        threading.Thread(target=self._follow, name="watch", daemon=True).start()

    def is_up(self, model: str) -> bool:
        """Whether a new request may go there."""
        return model not in self._down and self._doubted.get(model, 0) < time.monotonic()

    def is_gone(self, model: str) -> bool:
        """Whether no replica is left that could still answer what was sent before: a stopping one does."""
        return model in self._gone

    def doubt(self, model: str) -> None:
        """A request to ``model`` failed as one does whose engine died."""
        if self._is_single:
            self._doubted[model] = time.monotonic() + DOUBT_S
        self._alarm.set()

    def alarm(self) -> None:
        """Something takes long: have Serve asked."""
        self._alarm.set()

    def _follow(self) -> None:
        while self._alarm.wait():
            self._alarm.clear()
            try:
                self._look()
            except Exception as error:  # the controller restarts; what was known stays
                logger.warning(f"no status from Serve ({error})")
                self._alarm.set()
            if not all(map(self.is_up, self._deployments)):
                self._alarm.set()
            time.sleep(PERIOD_S)

    def _look(self) -> None:
        status = serve.status().applications[self._app_name].deployments
        states = {model: status[name].replica_states for model, name in self._deployments.items() if name in status}
        self._down = frozenset(model for model, of in states.items() if not of.get("RUNNING"))
        self._gone = frozenset(model for model in self._down if not states[model].get("STOPPING"))
