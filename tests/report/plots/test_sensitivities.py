import pytest

from seap_ray.report.plots.sensitivities import sensitivities_section
from seap_ray.report.run_data import RunData
from tests.support.made_run import RATIOS, edit


def test_a_run_without_measured_costs_has_no_sensitivities(run):
    assert sensitivities_section(RunData.of(run)) is None


def test_cells_are_the_costs_of_the_plan_that_was_taken_and_whole_sites_are_empty(judged):
    data = RunData.of(judged)
    section = sensitivities_section(data)
    first, second, _ = section.figure.panels
    (general,) = (plan for plan in data.plans[RATIOS[0]] if plan.kind == "general")
    assert first.title.startswith("20 % removed") and second.title.startswith("40 % removed")
    assert first.columns == ["attention", "MLP"] and first.values[0][0] is None
    for row, costs in zip(first.values, general.metadata["predicted"], strict=True):
        assert row[1] == pytest.approx(1000 * costs["mlp"])
    assert first.scale == (0, max(cell for row in first.values for cell in row if cell))

    total = sum(sum(costs.values()) for costs in general.metadata["predicted"])
    assert f"with 20 % removed, the cuts of general cost {total:.2g} nats".capitalize() in section.finding


def test_every_judged_plan_with_a_prediction_is_a_point_and_those_that_were_taken_have_a_ring(judged):
    chart = sensitivities_section(RunData.of(judged)).figure.panels[-1]
    by_label = {series.label: series for series in chart.series}
    assert list(by_label) == ["as predicted", "measured", "uniform", "logistic", "global", "chosen"]
    assert len(by_label["measured"].x) == 2 * len(RATIOS)
    assert {*by_label["chosen"].y} <= {*by_label["logistic"].y} and len(by_label["chosen"].y) == len(RATIOS)
    assert by_label["as predicted"].x == by_label["as predicted"].y


def test_costs_without_a_judged_plan_are_shown_alone(judged):
    for path in judged.root.glob("plans/*/*.json"):
        edit(path, lambda plan: plan.pop("judged"))
    assert len(sensitivities_section(RunData.of(judged)).figure.panels) == len(RATIOS)
