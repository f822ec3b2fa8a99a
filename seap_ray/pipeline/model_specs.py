"""Model specs: a config in, the models that it asks for out, each with its statistics and its pruning settings."""

from dataclasses import dataclass

from seap_ray.config import Baseline, Config, PlanSettings, PruningSection


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to be cut: its name, the statistics that it uses with their weights, and how."""

    name: str
    kind: str
    """``expert``, ``general`` or ``baseline``."""
    method: str
    """Name of the settings; those of several tasks are one method."""
    weights: dict[str, float]
    """By name of the statistics: a task's, or a part of them."""
    settings: PlanSettings
    pooling: str = "pooled"
    task: str | None = None
    """The one task that it is made for."""


def model_specs(config: Config) -> list[ModelSpec]:
    """The general model, one expert per task, and the baselines."""
    pruning, weights = config.pruning, {task.name: task.weight for task in config.tasks}
    general, fill = pruning.general, config.plan_settings
    made = [ModelSpec("general", "general", "general", weights, fill(general), general.pooling)]
    made += [
        ModelSpec(task, "expert", "experts", _expert_weights(config, task), fill(pruning.experts), task=task)
        for task in weights
    ]
    for name, baseline in pruning.baselines.items():
        made += baseline_specs(config, name, baseline)
    return made


def _expert_weights(config: Config, task: str) -> dict[str, float]:
    """Weights of an expert's statistics: its task alone, or with a share of all tasks."""
    mix, total = config.pruning.experts.mix, sum(task.weight for task in config.tasks)
    shares = {other.name: mix * other.weight / total + (1 - mix) * (other.name == task) for other in config.tasks}
    return {name: share for name, share in shares.items() if share}


def baseline_specs(config: Config, name: str, baseline: Baseline) -> list[ModelSpec]:
    """One model of a baseline, or one for each task."""
    weights, settings = {task.name: task.weight for task in config.tasks}, config.plan_settings(baseline)
    chosen = baseline.tasks or tuple(weights)
    if baseline.per_task:
        return [ModelSpec(f"{name}.{t}", "baseline", name, {t: 1.0}, settings, task=t) for t in chosen]
    return [ModelSpec(name, "baseline", name, {t: weights[t] for t in chosen}, settings, baseline.pooling)]


def pruning_section(config: Config, settings: PlanSettings) -> PruningSection:
    """The pruning section as one plan has it. ``settings`` leave nothing out (``Config.plan_settings``)."""
    own = settings.model_dump(include={"score", "compensation", "budget"})
    curve = settings.model_dump(include={"k", "x0"})
    allocation = config.pruning.allocation.model_copy(update={"kind": settings.allocation, **curve})
    return config.pruning.model_copy(update={**own, "allocation": allocation})
