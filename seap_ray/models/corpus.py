"""Corpus: rows of a data set in; questions, answers, texts and token ids out. Ray is in ``pipeline.shards``."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from seap_ray.errors import ConfigError, DataError
from seap_ray.models.row_sources import Row, RowSource, calibration_rows, evaluation_rows
from seap_ray.storage.run import fingerprint
from seap_ray.tasks import MULTIPLE_CHOICE, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seap_ray.models.checkpoint import Checkpoint

Message = dict[str, str]
"""A message of a conversation: ``role`` and ``content``."""
SHOWN_CHARACTERS = 160
"""Characters of a row that an error shows."""


@dataclass(frozen=True)
class Item:
    """One row with the task's templates filled in."""

    text: str
    """What the model is calibrated on where no chat template is used."""
    question: str
    """The prompt: of a conversation the user's first message, by which the endpoint routes."""
    answer: str
    choices: list[str]
    messages: list[Message] = field(default_factory=list)
    """The conversation before the answer: of a question the system message, if any, and the user's; of a mere text
    none."""


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
        task = self.task
        make = self._environment.from_string
        # A task may have a text as the authors wrote it; else it is the question and its answer.
        text = (task.official if self.official else None) or " ".join(filter(None, (task.question, task.answer)))

        return {"text": make(text), "question": make(task.question), "answer": make(task.answer)}

    @cached_property
    def _choices(self) -> Any:
        # An expression gives the list itself, where a template would give its text.
        return self._environment.compile_expression(self.task.choices or "[]", undefined_to_none=False)

    def item(self, row: Row) -> Item:
        """Fill the templates in with a row.

        Raises DataError naming the task and the row's columns when a template does not fit the row.
        """
        try:
            parts = {name: template.render(row) for name, template in self._templates.items()}
            choices = [str(choice) for choice in self._choices(**row)] if self.task.choices else []
        # Before TemplateError, which is its base class.
        except UndefinedError as error:
            raise DataError(f"tasks.{self.task.name}: {error}; the columns are {', '.join(row)}") from None
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(f"tasks.{self.task.name}: template does not fit the row {_short(row)} ({error})") from None

        # The authors feed their texts as they are; a space before or after is a token of its own.
        text = parts["text"] if self.official else parts["text"].strip()
        return Item(text, parts["question"].strip(), parts["answer"].strip(), choices)


def _short(row: Row) -> str:
    text = json.dumps(row, default=str)
    return text if len(text) < SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def row_key(seed: int, item: Item) -> bytes:
    """Return a row's place in the random draw, 16 bytes.

    It is a function of content and seed, whatever the row's place in its file.
    """
    # Zero bytes part what is joined, so that other parts do not join to the same.
    return hashlib.sha256(f"{seed}\0{item.question}\0{item.text}".encode()).digest()[:16]


# --- checks before any work ------------------------------------------------------------------------------------------


def check_source(task: Task, *, official: bool) -> None:
    """Raise DataError for a task whose file is missing, empty, or lacks a column that its template names."""
    calibration_rows(task).check()
    evaluation_rows(task).check()
    _render_first_row(task, calibration_rows(task), official=official)


def check_evaluation(task: Task) -> None:
    """Raise DataError where the rows that a task is judged on do not fit it, or lack choices that its metric needs."""
    is_chosen = task.metric in MULTIPLE_CHOICE
    item = _render_first_row(task, evaluation_rows(task), official=False)

    if is_chosen and not task.choices:
        raise DataError(f"tasks.{task.name}: metric {task.metric} needs choices; without any, set metric: exact_match")

    if is_chosen and item and item.answer not in item.choices:
        choices = ", ".join(map(repr, item.choices))
        raise DataError(
            f"tasks.{task.name}: the answer {item.answer!r} of the first row is none of its choices, {choices}"
        )


def _render_first_row(task: Task, source: RowSource, *, official: bool) -> Item | None:
    row = source.first_row()
    return None if row is None else Renderer(task, official).item(row)


# --- tokens ----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the model in ``folder``. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer  # seconds, which the workers that only render rows do not need

    import seap_ray.models.hf  # noqa: F401  the model may be cut already

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.source: {folder} has no usable tokenizer ({reason})") from None


PROBE = "The year 2024:\n\tcafe\u0301, 3.14 km"
"""A text with what tokenizers treat differently: spaces, digits, line breaks, and an accent that is not composed."""


def tokenizer_warning(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> str | None:
    """Return a warning where transformers splits texts otherwise than ``tokenizer.json`` says; None where it does not.

    transformers may build a pipeline of its own, by the class that ``tokenizer_config.json`` or the model type names,
    and leave the normalizer and pre-tokenizer of the file aside. It says nothing about that.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None

    try:
        by_file = Tokenizer.from_file(str(file))
        # A file may cut or fill every text to a length, which transformers does on demand alone.
        by_file.no_truncation()
        by_file.no_padding()
        expected = by_file.encode(PROBE, add_special_tokens=False).ids
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    # A vocabulary without an unknown token cannot encode every text, but may serve its own corpus. The library raises
    # a plain Exception.
    except Exception:
        return None

    if ids == expected:
        return None

    return (
        f"model.source: transformers loads this tokenizer as {type(tokenizer).__name__}, which does not split texts as "
        f"{file} says; if the model was trained with that file, correct tokenizer_class in tokenizer_config.json"
    )


def tokenizer_hash(checkpoint: "Checkpoint") -> str:
    """Return the hash of the names and contents of the tokenizer's files."""
    files = sorted(checkpoint.folder.glob("tokenizer*")) + sorted(checkpoint.folder.glob("*.model"))
    hashes = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return fingerprint(hashes)
