"""The choice of plans: what is judged, what is taken of it, and where it is told, with figures of our own."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from seap_ray.config import TargetSection
from seap_ray.core.plan import Plan
from seap_ray.core.sensitivity import Rise
from seap_ray.core.targets import StoredSizes, make_target
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.records import PooledCovariance
from seap_ray.pipeline.checkpoint_writer import prepare_checkpoint
from seap_ray.pipeline.divergences import Measured, PooledTrial
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.plan_choice import ALLOCATIONS, REPAIRS, REPAIRS_WITHOUT_BIAS, PlanChooser, PlannedModel
from seap_ray.pipeline.plan_files import save_plan
from seap_ray.progress import progress
from seap_ray.storage.files import read_json
from seap_ray.storage.run import Run
from tests.support.planners import SMALL, TASKS, architecture_of, open_planner_of, spec_of

COVARIANCES = {"statistics": "covariance"}
FIXED = {"score": "wifv", "compensation": "mean", "attention_unit": "group", "allocation": {"kind": "logistic"}}
BEYOND_THE_MLP = 0.45
"""A ratio that the MLP of ``SMALL`` alone cannot give: it has 48 % of a layer, and a tile of 8 channels in 40 stays."""


@dataclass
class Judge:
    """Stands for ``measure_all``: gives every plan a divergence of the test's choosing, and remembers all plans."""

    divergence: Callable[[Plan], float] = lambda plan: 1.0
    calls: list[list[PooledTrial]] = field(default_factory=list)

    def __call__(self, _config: Any, _run: Any, trials: list[PooledTrial], _progress: Any) -> list[list[Measured]]:
        self.calls.append(trials)
        return [[self._measured(export, trial) for export in exports_of(trial)] for trial in trials]

    def _measured(self, export: CheckpointExport, trial: PooledTrial) -> Measured:
        plan = export.plan
        costs = {}
        if trial.trials[0].by_site:
            for layer, kept in enumerate(plan.kept):
                original = export.base.architecture.layers[layer].shape
                # Deeper layers cost less, and attention more than the MLP.
                if kept.shape.channels < original.channels:
                    costs[layer, "mlp"] = Rise(0.1 / (1 + layer), 0.0)
                if kept.shape.heads < original.heads:
                    costs[layer, "attn"] = Rise(0.3 / (1 + layer), 0.0)
        value = self.divergence(plan)
        one_sequence = (1.0, torch.tensor([value], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        return Measured(Rise(value, value / 8), Rise(value / 2, value / 4), costs, (one_sequence,))

    @property
    def trials(self) -> list[PooledTrial]:
        """What was measured; what is asked for again is read."""
        distinct = {trial.trials[0].key: trial for call in self.calls for trial in call}
        return list(distinct.values())

    @property
    def exports(self) -> list[CheckpointExport]:
        """Cut models that compete; those in which costs are measured do not."""
        return [export for trial in self.trials if not trial.trials[0].by_site for export in exports_of(trial)]

    @property
    def plans(self) -> list[Plan]:
        return [export.plan for export in self.exports]

    def plans_of(self, name: str) -> list[Plan]:
        return [plan for plan in self.plans if plan.name == name]


def exports_of(trial: PooledTrial) -> tuple[CheckpointExport, ...]:
    return trial.trials[0].exports


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    judge = Judge()
    monkeypatch.setattr("seap_ray.pipeline.plan_choice.measure_all", judge)
    return judge


def choose(name: str = "general", ratio: float = 0.3, architecture: Any = SMALL, **config: Any) -> PlannedModel:
    planner = open_planner_of(architecture, **config)
    return PlanChooser(planner, progress).plan_model(spec_of(planner, name), ratio)


def repair_of(plan: Plan) -> tuple[str, str]:
    return plan.provenance["score"], plan.compensation.name


def kind_of(plan: Plan) -> tuple[str, str]:
    return plan.provenance["allocation"]["kind"], plan.provenance["attention_unit"]


def rows_of(planned: PlannedModel) -> list[tuple[str, str, str, str]]:
    keys = ("score", "compensation", "allocation", "attention_unit")
    return [tuple(row[key] for key in keys) for row in planned.export.plan.judged]  # type: ignore[misc]


# --- what is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", REPAIRS, ids="+".join)
def test_the_score_and_compensation_that_diverge_least_are_taken(judge, repair):
    judge.divergence = lambda plan: 0.5 if repair_of(plan) == repair else 1.0

    planned = choose(calibration=COVARIANCES)

    assert repair_of(planned.export.plan) == repair
    assert (planned.spec.settings.score, planned.spec.settings.compensation) == repair
    assert rows_of(planned)[:4] == [(*each, "uniform", "none") for each in REPAIRS]
    assert {row[:2] for row in rows_of(planned)[4:]} == {repair}, "allocations are judged with this repair alone"


@pytest.mark.parametrize("statistics", ["moments", "covariance"])
@pytest.mark.parametrize("repair", REPAIRS_WITHOUT_BIAS, ids="+".join)
def test_without_a_bias_linear_maps_and_nothing_are_judged(judge, repair, statistics):
    def repair_in_plan(score: str, compensation: str) -> tuple[str, str]:
        return score, "least_squares_without_bias" if compensation == "least_squares" else compensation

    judge.divergence = lambda plan: 0.5 if repair_of(plan) == repair_in_plan(*repair) else 1.0
    planned = choose(calibration={"statistics": statistics}, pruning={"bias": False})

    possible = [each for each in REPAIRS_WITHOUT_BIAS if statistics == "covariance" or each[1] == "none"]
    judged = list(dict.fromkeys(row[:2] for row in rows_of(planned)))
    assert judged == [repair_in_plan(*each) for each in possible]
    taken = repair if repair in possible else possible[0]
    assert repair_of(planned.export.plan) == repair_in_plan(*taken)
    assert (planned.spec.settings.score, planned.spec.settings.compensation) == taken
    assert not any(plan.compensation.adds_biases for plan in judge.plans)


@pytest.mark.parametrize("unit", ["group", "none"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_allocation_and_unit_that_diverge_least_are_taken_with_their_widths(judge, allocation, unit):
    judge.divergence = lambda plan: 0.5 if kind_of(plan) == (allocation, unit) else 1.0

    planned = choose()
    plan = planned.export.plan

    assert kind_of(plan) == (allocation, unit)
    assert rows_of(planned)[3:] == [("wifv", "mean", kind, each) for each in ("none", "group") for kind in ALLOCATIONS]
    (judged,) = [other for other in judge.plans[3:] if kind_of(other) == (allocation, unit)]
    assert plan.kept == judged.kept, "what is written is what was judged"
    assert [plan.judged[i]["divergence"] for i in range(3)] == [0.5 if kind_of(plan) == ("uniform", "none") else 1] * 3


def test_of_equally_good_plans_the_first_is_taken(judge):
    planned = choose(calibration=COVARIANCES)
    assert repair_of(planned.export.plan) == REPAIRS[0]
    assert kind_of(planned.export.plan) == (ALLOCATIONS[0], "none")


@pytest.mark.parametrize(("gaps", "unit"), [([0.2, 0.22, 0.18], "group"), ([0.5, -0.2, 0.2], "none")])
def test_attention_stays_whole_unless_a_cut_is_better_beyond_its_noise(monkeypatch, gaps, unit):
    tokens_N = torch.tensor([10.0, 10.0, 10.0], dtype=torch.float64)

    def measure(_config: Any, _run: Any, trials: list[PooledTrial], _progress: Any) -> list[list[Measured]]:
        measured: list[list[Measured]] = []
        for trial in trials:
            figures: list[Measured] = []
            for export in exports_of(trial):
                # Sequences differ more from each other than plans do on the same sequence.
                sums_N = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
                if kind_of(export.plan) == ("uniform", "group"):
                    sums_N = sums_N - torch.tensor(gaps, dtype=torch.float64)
                figures.append(Measured(Rise.a_token(sums_N, tokens_N), Rise(0.0, 0.0), {}, ((1.0, sums_N, tokens_N),)))
            measured.append(figures)
        return measured

    monkeypatch.setattr("seap_ray.pipeline.plan_choice.measure_all", measure)
    monkeypatch.setattr("seap_ray.pipeline.plan_choice.ALLOCATIONS", ("uniform",))
    planned = choose(pruning={"score": "wifv", "compensation": "mean"})
    assert kind_of(planned.export.plan) == ("uniform", unit)


def test_the_figures_of_all_plans_are_kept_with_the_one_that_is_taken(judge):
    judge.divergence = lambda plan: 0.25 if kind_of(plan) == ("global", "group") else 1.0
    planned = choose()
    (row,) = [row for row in planned.export.plan.judged if row["divergence"] != 1.0]
    assert (row["allocation"], row["attention_unit"]) == ("global", "group")
    assert (row["divergence"], row["stderr"], row["loss"]) == (0.25, 0.03125, 0.125)


@pytest.mark.parametrize("taken", ALLOCATIONS)
def test_what_the_cuts_of_every_judged_allocation_cost_is_predicted_from_those_that_were_measured(judge, taken):
    judge.divergence = lambda plan: 0.5 if kind_of(plan) == (taken, "group") else 1.0
    plan = choose().export.plan

    assert not any("predicted" in row for row in plan.judged[:3]), "nothing is known when repairs are judged"
    by_kind = {(row["allocation"], row["attention_unit"]): row["predicted"] for row in plan.judged[3:]}
    assert sum(sum(costs.values()) for costs in plan.predicted) == pytest.approx(by_kind[taken, "group"])
    assert min(by_kind, key=lambda kind: by_kind[kind])[0] == "measured", "its widths are those that cost least"
    for layer, costs in enumerate(plan.predicted):
        shape = plan.shapes[layer]
        assert (costs["attn"] > 0, costs["mlp"] > 0) == (
            shape.heads < SMALL.dense.heads,
            shape.channels < SMALL.dense.channels,
        )


def test_an_expert_that_shares_its_widths_has_no_costs_of_its_own(judge):
    assert choose("general").export.plan.predicted
    planner = open_planner_of(SMALL)
    expert = next(spec for spec in model_specs(planner.config) if spec.kind == "expert")
    assert PlanChooser(planner, progress).plan_model(expert, 0.3).export.plan.predicted == ()


@pytest.mark.parametrize("kind", ["auto", "measured"])
def test_measured_widths_follow_the_costs(judge, kind):
    """Deeper layers cost less in the figures of these tests, so they give more."""
    judge.divergence = lambda plan: 0.5 if kind_of(plan) == ("measured", "none") else 1.0
    plan = choose(pruning={"allocation": {"kind": kind}, "attention_unit": "none"}).export.plan
    channels = [shape.channels for shape in plan.shapes]
    assert channels[-1] < channels[0]
    assert plan.planned(SMALL) == pytest.approx(0.3, abs=0.03)


# --- what is judged on -----------------------------------------------------------------------------------------------


def test_a_model_is_judged_on_the_held_out_shards_of_its_tasks_by_their_weights(judge):
    tasks = [{"name": "sort", "weight": 3.0}, {"name": "facts", "weight": 1.0}]
    planner = open_planner_of(SMALL, tasks=tasks, pruning={"held_out_tokens": 77})
    chooser = PlanChooser(planner, progress)

    chooser.decide(spec_of(planner, "general"), 0.3)
    for trial in judge.trials:
        assert [each.shard for each in trial.trials] == [planner.held_out[task].shard for task in TASKS]
        assert trial.weights == (3.0, 1.0)
        assert {each.n_tokens for each in trial.trials} == {77}

    judge.calls.clear()
    chooser.decide(spec_of(planner, "facts"), 0.3)
    for trial in judge.trials:
        assert [each.shard for each in trial.trials] == [planner.held_out["facts"].shard]


def test_covariances_of_judged_plans_leave_the_held_out_records_out_and_those_of_the_written_plan_do_not(judge):
    planner = open_planner_of(SMALL, calibration=COVARIANCES)
    planned = PlanChooser(planner, progress).plan_model(spec_of(planner, "general"), 0.3)

    records = tuple(planner.held_out[task].record for task in TASKS)
    fitted = [export.statistics for export in judge.exports if export.plan.compensation.name == "least_squares"]
    assert len(fitted) == 1 + len(ALLOCATIONS) * 2
    for statistics in (*fitted, *(exports_of(trial)[0].statistics for trial in judge.trials if by_site(trial))):
        assert isinstance(statistics, PooledCovariance) and statistics.held_out == records
    assert isinstance(planned.export.statistics, PooledCovariance) and not planned.export.statistics.held_out


def by_site(trial: PooledTrial) -> bool:
    return trial.trials[0].by_site


# --- what is not judged ----------------------------------------------------------------------------------------------


def test_settings_that_leave_nothing_open_are_not_judged(judge):
    planner = open_planner_of(SMALL, pruning={**FIXED, "baselines": {"depth": {}, "magnitude": {}}})
    models = PlanChooser(planner, progress).plan_all()
    assert len(models) == 2 * 5 and not judge.trials
    assert all(not model.export.plan.judged for model in models)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        ({"compensation": "none"}, [("wifv", "none"), ("energy", "none")]),
        ({"compensation": "mean"}, []),
        ({"score": "magnitude"}, [("magnitude", each) for each in ("least_squares", "mean", "none")]),
        ({"score": "energy", "compensation": "mean"}, []),
    ],
    ids=str,
)
def test_a_fixed_score_or_compensation_is_kept_and_a_single_choice_is_none(judge, fixed, expected):
    pruning = {**fixed, "allocation": {"kind": "uniform"}}
    planned = choose("sort", calibration=COVARIANCES, pruning=pruning)
    assert [row[:2] for row in rows_of(planned)] == expected
    assert [repair_of(plan) for plan in judge.plans] == expected
    for name, value in fixed.items():
        assert getattr(planned.spec.settings, name) == value


@pytest.mark.parametrize("unit", ["group", "head", "none"])
def test_a_fixed_unit_is_that_of_all_plans(judge, unit):
    planned = choose(pruning={"attention_unit": unit})
    assert {row[3] for row in rows_of(planned)} == {unit} == {plan.provenance["attention_unit"] for plan in judge.plans}
    assert len(rows_of(planned)) == 3 + len(ALLOCATIONS)


@pytest.mark.parametrize("allocation", ["uniform", "logistic", "global", "standardised"])
def test_a_fixed_allocation_is_not_judged_and_its_unit_is_the_widest(judge, allocation):
    planned = choose(pruning={"allocation": {"kind": allocation}})
    expected = [(*repair, allocation, "group") for repair in REPAIRS if repair[1] != "least_squares"]
    assert rows_of(planned) == expected and len(judge.plans) == 3
    assert kind_of(planned.export.plan) == (allocation, "group")

    judge.calls.clear()
    planned = choose(pruning={"allocation": {"kind": allocation}, "score": "wifv", "compensation": "none"})
    assert not judge.trials and kind_of(planned.export.plan) == (allocation, "group")


def test_measured_alone_is_measured_and_the_better_unit_taken(judge):
    judge.divergence = lambda plan: 0.5 if kind_of(plan)[1] == "group" else 1.0
    planned = choose(pruning={**FIXED, "attention_unit": "auto", "allocation": {"kind": "measured"}})
    assert kind_of(planned.export.plan) == ("measured", "group")
    assert {row[2:] for row in rows_of(planned)} == {("measured", "none"), ("measured", "group")}

    judge.calls.clear()
    planned = choose(pruning={**FIXED, "allocation": {"kind": "measured"}})
    assert not judge.plans and judge.trials and not rows_of(planned), "costs are measured, and one plan not judged"


@pytest.mark.parametrize("name", ["general", "sort", "uniform", "free", "depth"])
def test_nothing_is_judged_where_nothing_goes(judge, name):
    baselines = {"uniform": {"allocation": "uniform"}, "free": {}, "depth": {}}
    planned = choose(name, ratio=0.0, pruning={"baselines": baselines}, architecture=SMALL)
    assert not judge.trials and not planned.export.plan.judged
    assert planned.export.plan.planned(SMALL) == 0
    assert "auto" not in planned.spec.settings.model_dump().values()


def test_whole_layers_are_not_judged(judge):
    planned = choose("depth", pruning={"baselines": {"depth": {}}})
    assert not judge.trials and planned.export.plan.dropped
    planned = choose("general", pruning={"allocation": {"kind": "depth"}})
    assert not judge.trials and planned.export.plan.dropped and planned.export.plan.compensation.name == "none"


def test_least_squares_is_not_tried_without_covariances(judge):
    planner = open_planner_of(SMALL)
    PlanChooser(planner, progress).plan_all()
    assert {plan.compensation.name for plan in judge.plans} == {"mean", "none"}


def test_a_mixture_of_experts_is_judged_by_what_moments_give(judge):
    mixture = architecture_of(
        model_type="mixtral",  # type: ignore[arg-type]
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=40,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    judge.divergence = lambda plan: 0.5 if kind_of(plan) == ("measured", "group") else 1.0
    planned = choose("facts", architecture=mixture)
    assert {plan.compensation.name for plan in judge.plans} == {"mean", "none"}
    assert kind_of(planned.export.plan) == ("measured", "group")
    assert all(len(kept.channels) == 3 for kept in planned.export.plan.kept)
    assert planned.export.plan.planned(mixture) == pytest.approx(0.3, abs=0.06)


# --- baselines -------------------------------------------------------------------------------------------------------


def test_baselines_of_other_authors_are_not_judged_and_their_unit_is_the_widest(judge):
    names = ("wanda_sp", "flap", "magnitude", "random", "seap", "seap_official")
    planner = open_planner_of(SMALL, pruning={"baselines": {name: {} for name in names}})
    chooser = PlanChooser(planner, progress)
    for name in (*names[:4], "seap.sort", "seap_official.facts"):
        plan = chooser.plan_model(spec_of(planner, name), 0.3).export.plan
        assert plan.provenance["attention_unit"] == "group" and not plan.judged
    assert not judge.trials


def test_a_baseline_with_open_settings_is_judged_for_itself(judge):
    judge.divergence = lambda plan: 0.5 if (plan.name == "free") == (kind_of(plan)[0] == "global") else 1.0
    planner = open_planner_of(SMALL, pruning={"baselines": {"free": {"tasks": ["sort"]}}})
    models = {model.spec.name: model.export.plan for model in PlanChooser(planner, progress).plan_all()[:4]}
    assert kind_of(models["free"])[0] == "global" and kind_of(models["general"])[0] == "measured"


# --- experts that share their widths ---------------------------------------------------------------------------------


def prefer_by_model(plan: Plan) -> float:
    """The general model is best without compensation and cut globally, an expert with means and cut evenly."""
    if plan.name == "general":
        good = ("wifv", "none"), ("global", "group")
    else:
        good = ("wifv", "mean"), ("uniform", "none")
    return 1.0 - 0.2 * (repair_of(plan) == good[0]) - 0.4 * (kind_of(plan) == good[1])


def test_experts_that_share_have_the_general_models_widths_and_repairs_of_their_own(judge):
    judge.divergence = prefer_by_model
    planner = open_planner_of(SMALL, pruning={"ratio": 0.3})
    models = {model.spec.name: model for model in PlanChooser(planner, progress).plan_all()}
    general = models["general"].export.plan

    assert kind_of(general) == ("global", "group") and repair_of(general) == ("wifv", "none")
    for task in TASKS:
        plan = models[task].export.plan
        assert plan.shapes == general.shapes and kind_of(plan) == kind_of(general)
        assert repair_of(plan) == ("wifv", "mean")
        assert plan.kept != general.kept, "which units stay is the expert's own choice"
        assert rows_of(models[task]) == [(*repair, "uniform", "none") for repair in REPAIRS[1:]]
    # Repairs of three models, then allocations of one.
    assert len(judge.plans) == 3 * 3 + len(ALLOCATIONS) * 2
    assert {plan.name for plan in judge.plans[9:]} == {"general"}


def test_experts_that_do_not_share_have_widths_of_their_own(judge):
    judge.divergence = prefer_by_model
    planner = open_planner_of(SMALL, pruning={"ratio": 0.3, "allocation": {"shared": False}})
    models = {model.spec.name: model.export.plan for model in PlanChooser(planner, progress).plan_all()}
    assert kind_of(models["general"]) == ("global", "group")
    for task in TASKS:
        assert kind_of(models[task]) == ("uniform", "none") and repair_of(models[task]) == ("wifv", "mean")
        assert len(judge.plans_of(task)) == 3 + len(ALLOCATIONS) * 2


@pytest.mark.parametrize("shared", [True, False])
def test_experts_under_measured_share_unless_each_has_its_own(judge, shared):
    planner = open_planner_of(SMALL, pruning={**FIXED, "allocation": {"kind": "measured", "shared": shared}})
    chooser = PlanChooser(planner, progress)
    plans = [chooser.plan_model(spec_of(planner, name), 0.3).export.plan for name in ("general", *TASKS)]
    measured = {exports_of(trial)[0].plan.name for trial in judge.trials}
    assert measured == ({"general"} if shared else {"general", *TASKS})
    assert {kind_of(plan) for plan in plans} == {("measured", "group")}
    if shared:
        assert len({plan.shapes for plan in plans}) == 1


def test_experts_share_the_widths_of_a_general_model_with_the_experts_settings(judge):
    """The general model is cut evenly; what the experts share is judged on all tasks' tokens all the same."""
    judge.divergence = lambda plan: 0.5 if kind_of(plan)[0] == "global" else 1.0
    planner = open_planner_of(SMALL, pruning={"ratio": 0.3, "general": {"allocation": "uniform"}})
    models = {model.spec.name: model.export.plan for model in PlanChooser(planner, progress).plan_all()}
    assert kind_of(models["general"]) == ("uniform", "group")
    assert models["sort"].shapes == models["facts"].shapes != models["general"].shapes
    assert kind_of(models["sort"])[0] == "global"
    (common,) = [trial for trial in judge.trials if len(exports_of(trial)) == len(ALLOCATIONS) * 2]
    assert len(common.trials) == 2


def test_scores_and_compensations_of_all_models_are_measured_at_once(judge):
    planner = open_planner_of(SMALL, pruning={"ratio": [0.2, 0.3]})
    PlanChooser(planner, progress).plan_all()
    names = [(exports_of(trial)[0].plan.name, exports_of(trial)[0].plan.requested) for trial in judge.calls[0]]
    assert names == [(name, ratio) for ratio in (0.2, 0.3) for name in ("general", *TASKS)]


# --- ratios that not every plan can meet -----------------------------------------------------------------------------


def test_plans_that_cannot_meet_the_ratio_are_left_out(judge):
    """The MLP alone cannot give this much, so all plans cut attention, those of the repairs as well."""
    planned = choose(ratio=BEYOND_THE_MLP, pruning={"align": 8})
    assert {row[3] for row in rows_of(planned)} == {"group"}
    assert rows_of(planned) == [
        *((*repair, "uniform", "group") for repair in REPAIRS[1:]),
        *(("wifv", "mean", kind, "group") for kind in ALLOCATIONS),
    ]
    assert all(kind_of(exports_of(trial)[0].plan)[1] == "group" for trial in judge.trials), "nothing else is measured"


@pytest.mark.parametrize(
    "pruning",
    [{}, {"attention_unit": "none"}, {"attention_unit": "none", "allocation": {"kind": "logistic"}}, FIXED],
    ids=str,
)
def test_a_ratio_that_no_plan_can_meet_is_refused_before_anything_is_measured(judge, pruning):
    ratio = BEYOND_THE_MLP if pruning.get("attention_unit") == "none" else 0.95
    planner = open_planner_of(SMALL, pruning={**pruning, "ratio": ratio, "align": 8})
    with pytest.raises(ConfigError, match=f"pruning.ratio: {ratio} is beyond what"):
        PlanChooser(planner, progress).plan_all()
    assert not judge.trials


def test_one_impossible_ratio_of_several_is_refused_before_anything_is_measured(judge):
    planner = open_planner_of(SMALL, pruning={"ratio": [0.3, 0.95]})
    with pytest.raises(ConfigError, match=r"pruning.ratio: 0.95 is beyond what"):
        PlanChooser(planner, progress).plan_all()
    assert not judge.trials


# --- stock checkpoints -----------------------------------------------------------------------------------------------


def test_of_a_stock_checkpoint_only_plans_of_equal_widths_are_judged(judge):
    architecture = architecture_of(
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=2,
        intermediate_size=40,
    )
    planned = choose(architecture=architecture, export={"format": "stock"}, pruning={"align": 4})
    kinds = {row[2] for row in rows_of(planned)}
    assert {"measured", "uniform"} == kinds
    for trial in judge.trials:
        for export in exports_of(trial):
            assert len(set(export.plan.shapes)) == 1
    assert len(set(planned.export.plan.shapes)) == 1 and planned.export.stock


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_judged_figures_are_in_the_plans_file_and_do_not_make_another_checkpoint(judge, dense, tmp_path):
    checkpoint = Checkpoint.open(str(dense("qwen2")))
    planner = open_planner_of(checkpoint.architecture, checkpoint)
    run = Run(tmp_path)
    planned = PlanChooser(planner, progress).plan_model(spec_of(planner, "sort"), 0.3)
    plan = planned.export.plan

    save_plan(plan, checkpoint.architecture, tmp_path / "sort.json")
    written = read_json(tmp_path / "sort.json")
    assert written["judged"] == list(plan.judged) and len(plan.judged) == 3
    assert set(written["judged"][0]) == {
        *("score", "compensation", "allocation", "attention_unit"),
        *("divergence", "stderr", "loss"),
    }

    silent = replace(planned, export=replace(planned.export, plan=replace(plan, judged=())))
    save_plan(silent.export.plan, checkpoint.architecture, tmp_path / "silent.json")
    assert "judged" not in read_json(tmp_path / "silent.json")
    same = prepare_checkpoint(planned, planner.config.export, run)
    assert prepare_checkpoint(silent, planner.config.export, run).fingerprint == same.fingerprint
    narrower = replace(plan, kept=plan.kept[::-1])
    other = replace(planned, export=replace(planned.export, plan=narrower))
    assert prepare_checkpoint(other, planner.config.export, run).fingerprint != same.fingerprint


def test_a_plan_that_was_chosen_is_the_one_that_its_settings_give(judge, dense, tmp_path):
    """Who fixes the settings that were chosen gets the same checkpoint, so nothing of the choice is lost."""
    judge.divergence = lambda plan: 0.5 if kind_of(plan) == ("global", "group") else 1.0
    checkpoint = Checkpoint.open(str(dense("qwen2")))
    planner = open_planner_of(checkpoint.architecture, checkpoint)
    chosen = PlanChooser(planner, progress).plan_model(spec_of(planner, "general"), 0.3)

    settings = chosen.spec.settings
    pruning = {
        "score": settings.score,
        "attention_unit": settings.attention_unit,
        "allocation": {"kind": settings.allocation},
        "general": {"compensation": settings.compensation},
    }
    fixed_planner = open_planner_of(checkpoint.architecture, checkpoint, pruning=pruning)
    judge.calls.clear()
    fixed = PlanChooser(fixed_planner, progress).plan_model(spec_of(fixed_planner, "general"), 0.3)
    assert not judge.trials
    export = planner.config.export
    first, second = (prepare_checkpoint(model, export, Run(tmp_path)) for model in (chosen, fixed))
    assert first.fingerprint == second.fingerprint


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["group", "none"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_plan_that_is_judged_or_taken_meets_the_target(judge, allocation, unit):
    judge.divergence = lambda plan: 0.5 if kind_of(plan) == (allocation, unit) else 1.0
    planner = open_planner_of(SMALL)
    stored = StoredSizes(SMALL.decoder_parameters + 900, 2 * SMALL.decoder_parameters + 1800, 2)
    settings = TargetSection.model_validate({"weights": int(0.75 * stored.n_bytes)})
    target = make_target(settings, SMALL, stored)
    assert target is not None
    # The planner's own would ask the files, which this checkpoint does not have.
    planner.__dict__["target"] = target
    chooser = PlanChooser(planner, progress)
    planned = [chooser.plan_model(spec_of(planner, name), 0.28) for name in ("general", TASKS[0])]

    plans = [*judge.plans, *(model.export.plan for model in planned)]
    assert {kind_of(plan) for plan in plans} >= {(kind, each) for kind in ALLOCATIONS for each in ("none", "group")}
    for plan in plans:
        assert target.limit - 2 * SMALL.channel_cost(SMALL.layers[0]) * SMALL.align("auto") < target.cost(
            plan.layers_after(SMALL)
        )
        assert target.cost(plan.layers_after(SMALL)) <= target.limit and plan.requested == 0.28
    # One engine holds the general model and the experts.
    assert planned[0].export.plan.shapes == planned[1].export.plan.shapes
