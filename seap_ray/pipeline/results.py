"""Results: models and their cells in, what a results file says of them out."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint, versions
from seap_ray.pipeline.evaluate import OURS, EvalResult, EvalTask, Failure
from seap_ray.pipeline.prune import PendingCheckpoint, checkpoint_sizes, kv_bytes
from seap_ray.tasks import SHORT, Task

Model = dict[str, Any]
"""One row of a results file; docs/evaluation.md lists its keys."""


def dense_model(checkpoint: Checkpoint) -> Model:
    """The model that all others are cut from."""
    return {
        "name": "dense",
        "method": "dense",
        "kind": "dense",
        "task": None,
        "ratio": None,
        "realised_ratio": 0.0,
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.n_bytes,
        "kv_bytes_per_token": kv_bytes([layer.shape for layer in checkpoint.architecture.layers], checkpoint),
        "folder": str(checkpoint.folder),
        "quality": {},
    }


def cut_model(draft: PendingCheckpoint) -> Model:
    """A model that was cut."""
    about = checkpoint_sizes(draft)
    return {
        "name": draft.spec.name,
        "method": draft.spec.method,
        "kind": draft.spec.kind,
        "task": draft.spec.task,
        "ratio": about.pop("requested_ratio"),
        **about,
        "folder": str(draft.target),
        "quality": {},
    }


def with_cells(model: Model, cells: Mapping[str, EvalResult]) -> Model:
    return {**model, "quality": {task: cell.brief() for task, cell in cells.items()}}


def own_tasks(models: Sequence[Model]) -> list[Model]:
    """For every method that has a model for each task, one row a ratio: each model on its own task."""
    kinds = {(m["method"], m["ratio"]): None for m in models if m["task"] and m["quality"]}
    return [_own_tasks(models, method, ratio) for method, ratio in kinds]


def _own_tasks(models: Sequence[Model], method: str, ratio: float) -> Model:
    own = [m for m in models if m["task"] and (m["method"], m["ratio"]) == (method, ratio)]
    summary: Model = {
        "name": f"{method}, own task",
        "method": method,
        "kind": "summary",
        "task": None,
        "ratio": ratio,
        "realised_ratio": _mean([m["realised_ratio"] for m in own]),
        **{key: _mean([m[key] for m in own]) for key in ("parameters", "bytes", "kv_bytes_per_token")},
        "quality": {m["task"]: m["quality"][m["task"]] for m in own if m["task"] in m["quality"]},
    }
    if all(m.get("speed") for m in own):
        summary["speed"] = {key: _mean([m["speed"][key] for m in own]) for key in own[0]["speed"]}
    return summary


def _mean(values: Sequence[Any]) -> Any:
    """Of whole numbers a whole one; of models that could not be planned none."""
    if None in values:
        return None
    mean = sum(values) / len(values)
    return round(mean) if all(isinstance(value, int) for value in values) else mean


def results(
    config: Config, exams: Mapping[str, EvalTask | Failure], models: Sequence[Model], router: dict[str, Any] | None
) -> dict[str, Any]:
    """What a results file holds, whatever made it."""
    return {
        "command": shlex.join(("python", *sys.argv)),
        "config": config.model_dump(mode="json"),
        "seed": config.run.seed,
        "tasks": {task.name: _about(task, exams.get(task.name)) for task in config.tasks},
        "models": [*models, *own_tasks(models)],
        "router": router,
        "versions": versions(),
    }


def _about(task: Task, exam: EvalTask | Failure | None) -> dict[str, str]:
    metric, judge = (exam.metric, exam.judge) if isinstance(exam, EvalTask) else (task.metric, OURS)
    return {"metric": metric, "short": SHORT[metric], "judge": judge}
