"""Requests: which models a study asks for. Specs of the run's own models, of built-in methods, and variants of both."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from seap_ray.config import Baseline, Config
from seap_ray.methods import METHODS
from seap_ray.pipeline.model_specs import ModelSpec, baseline_specs, model_specs
from seap_ray.studies.runner import ModelRequest

SEEDS = range(3)
"""Seeds of what a study draws at random."""
ALLOCATIONS = ("uniform", "logistic", "global")
"""Allocations under which whole heads and channels are ranked by their scores."""


def at_every_ratio(config: Config, wanted: Iterable[ModelSpec]) -> list[ModelRequest]:
    """Request each spec at each of ``pruning.ratio``; a baseline for one task is judged on that task only."""
    wanted = list(wanted)  # it is gone through once for every ratio

    requests = []
    for ratio in config.pruning.ratio:
        for spec in wanted:
            # The run's experts are judged on all tasks: the tables show what they still do on the others.
            tasks = (spec.task,) if spec.task and spec.kind == "baseline" else None
            requests.append(ModelRequest(spec, ratio, tasks))
    return requests


def on_own_task(requests: Iterable[ModelRequest]) -> list[ModelRequest]:
    """Request the same models, those that are made for one task to be judged on that task only."""
    narrowed = []
    for request in requests:
        # Models for all tasks stay as they are.
        if request.spec and request.spec.task:
            request = ModelRequest(request.spec, request.ratio, (request.spec.task,))
        narrowed.append(request)
    return narrowed


def method_specs(config: Config, name: str, *, method: str | None = None, **settings: Any) -> list[ModelSpec]:
    """Return the specs of a built-in method, with ``settings`` of one's own, or of settings alone, under a name."""
    built_in = METHODS[method] if method else {}
    # Settings of one's own win over those of the method.
    return baseline_specs(config, name, Baseline(**{**built_in, **settings}))


def run_specs(config: Config) -> list[ModelSpec]:
    """Return the specs of the run's own models: the experts and the general model."""
    return [spec for spec in model_specs(config) if spec.kind != "baseline"]


def variant(spec: ModelSpec, method: str, **settings: Any) -> ModelSpec:
    """Return the same model with some settings changed, as a baseline that is called ``method``."""
    # Models of several tasks share the method; their names have to differ, since plans are kept by name.
    return replace(
        spec,
        name=f"{method}.{spec.task}" if spec.task else method,
        kind="baseline",
        method=method,
        settings=spec.settings.model_copy(update=settings),
    )
