"""Table: the models of a results file as text, rows and columns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seap_ray.progress import count
from seap_ray.tasks import is_perplexity

Model = Mapping[str, Any]


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns side by side, the first to the left, the others to the right; those without any value are left out."""
    told = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    shown = [[columns[i] for i in told], *([show(row[i]) for i in told] for row in rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(told))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in shown
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def show(value: Any) -> str:
    """A value as a cell of text: three decimals, fewer for large numbers."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def table(results: Mapping[str, Any]) -> str:
    """The models as rows, the tasks as columns; below, why cells have failed. In brackets: an expert's own task."""
    tasks, models = results["tasks"], results["models"]
    with_speed = any(model.get("speed") for model in models)
    columns = ["model", "ratio", "realised", "params"]
    columns += [f"{name} {about['short']}" for name, about in tasks.items()]
    columns.append(mean_head(tasks))
    columns += ["weights", "KV B/token", "prefill tok/s", "decode tok/s"] if with_speed else []
    text = text_table(columns, [_row(model, tasks, with_speed) for model in models])
    return "\n".join([text, *_failures(models)])


def mean_head(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Head of the column of ``mean_quality``."""
    return "mean ppl" if all(is_perplexity(about["metric"]) for about in tasks.values()) else "mean acc"


def _row(model: Model, tasks: Iterable[str], with_speed: bool) -> list[str]:
    cells = [
        model["name"],
        "" if model["ratio"] is None else f"{model['ratio']:g}",
        "" if model["ratio"] is None or model["realised_ratio"] is None else f"{model['realised_ratio']:.4f}",
        "" if model["parameters"] is None else count(model["parameters"]),
    ]
    for task in tasks:
        cell = _cell(model["quality"].get(task))
        cells.append(f"[{cell}]" if task == model.get("task") and cell else cell)
    mean = mean_over(model, tasks)
    cells.append("" if mean is None else f"{show(mean[0])} ±{mean[1]:.3f}")
    if with_speed:
        cells += ["" if model["bytes"] is None else f"{count(model['bytes'])}B", show(model["kv_bytes_per_token"])]
        cells += [_speed(model, stage) for stage in ("prefill", "decode")]
    return cells


def _speed(model: Model, stage: str) -> str:
    """Tokens per second, and times the dense model's."""
    speed = model.get("speed")
    return f"{count(speed[f'{stage}_tokens_per_s'])} x{speed[f'{stage}_speedup']:.2f}" if speed else ""


def _cell(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    if "error" in quality:
        return "failed"
    return f"{quality['value']:.{1 if is_perplexity(quality['metric']) else 3}f}"


def _failures(models: Iterable[Model]) -> list[str]:
    """One line for every reason, with the cells that it has cost."""
    where: dict[str, list[str]] = {}
    for model in models:
        for task, cell in model["quality"].items():
            if "error" in cell:
                where.setdefault(cell["error"], []).append(f"{model['name']} on {task}")
    return [
        f"failed: {cells[0]}{f' and {len(cells) - 1} others' if len(cells) > 1 else ''}: {error}"
        for error, cells in where.items()
    ]


def mean_over(model: Model, tasks: Iterable[str]) -> tuple[float, float] | None:
    """``mean_quality`` of a model; None where it was not judged on all ``tasks``: other means do not compare."""
    return mean_quality(model["quality"].values()) if {*tasks} <= model["quality"].keys() else None


def mean_quality(cells: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Mean accuracy of those cells that have one, else the geometric mean of the perplexities, and its standard error.

    The error of a perplexity is that of its logarithm, as in a cell. None without cells, or where one has failed.
    """
    cells = list(cells)
    if not cells or any("error" in cell for cell in cells):
        return None
    accuracies = [cell for cell in cells if not is_perplexity(cell["metric"])]
    chosen = accuracies or cells
    error = math.sqrt(sum(cell["stderr"] ** 2 for cell in chosen)) / len(chosen)
    values = [cell["value"] if accuracies else math.log(cell["value"]) for cell in chosen]
    mean = sum(values) / len(values)
    return (mean if accuracies else math.exp(mean)), error
