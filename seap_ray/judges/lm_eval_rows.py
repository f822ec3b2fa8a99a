"""lm-eval's rows from local files: files of a task in; a split out, as lm-eval's tasks read one of ``datasets``."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from seap_ray.errors import DataError
from seap_ray.models.corpus import judged_rows
from seap_ray.models.row_sources import Row, RowSource, calibration_rows
from seap_ray.storage.paths import StoragePath
from seap_ray.tasks import Task

# --- one split -------------------------------------------------------------------------------------------------------


class RowSplit(Sequence[Row]):
    """Rows as a split of ``datasets``, so far as lm-eval's tasks use it, each with the values that its file has.

    A ``datasets.Dataset`` has one type a column: 5 beside 2.5 would become 5.0, a text beside a number an error, and a
    column that the first row lacks would be lost. What is none of the common methods is asked of one all the same.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        """Take rows; a column that a row lacks is None in it, as in a data set."""
        rows = list(rows)
        columns: dict[str, None] = {}
        for row in rows:
            columns |= dict.fromkeys(row)

        self.features = columns
        """Names of the columns, as keys."""
        self._rows = [columns | row for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        # A task may change what it is given, of which the next reading should know nothing.
        return map(copy.deepcopy, self._rows)

    def __getitem__(self, place: Any) -> Any:
        """Return a row by its place, a column by its name, or what a data set has for a slice or a list of places."""
        if isinstance(place, int):
            return copy.deepcopy(self._rows[place])
        if isinstance(place, str):
            return [row[place] for row in self]
        return self._dataset()[place]

    def map(self, function: Callable[..., Row | None], *, with_indices: bool = False, **settings: Any) -> Any:
        """Return the split with the columns that ``function`` returns for each row; its other columns stay."""
        removed = settings.pop("remove_columns", None) or []
        # Batches and the like are rare.
        if settings:
            return self._dataset().map(function, with_indices=with_indices, remove_columns=removed, **settings)

        names = [removed] if isinstance(removed, str) else removed
        rows = []
        for i, row in enumerate(self):
            added = (function(row, i) if with_indices else function(row)) or {}
            rest = {name: value for name, value in self._rows[i].items() if name not in names}
            rows.append(rest | added)
        return RowSplit(rows)

    def filter(self, function: Callable[[Row], bool], **settings: Any) -> Any:
        """Return the split with the rows for which ``function`` is true."""
        if settings:
            return self._dataset().filter(function, **settings)
        return RowSplit(row for row in self if function(row))

    def select(self, places: Iterable[int]) -> "RowSplit":
        """Return the split with the rows at some places, in their order."""
        return RowSplit(self._rows[place] for place in places)

    def __getattr__(self, name: str) -> Any:
        # Python looks for special methods, which must not read the rows.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset(), name)

    def _dataset(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list(self._rows)


# --- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """A common layout of a data set, other than the one that lm-eval's task reads."""

    lacks: str
    """Column that lm-eval's task reads and this layout does not have."""
    has: str
    """Column by which this layout is known."""
    adapt: Callable[[Row], Row]
    """Function that returns the columns to add to a row."""


BOOLQ_LABELS = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}


def _boolq_label(row: Row) -> Row:
    """Return the label: 1 where the answer is true, 0 where it is false, None where it is neither."""
    # Every cell of a csv file is text.
    return {"label": BOOLQ_LABELS.get(str(row["answer"]).lower())}


def hellaswag_parts(row: Row) -> Row:
    """Return the columns that llama.cpp's layout joins to one text.

    In that text the sentence to go on with is the last one, which has no end.
    """
    # "Making a cake: A woman breaks eggs. She"
    label, _, context = str(row["query"] or "").partition(": ")
    # Whole sentences with their quotes and brackets, a space, and what has no end.
    sentences = re.fullmatch(r"(.*[.!?][\"')]*)\s+([^.!?]*)", context, re.DOTALL)
    first, last = sentences.groups() if sentences else (context, "")
    return {"activity_label": label, "ctx_a": first, "ctx_b": last}


LAYOUTS = {
    "boolq": Layout(lacks="label", has="answer", adapt=_boolq_label),
    "hellaswag": Layout(lacks="ctx_a", has="query", adapt=hellaswag_parts),
}


def adapt(task: Task, row: Row) -> Row:
    """Return a row in the layout that lm-eval's task reads."""
    layout = LAYOUTS.get(task.lm_eval or "")
    # Rows that have what lm-eval reads stay as they are, whatever else they have.
    if layout is None or layout.lacks in row or layout.has not in row:
        return row
    return row | layout.adapt(row)


# --- files -----------------------------------------------------------------------------------------------------------


def evaluation_files(task: Task) -> list[StoragePath]:
    """Return local files of the rows to judge on; none where they are lm-eval's own, from the hub."""
    return [*judged_rows(task).source.files()]


def example_files(task: Task) -> list[StoragePath]:
    """Return local files of the calibration split; none where they are the files to judge on, or there are none."""
    try:
        files = [*calibration_rows(task).files()]
    except DataError:  # without them examples are drawn from the rows to judge on
        return []
    return files if files != evaluation_files(task) else []


def read(task: Task, source: RowSource) -> Iterator[Row]:
    """Read all rows of a source of local files, in their order, in the layout that lm-eval's task reads.

    Raises DataError when they cannot be read.
    """
    for part in source.parts():
        for row in part.rows():
            yield adapt(task, row)
