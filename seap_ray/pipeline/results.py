"""Results: the models of a run and how well each does, as typed rows; what a results file holds.

``ModelRow.to_json`` and ``ModelRow.from_json`` are the only places that know the keys of a row in a results file.
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
from seap_ray.tasks import SHORT, Task


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
        is_summary = self.kind == "summary"
        row: dict[str, Any] = {
            "name": self.name,
            "method": self.method,
            "kind": self.kind,
            "task": self.task,
            "ratio": self.ratio,
        }
        if self.kind != "dense" and not is_summary:
            row["planned_ratio"] = self.planned_ratio
        row |= {
            "realised_ratio": self.realised_ratio,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }
        if not is_summary:
            row["folder"] = self.folder
        row["quality"] = self.quality_json
        if self.speed:
            row["speed"] = asdict(self.speed)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "ModelRow":
        """Read a row of a results file."""
        quality = {task: _result_from_json(result) for task, result in row["quality"].items()}
        speed = Speed(**row["speed"]) if row.get("speed") else None
        return cls(**{**row, "quality": quality, "speed": speed})


def _result_from_json(result: Mapping[str, Any]) -> EvalResult:
    return Failure(result["error"]) if "error" in result else Quality(**result)


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


def own_task_rows(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """Return, for every method that has a model for each task, one row a ratio: each model on its own task."""
    # A dict keeps the order of first appearance.
    methods = {(row.method, row.ratio): None for row in rows if row.task and row.quality}
    return [_own_task_row(rows, method, ratio) for method, ratio in methods]


def _own_task_row(rows: Sequence[ModelRow], method: str, ratio: float | None) -> ModelRow:
    members = [row for row in rows if row.task and (row.method, row.ratio) == (method, ratio)]
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
    return Speed(**{rate.name: _mean([getattr(speed, rate.name) for speed in known]) for rate in fields(Speed)})


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
    rows: Sequence[ModelRow],
    router: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the contents of a results file, whichever job writes it."""
    return {
        "command": shlex.join(("python", *sys.argv)),
        "config": config.model_dump(mode="json"),
        "seed": config.run.seed,
        "tasks": {task.name: _task_json(task, eval_tasks.get(task.name)) for task in config.tasks},
        "models": [row.to_json() for row in [*rows, *own_task_rows(rows)]],
        "router": router,
        "versions": versions(),
    }


def _task_json(task: Task, eval_task: EvalTask | Failure | None) -> dict[str, str]:
    metric: str = task.metric
    judge = SEAP_RAY_JUDGE
    if isinstance(eval_task, EvalTask):
        metric = eval_task.metric
        judge = eval_task.judge
    return {"metric": metric, "short": SHORT[metric], "judge": judge}
