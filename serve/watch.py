"""Watch: which models can answer right now, from Serve's own status and from requests that just failed."""

import logging
import threading
import time
from collections.abc import Mapping

from ray import serve

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
"""Between two looks at Serve's status, which costs a tenth of a second of CPU: there are none without a cause."""
DOUBT_S = 5.0
"""How long a failed request is believed over the status, which learns of a death a little later."""


class Watch:
    """Asks Serve when a request fails or waits, and from then on until all is well. May be used from any thread."""

    def __init__(self, deployments: Mapping[str, str], app_name: str):
        self._deployments, self._app_name = dict(deployments), app_name
        self._down: frozenset[str] = frozenset()
        self._doubted: dict[str, float] = {}
        self._looked = 0.0
        self._looking = threading.Lock()
        self._alarm = threading.Event()
        threading.Thread(target=self._follow, name="watch", daemon=True).start()

    def is_up(self, model: str) -> bool:
        """By what is known; a model counts as up until something says otherwise."""
        return model not in self._down and self._doubted.get(model, 0) < time.monotonic()

    def doubt(self, model: str) -> None:
        """A request to ``model`` failed as one does whose engine died."""
        self._doubted[model] = time.monotonic() + DOUBT_S
        self._alarm.set()

    def look(self) -> None:
        """Ask Serve, unless somebody just did."""
        with self._looking:
            if time.monotonic() - self._looked < PERIOD_S:
                return
            try:
                status = serve.status().applications[self._app_name].deployments
            except Exception as error:  # the controller restarts; what was known stays
                logger.warning(f"no status from Serve ({error})")
                return
            finally:
                self._looked = time.monotonic()
            self._down = frozenset(
                model
                for model, name in self._deployments.items()
                if name in status and not status[name].replica_states.get("RUNNING")
            )
        if self._down:
            self._alarm.set()

    def _follow(self) -> None:
        while self._alarm.wait():
            time.sleep(PERIOD_S)
            self.look()
            if all(map(self.is_up, self._deployments)):
                self._alarm.clear()
