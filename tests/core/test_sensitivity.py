"""Sensitivities: rises of the loss at widths between, beyond and at the measured ones."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig

from seap_ray.config import PruningSection
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.sensitivity import Ladder, Rise, Sensitivities
from seap_ray.core.widths import WidthConstraints

often = settings(max_examples=100, deadline=None)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA = Architecture.of(LlamaConfig(**SMALL, intermediate_size=160).to_dict())
CHANNELS = (160, 128, 96, 64, 32, 16)


def mlp(channels, whole=LLAMA.dense):
    return Shape(whole.groups, whole.heads_per_group, channels)


def ladder(rises, layer=0):
    """A ladder of MLP widths: {channels: (mean, standard error)}."""
    return Ladder(layer, "mlp", tuple(map(mlp, rises)), tuple(Rise(*rise) for rise in rises.values()))


def at(rises, channels=CHANNELS):
    return Sensitivities((ladder(rises),)).rises(LLAMA, 0, "mlp", [mlp(n) for n in channels])


RISES = st.dictionaries(
    st.sampled_from([144, 120, 96, 80, 48, 16]),
    st.tuples(st.floats(-1, 3), st.floats(0, 0.5)),
    min_size=1,
)


def test_rises_are_linear_between_measured_widths_and_grow_with_the_square_beyond():
    rises = at({128: (0.1, 0.01), 64: (0.5, 0.01)}, [160, 144, 128, 96, 64, 32])
    assert rises == pytest.approx([0, 0.05, 0.1, 0.3, 0.5, 0.5 * (128 / 96) ** 2])
    # Where the last line is steeper than that, it goes on.
    steep = at({96: (0.01, 0.0), 64: (0.5, 0.0)}, [64, 32])
    assert steep == pytest.approx([0.5, 0.99]) and 0.99 > 0.5 * (128 / 96) ** 2
    # One width is enough.
    assert at({80: (0.4, 0.0)}, [160, 120, 80, 40]) == pytest.approx([0, 0.2, 0.4, 0.9])


@given(rises=RISES)
@often
def test_rises_are_convex_monotone_and_at_most_those_measured(rises):
    widths = range(160, 0, -1)
    curve = at(rises, widths)
    assert curve[0] == 0
    steps = [narrow - wide for wide, narrow in pairwise(curve)]
    assert all(step >= -1e-12 for step in steps)
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(steps))
    # A width counts its own rise, its noise, or what a wider one counts already.
    for n in rises:
        counted = [Rise(*rises[wide]).counted for wide in rises if wide >= n]
        assert curve[160 - n] <= max(counted) + 1e-9
    narrowest = min(rises)
    assert curve[160 - narrowest] == pytest.approx(max(Rise(*rise).counted for rise in rises.values()))


@given(rises=RISES, means=st.lists(st.floats(-5, 1), min_size=6, max_size=6))
@often
def test_a_rise_below_its_noise_counts_its_noise_whatever_it_is(rises, means):
    other = {}
    for (n, (mean, stderr)), share in zip(rises.items(), means, strict=False):
        other[n] = (mean if mean > 2 * stderr else 2 * stderr * share, stderr)
    assert at(other) == at(rises)


def test_what_only_seems_free_costs_its_noise():
    assert at({96: (-0.008, 0.01)}, [96]) == [0.02]
    assert at({96: (0.019, 0.01)}, [96]) == [0.02]
    assert at({96: (0.021, 0.01)}, [96]) == [0.021]


def test_a_curve_is_over_weights_so_attention_and_mlp_count_their_own():
    whole = LLAMA.dense
    shapes = tuple(Shape(n, 2, 160) for n in (4, 2))
    several = Sensitivities((Ladder(1, "attn", shapes, (Rise(0.0, 0.0), Rise(0.3, 0.0))),))
    assert several.rises(LLAMA, 1, "attn", [Shape(n, 2, 7) for n in (4, 3, 2, 1)]) == pytest.approx(
        [0, 0.15, 0.3, 0.3 * 1.5**2]
    )
    assert several.rises(LLAMA, 1, "mlp", [whole]) == [0]
    with pytest.raises(ValueError, match="channels of mlp of layer 1 was not measured"):
        several.rises(LLAMA, 1, "mlp", [mlp(96)])


def test_groups_and_heads_are_measured_apart():
    shapes = (Shape(3, 2, 160), Shape(4, 1, 160))
    several = Sensitivities((Ladder(0, "attn", shapes, (Rise(0.1, 0.0), Rise(0.7, 0.0))),))
    assert several.rises(LLAMA, 0, "attn", shapes) == pytest.approx([0.1, 0.7])
    only_groups = Sensitivities((Ladder(0, "attn", shapes[:1], (Rise(0.1, 0.0),)),))
    with pytest.raises(ValueError, match="heads of attn of layer 0 was not measured"):
        only_groups.rises(LLAMA, 0, "attn", shapes)
    with pytest.raises(ValueError, match="is no cut of groups, of heads or of channels"):
        several.rises(LLAMA, 0, "attn", [Shape(3, 1, 160)])


def test_a_mixture_has_one_ladder_for_all_its_experts():
    mixture = Architecture.of(MixtralConfig(**SMALL, intermediate_size=160, num_local_experts=4).to_dict())
    rises = Sensitivities((ladder({80: (0.2, 0.0)}),)).rises(mixture, 0, "mlp", [mlp(n) for n in (160, 120, 80)])
    assert rises == pytest.approx([0, 0.1, 0.2])


def test_the_mean_of_tasks_has_the_standard_error_of_a_mean():
    rises = [Rise(0.1, 0.03), Rise(0.3, 0.04)]
    assert Rise.mean_of(rises, [1, 1]).mean == pytest.approx(0.2)
    assert Rise.mean_of(rises, [1, 1]).stderr == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert Rise.mean_of(rises, [6, 2]).mean == pytest.approx(0.15)


def test_contexts_count_by_their_logarithms_and_never_below_their_noise():
    one = Sensitivities((ladder({96: (0.1, 0.01)}), ladder({96: (0.5, 0.0)}, 1)))
    two = Sensitivities((ladder({96: (0.4, 0.04)}),))
    mean = Sensitivities.geometric_mean([one, two])
    assert mean[0, "mlp"].rises[0].mean == pytest.approx(0.2)
    assert mean[0, "mlp"].rises[0].stderr == pytest.approx(0.2 * math.hypot(0.1, 0.1) / 2)
    assert mean[1, "mlp"].rises[0].mean == pytest.approx(0.5), "a site counts where it was cut"
    noisy = Sensitivities((ladder({96: (-0.3, 0.05)}),))
    assert Sensitivities.geometric_mean([noisy])[0, "mlp"].rises[0].mean == pytest.approx(0.1)
    free = Sensitivities((ladder({96: (-0.3, 0.0)}),))
    assert Sensitivities.geometric_mean([free, one])[0, "mlp"].rises[0].mean == 0
    with pytest.raises(ValueError, match="different widths"):
        Sensitivities.geometric_mean([one, Sensitivities((ladder({80: (0.1, 0.03)}),))])


def test_a_cost_is_spread_over_all_widths_by_the_score_that_they_lose():
    constraints_L = WidthConstraints.of(LLAMA, PruningSection(align=32), adds_biases=False)
    channel_C = torch.arange(160.0)
    head_H = torch.tensor([1.0, 1, 5, 5, 2, 2, 9, 9])
    cut = Shape(3, 2, 128)
    costs = {(0, "mlp"): Rise(0.3, 0.01), (0, "attn"): Rise(0.2, 0.0)}
    several = Sensitivities.of_costs(constraints_L, [(head_H, channel_C)], [cut], costs)

    lost = sum(range(32))
    for shape, rise in zip(several[0, "mlp"].shapes, several[0, "mlp"].rises, strict=True):
        factor = sum(range(160 - shape.channels)) / lost
        assert rise.mean == pytest.approx(0.3 * factor)
        assert rise.stderr == pytest.approx(0.01 * factor)
    assert [shape.groups for shape in several[0, "attn"].shapes] == [3, 2, 1]
    assert [rise.mean for rise in several[0, "attn"].rises] == pytest.approx([0.2, 0.2 * 6 / 2, 0.2 * 16 / 2])


def test_units_without_score_cost_by_their_weights():
    constraints_L = WidthConstraints.of(LLAMA, PruningSection(align=32), adds_biases=False)
    scores = (torch.zeros(8), torch.zeros(160))
    several = Sensitivities.of_costs(constraints_L, [scores], [Shape(4, 2, 128)], {(0, "mlp"): Rise(0.3, 0.0)})
    assert [rise.mean for rise in several[0, "mlp"].rises] == pytest.approx([0.3, 0.6, 0.9, 1.2])


def test_a_file_keeps_every_value_and_the_order_of_ladders_does_not_matter():
    ladders = (ladder({96: (0.1, 1 / 3)}, 1), ladder({128: (-0.1, 0.03), 64: (0.7, 0.1)}))
    several = Sensitivities(ladders)
    assert Sensitivities.from_json(json.loads(json.dumps(several.to_json()))) == several
    assert Sensitivities(ladders[::-1]) == several
    assert (0, "mlp") in several and (0, "attn") not in several


def test_values_that_are_no_sensitivities_are_refused():
    for mean, stderr in ((math.nan, 0.1), (math.inf, 0.1), (0.1, math.inf), (0.1, -0.1)):
        with pytest.raises(ValueError, match="is no rise"):
            Rise(mean, stderr)
    with pytest.raises(ValueError, match="not one rise for each"):
        Ladder(0, "mlp", (mlp(96),), ())
    with pytest.raises(ValueError, match="not one rise for each"):
        Ladder(0, "mlp", (mlp(96), mlp(96)), (Rise(0.1, 0.0), Rise(0.2, 0.0)))
    with pytest.raises(ValueError, match="two ladders"):
        Sensitivities((ladder({96: (0.1, 0.1)}), ladder({80: (0.1, 0.1)})))
