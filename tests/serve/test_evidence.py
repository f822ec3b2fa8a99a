"""Evidence about a mean: how often it errs, how soon it is enough, against sums over all outcomes and simulations."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.evidence import Evidence


def wealth_after(side, floor, values):
    evidence = Evidence(side, floor)
    for value in values:
        evidence = evidence.after(value)
    return evidence.wealth


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("floor", [0.2, 0.5, 0.9])
def test_at_the_floor_bets_are_fair(side, floor):
    """Over all outcomes of coins whose mean is the floor, the expected wealth is the money that has been put on."""
    for n in (1, 2, 7):
        expected = 0.0
        for values in product((0.0, 1.0), repeat=n):
            n_ones = sum(values)
            probability = floor**n_ones * (1 - floor) ** (n - n_ones)
            expected += probability * wealth_after(side, floor, values)
        assert expected == pytest.approx(1 - 1 / (n + 1))


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.01, 0.99), st.sampled_from(["below", "above"]))
def test_wealth_is_never_negative_and_falls_with_figures_on_the_other_side(values, floor, side):
    wealth = wealth_after(side, floor, values)
    assert wealth >= 0
    better, worse = (0.0, 1.0) if side == "below" else (1.0, 0.0)
    assert wealth_after(side, floor, [*values, better]) > wealth_after(side, floor, [*values, worse])


def test_at_the_floor_few_of_many_long_runs_ever_reach_the_bound():
    """With error probability 0.05 at most 0.05 of all runs do; 400 runs of 500 would show 0.09 and more."""
    generator = random.Random(0)
    n_reached = 0
    for _ in range(400):
        evidence = Evidence("below", 0.9)
        for _ in range(500):
            evidence = evidence.after(float(generator.random() < 0.9))
            if evidence.wealth >= 1 / 0.05:
                n_reached += 1
                break
    assert n_reached <= 0.09 * 400


@pytest.mark.parametrize("good_before", [0, 100, 2000])
def test_a_mean_far_below_is_found_within_a_few_figures_also_after_a_long_good_time(good_before):
    evidence = Evidence("below", 0.85)
    for _ in range(good_before):
        evidence = evidence.after(0.97)
    n = 0
    while evidence.wealth < 1 / 0.001:
        evidence = evidence.after(0.3)
        n += 1
    assert n <= {0: 8, 100: 14, 2000: 20}[good_before], n
