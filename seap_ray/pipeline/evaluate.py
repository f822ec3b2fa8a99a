"""Evaluation: models and tasks in; for each pair a cell out, which is a quality or the reason why there is none.

A model is a Ray task on its own slice of the cluster; what was judged once, with the same weights and rows, is read
back from ``cells/``, so whatever was cut short goes on. A cell that fails leaves the others alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seap_ray.config import Config
from seap_ray.errors import ConfigError, SeapError
from seap_ray.judges import lm_eval
from seap_ray.judges.quality import Quality, measure, measure_windows, windows
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, Renderer, check_evaluation, corpus_files, is_files, load_tokenizer
from seap_ray.models.loading import load_model
from seap_ray.pipeline.prune import PendingCheckpoint, write_temporarily
from seap_ray.pipeline.shards import draw, read_in_order, read_rows
from seap_ray.storage.files import read_json, stage, write_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task, is_perplexity

OURS = "seap_ray"
"""The judge of tasks that lm-eval does not have."""
Progress = Callable[[Iterable[int], int, str, str], Iterable[int]]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a cell has no quality, in one line."""

    error: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        if isinstance(error, RayTaskError):  # its own text is a traceback
            error = error.cause
        lines = str(error).strip().splitlines() or [""]
        return cls(lines[0] if isinstance(error, SeapError) else f"{type(error).__name__}: {lines[0]}")

    def brief(self) -> dict[str, Any]:
        """What a results file says of it."""
        return {"error": self.error}


EvalResult = Quality | Failure


@dataclass(frozen=True, slots=True)
class EvalTask:
    """How a task is judged: by lm-eval, or by us on rows drawn from its evaluation split."""

    task: Task
    judge: str
    made_of: str
    """Fingerprint of the task, its rows and what else the figures depend on."""
    items: tuple[Item, ...] = ()

    @property
    def metric(self) -> str:
        """The task's own; where that is a perplexity, lm-eval judges answers all the same."""
        return self.task.metric if self.judge == OURS or not is_perplexity(self.task.metric) else "exact_match"


@dataclass(frozen=True, slots=True)
class EvalTarget:
    """A model to judge on ``tasks``; a draft is written only for as long as that takes."""

    name: str
    fingerprint: str
    tasks: tuple[str, ...]
    source: Checkpoint | PendingCheckpoint


def eval_target(source: Checkpoint | PendingCheckpoint, tasks: Iterable[str]) -> EvalTarget:
    """The dense model, or one cut from it, to be judged on ``tasks``."""
    if isinstance(source, Checkpoint):
        return EvalTarget("dense", source.fingerprint, tuple(tasks), source)
    return EvalTarget(source.spec.name, source.fingerprint, tuple(tasks), source)


# --- exams -----------------------------------------------------------------------------------------------------------


def eval_task(config: Config, run: Run, task: Task, *, by_lm_eval: bool) -> EvalTask:
    """Raises DataError when the task's evaluation rows cannot be had; the rows are kept in the run for the next job."""
    settings = config.evaluation
    if by_lm_eval and task.lm_eval:
        lm_eval.check(task)
        made_of = [lm_eval.fingerprint_of(task), settings.samples, settings.num_fewshot, config.run.seed]
        return EvalTask(task, lm_eval.version(), fingerprint(made_of))
    check_evaluation(task)
    path = run.cells / f"{task.name}.items.json"
    drawn_from = fingerprint([task.model_dump(), settings.samples, config.run.seed, _files(task)])
    stored = read_json(path)
    if not stored or stored["fingerprint"] != drawn_from:
        stored = {"fingerprint": drawn_from, "items": _draw(config, task)}
        write_json(path, stored)
    items = tuple(Item(**item) for item in stored["items"])
    window = _window(config) if task.metric == "window_perplexity" else None
    return EvalTask(task, OURS, fingerprint(stored, window), items)


def _files(task: Task) -> list[tuple[str, int, int]]:
    path = task.evaluation_path or task.path
    files = corpus_files(task, path, task.evaluation_split) if is_files(path) else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _draw(config: Config, task: Task) -> list[dict[str, Any]]:
    """Held-out rows, drawn like the calibration's; of a text all rows in their order, with its own blank lines."""
    seed, samples = config.run.seed, config.evaluation.samples
    rows = read_rows(task, evaluation=True, seed=seed)
    if task.metric == "window_perplexity":
        renderer = Renderer(task, official=True)
        text = "\n\n".join(renderer.item(row).text for row in read_in_order(rows))
        return [asdict(Item(text, "", text, []))]
    drawn, _, _ = draw(task, rows, n=samples, seed=seed, official=False)
    return drawn.select(["text", "question", "answer", "choices"]).to_pylist()


def _window(config: Config) -> int:
    return config.evaluation.window or config.corpus.sequence_length


# --- cells -----------------------------------------------------------------------------------------------------------


def evaluate(
    config: Config,
    run: Run,
    subjects: Sequence[EvalTarget],
    exams: Mapping[str, EvalTask | Failure],
    progress: Progress,
) -> list[dict[str, EvalResult]]:
    """The cells of every subject, in order, by task."""
    todo = [(subject, _missing(config, run, subject, exams)) for subject in subjects]
    todo = [(subject, missing) for subject, missing in todo if missing]
    failed: dict[tuple[str, str], Failure] = {}
    if todo:
        for _ in progress(
            _judge_all(config, exams, todo, failed), sum(len(m) for _, m in todo), "evaluating", " cells"
        ):
            pass
    return [
        {
            task: _cell(config, run, subject, exams[task], failed.get((subject.fingerprint, task)))
            for task in subject.tasks
        }
        for subject in subjects
    ]


def _path(config: Config, run: Run, subject: EvalTarget, exam: EvalTask) -> StoragePath:
    made_of = fingerprint(subject.fingerprint, exam.made_of, config.model.dtype)
    return run.cells / f"{exam.task.name}-{made_of[:20]}.json"


def _missing(
    config: Config, run: Run, subject: EvalTarget, exams: Mapping[str, EvalTask | Failure]
) -> dict[str, StoragePath]:
    paths = {
        task: _path(config, run, subject, exam) for task in subject.tasks if isinstance(exam := exams[task], EvalTask)
    }
    return {task: path for task, path in paths.items() if read_json(path) is None}


def _cell(
    config: Config, run: Run, subject: EvalTarget, exam: EvalTask | Failure, failed: Failure | None
) -> EvalResult:
    if isinstance(exam, Failure):
        return exam
    if failed:
        return failed
    return Quality.stored(read_json(_path(config, run, subject, exam)))


def _judge_all(
    config: Config,
    exams: Mapping[str, EvalTask | Failure],
    todo: list[tuple[EvalTarget, dict[str, StoragePath]]],
    failed: dict[tuple[str, str], Failure],
) -> Iterator[int]:
    """Yield the number of cells of each model as it is done; what failed is added to ``failed``."""
    settings = config.calibration
    judge = ray.remote(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)(_judge)
    shared = {task: ray.put(exam) for task, exam in exams.items() if isinstance(exam, EvalTask)}
    pending = {
        judge.remote(config, subject.source, missing, {task: shared[task] for task in missing}): (subject, missing)
        for subject, missing in todo
    }
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        subject, missing = pending.pop(done)
        try:
            failures = ray.get(done)
        except RayError as error:  # its process died, again and again
            failures = {task: Failure.of(error) for task in missing}
        failed |= {(subject.fingerprint, task): failure for task, failure in failures.items()}
        yield len(missing)


def _judge(
    config: Config,
    source: Checkpoint | PendingCheckpoint,
    cells: dict[str, StoragePath],
    exams: dict[str, "ray.ObjectRef[EvalTask]"],
) -> dict[str, Failure]:
    """Judge one model on the tasks of ``cells``; whatever goes wrong with it is the answer, and nobody else's fault."""
    failures = {}
    try:
        with _opened(source) as folder:
            model, tokenizer = _load(config, folder)
            for task, path in cells.items():
                try:
                    quality = _judge_task(config, model, tokenizer, ray.get(exams[task]))
                    write_json(path, asdict(quality))
                except Exception as error:
                    failures[task] = Failure.of(error)
    except Exception as error:
        return {task: Failure.of(error) for task in cells}
    return failures


@contextmanager
def _opened(source: Checkpoint | PendingCheckpoint) -> Iterator[Path]:
    if isinstance(source, Checkpoint):
        yield source.folder
        return
    try:
        folder = write_temporarily(source)
        copy = stage(folder)
        yield copy
        if copy != folder:
            copy.parent.remove()
    finally:
        source.partial.remove()


def _load(config: Config, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises ConfigError for a model whose tokens are not those of the base: their figures could not be compared."""
    base = Checkpoint.open(config.model.source, config.model.revision)
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust)
    if load_tokenizer(folder, trust_remote_code=trust).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{folder} has another tokenizer than model.source, so their figures do not compare")
    return load_model(config, base, folder), tokenizer


def _judge_task(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: EvalTask) -> Quality:
    settings, seed = config.evaluation, config.run.seed
    task, batch_tokens = exam.task, settings.batch_tokens
    if exam.judge != OURS:
        judged = lm_eval.judge(
            model,
            tokenizer,
            task,
            samples=settings.samples,
            seed=seed,
            num_fewshot=settings.num_fewshot,
            batch_tokens=batch_tokens,
        )
        return Quality(
            judged.metric,
            judged.value,
            judged.stderr,
            len(judged.values),
            judged.values,
            (1,) * len(judged.values),
        )
    if task.metric == "window_perplexity":
        longest = getattr(model.config, "max_position_embeddings", None) or _window(config)
        ids = tokenizer(exam.items[0].text, verbose=False)["input_ids"]
        cut = windows(ids, min(_window(config), longest), samples=settings.samples, seed=seed)
        return measure_windows(model, cut, batch_tokens=batch_tokens)
    return measure(model, tokenizer, task, list(exam.items), batch_tokens=batch_tokens)
