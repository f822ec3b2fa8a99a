"""Study ``ratio``: how does quality fall with the pruning ratio?"""

from seap_ray.methods import METHODS
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.studies.requests import at_every_ratio, method_specs, on_own_task
from seap_ray.studies.result import StudyResult, compare_models
from seap_ray.studies.runner import ModelRequest, StudyRunner


def run(runner: StudyRunner) -> StudyResult:
    """Compare the run's models with the built-in methods at every ratio, experts on their own task only."""
    config = runner.config
    wanted = model_specs(config)
    # The simplest choice of all: equal shares of every layer, the least energy goes, nothing is compensated.
    wanted += method_specs(config, "uniform", allocation="uniform", score="energy", compensation="none")
    for name in METHODS:
        # SEAP's released code removes less than it says, so its models would not stand at their ratio.
        if name != "seap_official":
            wanted += method_specs(config, name, method=name)

    models = runner.evaluate_models([ModelRequest(), *on_own_task(at_every_ratio(config, wanted))])
    return compare_models(runner, runner.with_speed(models))
