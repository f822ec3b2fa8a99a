"""Sparsity: the paper's schedule in closed form, and the authors' own, against the values of docs/method.md."""

import math
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core.allocation import choose_shapes
from seap_ray.core.architecture import Architecture
from seap_ray.core.sparsity import logistic, official_logistic, uniform
from seap_ray.errors import ConfigError
from tests.support.oracles import ratio_of

often = settings(max_examples=100, deadline=None)
PAPER = {"k": 1.0, "x0": 0.3}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def alike(n_layers, target, *, cap, **curve):
    """The schedule of layers that are all of one size."""
    return logistic([1.0] * n_layers, target, [cap] * n_layers, **curve)


def largest_of(error):
    return float(re.search(r"the largest is ([0-9.]+)$", str(error.value)).group(1))


@pytest.mark.parametrize(
    ("n_layers", "target", "scale", "lowest", "highest"),
    [
        (32, 0.2, 0.4165, 0.1773, 0.2783),
        (32, 0.5, 1.0413, 0.4431, 0.6958),
        (40, 0.2, 0.4049, 0.1723, 0.2706),
        (40, 0.5, 1.0124, 0.4308, 0.6764),
    ],
)
def test_closed_form_gives_the_known_values(n_layers, target, scale, lowest, highest):
    shares = alike(n_layers, target, **PAPER, first=2, last=2, cap=0.9)
    assert shares[:2] == shares[-2:] == [0.0, 0.0]
    assert shares[2] == pytest.approx(lowest, abs=5e-5)
    assert shares[-3] == pytest.approx(highest, abs=5e-5)
    assert shares[2] / sigmoid(-0.3) == pytest.approx(scale, abs=5e-5)


@pytest.mark.parametrize(
    ("n_layers", "target", "scale", "lowest", "highest"),
    [
        (32, 0.2, 0.3943, 0.1678, 0.2578),
        (32, 0.5, 0.9857, 0.4195, 0.6444),
        (40, 0.2, 0.3880, None, None),
        (40, 0.5, 0.9699, None, None),
    ],
)
def test_the_papers_literal_depth_is_a_matter_of_k_and_x0(n_layers, target, scale, lowest, highest):
    # The paper counts depth over all L layers, x = i / (L - 1), though the last two are protected; ours goes from 0 to
    # 1 over the active ones. k (a x - x0) = k a (x - x0 / a), with a the active layers' share of the depth.
    share_of_depth = (n_layers - 3) / (n_layers - 1)
    shares = alike(n_layers, target, k=share_of_depth, x0=0.3 / share_of_depth, first=0, last=2, cap=0.9)
    assert shares[0] / sigmoid(-0.3) == pytest.approx(scale, abs=5e-5)
    if lowest:
        assert shares[0] == pytest.approx(lowest, abs=5e-5)
        assert shares[-3] == pytest.approx(highest, abs=5e-5)


settings_of_a_curve = {
    "n_layers": st.integers(1, 80),
    "first": st.integers(0, 4),
    "last": st.integers(0, 4),
    "k": st.floats(0, 20),
    "x0": st.floats(-1, 2),
    "cap": st.floats(0.05, 1),
}


@given(**settings_of_a_curve, part=st.floats(0, 1))
@often
def test_shares_average_to_the_target_rise_with_depth_and_stay_under_the_cap(n_layers, first, last, k, x0, cap, part):
    assume(n_layers > first + last)
    active = n_layers - first - last
    target = part * cap * active / n_layers
    shares = alike(n_layers, target, k=k, x0=x0, first=first, last=last, cap=cap)
    assert len(shares) == n_layers
    assert math.fsum(shares) / n_layers == pytest.approx(target, rel=1e-9, abs=1e-12)
    assert shares[:first] == [0.0] * first and shares[n_layers - last :] == [0.0] * last
    inner = shares[first : n_layers - last]
    assert all(b >= a - 1e-12 for a, b in zip(inner, inner[1:], strict=False))
    assert all(0 <= share <= cap + 1e-12 for share in inner)


def test_capped_layers_leave_the_others_to_meet_the_total():
    shares = alike(10, 0.5, k=6.0, x0=0.5, first=1, last=1, cap=0.7)
    assert sum(share == 0.7 for share in shares) >= 2
    assert math.fsum(shares) == pytest.approx(5.0, rel=1e-12)
    free = [share for share in shares if 0 < share < 0.7]
    curve = [sigmoid(6 * (i / 7 - 0.5)) for i in range(len(free))]
    ratios = [share / value for share, value in zip(free, curve, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(free)), "what is not capped still follows the curve"


@given(**settings_of_a_curve, excess=st.floats(1e-3, 1))
@often
def test_a_refusal_names_the_largest_ratio_and_that_one_works(n_layers, first, last, k, x0, cap, excess):
    target = cap * max(n_layers - first - last, 0) / n_layers + excess
    curve = {"k": k, "x0": x0, "first": first, "last": last, "cap": cap}
    with pytest.raises(ConfigError, match=r"pruning\.ratio") as error:
        alike(n_layers, target, **curve)
    largest = largest_of(error)
    # It is named to four places, rounded down.
    assert target - excess - 1.001e-4 <= largest < target
    assert math.fsum(alike(n_layers, largest, **curve)) / n_layers == pytest.approx(largest, abs=1e-12)


def test_steep_curves_do_not_overflow():
    shares = alike(24, 0.3, k=5000.0, x0=0.5, first=1, last=1, cap=0.9)
    assert math.fsum(shares) / 24 == pytest.approx(0.3)
    assert shares[1] < 1e-6 and shares[-2] == pytest.approx(0.3 * 24 / 11)


def test_a_target_of_nothing_takes_nothing():
    assert alike(12, 0.0, **PAPER, first=2, last=2, cap=0.9) == [0.0] * 12
    assert alike(4, 0.0, **PAPER, first=2, last=2, cap=0.9) == [0.0] * 4


def test_uniform_asks_the_same_of_every_layer():
    assert uniform([1.0] * 3, 0.35, [0.9] * 3) == [0.35, 0.35, 0.35]


# --- the authors' schedule -------------------------------------------------------------------------------------------


def llama_2(hidden, intermediate, n_layers, heads):
    return Architecture.of(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": n_layers,
            "num_attention_heads": heads,
        }
    )


LLAMA_2 = {"7B": llama_2(4096, 11008, 32, 32), "13B": llama_2(5120, 13824, 40, 40)}


def official_shapes(architecture, kind, ratio):
    pruning = PruningSection(budget="official", allocation=AllocationSection(kind=kind))
    return choose_shapes(architecture, pruning, ratio=ratio, adds_biases=False, scores_L=())


@pytest.mark.parametrize(
    ("model", "requested", "realised", "heads_cut", "mlp_cut"),
    [
        ("7B", 0.2, 0.1704, 165, 0.1750),
        ("7B", 0.5, 0.4326, 433, 0.4374),
        ("13B", 0.2, 0.1763, 270, 0.1800),
        ("13B", 0.5, 0.4463, 702, 0.4500),
    ],
)
def test_the_official_schedule_removes_less_than_it_says(model, requested, realised, heads_cut, mlp_cut):
    architecture = LLAMA_2[model]
    shapes, dense = official_shapes(architecture, "logistic", requested), architecture.dense
    # docs/method.md leaves the two norms of a layer out: 1e-5 of its weights.
    assert ratio_of(shapes, architecture, adds_biases=False) == pytest.approx(realised, abs=7e-5)
    assert sum(dense.heads - shape.heads for shape in shapes) == heads_cut
    channels_cut = sum(dense.channels - shape.channels for shape in shapes)
    assert channels_cut / (dense.channels * architecture.n_layers) == pytest.approx(mlp_cut, abs=1e-4)
    assert shapes[:2] == shapes[-2:] == [dense, dense]


@pytest.mark.parametrize(
    ("model", "requested", "realised"), [("7B", 0.2, 0.1958), ("7B", 0.5, 0.5), ("13B", 0.2, 0.2), ("13B", 0.5, 0.5)]
)
def test_the_official_uniform_budget_realises_the_known_ratios(model, requested, realised):
    shapes = official_shapes(LLAMA_2[model], "uniform", requested)
    assert ratio_of(shapes, LLAMA_2[model], adds_biases=False) == pytest.approx(realised, abs=5e-5)


@pytest.mark.parametrize(
    ("target", "scale", "lowest", "highest"), [(0.2, 0.3645, 0.155, 0.244), (0.5, 0.9111, 0.388, 0.609)]
)
def test_the_official_curve_has_the_known_scale(target, scale, lowest, highest):
    shares = official_logistic(32, target, **PAPER, first=2, last=2)
    # The authors stop within 1e-4 of the average, which leaves the scale two digits or so less.
    assert shares[2] / sigmoid(-0.3) == pytest.approx(scale, abs=5e-4)
    assert shares[2] == pytest.approx(lowest, abs=6e-4)
    assert shares[-3] == pytest.approx(highest, abs=6e-4)


@given(target=st.floats(0, 0.999), n_layers=st.integers(1, 60), first=st.integers(0, 3), last=st.integers(0, 3))
@often
def test_the_official_curve_always_ends_and_stays_within_one(target, n_layers, first, last):
    if first + last >= n_layers:
        with pytest.raises(ConfigError, match="protected layers leave none"):
            official_logistic(n_layers, target, **PAPER, first=first, last=last)
        return
    shares = official_logistic(n_layers, target, **PAPER, first=first, last=last)
    assert len(shares) == n_layers
    assert all(0 <= share <= 1 for share in shares)
