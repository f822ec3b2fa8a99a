"""Startup: what a new user waits for: every job's ``--help``, beside a bare interpreter, and the demo's whole job."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from seap_ray.benchmarks.measure import Row, alternate
from seap_ray.config import Config

SUITE, JOBS = "startup", Path(__file__).parents[2] / "jobs"


def rows(config: Config) -> Iterator[Row]:
    jobs = {job.name: [str(job), "--help"] for job in sorted(JOBS.glob("*.py"))}
    found = alternate(
        {name: partial(_run, command) for name, command in {"python": ["-c", ""], **jobs}.items()},
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
        whole = alternate({"job": partial(_run, job)}, 1, warm_up=False)
    yield Row.of(SUITE, "the demo's whole job", ours=whole.median("job"), unit="s", target="ours <= 180")


def _run(command: list[str]) -> None:
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    subprocess.run([sys.executable, *command], cwd=JOBS.parent, env=environment, stdout=subprocess.DEVNULL, check=True)
