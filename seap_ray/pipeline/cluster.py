"""Cluster: the connection of a driver to Ray, without the noise of its C++ core."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head alone."""
WATCH_EVERY_S = 5.0
"""Seconds between two looks at the head, and that one may take."""
IDLE_S = 120
"""Seconds that a worker without work stays, where there are more than CPUs, on a cluster that is started here."""


def connect(address: str | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, which ``ray job submit`` sets, or start one on this machine.

    From here on SIGTERM is a KeyboardInterrupt.
    """
    if not ray.is_initialized():
        # Ray's C++ core warns of every actor pool of Ray Data on the driver's terminal, and of this setting itself.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Actors are processes of their own; Ray would end as many idle ones in their favour after a second, and what
        # comes after the actors would import torch and transformers, seconds of CPU time, in new ones.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(1000 * IDLE_S))
        with _silent_stderr():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=bool(os.environ.get("RAY_LOG_TO_DRIVER")))
        threading.Thread(target=_watch_head, args=(ray.get_runtime_context().gcs_address,), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after ray.init, which sets its own


def work_task(function: Callable[..., Any], **options: Any) -> Any:
    """A Ray task on weights or records: not on the head, which holds the cluster together, where others have CPUs."""
    return ray.remote(num_cpus=1, label_selector=_not_on_head(ray.nodes()), **options)(function)


def working_nodes() -> list[Mapping[str, Any]]:
    """Nodes that a ``work_task`` may run on."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    excluded = _not_on_head(nodes).get("ray.io/node-id", "")
    return [node for node in nodes if not excluded or f"!{node['NodeID']}" != excluded]


def _not_on_head(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a task asks of the labels of its node."""
    able = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    heads = [node["NodeID"] for node in able if HEAD in node["Resources"]]
    return {"ray.io/node-id": f"!{heads[0]}"} if heads and len(able) > 1 else {}


def _watch_head(address: str) -> None:
    """Say it when the head is gone: Ray's core then ends this process after a minute, in silence."""
    host, _, port = address.rpartition(":")
    missed = 0
    while missed < 3:
        time.sleep(WATCH_EVERY_S)
        try:
            socket.create_connection((host, int(port)), timeout=WATCH_EVERY_S).close()
            missed = 0
        except OSError:
            missed += 1
    if ray.is_initialized():
        said = "the head of the cluster does not answer; if this ends, run the same command again, on a new cluster"
        print(said, file=sys.stderr, flush=True)


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
