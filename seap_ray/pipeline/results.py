"""Results: the models of a run and how well each does, as the rows of its results file."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from seap_ray.config import Config
from seap_ray.judges.quality import Quality
from seap_ray.models.checkpoint import Checkpoint, versions
from seap_ray.models.loading import model_dtype
from seap_ray.pipeline.checkpoint_writer import PendingCheckpoint, checkpoint_sizes, kv_bytes
from seap_ray.pipeline.evaluate import SEAP_RAY_JUDGE, EvalResult, EvalTask, Failure
from seap_ray.report.rows import Cell, FailedCell, ModelRow, QualityCell, Results, SpeedCell, TaskRow
from seap_ray.tasks import COLUMN_HEADS, Task


def quality_cells(results: Mapping[str, EvalResult], dense: Mapping[str, EvalResult] | None = None) -> dict[str, Cell]:
    """Return the cell of each task: what the results file keeps of a result, without each item's part in it.

    Args:
        results: The model's, by task.
        dense: Those of the dense model, where it was judged beside it.
    """
    return {task: _cell(result, (dense or {}).get(task)) for task, result in results.items()}


def _cell(result: EvalResult, dense: EvalResult | None) -> Cell:
    if isinstance(result, Failure):
        return FailedCell(result.error, result.exit_code)
    difference = result.against(dense) if isinstance(dense, Quality) else None
    return QualityCell(result.metric, result.value, result.stderr, result.n, *(difference or ()))


def dense_row(checkpoint: Checkpoint) -> ModelRow:
    """Return the row of the model that all others are pruned from."""
    shapes = [layer.shape for layer in checkpoint.architecture.layers]

    return ModelRow(
        name="dense",
        method="dense",
        kind="dense",
        realised_ratio=0.0,
        parameters=checkpoint.parameters,
        bytes=checkpoint.n_bytes,
        kv_bytes_per_token=kv_bytes(shapes, checkpoint),
        folder=str(checkpoint.folder),
    )


def pruned_row(pending: PendingCheckpoint) -> ModelRow:
    """Return the row of a pruned model."""
    spec = pending.spec

    sizes = checkpoint_sizes(pending)
    # The manifest has a longer name for what a row calls its ratio.
    ratio = sizes.pop("requested_ratio")

    return ModelRow(
        name=spec.name,
        method=spec.method,
        kind=spec.kind,
        task=spec.task,
        ratio=ratio,
        folder=str(pending.target),
        **sizes,
    )


# --- means over a method's models ------------------------------------------------------------------------------------


def own_task_rows(models: Sequence[ModelRow]) -> list[ModelRow]:
    """Return, for every method that has a model for each task, one row a ratio: each model on its own task."""
    # A model without quality is one of a run that judges nothing. A dict keeps the order of first appearance.
    methods = {(row.method, row.ratio): None for row in models if row.task and row.quality}

    return [_own_task_row(models, method, ratio) for method, ratio in methods]


def _own_task_row(models: Sequence[ModelRow], method: str, ratio: float | None) -> ModelRow:
    members = [row for row in models if row.task and (row.method, row.ratio) == (method, ratio)]

    # A study may have judged an expert on other tasks alone.
    quality = {row.task: row.quality[row.task] for row in members if row.task and row.task in row.quality}

    return ModelRow(
        name=f"{method}, own task",
        method=method,
        kind="summary",
        ratio=ratio,
        realised_ratio=_mean([row.realised_ratio for row in members]),
        parameters=_mean([row.parameters for row in members]),
        bytes=_mean([row.bytes for row in members]),
        kv_bytes_per_token=_mean([row.kv_bytes_per_token for row in members]),
        quality=quality,
        speed=_mean_speed([row.speed for row in members]),
    )


def _mean_speed(speeds: Sequence[SpeedCell | None]) -> SpeedCell | None:
    """Return the mean of every rate; None where the speed of a model is not known."""
    # A mean over some of the models would not compare with one over all.
    known = [speed for speed in speeds if speed]
    if len(known) < len(speeds):
        return None

    means = {}
    for rate in fields(SpeedCell):
        means[rate.name] = _mean([getattr(speed, rate.name) for speed in known])
    return SpeedCell(**means)


def _mean(values: Sequence[Any]) -> Any:
    """Return a whole number for whole numbers; None where a value is None, as of a model that has no plan."""
    # A mean over the others would not compare with one over all.
    if None in values:
        return None

    mean = sum(values) / len(values)
    return round(mean) if all(isinstance(value, int) for value in values) else mean


# --- the file --------------------------------------------------------------------------------------------------------


def make_results(
    config: Config,
    checkpoint: Checkpoint,
    eval_tasks: Mapping[str, EvalTask | Failure],
    models: Sequence[ModelRow],
    router: dict[str, Any] | None,
) -> Results:
    """Return what a results file says, whichever job writes it; below the models each method's mean over its own."""
    # A run without evaluation has tasks all the same.
    tasks = {task.name: _task_row(task, eval_tasks.get(task.name)) for task in config.tasks}

    return Results(
        tasks=tasks,
        models=[*models, *own_task_rows(models)],
        router=router,
        config=config.model_dump(mode="json"),
        seed=config.run.seed,
        command=shlex.join(("python", *sys.argv)),
        versions=versions(),
        # The base decides for all models, whatever the type of their own weights.
        dtype=str(model_dtype(config.model, checkpoint)).removeprefix("torch."),
    )


def _task_row(task: Task, eval_task: EvalTask | Failure | None) -> TaskRow:
    # A task that cannot be judged is there all the same, with what would have judged it.
    if not isinstance(eval_task, EvalTask):
        return TaskRow(task.metric, COLUMN_HEADS[task.metric], SEAP_RAY_JUDGE)

    head = COLUMN_HEADS[eval_task.metric]
    return TaskRow(eval_task.metric, head, eval_task.judge, eval_task.n_rows, eval_task.counts)
