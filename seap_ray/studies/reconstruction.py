"""Study ``reconstruction``: which compensation is best for what is removed? Every seed draws all data anew."""

from collections.abc import Iterable, Mapping
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.job import calibrate_run
from seap_ray.report.rows import Cell
from seap_ray.report.study_rows import Estimate, ReconstructionRow
from seap_ray.storage.run import Run
from seap_ray.studies.requests import ALLOCATIONS, SEEDS, run_specs, variant
from seap_ray.studies.result import SeedMean, StudyResult
from seap_ray.studies.runner import EvaluatedModel, ModelRequest, StudyRunner

MODEL_GROUPS = ("experts", "general")
"""Models that are compared apart from each other."""
SCORES = ("wifv", "energy", "obs")
"""Scores by which the units that stay are chosen."""
WAYS: Mapping[str, Mapping[str, Any]] = {
    "none": {"compensation": "none"},
    "mean": {"compensation": "mean", "bias": True},
    "least_squares": {"compensation": "least_squares", "bias": True},
    "least_squares_without_bias": {"compensation": "least_squares", "bias": False},
}
"""Settings of every way of compensation, by its name in plans."""


class RowKey(NamedTuple):
    """What one row is about; the dense model has ratio 0, no compensation and no score."""

    ratio: float
    models: str
    compensation: str = ""
    score: str = ""


def check(config: Config) -> None:
    """Raise ConfigError where the scores that are compared would not count."""
    allocations = {spec.settings.allocation for spec in run_specs(config)}
    for allocation in allocations & {"standardised", "depth"}:
        raise ConfigError(
            "pruning.allocation.kind: study=reconstruction compares scores of whole heads and channels, and "
            f"{allocation} does not rank by them; choose {', '.join(ALLOCATIONS)}"
        )


def run(runner: StudyRunner) -> StudyResult:
    """Compare the compensations, each with several scores, as a mean over seeds."""
    models: dict[tuple[RowKey, int], list[EvaluatedModel]] = {}
    for seed in SEEDS:
        # The first seed is the run's own.
        seeded = runner if seed == 0 else _with_seed(runner, seed)

        # All requests of a seed are judged together; each key gets back the model that was requested for it.
        keys, requests = zip(*_requests(seeded.config, seed), strict=True)
        for key, model in zip(keys, seeded.evaluate_models(requests), strict=True):
            models.setdefault((key, seed), []).append(model)

    rows = []
    # A dict keeps the order of first appearance.
    for key in dict.fromkeys(key for key, _ in models):
        if row := _row(key, [models[key, seed] for seed in SEEDS]):
            rows.append(row)

    every_model = [model for group in models.values() for model in group]
    return StudyResult(every_model, ReconstructionRow.columns(runner.mean_head), rows)


def _requests(config: Config, seed: int) -> list[tuple[RowKey, ModelRequest]]:
    """Request the dense model, and the experts and the general model by every compensation and score."""
    # The dense model stands beside both groups.
    requests = [(RowKey(0.0, models), ModelRequest()) for models in MODEL_GROUPS]
    settings = product(config.pruning.ratio, WAYS, SCORES)

    for (ratio, compensation, score), spec in product(settings, run_specs(config)):
        changed = variant(spec, f"{compensation}.{score}.{seed}", score=score, **WAYS[compensation])
        models = MODEL_GROUPS[0] if spec.task else MODEL_GROUPS[1]

        # An expert is judged on its own task only.
        request = ModelRequest(changed, ratio, (spec.task,) if spec.task else None)
        requests.append((RowKey(ratio, models, compensation, score), request))
    return requests


def _with_seed(runner: StudyRunner, seed: int) -> StudyRunner:
    """Return the same run with another seed, in a folder of its own: other rows to calibrate on and to judge by."""
    settings = runner.config.run
    seeded = settings.model_copy(update={"name": f"{settings.name}-seed{seed}", "seed": settings.seed + seed})
    config = runner.config.model_copy(update={"run": seeded})

    run = Run.of(config)
    run.claim(config)
    calibrated = calibrate_run(config, runner.calibrated.checkpoint, run)

    return StudyRunner(calibrated, lm_eval=runner.lm_eval)


def _row(key: RowKey, by_seed: Iterable[list[EvaluatedModel]]) -> ReconstructionRow | None:
    """Return the mean over seeds, or None where no seed could be measured."""
    qualities: list[Estimate] = []
    realised: list[float] = []
    for models in by_seed:
        qualities.append(_quality(models))
        realised += [model.row.realised_ratio or 0.0 for model in models]

    overall = SeedMean.of(qualities)
    if overall is None:
        return None

    return ReconstructionRow(*key, mean(realised), overall.mean, overall.sd, overall.stderr)


def _quality(models: Iterable[EvaluatedModel]) -> Estimate:
    """Return the mean over all tasks that any of the models was judged on."""
    cells: list[Cell] = []
    for model in models:
        cells += model.row.quality.values()
    return Estimate.mean(cells)
