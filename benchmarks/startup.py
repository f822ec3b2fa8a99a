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

SUITE = "startup"
JOBS = Path(__file__).parents[1] / "jobs"


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows: one for each job's help, one for the demo."""
    commands = {job.name: [str(job), "--help"] for job in sorted(JOBS.glob("*.py"))}
    contestants = {name: partial(run_python, command) for name, command in commands.items()}
    # All in turns with an interpreter that does nothing.
    timings = alternate({"python": partial(run_python, ["-c", ""]), **contestants}, config.benchmarks.rounds)

    for name in commands:
        yield Row.of(
            SUITE,
            f"jobs/{name} --help",
            baseline=timings.median("python"),
            ours=timings.median(name),
            unit="s",
            ratios=timings.ratios(name, "python"),
            limit=timings.median("python"),
            limit_name="an interpreter",
            target="ours <= 1",
        )

    # Once: it takes minutes.
    with tempfile.TemporaryDirectory() as storage:
        started = time.perf_counter()
        run_python([str(JOBS / "prune.py"), f"run.storage={storage}"])
        seconds = time.perf_counter() - started

    yield Row.of(SUITE, "the demo's whole job", ours=seconds, unit="s", target="ours <= 180")


def run_python(command: list[str]) -> None:
    """Run a command of this interpreter, on a Ray of its own.

    Raises:
        IncompleteError: It failed; the message ends with its last output.
    """
    # Never the cluster that this process may be part of.
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    python = [sys.executable, *command]
    done = subprocess.run(python, cwd=JOBS.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise IncompleteError(f"{' '.join(command)} failed: {(done.stdout + done.stderr)[-500:]}")
