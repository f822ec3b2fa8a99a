"""Study rows: one row of a study's table. This is the schema between the studies, which write rows, and the report.

A row's fields are in the order of the table's columns. Two parts of a table depend on the run. The column of the mean
is named after its metric, ``mean acc`` or ``mean ppl``; and some rows have a column for every task, followed by one for
its standard error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Self

from seap_ray.report.rows import Cell, StudyTable
from seap_ray.report.table import mean_quality

MEAN_HEADS = ("mean acc", "mean ppl")
"""Names of the column of the mean, by metric."""
BY_TASK = "{by_task}"
"""Stands in ``COLUMNS`` for two columns of every task; the field ``by_task`` has their values."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with its standard error; both are None where nothing could be measured."""

    value: float | None = None
    stderr: float | None = None

    @classmethod
    def mean(cls, cells: Iterable[Cell]) -> "Estimate":
        """Take the mean of cells, as ``report.table.mean_quality`` has it."""
        pair = mean_quality(cells)
        return cls(*pair) if pair else cls()


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A row of a study's table."""

    COLUMNS: ClassVar[tuple[str, ...]]
    """Names of the columns, in the order of the fields; ``{mean}`` is the mean's name."""

    @classmethod
    def columns(cls, mean_head: str = MEAN_HEADS[0], tasks: Iterable[str] = ()) -> list[str]:
        """Return the names of the table's columns, for a table about ``tasks``."""
        names: list[str] = []
        for column in cls.COLUMNS:
            if column == BY_TASK:
                names += with_stderr(tasks)
            else:
                names.append(column.format(mean=mean_head))

        return names

    @classmethod
    def from_table(cls, table: StudyTable) -> list[Self]:
        """Read a table's rows by the names of its columns; a column that it does not have is None."""
        # A table without a mean has no column of either name, so it does not matter which is looked for.
        mean_head = mean_head_of(table.columns) or MEAN_HEADS[0]
        return [cls._from_cells(table.columns, cells, mean_head) for cells in table.rows]

    @classmethod
    def _from_cells(cls, columns: Sequence[str], cells: Sequence[Any], mean_head: str) -> Self:
        # Columns are taken one by one by their names. What is left over in the end is about the tasks.
        unread = list(zip(columns, cells, strict=True))
        values: dict[str, Any] = {}
        is_after_tasks = False
        for field, column in zip(_fields(cls), cls.COLUMNS, strict=True):
            if column == BY_TASK:
                is_after_tasks = True
            else:
                values[field.name] = _take(unread, column.format(mean=mean_head), last=is_after_tasks)

        # What no other field has taken is about the tasks.
        if is_after_tasks:
            values["by_task"] = _estimates(unread)

        return cls(**values)

    def to_json(self) -> list[Any]:
        """Return the row's cells in the order of the columns."""
        cells: list[Any] = []
        for field, column in zip(_fields(self), self.COLUMNS, strict=True):
            value = getattr(self, field.name)
            if column == BY_TASK:
                # In the order of the tasks, as ``columns`` names them.
                for estimate in value.values():
                    cells += [estimate.value, estimate.stderr]
            else:
                cells.append(value)

        return cells


def _fields(row: StudyRow | type[StudyRow]) -> tuple[Field[Any], ...]:
    # In the order of the class's lines, which is the order of COLUMNS.
    return fields(row)


def with_stderr(names: Iterable[str]) -> list[str]:
    """Return two columns for every name: its own, and that of its standard error."""
    columns: list[str] = []
    for name in names:
        columns += [name, f"{name} stderr"]
    return columns


def _take(unread: list[tuple[str, Any]], column: str, *, last: bool) -> Any:
    """Remove a column from the unread ones and return its value, or None where there is no such column.

    A task may be named like a column. Then what stands before the tasks is the first of the two, what stands after them
    the ``last``.
    """
    places = [place for place, (name, _) in enumerate(unread) if name == column]
    if not places:
        return None
    _, value = unread.pop(places[-1] if last else places[0])
    return value


def _estimates(unread: Sequence[tuple[str, Any]]) -> dict[str, Estimate]:
    """Read the columns of the tasks, which come in pairs."""
    pairs = zip(unread[::2], unread[1::2], strict=True)
    return {task: Estimate(value, stderr) for (task, value), (_, stderr) in pairs}


def mean_head_of(columns: Sequence[str]) -> str | None:
    """Return ``mean acc`` or ``mean ppl``, whichever a column is named after, or None."""
    # By the end: a study may name two means, ``experts mean acc`` and ``general mean acc``.
    for column in columns:
        for head in MEAN_HEADS:
            if column.endswith(head):
                return head
    return None


def mean_column_of(columns: Sequence[str]) -> str | None:
    """Return the first column with a mean, or None."""
    return next((column for column in columns if column.endswith(MEAN_HEADS)), None)


# --- the studies -----------------------------------------------------------------------------------------------------

_SIZE = ("ratio", "realised", "parameters", "bytes", "kv_bytes_per_token")
_SPEED = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_speedup", "decode_speedup")


@dataclass(frozen=True, slots=True)
class ModelComparisonRow(StudyRow):
    """A model with its size, its quality on every task and its speed, in the studies ``table`` and ``ratio``."""

    COLUMNS = ("model", *_SIZE, BY_TASK, "{mean}", "stderr", *_SPEED)

    model: str
    ratio: float | None
    """None for the dense model."""
    realised: float | None
    """Share of the decoder layers' weights that is removed."""
    parameters: int | None
    bytes: int | None
    kv_bytes_per_token: int | None
    by_task: Mapping[str, Estimate]
    mean: float | None
    stderr: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    prefill_speedup: float | None
    decode_speedup: float | None


@dataclass(frozen=True, slots=True)
class TaskQualityRow(StudyRow):
    """A model's quality on one task, or on all of its tasks on average, beside the dense model's on the same items."""

    COLUMNS = (
        *("model", "ratio", "realised", "parameters", "task", "metric", "value", "stderr", "n"),
        *("against dense", "against dense stderr"),
    )

    model: str
    ratio: float | None
    realised: float | None
    parameters: int | None
    task: str
    """A task, or ``mean acc`` or ``mean ppl`` for the mean over the model's tasks."""
    metric: str
    value: float | None
    stderr: float | None
    n: int | None
    against_dense: float | None
    """Difference of accuracies, or quotient of perplexities."""
    against_dense_stderr: float | None
    """From the items' differences; of a quotient that of its logarithm."""


@dataclass(frozen=True, slots=True)
class PoolingRow(StudyRow):
    """A model with the number of tokens that it was calibrated on, and all that ``ModelComparisonRow`` has."""

    COLUMNS = ("model", "tokens", *ModelComparisonRow.COLUMNS[1:])

    model: str
    tokens: int | None
    ratio: float | None
    realised: float | None
    parameters: int | None
    bytes: int | None
    kv_bytes_per_token: int | None
    by_task: Mapping[str, Estimate]
    mean: float | None
    stderr: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    prefill_speedup: float | None
    decode_speedup: float | None


@dataclass(frozen=True, slots=True)
class CorpusRow(StudyRow):
    """Mean quality of the experts that were calibrated on so many samples."""

    COLUMNS = ("ratio", "samples", "tasks", "{mean}", "sd over seeds", "stderr")

    ratio: float
    samples: int
    tasks: int
    """Number of tasks that the mean is over."""
    mean: float
    sd_over_seeds: float | None
    """Standard deviation between disjoint draws of samples."""
    stderr: float


@dataclass(frozen=True, slots=True)
class AllocationRow(StudyRow):
    """Mean quality of the experts and of the general model under one allocation of the ratio over the layers."""

    COLUMNS = (
        *("ratio", "allocation", "attention unit", "k", "x0", "realised"),
        *("experts {mean}", "experts stderr", "general {mean}", "general stderr"),
    )

    ratio: float
    allocation: str
    attention_unit: str | None
    """What is cut of attention; None where it is the run's own."""
    k: float | None
    """Steepness of the logistic curve; None where it is the run's own, and for other allocations, as ``x0``."""
    x0: float | None
    """Midpoint of the logistic curve."""
    realised: float | None
    """Share of the decoder layers' weights that the general model lost; None where there is no such plan."""
    experts_mean: float | None
    experts_stderr: float | None
    general_mean: float | None
    general_stderr: float | None


@dataclass(frozen=True, slots=True)
class ReconstructionRow(StudyRow):
    """Mean quality under one compensation of what is cut, chosen by one score."""

    COLUMNS = ("ratio", "models", "compensation", "score", "realised", "{mean}", "sd over seeds", "stderr")

    ratio: float
    """0 for the dense model."""
    models: str
    """Whether the experts or the general model."""
    compensation: str
    score: str
    realised: float
    mean: float
    sd_over_seeds: float | None
    """Standard deviation between seeds; each draws all data anew."""
    stderr: float


@dataclass(frozen=True, slots=True)
class OutOfDistributionRow(StudyRow):
    """Quality on a task of models that were calibrated with it and without it."""

    COLUMNS = (
        *("ratio", "task", "dense", "dense stderr", "its expert", "its expert stderr"),
        *("general", "general stderr", "general without it", "general without it stderr"),
        *("other experts", "other experts stderr"),
    )
    MODELS: ClassVar[tuple[str, ...]] = ("dense", "its_expert", "general", "general_without_it", "other_experts")
    """Fields with the quality of a model, or of several on average."""

    ratio: float
    task: str
    dense: float | None = None
    dense_stderr: float | None = None
    its_expert: float | None = None
    its_expert_stderr: float | None = None
    general: float | None = None
    general_stderr: float | None = None
    general_without_it: float | None = None
    general_without_it_stderr: float | None = None
    other_experts: float | None = None
    """Mean over the experts of the other tasks."""
    other_experts_stderr: float | None = None


@dataclass(frozen=True, slots=True)
class TransferRow(StudyRow):
    """Quality of one model on every task."""

    COLUMNS = ("model", "ratio", BY_TASK)

    model: str
    ratio: float | None
    """None for the dense model."""
    by_task: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class SynthesisRow(StudyRow):
    """Quality of the experts, each on its own task, that were calibrated on one kind of corpus."""

    COLUMNS = ("ratio", "corpus", "tokens", "{mean}", "stderr", BY_TASK)

    ratio: float
    corpus: str
    """One of ``studies.synthesis.CORPORA``."""
    tokens: int
    """Tokens of all tasks."""
    mean: float | None
    stderr: float | None
    by_task: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class RoutingRow(StudyRow):
    """Quality of all prompts, each answered by the model that one way of routing chooses for it."""

    COLUMNS = ("routing", "ratio", "{mean}", "stderr", "to general", BY_TASK, "p50 ms")

    routing: str
    ratio: float
    mean: float | None
    stderr: float | None
    to_general: float
    """Share of the prompts that the general model answers."""
    by_task: Mapping[str, Estimate]
    p50_ms: float
    """Median time of one choice, in milliseconds."""


@dataclass(frozen=True, slots=True)
class PaperRow(StudyRow):
    """Figures of one method in one of the paper's tables: ours, the paper's, or the difference of the two."""

    COLUMNS = (
        *("table", "method", "ratio", "whose"),
        *("winogrande", "openbookqa", "hellaswag", "piqa", "arc_challenge", "arc_easy", "boolq", "average", "stderr"),
        *("wikitext2 perplexity", "tokens/s", "speed-up"),
    )

    table: str
    method: str
    ratio: float
    whose: str
    """``ours``, ``paper`` or ``difference``."""
    winogrande: float | None = None
    """Accuracy in percent, as of the other tasks and their average."""
    openbookqa: float | None = None
    hellaswag: float | None = None
    piqa: float | None = None
    arc_challenge: float | None = None
    arc_easy: float | None = None
    boolq: float | None = None
    average: float | None = None
    stderr: float | None = None
    perplexity: float | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None
