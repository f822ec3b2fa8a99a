"""Cluster: how a driver connects to Ray, without the noise of Ray's C++ core, and where its tasks run."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

import ray
from ray.data import DataContext

from seap_ray.errors import IncompleteError

HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head alone."""
WATCH_INTERVAL_S = 5.0
"""Seconds between two checks of the head, and that a check may take."""
MAX_MISSED_CHECKS = 3
"""Checks that the head may miss in a row before it counts as gone."""
IDLE_WORKER_S = 120
"""Seconds that a cluster which is started here keeps an idle worker process, when it has more of them than CPUs."""


class ClusterNeeded(BaseException):
    """Work is left to do, and no cluster is connected. It is no error, so no handler of errors may take it."""


def connect(address: str | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, which ``ray job submit`` sets, or start one on this machine.

    From here on SIGTERM is a KeyboardInterrupt. Raises IncompleteError where this machine is too busy to start one.
    """
    if not ray.is_initialized():
        # Ray's C++ core warns of every actor pool of Ray Data on the driver's terminal, and of this setting itself.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Actors are processes of their own; Ray would end as many idle ones in their favour after a second, and what
        # comes after the actors would import torch and transformers, seconds of CPU time, in new ones.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(1000 * IDLE_WORKER_S))

        with _silent_stderr(), _explain_slow_start():
            ray.init(
                address,
                include_dashboard=False,  # of a cluster that ends with the job; it takes five processes
                logging_level=logging.ERROR,
                log_to_driver=bool(os.environ.get("RAY_LOG_TO_DRIVER")),
            )
        # A daemon, so that it does not keep a finished job alive.
        threading.Thread(target=_watch_head, args=(ray.get_runtime_context().gcs_address,), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after ray.init, which sets its own


@contextmanager
def _explain_slow_start() -> Iterator[None]:
    """Say in a line what Ray raises where its node has not started within the 30 seconds that it allows."""
    try:
        yield
    except Exception as error:  # Ray has no narrower class for it
        if "timed out during startup" not in str(error):
            raise
        raise IncompleteError(
            "Ray has not started on this machine within 30 seconds: other processes take its processors; run the same "
            "command again when they are done"
        ) from error


def would_start_cluster() -> bool:
    """Return whether ``connect`` would most likely start a cluster on this machine, which takes seconds."""
    return not ray.is_initialized() and "RAY_ADDRESS" not in os.environ


def connect_driver() -> None:
    """Connect the process that drives a job, and keep Ray's own lines off its terminal."""
    # The first error ends the job with one line; those of tasks beside it would add a traceback each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    connect()

    # Ray Data's own progress would be drawn over the job's.
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def need_cluster() -> None:
    """Raise ClusterNeeded where no cluster is connected; Ray by itself would start one, unchecked."""
    if not ray.is_initialized():
        raise ClusterNeeded


def remote_task(function: Callable[..., Any], **options: Any) -> Any:
    """Return a Ray task, as ``ray.remote`` does. Raises ClusterNeeded where no cluster is connected."""
    need_cluster()
    return ray.remote(**options)(function) if options else ray.remote(function)


def work_task(function: Callable[..., Any], **options: Any) -> Any:
    """Return a Ray task, one CPU and one thread each, for work on weights or records.

    It runs on the head, which holds the cluster together, only where no other node has a CPU.
    """
    need_cluster()
    return remote_task(_on_one_thread(function), num_cpus=1, label_selector=_not_on_head(ray.nodes()), **options)


def _on_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function run on one thread, whatever its process did before: bytes depend on it."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        """Set the number of threads, and call the function."""
        import torch  # takes seconds, which the driver need not wait for

        torch.set_num_threads(1)
        return function(*arguments, **named)

    return run


def all_checked(check: Callable[[Any], bool], items: Sequence[Any]) -> list[bool]:
    """Return what ``check``, which reads files, says of every item; on several nodes by a Ray task for each.

    On one node threads of this process read them: another process would first import torch, which takes seconds.
    """
    n_nodes = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
    if n_nodes > 1:
        task = work_task(check)
        return ray.get([task.remote(item) for item in items])

    # Hashing lets other threads run.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        return list(threads.map(check, items))


def working_nodes() -> list[Mapping[str, Any]]:
    """Return the nodes that a ``work_task`` may run on."""
    nodes = [node for node in ray.nodes() if node["Alive"]]

    # The selector has the head's id behind an exclamation mark, or is empty where the head works too.
    excluded = _not_on_head(nodes).get("ray.io/node-id", "")
    return [node for node in nodes if not excluded or f"!{node['NodeID']}" != excluded]


def _not_on_head(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return a label selector that keeps a task off the head; empty where only the head, or no head, has CPUs."""
    # Nodes without CPUs cannot take the head's work.
    with_cpu = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    heads = [node["NodeID"] for node in with_cpu if HEAD in node["Resources"]]
    return {"ray.io/node-id": f"!{heads[0]}"} if heads and len(with_cpu) > 1 else {}


def _watch_head(address: str) -> None:
    """Warn when the head is gone: Ray's core then ends this process after a minute, in silence."""
    host, _, port = address.rpartition(":")

    # A single check fails on a busy network, too.
    missed = 0
    while missed < MAX_MISSED_CHECKS:
        time.sleep(WATCH_INTERVAL_S)
        try:
            socket.create_connection((host, int(port)), timeout=WATCH_INTERVAL_S).close()
            missed = 0
        except OSError:
            missed += 1

    # A driver that has disconnected meanwhile needs no head.
    if ray.is_initialized():
        warning = "the head of the cluster does not answer; if this ends, run the same command again, on a new cluster"
        print(warning, file=sys.stderr, flush=True)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what C++ code writes to standard error; Python's exceptions come through."""
    # The descriptor itself: C++ does not write through sys.stderr.
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)

    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
