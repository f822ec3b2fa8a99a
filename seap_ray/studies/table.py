"""Study ``table``: which method keeps the most quality at equal size?"""

from itertools import product
from typing import get_args

from seap_ray.config import Budget, Config
from seap_ray.core.reconstruction import UNIT_SCORES
from seap_ray.pipeline.model_specs import ModelSpec, model_specs
from seap_ray.studies.requests import ALLOCATIONS, SEEDS, at_every_ratio, method_specs
from seap_ray.studies.result import StudyResult, compare_models
from seap_ray.studies.runner import ModelRequest, StudyRunner

SCORED_METHODS = (
    # name, score, compensation
    ("wanda_sp", "wanda_sp", "none"),
    ("flap", "wifv", "mean"),
    ("flap_without_bias", "wifv", "none"),
    ("magnitude", "magnitude", "none"),
    ("random", "random", "none"),
)
"""Methods of others that are compared under every allocation."""


def run(runner: StudyRunner) -> StudyResult:
    """Compare the run's models, every built-in method, and the checkpoints of ``evaluation.models``."""
    run_models = model_specs(runner.config)
    # A baseline of the run may be one of the built-in methods; it is there once.
    names = {spec.name for spec in run_models}
    others = [spec for spec in _all_methods(runner.config) if spec.name not in names]

    requests = at_every_ratio(runner.config, [*run_models, *others])
    models = runner.evaluate_models([ModelRequest(), *requests])
    return compare_models(runner, runner.with_speed([*models, *runner.evaluate_checkpoints()]))


def _all_methods(config: Config) -> list[ModelSpec]:
    """Return every built-in method with every allocation."""
    return [
        *_methods_of_others(config),
        *_methods_on_plain_text(config),
        *_seap(config),
        *_least_squares(config),
        *method_specs(config, "depth", method="depth"),
    ]


def _methods_of_others(config: Config) -> list[ModelSpec]:
    wanted: list[ModelSpec] = []
    for (name, score, compensation), allocation in product(SCORED_METHODS, ALLOCATIONS):
        settings = {"score": score, "allocation": allocation, "compensation": compensation}
        wanted += method_specs(config, f"{name}.{allocation}", **settings)

    # The first seed is the run's own, which is above already.
    for seed in SEEDS[1:]:
        name = f"random.uniform.{seed}"
        wanted += method_specs(config, name, method="random", seed=config.run.seed + seed)

    # FLAP's own allocation ranks no whole heads and channels, so it is not one of the three.
    return wanted + method_specs(config, "flap.standardised", method="flap")


def _methods_on_plain_text(config: Config) -> list[ModelSpec]:
    """Return the methods whose authors calibrate on a corpus of plain text alone, once for every such corpus."""
    wanted: list[ModelSpec] = []
    # The paper weighs a language-model corpus 3, a task 2.
    for corpus in [task.name for task in config.tasks if task.weight > 2]:
        wanted += method_specs(config, f"wanda_sp.on_{corpus}", method="wanda_sp", tasks=(corpus,))
        wanted += method_specs(config, f"flap.on_{corpus}", method="flap", tasks=(corpus,))
    return wanted


def _seap(config: Config) -> list[ModelSpec]:
    """Return SEAP with every budget, score and allocation: experts, and a general model of their scores."""
    wanted: list[ModelSpec] = []
    for budget, score, allocation in product(get_args(Budget), ("wifv", "wifn", "official_wifn"), ALLOCATIONS):
        # Its authors' schedule is one of shares by layer, and their code has no L1 norm.
        if budget == "official" and (allocation == "global" or score == "wifn"):
            continue

        name = f"seap_{budget}.{score}.{allocation}"
        settings = {"score": score, "budget": budget, "compensation": "none", "allocation": allocation}
        wanted += method_specs(config, name, **settings, per_task=True)
        wanted += method_specs(config, f"{name}.gen", **settings, pooling="score_average")
    return wanted


def _least_squares(config: Config) -> list[ModelSpec]:
    """Return least squares by every score and allocation, where the run has covariances."""
    wanted: list[ModelSpec] = []
    if config.calibration.statistics != "covariance":
        return wanted

    for score, allocation in product(("wifv", *UNIT_SCORES), ALLOCATIONS):
        name = f"least_squares.{score}.{allocation}"
        settings = {"score": score, "compensation": "least_squares", "allocation": allocation}
        wanted += method_specs(config, name, **settings, per_task=True)
        wanted += method_specs(config, f"{name}.gen", **settings)
    return wanted
