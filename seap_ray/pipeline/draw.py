"""Draw: the rows of a corpus in; some of them at random, and why others were left out, out. Ray Data reads the parts.

Which rows are drawn depends on content and seed alone: a row's key is a hash of both, so the rows with the n smallest
keys are n rows at random, wherever they lie in the corpus and however it is cut into parts. Duplicates have one key,
and are drawn once.

Each Ray task streams one part: it renders row after row and keeps the smallest keys alone, so that memory does not grow
with the corpus, and no value passes through the types of a table.
"""

import heapq
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import ray

from seap_ray.errors import DataError
from seap_ray.models.corpus import (
    BLANK_LINE,
    Item,
    Questions,
    Renderer,
    Split,
    check_defined,
    choice_defect,
    common,
    content_key,
    defect,
    judged_rows,
    listed,
    row_key,
    split_of,
)
from seap_ray.models.row_files import RowPart
from seap_ray.models.row_sources import Row, calibration_rows
from seap_ray.pipeline.cluster import need_cluster
from seap_ray.tasks import Task

COUNTED_KEYS = 2**16
"""Distinct rows up to which duplicates are counted one by one; beyond, their share among this many stands for all."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows drawn from a corpus, in the order of their keys, and what became of the others."""

    items: tuple[Item, ...]
    n_rows: int
    """Rows in the corpus."""
    counts: dict[str, int]
    """Rows by ``corpus.REASONS``."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of a corpus are drawn."""

    task: Task
    n: int | None
    """Number of rows; None for all."""
    seed: int
    official: bool = False
    """Whether the text is the one that the SEAP authors' code feeds."""
    is_judged: bool = False
    """Whether the rows are to be judged on, not calibrated on."""
    split: Split | None = None
    """What parts the rows to judge on from those to calibrate on; None where they lie apart."""
    calibrated: frozenset[bytes] = frozenset()
    """Content keys of the rows that are not to be judged on."""
    is_evaluated: bool = True
    """Whether rows have to be left for the evaluation."""


def draw_corpus(task: Task, *, n: int | None, seed: int, official: bool = False, is_evaluated: bool = True) -> Draw:
    """Draw the rows that a task is calibrated on: ``n``, or all for None.

    Where nothing is evaluated, a corpus of one question, of which none can be held out, is calibrated on whole.

    Raises DataError where they cannot be had, or none is left.
    """
    split = Split(seed) if judged_rows(task).is_split_off else None
    parts = calibration_rows(task).parts(seed=seed, n=n)
    return draw(parts, Selection(task, n, seed, official, split=split, is_evaluated=is_evaluated))


def draw_judged(task: Task, *, n: int | None, seed: int, calibrated: frozenset[bytes] = frozenset()) -> Draw:
    """Draw the rows that a task is judged on: ``n``, or all for None, and none with one of the calibrated keys.

    Raises DataError where they cannot be had, or none is left.
    """
    judged = judged_rows(task)
    split = Split(seed) if judged.is_split_off else None
    # As many of the demo's rows are made as of every other kind are read.
    parts = judged.source.parts(seed=seed)
    return draw(parts, Selection(task, n, seed, is_judged=True, split=split, calibrated=calibrated))


def judged_text(task: Task, *, seed: int) -> str:
    """Return all rows that a task is judged on as one text, in their order and with their own blank lines.

    Where they are rows of the corpus, the text has those that are held out, by their hash like those of other tasks.

    Raises DataError where the rows cannot be had, or all have the same text.
    """
    judged = judged_rows(task)
    parts = judged.source.parts(seed=seed)
    if not judged.is_split_off:
        return BLANK_LINE.join(item.text for item in _items(task, parts))

    # All rows are read twice: which of few are held out depends on all of them.
    split = split_of(task, seed, _items(task, parts))
    held_out = (item for item in _items(task, parts) if defect(item) is None and split.holds_out(item))
    return BLANK_LINE.join(item.text for item in held_out)


def _items(task: Task, parts: Sequence[RowPart]) -> Iterator[Item]:
    # Texts as they are: a space before or after one is a token of its own.
    renderer = Renderer(task, official=True)
    for part in parts:
        yield from map(renderer.item, part.rows())


def draw(parts: Sequence[RowPart], selection: Selection) -> Draw:
    """Draw rows at random over all parts, and count those that are left out, by the reason.

    Raises DataError where no row is left, and for what a template names and no row has.
    """
    task = selection.task
    drawn = _draw_parts(parts, selection)
    if not drawn.n_rows:
        raise DataError(f"tasks.{task.name}: the corpus has no rows")
    check_defined(task, drawn.undefined, drawn.columns)

    # Of few rows exactly a fifth is held out; where that moves the border, they are read again.
    if selection.split and drawn.questions.keys != set():
        split = selection.split.fitted(task, drawn.questions, may_hold_out_none=not selection.is_evaluated)
        if split != selection.split:
            drawn = _draw_parts(parts, replace(selection, split=split))

    if not drawn.items:
        raise DataError(f"tasks.{task.name}: {_why_none(drawn)}")

    counts = dict(drawn.counts)
    if n_duplicates := drawn.distinct.n_duplicates():
        counts["duplicate"] = n_duplicates
    return Draw(tuple(item for _, item in sorted(drawn.items.items())), drawn.n_rows, counts)


def _why_none(drawn: "_PartDraw") -> str:
    if drawn.counts["blank"] == drawn.n_rows:
        return f"all {drawn.n_rows} rows of the corpus are blank"
    return f"none of the {drawn.n_rows} rows is left: {listed(drawn.counts)}"


# --- one part --------------------------------------------------------------------------------------------------------


class _Distinct:
    """Counts duplicates among keys in bounded memory: exactly where few keys are distinct, else from the smallest."""

    def __init__(self) -> None:
        self.counts: Counter[bytes] = Counter()
        self.bound: bytes | None = None
        """Keys from this one on are not counted; None while all are."""
        self.n_keys = 0

    def add(self, key: bytes) -> None:
        """Count a key."""
        self.n_keys += 1
        if self.bound is None or key < self.bound:
            self.counts[key] += 1
            # Twice as many, so that sorting is rare.
            if len(self.counts) > 2 * COUNTED_KEYS:
                self._forget()

    def merge(self, other: "_Distinct") -> None:
        """Add the keys of another part."""
        self.n_keys += other.n_keys
        self.counts.update(other.counts)
        # Both have counted all keys below the smaller bound.
        bounds = [bound for bound in (self.bound, other.bound) if bound is not None]
        if bounds:
            self.bound = min(bounds)
            self.counts = Counter({key: n for key, n in self.counts.items() if key < self.bound})
        if len(self.counts) > COUNTED_KEYS:
            self._forget()

    def _forget(self) -> None:
        keys = sorted(self.counts)
        self.bound = keys[COUNTED_KEYS]
        self.counts = Counter({key: self.counts[key] for key in keys[:COUNTED_KEYS]})

    def n_duplicates(self) -> int:
        """Return how many keys equal another one that came before."""
        n_counted = self.counts.total()
        # Without a bound all keys are counted, and the quotient is 1.
        return round((n_counted - len(self.counts)) * self.n_keys / n_counted) if n_counted else 0


class _PartDraw:
    """The drawn rows of some parts, and the counts of all their rows."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.n_rows = 0
        self.counts: Counter[str] = Counter()
        self.distinct = _Distinct()
        self.items: dict[bytes, Item] = {}
        """The smallest keys so far."""
        self.questions = Questions()
        self.undefined: list[str] | None = None
        """What the templates name and no row had so far; None before the first row."""
        self.columns: list[str] = []
        """Columns of the first row."""
        # The largest of the kept keys comes first.
        self._heap: list[int] = []

    def read(self, rows: Iterable[Row]) -> "_PartDraw":
        """Take all rows of a part."""
        selection = self.selection
        renderer = Renderer(selection.task, selection.official)
        for row in rows:
            self._take(renderer.item(row))
            self.undefined = common(self.undefined, renderer.undefined)
            self.columns = self.columns or [str(name) for name in row]
        return self

    def _take(self, item: Item) -> None:
        self.n_rows += 1
        if reason := self._reason_against(item):
            self.counts[reason] += 1
            return

        key = row_key(self.selection.seed, item)
        self.distinct.add(key)
        self._keep(key, item)

    def _reason_against(self, item: Item) -> str | None:
        """Return why a row cannot be drawn, None where it can; choices that are only odd are counted here."""
        selection = self.selection
        if reason := defect(item):
            return reason

        if split := selection.split:
            key = split.key(item)
            self.questions.add(key)
            # Each side counts the rows of the other.
            if (key < split.below) != selection.is_judged:
                return "left" if selection.is_judged else "held_out"

        if selection.calibrated and content_key(item) in selection.calibrated:
            return "calibrated"

        if reason := choice_defect(selection.task, item):
            # What is calibrated is the text, whatever the choices.
            if reason == "wrong_answer" and selection.is_judged:
                return reason
            self.counts[reason] += 1
        return None

    def _keep(self, key: bytes, item: Item) -> None:
        """Keep an item if its key is among the n smallest; a duplicate is kept once."""
        if key in self.items:
            # Rows with one text may differ in their choices: which of them is kept is not for their order to say.
            self.items[key] = min(self.items[key], item, key=repr)
            return

        self.items[key] = item
        heapq.heappush(self._heap, -int.from_bytes(key))
        n = self.selection.n
        if n is not None and len(self.items) > n:
            largest = -heapq.heappop(self._heap)
            del self.items[largest.to_bytes(len(key))]

    def merge(self, other: "_PartDraw") -> None:
        """Add the rows of other parts."""
        if not other.n_rows:
            return

        self.n_rows += other.n_rows
        self.counts.update(other.counts)
        self.distinct.merge(other.distinct)
        self.undefined = common(self.undefined, other.undefined or [])
        self.columns = self.columns or other.columns

        self.questions.merge(other.questions)
        for key, item in other.items.items():
            self._keep(key, item)


def _draw_parts(parts: Sequence[RowPart], selection: Selection) -> _PartDraw:
    """Read every part in a Ray task, and merge what they draw."""

    def read(batch: pa.Table) -> pa.Table:
        part: RowPart = pickle.loads(batch.column("part")[0].as_py())
        drawn = _PartDraw(selection).read(part.rows())
        return pa.table({"drawn": pa.array([pickle.dumps(drawn)], pa.large_binary())})

    # Pickled, since a table has no type for parts; a block for each, so that each is a task.
    rows = [{"part": pickle.dumps(part)} for part in parts]
    drawn = _PartDraw(selection)
    if not rows:
        return drawn

    need_cluster()
    pickled = ray.data.from_items(rows, override_num_blocks=len(rows))
    # One after another, so that this process holds the draw of one part beside the whole.
    for reference in pickled.map_batches(read, batch_format="pyarrow", batch_size=1).to_arrow_refs():
        for value in ray.get(reference).column("drawn").to_pylist():
            drawn.merge(pickle.loads(value))
    return drawn
