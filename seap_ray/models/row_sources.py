"""Row sources: what a task's ``path`` names, the demo's generators, files, or a data set of the hub.

A new kind of source is a class here, a case of ``_parse``, and one of ``pipeline.shards.read_rows``.
"""

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic as is_pattern
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from seap_ray.demo import skills
from seap_ray.errors import DataError
from seap_ray.storage.paths import StoragePath, is_uri, parse_path
from seap_ray.tasks import Task

Row = dict[str, Any]
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
"""Names that ``datasets`` has for the formats, by the ends of file names."""
DEMO_PREFIX = "demo:"
MIN_DEMO_ROWS = 1000
"""Rows that a demo's corpus has at least; a draw of fewer is taken from them."""


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

    def first_row(self) -> Row | None:
        """Return the first row, None where it cannot be had in an instant. Raises DataError where there is none."""
        return None

    def public_example(self, seed: int) -> str | None:
        """Return a prompt that anybody may see, None where there is none: rows may be confidential."""
        return None

    def state(self) -> list[tuple[str, int, int]]:
        """Return name, size and time of change (ns) of every file, which change with the rows."""
        statuses = [(str(file), file.stat()) for file in self.files()]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]


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
        where = parse_path(self.path).absolute()  # workers may have another current folder
        try:
            files = self._list(where)
        except OSError as error:
            raise DataError(f"tasks.{self.task}: {where} cannot be read ({error.strerror or error})") from None

        if not files:
            raise DataError(f"tasks.{self.task}: no file of split {self.split!r} under {where}")

        if len({file_format(self.task, file) for file in files}) > 1:
            raise DataError(
                f"tasks.{self.task}: {where} holds files of several formats; name one, for example *.parquet"
            )
        return files

    def _list(self, where: StoragePath) -> Sequence[StoragePath]:
        # The order decides: a file's or folder's name may hold a pattern's characters.
        if where.is_file():
            return [where]
        if where.is_dir():
            return where.select_files(self._files_of_split)
        return where.parent.sorted_glob(where.name) if is_pattern(where.name) else []

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
        return sorted(path for path in map(Path, files) if _suffix(path) in FORMATS)

    def first_row(self) -> Row:
        """Return the first row of the first file. Raises DataError where there is none, or it cannot be read."""
        file = self.files()[0]

        row = read_first_row(self.task, file)
        if row is None:
            raise DataError(f"tasks.{self.task}: {file} has no rows")
        return row


@dataclass(frozen=True)
class HubRows(RowSource):
    """A data set of the Hugging Face hub."""

    subset: str | None

    @property
    def hub_id(self) -> str:
        """Return the hub's name of the data set."""
        return self.path

    def load(self) -> pa.Table:
        """Return all rows, downloaded where they are not in the hub's cache. Raises DataError when they do not come."""
        import datasets

        try:
            return datasets.load_dataset(self.path, self.subset, split=self.split).with_format("arrow")[:]
        except Exception as error:  # the hub client raises many kinds: offline, missing, gated, no such split
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"tasks.{self.task}: the hub did not give {self.path} ({reason}); a local copy works: "
                f"tasks=[{{name: {self.task}, path: FOLDER}}]"
            ) from None


def calibration_rows(task: Task) -> RowSource:
    """Return the source of the rows that a task is calibrated on."""
    return _parse(task, task.path, task.split, "train")


def evaluation_rows(task: Task) -> RowSource:
    """Return the source of the rows that a task is judged on."""
    return _parse(task, task.evaluation_path or task.path, task.evaluation_split or "validation", "test")


def _parse(task: Task, path: str, split: str, demo_part: skills.Split) -> RowSource:
    if path.startswith(DEMO_PREFIX):
        return DemoRows(task.name, path, split, demo_part)

    if _names_files(path):
        return RowFiles(task.name, path, split)
    return HubRows(task.name, path, split, task.subset)


def _names_files(path: str) -> bool:
    # A data set of the hub may be one word, so what ends like a file or is there counts as files.
    looks_like_path = is_uri(path) or path.startswith((".", "/", "~"))
    return looks_like_path or _suffix(Path(path)) in FORMATS or Path(path).exists()


# --- one file --------------------------------------------------------------------------------------------------------


def file_format(task: str, file: StoragePath) -> str:
    """Return the format of a file by its name, as ``datasets`` calls it. Raises DataError for an unknown one."""
    if _suffix(file) not in FORMATS:
        raise DataError(f"tasks.{task}: {file} is none of {', '.join(FORMATS)}")
    return FORMATS[_suffix(file)]


def _suffix(file: Path | StoragePath) -> str:
    """Return the end of a file's name, without that of a compressed file."""
    return file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix


def read_first_row(task: str, file: StoragePath) -> Row | None:
    """Return the first row of a file, None if it has none. Raises DataError when it cannot be read."""
    try:
        match file_format(task, file):
            case "parquet":
                # One row of the first row group; the file may be large, or in a bucket.
                batch = next(pq.ParquetFile(file.open("rb")).iter_batches(batch_size=1), None)
                return batch.to_pylist()[0] if batch is not None and batch.num_rows else None
            case "json":
                # JSON Lines: every line that is not blank is a row.
                line = _first_line(file)
                return json.loads(line) if line else None
            case "csv":
                with _open_text(file) as text:
                    return next(csv.DictReader(text), None)
            # Plain text: every line that is not blank is a row.
            case _:
                line = _first_line(file)
                return {"text": line} if line else None
    except (OSError, ValueError) as error:
        raise DataError(f"tasks.{task}: {file} cannot be read ({error})") from None


def _open_text(file: StoragePath) -> TextIO:
    raw = file.open("rb")
    # Line ends stay as they are, which the csv module wants.
    return TextIOWrapper(gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw, "utf-8", newline="")


def _first_line(file: StoragePath) -> str:
    """Return the first line that is not blank, an empty string if there is none."""
    with _open_text(file) as text:
        return next((line for line in text if line.strip()), "")
