import random
from itertools import combinations, product

import numpy as np
import pytest

from seap_ray.report.plots.layers import unit_groups
from seap_ray.report.plots.overlap import Overlap, overlap_section
from seap_ray.report.run_data import RunData, StoredPlan
from tests.support.made_run import ARCHITECTURE, TASKS


def random_plan(rng, groups):
    kept = {}
    for layer, unit, width in groups:
        kept[f"layers.{layer}.{unit}"] = np.array(sorted(rng.sample(range(width), rng.randint(1, width))))
    return StoredPlan({"name": f"{rng.random()}"}, kept)


def units_of(plan, groups):
    units = set()
    for layer, unit, _ in groups:
        units |= {(layer, unit, int(i)) for i in plan.indices(layer, unit)}
    return units


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_intersection_over_union_of_sets(seed):
    rng = random.Random(seed)
    groups = [(layer, unit, width) for layer in range(3) for unit, width in (("heads", 6), ("channels", 20))]
    plans = [random_plan(rng, groups) for _ in range(4)]
    sets = [units_of(plan, groups) for plan in plans]
    overlap = Overlap.of(plans, groups)
    for a, b in product(range(4), repeat=2):
        assert overlap.jaccard_MM[a, b] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]), abs=1e-12)
    pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    assert overlap.mean == pytest.approx(sum(pairs) / len(pairs))


def choices_of(n_heads, n_channels):
    """Every set of so many of 4 heads and so many of 5 channels."""
    for heads, channels in product(combinations(range(4), n_heads), combinations(range(5), n_channels)):
        yield {*heads, *(10 + channel for channel in channels)}


def test_chance_is_the_mean_intersection_of_all_choices_of_units():
    groups = [(0, "heads", 4), (0, "channels", 5)]
    sizes = (2, 3), (1, 4)
    choices = [list(choices_of(n, m)) for n, m in sizes]
    both = np.mean([len(a & b) for a, b in product(*choices)])
    plans = [
        StoredPlan({"name": ""}, {"layers.0.heads": np.arange(n), "layers.0.channels": np.arange(m)}) for n, m in sizes
    ]
    assert Overlap.of(plans, groups).chance_MM[0, 1] == pytest.approx(both / (2 + 3 + 1 + 4 - both))


def test_layers_that_are_gone_in_all_models_have_no_overlap():
    empty = {"layers.0.heads": np.array([], int)}
    overlap = Overlap.of([StoredPlan({"name": "a"}, empty), StoredPlan({"name": "b"}, empty)], [(0, "heads", 4)])
    assert np.isnan(overlap.jaccard_MM).all()


def test_the_overlap_picture_is_of_the_plans_on_disk(run):
    section = overlap_section(RunData.of(run))
    plans = RunData.of(run).plans[0.4]
    groups = unit_groups(ARCHITECTURE, "heads") + unit_groups(ARCHITECTURE, "channels")
    sets = {plan.name: units_of(plan, groups) for plan in plans}
    panel = section.figure.panels[1]
    assert panel.rows[-1] == "general" and set(panel.rows) == {*TASKS, "general"}
    for (i, a), (j, b) in product(enumerate(panel.rows), repeat=2):
        assert panel.values[i][j] == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]))
