"""Knapsack: one option a layer, judged against all choices there are."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.core.knapsack import Option, choose, lower_hull

often = settings(max_examples=100, deadline=None)
# Coarse rises, so that there are ties; they add up without rounding.
RISES = st.integers(0, 12).map(lambda n: n / 8)
OPTIONS = st.lists(st.builds(Option, saved=st.integers(-2, 30), rise=RISES), min_size=1, max_size=7)


def summed(options_L, places):
    options = [options[place] for options, place in zip(options_L, places, strict=True)]
    return sum(option.saved for option in options), sum(option.rise for option in options)


def best_of_all(options_L, low, high):
    """Return the least rise, and how far from the middle the nearest choice with it is; None where there is none."""
    choices = itertools.product(*(range(len(options)) for options in options_L))
    within = [summed(options_L, places) for places in choices]
    within = [(rise, abs(saved - (low + high) / 2)) for saved, rise in within if low <= saved <= high]
    return min(within, default=None)


@given(options_L=st.lists(OPTIONS, min_size=1, max_size=5), low=st.integers(-5, 90), width=st.integers(0, 20))
@often
def test_no_choice_of_all_is_better(options_L, low, width):
    best = best_of_all(options_L, low, low + width)
    places = choose(options_L, low=low, high=low + width)
    if best is None:
        assert places is None
        return
    saved, rise = summed(options_L, places)
    assert low <= saved <= low + width
    assert (rise, abs(saved - low - width / 2)) == best


def test_rises_next_to_nothing_end_as_others_do():
    options = [Option(saved=0, rise=0.0), Option(saved=1, rise=5e-324)]
    assert choose([options], low=1, high=1) == (1,)
    assert choose([options], low=0.25, high=0.5) is None


def test_a_window_between_large_savings_is_held_to_the_unit():
    large = [Option(saved=10**10 + n, rise=float(n)) for n in range(5)]
    assert choose([large], low=10**10 + 2.5, high=10**10 + 3) == (3,)
    assert choose([large], low=10**10 + 2.1, high=10**10 + 2.9) is None


@given(
    options_L=st.lists(
        st.lists(st.builds(Option, saved=st.integers(0, 10**9), rise=st.floats(0, 1)), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    ),
    share=st.floats(0, 1),
    width=st.floats(0, 0.2),
)
@often
def test_no_choice_is_better_where_savings_have_no_common_unit(options_L, share, width):
    most = sum(max(option.saved for option in options) for options in options_L)
    low, high = (share - width / 2) * most, (share + width / 2) * most
    best = best_of_all(options_L, low, high)
    places = choose(options_L, low=low, high=high)
    assert (places is None) == (best is None)
    if places is not None:
        saved, rise = summed(options_L, places)
        assert low <= saved <= high and rise == pytest.approx(best[0], rel=1e-9, abs=1e-12)


def test_later_layers_save_more_where_choices_are_equally_good():
    alike = [Option(saved, saved / 4) for saved in range(5)]
    assert choose([alike] * 3, low=5, high=5) == (0, 1, 4)
    assert choose([alike] * 3, low=5, high=5) == choose([alike] * 3, low=5, high=5)
    # Of options that save and cost the same, the first.
    assert choose([[Option(0, 0.0), Option(2, 1.0), Option(2, 1.0)]], low=1, high=3) == (1,)


def test_free_options_and_a_window_out_of_reach():
    free = [Option(saved, 0.0) for saved in range(5)]
    assert choose([free] * 2, low=3, high=5) == (0, 4)
    assert choose([free] * 2, low=9, high=20) is None
    assert choose([free] * 2, low=-9, high=-1) is None
    assert choose([[Option(0, 0.0), Option(10, 1.0)]] * 2, low=12, high=18) is None


def test_a_deep_model_with_many_options_meets_its_window():
    # As many layers, groups and tiles as a model of 70 billion parameters has, and a bias for each layer that is cut.
    def options(layer):
        sensitivity = 1 + (7 * layer % 11)
        widths = itertools.product(range(8), range(0, 224, 7))
        return [
            Option(
                (6 * groups + tiles) * 192 - (groups + tiles > 0),
                sensitivity * ((groups / 8) ** 2 + (tiles / 224) ** 2),
            )
            for groups, tiles in widths
        ]

    options_L = [options(layer) for layer in range(80)]
    target = 0.3 * sum(options[-1].saved for options in options_L)
    saved, _ = summed(options_L, choose(options_L, low=target - 96, high=target + 96))
    assert abs(saved - target) <= 96


@given(points=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12))
@often
def test_the_lower_hull_is_convex_and_touches_the_points_from_below(points):
    corners = lower_hull(points)
    assert set(corners) <= set(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(corners)]
    assert all(left < right for left, right in itertools.pairwise(slopes))
    assert corners[0] == min(points) and corners[-1][0] == max(x for x, _ in points)
    for x, y in points:
        for (left, low), (right, high) in itertools.pairwise(corners):
            assert not left <= x <= right or (y - low) * (right - left) >= (high - low) * (x - left)
