import numpy as np
import pytest

from seap_ray.config import Config
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.report.plots.activations import clusters_section
from seap_ray.report.plots.overlap import overlap_section
from seap_ray.report.plots.scores import scores_section, unit_scores
from seap_ray.report.plots.sparsity import sparsity_section
from seap_ray.report.run_data import RunData, StoredPlan
from seap_ray.storage.run import Run
from tests.support.made_run import ARCHITECTURE, TASKS, make_planner, make_run


@pytest.mark.parametrize("model", ["llama_gqa", "mixtral"])
def test_scores_are_those_that_the_plans_were_made_from(tmp_path, model):
    data = RunData.of(make_run(tmp_path / "demo", model=model))
    config = Config.model_validate(data.config)
    planner = make_planner(config, Run(tmp_path / "other"), model)
    architecture = planner.checkpoint.architecture
    for spec in (spec for spec in model_specs(config) if spec.kind != "baseline"):
        (plan,) = (plan for plan in data.plans[0.4] if plan.name == spec.name)
        scores = unit_scores(data, architecture, plan)
        for layer, (heads, channels) in enumerate(planner._column_scores(spec)):
            assert scores["heads"][layer] == pytest.approx(heads.numpy())
            assert scores["channels"][layer] == pytest.approx(channels.numpy().flatten())
            kept = plan.indices(layer, "channels")
            width = architecture.dense.channels
            of_experts = scores["channels"][layer].reshape(-1, width)
            for expert, score_C in enumerate(of_experts):
                best = np.argsort(score_C, kind="stable")[width - len(kept) // len(of_experts) :]
                assert set(kept[kept // width == expert]) == set(best + expert * width)
    section = scores_section(data)
    assert [panel.title for panel in section.figure.panels][:2] == ["general: channels", "arithmetic: channels"]


def test_the_papers_sum_of_scores_is_known_too(run):
    data = RunData.of(run)
    (plan,) = (plan for plan in data.plans[0.4] if plan.name == "general")
    summed = unit_scores(data, ARCHITECTURE, StoredPlan({**plan.metadata, "pooling": "score_average"}, plan.kept))
    alone = {
        task: unit_scores(data, ARCHITECTURE, StoredPlan({**plan.metadata, "tasks": {task: 1.0}}, plan.kept))
        for task in TASKS
    }
    for layer in range(ARCHITECTURE.n_layers):
        expected = sum(weight * alone[task]["heads"][layer] for task, weight in plan.metadata["tasks"].items())
        assert summed["heads"][layer] == pytest.approx(expected)


def test_the_bands_are_the_quantiles_of_the_scores(run):
    data = RunData.of(run)
    panel = scores_section(data).figure.panels[0]
    (plan,) = (plan for plan in data.plans[0.4] if plan.name == "general")
    channels = unit_scores(data, ARCHITECTURE, plan)["channels"]
    median, lowest = panel.series
    assert panel.title == "general: channels"
    for layer, score_C in enumerate(channels):
        ordered = np.sort(score_C)
        assert median.y[layer] == pytest.approx((ordered[39] + ordered[40]) / 2)
        (low, high), (below, above) = median.bands
        assert low[layer] <= below[layer] <= median.y[layer] <= above[layer] <= high[layer]
    for layer, value in zip(lowest.x, lowest.y, strict=True):
        assert value == pytest.approx(np.sort(channels[layer])[-len(plan.indices(layer, "channels"))])


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("plans/*/*", ["clusters"]),
        ("records/*/*", ["sparsity", "overlap", "scores"]),
        ("statistics/weight_norms.safetensors", ["sparsity", "overlap", "clusters"]),
        ("statistics/sort.safetensors", ["sparsity", "overlap", "clusters", "scores"]),
        ("model/config.json", []),
    ],
)
def test_a_picture_needs_its_files_and_no_others(tmp_path, gone, parts):
    run = make_run(tmp_path / "demo")
    for path in run.root.glob(gone):
        path.unlink()
    data = RunData.of(run)
    makers = (sparsity_section, overlap_section, clusters_section, scores_section)
    assert [section.key for make in makers if (section := make(data))] == parts


WHOLE_EXPERTS = {
    "mlp_unit": "expert",
    "score": "reap",
    "allocation": {"kind": "uniform"},
    "attention_unit": "none",
    "baselines": {},
}


@pytest.mark.parametrize("score", ["reap", "energy"])
def test_where_whole_experts_go_their_scores_and_shares_are_shown(tmp_path, score):
    data = RunData.of(make_run(tmp_path / "demo", model="qwen3_moe", pruning={**WHOLE_EXPERTS, "score": score}))
    architecture = data.architecture
    for plan in data.plans[0.4]:
        experts = unit_scores(data, architecture, plan)["experts"]
        for layer, score_E in enumerate(experts):
            kept = plan.indices(layer, "experts")
            assert 2 <= len(kept) < 6 and set(np.argsort(score_E, kind="stable")[-len(kept) :]) == set(kept)
            assert plan.removed_shares("channels", architecture)[layer] == pytest.approx(1 - len(kept) / 6)
    section = scores_section(data)
    assert [panel.title for panel in section.figure.panels] == [
        f"{n}: experts" for n in ("general", TASKS[0], TASKS[-1])
    ]
    assert "of its experts in general" in section.finding
    assert sparsity_section(data) is not None and overlap_section(data) is not None
