"""Table: the models of a results file as text, rows and columns."""

import math
from typing import Any

from seap_ray.progress import count


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
        count(model["parameters"]),
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
