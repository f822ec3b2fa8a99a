"""Corpus: rows of a data set in; questions, answers, texts and token ids out. Ray is in ``shards``."""

import csv
import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from glob import has_magic as is_pattern
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow.parquet as pq
from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from seap_ray.demo.skills import SKILLS
from seap_ray.errors import ConfigError, DataError
from seap_ray.storage.paths import StoragePath, is_uri, parse_path
from seap_ray.storage.run import fingerprint
from seap_ray.tasks import CHOSEN, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seap_ray.models.checkpoint import Checkpoint

Row = dict[str, Any]
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Item:
    """One rendered row."""

    text: str
    question: str
    answer: str
    choices: list[str]


@dataclass(frozen=True)
class Renderer:
    """Jinja templates of one task, compiled once per process; an undefined column is an error, not a blank."""

    task: Task
    official: bool = False

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

    @cached_property
    def _templates(self) -> dict[str, Any]:
        task, make = self.task, self._environment.from_string
        text = (task.official if self.official else None) or " ".join(filter(None, (task.question, task.answer)))
        return {"text": make(text), "question": make(task.question), "answer": make(task.answer)}

    @cached_property
    def _choices(self) -> Any:
        return self._environment.compile_expression(self.task.choices or "[]", undefined_to_none=False)

    def item(self, row: Row) -> Item:
        """Raises DataError naming the task and the row's columns when a template does not fit the row."""
        try:
            parts = {name: template.render(row) for name, template in self._templates.items()}
            choices = [str(choice) for choice in self._choices(**row)] if self.task.choices else []
        except UndefinedError as error:
            raise DataError(f"tasks.{self.task.name}: {error}; the columns are {', '.join(row)}") from None
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(f"tasks.{self.task.name}: template does not fit the row {_short(row)} ({error})") from None
        # The authors feed their texts as they are; a space before or after is a token of its own.
        text = parts["text"] if self.official else parts["text"].strip()
        return Item(text, parts["question"].strip(), parts["answer"].strip(), choices)


def _short(row: Row) -> str:
    text = json.dumps(row, default=str)
    return text if len(text) < 160 else text[:157] + "..."


def row_key(seed: int, item: Item) -> bytes:
    """Place of a row in the random draw: a pure function of content and seed, whatever its place in the file."""
    return hashlib.sha256(f"{seed}\0{item.question}\0{item.text}".encode()).digest()[:16]


def is_files(path: str) -> bool:
    """Whether a task's path names files, on a disk or in a bucket, and no data set of the hub."""
    named = is_uri(path) or path.startswith((".", "/", "~"))
    return named or _suffix(Path(path)) in FORMATS or Path(path).exists()


def corpus_files(task: Task, path: str, split: str) -> list[StoragePath]:
    """Files of a split: one file, a glob, or what the names in a folder say, as ``datasets`` reads them.

    Raises DataError naming the task when there are none, or files of several formats.
    """
    where = parse_path(path).absolute()  # workers may have another current folder
    try:
        files = _found(where, split)
    except OSError as error:
        raise DataError(f"tasks.{task.name}: {where} cannot be read ({error.strerror or error})") from None
    if not files:
        raise DataError(f"tasks.{task.name}: no file of split {split!r} under {where}")
    if len({file_format(task, file) for file in files}) > 1:
        raise DataError(f"tasks.{task.name}: {where} holds files of several formats; name one, for example *.parquet")
    return files


def _found(where: StoragePath, split: str) -> list[StoragePath]:
    if where.is_file():
        return [where]
    if where.is_dir():
        return [*where.select_files(lambda folder: _files_of_split(folder, split))]
    return sorted(where.parent.glob(where.name)) if is_pattern(where.name) else []


def _files_of_split(folder: Path, split: str) -> list[Path]:
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        patterns = get_data_patterns(str(folder))
    except FileNotFoundError:
        return []
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder)).get(split, [])
    return sorted(path for path in map(Path, found) if _suffix(path) in FORMATS)


def file_format(task: Task, file: StoragePath) -> str:
    if _suffix(file) not in FORMATS:
        raise DataError(f"tasks.{task.name}: {file} is none of {', '.join(FORMATS)}")
    return FORMATS[_suffix(file)]


def _suffix(file: PurePath) -> str:
    return file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix


def first_row(task: Task, file: StoragePath) -> Row | None:
    """First row of a local file, None if it has none. Raises DataError when it cannot be read."""
    try:
        match file_format(task, file):
            case "parquet":
                batch = next(pq.ParquetFile(file.open("rb")).iter_batches(batch_size=1), None)
                return batch.to_pylist()[0] if batch is not None and batch.num_rows else None
            case "json":
                line = _first_line(file)
                return json.loads(line) if line else None
            case "csv":
                with _opened(file) as opened:
                    return next(csv.DictReader(opened), None)
            case _:
                return {"text": line} if (line := _first_line(file)) else None
    except (OSError, ValueError) as error:
        raise DataError(f"tasks.{task.name}: {file} cannot be read ({error})") from None


def _opened(file: StoragePath) -> TextIO:
    raw = file.open("rb")
    return TextIOWrapper(gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw, "utf-8", newline="")


def _first_line(file: StoragePath) -> str:
    with _opened(file) as opened:
        return next((line for line in opened if line.strip()), "")


def check_source(task: Task, *, official: bool) -> None:
    """Fail before any work on a task whose file is missing, empty, or lacks a column that its template names."""
    for path in filter(None, (task.path, task.evaluation_path)):
        if path.startswith("demo:") and path.removeprefix("demo:") not in SKILLS:
            raise DataError(f"tasks.{task.name}: no {path}; there are demo:{', demo:'.join(SKILLS)}")
    _check_first_row(task, task.path, task.split, official=official)


def check_evaluation(task: Task) -> None:
    """The same of the rows that a task is judged on, and of their choices where the metric needs some."""
    chosen = task.metric in CHOSEN
    item = _check_first_row(task, task.evaluation_path or task.path, task.evaluation_split, official=False)
    if chosen and not task.choices:
        raise DataError(f"tasks.{task.name}: metric {task.metric} needs choices; without any, set metric: exact_match")
    if chosen and item and item.answer not in item.choices:
        told = ", ".join(map(repr, item.choices))
        raise DataError(
            f"tasks.{task.name}: the answer {item.answer!r} of the first row is none of its choices, {told}"
        )


def _check_first_row(task: Task, path: str, split: str, *, official: bool) -> Item | None:
    if path.startswith("demo:") or not is_files(path):
        return None
    file = corpus_files(task, path, split)[0]
    row = first_row(task, file)
    if row is None:
        raise DataError(f"tasks.{task.name}: {file} has no rows")
    return Renderer(task, official).item(row)


# --- tokens ----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model in ``folder``. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer  # seconds, which the workers that only render rows do not need

    import seap_ray.models.hf  # noqa: F401  the model may be compacted already

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.source: {folder} has no usable tokenizer ({reason})") from None


def tokenizer_hash(checkpoint: "Checkpoint") -> str:
    """Hash of the tokenizer's files."""
    files = sorted(checkpoint.folder.glob("tokenizer*")) + sorted(checkpoint.folder.glob("*.model"))
    return fingerprint([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
