"""Report: progress while a job runs, the table at its end."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

PLAIN_EVERY = 10.0
"""Seconds between two progress lines where there is no terminal."""


def say(text: str) -> None:
    print(text, flush=True)


def progress(steps: Iterable[int], total: int, label: str, unit: str = "") -> Iterator[int]:
    """Pass ``steps`` through, each worth that many of ``total``: a bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        with tqdm(total=total, desc=label, unit=unit, unit_scale=True, file=sys.stdout) as bar:
            for step in steps:
                bar.update(step)
                yield step
        return
    started = said = time.monotonic()
    first: tuple[float, int] | None = None
    done = 0
    for step in steps:
        done += step
        now = time.monotonic()
        first = first or (now, done)
        yield step
        if now - said > PLAIN_EVERY and done < total:
            said = now
            share = f"{_count(done)}/{_count(total)}{unit} ({done / total:.0%})"
            say(f"{label} {share}{_rate(first, now, done, total, unit)}")
    say(f"{label} {_count(done)}{unit} in {time.monotonic() - started:.1f} s")


def _rate(first: tuple[float, int], now: float, done: int, total: int, unit: str) -> str:
    """Rate and remaining time, counted from the first step: before it models were loaded, which says nothing."""
    if done == first[1]:
        return ""
    rate = (done - first[1]) / (now - first[0])
    return f", {_count(rate)}{unit}/s, {(total - done) / rate:.0f} s left"


def _count(n: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def table(results: dict[str, Any]) -> str:
    """The models as rows, the tasks as columns. In brackets: an expert on its own task."""
    tasks = results["tasks"]
    head = [
        "model",
        "ratio",
        "realised",
        "params",
        *(f"{name} {about['short']}" for name, about in tasks.items()),
        "mean acc",
    ]
    rows = [head, *(_row(model, tasks) for model in results["models"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(model: dict[str, Any], tasks: dict[str, Any]) -> list[str]:
    cells = [
        model["name"],
        "" if model["ratio"] is None else f"{model['ratio']:g}",
        "" if model["ratio"] is None else f"{model['realised_ratio']:.4f}",
        _count(model["parameters"]),
    ]
    for task in tasks:
        quality = model["quality"].get(task)
        cell = "" if quality is None else f"{quality['value']:.{1 if tasks[task]['short'] == 'ppl' else 3}f}"
        cells.append(f"[{cell}]" if task == model["name"] and cell else cell)
    mean = mean_accuracy(model, tasks)
    return [*cells, "" if mean is None else f"{mean:.3f}"]


def mean_accuracy(model: dict[str, Any], tasks: dict[str, Any]) -> float | None:
    """Mean over the tasks that are judged by accuracy."""
    values = [q["value"] for task, q in model["quality"].items() if tasks[task]["short"] != "ppl"]
    return sum(values) / len(values) if values else None


def own_tasks(models: list[dict[str, Any]], tasks: dict[str, Any], ratio: float) -> dict[str, Any] | None:
    """The experts of one ratio as one row: each on its own task."""
    experts = [m for m in models if m["kind"] == "expert" and m["ratio"] == ratio and m["quality"]]
    if not experts:
        return None
    return {
        "name": "experts, own task",
        "kind": "summary",
        "ratio": ratio,
        "realised_ratio": sum(m["realised_ratio"] for m in experts) / len(experts),
        "parameters": math.floor(sum(m["parameters"] for m in experts) / len(experts)),
        "quality": {m["name"]: m["quality"][m["name"]] for m in experts},
    }
