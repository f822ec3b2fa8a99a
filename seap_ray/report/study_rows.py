"""Study rows: one row of a study's table, for the studies that the report draws charts of.

A row's fields are in the order of the table's columns. The column of the mean is named after its metric, ``mean acc``
or ``mean ppl``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Self

from seap_ray.report.rows import StudyTable

MEAN_HEADS = ("mean acc", "mean ppl")
"""Names of the column of the mean, by metric."""


class StudyRow:
    """A row of a study's table."""

    COLUMNS: ClassVar[tuple[str, ...]]
    """Names of the columns, in the order of the fields; ``{mean}`` is the mean's name."""

    @classmethod
    def columns(cls, mean_head: str) -> list[str]:
        """Return the names of the table's columns."""
        return [column.format(mean=mean_head) for column in cls.COLUMNS]

    @classmethod
    def from_table(cls, table: StudyTable) -> list[Self]:
        """Read a table's rows by the names of its columns; a column that it does not have is None."""
        columns = cls.columns(mean_head_of(table.columns) or MEAN_HEADS[0])
        places = [table.columns.index(column) if column in table.columns else None for column in columns]
        return [cls(*_cells(values, places)) for values in table.rows]

    def to_json(self) -> list[Any]:
        """Return the row's cells in the order of the columns."""
        return list(astuple(self))  # type: ignore[call-overload]


def _cells(values: Sequence[Any], places: Iterable[int | None]) -> list[Any]:
    return [None if place is None else values[place] for place in places]


def mean_head_of(columns: Sequence[str]) -> str | None:
    """Return ``mean acc`` or ``mean ppl``, whichever a column is named after, or None."""
    for column in columns:
        for head in MEAN_HEADS:
            if column.endswith(head):
                return head
    return None


@dataclass(frozen=True, slots=True)
class CorpusRow(StudyRow):
    """Mean quality of the experts that were calibrated on so many samples."""

    COLUMNS = ("ratio", "samples", "tasks", "{mean}", "sd over seeds", "stderr")

    ratio: float
    samples: int
    tasks: int
    """Number of tasks that the mean is over."""
    mean: float | None
    sd_over_seeds: float | None
    """Standard deviation between disjoint draws of samples."""
    stderr: float


@dataclass(frozen=True, slots=True)
class AllocationRow(StudyRow):
    """Mean quality of the experts and of the general model under one allocation of the ratio over the layers."""

    COLUMNS = (
        *("ratio", "allocation", "k", "x0"),
        *("experts {mean}", "experts stderr", "general {mean}", "general stderr"),
    )

    ratio: float
    allocation: str
    k: float | None
    """Steepness of the logistic curve; None for the other allocations, as ``x0``."""
    x0: float | None
    """Midpoint of the logistic curve."""
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
