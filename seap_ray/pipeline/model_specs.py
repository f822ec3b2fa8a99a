"""Model specs: a config in, the models that it asks for out, each with its statistics and its pruning settings."""

from dataclasses import dataclass, replace
from typing import Literal

from seap_ray.config import Baseline, Config, PlanSettings, PruningSection
from seap_ray.core.compensation import Compensation, compensation_of


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to be cut: its name, the statistics that it uses with their weights, and how it is cut."""

    name: str
    kind: Literal["expert", "general", "baseline"]
    method: str
    """Name of the settings; the models of several tasks with the same settings are one method."""
    weights: dict[str, float]
    """Weights by name of the statistics: a task's, or those of a part of its shards."""
    settings: PlanSettings
    pooling: str = "pooled"
    task: str | None = None
    """The one task that the model is made for."""


def model_specs(config: Config) -> list[ModelSpec]:
    """Return the general model, one expert for each task, and the baselines, in this order."""
    weights = {task.name: task.weight for task in config.tasks}
    general = config.pruning.general
    general_settings = config.plan_settings(general)
    expert_settings = config.plan_settings(config.pruning.experts)

    specs = [ModelSpec("general", "general", "general", weights, general_settings, general.pooling)]
    # The order is that of the tables.
    for task in weights:
        own_weights = _expert_weights(config, task)
        specs.append(ModelSpec(task, "expert", "experts", own_weights, expert_settings, task=task))

    for name, baseline in config.pruning.baselines.items():
        specs += baseline_specs(config, name, baseline)
    return specs


def _expert_weights(config: Config, task: str) -> dict[str, float]:
    """Return the weights of an expert's statistics: its task alone, or with a share of all tasks."""
    mix = config.pruning.experts.mix
    total = sum(other.weight for other in config.tasks)

    # The share ``mix`` is spread over all tasks by their weights, and the expert's own task has the rest.
    weights = {other.name: mix * other.weight / total + (1 - mix) * (other.name == task) for other in config.tasks}
    # Statistics that count for nothing are not read.
    return {name: weight for name, weight in weights.items() if weight}


def baseline_specs(config: Config, name: str, baseline: Baseline) -> list[ModelSpec]:
    """Return the one model of a baseline, or one for each of its tasks."""
    weights = {task.name: task.weight for task in config.tasks}
    settings = config.plan_settings(baseline)
    tasks = baseline.tasks or tuple(weights)

    # Baselines of a single task count it once, whatever its weight among all tasks.
    if baseline.per_task:
        return [ModelSpec(f"{name}.{task}", "baseline", name, {task: 1.0}, settings, task=task) for task in tasks]

    chosen = {task: weights[task] for task in tasks}
    return [ModelSpec(name, "baseline", name, chosen, settings, baseline.pooling)]


def assumed_specs(config: Config) -> list[ModelSpec]:
    """Return the specs with settings for estimates and checks before anything is judged on held-out tokens.

    Where a score or a compensation is left open, they have the costliest one that ``auto`` may take.
    """
    return [replace(spec, settings=_assumed(config, spec.settings)) for spec in model_specs(config)]


def _assumed(config: Config, settings: PlanSettings) -> PlanSettings:
    assumed: dict[str, str] = {}
    if settings.score == "auto":
        assumed["score"] = "reap" if settings.mlp_unit == "expert" else "wifv"
    if settings.compensation == "auto":
        fitted = "mean" if settings.bias else "none"
        if config.calibration.statistics == "covariance":
            fitted = "least_squares"
        # What makes up for columns is nothing to layers or MoE experts that go as a whole.
        assumed["compensation"] = "none" if settings.cuts_no_module else fitted
    return settings.model_copy(update=assumed)


def compensation_for(settings: PlanSettings) -> Compensation:
    """Return the way of compensation of a model whose settings leave nothing open."""
    return compensation_of(settings.compensation or "none", has_bias=settings.bias is not False)


def pruning_section(config: Config, settings: PlanSettings) -> PruningSection:
    """Return the pruning section with one model's settings, which leave nothing out (``Config.plan_settings``)."""
    names = {"score", "compensation", "bias", "error_correction", "attention_unit", "mlp_unit", "budget"}
    replaced = settings.model_dump(include=names)
    curve = settings.model_dump(include={"k", "x0"})

    # The section's other keys, such as protection and alignment, are those of all models.
    allocation = config.pruning.allocation.model_copy(update={"kind": settings.allocation, **curve})
    return config.pruning.model_copy(update={**replaced, "allocation": allocation})
