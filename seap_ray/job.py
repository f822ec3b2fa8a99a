"""Job: the whole path, from a config to a table, on the Ray cluster at hand."""

import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from transformers.utils import logging as transformers_logging

from seap_ray.calibrate import calibrate, n_workers
from seap_ray.checkpoint import Checkpoint, versions
from seap_ray.cluster import connect
from seap_ray.config import Config
from seap_ray.corpus import check_source, load_tokenizer
from seap_ray.errors import ConfigError, IncompleteError, SeapError
from seap_ray.fitting import fit
from seap_ray.plan import choose_shapes
from seap_ray.progress import progress, say
from seap_ray.prune import Expert, make_planner, prune, specs
from seap_ray.quality import SHORT, Quality, check_evaluation, measure_all
from seap_ray.run import Run, write_json
from seap_ray.shards import Manifest, make_shards
from seap_ray.table import own_tasks, table


def run_job(config: Config) -> None:
    """Corpora, calibration, plans, checkpoints, evaluation, table. Raises SeapError for what a user can mend."""
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    checkpoint = _checked(config)
    run = Run.of(config)
    config = _absolute(config)
    run.claim(config)
    _connect()
    try:
        n_workers(config, 1)
        _run(config, checkpoint, run)
    except Exception as error:  # Ray's own kind of a SeapError has a traceback for its text
        known = _known(error)
        if known is None:
            raise
        raise known from None
    say(f"{run.root} is complete, {time.monotonic() - started:.0f} s")


def _absolute(config: Config) -> Config:
    """A local model by its whole path: workers may have another current folder."""
    folder = Path(config.model.source).expanduser().absolute()
    if config.model.source == "demo" or not folder.is_dir():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"source": str(folder)})})


def _checked(config: Config) -> Checkpoint:
    """Everything that can be refused before any work starts, is."""
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    load_tokenizer(checkpoint, trust_remote_code=config.model.trust_remote_code)
    for task in config.tasks:
        check_source(task, official=config.corpus.prompt_format == "official")
        if config.evaluation.samples:
            check_evaluation(task)
    _check_ratios(config, checkpoint)
    return checkpoint


def _check_ratios(config: Config, checkpoint: Checkpoint) -> None:
    """Widths do not depend on statistics but under ``global``, so a ratio beyond reach is known at once."""
    for spec in specs(config):
        if spec.settings.allocation == "global":
            continue
        for ratio in config.pruning.ratio:
            choose_shapes(
                checkpoint.architecture,
                config.pruning,
                ratio=ratio,
                kind=spec.settings.allocation or "",
                compensated=spec.settings.compensation != "none",
                scores_L=(),
                stock=config.export.format == "stock",
            )


def _connect() -> None:
    # The first error ends the job with one line; those of tasks beside it would add a traceback each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    connect()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _known(error: BaseException | None) -> SeapError | None:
    """What a Ray task, actor or Ray Data function met, out of Ray's wrappers, if a user can mend it."""
    while error is not None:
        if isinstance(cause := getattr(error, "cause", None), SeapError):
            return cause
        if isinstance(error, SeapError):
            return error
        if isinstance(error, ray.exceptions.OutOfDiskError):
            return IncompleteError("the disk of a node is full; make room and run the same command again")
        error = cause or error.__cause__
    return None


def _run(config: Config, checkpoint: Checkpoint, run: Run) -> None:
    source = f"{config.model.source} ({checkpoint.parameters:,} parameters)"
    say(f"{source}: {len(config.tasks)} tasks to {run.root}")
    manifests = make_shards(config, checkpoint, run, say)
    for manifest in manifests:
        left_out = f", {manifest.n_blank} of {manifest.n_rows} rows blank" if manifest.n_blank else ""
        cut = f", {manifest.n_cut} texts cut at the longest sequence" if manifest.n_cut else ""
        say(f"  {manifest.task}: {manifest.n_tokens:,} tokens in {len(manifest.shards)} shards{left_out}{cut}")
    statistics = calibrate(config, checkpoint, run, manifests, partial(progress, unit=" tokens"))
    planner = make_planner(config, checkpoint, run, statistics)
    experts = prune(planner, run, partial(progress, unit="B"))
    _report(config, checkpoint, run, experts, router=_route(config, checkpoint, run, manifests))


def _route(config: Config, checkpoint: Checkpoint, run: Run, manifests: list[Manifest]) -> dict[str, Any] | None:
    """Fit the router; None, which only serving will miss, for a model whose tokenizer it cannot have."""
    prompts = {manifest.task: manifest.read_prompts(run) for manifest in manifests}
    trust = config.model.trust_remote_code
    try:
        report = fit(checkpoint, prompts, run, seed=config.run.seed, trust_remote_code=trust)
    except ConfigError as error:
        say(f"router: none; {error}")
        return None
    if report["n"]:
        say(
            f"router: {report['accuracy']:.3f} of {report['n']} held-out prompts to their task; threshold "
            f"{report['threshold']:.2f} leaves {1 - report['routed']:.0%} to the general model"
        )
    return report


def _report(
    config: Config, checkpoint: Checkpoint, run: Run, experts: list[Expert], router: dict[str, Any] | None
) -> None:
    """Evaluate, print the table, write ``results.json``."""
    models = [_dense(checkpoint), *(_described(expert) for expert in experts)]
    if config.evaluation.samples:
        folders = [checkpoint.folder, *(expert.folder for expert in experts)]
        qualities = measure_all(config, checkpoint, run, folders, partial(progress, unit=" models"))
        for model, quality in zip(models, qualities, strict=True):
            model["quality"] = {task: _values(q) for task, q in quality.items()}
    tasks = {task.name: {"metric": task.metric, "short": SHORT[task.metric]} for task in config.tasks}
    summaries = [own_tasks(models, tasks, ratio) for ratio in config.pruning.ratio]
    models += [summary for summary in summaries if summary]
    results = {"tasks": tasks, "models": models, "router": router, "versions": versions()}
    write_json(run.results, results)
    say("")
    say(table(results))
    say("")


def _dense(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": "dense",
        "kind": "dense",
        "ratio": None,
        "realised_ratio": 0.0,
        "parameters": checkpoint.parameters,
        "folder": str(checkpoint.folder),
        "quality": {},
    }


def _described(expert: Expert) -> dict[str, Any]:
    manifest = expert.manifest
    keys = ("requested_ratio", "planned_ratio", "realised_ratio", "parameters", "bytes", "kv_bytes_per_token")
    return {
        "name": expert.name,
        "kind": expert.kind,
        "ratio": expert.ratio,
        **{key: manifest[key] for key in keys},
        "folder": str(Path(expert.folder)),
        "quality": {},
    }


def _values(quality: Quality) -> dict[str, Any]:
    return {"metric": quality.metric, "value": quality.value, "stderr": quality.stderr, "n": quality.n}
