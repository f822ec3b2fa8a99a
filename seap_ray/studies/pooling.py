"""Study ``pooling``: does an expert gain by its task's data, or only by more data?"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from statistics import mean
from typing import get_args

from seap_ray.config import Config, Pooling
from seap_ray.pipeline.model_specs import ModelSpec, model_specs
from seap_ray.pipeline.shards import Shard
from seap_ray.report.study_rows import ModelComparisonRow, PoolingRow
from seap_ray.studies.requests import SEEDS, at_every_ratio, on_own_task
from seap_ray.studies.result import StudyResult, comparison_rows
from seap_ray.studies.runner import StudyRunner


def run(runner: StudyRunner) -> StudyResult:
    """Compare the experts with general models from as many tokens as an expert has on average, and from all tokens."""
    config = runner.config
    tasks = runner.task_names
    shards = {task: runner.manifest(task).shards for task in tasks}
    # As many tokens as an expert has on average, in all tasks together.
    shares = {f"{task}.{seed}": _share(shards[task], 1 / len(tasks), seed) for task, seed in product(tasks, SEEDS)}

    wanted = [spec for spec in model_specs(config) if spec.kind == "expert"]
    for like in ("general", "experts"):
        wanted += _general_models(config, like)

    planner = runner.planner_with_parts(shares)
    models = runner.evaluate_models(on_own_task(at_every_ratio(config, wanted)), planner)

    tokens = _tokens_by_model(wanted, {**shares, **shards})
    expert_tokens = round(mean(tokens[task] for task in tasks))
    rows = []
    for row in comparison_rows(models, tasks):
        # The experts have one row together, each on its own task, with the mean of their tokens.
        if row.model not in tasks:
            rows.append(_pooling_row(row, tokens.get(row.model, expert_tokens)))

    return StudyResult(models, PoolingRow.columns(runner.mean_head, tasks), rows)


def _tokens_by_model(wanted: Iterable[ModelSpec], shards: Mapping[str, Sequence[Shard]]) -> dict[str, int]:
    """Return the number of tokens that each model is calibrated on; ``shards`` has those of all statistics."""
    # The weights name statistics: a task's, or those of a share of its shards.
    tokens = {}
    for spec in wanted:
        tokens[spec.name] = sum(_n_tokens(shards[name]) for name in spec.weights)
    return tokens


def _pooling_row(row: ModelComparisonRow, tokens: int) -> PoolingRow:
    # The row of this study has the columns of the other, and one more.
    columns = {column.name: getattr(row, column.name) for column in fields(row)}
    return PoolingRow(tokens=tokens, **columns)


def _general_models(config: Config, like: str) -> list[ModelSpec]:
    """Return general models with the settings of the ``general`` one or of the ``experts``, by pooling and tokens."""
    settings = config.plan_settings(config.pruning.general if like == "general" else config.pruning.experts)
    weights = {task.name: task.weight for task in config.tasks}

    wanted = []
    for pooling in get_args(Pooling):
        method = f"general_like_{like}.{pooling}"
        wanted.append(ModelSpec(f"{method}.all_tokens", "baseline", method, weights, settings, pooling))
        # A draw's result depends on chance, so there are several; all tokens are there only once.
        for seed in SEEDS:
            parts = {f"{task}.{seed}": weight for task, weight in weights.items()}
            wanted.append(ModelSpec(f"{method}.experts_tokens.{seed}", "baseline", method, parts, settings, pooling))
    return wanted


def _share(shards: Sequence[Shard], share: float, seed: int) -> list[Shard]:
    """Return shards, drawn by ``seed``, whose tokens come nearest to that share of all tokens; at least one."""
    order = random.Random(seed).sample(list(shards), len(shards))
    wanted = share * _n_tokens(shards)

    # Of two numbers of shards that are equally near, the smaller one is taken.
    n_shards = min(range(1, len(order) + 1), key=lambda n: abs(_n_tokens(order[:n]) - wanted))
    return order[:n_shards]


def _n_tokens(shards: Sequence[Shard]) -> int:
    return sum(shard.n_tokens for shard in shards)
