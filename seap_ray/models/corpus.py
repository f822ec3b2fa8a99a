"""Corpus: rows of a data set in; questions, answers, texts and their keys out. Ray is in ``pipeline.draw``."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

from seap_ray.errors import ConfigError, DataError
from seap_ray.models.quick_imports import quick_imports
from seap_ray.models.row_formats import NotTextError, as_messages
from seap_ray.models.row_sources import Row, RowSource, calibration_rows, evaluation_rows
from seap_ray.models.template_limits import TemplateLimitError, limit_chat_templates
from seap_ray.models.templates import RowEnvironment, WholeValueError, without_missing
from seap_ray.storage.run import fingerprint
from seap_ray.tasks import MULTIPLE_CHOICE, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seap_ray.models.checkpoint import Checkpoint

Filled = TypeVar("Filled")
Message = dict[str, str]
"""A message of a conversation: ``role`` and ``content``."""
BLANK_LINE = "\n\n"
"""What stands between the messages of a conversation in plain text."""
SHOWN_CHARACTERS = 160
"""Characters of a row that an error shows."""


@dataclass(frozen=True)
class Item:
    """One row with the task's templates filled in."""

    text: str
    """What the model is calibrated on where no chat template is used: prompt, separator and answer."""
    question: str
    """What the user asks, by which the endpoint routes: of a conversation the user's first message."""
    answer: str
    choices: list[str]
    messages: list[Message] = field(default_factory=list)
    """The conversation before the answer: of a question the system message, if any, and the user's; of a mere text
    none."""
    gold: int | None = None
    """Index of the right choice; None where the answer is none of the choices."""
    separator: str = " "
    """What stands between prompt and answer in plain text: a space, nothing behind a question that ends in a line break
    and where nothing is asked, a blank line in a conversation."""
    unreadable: str | None = None
    """Why the row's conversation cannot be read; the item is empty then."""

    @property
    def prompt(self) -> str:
        """What stands before separator and answer in plain text."""
        if self.separator == BLANK_LINE:
            return BLANK_LINE.join(message["content"] for message in self.messages)
        return self.question

    def is_right(self, choice: int) -> bool:
        """Return whether a choice, by its index, is the right one, or has the same text."""
        return self.gold is not None and self.choices[choice].strip() == self.choices[self.gold].strip()


@dataclass(frozen=True)
class Renderer:
    """Jinja templates of one task, compiled once per process.

    What is null or missing is an empty text; ``undefined`` says which names a row lacked.
    """

    task: Task
    official: bool = False

    @cached_property
    def _environment(self) -> RowEnvironment:
        return RowEnvironment()

    @cached_property
    def _templates(self) -> dict[str, Any]:
        task = self.task
        sources = {"system": task.system, "question": task.question, "answer": task.answer}
        # A task may have a text as the authors wrote it; else it is the question and its answer.
        if self.official:
            sources["official"] = task.official or " ".join(filter(None, (task.question, task.answer)))

        templates = {}
        for name, source in sources.items():
            if source:
                templates[name] = self._compile(name, source)
        return templates

    @cached_property
    def _expressions(self) -> dict[str, Any]:
        # An expression gives the list itself, where a template would give its text.
        sources = {"choices": self.task.choices, "messages": _without_braces(self.task.messages)}
        return {name: self._compile(name, source, is_expression=True) for name, source in sources.items() if source}

    def _compile(self, name: str, source: str, *, is_expression: bool = False) -> Any:
        environment = self._environment
        try:
            if is_expression:
                return environment.compile_expression(source, undefined_to_none=False)
            return environment.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"tasks.{self.task.name}.{name}: not valid Jinja ({error.message})") from None
        except RecursionError:
            raise DataError(f"tasks.{self.task.name}.{name}: nested too deeply") from None

    @property
    def undefined(self) -> list[str]:
        """What the templates used in the row of the last item though the row lacks it, in words."""
        return list(self._environment.used)

    def item(self, row: Row) -> Item:
        """Fill the templates in with a row.

        Raises DataError naming the task, and the row or its columns, when a template does not fit the row.
        """
        self._environment.used.clear()
        context = self._environment.context(row)

        texts = {name: self._filled(name, template.render, row, context) for name, template in self._templates.items()}
        if self.task.messages:
            item = self._conversation(row, context, texts)
        else:
            item = self._question(row, context, texts)

        # The authors feed their texts as they are; a space before or after is a token of its own.
        return replace(item, text=texts["official"]) if "official" in texts else item

    def _question(self, row: Row, context: Mapping[str, Any], texts: Mapping[str, str]) -> Item:
        question, separator = _question_and_separator(texts.get("question", ""))
        answer = texts.get("answer", "")
        choices = self._choices(row, context)
        messages = _with_system([_message("user", question.strip())] if question else [], texts)
        gold = _index(choices, answer)

        answer = answer.strip()
        return Item(f"{question}{separator}{answer}", question, answer, choices, messages, gold, separator)

    def _conversation(self, row: Row, context: Mapping[str, Any], texts: Mapping[str, str]) -> Item:
        fill = self._expressions["messages"]
        # A row without a conversation is a blank one.
        try:
            messages = self._filled(
                "messages", lambda context: as_messages(without_missing(fill(context)) or []), row, context
            )
        except NotTextError as error:
            return Item("", "", "", [], unreadable=str(error))

        answer = texts.get("answer", "").strip()
        # Without a template of its own the last message is the answer, if the assistant wrote it.
        if not self.task.answer and messages and messages[-1]["role"] == "assistant":
            answer = messages.pop()["content"]

        messages = _with_system(messages, texts)
        question = next((message["content"] for message in messages if message["role"] == "user"), "")
        choices = self._choices(row, context)

        separator = BLANK_LINE if messages else ""
        text = BLANK_LINE.join([*(message["content"] for message in messages), answer])
        return Item(text, question, answer, choices, messages, _index(choices, answer), separator)

    def _choices(self, row: Row, context: Mapping[str, Any]) -> list[str]:
        if "choices" not in self._expressions:
            return []

        expression = self._expressions["choices"]
        return self._filled("choices", lambda context: _texts(expression(context)), row, context)

    def _filled(
        self, name: str, fill: Callable[[Mapping[str, Any]], Filled], row: Row, context: Mapping[str, Any]
    ) -> Filled:
        """Fill one template in. Raises DataError where it does not fit the row."""
        task = self.task.name
        try:
            return fill(context)
        except NotTextError:
            raise
        except RecursionError:
            raise DataError(f"tasks.{task}.{name}: calls itself without end, or meets a row of such depth") from None
        # Before TemplateError, the base class of the next two.
        except TemplateLimitError as error:
            raise DataError(f"tasks.{task}.{name}: {error} for the row {_short(row)}") from None
        except UndefinedError as error:
            raise DataError(f"tasks.{task}.{name}: {error} in the row {_short(row)}") from None
        except WholeValueError as error:
            raise DataError(
                f"tasks.{task}.{name}: {error}; name an element of it, or for a conversation write "
                'messages: "{{ messages }}"'
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise DataError(f"tasks.{task}.{name}: does not fit the row {_short(row)} ({error})") from None


def _without_braces(messages: str | None) -> str:
    # The configuration takes an expression in braces alone.
    return (messages or "").strip().removeprefix("{{").removesuffix("}}")


def _question_and_separator(rendered: str) -> tuple[str, str]:
    """Return a question without the space around it, and what stands between it and its answer in plain text."""
    question = rendered.strip()
    if not question:
        return "", ""

    # A question that ends in a line break has the answer on the next line.
    space_behind = rendered[len(rendered.rstrip()) :]
    return (question + space_behind, "") if "\n" in space_behind else (question, " ")


def _with_system(messages: list[Message], texts: Mapping[str, str]) -> list[Message]:
    """Return messages that begin with the task's system message, unless the row has one of its own."""
    system = texts.get("system", "").strip()
    has_own = bool(messages) and messages[0]["role"] == "system"
    return [_message("system", system), *messages] if system and messages and not has_own else messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _texts(choices: Any) -> list[str]:
    """Return the texts of a list of choices. Raises ValueError for what is no list, or a choice that is no text."""
    if isinstance(choices, str):
        raise ValueError("a text, not a list")
    if isinstance(choices, Mapping):
        raise ValueError("a mapping, not a list; its values are NAME.values() | list")

    choices = list(choices)
    # Their text would be that of Python.
    if any(isinstance(choice, list | tuple | Mapping) for choice in choices):
        raise ValueError("a choice is a list or a mapping, not a text")
    return ["" if choice is None else str(choice) for choice in choices]


def _index(choices: Sequence[str], answer: str) -> int | None:
    """Return the index of the right choice: the one with the answer's text, or else with that text but for space."""
    if answer in choices:
        return choices.index(answer)

    stripped = [choice.strip() for choice in choices]
    return stripped.index(answer.strip()) if answer.strip() in stripped else None


def _short(row: Row) -> str:
    text = json.dumps(row, default=repr, ensure_ascii=False)
    return text if len(text) < SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


# --- keys ------------------------------------------------------------------------------------------------------------


def row_key(seed: int, item: Item) -> bytes:
    """Return a row's place in the random draw, 16 bytes.

    It is a function of content and seed, whatever the row's place in its file; rows with one key are duplicates.
    """
    # Zero bytes part what is joined, so that other parts do not join to the same.
    return hashlib.sha256(f"{seed}\0{item.question}\0{item.text}".encode()).digest()[:16]


def content_key(item: Item) -> bytes:
    """Return what two rows have in common that are the same to a judge, 16 bytes, whatever the calibration's format."""
    return hashlib.sha256(f"{item.prompt.strip()}\0{item.answer.strip()}".encode()).digest()[:16]


def _split_key(seed: int, item: Item) -> int:
    """Return a number below 2 ** 64 by which a question, with all its answers, is held out or not."""
    # Many conversations open with the same greeting: all that is said before the answer counts.
    turns = [message["content"] for message in item.messages if message["role"] != "system"]
    question = "\0".join(turns) if len(turns) > 1 else item.question.strip() or item.answer.strip()
    return int.from_bytes(hashlib.sha256(f"held out\0{seed}\0{question}".encode()).digest()[:8])


FEW_QUESTIONS = 1000
"""Questions of which exactly a fifth is held out; of more it is a fifth within a few percent, by their hashes alone."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows of a corpus are held out for evaluation: those whose question has a small hash.

    Rows with the same question are on the same side, wherever they lie.
    """

    seed: int
    below: int = 2**64 // 5
    """Hashes below this number are held out: a fifth of them."""

    def key(self, item: Item) -> int:
        """Return the hash of an item's question."""
        return _split_key(self.seed, item)

    def holds_out(self, item: Item) -> bool:
        """Return whether an item is held out."""
        return self.key(item) < self.below

    def fitted(self, task: Task, questions: "Questions", *, may_hold_out_none: bool = False) -> "Split":
        """Return the split that holds out a fifth of a corpus's questions: of few to the nearest number, at least one.

        Raises DataError where all rows have one question, unless none need be held out.
        """
        keys = questions.keys
        if keys is None:
            return self
        if len(keys) == 1 and may_hold_out_none:
            return replace(self, below=0)
        if len(keys) == 1:
            raise DataError(
                f"tasks.{task.name}: all rows have the same question, so none can be held out for evaluation; set "
                "evaluation_path, or held_out: false"
            )

        n_held_out = max(1, round(len(keys) * self.below / 2**64))
        return replace(self, below=sorted(keys)[n_held_out])


class Questions:
    """The hashes of a corpus's questions, as long as these are few: a fifth of few hashes may be far from its range."""

    def __init__(self) -> None:
        self.keys: set[int] | None = set()
        """The distinct hashes; None where there are more than ``FEW_QUESTIONS``."""

    def add(self, key: int) -> None:
        """Add the hash of a row's question."""
        if self.keys is not None:
            self.keys.add(key)
            self._forget_many()

    def merge(self, other: "Questions") -> None:
        """Add the questions of another part of the corpus."""
        self.keys = None if self.keys is None or other.keys is None else self.keys | other.keys
        self._forget_many()

    def _forget_many(self) -> None:
        if self.keys is not None and len(self.keys) > FEW_QUESTIONS:
            self.keys = None


def split_of(task: Task, seed: int, items: Iterable[Item]) -> Split:
    """Return the split of a corpus with these items. Raises DataError where it has no two questions."""
    split = Split(seed)
    questions = Questions()
    for item in items:
        if defect(item) is None:
            questions.add(split.key(item))

    if not questions.keys and questions.keys is not None:
        raise DataError(f"tasks.{task.name}: no row has an answer")
    return split.fitted(task, questions)


# --- rows that do not count ------------------------------------------------------------------------------------------

Reason = Literal[
    "blank",
    "no_answer",
    "held_out",
    "left",
    "calibrated",
    "wrong_answer",
    "same_choices",
    "duplicate",
    "unreadable",
    "refused",
    "no_token",
]
REASONS: dict[str, str] = {
    "blank": "blank",
    "no_answer": "without an answer",
    "held_out": "held out for evaluation",
    "left": "left to the calibration",
    "calibrated": "calibrated on",
    "wrong_answer": "whose answer is none of their choices",
    "same_choices": "with equal choices",
    "duplicate": "that are duplicates",
    "unreadable": "whose messages are more than text",
    "refused": "that the chat template does not take",
    "no_token": "without a token that counts",
}
"""Why rows are left out, or worth a look, in the words that follow a number of rows."""


def defect(item: Item) -> Reason | None:
    """Return why a row can be neither calibrated nor judged on, None where it can."""
    if item.unreadable:
        return "unreadable"
    # Prompt and answer are the same in every format of the calibration text.
    if item.answer.strip():
        return None
    return "no_answer" if item.prompt.strip() else "blank"


def choice_defect(task: Task, item: Item) -> Reason | None:
    """Return what is wrong with the choices of a task that is judged by them, None where nothing is.

    A row whose answer is none of its choices cannot be judged. One with equal choices can be: whichever of them is
    likeliest, its text is right or wrong.
    """
    if task.metric not in MULTIPLE_CHOICE or not task.choices:
        return None
    if item.gold is None:
        return "wrong_answer"

    stripped = [choice.strip() for choice in item.choices]
    return "same_choices" if len(set(stripped)) < len(stripped) else None


def rows_lines(task: str, n_rows: int, counts: Mapping[str, int], *, purpose: str = "calibration") -> list[str]:
    """Return lines for people on the rows of a task that are held out, left out, or worth a look."""
    lines = []
    if n_held_out := counts.get("held_out"):
        lines.append(f"tasks.{task}: {n_held_out:,} of {n_rows:,} rows held out for evaluation")
    if others := listed({reason: n for reason, n in counts.items() if reason not in ("held_out", "left")}):
        lines.append(f"tasks.{task}: of {n_rows:,} rows for {purpose} {others}")
    return lines


def listed(counts: Mapping[str, int]) -> str:
    """Return counts of rows in words: ``3 blank, 2 without an answer``."""
    return ", ".join(f"{counts[reason]:,} {words}" for reason, words in REASONS.items() if counts.get(reason))


# --- rows to judge on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """Where the rows come from that a task is judged on."""

    source: RowSource
    is_split_off: bool
    """Whether they are, in part or all, rows of the corpus, so that a fifth of these is held out."""


def judged_rows(task: Task) -> JudgedRows:
    """Return the rows that a task is judged on: those of its own, or else some of its corpus."""
    source = evaluation_rows(task)
    return JudgedRows(source, task.held_out and _share_rows(source, calibration_rows(task)))


def _share_rows(source: RowSource, other: RowSource) -> bool:
    """Return whether two sources name one data set, or have a file in common."""
    if source == other:
        return True

    # A pattern and a folder may name the same files by other paths.
    return bool(_file_names(source) & _file_names(other))


def _file_names(source: RowSource) -> set[str]:
    # Evaluation rows that are not there cost their own task's results; whoever reads them says what is wrong.
    try:
        files = source.files()
    except DataError:
        return set()
    # Folders in buckets have no links.
    return {str(file.resolve() if isinstance(file, Path) else file) for file in files}


def held_out_rows(task: Task, *, seed: int, calibrated: frozenset[bytes] = frozenset()) -> Callable[[Row], bool] | None:
    """Return a function that tells whether a row may be judged on; None for a task of recall, where any row may.

    Args:
        task: The task.
        seed: Seed of the run, by which rows of the corpus are held out.
        calibrated: Content keys of the rows that were calibrated on.

    Raises:
        DataError: The rows are to be split off those of a corpus, and cannot be read or all have one question.
    """
    if not task.held_out:
        return None

    renderer = Renderer(task)
    judged = judged_rows(task)
    split = None
    # On the hub lm-eval has splits of its own.
    if judged.is_split_off and judged.source.hub_id is None:
        items = (renderer.item(row) for part in judged.source.parts(seed=seed) for row in part.rows())
        split = split_of(task, seed, items)

    def is_held_out(row: Row) -> bool:
        try:
            item = renderer.item(row)
        # A row that the templates do not fit was not calibrated on.
        except DataError:
            return True
        return (split is None or split.holds_out(item)) and content_key(item) not in calibrated

    return is_held_out


# --- checks before any work ------------------------------------------------------------------------------------------

FIRST_ROWS = 20
"""Rows that are looked at before any work."""


def check_source(task: Task, *, official: bool) -> None:
    """Raise DataError for a task whose file is missing, empty, or lacks a column that its template names."""
    calibration_rows(task).check()
    judged_rows(task).source.check()
    _render_first_rows(task, calibration_rows(task), official=official)


def check_evaluation(task: Task) -> None:
    """Raise DataError where the rows that a task is judged on do not fit it, or lack choices that its metric needs."""
    is_chosen = task.metric in MULTIPLE_CHOICE
    items = _render_first_rows(task, judged_rows(task).source, official=False)
    if is_chosen and not task.choices:
        raise DataError(f"tasks.{task.name}: metric {task.metric} needs choices; without any, set metric: exact_match")

    # Some rows of a data set may be wrong; where all are, the templates are.
    answered = [item for item in items if defect(item) is None]
    if is_chosen and answered and all(item.gold is None for item in answered):
        choices = ", ".join(map(repr, answered[0].choices))
        raise DataError(
            f"tasks.{task.name}: the answer {answered[0].answer!r} of the first row is none of its choices, {choices}"
        )


def _render_first_rows(task: Task, source: RowSource, *, official: bool) -> list[Item]:
    """Render the first rows. Raises DataError where none of them has what a template names."""
    rows = source.first_rows(FIRST_ROWS)
    renderer = Renderer(task, official)
    items = []
    undefined = None
    for row in rows:
        items.append(renderer.item(row))
        undefined = common(undefined, renderer.undefined)

    check_defined(task, undefined, rows[0] if rows else {})
    # A few rows of a dump may have tool calls or pictures; where all of the first have, it is not a corpus of texts.
    if items and all(item.unreadable for item in items):
        raise DataError(f"tasks.{task.name}.messages: the first row cannot be read: {items[0].unreadable}")
    return items


def common(undefined: list[str] | None, others: list[str]) -> list[str]:
    """Return what is undefined in all rows; None stands for no row yet."""
    return others if undefined is None else [name for name in undefined if name in others]


def check_defined(task: Task, undefined: list[str] | None, columns: Iterable[str]) -> None:
    """Raise DataError for what templates name and no row has, with the columns of a row."""
    if undefined:
        raise DataError(f"tasks.{task.name}: {undefined[0]}; the columns are {', '.join(columns)}")


# --- tokens ----------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the model in ``folder``. Raises ConfigError when there is none."""
    # Seconds even so, which the workers that only render rows do not need.
    with quick_imports():
        from transformers import AutoTokenizer

        import seap_ray.models.hf  # noqa: F401  the model may be cut already

    limit_chat_templates()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RecursionError) as error:
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
