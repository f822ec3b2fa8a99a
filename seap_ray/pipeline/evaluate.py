"""Evaluation: models and tasks in; for each pair a result out, which is a quality or the reason why there is none.

Each model is judged by a Ray task on its own slice of the cluster. A result is kept in ``cells/`` under a name that
stands for the weights and the rows, so the same command resumes an evaluation that was cut short. A model or task that
fails costs no other its result.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from seap_ray.config import Config
from seap_ray.errors import ConfigError, DataError, FaultError, IncompleteError, SeapError
from seap_ray.judges import lm_eval
from seap_ray.judges.quality import Quality, measure, measure_windows, windows
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import (
    Item,
    check_evaluation,
    held_out_rows,
    judged_rows,
    load_tokenizer,
    tokenizer_hash,
)
from seap_ray.models.encoding import Encoding
from seap_ray.models.loading import load_model
from seap_ray.pipeline.checkpoint_writer import PendingCheckpoint, write_temporarily
from seap_ray.pipeline.cluster import remote_task
from seap_ray.pipeline.draw import Draw, draw_judged, judged_text
from seap_ray.pipeline.placement import workers_that_fit
from seap_ray.pipeline.shards import Manifest
from seap_ray.progress import Progress, say
from seap_ray.storage.artifact import Artifact, JsonFile
from seap_ray.storage.files import stage, write_json
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import Task, is_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEAP_RAY_JUDGE = "seap_ray"
"""Name of our own judge, which judges the tasks that lm-eval does not have."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a model has no quality on a task, in one line."""

    error: str
    exit_code: int = field(default=IncompleteError.exit_code, compare=False)
    """Exit code of a job that can do no more than this; 4 where the same command may mend it."""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Take the first line of an error's text, with the error's type unless the text is meant for users."""
        if isinstance(error, RayTaskError):  # its own text is a traceback
            error = error.cause

        # Some errors have no text at all.
        lines = str(error).strip().splitlines() or [""]
        if isinstance(error, SeapError):
            return cls(lines[0], error.exit_code)

        # Storage, networks, lost processes and memory that others take are mended by time; a fault is not.
        may_mend = isinstance(error, OSError | RayError | MemoryError | torch.OutOfMemoryError)
        code = IncompleteError.exit_code if may_mend else FaultError.exit_code
        return cls(f"{type(error).__name__}: {lines[0]}", code)


EvalResult = Quality | Failure


@dataclass(frozen=True, slots=True)
class EvalTask:
    """A task and its judge: lm-eval, or ours on rows drawn from the task's evaluation split."""

    task: Task
    judge: str
    fingerprint: str
    """Hash of the task, its rows and everything else that the figures depend on."""
    items: tuple[Item, ...] = ()
    """The drawn rows; none where lm-eval is the judge."""
    n_rows: int = 0
    """Rows that they were drawn from."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows that are left out, or worth a look, by ``corpus.REASONS``."""
    calibrated: frozenset[bytes] = frozenset()
    """Content keys of the rows that lm-eval is not to judge on."""

    @property
    def metric(self) -> str:
        """The task's own metric; where that is a perplexity, lm-eval judges answers all the same."""
        if self.judge == SEAP_RAY_JUDGE or not is_perplexity(self.task.metric):
            return self.task.metric
        return "exact_match"


@dataclass(frozen=True, slots=True)
class EvalTarget:
    """A model to judge on ``tasks``. A pending checkpoint is written only for as long as that takes."""

    name: str
    fingerprint: str
    """Hash of the weights."""
    tasks: tuple[str, ...]
    source: Checkpoint | PendingCheckpoint


def eval_target(source: Checkpoint | PendingCheckpoint, tasks: Iterable[str]) -> EvalTarget:
    """Return the dense model, or one that is pruned from it, as the target of an evaluation on ``tasks``."""
    name = "dense" if isinstance(source, Checkpoint) else source.spec.name
    return EvalTarget(name, source.fingerprint, tuple(tasks), source)


# --- tasks -----------------------------------------------------------------------------------------------------------


def eval_task(config: Config, run: Run, task: Task, *, by_lm_eval: bool) -> EvalTask:
    """Choose a task's judge and draw its rows, which are kept in the run for the next job.

    Raises DataError when the rows cannot be had.
    """
    settings = config.evaluation
    manifest = _calibrated_rows(run, task)
    calibrated = manifest.read_row_keys(run) if manifest else frozenset()
    if by_lm_eval and task.lm_eval:
        lm_eval.check(task)
        # lm-eval draws its rows by itself, so the hash is of what it draws them by.
        inputs: list[Any] = [lm_eval.fingerprint_of(task), settings.samples, settings.num_fewshot, config.run.seed]
        inputs += [task.held_out, manifest and manifest.rows, *_encoding_state(config, task)]
        is_held_out = held_out_rows(task, seed=config.run.seed, calibrated=calibrated)
        rows = lm_eval.count_rows(task, is_held_out) or lm_eval.RowCounts(0, {})
        key = fingerprint(inputs)
        return EvalTask(task, lm_eval.version(), key, (), rows.n_rows, rows.counts, calibrated)

    check_evaluation(task)
    drawn = _drawn_items(config, run, task, manifest)
    stored = drawn.get(partial(_draw_items, config, task, drawn, calibrated))
    items = tuple(Item(**item) for item in stored["items"])

    # The window is no part of the drawn rows, but the figures depend on it.
    window = _window(config) if task.metric == "window_perplexity" else None
    key = fingerprint(stored, window, *_encoding_state(config, task))

    # The key holds the rows and the template, and so which of them it takes.
    taken = _taken_by_template(_encoding(config, task), task, items)
    n_refused = len(items) - len(taken)
    counts = {**stored["counts"], "refused": n_refused} if n_refused else stored["counts"]
    return EvalTask(task, SEAP_RAY_JUDGE, key, taken, stored["n_rows"], counts)


def _taken_by_template(encoding: Encoding, task: Task, items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items that the chat template takes; all where none is used.

    Raises DataError where it takes none of them.
    """
    taken = []
    refusal: DataError | None = None
    for item in items:
        try:
            encoding.rendered(item)
            taken.append(item)
        # As in the calibration, an odd conversation costs no other its judgement.
        except DataError as error:
            refusal = refusal or error

    if refusal and not taken:
        raise DataError(f"tasks.{task.name}: {refusal}; it takes none of the {len(items)} rows to judge on")
    return tuple(taken)


def _encoding_state(config: Config, task: Task) -> list[str | None]:
    """Return what a question's token ids depend on: the tokenizer's files, and the chat template where it is used."""
    encoding = _encoding(config, task)
    template = encoding.tokenizer.get_chat_template() if encoding.is_chat else None
    return [tokenizer_hash(Checkpoint.open(config.model.source, config.model.revision)), template]


def _encoding(config: Config, task: Task) -> Encoding:
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    return Encoding.of(config, task, tokenizer)


def _calibrated_rows(run: Run, task: Task) -> Manifest | None:
    """Return the manifest of the rows that are not to be judged on; None where any may be."""
    return Manifest.read(run.shards(task.name)) if task.held_out else None


def _drawn_items(config: Config, run: Run, task: Task, calibrated: Manifest | None) -> Artifact[dict[str, Any]]:
    """Return the file of a task's drawn rows; its key stands for the settings and the source's files."""
    state = judged_rows(task).source.state()
    rows = calibrated.rows if calibrated else None
    key = fingerprint([task.model_dump(), config.evaluation.samples, config.run.seed, state, rows])
    return Artifact(run.cells / f"{task.name}.items.json", key, JsonFile())


def _draw_items(config: Config, task: Task, drawn: Artifact[dict[str, Any]], calibrated: frozenset[bytes]) -> None:
    """Draw held-out rows like the calibration's; of a text take all rows in their order, with its own blank lines."""
    seed = config.run.seed
    # A text is one item; its windows are drawn once it is tokenised.
    if task.metric == "window_perplexity":
        text = judged_text(task, seed=seed)
        rows = Draw((Item(text, "", text, []),), n_rows=0, counts={})
    else:
        # As many and as random as the calibration's rows, from the other split; None draws all of them.
        rows = draw_judged(task, n=config.evaluation.samples, seed=seed, calibrated=calibrated)

    write_json(drawn.path, {"fingerprint": drawn.key, **asdict(rows)})


def _window(config: Config) -> int:
    return config.evaluation.window or config.corpus.sequence_length


# --- results ---------------------------------------------------------------------------------------------------------

ResultFile = Artifact[dict[str, Any]]
"""Where the quality of one model on one task is kept."""


@dataclass(frozen=True, slots=True)
class _MissingResults:
    """The results of one model that are still to be made."""

    target: EvalTarget
    files: dict[str, ResultFile]
    """By task."""


def evaluate(
    config: Config,
    run: Run,
    targets: Sequence[EvalTarget],
    eval_tasks: Mapping[str, EvalTask | Failure],
    progress: Progress,
) -> list[dict[str, EvalResult]]:
    """Judge every target on its tasks, and return the results by task, in the targets' order.

    What was judged before, with the same weights and rows, is read from the run.
    """
    files = [_result_files(config, run, target, eval_tasks) for target in targets]

    # A model with nothing to judge is neither written nor loaded.
    missing = []
    for target, target_files in zip(targets, files, strict=True):
        unmade = {task: file for task, file in target_files.items() if not file.is_made()}
        if unmade:
            missing.append(_MissingResults(target, unmade))

    # Failures are not kept in the run: the same command tries again.
    failures: dict[tuple[str, str], Failure] = {}
    if missing:
        total = sum(len(results.files) for results in missing)
        # The work is done by going through its progress.
        for _ in progress(_judge_all(config, eval_tasks, missing, failures), total, "evaluating", " results"):
            pass

    results = []
    for target, target_files in zip(targets, files, strict=True):
        result = partial(_result, target, target_files, eval_tasks, failures)
        results.append({task: result(task) for task in target.tasks})
    return results


def cells_folder(config: Config, run: Run) -> StoragePath:
    """Return the folder of results, the run's own or one that runs share. Raises ConfigError for no valid name."""
    try:
        return parse_path(config.evaluation.cells).storage_root() if config.evaluation.cells else run.cells
    except ConfigError as error:
        raise ConfigError(f"evaluation.cells: {error}") from None


def _result_files(
    config: Config, run: Run, target: EvalTarget, eval_tasks: Mapping[str, EvalTask | Failure]
) -> dict[str, ResultFile]:
    """Return the result file of each task that can be judged."""
    folder = cells_folder(config, run)
    files = {}
    for task in target.tasks:
        judged = eval_tasks[task]
        if isinstance(judged, EvalTask):
            key = fingerprint(target.fingerprint, judged.fingerprint, config.model.dtype)
            # 20 hexadecimal digits are 80 bits, enough that no two keys share a name.
            path = folder / f"{judged.task.name}-{key[:20]}.json"
            files[task] = Artifact(path, key, JsonFile(key_in_name=True))
    return files


def _result(
    target: EvalTarget,
    files: Mapping[str, ResultFile],
    eval_tasks: Mapping[str, EvalTask | Failure],
    failures: Mapping[tuple[str, str], Failure],
    task: str,
) -> EvalResult:
    # A task that cannot be judged is every model's failure.
    judged = eval_tasks[task]
    if isinstance(judged, Failure):
        return judged

    failure = failures.get((target.fingerprint, task))
    return failure or Quality.stored(files[task].load())


def _judge_all(
    config: Config,
    eval_tasks: Mapping[str, EvalTask | Failure],
    missing: Sequence[_MissingResults],
    failures: dict[tuple[str, str], Failure],
) -> Iterator[int]:
    """Yield the number of results of each model as they are there; what failed is added to ``failures``."""
    started = time.monotonic()
    # Judges take as much of a node as workers of the calibration did.
    settings = config.calibration
    judge = remote_task(_judge, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)
    # Each task's rows are in the object store once, whatever the number of models.
    stored = {name: ray.put(task) for name, task in eval_tasks.items() if isinstance(task, EvalTask)}

    # One task a model, so that it is loaded once for all it is judged on.
    pending = {}
    for results in missing:
        tasks = {task: stored[task] for task in results.files}
        pending[judge.remote(config, results.target.source, results.files, tasks)] = results

    # Whichever model is done first comes first, so that progress is shown as it is made.
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        results = pending.pop(done)
        try:
            failed = ray.get(done)
        except RayError as error:  # its process died, again and again
            failed = dict.fromkeys(results.files, Failure.of(error))

        for task, failure in failed.items():
            failures[results.target.fingerprint, task] = failure
        # The first model to be done, the dense one as a rule, shows what each of its tasks takes.
        if len(pending) == len(missing) - 1:
            _say_duration(results, missing, time.monotonic() - started, config)
        yield len(results.files)


def _say_duration(done: _MissingResults, missing: Sequence[_MissingResults], elapsed: float, config: Config) -> None:
    """Say how long all models will take by the seconds of one, where that has made a result of every task."""
    seconds = {task: file.load()["seconds"] for task, file in done.files.items() if file.is_made()}
    tasks = [task for results in missing for task in results.files]
    if len(missing) == 1 or not seconds.keys() >= set(tasks):
        return

    # Writing and loading a model is all that its process did besides judging.
    total = sum(seconds[task] for task in tasks) + len(missing) * max(elapsed - sum(seconds.values()), 0)
    n_judges = min(workers_that_fit(ray.cluster_resources(), config.calibration), len(missing))
    minutes = total / n_judges / 60
    say(f"evaluating {len(missing)} models takes about {minutes:.0f} min, {n_judges} at a time")


def _judge(
    config: Config,
    source: Checkpoint | PendingCheckpoint,
    files: dict[str, ResultFile],
    eval_tasks: dict[str, "ray.ObjectRef[EvalTask]"],
) -> dict[str, Failure]:
    """Judge one model, write its results to ``files``, and return by task what went wrong; no error is raised."""
    # Whatever a judge raises costs one result, and whatever loading raises the results of one model.
    failures = {}
    try:
        with opened(source) as folder:
            model, tokenizer = load_with_tokenizer(config, folder)
            for task, file in files.items():
                started = time.monotonic()
                try:
                    quality = judge_task(config, model, tokenizer, ray.get(eval_tasks[task]))
                    write_json(file.path, {**asdict(quality), "seconds": time.monotonic() - started})
                except Exception as error:
                    failures[task] = Failure.of(error)
    except Exception as error:  # the model itself cannot be written or loaded
        return dict.fromkeys(files, Failure.of(error))

    return failures


@contextmanager
def opened(source: Checkpoint | PendingCheckpoint) -> Iterator[Path]:
    """Yield a local folder with the model; a pending checkpoint is there only while inside."""
    if isinstance(source, Checkpoint):
        yield source.folder
        return

    try:
        folder = write_temporarily(source)
        copy = stage(folder)  # from a bucket; on a disk it is the folder itself
        yield copy
        if copy != folder:
            copy.parent.remove()
    finally:
        # It is not there where the checkpoint is written for good.
        source.partial.remove()


def load_with_tokenizer(config: Config, folder: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model with the base's tokenizer.

    Raises ConfigError for a model whose tokens are not those of the base: their figures could not be compared.
    """
    base = Checkpoint.open(config.model.source, config.model.revision)
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(base.folder, trust_remote_code=trust)

    if load_tokenizer(folder, trust_remote_code=trust).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{folder} has another tokenizer than model.source, so their figures do not compare")

    return load_model(config, base, folder), tokenizer


def judge_task(
    config: Config, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", eval_task: EvalTask
) -> Quality:
    """Judge a loaded model on a task's rows, by lm-eval or by our own judge."""
    settings = config.evaluation
    task = eval_task.task

    if eval_task.judge != SEAP_RAY_JUDGE:
        return _judge_by_lm_eval(config, model, tokenizer, eval_task)

    encoding = Encoding.of(config, task, tokenizer)
    if task.metric == "window_perplexity":
        # A window is no longer than the positions that the model knows.
        longest = getattr(model.config, "max_position_embeddings", None) or _window(config)
        ids = encoding.ids(eval_task.items[0].text)
        cut = windows(ids, min(_window(config), longest), samples=settings.samples, seed=config.run.seed)
        return measure_windows(model, cut, batch_tokens=settings.batch_tokens)

    return measure(model, encoding, task, eval_task.items, batch_tokens=settings.batch_tokens)


def _judge_by_lm_eval(
    config: Config, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", eval_task: EvalTask
) -> Quality:
    settings = config.evaluation
    task = eval_task.task
    judged = lm_eval.judge(
        model,
        Encoding.of(config, task, tokenizer),
        task,
        samples=settings.samples,
        seed=config.run.seed,
        num_fewshot=settings.num_fewshot,
        batch_tokens=settings.batch_tokens,
        is_held_out=held_out_rows(task, seed=config.run.seed, calibrated=eval_task.calibrated),
    )

    # Each row counts once. Value and standard error are lm-eval's own, not computed anew.
    n = len(judged.values)
    return Quality(judged.metric, judged.value, judged.stderr, n, judged.values, (1,) * n)
