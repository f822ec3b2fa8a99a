"""Rows: what ``results.json`` and ``results/<study>.json`` say, as frozen values; their JSON has the keys named here.

The pipeline and the studies write these files, the report reads them. docs/evaluation.md lists the keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["dense", "general", "expert", "baseline", "summary"]
"""What a model is; a summary stands for all of a method's models, each judged on its own task."""


@dataclass(frozen=True, slots=True)
class QualityCell:
    """A model's quality on one task."""

    metric: str
    value: float
    stderr: float
    """Standard error of the value; for a perplexity that of its logarithm, so relative."""
    n: int | None = None
    """Number of items, or for a perplexity of tokens."""
    against_dense: float | None = None
    """Difference to the dense model's value, of a perplexity the quotient; None where it is not known."""
    against_dense_stderr: float | None = None
    """Standard error of that, from the differences item by item."""

    @property
    def difference(self) -> "QualityCell | None":
        """The difference to the dense model as a cell of its own; None where it is not known."""
        if self.against_dense is None or self.against_dense_stderr is None:
            return None
        return QualityCell(self.metric, self.against_dense, self.against_dense_stderr, self.n)

    def to_json(self) -> dict[str, Any]:
        """Return the cell as a results file holds it, without a difference that is not known."""
        content = asdict(self)
        if self.difference is None:
            del content["against_dense"], content["against_dense_stderr"]
        return content


@dataclass(frozen=True, slots=True)
class FailedCell:
    """A model that could not be judged on one task."""

    error: str
    """The reason, in one line."""
    exit_code: int = field(default=4, compare=False)
    """Exit code of the job; 4 where the same command may mend the failure. A results file does not hold it."""

    def to_json(self) -> dict[str, Any]:
        """Return the cell as a results file holds it."""
        return {"error": self.error}


Cell = QualityCell | FailedCell


def cell_from_json(content: Mapping[str, Any]) -> Cell:
    """Read a cell of a results file."""
    if "error" in content:
        return FailedCell(content["error"])
    known = {name: content[name] for name in ("n", "against_dense", "against_dense_stderr") if name in content}
    return QualityCell(content["metric"], content["value"], content["stderr"], **known)


@dataclass(frozen=True, slots=True)
class SpeedCell:
    """A model's speed: tokens per second of the whole batch, and the ratio to the dense model's."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_speedup: float
    decode_speedup: float

    def tokens_per_s(self, stage: str) -> float:
        """Return the tokens per second of a stage, ``prefill`` or ``decode``."""
        return self.prefill_tokens_per_s if stage == "prefill" else self.decode_tokens_per_s

    def speedup(self, stage: str) -> float:
        """Return the ratio to the dense model's tokens per second in a stage, ``prefill`` or ``decode``."""
        return self.prefill_speedup if stage == "prefill" else self.decode_speedup

    def to_json(self) -> dict[str, float]:
        """Return the speed as a results file holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model of a results file: what it is, its size, its quality and its speed."""

    name: str
    method: str
    kind: Kind
    task: str | None = None
    """Name of the task that the model is made for; None where it is made for all."""
    ratio: float | None = None
    """Requested share of the decoder's weights to remove; None for a model that was not pruned."""
    planned_ratio: float | None = None
    realised_ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    """Bytes of the weights."""
    kv_bytes_per_token: int | None = None
    folder: str | None = None
    """Where the checkpoint is; None where it could not be made, and for a summary."""
    quality: Mapping[str, Cell] = field(default_factory=dict)
    """The cell of each task that the model was judged on."""
    speed: SpeedCell | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelRow":
        """Read a model of a results file; sizes that the file does not state are None."""
        quality = {task: cell_from_json(cell) for task, cell in content.get("quality", {}).items()}
        speed = SpeedCell(**content["speed"]) if content.get("speed") else None
        return cls(**{**content, "quality": quality, "speed": speed})

    def to_json(self) -> dict[str, Any]:
        """Return the row as a results file holds it, without the keys that a row of its kind never has."""
        # The fields are in the order of the keys.
        content = {name: getattr(self, name) for name in self.__slots__}
        content["quality"] = {task: cell.to_json() for task, cell in self.quality.items()}

        # Neither of these was planned, and a summary has no checkpoint.
        if self.kind in ("dense", "summary"):
            del content["planned_ratio"]

        if self.kind == "summary":
            del content["folder"]

        if self.speed is None:
            del content["speed"]
        else:
            content["speed"] = self.speed.to_json()

        return content

    @property
    def failures(self) -> dict[str, str]:
        """Reasons by task, for the tasks that the model could not be judged on."""
        return {task: cell.error for task, cell in self.failed_cells.items()}

    @property
    def failed_cells(self) -> dict[str, FailedCell]:
        """Cells of the tasks that the model could not be judged on."""
        return {task: cell for task, cell in self.quality.items() if isinstance(cell, FailedCell)}


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task of a results file: how it was judged."""

    metric: str
    short: str = ""
    """The metric's short name, for the head of a column."""
    judge: str = ""
    """``seap_ray`` or ``lm_eval``."""
    n_rows: int = 0
    """Rows that the evaluation's were drawn from, where ``seap_ray`` drew them."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows that were left out of the evaluation, or are worth a look, by ``corpus.REASONS``."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TaskRow":
        """Read a task of a results file."""
        names = ("short", "judge", "n_rows", "counts")
        return cls(content["metric"], **{name: content[name] for name in names if name in content})

    def to_json(self) -> dict[str, Any]:
        """Return the task as a results file holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StudyTable:
    """The table of a study: its rows are also the study's CSV file."""

    study: str
    title: str
    question: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the table's keys as a results file holds them."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Results:
    """A results file: the models that were compared, the tasks, and what they were made with."""

    tasks: Mapping[str, TaskRow]
    models: Sequence[ModelRow]
    router: Mapping[str, Any] | None = None
    """Report of the router on held-out prompts, as ``router.json`` holds it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""
    """Type that every model computed in, such as ``float32``; empty in a file of an older version."""
    table: StudyTable | None = None
    """The study's table; None for the main job."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Results":
        """Read the content of a results file."""
        # The main job has no table of its own.
        table = None
        if "rows" in content:
            table = StudyTable(*(content.get(name, "") for name in StudyTable.__slots__))

        return cls(
            {name: TaskRow.from_json(task) for name, task in content["tasks"].items()},
            [ModelRow.from_json(model) for model in content["models"]],
            content.get("router"),
            content.get("config") or {},
            content.get("seed"),
            content.get("command", ""),
            content.get("versions", {}),
            content.get("dtype", ""),
            table,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of the results file."""
        return {
            **(self.table.to_json() if self.table else {}),
            "command": self.command,
            "config": self.config,
            "seed": self.seed,
            "dtype": self.dtype,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "models": [model.to_json() for model in self.models],
            "router": self.router,
            "versions": self.versions,
        }

    @property
    def dense(self) -> ModelRow | None:
        """The model that all others are cut from, if it was judged."""
        return next((model for model in self.models if model.kind == "dense"), None)
