"""Job: the path of the data from a config to a table, one step a file, on the Ray cluster at hand.

preflight -> shards -> calibrate, merge -> planner -> plan_choice -> error_correction -> checkpoint_writer -> routing ->
evaluate -> agreement -> results -> report
"""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import logging as transformers_logging

from seap_ray.config import Config
from seap_ray.errors import ConfigError, IncompleteError, error_by_code
from seap_ray.models.checkpoint import Checkpoint, versions
from seap_ray.models.corpus import rows_lines
from seap_ray.pipeline.agreement import measure_agreements
from seap_ray.pipeline.biases import say_bias, with_bias
from seap_ray.pipeline.calibrate import calibrate, make_records, n_workers
from seap_ray.pipeline.checkpoint_writer import PendingCheckpoint, target_lines, write_checkpoints
from seap_ray.pipeline.cluster import ClusterNeeded, connect_driver, would_start_cluster
from seap_ray.pipeline.divergences import held_out_shard
from seap_ray.pipeline.error_correction import correct_models
from seap_ray.pipeline.evaluate import EvalTask, eval_target, eval_task, evaluate
from seap_ray.pipeline.gguf_files import gguf_note
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.placement import with_placement
from seap_ray.pipeline.plan_choice import PlanChooser, passes_of_choice
from seap_ray.pipeline.planner import Planner, make_planner
from seap_ray.pipeline.preflight import (
    check_config,
    cluster_checks,
    raise_on_error,
    with_absolute_source,
    with_recognised_tasks,
)
from seap_ray.pipeline.quantization import quantization_note, with_quantization
from seap_ray.pipeline.ray_errors import unwrap_ray_errors
from seap_ray.pipeline.results import dense_row, make_results, pruned_row, quality_cells
from seap_ray.pipeline.run_target import with_target_ratio
from seap_ray.pipeline.shard_records import ShardRecords
from seap_ray.pipeline.shards import Manifest, make_shards
from seap_ray.progress import progress, say
from seap_ray.report.page import write_report
from seap_ray.report.rows import ModelRow
from seap_ray.report.table import table
from seap_ray.routing.fitting import fit
from seap_ray.storage.artifact import JsonFile
from seap_ray.storage.files import write_json
from seap_ray.storage.run import Run, fingerprint

Work = Callable[[Config, Checkpoint, Run], None]
"""What a job does while no other works on its run: makes what the run does not have yet."""
MIN_TOKENS_PER_COLUMN = 2
"""Tokens for each column of a layer below which a fit over its columns is of little use."""


def run_job(config: Config) -> None:
    """Calibrate a model, write its task experts, judge them, and write the report.

    Every step leaves files in the run, and makes only those that are not there, so the same command resumes a job that
    was cut short.

    Raises SeapError for what a user can fix.
    """
    on_cluster(config, _run_steps, check_evaluation_rows=config.evaluation.samples != 0)


def _run_steps(config: Config, checkpoint: Checkpoint, run: Run) -> None:
    # Corpora -> token shards -> a record of each -> the tasks' statistics.
    calibrated = calibrate_run(config, checkpoint, run)
    # Statistics -> plans, all of them before anything is written: a ratio that cannot be met costs nothing.
    models = PlanChooser(calibrated.planner, progress).plan_all()
    # Plans -> what corrects the errors of their layers, where that is asked for.
    models = correct_models(calibrated.planner, models, progress)
    # Plans -> checkpoints.
    checkpoints = write_checkpoints(models, config.export, run, progress)
    for line in target_lines(checkpoints):
        say(f"  {line}")
    # The tasks' prompts -> a router.
    router = route(calibrated)
    # Checkpoints -> how well each does -> table, results.json, report.html.
    eval_tasks, rows = _evaluate(calibrated, checkpoints)
    # Experts -> how often the dense model would say what they say, which is what the service holds them to.
    measure_agreements(config, run, checkpoint, checkpoints, eval_tasks, progress)
    _report(calibrated, eval_tasks, rows, router)


# --- before the steps ------------------------------------------------------------------------------------------------


def on_cluster(config: Config, work: Work, *, check_evaluation_rows: bool) -> None:
    """Do ``work`` on the cluster at hand, after everything that can be refused was.

    Args:
        config: The run's configuration.
        work: What is done while no other job works on the run. It gets the config with its placement chosen.
        check_evaluation_rows: Whether a missing evaluation file is refused, or left to ``work``.

    Raises:
        ConfigError: A key, the model or the cluster is wrong, or another job works on the run.
        DataError: A corpus is wrong.
        IncompleteError: The job was cut short; the same command goes on.
    """
    started = time.monotonic()
    transformers_logging.disable_progress_bar()

    # What a look at the config and its files can refuse needs no cluster, which takes seconds to start.
    config = with_recognised_tasks(config)
    checkpoint = check_config(config, check_evaluation_rows=check_evaluation_rows)
    say_bias(config, checkpoint.architecture)
    if note := gguf_note(config, checkpoint.architecture):
        say(note)
    config = with_quantization(with_bias(config, checkpoint.architecture), checkpoint.architecture)
    if note := quantization_note(config, checkpoint.architecture):
        say(note)
    # From here on a target is the ratio that stands for it, which names the run's folders.
    config = with_target_ratio(config, checkpoint)
    run = Run.of(config)
    config = with_absolute_source(config)

    # One job at a time writes to a run, and its config stays with it for life.
    with run.locked():
        run.claim(config)
        command = fingerprint(config.model_dump(mode="json"), work.__module__, checkpoint.fingerprint, versions())
        # A cluster takes seconds to start, and one that is there already costs none.
        is_likely_finished = would_start_cluster() and JsonFile().is_whole(run.finished, command)
        if not (is_likely_finished and _is_finished(config, checkpoint, run, work)):
            connect_driver()
            with unwrap_ray_errors():
                n_workers(config, 1)  # refuses a cluster that holds none
                raise_on_error(cluster_checks(config, checkpoint, run))
                work(with_placement(config, checkpoint), checkpoint, run)
            write_json(run.finished, {"fingerprint": command})
    say(f"{run.root} is complete, {time.monotonic() - started:.0f} s")


def _is_finished(config: Config, checkpoint: Checkpoint, run: Run, work: Work) -> bool:
    """Go through the work without a cluster; return False as soon as it needs one. What is said is kept back till then.

    All files are looked at as always, so what was removed or damaged since is found, and made again on a cluster.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            work(config, checkpoint, run)
    except ClusterNeeded:
        # It will be said again, from the beginning.
        said = io.StringIO()
        return False
    finally:
        print(said.getvalue(), end="", flush=True)
    return True


# --- calibration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibratedRun:
    """A run whose statistics are there: what plans are made from, and what they were made of."""

    config: Config
    checkpoint: Checkpoint
    run: Run
    manifests: list[Manifest]
    """The shards of every task."""
    planner: Planner


def calibrate_run(config: Config, checkpoint: Checkpoint, run: Run) -> CalibratedRun:
    """Bring shards and statistics up to date; what is whole stays."""
    source = f"{config.model.source} ({checkpoint.parameters:,} parameters)"
    say(f"{source}: {len(config.tasks)} tasks to {run.root}")

    manifests = make_shards(config, checkpoint, run, say)
    for manifest in manifests:
        cut = f", {manifest.n_cut} texts cut at the longest sequence" if manifest.n_cut else ""
        form = " in the chat template" if manifest.chat else ""
        counted = f", {manifest.n_counted:,} of them count" if manifest.n_counted < manifest.n_tokens else ""
        written = f", {manifest.n_synthetic:,} of them in texts of the model's own" if manifest.n_synthetic else ""
        n_shards = len(manifest.shards)
        say(f"  {manifest.task}: {manifest.n_tokens:,} tokens{form} in {n_shards} shards{written}{counted}{cut}")
        for line in rows_lines(manifest.task, manifest.n_rows, manifest.counts):
            say(f"  {line}")
        if warning := few_tokens_warning(config, checkpoint, manifest):
            say(f"warning: {warning}")

    statistics = calibrate(config, checkpoint, run, manifests, progress)
    records = ShardRecords.of(config, checkpoint, run)
    _make_held_out_records(config, records, manifests)
    held_out = {manifest.task: held_out_shard(records, manifest.shards) for manifest in manifests}
    planner = make_planner(config, checkpoint, run, statistics, held_out)
    return CalibratedRun(config, checkpoint, run, manifests, planner)


def _make_held_out_records(config: Config, records: ShardRecords, manifests: Sequence[Manifest]) -> None:
    """Make the records of held-out shards again where somebody removed them and plans will be judged without them."""
    is_judged = any(passes_of_choice(config, spec) for spec in model_specs(config))
    if is_judged and records.calibration.covariance:
        held_out = [manifest.shards[-1] for manifest in manifests if len(manifest.shards) > 1]
        make_records(config, records, records.absent(held_out), progress, n_merged=0)


def few_tokens_warning(config: Config, checkpoint: Checkpoint, manifest: Manifest) -> str | None:
    """Return a warning where a task's covariances have too few tokens for what is fitted to them, None elsewhere."""
    if config.calibration.statistics != "covariance":
        return None

    architecture = checkpoint.architecture
    columns = max(architecture.widths)
    # In a mixture the router spreads the tokens over its MoE experts.
    spread = architecture.experts_per_token / architecture.n_experts if architecture.n_experts else 1
    if manifest.n_counted * spread >= MIN_TOKENS_PER_COLUMN * columns:
        return None

    other_remedy = "corpus.count=all, or " if config.corpus.count == "assistant" else ""
    return (
        f"tasks.{manifest.task}: {manifest.n_counted:,} tokens count, few for a fit over {columns:,} columns; raise "
        f"corpus.samples, or set {other_remedy}calibration.statistics=moments pruning.score=wifv "
        "pruning.compensation=mean"
    )


# --- after the checkpoints -------------------------------------------------------------------------------------------


def route(calibrated: CalibratedRun) -> dict[str, Any] | None:
    """Fit the router and return its report; None for a model whose tokenizer it cannot have.

    Only serving will miss it.
    """
    run = calibrated.run
    prompts = {manifest.task: manifest.read_prompts(run) for manifest in calibrated.manifests}

    # The endpoint does not know a prompt's task, so one frame is for all.
    is_chat = any(manifest.chat for manifest in calibrated.manifests)
    seed = calibrated.config.run.seed
    trust = calibrated.config.model.trust_remote_code
    try:
        report = fit(calibrated.checkpoint, prompts, run, seed=seed, is_chat=is_chat, trust_remote_code=trust)
    except ConfigError as error:
        say(f"router: none; {error}")
        return None

    # A corpus may be too small to hold prompts out.
    if report["n"]:
        say(
            f"router: {report['accuracy']:.1%} of {report['n']} held-out prompts go to their task; "
            f"{1 - report['routed']:.0%} are left to the general model (threshold {report['threshold']:.2f})"
        )
    return report


def _evaluate(
    calibrated: CalibratedRun, checkpoints: Sequence[PendingCheckpoint]
) -> tuple[dict[str, EvalTask], list[ModelRow]]:
    """Judge the dense model and every pruned one; return the tasks as they were judged, and a row for each model."""
    config = calibrated.config
    run = calibrated.run
    rows = [dense_row(calibrated.checkpoint), *map(pruned_row, checkpoints)]
    if config.evaluation.samples == 0:
        return {}, rows

    # The main job does without the extra packages of lm-eval, which judges in studies only.
    eval_tasks = {task.name: eval_task(config, run, task, by_lm_eval=False) for task in config.tasks}
    for name, judged_task in eval_tasks.items():
        for line in rows_lines(name, judged_task.n_rows, judged_task.counts, purpose="evaluation"):
            say(f"  {line}")

    targets = [eval_target(calibrated.checkpoint, eval_tasks)]
    targets += [eval_target(checkpoint, eval_tasks) for checkpoint in checkpoints]

    results = evaluate(config, run, targets, eval_tasks, progress)
    # The dense model comes first among the rows and among the targets, then the checkpoints in their order.
    dense = results[0]
    judged = [replace(row, quality=quality_cells(by_task, dense)) for row, by_task in zip(rows, results, strict=True)]
    return eval_tasks, judged


def _report(
    calibrated: CalibratedRun,
    eval_tasks: dict[str, EvalTask],
    rows: Sequence[ModelRow],
    router: dict[str, Any] | None,
) -> None:
    """Print the table, write results and report. Raises SeapError when a model could not be judged."""
    run = calibrated.run
    results = make_results(calibrated.config, calibrated.checkpoint, eval_tasks, rows, router)
    write_json(run.results, results.to_json())

    say("")
    say(table(results))
    say("")
    # The report reads the results file, so it comes after that.
    say(f"report: {write_report(run)}")

    # At the very end: what could be judged is in the report all the same.
    failures = [(f"{row.name} on {task}", cell) for row in rows for task, cell in row.failed_cells.items()]
    if failures:
        # What the same command cannot mend comes first.
        place, cell = min(failures, key=lambda failure: failure[1].exit_code == IncompleteError.exit_code)
        raise error_by_code([cell.exit_code], f"{place}: {cell.error}")
