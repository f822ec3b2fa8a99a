"""Plans: the best units for given widths, and what a plan says of the checkpoint that it leaves."""

import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seap_ray
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan, keep

often = settings(max_examples=60, deadline=None)
DEMO = Architecture.of(json.loads((Path(seap_ray.__file__).parent / "demo" / "model" / "config.json").read_text()))


@st.composite
def layers(draw):
    """A dense shape, a narrower one, and whole-number scores, whose sums are exact, with ties among them."""
    dense = Shape(draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 30)))
    shape = Shape(*(draw(st.integers(1, n)) for n in (dense.groups, dense.heads_per_group, dense.channels)))
    some = st.integers(0, 12)
    heads = draw(st.lists(some, min_size=dense.heads, max_size=dense.heads))
    channels = draw(st.lists(some, min_size=dense.channels, max_size=dense.channels))
    return dense, shape, torch.tensor(heads, dtype=torch.float64), torch.tensor(channels, dtype=torch.float64)


@given(layers())
@often
def test_kept_heads_lie_in_kept_groups_equally_many_in_each_and_ascending(layer):
    dense, shape, head_H, channel_C = layer
    kept = keep(shape, dense, head_H, channel_C)
    assert kept.shape == shape
    for indices, n in ((kept.groups, dense.groups), (kept.heads, dense.heads), (kept.channels[0], dense.channels)):
        assert list(indices) == sorted(set(indices))
        assert all(0 <= index < n for index in indices)
    of_group = [head // dense.heads_per_group for head in kept.heads]
    assert of_group == [group for group in kept.groups for _ in range(shape.heads_per_group)]


@given(layers())
@often
def test_nothing_that_is_cut_scores_higher_than_what_is_kept(layer):
    dense, shape, head_H, channel_C = layer
    kept, per_group = keep(shape, dense, head_H, channel_C), dense.heads_per_group

    def best_is_kept(score, indices):
        cut = [score[i] for i in range(len(score)) if i not in indices]
        assert not cut or max(cut) <= min(score[i] for i in indices)

    best_is_kept(channel_C.tolist(), kept.channels[0])
    of_group = [sorted(head_H.tolist()[k * per_group : (k + 1) * per_group]) for k in range(dense.groups)]
    best_is_kept([sum(heads[-shape.heads_per_group :]) for heads in of_group], kept.groups)
    for group in kept.groups:
        inside = [head - group * per_group for head in kept.heads if head // per_group == group]
        best_is_kept(head_H.tolist()[group * per_group : (group + 1) * per_group], inside)


@given(layers(), st.sampled_from([2.0**-40, 0.5, 3.0, 1e6, 2.0**40]))
@often
def test_units_do_not_change_when_all_scores_are_scaled(layer, scale):
    dense, shape, head_H, channel_C = layer
    assert keep(shape, dense, scale * head_H, scale * channel_C) == keep(shape, dense, head_H, channel_C)


def test_ties_go_to_the_higher_index():
    dense, shape = Shape(4, 3, 10), Shape(2, 2, 4)
    expected = Kept((2, 3), (7, 8, 10, 11), ((6, 7, 8, 9),))
    assert keep(shape, dense, torch.ones(12), torch.ones(10)) == expected
    assert keep(shape, dense, torch.zeros(12), torch.zeros(10)) == expected


def test_each_expert_keeps_its_own_best_channels_and_all_are_equally_wide():
    generator = torch.Generator().manual_seed(0)
    score_EC = torch.rand(3, 8, generator=generator)
    kept = keep(Shape(2, 1, 5), Shape(2, 1, 8), torch.tensor([1.0, 2.0]), score_EC)
    assert len(kept.channels) == 3 and kept.shape == Shape(2, 1, 5)
    for expert in range(3):
        best = score_EC[expert].topk(5).indices.sort().values
        alone = kept.of_moe_expert(expert)
        assert alone.channels == (tuple(best.tolist()),) and alone.shape == kept.shape
    assert kept.of_moe_expert(None) is kept


def test_a_plan_without_some_layers_knows_the_ones_that_stay_and_its_ratio():
    plan = Plan("x", 0.25, COMPENSATIONS["none"], (Kept.whole(DEMO, 0),) * 6, {}, dropped=(2, 5))
    assert plan.layers == (0, 1, 3, 4, 6, 7)
    assert plan.shapes == (DEMO.dense,) * 6
    assert plan.planned(DEMO) == 0.25
    assert not any(plan.cuts(layer, DEMO) for layer in range(6))
    assert Plan("x", 0.25, COMPENSATIONS["none"], (Kept.whole(DEMO, 0),) * 8, {}).layers == tuple(range(8))
