"""Row sources: what a task's ``path`` names, the demo's generators, files, or a data set of the hub.

A source gives its rows in parts, which are read at the same time. A new kind of source is a class here and a case of
``_parse``.
"""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from glob import has_magic as is_pattern
from itertools import chain, islice
from pathlib import Path
from typing import Any

from seap_ray.demo import skills
from seap_ray.errors import DataError
from seap_ray.models.row_files import RowPart, cut_file, is_row_file, part_type
from seap_ray.models.row_values import Row, arrow_rows
from seap_ray.storage.files import read_json
from seap_ray.storage.paths import StoragePath, inside, is_uri, parse_path
from seap_ray.tasks import BUILT_IN, Task

DEMO_PREFIX = "demo:"
VALIDATION = "validation"
"""Split that a task is judged on where it names none."""
TEST = "test"
"""Split that it is judged on where its rows lie apart from the corpus and have no other."""
MIN_DEMO_ROWS = 1000
"""Rows that a demo's corpus has at least; a draw of fewer is taken from them."""
HUB_PART_BYTES = 64 << 20
"""Bytes of a part of a hub data set, about."""
HUB_BATCH_ROWS = 1000
SAVED_STATE = "state.json"
SAVED_FILES = ("dataset_info.json", SAVED_STATE)
"""Files that make a folder one that ``Dataset.save_to_disk`` wrote."""
SAVED_SPLITS = "dataset_dict.json"
"""File that makes a folder one that ``DatasetDict.save_to_disk`` wrote: a folder for each split."""


@dataclass(frozen=True)
class RowSource:
    """Where the rows of a task come from; each kind overrides what it can tell."""

    task: str
    """Name of the task, for errors."""
    path: str
    """The source as a config names it."""
    split: str
    """Split of the data set."""

    @property
    def hub_id(self) -> str | None:
        """Return the hub's name of the data set, None if the hub is not asked."""
        return None

    def check(self) -> None:
        """Raise DataError where the name alone shows that there are no such rows."""

    def files(self) -> Sequence[StoragePath]:
        """Return the files that are read by their names; none where the source is not made of such."""
        return []

    def has_split(self, split: str) -> bool:
        """Return whether the rows are parted by splits, and one has this name."""
        return False

    def parts(self, *, seed: int = 0, n: int | None = None) -> Sequence[RowPart]:
        """Return the parts of the source, in the order of its rows.

        Args:
            seed: Seed of the demo's generators.
            n: Rows that the demo's generators make at least.

        Raises:
            DataError: The rows cannot be had; it names the task.
        """
        raise NotImplementedError

    def first_rows(self, n: int) -> list[Row]:
        """Return the first rows, ``n`` at most; none where they cannot be had in an instant.

        Raises DataError where there is no row at all, or one cannot be read.
        """
        return []

    def public_example(self, seed: int) -> str | None:
        """Return a prompt that anybody may see, None where there is none: rows may be confidential."""
        return None

    def state(self) -> list[tuple[str, int, int]]:
        """Return name, size and time of change (ns) of every file, which change with the rows."""
        statuses = [(str(file), file.stat()) for file in self.files()]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]


@dataclass(frozen=True)
class DemoPart(RowPart):
    """Rows of one of the demo's skills."""

    source: "DemoRows"
    seed: int
    n: int | None

    def rows(self) -> Iterator[Row]:
        """Yield the rows."""
        yield from self.source.generate(self.n, self.seed)


@dataclass(frozen=True)
class DemoRows(RowSource):
    """Rows of one of the demo's skills, ``demo:NAME``, from its generator."""

    part: skills.Split
    """Rows of ``train`` and ``test`` are disjoint."""

    @property
    def skill(self) -> str:
        """Return the name of the skill."""
        return self.path.removeprefix(DEMO_PREFIX)

    def check(self) -> None:
        """Raise DataError where there is no such skill."""
        if self.skill not in skills.SKILLS:
            known = ", ".join(f"{DEMO_PREFIX}{name}" for name in skills.SKILLS)
            raise DataError(f"tasks.{self.task}: no {self.path}; there are {known}")

    def has_split(self, split: str) -> bool:
        """Return whether there is such a split."""
        return split in ("train", "test")

    def parts(self, *, seed: int = 0, n: int | None = None) -> Sequence[RowPart]:
        """Return all rows as one part."""
        return [DemoPart(self.task, self, seed, n)]

    def public_example(self, seed: int) -> str:
        """Return the question of a held-out row."""
        return skills.rows(self.skill, 1, split="test", seed=seed)[0]["question"]

    def generate(self, n: int | None, seed: int) -> list[Row]:
        """Make rows, ``n`` at least."""
        rows = skills.rows(self.skill, max(n or 0, MIN_DEMO_ROWS), split=self.part, seed=seed)
        return [dict(row) for row in rows]


@dataclass(frozen=True)
class RowFiles(RowSource):
    """Files on a disk or in a bucket: one file, a pattern, or a folder, of which ``split`` names some."""

    def files(self) -> Sequence[StoragePath]:
        """Return the files of the split: in a folder those that ``datasets`` would take, by their names.

        Raises DataError naming the task when there are none, or files of several formats.
        """
        where = self._where()
        try:
            files = self._list(where)
        except OSError as error:
            raise DataError(f"tasks.{self.task}: {where} cannot be read ({error.strerror or error})") from None

        if not files:
            lack = "" if is_pattern(where.name) or where.exists() else ", which is not there"
            raise DataError(f"tasks.{self.task}: no file of split {self.split!r} under {where}{lack}")

        if len({part_type(self.task, file) for file in files}) > 1:
            raise DataError(
                f"tasks.{self.task}: {where} holds files of several formats; name one, for example *.parquet"
            )
        return files

    def _where(self) -> StoragePath:
        # Workers may have another current folder.
        return parse_path(self.path).absolute()

    def has_split(self, split: str) -> bool:
        """Return whether the path is a folder with files of such a split; a file or a pattern has none."""
        where = self._where()
        try:
            is_parted = where.is_dir() and not _is_saved(where)
            return is_parted and bool(replace(self, split=split)._list(where))
        except OSError:  # what reads the files meets it again, and names it
            return False

    def parts(self, *, seed: int = 0, n: int | None = None) -> Sequence[RowPart]:
        """Return the parts of all files."""
        return list(self._parts())

    def _parts(self) -> Iterator[RowPart]:
        for file in self.files():
            yield from cut_file(self.task, file)

    def first_rows(self, n: int) -> list[Row]:
        """Return the first rows, ``n`` at most. Raises DataError where there is none, or one cannot be read."""
        rows = list(islice(chain.from_iterable(part.rows() for part in self._parts()), n))
        if n and not rows:
            raise DataError(f"tasks.{self.task}: {self._where()} has no rows")
        return rows

    def _list(self, where: StoragePath) -> Sequence[StoragePath]:
        # The order decides: a file's or folder's name may hold a pattern's characters.
        if where.is_file():
            return [where]
        if where.is_dir():
            return self._list_folder(where)
        return where.parent.sorted_glob(where.name) if is_pattern(where.name) else []

    def _list_folder(self, folder: StoragePath) -> Sequence[StoragePath]:
        if (folder / SAVED_SPLITS).is_file():
            folder = folder / self.split
            return _saved_files(self.task, folder) if _is_saved(folder) else []

        return _saved_files(self.task, folder) if _is_saved(folder) else folder.select_files(self._files_of_split)

    def _files_of_split(self, folder: Path) -> list[Path]:
        """Return the files of the split by the names in a local folder, as ``datasets`` reads them."""
        from datasets.data_files import DataFilesDict, get_data_patterns

        # datasets' own rules for names such as train-00000-of-00002.parquet and folders such as data/test.
        try:
            patterns = get_data_patterns(str(folder))
        except FileNotFoundError:
            return []

        # Sorted, so that rows come in one order on every disk. A folder may hold a README, too.
        files = DataFilesDict.from_patterns(patterns, base_path=str(folder)).get(self.split, [])
        return sorted(path for path in map(Path, files) if is_row_file(path))


def _is_saved(folder: StoragePath) -> bool:
    """Return whether ``Dataset.save_to_disk`` wrote a folder."""
    return all((folder / name).is_file() for name in SAVED_FILES)


def _saved_files(task: str, folder: StoragePath) -> list[StoragePath]:
    """Return the files of a saved data set, in the order of its rows. Raises DataError where it does not name them."""
    state = read_json(folder / SAVED_STATE)
    # A file that is not JSON, or of another program, lacks keys or is no mapping.
    try:
        names = [file["filename"] for file in state["_data_files"]]
    except (TypeError, KeyError):
        raise DataError(f"tasks.{task}: {folder / SAVED_STATE} does not name the files of the data set") from None
    return [inside(folder, name, f"tasks.{task}: {folder / SAVED_STATE}") for name in names]


@dataclass(frozen=True)
class HubPart(RowPart):
    """Rows of a hub data set that follow one another."""

    source: "HubRows"
    start: int
    stop: int
    dataset: bytes
    """These rows as a pickled ``Dataset``: it names the files of the hub's cache, so that no task asks the hub."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows; a node whose cache lacks them downloads the data set."""
        try:
            dataset = pickle.loads(self.dataset)
        except OSError:
            dataset = self.source.open().select(range(self.start, self.stop))

        for table in dataset.with_format("arrow").iter(HUB_BATCH_ROWS):
            for batch in table.to_batches():
                yield from arrow_rows(batch)


@dataclass(frozen=True)
class HubRows(RowSource):
    """A data set of the Hugging Face hub."""

    subset: str | None

    @property
    def hub_id(self) -> str:
        """Return the hub's name of the data set."""
        return self.path

    def has_split(self, split: str) -> bool:
        """Return whether the data set has a split; where the hub does not tell, its download will."""
        splits = _hub_splits(self.path, self.subset)
        return splits is None or split in splits

    def open(self) -> Any:
        """Return the data set, downloaded where the hub's cache lacks it. Raises DataError when it does not come."""
        import datasets

        try:
            return datasets.load_dataset(self.path, self.subset, split=self.split)
        except Exception as error:  # the hub client raises many kinds: offline, missing, gated, no such split
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"tasks.{self.task}: the hub did not give {self.path} ({reason}); a local copy works: "
                f"tasks=[{{name: {self.task}, path: FOLDER}}]"
            ) from None

    def parts(self, *, seed: int = 0, n: int | None = None) -> Sequence[RowPart]:
        """Return ranges of rows; the data set is downloaded once, here."""
        dataset = self.open()
        n_rows = len(dataset)
        n_parts = max(1, min(n_rows, dataset.data.nbytes // HUB_PART_BYTES))
        bounds = [n_rows * i // n_parts for i in range(n_parts + 1)]

        parts = []
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            pickled = pickle.dumps(dataset.select(range(start, stop)))
            parts.append(HubPart(self.task, self, start, stop, pickled))
        return parts


@cache
def _hub_splits(path: str, subset: str | None) -> list[str] | None:
    """Return the splits of a data set; None where the hub does not tell."""
    import datasets

    # The hub need not be asked for what the built-in tasks are judged on.
    if any(task.path == path and not task.evaluation_split for task in BUILT_IN.values()):
        return [VALIDATION]

    try:
        return datasets.get_dataset_split_names(path, subset)
    except Exception:  # the hub client raises many kinds; the download has the same trouble, and names it
        return None


def calibration_rows(task: Task) -> RowSource:
    """Return the source of the rows that a task is calibrated on."""
    return _parse(task, task.path, task.split, "train")


def evaluation_rows(task: Task) -> RowSource:
    """Return the source of the rows that a task is judged on.

    Where the task names no split, it is ``validation``, or of a place of their own also ``test``; where there is none,
    that of the corpus.
    """
    path = task.evaluation_path or task.path
    if task.evaluation_split:
        return _parse(task, path, task.evaluation_split, "test")

    source = _parse(task, path, VALIDATION, "test")
    # What lies beside the corpus as its test may be meant for later.
    for split in (VALIDATION, TEST) if task.evaluation_path else (VALIDATION,):
        if source.has_split(split):
            return replace(source, split=split)
    return replace(source, split=task.split)


def _parse(task: Task, path: str, split: str, demo_part: skills.Split) -> RowSource:
    if path.startswith(DEMO_PREFIX):
        return DemoRows(task.name, path, split, demo_part)

    if _names_files(path):
        return RowFiles(task.name, path, split)
    return HubRows(task.name, path, split, task.subset)


def _names_files(path: str) -> bool:
    # A data set of the hub may be one word, so what ends like a file or is there counts as files.
    looks_like_path = is_uri(path) or path.startswith((".", "/", "~"))
    return looks_like_path or is_row_file(Path(path)) or Path(path).exists()
