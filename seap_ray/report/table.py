"""Table: the models of a results file as text, in rows and columns; and means of quality."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from seap_ray.progress import count
from seap_ray.report.rows import Cell, FailedCell, ModelRow, QualityCell, Results
from seap_ray.tasks import is_perplexity

STAGES = ("prefill", "decode")
"""Stages of generation whose speed is measured."""


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return columns side by side, the first to the left, the others to the right.

    Columns without any value are left out.
    """
    # Columns that a results file has no values for, such as speeds, would only be in the way.
    has_value = [False] * len(columns)
    for row in rows:
        for column, value in enumerate(row):
            has_value[column] |= value is not None

    shown = [column for column in range(len(columns)) if has_value[column]]
    lines = [[columns[column] for column in shown]]
    for row in rows:
        lines.append([show(row[column]) for column in shown])

    # Every column is as wide as its longest cell.
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    head, *body = [_aligned(line, widths) for line in lines]
    return "\n".join([head, "-" * len(head), *body])


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    # Names are read from their beginning, numbers are compared by their ends.
    aligned = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        aligned.append(cell.ljust(width) if i == 0 else cell.rjust(width))
    return "  ".join(aligned)


def show(value: Any) -> str:
    """Return a value as a cell of text: three decimals, one for 10 and more, nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)

    # So an accuracy and a perplexity have about as many digits.
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def table(results: Results) -> str:
    """Return the models as rows and the tasks as columns; below, why cells have failed and which experts are outdone.

    An expert's own task is in brackets.
    """
    tasks = results.tasks
    models = results.models
    with_speed = any(model.speed for model in models)

    columns = ["model", "ratio", "realised", "params"]
    columns += [f"{name} {task.short}" for name, task in tasks.items()]
    columns.append(mean_head(task.metric for task in tasks.values()))
    # Sizes in bytes matter beside speed only, and would make every other table too wide.
    columns += ["weights", "KV B/token", "prefill tok/s", "decode tok/s"] if with_speed else []
    text = text_table(columns, [_row(model, tasks, with_speed) for model in models])
    return "\n".join([text, *_failures(models), *outdone_experts(models)])


def mean_head(metrics: Iterable[str]) -> str:
    """Return the name of the column that ``mean_quality`` fills for these metrics: ``mean acc`` or ``mean ppl``."""
    return "mean ppl" if all(map(is_perplexity, metrics)) else "mean acc"


def _row(model: ModelRow, tasks: Iterable[str], with_speed: bool) -> list[str]:
    is_planned = model.ratio is not None and model.realised_ratio is not None
    cells = [
        model.name,
        "" if model.ratio is None else f"{model.ratio:g}",
        f"{model.realised_ratio:.4f}" if is_planned else "",
        "" if model.parameters is None else count(model.parameters),
    ]

    for task in tasks:
        cell = _cell(model.quality.get(task))
        cells.append(f"[{cell}]" if task == model.task and cell else cell)

    mean = mean_over(model, tasks)
    cells.append("" if mean is None else f"{show(mean[0])} ±{mean[1]:.3f}")
    if with_speed:
        cells += ["" if model.bytes is None else f"{count(model.bytes)}B", show(model.kv_bytes_per_token)]
        cells += [_speed(model, stage) for stage in STAGES]

    return cells


def _speed(model: ModelRow, stage: str) -> str:
    """Return tokens per second, and their ratio to the dense model's."""
    if model.speed is None:
        return ""
    return f"{count(model.speed.tokens_per_s(stage))} x{model.speed.speedup(stage):.2f}"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, FailedCell):
        return "failed"
    return f"{cell.value:.{1 if is_perplexity(cell.metric) else 3}f}"


def _failures(models: Iterable[ModelRow]) -> list[str]:
    """Return one line for every reason, with the cells that it has cost."""
    # One fault often costs many cells: the line names the first and counts the others.
    cells_of: dict[str, list[str]] = {}
    for model in models:
        for task, error in model.failures.items():
            cells_of.setdefault(error, []).append(f"{model.name} on {task}")

    lines = []
    for error, cells in cells_of.items():
        others = f" and {len(cells) - 1} others" if len(cells) > 1 else ""
        lines.append(f"failed: {cells[0]}{others}: {error}")

    return lines


def outdone_experts(models: Iterable[ModelRow]) -> list[str]:
    """Return a line for each expert that the general model of its ratio beats on its task, by over two standard errors.

    The errors are those of each value alone, so that a difference on the same items is judged with caution.
    """
    models = list(models)
    general = {model.ratio: model for model in models if model.kind == "general"}
    lines = []
    for model in models:
        if model.kind != "expert" or model.task is None or model.ratio not in general:
            continue
        own, other = model.quality.get(model.task), general[model.ratio].quality.get(model.task)
        if isinstance(own, QualityCell) and isinstance(other, QualityCell) and _is_better(other, own):
            lines.append(
                f"{model.task}: its expert is worse on it than the general model ({_cell(own)}, {_cell(other)}); more "
                "calibration rows, or pruning.experts.mix, give it more to go by"
            )
    return lines


def _is_better(cell: QualityCell, than: QualityCell) -> bool:
    """Whether a value is better by more than two standard errors of the difference."""
    error = math.hypot(cell.stderr, than.stderr)
    if is_perplexity(cell.metric):
        return math.log(than.value / cell.value) > 2 * error
    return cell.value - than.value > 2 * error


def mean_over(model: ModelRow, tasks: Iterable[str]) -> tuple[float, float] | None:
    """Return the mean of a model that was judged on all ``tasks``, else None: means over other tasks do not compare."""
    return mean_quality(model.quality.values()) if {*tasks} <= model.quality.keys() else None


def mean_quality(cells: Iterable[Cell]) -> tuple[float, float] | None:
    """Return the mean of cells and its standard error; None without cells, or where one has failed.

    The mean is that of the accuracies, and where there are none the geometric mean of the perplexities. The standard
    error of a perplexity is that of its logarithm, as in a cell.
    """
    qualities: list[QualityCell] = []
    for cell in cells:
        if isinstance(cell, FailedCell):
            return None
        qualities.append(cell)

    if not qualities:
        return None

    # Accuracies and perplexities have no common mean; accuracies win.
    accuracies = [cell for cell in qualities if not is_perplexity(cell.metric)]
    chosen = accuracies or qualities
    error = math.sqrt(sum(cell.stderr**2 for cell in chosen)) / len(chosen)
    values = [cell.value if accuracies else math.log(cell.value) for cell in chosen]
    mean = sum(values) / len(values)
    return (mean if accuracies else math.exp(mean)), error
