"""Results: the models of a run and how well each does, as typed rows; what a results file holds.

A row here has what evaluation found, item by item; ``report.rows`` has the same as it lies in the file.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from seap_ray.config import Config
from seap_ray.judges.quality import Quality
from seap_ray.judges.speed import Speed
from seap_ray.models.checkpoint import Checkpoint, versions
from seap_ray.pipeline.evaluate import SEAP_RAY_JUDGE, EvalResult, EvalTask, Failure
from seap_ray.pipeline.prune import PendingCheckpoint, checkpoint_sizes, kv_bytes
from seap_ray.report import rows
from seap_ray.tasks import COLUMN_HEADS, Task


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of a results file; docs/evaluation.md lists its keys. Sizes are None where they are not known."""

    name: str
    method: str
    """Name of the settings; the models of several tasks are one method."""
    kind: str
    """``dense``, ``expert``, ``general``, ``baseline``, or ``summary`` for the mean over a method's models."""
    task: str | None
    """The one task that the model is made for."""
    ratio: float | None
    """Share of the decoder's parameters that was to be removed; None for a model that was not pruned."""
    realised_ratio: float | None
    parameters: int | None
    bytes: int | None
    """Size of the weights."""
    kv_bytes_per_token: int | None
    """Key-value cache that a token takes."""
    planned_ratio: float | None = None
    folder: str | None = None
    quality: Mapping[str, EvalResult] = field(default_factory=dict)
    """By name of the task that the model was judged on."""
    speed: Speed | None = None

    def with_quality(self, quality: Mapping[str, EvalResult]) -> "ModelRow":
        """Return the row with what evaluation found, by task."""
        return replace(self, quality=quality)

    @property
    def quality_json(self) -> dict[str, dict[str, Any]]:
        """What a results file says of each task: ``metric``, ``value``, ``stderr`` and ``n``, or ``error``."""
        return {task: result.brief() for task, result in self.quality.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the row as a results file has it."""
        # The two kinds of rows have the same fields; only these two differ in type.
        values: dict[str, Any] = {key.name: getattr(self, key.name) for key in fields(self)}
        values["quality"] = {task: rows.cell_from_json(result) for task, result in self.quality_json.items()}
        values["speed"] = rows.SpeedCell(**asdict(self.speed)) if self.speed else None
        return rows.ModelRow(**values).to_json()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelRow":
        """Read a row of a results file; the parts of each quality are not in it."""
        row = rows.ModelRow.from_json(content)
        values = {key.name: getattr(row, key.name) for key in fields(cls)}
        values["quality"] = {task: _result_of(cell) for task, cell in row.quality.items()}
        values["speed"] = Speed(**asdict(row.speed)) if row.speed else None
        return cls(**values)


def _result_of(cell: rows.Cell) -> EvalResult:
    if isinstance(cell, rows.FailedCell):
        return Failure(cell.error)
    return Quality(cell.metric, cell.value, cell.stderr, cell.n or 0)


def dense_row(checkpoint: Checkpoint) -> ModelRow:
    """Return the row of the model that all others are pruned from."""
    return ModelRow(
        name="dense",
        method="dense",
        kind="dense",
        task=None,
        ratio=None,
        realised_ratio=0.0,
        parameters=checkpoint.parameters,
        bytes=checkpoint.n_bytes,
        kv_bytes_per_token=kv_bytes([layer.shape for layer in checkpoint.architecture.layers], checkpoint),
        folder=str(checkpoint.folder),
    )


def pruned_row(pending: PendingCheckpoint) -> ModelRow:
    """Return the row of a pruned model."""
    spec = pending.spec
    known = checkpoint_sizes(pending)
    ratio = known.pop("requested_ratio")
    return ModelRow(
        name=spec.name,
        method=spec.method,
        kind=spec.kind,
        task=spec.task,
        ratio=ratio,
        folder=str(pending.target),
        **known,
    )


# --- means over a method's models ------------------------------------------------------------------------------------


def own_task_rows(models: Sequence[ModelRow]) -> list[ModelRow]:
    """Return, for every method that has a model for each task, one row a ratio: each model on its own task."""
    # A dict keeps the order of first appearance.
    methods = {(row.method, row.ratio): None for row in models if row.task and row.quality}
    return [_own_task_row(models, method, ratio) for method, ratio in methods]


def _own_task_row(models: Sequence[ModelRow], method: str, ratio: float | None) -> ModelRow:
    members = [row for row in models if row.task and (row.method, row.ratio) == (method, ratio)]

    quality = {row.task: row.quality[row.task] for row in members if row.task and row.task in row.quality}
    return ModelRow(
        name=f"{method}, own task",
        method=method,
        kind="summary",
        task=None,
        ratio=ratio,
        realised_ratio=_mean([row.realised_ratio for row in members]),
        parameters=_mean([row.parameters for row in members]),
        bytes=_mean([row.bytes for row in members]),
        kv_bytes_per_token=_mean([row.kv_bytes_per_token for row in members]),
        quality=quality,
        speed=_mean_speed([row.speed for row in members]),
    )


def _mean_speed(speeds: Sequence[Speed | None]) -> Speed | None:
    """Return the mean of every rate; None where the speed of a model is not known."""
    known = [speed for speed in speeds if speed]
    if len(known) < len(speeds):
        return None

    means = {}
    for rate in fields(Speed):
        means[rate.name] = _mean([getattr(speed, rate.name) for speed in known])
    return Speed(**means)


def _mean(values: Sequence[Any]) -> Any:
    """Return a whole number for whole numbers; None where a value is None, as of a model that has no plan."""
    if None in values:
        return None

    mean = sum(values) / len(values)
    return round(mean) if all(isinstance(value, int) for value in values) else mean


# --- the file --------------------------------------------------------------------------------------------------------


def results_json(
    config: Config,
    eval_tasks: Mapping[str, EvalTask | Failure],
    models: Sequence[ModelRow],
    router: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the contents of a results file, whichever job writes it."""
    return {
        "command": shlex.join(("python", *sys.argv)),
        "config": config.model_dump(mode="json"),
        "seed": config.run.seed,
        "tasks": {task.name: _task_json(task, eval_tasks.get(task.name)) for task in config.tasks},
        "models": [row.to_json() for row in [*models, *own_task_rows(models)]],
        "router": router,
        "versions": versions(),
    }


def _task_json(task: Task, eval_task: EvalTask | Failure | None) -> dict[str, str]:
    # A task that cannot be judged is there all the same, with what would have judged it.
    metric: str = task.metric
    judge = SEAP_RAY_JUDGE
    if isinstance(eval_task, EvalTask):
        metric = eval_task.metric
        judge = eval_task.judge
    return rows.TaskRow(metric, COLUMN_HEADS[metric], judge).to_json()
