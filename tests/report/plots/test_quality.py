import math

import pytest

from seap_ray.report.plots.methods import MAX_METHODS
from seap_ray.report.plots.quality import quality_section
from seap_ray.report.run_data import RunData, mean_of
from tests.support.made_run import RATIOS, TASKS, edit


def model_of(data, name, ratio):
    return next(m for m in data.main.models if m.name == name and m.ratio == ratio)


def mean_accuracy(model):
    return sum(model.quality[task].value for task in TASKS) / len(TASKS)


def own_task_accuracy(data, ratio):
    return sum(model_of(data, task, ratio).quality[task].value for task in TASKS) / len(TASKS)


def test_quality_is_the_mean_accuracy_from_dense_on(run):
    data = RunData.of(run)
    (chart,) = quality_section(data).figure.panels
    assert [series.label for series in chart.series] == ["experts", "general", "uniform"]
    for series in chart.series[1:]:
        models = [model_of(data, "dense", None), *(model_of(data, series.label, r) for r in RATIOS)]
        means = [mean_accuracy(m) for m in models]
        assert series.x == pytest.approx([100 * m.realised_ratio for m in models])
        assert series.y == pytest.approx(means)
        assert series.errors[1] == pytest.approx([mean + 0.02 / math.sqrt(3) for mean in means])
    own = [own_task_accuracy(data, r) for r in RATIOS]
    assert chart.series[0].y[1:] == pytest.approx(own)
    assert f"With 40 % removed: experts {own[1]:.3f}" in quality_section(data).finding.replace("with", "With")


def test_perplexities_have_an_axis_of_their_own_and_their_error_is_a_factor(studied):
    accuracy, perplexity = quality_section(studied).figure.panels
    assert not accuracy.y_log and perplexity.y_log
    general = next(series for series in perplexity.series if series.label == "general")
    for low, value, high in zip(general.errors[0], general.y, general.errors[1], strict=True):
        assert value / low == pytest.approx(high / value) == pytest.approx(math.exp(0.015))
    models = [m for m in studied.studies["ratio"].models if m.name in ("dense", "general")]
    assert general.y == pytest.approx([m.quality["prose"].value for m in models])


def test_a_mean_with_a_failed_cell_is_none(own_run):
    edit(own_run.results, lambda results: results["models"][1]["quality"].update(sort={"error": "no room"}))
    data = RunData.of(own_run)
    assert mean_of(model_of(data, "general", 0.2), perplexity=False) is None
    general = next(s for s in quality_section(data).figure.panels[0].series if s.label == "general")
    assert len(general.x) == 2, "dense and the other ratio"


def test_of_many_methods_the_best_are_drawn_and_always_ours(own_run):
    def crowd(results):
        uniform = [m for m in results["models"] if m["name"] == "uniform"]
        for i in range(20):
            quality = {task: {"metric": "exact_match", "value": i / 20, "stderr": 0.0, "n": 9} for task in TASKS}
            results["models"] += [{**m, "name": f"m{i}", "method": f"m{i}", "quality": quality} for m in uniform]

    edit(own_run.results, crowd)
    (chart,) = quality_section(RunData.of(own_run)).figure.panels
    labels = [series.label for series in chart.series]
    assert labels[:2] == ["experts", "general"] and len(labels) == MAX_METHODS
    assert {"m19", "m18", "m17"} < set(labels) and "m0" not in labels
