import pytest

from seap_ray.report.plots.transfer import transfer_section
from seap_ray.report.run_data import RunData
from tests.support.made_run import RATIOS, TASKS, edit


def model_of(data, name, ratio):
    return next(m for m in data.main.models if m.name == name and m.ratio == ratio)


def test_transfer_is_relative_to_dense_with_own_tasks_framed(run):
    data = RunData.of(run)
    section = transfer_section(data)
    for ratio, panel in zip(RATIOS, section.figure.panels, strict=True):
        assert panel.rows == [*TASKS, "general"]
        assert panel.framed == {(0, 0), (1, 1), (2, 2)}
        for name, row in zip(panel.rows, panel.values, strict=True):
            dense = data.dense.quality
            quality = model_of(data, name, ratio).quality
            assert row == pytest.approx([quality[task].value / dense[task].value for task in TASKS])


def test_transfer_turns_a_perplexity_round_and_leaves_failed_cells_empty(own_run):
    def change(results):
        for i, model in enumerate(results["models"]):
            model["quality"]["prose"] = {"metric": "perplexity", "value": 10.0 + i, "stderr": 0.1, "n": 9}
        results["models"][2]["quality"]["sort"] = {"error": "no room"}

    edit(own_run.results, change)
    panel = transfer_section(RunData.of(own_run)).figure.panels[0]
    assert panel.values[0][1] is None
    assert panel.values[0][2] == pytest.approx(10 / 12)
