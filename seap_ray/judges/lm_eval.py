"""lm-eval as a judge: a model and a task in; the metric's value, and each row's part in it, out.

Prompts, metrics and filters are those of lm-eval's own task. Where the task's evaluation rows lie in local files,
lm-eval runs on these, and nothing is asked of the hub. lm-eval is an optional extra, and takes seconds to import: hence
the imports inside functions.
"""

import copy
import io
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from typing import Any

from jinja2 import Environment, UndefinedError, meta
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seap_ray.errors import ConfigError, DataError
from seap_ray.models.batching import group_by_length
from seap_ray.models.row_sources import Row, calibration_rows, evaluation_rows, file_format, read_first_row
from seap_ray.storage.files import stage
from seap_ray.storage.paths import StoragePath
from seap_ray.tasks import Task, is_perplexity


@dataclass(frozen=True, slots=True)
class LmEvalResult:
    """A metric's value on one task with its standard error, as lm-eval computes them."""

    metric: str
    value: float
    stderr: float
    values: tuple[float, ...]
    """Each row's part, in the rows' order; their mean is ``value``."""


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
    if files := _evaluation_files(task):
        _check_first_row(task, files[0])


def fingerprint_of(task: Task) -> list[Any]:
    """Return what the metric's value depends on besides the model and the arguments of ``judge``."""
    files = _evaluation_files(task) + _example_files(task)
    states = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    revision = (_definition(task).get("metadata") or {}).get("version")
    return [version(), task.lm_eval, revision, _metric(task), states]


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    samples: int | None,
    seed: int,
    num_fewshot: int | None,
    batch_tokens: int,
) -> LmEvalResult:
    """Judge a model on a task by lm-eval.

    Args:
        model: A causal language model; it is left as it is.
        tokenizer: The model's tokenizer; it is left as it is.
        task: A task with the name of one of lm-eval's.
        samples: Number of rows, drawn at random by ``seed``; None takes all rows.
        seed: Seed of that draw. The examples are drawn as lm-eval's command line does, whatever the seed.
        num_fewshot: Number of examples before each question; None takes as many as lm-eval has for the task.
        batch_tokens: Tokens in a batch, padding included.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task or metric.
        DataError: The evaluation rows cannot be had.
    """
    # An unknown metric is found before anything is downloaded.
    metric = _metric(task)

    with _quiet():
        lm_task = _load_task(task, num_fewshot)
        rows = _draw(len(lm_task.eval_docs), samples, seed)
        answers = _run_lm_eval(lm_task, _lm(model, tokenizer, batch_tokens), rows)
        return _result(metric, answers)


def _run_lm_eval(lm_task: Any, lm: Any, rows: list[int] | None) -> list[dict[str, Any]]:
    """Return what lm-eval says of each row, by the task's strict filter where there are several."""
    from lm_eval.evaluator import evaluate

    name = lm_task.task_name
    chosen = {name: rows} if rows else None
    # The standard error of a mean needs no bootstrap, and the bootstrap wants processes of its own.
    output = evaluate(lm=lm, task_dict={"tasks": {name: lm_task}}, samples=chosen, bootstrap_iters=0)
    answers = output["samples"][name]

    # lm-eval answers once for every filter of a task; GSM8K has a strict and a flexible one.
    filters = [answer["filter"] for answer in answers]
    wanted = "strict-match" if "strict-match" in filters else filters[0]
    return [answer for answer in answers if answer["filter"] == wanted]


def _result(metric: str, answers: list[dict[str, Any]]) -> LmEvalResult:
    from lm_eval.api.metrics import mean, mean_stderr

    values = tuple(float(answer[metric]) for answer in answers)
    # One value has no spread, which lm-eval's function would divide by.
    return LmEvalResult(metric, mean(values), mean_stderr(values) if len(values) > 1 else 0.0, values)


def _draw(n: int, samples: int | None, seed: int) -> list[int] | None:
    """Return indices of the drawn rows, None for all."""
    if samples is None or samples >= n:
        return None

    # lm-eval goes by the rows' order whatever that of the indices is, so they are sorted to match its answers.
    return sorted(random.Random(seed).sample(range(n), samples))


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


def _load_task(task: Task, num_fewshot: int | None) -> Any:
    """Return lm-eval's task with its rows, local or from the hub. Raises DataError when they cannot be had."""
    default = _definition(task).get("num_fewshot")
    # A task that says 0 means it, here as on lm-eval's command line.
    shots = (default or 0) if num_fewshot is None or default == 0 else num_fewshot

    if files := _evaluation_files(task):
        examples = _example_files(task) if shots else []
        return _load_local_task(task, shots, _rows(task, files), _rows(task, examples) if examples else None)

    try:
        return _build(task, {"num_fewshot": shots})
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, no such split
        raise _not_from_hub(task, error) from None


def _not_from_hub(task: Task, error: Exception) -> DataError:
    return DataError(
        f"tasks.{task.name}: the hub did not give the rows of lm-eval's task {task.lm_eval} ({_line(error)}); "
        f"a local copy works: tasks=[{{name: {task.name}, evaluation_path: FOLDER}}]"
    )


def _load_local_task(task: Task, shots: int, rows: Any, examples: Any = None) -> Any:
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
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    # lm-eval merges overrides into a task of its own only for the members of a group.
    group = {"group": "seap_ray", "task": [{"task": task.lm_eval, **overrides}]}
    (lm_task,) = _manager().load([group])["tasks"].values()
    # The seed of lm-eval's command line, so that the examples are those that others report figures with.
    lm_task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return lm_task


# --- local rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """A common layout of a data set, other than the one that lm-eval's task reads."""

    lacks: str
    """Column that lm-eval's task reads and this layout does not have."""
    has: str
    """Column by which this layout is known."""
    adapt: Callable[[Row], Row]
    """Function that returns the columns to add to a row."""


def _boolq_label(row: Row) -> Row:
    """Return the label: 1 where the answer is true."""
    return {"label": int(row["answer"] in (True, 1, "True"))}


def _hellaswag_parts(row: Row) -> Row:
    """Return the columns that llama.cpp's layout joins to one text.

    In that text the sentence to go on with is the last one, which has no end.
    """
    # "Making a cake: A woman breaks eggs. She"
    label, _, context = row["query"].partition(": ")
    # Whole sentences with their quotes and brackets, a space, and what has no end.
    sentences = re.fullmatch(r"(.*[.!?][\"')]*)\s+([^.!?]*)", context, re.DOTALL)
    first, last = sentences.groups() if sentences else (context, "")
    return {"activity_label": label, "ctx_a": first, "ctx_b": last}


LAYOUTS = {
    "boolq": Layout(lacks="label", has="answer", adapt=_boolq_label),
    "hellaswag": Layout(lacks="ctx_a", has="query", adapt=_hellaswag_parts),
}


def _layout(task: Task, columns: Sequence[str]) -> Layout | None:
    # Rows that have what lm-eval reads stay as they are, whatever else they have.
    layout = LAYOUTS.get(task.lm_eval or "")
    return layout if layout and layout.lacks not in columns and layout.has in columns else None


def _evaluation_files(task: Task) -> list[StoragePath]:
    """Return local files of the rows to judge on; none where they are lm-eval's own, from the hub."""
    return [*evaluation_rows(task).files()]


def _example_files(task: Task) -> list[StoragePath]:
    """Return local files of the calibration split; none where they are the files to judge on."""
    try:
        files = [*calibration_rows(task).files()]
    except DataError:  # without them examples are drawn from the rows to judge on
        return []

    # Where both are the same files, lm-eval draws examples from them and leaves out the row in question.
    return files if files != _evaluation_files(task) else []


def _rows(task: Task, files: list[StoragePath]) -> Any:
    """Read rows, in the layout that lm-eval's task reads. Raises DataError when they cannot be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(
            file_format(task.name, files[0]), data_files=[str(stage(file)) for file in files], split="train"
        )
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"tasks.{task.name}: {files[0]} cannot be read ({_line(error)})") from None

    layout = _layout(task, rows.column_names)
    # A cache of its own would not notice that ``adapt`` has changed.
    return rows.map(layout.adapt, keep_in_memory=True, load_from_cache_file=False) if layout else rows


def _check_first_row(task: Task, file: StoragePath) -> None:
    """Raise DataError when the first row lacks a column or the answer that lm-eval's task needs."""
    row = read_first_row(task.name, file)
    if row is None:
        raise DataError(f"tasks.{task.name}: {file} has no rows")
    if layout := _layout(task, list(row)):
        row = row | layout.adapt(row)

    # lm-eval would take these for text and judge all the same, so they are looked for first.
    plain, named = _columns(_definition(task))
    missing = named - row.keys()
    if plain - row.keys():
        raise _lacking(task, file, missing)

    try:
        answered = _is_answered(task, row)
    except Exception as error:  # whatever lm-eval's templates and functions raise on a row not made for them
        # A KeyError that names a column is most likely one that the rows lack.
        key = str(*error.args[:1])
        if isinstance(error, KeyError) and key.isidentifier() and key not in row:
            raise _lacking(task, file, {key}) from None
        if isinstance(error, UndefinedError) and missing:
            raise _lacking(task, file, missing) from None

        raise DataError(
            f"tasks.{task.name}: the first row of {file} does not fit lm-eval's task {task.lm_eval} ({_line(error)})"
        ) from None

    if not answered:
        raise DataError(f"tasks.{task.name}: {file} has no right answer in its first row")


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


def _is_answered(task: Task, row: Row) -> bool:
    """Return whether the row's right answer is one of its choices; what is not is wrong to lm-eval, and no error."""
    from datasets import Dataset

    with _quiet():
        lm_task = _load_local_task(task, 0, Dataset.from_list([row]))
        if lm_task.OUTPUT_TYPE != "multiple_choice":
            return True
        # The row as the task's own function makes it.
        (row,) = lm_task.eval_docs

    choices = lm_task.doc_to_choice(row)
    # Where the choices are contexts, as in WinoGrande, lm-eval has the right one's index in place of the text.
    target = lm_task.doc_to_text(row) if lm_task.multiple_input else lm_task.doc_to_target(row)
    targets = target if isinstance(target, list) else [target]
    return any(_is_choice(target, choices) for target in targets)


def _is_choice(target: str | int, choices: list[str]) -> bool:
    """Return whether a right answer, as text or as an index, is one of the choices."""
    return target in choices if isinstance(target, str) else 0 <= target < len(choices)


# --- lm-eval's model -------------------------------------------------------------------------------------------------


def _lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> Any:
    """Return lm-eval's wrapper of ``model``, which forms batches of at most ``batch_tokens``."""
    from lm_eval.models.huggingface import HFLM

    class TokenBatchedLM(HFLM):
        """lm-eval's wrapper, whose batches are bounded by tokens instead of requests."""

        @property
        def max_gen_toks(self) -> int:
            """lm-eval's 256 tokens, or half of a context that is too short for these and a prompt."""
            return min(super().max_gen_toks, self.max_length // 2)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            # Groups are by length, so answers come in another order than requests.
            answers: list[Any] = [None] * len(requests)
            lengths = [len(context) + len(end) for _, context, end in requests]
            for group in group_by_length(lengths, batch_tokens):
                # One call is one batch.
                self.batch_size_per_gpu = len(group)
                batch = super()._loglikelihood_tokens([requests[i] for i in group])
                for i, answer in zip(group, batch, strict=True):
                    answers[i] = answer

            return answers

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            """Generate answers, in batches of one size that the longest prompt and answer allow."""
            # A prompt longer than the context is cut to it, so no batch is longer than that.
            longest = max(len(self.tok_encode(request.args[0])) for request in requests) + self.max_gen_toks
            self.batch_size_per_gpu = max(1, batch_tokens // min(longest, self.max_length))
            return super().generate_until(requests)

    # lm-eval gives the tokenizer a padding token, so it has a copy.
    return TokenBatchedLM(model, backend="causal", tokenizer=copy.deepcopy(tokenizer))


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
