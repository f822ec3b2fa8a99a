import pytest

from seap_ray.report.run_data import RunData
from tests.support.made_run import REPORT_STUDIES, judge_plans, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the main job; a test that changes files takes ``own_run``."""
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def own_run(tmp_path):
    return make_run(tmp_path / "demo")


@pytest.fixture
def judged(own_run):
    """A run whose plans say what was judged."""
    judge_plans(own_run)
    return own_run


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """What a run with every study says."""
    return RunData.of(make_run(tmp_path_factory.mktemp("runs") / "demo", studies=REPORT_STUDIES))
