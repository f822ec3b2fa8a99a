"""Harness: a model and a task in; the figure that lm-eval gives it, and each row's part in that, out.

Prompts, metrics and filters are those of lm-eval's own task. Where the task's evaluation rows lie in local files it is
run on these, and nothing is asked of the hub. lm-eval is an optional extra, and takes seconds to import: hence the
imports inside functions.
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
class Judged:
    """A metric's value on one task with its standard error, as lm-eval has them."""

    metric: str
    value: float
    stderr: float
    values: tuple[float, ...]
    """Each row's part, in the rows' order; their mean is ``value``."""


def version() -> str:
    """Raises ConfigError when lm-eval is not installed."""
    try:
        return f"lm-eval {metadata.version('lm_eval')}"
    except metadata.PackageNotFoundError:
        raise ConfigError("lm-eval is not installed: pip install 'seap-ray[eval]'") from None


def check(task: Task) -> None:
    """Raises ConfigError or DataError, before any work, for what lm-eval cannot judge; asks nothing of the hub."""
    _metric(task)
    if files := _evaluation_files(task):
        _check_first_row(task, files[0])


def fingerprint_of(task: Task) -> list[Any]:
    """What the figure depends on besides the model and the arguments of ``judge``."""
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
) -> Judged:
    """Judge ``model`` on all rows, or on ``samples`` of them at random, after ``num_fewshot`` examples.

    Without ``num_fewshot`` there are as many as lm-eval has for the task. Which they are is drawn as lm-eval's command
    line does, whatever ``seed`` is.
    """
    metric = _metric(task)
    with _quiet():
        exam = _exam(task, num_fewshot)
        rows = _draw(len(exam.eval_docs), samples, seed)
        return _judged(metric, _sat(exam, _examinee(model, tokenizer, batch_tokens), rows))


def _sat(exam: Any, examinee: Any, rows: list[int] | None) -> list[dict[str, Any]]:
    """What lm-eval says of each row, of the task's strict filter where there are several."""
    from lm_eval.evaluator import evaluate

    name = exam.task_name
    chosen = {name: rows} if rows else None
    # The standard error of a mean needs no bootstrap, and the bootstrap wants processes of its own.
    answers = evaluate(lm=examinee, task_dict={"tasks": {name: exam}}, samples=chosen, bootstrap_iters=0)
    filters = dict.fromkeys(answer["filter"] for answer in answers["samples"][name])
    wanted = "strict-match" if "strict-match" in filters else next(iter(filters))
    return [answer for answer in answers["samples"][name] if answer["filter"] == wanted]


def _judged(metric: str, answers: list[dict[str, Any]]) -> Judged:
    from lm_eval.api.metrics import mean, mean_stderr

    values = tuple(float(answer[metric]) for answer in answers)
    return Judged(metric, mean(values), mean_stderr(values) if len(values) > 1 else 0.0, values)


def _draw(n: int, samples: int | None, seed: int) -> list[int] | None:
    """Indices of the drawn rows, None for all; lm-eval goes by the rows' order whatever that of the indices is."""
    return None if samples is None or samples >= n else sorted(random.Random(seed).sample(range(n), samples))


# --- lm-eval's task --------------------------------------------------------------------------------------------------


@cache
def _manager() -> Any:
    """The index of lm-eval's thousands of task files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _definition(task: Task) -> dict[str, Any]:
    """lm-eval's configuration of the task, its functions by name."""
    version()
    name, manager = task.lm_eval or "", _manager()
    if name not in manager.all_subtasks:
        near = get_close_matches(name, manager.all_subtasks)
        hint = f"near it are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
        raise ConfigError(f"tasks.{task.name}.lm_eval: lm-eval has no task {name!r}; {hint}")
    return manager.task_index[name].cfg


def _metric(task: Task) -> str:
    """The task's own; where that is a perplexity, lm-eval judges answers all the same."""
    definition = _definition(task)
    metric = "exact_match" if is_perplexity(task.metric) else task.metric
    known = [entry["metric"] for entry in definition.get("metric_list") or []] or _usual_metrics(definition)
    if metric not in known:
        raise ConfigError(
            f"tasks.{task.name}.metric: lm-eval's task {task.lm_eval} has no {metric}, but {', '.join(map(str, known))}"
        )
    return metric


def _usual_metrics(definition: dict[str, Any]) -> list[str]:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    return DEFAULT_METRIC_REGISTRY.get(definition.get("output_type", "generate_until"), [])


def _exam(task: Task, num_fewshot: int | None) -> Any:
    """lm-eval's task with its rows, local or from the hub."""
    default = _definition(task).get("num_fewshot")
    # A task that says 0 means it, here as on lm-eval's command line.
    shots = (default or 0) if num_fewshot is None or default == 0 else num_fewshot
    if files := _evaluation_files(task):
        examples = _example_files(task) if shots else []
        return _local_exam(task, shots, _rows(task, files), _rows(task, examples) if examples else None)
    try:
        return _build(task, {"num_fewshot": shots})
    except Exception as error:  # the hub client raises many kinds: offline, missing, gated, no such split
        raise _not_from_hub(task, error) from None


def _not_from_hub(task: Task, error: Exception) -> DataError:
    return DataError(
        f"tasks.{task.name}: the hub did not give the rows of lm-eval's task {task.lm_eval} ({_line(error)}); "
        f"a local copy works: tasks=[{{name: {task.name}, evaluation_path: FOLDER}}]"
    )


def _local_exam(task: Task, shots: int, rows: Any, examples: Any = None) -> Any:
    """lm-eval's task on ``rows``; without ``examples`` these are drawn from the other rows."""
    config = _definition(task).get("fewshot_config") or {}
    shown = config.get("split", "examples")  # a name there goes before ours
    # Where examples are of the split that is judged, lm-eval leaves the row in question out.
    judged = shown if examples is None else "evaluation"
    splits = {shown: examples, judged: rows}
    overrides = {
        "custom_dataset": lambda **_: splits,
        "training_split": None,
        "validation_split": None,
        "test_split": judged,
        "fewshot_split": None if "samples" in config else shown,
        "num_fewshot": shots,
    }
    return _build(task, overrides)


def _build(task: Task, overrides: dict[str, Any]) -> Any:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    # lm-eval merges overrides into a task of its own only for the members of a group.
    group = {"group": "seap_ray", "task": [{"task": task.lm_eval, **overrides}]}
    (exam,) = _manager().load([group])["tasks"].values()
    exam.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return exam


# --- local rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """Another usual layout of a data set than the one that lm-eval's task reads."""

    lacks: str
    has: str
    adapt: Callable[[Row], Row]
    """Columns to add to a row."""


def _whether_boolq_is_true(row: Row) -> Row:
    return {"label": int(row["answer"] in (True, 1, "True"))}


def _parts_of_hellaswag(row: Row) -> Row:
    """llama.cpp's layout joins the columns to one text, in which the sentence to go on with is a last, unended one."""
    label, _, context = row["query"].partition(": ")
    whole = re.fullmatch(r"(.*[.!?][\"')]*)\s+([^.!?]*)", context, re.DOTALL)
    first, last = whole.groups() if whole else (context, "")
    return {"activity_label": label, "ctx_a": first, "ctx_b": last}


LAYOUTS = {
    "boolq": Layout(lacks="label", has="answer", adapt=_whether_boolq_is_true),
    "hellaswag": Layout(lacks="ctx_a", has="query", adapt=_parts_of_hellaswag),
}


def _layout(task: Task, columns: Sequence[str]) -> Layout | None:
    layout = LAYOUTS.get(task.lm_eval or "")
    return layout if layout and layout.lacks not in columns and layout.has in columns else None


def _evaluation_files(task: Task) -> list[StoragePath]:
    """Local files of the rows to judge on; none where they are lm-eval's own, from the hub."""
    return [*evaluation_rows(task).files()]


def _example_files(task: Task) -> list[StoragePath]:
    """Local files of the calibration split; none where there are no others than those to judge on."""
    try:
        files = [*calibration_rows(task).files()]
    except DataError:
        return []
    return files if files != _evaluation_files(task) else []


def _rows(task: Task, files: list[StoragePath]) -> Any:
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
    """Raises DataError when the row lacks a column or the answer that lm-eval's task needs."""
    row = read_first_row(task.name, file)
    if row is None:
        raise DataError(f"tasks.{task.name}: {file} has no rows")
    if layout := _layout(task, list(row)):
        row = row | layout.adapt(row)
    plain, named = (columns - row.keys() for columns in _columns(_definition(task)))
    if plain:
        raise _lacking(task, file, named)
    try:
        answered = _is_answered(task, row)
    except Exception as error:  # whatever lm-eval's templates and functions raise on a row not made for them
        key = str(*error.args[:1])
        if isinstance(error, KeyError) and key.isidentifier() and key not in row:
            raise _lacking(task, file, {key}) from None
        if isinstance(error, UndefinedError) and named:
            raise _lacking(task, file, named) from None
        raise DataError(
            f"tasks.{task.name}: the first row of {file} does not fit lm-eval's task {task.lm_eval} ({_line(error)})"
        ) from None
    if not answered:
        raise DataError(f"tasks.{task.name}: {file} has no right answer in its first row")


def _lacking(task: Task, file: StoragePath, columns: set[str]) -> DataError:
    names = ", ".join(sorted(columns))
    return DataError(f"tasks.{task.name}: {file} has no column(s) {names}, which lm-eval's task {task.lm_eval} needs")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def _columns(definition: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Columns that are a template as they stand, which lm-eval takes for text if missing; and all that templates name.

    None of a task whose rows are made by a function: they are for that function to miss.
    """
    parts = () if definition.get("process_docs") else ("text", "target", "choice")
    templates = [text for part in parts if isinstance(text := definition.get(f"doc_to_{part}"), str)]
    plain = {text for text in templates if text.isidentifier()}
    parse = Environment().parse
    return plain, plain.union(*(meta.find_undeclared_variables(parse(text)) for text in templates))


def _is_answered(task: Task, row: Row) -> bool:
    """Whether the row's right answer is one of its choices; what is not is wrong to lm-eval, and no error."""
    from datasets import Dataset

    with _quiet():
        exam = _local_exam(task, 0, Dataset.from_list([row]))
        if exam.OUTPUT_TYPE != "multiple_choice":
            return True
        (row,) = exam.eval_docs
    choices = exam.doc_to_choice(row)
    right = exam.doc_to_text(row) if exam.multiple_input else exam.doc_to_target(row)
    rights = right if isinstance(right, list) else [right]
    return any(r in choices if isinstance(r, str) else 0 <= r < len(choices) for r in rights)


# --- lm-eval's model -------------------------------------------------------------------------------------------------


def _examinee(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> Any:
    """lm-eval's wrapper of ``model``, in batches of at most ``batch_tokens``."""
    from lm_eval.models.huggingface import HFLM

    class Examinee(HFLM):
        @property
        def max_gen_toks(self) -> int:
            """Half of a context that is too short for lm-eval's 256 and a prompt."""
            return min(super().max_gen_toks, self.max_length // 2)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            answers: list[Any] = [None] * len(requests)
            for group in group_by_length([len(context) + len(end) for _, context, end in requests], batch_tokens):
                self.batch_size_per_gpu = len(group)
                for i, answer in zip(group, super()._loglikelihood_tokens([requests[i] for i in group]), strict=True):
                    answers[i] = answer
            return answers

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            longest = max(len(self.tok_encode(request.args[0])) for request in requests) + self.max_gen_toks
            self.batch_size_per_gpu = max(1, batch_tokens // min(longest, self.max_length))
            return super().generate_until(requests)

    # It gives the tokenizer a padding token.
    return Examinee(model, backend="causal", tokenizer=copy.deepcopy(tokenizer))


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs, prints and draws bars without being asked."""
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
