"""Startup: what a new user waits for: every job's ``--help``, beside a bare interpreter, and the demo's whole job."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import Row, alternate
from seap_ray.config import Config
from seap_ray.errors import IncompleteError

SUITE, JOBS = "startup", Path(__file__).parents[1] / "jobs"


def rows(config: Config) -> Iterator[Row]:
    jobs = {job.name: [str(job), "--help"] for job in sorted(JOBS.glob("*.py"))}
    found = alternate(
        {name: partial(run_python, command) for name, command in {"python": ["-c", ""], **jobs}.items()},
        config.benchmarks.rounds,
    )
    for name in jobs:
        yield Row.of(
            SUITE,
            f"jobs/{name} --help",
            baseline=found.median("python"),
            ours=found.median(name),
            unit="s",
            ratios=found.ratios(name, "python"),
            limit=found.median("python"),
            limit_name="an interpreter",
            target="ours <= 1",
        )
    with tempfile.TemporaryDirectory() as storage:
        job = [str(JOBS / "prune.py"), f"run.storage={storage}"]
        started = time.perf_counter()
        run_python(job)
        seconds = time.perf_counter() - started
    yield Row.of(SUITE, "the demo's whole job", ours=seconds, unit="s", target="ours <= 180")


def run_python(command: list[str]) -> None:
    """Raises IncompleteError with what a command said last, if it failed."""
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    python = [sys.executable, *command]
    done = subprocess.run(python, cwd=JOBS.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise IncompleteError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-500:]}")
