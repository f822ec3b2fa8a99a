"""Study ``corpus``: how many samples does a calibration need?

Samples are nested within a seed and disjoint between seeds: size n is the first n samples of the seed's own share of
the shards.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.shards import Shard
from seap_ray.report.study_rows import CorpusRow, Estimate
from seap_ray.studies.requests import SEEDS, on_own_task
from seap_ray.studies.result import SeedMean, StudyResult
from seap_ray.studies.runner import EvaluatedModel, ModelRequest, StudyRunner

SAMPLES = (50, 100, 200, 500, 1000)
"""Samples per task that are compared."""
SIZE_TOLERANCE = 0.05
"""How far a draw may be off its number of samples, relative to it: a task with fewer rows than ``corpus.samples`` is
split into shards of slightly fewer than ``corpus.shard_sequences``."""


class Draw(NamedTuple):
    """A number of one task's samples, drawn by a seed."""

    task: str
    size: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the statistics of these samples."""
        return f"{self.task}.{self.size}.{self.seed}"


def check(config: Config) -> None:
    """Raise ConfigError where samples cannot be counted."""
    if config.corpus.synthesis.samples:
        raise ConfigError("corpus.synthesis.samples: study=corpus counts rows alone; leave it at 0")
    if config.corpus.packing == "pack":
        raise ConfigError("corpus.packing: study=corpus counts samples, and packing joins them; leave it at bucket")


def run(runner: StudyRunner) -> StudyResult:
    """Compare experts that are calibrated on a growing number of samples, each number drawn by several seeds."""
    config = runner.config

    # Each draw is the statistics of an expert.
    parts = _parts(runner)
    planner = runner.planner_with_parts({draw.name: shards for draw, shards in parts.items()})

    keys = list(product(config.pruning.ratio, parts))
    requests = [ModelRequest(_expert(config, draw), ratio) for ratio, draw in keys]
    models = runner.evaluate_models(on_own_task(requests), planner)

    # There is a model for each request, in the same order, even where it could not be made.
    by_key = dict(zip(keys, models, strict=True))
    return StudyResult(models, CorpusRow.columns(runner.mean_head), _rows(by_key))


def _parts(runner: StudyRunner) -> dict[Draw, Sequence[Shard]]:
    """Return the shards of every draw, for those sizes of a task that every seed has.

    Raises ConfigError where there are none.
    """
    parts: dict[Draw, Sequence[Shard]] = {}
    for task, size in product(runner.task_names, SAMPLES):
        by_seed: dict[Draw, Sequence[Shard]] = {}
        for seed in SEEDS:
            if shards := _first_samples(runner.manifest(task).shards, size, seed):
                by_seed[Draw(task, size, seed)] = shards

        # A spread over some of the seeds would not compare with one over all.
        if len(by_seed) == len(SEEDS):
            parts |= by_seed

    if not parts:
        corpus = runner.config.corpus
        raise ConfigError(
            f"corpus.samples: {corpus.samples} in shards of {corpus.shard_sequences} are too few for {len(SEEDS)} "
            f"seeds with {SAMPLES[0]} samples each"
        )
    return parts


def _first_samples(shards: Sequence[Shard], size: int, seed: int) -> Sequence[Shard] | None:
    """Return the shards with the first ``size`` samples of a seed's share, or None where no shards make up so many.

    Every seed has as many shards. Those of a task differ by one row at most, so draws differ by one row a shard.
    """
    # Shards hold rows in an order that is random already, so a run of shards is a random draw.
    n_shards = len(shards) // len(SEEDS)
    share = shards[n_shards * seed : n_shards * (seed + 1)]

    # A shard is not split: a record is of a whole one.
    n_drawn = round(size * len(shards) / _n_samples(shards))
    drawn = share[:n_drawn]
    is_full = len(drawn) == n_drawn and abs(_n_samples(drawn) - size) <= SIZE_TOLERANCE * size
    return drawn if is_full else None


def _n_samples(shards: Sequence[Shard]) -> int:
    return sum(shard.n_sequences for shard in shards)


def _expert(config: Config, draw: Draw) -> ModelSpec:
    settings = config.plan_settings(config.pruning.experts)
    # The experts of all tasks with one size and seed are one method.
    method = f"{draw.size}.{draw.seed}"

    return ModelSpec(draw.name, "baseline", method, {draw.name: 1.0}, settings, task=draw.task)


def _rows(models: Mapping[tuple[float, Draw], EvaluatedModel]) -> list[CorpusRow]:
    """Return a row for every ratio and size: the mean over those tasks that have the largest size."""
    sizes = sorted({draw.size for _, draw in models})
    # Dicts keep the order of first appearance.
    ratios = dict.fromkeys(ratio for ratio, _ in models)
    names = dict.fromkeys(draw.task for _, draw in models)

    rows = []
    for ratio in ratios:
        # Means over other tasks would not compare.
        tasks = [task for task in names if (ratio, Draw(task, sizes[-1], 0)) in models]
        for size in sizes:
            by_seed = [_quality(models, ratio, tasks, size, seed) for seed in SEEDS]
            # Where no seed could be measured, there is no row.
            if overall := SeedMean.of(by_seed):
                rows.append(CorpusRow(ratio, size, len(tasks), overall.mean, overall.sd, overall.stderr))
    return rows


def _quality(
    models: Mapping[tuple[float, Draw], EvaluatedModel], ratio: float, tasks: Sequence[str], size: int, seed: int
) -> Estimate:
    """Return the mean over ``tasks`` of each expert on its own task."""
    cells = []
    for task in tasks:
        expert = models[ratio, Draw(task, size, seed)]
        cells.append(expert.row.quality[task])
    return Estimate.mean(cells)
