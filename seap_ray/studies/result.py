"""Result: what a study has found, as models and as typed rows of its table."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from seap_ray.pipeline.results import own_task_rows
from seap_ray.report.rows import Cell, ModelRow, QualityCell
from seap_ray.report.study_rows import Estimate, ModelComparisonRow, StudyRow, TaskQualityRow
from seap_ray.studies.runner import EvaluatedModel, StudyRunner


@dataclass(frozen=True)
class StudyResult:
    """What a study has found: its models, and a flat table of its own."""

    models: Sequence[EvaluatedModel]
    columns: Sequence[str]
    rows: Sequence[StudyRow]
    by_task: Sequence[TaskQualityRow] = ()
    """Every model on every task beside the dense model, in studies whose rows are models."""

    @property
    def cells(self) -> list[list[Any]]:
        """The values of all rows, as the JSON and the CSV file hold them."""
        return [row.to_json() for row in self.rows]

    @property
    def failures(self) -> dict[str, int]:
        """Reasons why models could not be judged, with the exit code of each; no plan for a model is no reason."""
        # A model without a plan has no folder, and running the same command again does not change that.
        planned = [model.row for model in self.models if model.row.folder]

        # One fault often costs many results; it is one reason.
        reasons: dict[str, int] = {}
        for row in planned:
            for cell in row.failed_cells.values():
                reasons[cell.error] = cell.exit_code
        return reasons


@dataclass(frozen=True, slots=True)
class SeedMean:
    """A quality that was measured once for every seed."""

    mean: float
    sd: float | None
    """Standard deviation between seeds; None where only one could be measured."""
    stderr: float
    """Mean over the seeds of the standard error."""

    @classmethod
    def of(cls, estimates: Iterable[Estimate]) -> "SeedMean | None":
        """Take the mean over those seeds that could be measured; None where there are none."""
        values = []
        errors = []
        for one_seed in estimates:
            if one_seed.value is not None and one_seed.stderr is not None:
                values.append(one_seed.value)
                errors.append(one_seed.stderr)

        if not values:
            return None

        # One value has no spread.
        return cls(mean(values), stdev(values) if len(values) > 1 else None, mean(errors))


# --- studies whose rows are models -----------------------------------------------------------------------------------


def compare_models(runner: StudyRunner, models: Sequence[EvaluatedModel]) -> StudyResult:
    """Return a table of models, the dense one first; below them a row for every method with a model for each task."""
    beside = [model.beside(models[0]) for model in models]
    columns = ModelComparisonRow.columns(runner.mean_head, runner.task_names)
    return StudyResult(beside, columns, comparison_rows(beside, runner.task_names), task_rows(beside, runner.mean_head))


def task_rows(models: Sequence[EvaluatedModel], mean_head: str) -> list[TaskQualityRow]:
    """Return a row for every task that a model was judged on, and one for the mean over its tasks."""
    rows = [model.row for model in models]
    return [task_row for row in [*rows, *own_task_rows(rows)] for task_row in _task_rows(row, mean_head)]


def _task_rows(row: ModelRow, mean_head: str) -> Iterator[TaskQualityRow]:
    about = row.name, row.ratio, row.realised_ratio, row.parameters
    cells = {task: cell for task, cell in row.quality.items() if isinstance(cell, QualityCell)}
    differences = {task: cell.difference for task, cell in cells.items()}

    for task, cell in cells.items():
        yield TaskQualityRow(
            *about, task, cell.metric, cell.value, cell.stderr, cell.n, cell.against_dense, cell.against_dense_stderr
        )
    # A task of an expert alone is its own mean, and one over some of the tasks compares with no other.
    if len(row.quality) > 1 and len(cells) == len(row.quality):
        overall = Estimate.mean(cells.values())
        known = [difference for difference in differences.values() if difference]
        against = Estimate.mean(known) if len(known) == len(cells) else Estimate()
        yield TaskQualityRow(
            *about, mean_head, mean_head.split()[-1], overall.value, overall.stderr, None, against.value, against.stderr
        )


def comparison_rows(models: Sequence[EvaluatedModel], tasks: Sequence[str]) -> list[ModelComparisonRow]:
    """Return a row for every model, and for every method with a model for each task."""
    rows = [model.row for model in models]
    # The means come last, in the table as in the results file.
    return [_comparison_row(row, tasks) for row in [*rows, *own_task_rows(rows)]]


def _comparison_row(row: ModelRow, tasks: Sequence[str]) -> ModelComparisonRow:
    # A mean over some of the tasks does not compare with one over all.
    is_judged_on_all = set(tasks) <= row.quality.keys()
    overall = Estimate.mean(row.quality.values()) if is_judged_on_all else Estimate()

    return ModelComparisonRow(
        model=row.name,
        ratio=row.ratio,
        realised=row.realised_ratio,
        parameters=row.parameters,
        bytes=row.bytes,
        kv_bytes_per_token=row.kv_bytes_per_token,
        by_task=estimates_by_task(row.quality, tasks),
        mean=overall.value,
        stderr=overall.stderr,
        prefill_tokens_per_s=row.speed.prefill_tokens_per_s if row.speed else None,
        decode_tokens_per_s=row.speed.decode_tokens_per_s if row.speed else None,
        prefill_speedup=row.speed.prefill_speedup if row.speed else None,
        decode_speedup=row.speed.decode_speedup if row.speed else None,
    )


def estimates_by_task(quality: Mapping[str, Cell], tasks: Iterable[str]) -> dict[str, Estimate]:
    """Return the quality on each task as it is; empty for a task that the model was not judged on."""
    estimates = {}
    for task in tasks:
        cell = quality.get(task)
        estimates[task] = Estimate(cell.value, cell.stderr) if isinstance(cell, QualityCell) else Estimate()
    return estimates
