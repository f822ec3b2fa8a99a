"""Startup: what a user waits for before anything happens: every job's ``--help``, beside a bare interpreter."""

import subprocess
import sys
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


def _run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], cwd=JOBS.parent, stdout=subprocess.DEVNULL, check=True)
