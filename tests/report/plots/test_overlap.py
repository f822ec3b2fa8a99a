import random
from itertools import combinations, product

import numpy as np
import pytest

from seap_ray.report.plots.overlap import Overlap, overlap_section
from seap_ray.report.run_data import RunData, StoredPlan
from tests.support.made_run import TASKS


def random_plan(rng, groups):
    kept = {}
    for layer, unit, width in groups:
        kept[f"layers.{layer}.{unit}"] = np.array(sorted(rng.sample(range(width), rng.randint(1, width))))
    return StoredPlan({"name": f"{rng.random()}"}, kept)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_intersection_over_union_of_sets(seed):
    rng = random.Random(seed)
    groups = [(layer, unit, width) for layer in range(3) for unit, width in (("heads", 6), ("channels", 20))]
    plans = [random_plan(rng, groups) for _ in range(4)]
    sets = [{(layer, unit, int(i)) for layer, unit, _ in groups for i in plan.indices(layer, unit)} for plan in plans]
    found = Overlap.of(plans, groups)
    for a, b in product(range(4), repeat=2):
        assert found.jaccard_MM[a, b] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]), abs=1e-12)
    pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    assert found.mean == pytest.approx(sum(pairs) / len(pairs))


def test_chance_is_the_mean_intersection_of_all_choices_of_units():
    groups = [(0, "heads", 4), (0, "channels", 5)]
    sizes = (2, 3), (1, 4)
    choices = [
        [
            set(h) | {10 + c for c in channels}
            for h, channels in product(combinations(range(4), n), combinations(range(5), m))
        ]
        for n, m in sizes
    ]
    both = np.mean([len(a & b) for a, b in product(*choices)])
    plans = [
        StoredPlan({"name": ""}, {"layers.0.heads": np.arange(n), "layers.0.channels": np.arange(m)}) for n, m in sizes
    ]
    assert Overlap.of(plans, groups).chance_MM[0, 1] == pytest.approx(both / (2 + 3 + 1 + 4 - both))


def test_layers_that_are_gone_in_all_models_have_no_overlap():
    empty = {"layers.0.heads": np.array([], int)}
    found = Overlap.of([StoredPlan({"name": "a"}, empty), StoredPlan({"name": "b"}, empty)], [(0, "heads", 4)])
    assert np.isnan(found.jaccard_MM).all()


def test_the_overlap_picture_is_of_the_plans_on_disk(run):
    section = overlap_section(RunData.of(run))
    plans = RunData.of(run).plans[0.4]
    sets = {
        plan.name: {(key, int(i)) for key, kept in plan.kept.items() if "groups" not in key for i in kept}
        for plan in plans
    }
    panel = section.figure.panels[1]
    assert panel.rows[-1] == "general" and set(panel.rows) == {*TASKS, "general"}
    for (i, a), (j, b) in product(enumerate(panel.rows), repeat=2):
        assert panel.values[i][j] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]))
