"""Job: the whole path, from a config to a table, on the Ray cluster at hand."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from transformers.utils import logging as transformers_logging

from seap_ray import errors
from seap_ray.config import Config
from seap_ray.core.plan import check_ratio
from seap_ray.errors import ConfigError, IncompleteError, SeapError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import check_evaluation, check_source, load_tokenizer
from seap_ray.models.export import parse_size
from seap_ray.pipeline.calibrate import calibrate, n_workers
from seap_ray.pipeline.cluster import connect
from seap_ray.pipeline.evaluate import Failure, eval_target, eval_task, evaluate
from seap_ray.pipeline.model_specs import model_specs, pruning_section
from seap_ray.pipeline.placement import choose_placement, with_placement
from seap_ray.pipeline.planner import Planner, make_planner
from seap_ray.pipeline.preflight import Finding, cluster_checks, local_checks, raise_on_error
from seap_ray.pipeline.prune import PendingCheckpoint, prune
from seap_ray.pipeline.results import dense_row, pruned_row, results_json
from seap_ray.pipeline.shards import Manifest, make_shards
from seap_ray.progress import progress, say
from seap_ray.report.page import write_report
from seap_ray.report.table import table
from seap_ray.routing.fitting import fit
from seap_ray.storage.files import write_json
from seap_ray.storage.paths import is_uri
from seap_ray.storage.run import Run

COPIED_AT_ONCE = 5 * 2**30
"""Bytes that S3 copies in one request."""
RAY_DATA_ERROR = re.compile(r"^seap_ray\.errors\.(\w+): (.+)$", re.MULTILINE)
"""What Ray Data hands on of an error that a function of rows raised: a line in a text."""


@dataclass(frozen=True)
class CalibratedRun:
    """A run whose statistics are there: what plans are made from, and what they were made of."""

    config: Config
    checkpoint: Checkpoint
    run: Run
    manifests: list[Manifest]
    planner: Planner


def run_job(config: Config) -> None:
    """Corpora, calibration, plans, checkpoints, evaluation, report. Raises SeapError for what a user can mend."""
    on_cluster(config, _prune, check_evaluation_rows=config.evaluation.samples != 0)


def on_cluster(config: Config, work: Callable[[Config, Checkpoint, Run], None], *, check_evaluation_rows: bool) -> None:
    """Check what can be checked, claim the run, connect, and ``work``; errors that a user can mend come out as such.

    ``check_evaluation_rows``: whether a missing evaluation file is one of them, or left to ``work``.
    """
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    checkpoint = _checked(config, check_evaluation_rows=check_evaluation_rows)
    run = Run.of(config)
    config = _absolute(config)
    with run.held():
        run.claim(config)
        _connect()
        with unwrap_ray_errors():
            n_workers(config, 1)
            raise_on_error(cluster_checks(config, checkpoint, run))
            work(with_placement(config, checkpoint), checkpoint, run)
    say(f"{run.root} is complete, {time.monotonic() - started:.0f} s")


@contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Errors that a user can mend come out as such; Ray's own kind of one has a traceback for its text."""
    try:
        yield
    except Exception as error:
        known = known_error(error)
        if known is None:
            raise
        raise known from None


def diagnose(config: Config) -> None:
    """Say, line by line, what there is against what the config needs. Raises SeapError for what is wrong."""
    _show(local_checks(config))
    checkpoint, config = _checked(config, check_evaluation_rows=config.evaluation.samples != 0), _absolute(config)
    _connect()
    with unwrap_ray_errors():
        findings = cluster_checks(config, checkpoint, Run.of(config))
        _show(findings)
        n, settings = n_workers(config, sys.maxsize), config.calibration
        each = f"{settings.num_cpus} CPUs and {settings.num_gpus:g} GPUs"
        said = f"{n}, each of {each}; placement {choose_placement(config, checkpoint)}"
        _show([Finding("ok", "workers", said)])
    wrong = sum(finding.level == "error" for finding in findings)
    if wrong:
        raise ConfigError(f"{wrong} of these lines must be mended before a job can run")


def _show(findings: list[Finding]) -> None:
    for finding in findings:
        say(f"{finding.level:7}  {finding.subject:8}  {finding.message}")


def _absolute(config: Config) -> Config:
    """A local model by its whole path: workers may have another current folder."""
    folder = Path(config.model.source).expanduser().absolute()
    if config.model.source == "demo" or not folder.is_dir():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"source": str(folder)})})


def _checked(config: Config, *, check_evaluation_rows: bool) -> Checkpoint:
    """Everything that can be refused before any work starts, is."""
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    load_tokenizer(checkpoint.folder, trust_remote_code=config.model.trust_remote_code)
    for task in config.tasks:
        check_source(task, official=config.corpus.prompt_format == "official")
        if check_evaluation_rows:
            check_evaluation(task)
    if checkpoint.architecture.n_experts and config.calibration.statistics == "covariance":
        raise ConfigError(
            "calibration.statistics: covariance is not for mixtures of experts, which have too many; use moments, with "
            "pruning.score=wifv pruning.compensation=mean"
        )
    if is_uri(config.run.storage) and parse_size(config.export.max_shard_size) > COPIED_AT_ONCE:
        raise ConfigError("export.max_shard_size: in a bucket 5GB at most, since larger files cannot be renamed there")
    _check_ratios(config, checkpoint)
    return checkpoint


def _check_ratios(config: Config, checkpoint: Checkpoint) -> None:
    """What a layer can give does not depend on statistics, so a ratio beyond reach is known at once."""
    stock = config.export.format == "stock"
    for pruning in (pruning_section(config, spec.settings) for spec in model_specs(config)):
        compensated = pruning.compensation != "none"
        for ratio in config.pruning.ratio:
            check_ratio(checkpoint.architecture, pruning, ratio=ratio, compensated=compensated, stock=stock)


def _connect() -> None:
    # The first error ends the job with one line; those of tasks beside it would add a traceback each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    connect()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def known_error(error: BaseException | None) -> SeapError | None:
    """What a Ray task, actor or Ray Data function met, out of Ray's wrappers, if a user can mend it."""
    while error is not None:
        if isinstance(cause := getattr(error, "cause", None), SeapError):
            return cause
        if isinstance(error, SeapError):
            return error
        if isinstance(error, RayTaskError) and (told := RAY_DATA_ERROR.search(str(error))):
            return getattr(errors, told[1])(told[2])
        if isinstance(error, ray.exceptions.OutOfDiskError):
            return IncompleteError("the disk of a node is full; make room and run the same command again")
        if isinstance(error, RayError) and not isinstance(error, (RayTaskError, RuntimeEnvSetupError)):
            lost = str(error).strip().partition("\n")[0] or type(error).__name__
            return IncompleteError(f"the cluster lost a part of the job ({lost}); run the same command again")
        error = cause or error.__cause__
    return None


def calibrate_run(config: Config, checkpoint: Checkpoint, run: Run) -> CalibratedRun:
    """Bring shards and statistics up to date; what is whole stays."""
    source = f"{config.model.source} ({checkpoint.parameters:,} parameters)"
    say(f"{source}: {len(config.tasks)} tasks to {run.root}")
    manifests = make_shards(config, checkpoint, run, say)
    for manifest in manifests:
        left_out = f", {manifest.n_blank} of {manifest.n_rows} rows blank" if manifest.n_blank else ""
        cut = f", {manifest.n_cut} texts cut at the longest sequence" if manifest.n_cut else ""
        say(f"  {manifest.task}: {manifest.n_tokens:,} tokens in {len(manifest.shards)} shards{left_out}{cut}")
    statistics = calibrate(config, checkpoint, run, manifests, partial(progress, unit=" tokens"))
    return CalibratedRun(config, checkpoint, run, manifests, make_planner(config, checkpoint, run, statistics))


def _prune(config: Config, checkpoint: Checkpoint, run: Run) -> None:
    made = calibrate_run(config, checkpoint, run)
    drafts = prune(made.planner, run, partial(progress, unit="B"))
    _report(made, drafts, router=route(made))


def route(made: CalibratedRun) -> dict[str, Any] | None:
    """Fit the router; None, which only serving will miss, for a model whose tokenizer it cannot have."""
    prompts = {manifest.task: manifest.read_prompts(made.run) for manifest in made.manifests}
    seed, trust = made.config.run.seed, made.config.model.trust_remote_code
    try:
        report = fit(made.checkpoint, prompts, made.run, seed=seed, trust_remote_code=trust)
    except ConfigError as error:
        say(f"router: none; {error}")
        return None
    if report["n"]:
        say(
            f"router: {report['accuracy']:.3f} of {report['n']} held-out prompts to their task; threshold "
            f"{report['threshold']:.2f} leaves {1 - report['routed']:.0%} to the general model"
        )
    return report


def _report(made: CalibratedRun, drafts: list[PendingCheckpoint], router: dict[str, Any] | None) -> None:
    """Evaluate, print the table, write results and report. Raises IncompleteError when a model could not be judged."""
    config, run = made.config, made.run
    rows = [dense_row(made.checkpoint), *map(pruned_row, drafts)]
    eval_tasks = {}
    if config.evaluation.samples != 0:
        eval_tasks = {task.name: eval_task(config, run, task, by_lm_eval=False) for task in config.tasks}
        targets = [eval_target(made.checkpoint, eval_tasks)]
        targets += [eval_target(draft, eval_tasks) for draft in drafts]
        found = evaluate(config, run, targets, eval_tasks, progress)
        rows = [row.with_quality(quality) for row, quality in zip(rows, found, strict=True)]
    written = results_json(config, eval_tasks, rows, router)
    write_json(run.results, written)
    say("")
    say(table(written))
    say("")
    say(f"{write_report(run)} has the pictures")
    for row in rows:
        for task, result in row.quality.items():
            if isinstance(result, Failure):
                raise IncompleteError(f"{row.name} on {task}: {result.error}")
