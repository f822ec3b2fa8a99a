"""Watch: which models can answer right now, from Serve's own status and from requests that just failed."""

import logging
import threading
import time
from collections.abc import Mapping

from ray import serve

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
"""Between two looks at Serve's status."""
DOUBT_S = 5.0
"""How long a failed request is believed over the status, which learns of a death a little later."""


class Watch:
    """A thread that asks Serve. A model counts as up until something says otherwise."""

    def __init__(self, deployments: Mapping[str, str], app_name: str):
        self._deployments, self._app_name = dict(deployments), app_name
        self._down: frozenset[str] = frozenset()
        self._doubted: dict[str, float] = {}
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def is_up(self, model: str) -> bool:
        return model not in self._down and self._doubted.get(model, 0) < time.monotonic()

    def doubt(self, model: str) -> None:
        """A request to ``model`` failed as one does whose engine died."""
        self._doubted[model] = time.monotonic() + DOUBT_S

    def _look(self) -> None:
        while True:
            try:
                status = serve.status().applications[self._app_name].deployments
                self._down = frozenset(
                    model
                    for model, name in self._deployments.items()
                    if name in status and not status[name].replica_states.get("RUNNING")
                )
            except Exception as error:  # the controller restarts; what was known stays
                logger.debug(f"no status from Serve ({error})")
            time.sleep(PERIOD_S)
