import pytest

from seap_ray.report.plots.router import router_section
from seap_ray.report.run_data import RunData
from tests.support.made_run import TASKS, edit


def test_confusion_is_shares_of_each_tasks_prompts(own_run):
    edit(own_run.results, lambda results: results["router"]["confusion"].update(sort={"sort": 30, "prose": 10}))
    confusion, coverage = router_section(RunData.of(own_run)).figure.panels
    assert confusion.columns == [*TASKS, "general"] and confusion.rows == list(TASKS)
    assert confusion.values[1] == [None, 0.75, 0.25, None]
    assert confusion.values[0] == [0.95, None, None, 0.05]
    assert [series.label for series in coverage.series] == [
        "right expert, of those sent",
        "sent to an expert",
        "threshold in use",
    ]


@pytest.mark.parametrize("router", [None, {"n": 0}])
def test_without_held_out_prompts_there_is_no_router_to_show(own_run, router):
    edit(own_run.results, lambda results: results.update(router=router))
    assert router_section(RunData.of(own_run)) is None
