"""Plan choice: models in, for each the plan that is written out. What settings leave to ``auto`` is judged here.

Whole plans are measured on held-out tokens before anything is written: first by score and compensation, then by
allocation and unit of attention. The one that diverges least from the dense model is taken. Allocation ``measured``
needs what each cut costs, and measures it in cut models of the same ratio.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from seap_ray.config import Config, PlanSettings
from seap_ray.core.allocation import check_measurable, check_ratio, check_target
from seap_ray.core.architecture import Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.moments import SITES, Site
from seap_ray.core.plan import Plan
from seap_ray.core.sensitivity import NOISE, Sensitivities, even_cuts
from seap_ray.core.widths import WidthConstraints, widest_unit
from seap_ray.errors import ConfigError
from seap_ray.models.cut_costs import PASSES_BY_SITE
from seap_ray.models.export import CheckpointExport
from seap_ray.pipeline.divergences import Measured, PooledTrial, Trial, measure_all
from seap_ray.pipeline.gguf_files import is_uniform
from seap_ray.pipeline.model_specs import ModelSpec, compensation_for, model_specs, pruning_section
from seap_ray.pipeline.planner import Planner
from seap_ray.progress import Progress
from seap_ray.storage.run import fingerprint

REPAIRS = (("wifv", "least_squares"), ("wifv", "mean"), ("wifv", "none"), ("energy", "none"))
"""Scores and compensations that ``auto`` judges; of equally good ones the first is taken."""
REPAIRS_WITHOUT_BIAS = (("wifv", "least_squares"), ("energy", "least_squares"), ("wifv", "none"), ("energy", "none"))
"""What ``auto`` judges where no bias may be added. Both scores are tried with the fit: what a column's mean is worth
depends on how well other columns stand for a constant."""
ALLOCATIONS = ("measured", "uniform", "logistic", "global")
"""Allocations that ``auto`` judges."""
ROUNDS = 2
"""Cut models in which ``measured`` measures costs: one that is cut evenly, then the plan that follows from it."""


@dataclass(frozen=True)
class PlannedModel:
    """A model that is planned and not written yet: what the next step, ``checkpoint_writer``, gets."""

    spec: ModelSpec
    export: CheckpointExport
    """The base, the plan, and the statistics that the plan's compensation needs."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was judged, with its settings."""

    plan: Plan
    settings: PlanSettings
    measured: Measured
    predicted: tuple[Mapping[Site, float], ...] = ()
    """What the cuts of every layer cost, as ``Sensitivities.predicted`` returns it; empty where nothing is known."""

    def to_json(self) -> dict[str, Any]:
        """Return the settings that were open, and the figures in nats a token, for the plan's file."""
        settings = self.settings.model_dump(include={"score", "compensation", "allocation", "attention_unit"})
        settings["compensation"] = compensation_for(self.settings).name
        divergence = self.measured.divergence
        costs = [cost for sites in self.predicted for cost in sites.values()]
        return {
            **settings,
            "divergence": divergence.mean,
            "stderr": divergence.stderr,
            "loss": self.measured.loss.mean,
            **({"predicted": math.fsum(costs)} if costs else {}),
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """What a model's plan is made with: settings that leave nothing open, and all that were judged."""

    settings: PlanSettings
    shapes: tuple[Shape, ...] | None = None
    """Widths of all layers where they were measured, or shared with other models; None: by the settings."""
    judged: tuple[Candidate, ...] = ()
    predicted: tuple[Mapping[Site, float], ...] = ()
    """What the cuts of every layer cost; empty where that was not measured for this model."""


@dataclass(frozen=True)
class PlanChooser:
    """Chooses the plan of every model."""

    planner: Planner
    progress: Progress
    _decisions: dict[str, Decision] = field(default_factory=dict)
    """Decisions by what they depend on, so that the experts' common one is made once."""
    _sensitivities: dict[str, Sensitivities] = field(default_factory=dict)
    """Sensitivities by what they depend on; what is not cut by them is predicted by them, too."""

    def plan_all(self) -> list[PlannedModel]:
        """Plan every model that the config asks for at every ratio, ratio by ratio.

        Raises ConfigError for the first ratio that floors, caps and protection do not allow.
        """
        config = self.planner.config
        wanted = [(spec, ratio) for ratio in config.pruning.ratio for spec in model_specs(config)]
        return self.plan_models(wanted)

    def plan_models(self, wanted: Sequence[tuple[ModelSpec, float]]) -> list[PlannedModel]:
        """Plan models at ratios. Raises ConfigError for the first ratio that cannot be met."""
        # Measured side by side, before each is decided by itself.
        self._measure(trial for spec, ratio in wanted for trial in self._repair_trials(spec, ratio))
        return [self.plan_model(spec, ratio) for spec, ratio in wanted]

    def plan_model(self, spec: ModelSpec, ratio: float) -> PlannedModel:
        """Plan a model at a ratio. Raises ConfigError where floors, caps and protection do not allow the ratio."""
        decision = self.decide(spec, ratio)
        spec = replace(spec, settings=decision.settings)
        plan = self.planner.plan(spec, ratio, decision.shapes)
        judged = tuple(candidate.to_json() for candidate in decision.judged)
        return PlannedModel(spec, self.planner.export(spec, replace(plan, judged=judged, predicted=decision.predicted)))

    def decide(self, spec: ModelSpec, ratio: float) -> Decision:
        """Choose what a model's settings leave open. Raises ConfigError where no choice meets the ratio."""
        key = fingerprint(asdict(spec), ratio)
        if key not in self._decisions:
            self._decisions[key] = self._decided(spec, ratio)
        return self._decisions[key]

    def _decided(self, spec: ModelSpec, ratio: float) -> Decision:
        settings = spec.settings
        if settings.mlp_unit == "expert":
            score = "reap" if settings.score == "auto" else settings.score
            whole = {"score": score, "compensation": "none", "allocation": "uniform", "attention_unit": "none"}
            return Decision(settings.model_copy(update=whole))
        if settings.allocation == "depth" or not ratio:
            # Nothing is cut that a score would rank or a compensation make up for.
            closed = self._with_unit(_closed(settings, *REPAIRS[-1]))
            allocation = "uniform" if settings.allocation == "auto" else settings.allocation
            return Decision(closed.model_copy(update={"allocation": allocation}))

        repaired, judged = self._repaired(spec, ratio)
        if settings.allocation not in ("auto", "measured"):
            return Decision(self._with_unit(repaired.settings), judged=judged)

        leader = self._leader(repaired)
        if leader is not None:
            # One engine holds all models whose widths are the same.
            common = self.decide(leader, ratio)
            chosen = {name: getattr(common.settings, name) for name in ("allocation", "attention_unit")}
            settings = repaired.settings.model_copy(update=chosen)
            return Decision(settings, common.shapes, judged)
        return self._allocated(repaired, ratio, judged)

    def _leader(self, spec: ModelSpec) -> ModelSpec | None:
        """Return the general model with an expert's allocation, where the experts share its widths."""
        if spec.kind != "expert" or not self.planner.config.pruning.allocation.shared:
            return None
        general = next(other for other in model_specs(self.planner.config) if other.kind == "general")
        common = spec.settings.model_dump(include={"allocation", "attention_unit", "k", "x0", "budget"})
        return replace(general, settings=general.settings.model_copy(update=common))

    def _with_unit(self, settings: PlanSettings) -> PlanSettings:
        """Close the unit of attention where nothing is to be judged."""
        if settings.attention_unit != "auto":
            return settings
        return settings.model_copy(update={"attention_unit": widest_unit(self.planner.checkpoint.architecture)})

    # --- score and compensation --------------------------------------------------------------------------------------

    def _repaired(self, spec: ModelSpec, ratio: float) -> tuple[ModelSpec, tuple[Candidate, ...]]:
        """Close a model's score and compensation; return what was judged for that."""
        if "auto" not in (spec.settings.score, spec.settings.compensation):
            return spec, ()
        plans = self._repair_plans(spec, ratio)
        # A single plan needs no judge.
        candidates = self._candidates(spec, plans) if len(plans) > 1 else ()
        best = min(candidates, key=_divergence).settings if candidates else plans[0][1]
        settings = spec.settings.model_copy(update={"score": best.score, "compensation": best.compensation})
        return replace(spec, settings=settings), candidates

    def _repair_trials(self, spec: ModelSpec, ratio: float) -> list[PooledTrial]:
        """Return what is measured to close a model's score and compensation."""
        settings = spec.settings
        if settings.cuts_no_module or not ratio or "auto" not in (settings.score, settings.compensation):
            return []
        plans = [plan for plan, _ in self._repair_plans(spec, ratio)]
        return [self._trial(spec, plans)] if len(plans) > 1 else []

    def _repair_plans(self, spec: ModelSpec, ratio: float) -> list[tuple[Plan, PlanSettings]]:
        """Return a plan by every score and compensation that a model may have, all of the same kind of widths."""
        settings = spec.settings
        # Widths that are measured depend on the repair, so that repairs are judged at even ones.
        update: dict[str, Any] = {}
        if settings.allocation in ("auto", "measured"):
            update["allocation"] = "uniform"
            update["attention_unit"] = "none" if settings.attention_unit == "auto" else settings.attention_unit
        even = self._with_unit(settings.model_copy(update=update))

        has_covariances = self.planner.config.calibration.statistics == "covariance"
        closed: list[PlanSettings] = []
        for score, compensation in _repairs_of(settings):
            if has_covariances or COMPENSATIONS[compensation].required != "covariance":
                repair = _closed(even, score, compensation)
                if settings.compensation in ("auto", compensation) and repair not in closed:
                    closed.append(repair)

        plans = self._plans(spec, closed, ratio)
        if not plans and settings.attention_unit == "auto":
            # The MLP alone may not have as much as goes.
            widest = [each.model_copy(update={"attention_unit": "auto"}) for each in closed]
            plans = self._plans(spec, [self._with_unit(each) for each in widest], ratio)
        return plans or [self._plan(spec, closed[0], ratio)]

    # --- allocation and unit of attention ----------------------------------------------------------------------------

    def _allocated(self, spec: ModelSpec, ratio: float, judged: tuple[Candidate, ...]) -> Decision:
        """Close a model's allocation and unit of attention."""
        allocation = spec.settings.allocation
        unit = spec.settings.attention_unit
        widest = widest_unit(self.planner.checkpoint.architecture)
        units = list(dict.fromkeys(["none", widest])) if unit == "auto" else [unit]
        allocations = ALLOCATIONS if allocation == "auto" else [allocation]

        closed: list[PlanSettings] = []
        # Attention whole comes first: short texts do not show all that heads do on long ones.
        for each in units:
            for kind in allocations:
                closed.append(spec.settings.model_copy(update={"allocation": kind, "attention_unit": each}))
        plans = self._plans(spec, closed, ratio)
        if not plans:
            # The reason why the last one, which may take most, cannot be.
            plans = [self._plan(spec, closed[-1], ratio)]

        if len(plans) == 1:
            ((plan, settings),) = plans
            return Decision(settings, plan.shapes, judged, self._predicted(spec, settings, plan))
        candidates = self._candidates(spec, plans)
        best = _first_as_good(candidates)
        return Decision(best.settings, best.plan.shapes, judged + candidates, best.predicted)

    def _plans(self, spec: ModelSpec, closed: Iterable[PlanSettings], ratio: float) -> list[tuple[Plan, PlanSettings]]:
        """Return the plans of those settings that can meet the ratio."""
        plans: list[tuple[Plan, PlanSettings]] = []
        for settings in closed:
            try:
                plans.append(self._plan(spec, settings, ratio))
            except ConfigError:
                continue
        return plans

    def _plan(self, spec: ModelSpec, settings: PlanSettings, ratio: float) -> tuple[Plan, PlanSettings]:
        """Return the plan by settings that leave nothing open. Raises ConfigError where it cannot meet the ratio."""
        closed = replace(spec, settings=settings)
        shapes = self._measured_shapes(closed, ratio) if settings.allocation == "measured" else None
        return self.planner.plan(closed, ratio, shapes), settings

    def _candidates(self, spec: ModelSpec, plans: Sequence[tuple[Plan, PlanSettings]]) -> tuple[Candidate, ...]:
        """Judge plans of a model."""
        (measured,) = self._measure([self._trial(spec, [plan for plan, _ in plans])])
        candidates: list[Candidate] = []
        for (plan, settings), figures in zip(plans, measured, strict=True):
            candidates.append(Candidate(plan, settings, figures, self._predicted(spec, settings, plan)))
        return tuple(candidates)

    # --- measured widths ---------------------------------------------------------------------------------------------

    def _measured_shapes(self, spec: ModelSpec, ratio: float) -> list[Shape]:
        """Return the widths whose cuts cost least together.

        Raises ConfigError where floors, caps and protection do not allow the ratio.
        """
        check_measurable(self.planner.checkpoint.architecture)
        sensitivities = self._measured_sensitivities(spec, ratio)
        self._sensitivities[_sensitivities_key(spec, ratio)] = sensitivities
        return self.planner.shapes(spec, ratio, self.planner.scores(spec), sensitivities)

    def _predicted(self, spec: ModelSpec, settings: PlanSettings, plan: Plan) -> tuple[Mapping[Site, float], ...]:
        """Return what the cuts of a plan cost, whatever its allocation; nothing where no costs were measured."""
        closed = replace(spec, settings=settings.model_copy(update={"allocation": "measured"}))
        sensitivities = self._sensitivities.get(_sensitivities_key(closed, plan.requested))
        if sensitivities is None:
            return ()
        return tuple(sensitivities.predicted(self.planner.checkpoint.architecture, plan.shapes))

    def _measured_sensitivities(self, spec: ModelSpec, ratio: float) -> Sensitivities:
        """Return what cuts cost, as the geometric mean of their costs in several cut models.

        Raises ConfigError where floors, caps and protection do not allow the ratio.
        """
        planner = self.planner
        pruning = pruning_section(planner.config, spec.settings)
        adds_biases = compensation_for(spec.settings).adds_biases
        architecture = planner.checkpoint.architecture
        is_stock = is_uniform(planner.config, architecture, adds_biases=adds_biases)
        # A ratio that cannot be met costs nothing.
        if planner.target is None:
            check_ratio(architecture, pruning, ratio=ratio, adds_biases=adds_biases, stock=is_stock)
        else:
            check_target(architecture, pruning, planner.target, adds_biases=adds_biases, stock=is_stock)
        constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases, stock=is_stock)
        scores_L = planner.scores(spec)

        def sensitivities_in(cut_models: Sequence[Sequence[Shape]]) -> list[Sensitivities]:
            """Measure what the cuts of some models cost."""
            trials: list[PooledTrial] = []
            for shapes in cut_models:
                trials.append(self._trial(spec, [planner.plan(spec, ratio, shapes)], by_site=True))
            costs = [measured.costs for (measured,) in self._measure(trials)]
            pairs = zip(cut_models, costs, strict=True)
            return [Sensitivities.of_costs(constraints_L, scores_L, shapes, each) for shapes, each in pairs]

        # Each site alone: with both cut evenly at once, attention would hide what the MLP costs.
        even = [even_cuts(constraints_L, site, ratio) for site in SITES]
        contexts = sensitivities_in([shapes for shapes in even if shapes])
        for _ in range(ROUNDS - 1):
            shapes = planner.shapes(spec, ratio, scores_L, Sensitivities.geometric_mean(contexts))
            contexts += sensitivities_in([shapes])
        return Sensitivities.geometric_mean(contexts)

    # --- measurements ------------------------------------------------------------------------------------------------

    def _trial(self, spec: ModelSpec, plans: Sequence[Plan], *, by_site: bool = False) -> PooledTrial:
        """Return the measurement of plans of a model on the held-out tokens of its tasks, by their weights."""
        planner = self.planner
        exports = planner.judged_exports(spec, plans)
        shards = [planner.held_out[task].shard for task in spec.weights]
        trials = tuple(Trial.of(planner.config, exports, shard, by_site=by_site) for shard in shards)
        return PooledTrial(trials, tuple(spec.weights.values()))

    def _measure(self, trials: Iterable[PooledTrial]) -> list[list[Measured]]:
        return measure_all(self.planner.config, self.planner.run, [*trials], self.progress)


def passes_of_choice(config: Config, spec: ModelSpec) -> int:
    """Return how many forward passes of its held-out tokens the choice of a model's plan takes at a ratio, at most."""
    settings = spec.settings
    if settings.cuts_no_module:
        return 0
    n_repairs = len(REPAIRS) if "auto" in (settings.score, settings.compensation) else 0
    follows_general = spec.kind == "expert" and config.pruning.allocation.shared
    if settings.allocation not in ("auto", "measured") or follows_general:
        return n_repairs

    n_units = 2 if settings.attention_unit == "auto" else 1
    # One that is cut evenly for each site, then the plans that follow for each unit of attention.
    n_cut_models = len(SITES) + n_units * (ROUNDS - 1)
    n_plans = n_units * (len(ALLOCATIONS) if settings.allocation == "auto" else 1)
    return n_repairs + n_cut_models * PASSES_BY_SITE + n_plans


def _repairs_of(settings: PlanSettings) -> tuple[tuple[str, str], ...]:
    """Return the scores and compensations that are judged for a model."""
    return REPAIRS_WITHOUT_BIAS if settings.bias is False else REPAIRS


def _closed(settings: PlanSettings, score: str, compensation: str) -> PlanSettings:
    """Return settings with a score and a compensation where these are left open."""
    update: dict[str, str] = {}
    if settings.score == "auto":
        update["score"] = score
    if settings.compensation == "auto":
        update["compensation"] = compensation
    return settings.model_copy(update=update)


def _sensitivities_key(spec: ModelSpec, ratio: float) -> str:
    return fingerprint(asdict(spec), ratio)


def _first_as_good(candidates: Sequence[Candidate]) -> Candidate:
    """Return the first candidate that is as good as the best one, as far as the held-out tokens can tell."""
    best = min(candidates, key=_divergence)
    for candidate in candidates:
        gap = candidate.measured.above(best.measured)
        if gap.mean <= NOISE * gap.stderr:
            return candidate
    return best


def _divergence(candidate: Candidate) -> float:
    return candidate.measured.divergence.mean
