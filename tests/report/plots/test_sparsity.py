import numpy as np
import pytest

from seap_ray.core.architecture import Architecture
from seap_ray.report.charts import Chart, HeatMap
from seap_ray.report.plots.sparsity import sparsity_section
from seap_ray.report.run_data import RunData, StoredPlan
from seap_ray.storage.files import write_json
from tests.support.builders import CONFIGS
from tests.support.made_run import ARCHITECTURE, RATIOS, TASKS, edit, make_run


def test_what_the_layers_are_asked_for_averages_to_the_ratio_and_what_they_give_is_the_plans(run):
    data = RunData.of(run)
    section = sparsity_section(data)
    charts = [panel for panel in section.figure.panels if isinstance(panel, Chart)]
    assert [panel.title for panel in charts] == [
        f"{site}, {100 * ratio:g} % removed" for ratio in RATIOS for site in ("attention", "MLP")
    ]
    for ratio, panel in zip(RATIOS, charts[1::2], strict=True):
        by_label = {series.label: series.y for series in panel.series}
        assert np.mean(by_label["requested"]) == pytest.approx(100 * ratio)
        (general,) = (plan for plan in data.plans[ratio] if plan.kind == "general")
        kept = [len(general.indices(layer, "channels")) for layer in range(ARCHITECTURE.n_layers)]
        assert by_label["general"] == pytest.approx([100 * (1 - n / ARCHITECTURE.dense.channels) for n in kept])


def test_an_allocation_that_follows_the_scores_asks_for_nothing_beforehand(run, tmp_path):
    other = make_run(tmp_path / "demo")
    for path in other.root.glob("plans/*/*.json"):
        edit(path, lambda plan: plan["allocation"].update(kind="global"))
    section = sparsity_section(RunData.of(other))
    charts = [panel for panel in section.figure.panels if isinstance(panel, Chart)]
    assert {series.label for panel in charts for series in panel.series} == {"experts", "general"}
    assert "dashed" in sparsity_section(RunData.of(run)).how_to_read and "dashed" not in section.how_to_read


def test_maps_have_every_layers_shares_and_models_that_are_cut_alike_one_pair_of_columns(run, tmp_path):
    (first, _) = [panel for panel in sparsity_section(RunData.of(run)).figure.panels if isinstance(panel, HeatMap)]
    # Under the logistic curve the widths are the same for all models, but for the biases of some.
    assert first.columns == ["attention", "MLP"] or all(" " in name for name in first.columns)
    assert first.rows == [str(layer) for layer in range(ARCHITECTURE.n_layers)]

    other = make_run(tmp_path / "demo")
    for path in (other.plan(RATIOS[0], name) for name in (*TASKS, "general")):
        edit(path, lambda plan: [layer.update(heads=8, channels=40) for layer in plan["layers"]])
    edit(other.plan(RATIOS[0], "sort"), lambda plan: plan["layers"][1].update(channels=20, heads=4))

    first = next(panel for panel in sparsity_section(RunData.of(other)).figure.panels if isinstance(panel, HeatMap))
    assert len(first.columns) == 4 and {"sort attention", "sort MLP"} <= {*first.columns}
    (sort,) = (i for i, name in enumerate(first.columns) if name == "sort MLP")
    assert [row[sort] for row in first.values] == [50, 75, 50, 50]


def test_shares_are_of_a_layers_own_units_and_of_each_expert_of_a_mixture():
    config = {**CONFIGS["mixtral"]().to_dict(), "model_type": "seap_mixtral"}
    narrow = {"1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}}
    architecture = Architecture.of({**config, "per_layer_config": narrow})
    plan = StoredPlan({"layers": [{"heads": 4, "channels": 20}] * 4}, {})
    assert plan.removed_shares("heads", architecture) == [0.5, 0, 0.5, 0.5]
    assert plan.removed_shares("channels", architecture) == [0.75, 0.5, 0.75, 0.75]


def test_what_the_models_were_cut_from_is_told_by_it_or_by_what_was_cut_from_a_dense_one(tmp_path):
    run = make_run(tmp_path / "demo")
    narrow = {"0": {"intermediate_size": 40}}
    compacted = {**CONFIGS["llama_gqa"]().to_dict(), "model_type": "seap_llama", "per_layer_config": narrow}

    def known(model_type, gone):
        write_json(run.root / "model" / "config.json", {**compacted, "model_type": model_type})
        folder = run.root / "experts" / "sort"
        write_json(folder / "config.json", compacted)
        write_json(folder / "seap.json", {"source": {"model_type": model_type}})
        edit(run.results, lambda results: results["models"][1].update(folder=str(folder)))
        if gone:
            (run.root / "model" / "config.json").unlink()
        return RunData.of(run).architecture

    assert known("seap_llama", gone=False).layers[0].shape.channels == 40
    assert known("llama", gone=True) == ARCHITECTURE
    assert known("seap_llama", gone=True) is None
