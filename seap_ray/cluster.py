"""Cluster: the connection of a driver to Ray, without the noise of its C++ core."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


def connect(address: str | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, which ``ray job submit`` sets, or start one on this machine.

    From here on SIGTERM is a KeyboardInterrupt.
    """
    if not ray.is_initialized():
        # Ray's C++ core warns of every actor pool of Ray Data on the driver's terminal, and of this setting itself.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with _silent_stderr():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=bool(os.environ.get("RAY_LOG_TO_DRIVER")))
    signal.signal(signal.SIGTERM, _stop)  # after ray.init, which sets its own


def _stop(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what C++ code writes to the terminal away from it; Python's exceptions come through."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
