"""A run of the demo's skills, served by ``jobs/deploy.py`` in a process of its own."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil

from seap_ray.demo import skills
from tests.support import NOTHING_TO_JUDGE, ROOT

KEY = "a-key-of-the-tests"
TASKS = ("arithmetic", "reverse")
ROOM = {"serve.max_ongoing_requests": 16, "serve.max_queued_requests": 16}
START_S = 900
METRICS_S = 1
"""Seconds between two reports of a process's metrics."""


def arguments(**values):
    """Return command-line arguments of a job that set these keys."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def make_run(storage):
    """A run of two skills, and a third that no expert need be served for."""
    settings = {
        "run.storage": str(storage),
        "run.name": "served",
        "tasks": [*TASKS, "sort"],
        "corpus.samples": 200,
        "pruning.ratio": 0.2,
        "pruning.baselines": {},
        "evaluation.samples": 0,
    }
    prune(settings)
    return storage / "served"


def prune(settings):
    """Run the main job with these keys, on the cluster of this process: its workers have torch imported by then."""
    main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]
    quick = arguments(**NOTHING_TO_JUDGE, **{"calibration.workers": 1})
    assert main([f"config={ROOT / 'ray_config.yaml'}", *quick, *arguments(**settings)]) == 0


def environment(**more):
    """Return the environment of a job: a cluster of its own, two API keys, frequent metrics."""
    keys = f"another-key-entirely, {KEY}"
    # Ray's processes tell their metrics every ten seconds, and tests wait for them.
    often = {"RAY_metrics_report_interval_ms": f"{1000 * METRICS_S}"}
    return {**os.environ, "RAY_ADDRESS": "local", "SEAP_API_KEYS": keys, **often, **more}


def free_port():
    """Return a TCP port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Service:
    """``jobs/deploy.py`` as a process of its own."""

    def __init__(self, run, log, **more):
        self.port, self.run, self.log = free_port(), run, log
        settings = {
            "run.storage": str(run.parent),
            "run.name": run.name,
            "serve.port": self.port,
            "serve.num_cpus": 0.25,
            "serve.experts": list(TASKS),
            "serve.engine.kv_cache_memory_bytes": 1 << 26,
            **ROOM,
            **more,
        }
        with log.open("w") as out:
            command = [sys.executable, "jobs/deploy.py", *arguments(**settings)]
            # A process group of its own, as a shell gives every command, so that tests can signal all of it.
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, env=environment(), start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while "are served at" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(log.read_text())
            time.sleep(0.5)

    @property
    def url(self):
        """Return the address that the service listens at."""
        return f"http://127.0.0.1:{self.port}"

    def http(self, **kwargs):
        """Return a client that has a key."""
        headers = {"authorization": f"Bearer {KEY}", **kwargs.pop("headers", {})}
        # Without TLS no certificates are needed, and reading them takes longer than most requests.
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, verify=False, **kwargs)

    def processes(self, name):
        """Processes of this service by what they call themselves."""
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if name in " ".join(command_of(p))]

    def stop(self):
        """End the service as a user would, and wait until it is gone."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(120)


def command_of(process):
    """Return a process's command line, nothing where it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def questions(task, n=12):
    """Return held-out questions of a skill."""
    return [row["question"] for row in skills.rows(task, n, split="test", seed=1)]


def chat(text):
    """Return a conversation of one message."""
    return [{"role": "user", "content": text}]
