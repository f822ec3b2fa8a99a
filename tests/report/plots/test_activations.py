import numpy as np
import pytest
from sklearn.decomposition import PCA

from seap_ray.report.plots.activations import (
    clusters_section,
    nearest_of_same_label,
    principal_components,
    standardised,
)
from seap_ray.report.run_data import RunData
from tests.support.made_run import TASKS, make_run


def test_principal_components_are_those_of_scikit_learn():
    x_PD = standardised(np.random.default_rng(0).normal(size=(12, 30)) * np.arange(1, 31))
    at_P2, explained = principal_components(x_PD)
    pca = PCA(2, svd_solver="full").fit(x_PD)
    assert np.abs(at_P2) == pytest.approx(np.abs(pca.transform(x_PD)))
    assert explained == pytest.approx(pca.explained_variance_ratio_)
    assert (at_P2[np.abs(at_P2).argmax(0), [0, 1]] > 0).all()
    assert principal_components(-x_PD)[0] == pytest.approx(at_P2), (
        "the picture does not depend on a component's free sign"
    )


def test_a_channel_that_never_changes_says_nothing():
    x_PD = standardised(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert x_PD.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_neighbours_count_only_for_tasks_with_several_shards():
    x_PD = np.array([[0.0], [0.1], [1.0], [1.05], [1.1], [9.0]])
    labels = ["a", "a", "b", "a", "b", "c"]
    assert nearest_of_same_label(x_PD, labels) == pytest.approx(2 / 5)
    assert nearest_of_same_label(x_PD[:2], ["a", "b"]) is None


def test_shards_of_tasks_that_activate_otherwise_lie_apart(run):
    section = clusters_section(RunData.of(run))
    assert [panel.title for panel in section.figure.panels] == ["layer 0", "layer 2", "layer 3"]
    assert "100 % in layer 0, 100 % in layer 2, 100 % in layer 3" in section.finding
    for panel in section.figure.panels:
        assert [(series.label, len(series.x)) for series in panel.series] == [(task, 3) for task in TASKS]


def test_a_task_with_one_shard_is_one_point(run, tmp_path):
    other = make_run(tmp_path / "demo")
    for path in sorted(other.records("sort").iterdir())[1:]:
        path.unlink()
    section = clusters_section(RunData.of(other))
    assert {series.label: len(series.x) for series in section.figure.panels[0].series}["sort"] == 1
