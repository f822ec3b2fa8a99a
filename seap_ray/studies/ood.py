"""Study ``ood``: how good are models on a task that their calibration did not see?"""

from collections.abc import Mapping, Sequence
from itertools import product

from seap_ray.config import GENERAL, Config
from seap_ray.errors import ConfigError
from seap_ray.report.rows import Cell
from seap_ray.report.study_rows import Estimate, OutOfDistributionRow
from seap_ray.studies.requests import at_every_ratio, method_specs, run_specs
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import ModelRequest, StudyRunner

QualityByModel = Mapping[tuple[str, float | None], Mapping[str, Cell]]
"""By name and ratio of a model, its quality on each task."""


def check(config: Config) -> None:
    """Raise ConfigError where no task can be left out."""
    if len(config.tasks) < 2:
        raise ConfigError("tasks: study=ood leaves out one task at a time, so it needs two or more")


def run(runner: StudyRunner) -> StudyResult:
    """Leave each task out of the general model's calibration in turn, and judge that model on it."""
    config = runner.config
    tasks = runner.task_names
    models = runner.evaluate_models(
        [ModelRequest(), *at_every_ratio(config, run_specs(config)), *_left_out(config, tasks)]
    )

    quality = {(model.row.name, model.row.ratio): model.row.quality for model in models}
    rows = [_row(quality, tasks, task, ratio) for ratio, task in product(config.pruning.ratio, tasks)]
    return StudyResult(models, OutOfDistributionRow.columns(), rows)


def _row(quality: QualityByModel, tasks: Sequence[str], task: str, ratio: float) -> OutOfDistributionRow:
    # The experts of the other tasks have not seen this one either.
    others = [quality[other, ratio][task] for other in tasks if other != task]

    # In the order of the table's columns.
    compared = (
        Estimate.mean([quality["dense", None][task]]),
        Estimate.mean([quality[task, ratio][task]]),
        Estimate.mean([quality[GENERAL, ratio][task]]),
        Estimate.mean([quality[_without(task), ratio][task]]),
        Estimate.mean(others),
    )

    values = []
    for model in compared:
        values += [model.value, model.stderr]
    return OutOfDistributionRow(ratio, task, *values)


def _left_out(config: Config, tasks: tuple[str, ...]) -> list[ModelRequest]:
    """Request, for each task, a general model that is calibrated on the others and judged on that task."""
    general = config.pruning.general
    # The settings of the general model, so that only its data differ.
    settings = config.plan_settings(general).model_dump()

    specs_by_task = {}
    for task in tasks:
        others = tuple(other for other in tasks if other != task)
        specs_by_task[task] = method_specs(config, _without(task), **settings, tasks=others, pooling=general.pooling)

    requests = []
    for ratio, task in product(config.pruning.ratio, tasks):
        requests += [ModelRequest(spec, ratio, (task,)) for spec in specs_by_task[task]]
    return requests


def _without(task: str) -> str:
    """Return the name of the general model that is calibrated on all other tasks."""
    return f"without_{task}"
