"""Run of a study: a config in; models, a table, files and the report out. ``methods.STUDIES`` says what there is."""

import csv
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from seap_ray.config import Config
from seap_ray.errors import ConfigError, DataError, IncompleteError, error_by_code
from seap_ray.judges import lm_eval
from seap_ray.methods import STUDIES, StudyName
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.job import calibrate_run, on_cluster, route
from seap_ray.pipeline.results import make_results
from seap_ray.progress import say
from seap_ray.report.page import write_report
from seap_ray.report.rows import Results, StudyTable
from seap_ray.report.study_rows import TaskQualityRow
from seap_ray.report.table import table as models_table
from seap_ray.report.table import text_table
from seap_ray.storage.files import atomic_write, write_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run
from seap_ray.studies import (
    allocation,
    corpus,
    ood,
    paper,
    pooling,
    ratio,
    reconstruction,
    routing,
    synthesis,
    table,
    transfer,
)
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import StudyRunner

RUNS: Mapping[StudyName, Callable[[StudyRunner], StudyResult]] = {
    "table": table.run,
    "ratio": ratio.run,
    "corpus": corpus.run,
    "allocation": allocation.run,
    "curve": allocation.run_curve,
    "reconstruction": reconstruction.run,
    "ood": ood.run,
    "transfer": transfer.run,
    "routing": routing.run,
    "pooling": pooling.run,
    "synthesis": synthesis.run,
    "paper": paper.run,
}
"""What each study does; its table and its models are the result."""
CHECKS: Mapping[StudyName, Callable[[Config], None]] = {
    "corpus": corpus.check,
    "ood": ood.check,
    "reconstruction": reconstruction.check,
    "synthesis": synthesis.check,
}
"""What a study needs of a config besides what all need; raises ConfigError before any work."""


ABOUT_WIDTHS = ("table", "allocation", "curve", "reconstruction", "paper")
"""Studies whose models lose channels in many ways, and have no meaning where whole MoE experts go."""


def run_study(config: Config) -> None:
    """Calibrate where that is not done, run ``config.study``, print its table; write JSON, CSV and the report.

    Raises ConfigError for what a study cannot do without, and SeapError, at the very end, when models could not be
    judged: an IncompleteError where the same command can mend that.
    """
    check(config)
    # A task that cannot be judged costs its own results only.
    on_cluster(config, _run, check_evaluation_rows=False)


def check(config: Config) -> None:
    """Raise ConfigError, before any work, for what would leave a study without an answer."""
    if config.evaluation.samples == 0:
        raise ConfigError("evaluation.samples: 0 leaves a study nothing to judge; null takes all rows")
    if config.pruning.mlp_unit == "expert" and config.study in ABOUT_WIDTHS:
        raise ConfigError(
            f"study={config.study} compares how channels are cut; set pruning.mlp_unit=channel, and a baseline "
            "{mlp_unit: expert} beside it"
        )
    if config.study in CHECKS:
        CHECKS[config.study](config)

    for task in config.tasks:
        if task.lm_eval and _uses_lm_eval(config):
            with suppress(DataError):  # rows that are missing cost their own results only
                lm_eval.check(task)


def _uses_lm_eval(config: Config) -> bool:
    """Return whether lm-eval judges its tasks: routing needs each prompt, which lm-eval does not show."""
    return config.study != "routing"


def _run(config: Config, checkpoint: Checkpoint, run: Run) -> None:
    study = STUDIES[config.study]
    runner = StudyRunner(calibrate_run(config, checkpoint, run), lm_eval=_uses_lm_eval(config))
    router = route(runner.calibrated)

    say(f"{study.title}: {study.question}")
    result = RUNS[config.study](runner)

    rows = [model.row for model in result.models]
    results = make_results(config, checkpoint, runner.eval_tasks, rows, router)
    study_table = StudyTable(config.study, study.title, study.question, result.columns, result.cells)
    _write_files(run, replace(results, table=study_table))
    if result.by_task:
        path = run.study(config.study).with_name(f"{config.study}_by_task.csv")
        _write_csv(path, [TaskQualityRow.columns(), *(row.to_json() for row in result.by_task)])

    # Where rows are models, a table made for these is easier to read than all columns.
    is_about_models = config.study in ("table", "ratio")
    say("")
    say(models_table(results) if is_about_models else text_table(result.columns, result.cells))
    say("")
    # The report reads the results file, so it comes after that.
    say(f"report: {write_report(run)}")

    # At the very end: what could be judged is in the files all the same.
    if result.failures:
        # The reason that is named is one that decides the exit code.
        first = min(result.failures, key=lambda reason: (result.failures[reason] == IncompleteError.exit_code, reason))
        raise error_by_code(
            result.failures.values(),
            f"some evaluations failed, for {len(result.failures)} reasons, first: {first}; fix that, and the study "
            "goes on",
        )


def _write_files(run: Run, results: Results) -> None:
    """Write the results of a study as JSON, and its table as CSV beside that."""
    table = results.table
    assert table is not None, "every study has a table"
    json_path = run.study(table.study)
    write_json(json_path, results.to_json())

    _write_csv(json_path.with_suffix(".csv"), [table.columns, *table.rows])


def _write_csv(path: StoragePath, lines: Iterable[Iterable[Any]]) -> None:
    # The csv module writes line ends of its own.
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
