"""lm-eval as a judge: a model and a task in; the metric's value, and each row's part in it, out.

Prompts, metrics and filters are those of lm-eval's own task; text becomes token ids as everywhere (models.encoding).
Where the task's evaluation rows lie in local files, lm-eval runs on these, and nothing is asked of the hub. lm-eval is
an optional extra, and takes seconds to import: hence the imports inside functions.
"""

import io
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, UndefinedError, meta

from seap_ray.errors import ConfigError, DataError
from seap_ray.judges.lm_eval_rows import RowSplit, adapt, evaluation_files, example_files, read
from seap_ray.models.corpus import judged_rows
from seap_ray.models.encoding import Encoding
from seap_ray.models.row_sources import Row, calibration_rows
from seap_ray.models.templates import RowEnvironment
from seap_ray.storage.paths import StoragePath
from seap_ray.tasks import Task, is_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKED_ROWS = 1000
"""Rows among which one has to fit lm-eval's task; each costs milliseconds."""


@dataclass(frozen=True, slots=True)
class LmEvalResult:
    """A metric's value on one task with its standard error, as lm-eval computes them."""

    metric: str
    value: float
    stderr: float
    values: tuple[float, ...]
    """Each row's part, in the rows' order; their mean is ``value``."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of a task, and those that are not judged, whatever is drawn."""

    n_rows: int
    counts: dict[str, int]
    """Rows that are left out, by ``corpus.REASONS``."""


@dataclass(frozen=True, slots=True)
class _LoadedTask:
    """lm-eval's task with its rows."""

    lm_task: Any
    places: list[int]
    """Rows that can be judged, by their places in ``lm_task.eval_docs``."""
    counted: RowCounts


def version() -> str:
    """Return lm-eval's name and version. Raises ConfigError when it is not installed."""
    try:
        return f"lm-eval {metadata.version('lm_eval')}"
    except metadata.PackageNotFoundError:
        raise ConfigError("lm-eval is not installed: python3 -m seap_ray.install --extras eval") from None


def check(task: Task) -> None:
    """Raise ConfigError or DataError, before any work, for what lm-eval cannot judge; ask nothing of the hub."""
    # A task without local rows is checked no further: its own are on the hub.
    _metric(task)
    _system(task)
    if files := evaluation_files(task):
        _check_rows(task, files[0])


def fingerprint_of(task: Task) -> list[Any]:
    """Return what the metric's value depends on besides the model and the arguments of ``judge``."""
    files = evaluation_files(task) + example_files(task)
    states = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    revision = (_definition(task).get("metadata") or {}).get("version")
    return [version(), task.lm_eval, revision, _metric(task), _system(task), states]


def count_rows(task: Task, is_held_out: Callable[[Row], bool] | None = None) -> RowCounts | None:
    """Count the rows of local files, as ``judge`` takes them; None where they are on the hub, which is not asked.

    Raises DataError when they cannot be had, or none is left.
    """
    if not evaluation_files(task):
        return None

    with _quiet(), _nulls_are_empty():
        return _load_task(task, 0, is_held_out).counted


def judge(
    model: "PreTrainedModel",
    encoding: Encoding,
    task: Task,
    *,
    samples: int | None,
    seed: int,
    num_fewshot: int | None,
    batch_tokens: int,
    is_held_out: Callable[[Row], bool] | None = None,
) -> LmEvalResult:
    """Judge a model on a task by lm-eval.

    Args:
        model: A causal language model; it is left as it is.
        encoding: How its texts become token ids. In a chat template lm-eval runs as its command line does with
            ``--apply_chat_template``: examples are turns, and the task's system message is the first one.
        task: A task with the name of one of lm-eval's.
        samples: Number of rows, drawn at random by ``seed``; None takes all rows.
        seed: Seed of that draw. The examples are drawn as lm-eval's command line does, whatever the seed.
        num_fewshot: Number of examples before each question; None takes as many as lm-eval has for the task.
        batch_tokens: Tokens in a batch, padding included.
        is_held_out: Function that returns whether a row may be judged, which one that was calibrated on may not; None
            takes all rows.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task or metric.
        DataError: The evaluation rows cannot be had.
    """
    # An unknown metric is found before anything is downloaded.
    metric = _metric(task)
    system = _system(task) if encoding.is_chat else None

    with _quiet(), _nulls_are_empty():
        loaded = _load_task(task, num_fewshot, is_held_out)
        rows = _draw(loaded.places, samples, seed)
        answers = _run_lm_eval(loaded.lm_task, wrap(model, encoding, batch_tokens), rows, system)
        return _result(metric, answers)


def wrap(model: "PreTrainedModel", encoding: Encoding, batch_tokens: int) -> Any:
    """Return lm-eval's wrapper of ``model``, which forms batches of at most ``batch_tokens``; it imports lm-eval."""
    from seap_ray.judges.lm_eval_model import TokenBatchedLM

    return TokenBatchedLM(model, encoding, batch_tokens)


def _run_lm_eval(lm_task: Any, lm: Any, rows: list[int], system: str | None) -> list[dict[str, Any]]:
    """Return what lm-eval says of each row, by the task's strict filter where there are several."""
    from lm_eval.evaluator import evaluate

    name = lm_task.task_name
    output = evaluate(
        lm=lm,
        task_dict={"tasks": {name: lm_task}},
        samples={name: rows},
        # The standard error of a mean needs no bootstrap, and the bootstrap wants processes of its own.
        bootstrap_iters=0,
        apply_chat_template=lm.encoding.is_chat,
        # The default of lm-eval's command line.
        fewshot_as_multiturn=lm.encoding.is_chat,
        system_instruction=system,
    )
    answers = output["samples"][name]

    # lm-eval answers once for every filter of a task; GSM8K has a strict and a flexible one.
    filters = [answer["filter"] for answer in answers]
    wanted = "strict-match" if "strict-match" in filters else filters[0]
    return [answer for answer in answers if answer["filter"] == wanted]


def _result(metric: str, answers: list[dict[str, Any]]) -> LmEvalResult:
    from lm_eval.api.metrics import mean, mean_stderr

    values = tuple(float(answer[metric]) for answer in answers)
    # One value has no spread, which lm-eval's function would divide by.
    stderr = mean_stderr(values) if len(values) > 1 else 0.0
    return LmEvalResult(metric, mean(values), stderr, values)


def _draw(places: list[int], samples: int | None, seed: int) -> list[int]:
    """Return the places of ``samples`` rows drawn at random; None takes all."""
    if samples is None or samples >= len(places):
        return places

    # lm-eval goes by the rows' order whatever that of the places is, so they are sorted to match its answers.
    return sorted(random.Random(seed).sample(places, samples))


# --- lm-eval's task --------------------------------------------------------------------------------------------------


@cache
def _manager() -> Any:
    """Return the index of lm-eval's thousands of task files, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _definition(task: Task) -> dict[str, Any]:
    """Return lm-eval's configuration of the task, its functions by name.

    Raises ConfigError when lm-eval is not installed or has no such task.
    """
    version()  # refuses where lm-eval is not installed, before it is imported
    name = task.lm_eval or ""

    manager = _manager()
    if name not in manager.all_subtasks:
        near = get_close_matches(name, manager.all_subtasks)
        hint = f"near it are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
        raise ConfigError(f"tasks.{task.name}.lm_eval: lm-eval has no task {name!r}; {hint}")
    return manager.task_index[name].cfg


def _metric(task: Task) -> str:
    """Return the task's own metric, or ``exact_match`` where that is a perplexity: lm-eval judges answers all the same.

    Raises ConfigError where lm-eval's task has no such metric.
    """
    definition = _definition(task)
    metric = "exact_match" if is_perplexity(task.metric) else task.metric

    # Without a list lm-eval takes the metrics of the task's kind of output.
    listed = [entry["metric"] for entry in definition.get("metric_list") or []]
    known = listed or _default_metrics(definition)
    if metric not in known:
        raise ConfigError(
            f"tasks.{task.name}.metric: lm-eval's task {task.lm_eval} has no {metric}, but {', '.join(map(str, known))}"
        )
    return metric


def _default_metrics(definition: dict[str, Any]) -> list[str]:
    """Return the metrics of a task that lists none, which depend on its kind of output."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    return DEFAULT_METRIC_REGISTRY.get(definition.get("output_type", "generate_until"), [])


def _system(task: Task) -> str | None:
    """Return the task's system message. Raises ConfigError where it depends on the row: lm-eval has one for all."""
    if task.system is None:
        return None

    environment = RowEnvironment()
    if columns := meta.find_undeclared_variables(environment.parse(task.system)):
        raise ConfigError(
            f"tasks.{task.name}.system: lm-eval has one system message for all rows, and this one is made of "
            f"{', '.join(sorted(columns))}; with lm_eval: null the task's own metric judges it"
        )
    try:
        return environment.from_string(task.system).render().strip() or None
    except (TemplateError, RecursionError) as error:
        raise ConfigError(f"tasks.{task.name}.system: {error}") from None


def _load_task(task: Task, num_fewshot: int | None, is_held_out: Callable[[Row], bool] | None = None) -> _LoadedTask:
    """Return lm-eval's task with its rows, local or from the hub. Raises DataError when they cannot be had."""
    default = _definition(task).get("num_fewshot")
    # A task that says 0 means it, here as on lm-eval's command line.
    shots = (default or 0) if num_fewshot is None or default == 0 else num_fewshot

    if evaluation_files(task):
        return _load_local(task, shots, is_held_out)
    return _load_from_hub(task, shots, is_held_out)


def _load_local(task: Task, shots: int, is_held_out: Callable[[Row], bool] | None) -> _LoadedTask:
    rows, calibrated = _split_rows(read(task, judged_rows(task).source), is_held_out)
    if not rows:
        raise _none_left(task)

    # The other side of a corpus that is split is no row that is missed.
    reason = "left" if judged_rows(task).is_split_off else "calibrated"
    counts = Counter({reason: len(calibrated)})
    examples = _examples(task, shots, rows, calibrated)
    try:
        lm_task = _build_local(task, shots, RowSplit(rows), examples)
    except Exception:
        # A row that is not as the task wants it; each is tried by itself, which takes milliseconds.
        columns = RowSplit(rows).features
        fitting = [row for row in rows if _fits(task, columns | row)]
        if not fitting:
            raise
        lm_task = _build_local(task, shots, RowSplit(fitting), examples)
        counts[_no_answer(lm_task)] = len(rows) - len(fitting)

    _drop_unanswered_examples(lm_task)
    return _loaded(task, lm_task, counts)


def _fits(task: Task, row: Row) -> bool:
    try:
        _build_local(task, 0, RowSplit([row]))
    except Exception:  # whatever lm-eval's templates and functions raise on a row not made for them
        return False
    return True


def _load_from_hub(task: Task, shots: int, is_held_out: Callable[[Row], bool] | None) -> _LoadedTask:
    try:
        lm_task = _build(task, {"num_fewshot": shots})
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, no such split
        raise _not_from_hub(task, error) from None

    split = _judged_split(lm_task)
    rows = lm_task.dataset[split]
    held_out = [i for i, row in enumerate(rows) if is_held_out(row)] if is_held_out else range(len(rows))
    if not held_out:
        raise _none_left(task)

    n_calibrated = len(rows) - len(held_out)
    if n_calibrated:
        lm_task.dataset[split] = rows.select(held_out)
        lm_task.task_docs = lm_task.eval_docs
    return _loaded(task, lm_task, Counter({"calibrated": n_calibrated}))


def _judged_split(lm_task: Any) -> str:
    return lm_task.config.test_split or lm_task.config.validation_split


def _split_rows(rows: Iterator[Row], is_held_out: Callable[[Row], bool] | None) -> tuple[list[Row], list[Row]]:
    """Return the rows that may be judged, and those that were calibrated on."""
    held_out: list[Row] = []
    calibrated: list[Row] = []
    for row in rows:
        kept = is_held_out is None or is_held_out(row)
        (held_out if kept else calibrated).append(row)
    return held_out, calibrated


def _none_left(task: Task) -> DataError:
    return DataError(f"tasks.{task.name}: no row is left to judge: all were calibrated on, or there are none")


def _examples(task: Task, shots: int, rows: list[Row], calibrated: list[Row]) -> RowSplit | None:
    """Return the rows to draw examples from, none of them judged; None where these are the other judged rows."""
    if not shots:
        return None

    source = read(task, calibration_rows(task)) if example_files(task) else iter(calibrated)
    judged = {_content(row) for row in rows}
    examples = [row for row in source if _content(row) not in judged]
    return RowSplit(examples) if examples else None


def _content(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _loaded(task: Task, lm_task: Any, counts: Counter[str]) -> _LoadedTask:
    """Return a task whose rows are prepared once, and which of them can be judged.

    ``counts`` are of the rows that are left out before, by the reason.
    """
    # lm-eval prepares its rows anew on every reading, but some tasks shuffle choices at that.
    docs = lm_task.task_docs
    lm_task.dataset = {_judged_split(lm_task): docs}
    lm_task.set_config("process_docs", None)

    places = [i for i, row in enumerate(docs) if _is_answered(lm_task, row)]
    if not places:
        raise DataError(f"tasks.{task.name}: no row of lm-eval's task {task.lm_eval} has a right answer")

    n_rows = counts.total() + len(docs)
    counts[_no_answer(lm_task)] += len(docs) - len(places)
    # Without the reasons that no row has.
    return _LoadedTask(lm_task, places, RowCounts(n_rows, dict(+counts)))


def _no_answer(lm_task: Any) -> str:
    """Return the reason for which rows of a task's kind have no right answer."""
    return "wrong_answer" if lm_task.OUTPUT_TYPE == "multiple_choice" else "no_answer"


def _drop_unanswered_examples(lm_task: Any) -> None:
    config = lm_task.fewshot_cfg
    # Examples that the task brings along, or names by their places, are its own business.
    if not lm_task.config.num_fewshot or config.samples is not None or config.fewshot_indices is not None:
        return

    docs = lm_task.sampler.df
    answered = [doc for doc in docs if _is_answered(lm_task, doc)]
    if 0 < len(answered) < len(docs):
        lm_task.sampler.replace_df(answered)


def _not_from_hub(task: Task, error: Exception) -> DataError:
    return DataError(
        f"tasks.{task.name}: the hub did not give the rows of lm-eval's task {task.lm_eval} ({_line(error)}); "
        f"a local copy works: tasks=[{{name: {task.name}, evaluation_path: FOLDER}}]"
    )


def _build_local(task: Task, shots: int, rows: Any, examples: Any = None) -> Any:
    """Return lm-eval's task on ``rows``; without ``examples`` these are drawn from the other rows."""
    config = _definition(task).get("fewshot_config") or {}
    # A name of the split in lm-eval's task goes before ours.
    examples_split = config.get("split", "examples")
    # Where examples are of the split that is judged, lm-eval leaves the row in question out.
    judged_split = examples_split if examples is None else "evaluation"
    # The order matters: where the two splits are one, it has the rows.
    splits = {examples_split: examples, judged_split: rows}

    # The task's own splits are on the hub, so they are unset.
    overrides = {
        "custom_dataset": lambda **_: splits,
        "training_split": None,
        "validation_split": None,
        "test_split": judged_split,
        "fewshot_split": None if "samples" in config else examples_split,
        "num_fewshot": shots,
    }
    return _build(task, overrides)


def _build(task: Task, overrides: dict[str, Any]) -> Any:
    """Return lm-eval's task with some of its settings changed."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # A task may have a class of its own.
    task_class = {} if "class" in _definition(task) else {"class": _task_class()}
    # lm-eval merges overrides into a task of its own only for the members of a group.
    group = {"group": "seap_ray", "task": [{"task": task.lm_eval, **task_class, **overrides}]}
    state = random.getstate()
    # Some tasks shuffle their choices: for every model in the same way.
    random.seed(DEFAULT_RANDOM_SEED)
    try:
        (lm_task,) = _manager().load([group])["tasks"].values()
    finally:
        random.setstate(state)
    # The seed of lm-eval's command line, so that the examples are those that others report figures with.
    lm_task.set_fewshot_seed(DEFAULT_OTHER_SEED)

    return lm_task


@cache
def _task_class() -> type:
    from lm_eval.api.task import ConfigurableTask

    class MixedTask(ConfigurableTask):
        """lm-eval's task, for questions, answers and choices of whatever type; lm-eval wants one type a column.

        A question or choice that is a number is its text. Where the right answer is the index of a choice it may be the
        text "1", as all cells of a csv file are texts: lm-eval would look for it among the choices alone.
        """

        def __init__(self, config: dict[str, Any]) -> None:
            self._is_built = False
            super().__init__(config={key: value for key, value in config.items() if key != "class"})
            self._is_built = True

        def doc_to_text(self, doc: Row, *arguments: Any) -> Any:
            """Return the question; where the choices are contexts, as in WinoGrande, the index of the right one."""
            text = super().doc_to_text(doc, *arguments)
            if isinstance(text, int):
                # lm-eval learns from the first row which of both it is.
                is_index = bool(self.multiple_input) if self._is_built else self._is_index(text, doc)
                return text if is_index else str(text)
            return _text(text)

        def doc_to_target(self, doc: Row, *arguments: Any) -> Any:
            """Return the right answer, or its index among the choices."""
            target = super().doc_to_target(doc, *arguments)
            has_choices = self.OUTPUT_TYPE == "multiple_choice" and not self.multiple_input
            if not has_choices or not isinstance(target, str) or not target.isdecimal():
                return target
            return target if target in self.doc_to_choice(doc) else int(target)

        def doc_to_choice(self, doc: Row, *arguments: Any) -> Any:
            """Return the choices."""
            choices = super().doc_to_choice(doc, *arguments)
            return [_text(choice) for choice in choices] if isinstance(choices, list | tuple) else choices

        def _is_index(self, text: int, doc: Row) -> bool:
            return self.config.doc_to_choice is not None and text in range(len(self.doc_to_choice(doc)))

    return MixedTask


def _text(value: Any) -> str:
    return "" if value is None else str(value)


# --- checks of local rows --------------------------------------------------------------------------------------------


def _check_rows(task: Task, file: StoragePath) -> None:
    """Raise DataError when no row has the columns and the right answer that lm-eval's task needs."""
    rows = [adapt(task, row) for row in judged_rows(task).source.first_rows(CHECKED_ROWS)]
    if not rows:
        raise DataError(f"tasks.{task.name}: {file} has no rows")

    # A row that lacks a column has none of its own there.
    split = RowSplit(rows)
    # lm-eval would take these for text and judge all the same, so they are looked for first.
    plain, named = _columns(_definition(task))
    missing = named - split.features.keys()
    if plain - split.features.keys():
        raise _lacking(task, file, missing)

    # One row without an answer, or an odd one, says nothing about the others.
    first_problem = None
    for row in split:
        problem = _problem(task, row, file, missing)
        if problem is None:
            return
        first_problem = first_problem or problem

    assert first_problem, "there is a row"
    raise first_problem


def _problem(task: Task, row: Row, file: StoragePath, missing: set[str]) -> DataError | None:
    """Return what is wrong with a row, None if nothing is."""
    try:
        with _quiet(), _nulls_are_empty():
            lm_task = _build_local(task, 0, RowSplit([row]))
            # The rows as the task's own function makes them, which may leave some out.
            is_answered = any(_is_answered(lm_task, doc) for doc in lm_task.task_docs)
    except Exception as error:  # whatever lm-eval's templates and functions raise on a row not made for them
        # A KeyError that names a column is most likely one that the rows lack.
        key = str(*error.args[:1])
        if isinstance(error, KeyError) and key.isidentifier() and key not in row:
            return _lacking(task, file, {key})
        if isinstance(error, UndefinedError) and missing:
            return _lacking(task, file, missing)

        return DataError(
            f"tasks.{task.name}: the first row of {file} does not fit lm-eval's task {task.lm_eval} ({_line(error)})"
        )

    if is_answered:
        return None
    return DataError(f"tasks.{task.name}: {file} has no row with a right answer among its first {CHECKED_ROWS:,}")


def _lacking(task: Task, file: StoragePath, columns: set[str]) -> DataError:
    names = ", ".join(sorted(columns))
    return DataError(f"tasks.{task.name}: {file} has no column(s) {names}, which lm-eval's task {task.lm_eval} needs")


def _line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where there is no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _columns(definition: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Return the columns that are a whole template by themselves, and all columns that any template names.

    The first are templates that are no more than a column's name, such as ``doc_to_text: question``: where the column
    is missing, lm-eval would use the name as the text. A task whose rows are made by a function (``process_docs``) has
    neither: what that function needs, it says itself.
    """
    if definition.get("process_docs"):
        return set(), set()

    # A part may be a function, which says itself what it needs.
    settings = [definition.get(f"doc_to_{part}") for part in ("text", "target", "choice")]
    templates = [setting for setting in settings if isinstance(setting, str)]
    plain = {template for template in templates if template.isidentifier()}

    named = set(plain)
    for template in templates:
        named |= meta.find_undeclared_variables(Environment().parse(template))
    return plain, named


def _is_answered(lm_task: Any, doc: Row) -> bool:
    """Return whether a row has a right answer that a model can give; to lm-eval a row without one is always wrong."""
    try:
        target = lm_task.doc_to_target(doc)
        text = lm_task.doc_to_text(doc)
        choices = lm_task.doc_to_choice(doc) if lm_task.OUTPUT_TYPE == "multiple_choice" else None
    except Exception:  # whatever lm-eval's templates and functions raise on a row not made for them
        return False

    if choices is None:
        # A task may judge without a right answer, but not by a column that is empty.
        return not (lm_task.config.doc_to_target and isinstance(target, str) and not target.strip())

    # Where the choices are contexts, as in WinoGrande, lm-eval has the right one's index in place of the text.
    if lm_task.multiple_input:
        target = text
    targets = target if isinstance(target, list) else [target]
    # An empty choice has no token to be scored by.
    return isinstance(choices, list) and all(choices) and any(_is_choice(target, choices) for target in targets)


def _is_choice(target: Any, choices: list[str]) -> bool:
    """Return whether a right answer, as text or as an index, is one of the choices."""
    if isinstance(target, str):
        return target in choices
    return target is not None and 0 <= target < len(choices)


# --- lm-eval's manners ---------------------------------------------------------------------------------------------


@contextmanager
def _nulls_are_empty() -> Iterator[None]:
    """Let lm-eval's templates print nothing for a null, in place of the word None."""
    from lm_eval import utils

    usual = utils.env
    environment: Any = usual.overlay(finalize=lambda value: "" if value is None else value)
    # lm-eval compiles a template anew for every row.
    environment.from_string = cache(environment.from_string)
    utils.env = environment
    try:
        yield
    finally:
        utils.env = usual


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval, which logs, prints and draws progress bars without being asked."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
