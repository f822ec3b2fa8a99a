"""Moments, merged over any split in any order, against two passes over the same values in float64."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.core.moments import Covariance, Moments, pooled, tree_sum

few = settings(max_examples=25, deadline=None)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)
seeds = st.integers(0, 2**32 - 1)


def drawn(seed, n, *, offset=0.0, dtype=torch.float64):
    """``n`` tokens of 3 columns whose mean is ``offset`` standard deviations; the columns' scales lie far apart."""
    scale = np.array([1e-3, 1.0, 1e3])
    return torch.from_numpy((offset + np.random.default_rng(seed).standard_normal((n, 3))) * scale).to(dtype)


def two_pass(x):
    """Mean and population variance of each column, every sum correctly rounded."""
    columns = x.double().T.tolist()
    means = [math.fsum(column) / len(column) for column in columns]
    variances = [
        math.fsum((value - m) ** 2 for value in column) / len(column) for column, m in zip(columns, means, strict=True)
    ]
    return np.array(means), np.array(variances)


def assert_equals_two_pass(moments, x):
    mean, var = two_pass(x)
    assert moments.count == len(x)
    assert moments.mean_D.dtype == moments.m2_D.dtype == torch.float64
    assert (np.abs(moments.mean_D.numpy() - mean) <= 1e-9 * (np.abs(mean) + np.sqrt(var))).all()
    # The second term is for columns that are constant in x's own type: their variance is 0 but for the mean's rounding.
    assert (np.abs(moments.var_D.numpy() - var) <= 1e-9 * var + (1e-12 * mean) ** 2).all()
    np.testing.assert_allclose(moments.square_D, (x.double() ** 2).mean(0), rtol=1e-9)


def bits(moments):
    return moments.count, moments.mean_D.numpy().tobytes(), moments.m2_D.numpy().tobytes()


def merged_at_random(parts, random):
    """Add neighbours or strangers, in either order, until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop() + parts.pop())
    return parts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@given(lengths=lengths, seed=seeds, random=st.randoms(use_true_random=False))
@few
def test_merge_order_and_split_do_not_matter(lengths, seed, random, offset, dtype):
    x = drawn(seed, sum(lengths), offset=offset, dtype=dtype)
    parts = [Moments.of(prompt) for prompt in x.split(lengths)]
    assert_equals_two_pass(merged_at_random(parts, random), x)
    assert_equals_two_pass(tree_sum(parts), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("n_prompts", [1, 2, 200])
def test_the_first_prompt_counts_like_every_other(n_prompts, offset, dtype):
    # The authors' code loses the first prompt's variance: all of it for one prompt, half for two (method.md, 2.3).
    x = drawn(n_prompts, 30 * n_prompts, offset=offset, dtype=dtype)
    assert_equals_two_pass(tree_sum(Moments.of(prompt) for prompt in x.split(30)), x)


def test_a_single_token_has_no_variance():
    moments = Moments.of(torch.tensor([[3.0, -5.0]]))
    assert moments.mean_D.tolist() == [3.0, -5.0]
    assert moments.var_D.tolist() == [0.0, 0.0]


def test_one_outsized_token_does_not_drown_the_others():
    x = drawn(0, 500, dtype=torch.float32)
    x[0] = 1e4
    assert_equals_two_pass(tree_sum(Moments.of(prompt) for prompt in x.split(7)), x)


@given(value=st.floats(-1e6, 1e6, width=32), lengths=lengths)
@few
def test_a_constant_column_has_no_negative_variance(value, lengths):
    total = tree_sum(Moments.of(torch.full((n, 1), value, dtype=torch.float32)) for n in lengths)
    assert 0 <= total.var_D.item() <= (1e-12 * value) ** 2


@given(lengths=lengths, seed=seeds)
@few
def test_counts_are_summed_exactly(lengths, seed):
    x = drawn(seed, sum(lengths))
    assert tree_sum(Moments.of(prompt) for prompt in x.split(lengths)).count == sum(lengths)


def test_counts_beyond_float_precision_are_exact():
    many = Moments(2**53, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert (many + Moments.of(torch.ones(1, 1))).count == 2**53 + 1


@given(n=st.integers(1, 20), seed=seeds)
@few
def test_empty_moments_are_neutral(n, seed):
    moments, empty = Moments.of(drawn(seed, n)), Moments.of(drawn(seed, n)[:0])
    assert bits(empty + moments) == bits(moments + empty) == bits(moments)
    assert bits(tree_sum([empty, empty, moments, empty])) == bits(moments)
    assert (empty + empty).count == 0


def test_moments_of_no_token_are_finite():
    # A batch of one-token prompts with calibration.skip_first_token has none; NaN would read as broken activations.
    empty = Moments.of(torch.zeros(0, 4))
    assert empty.count == 0
    assert empty.mean_D.tolist() == empty.m2_D.tolist() == [0.0] * 4


def halved(parts):
    """The fixed tree: full binary trees over the largest powers of two, from the left."""
    if len(parts) == 1:
        return parts[0]
    largest = 2 ** (len(parts).bit_length() - 1)
    half = largest if largest < len(parts) else largest // 2
    return halved(parts[:half]) + halved(parts[half:])


def test_the_trees_shape_depends_on_the_count_alone():
    differs = 0
    for n in range(1, 40):
        parts = [Moments.of(drawn(100 * n + i, 1 + i % 5)) for i in range(n)]
        total = tree_sum(parts)
        assert bits(total) == bits(halved(parts))
        differs += bits(total) != bits(sum(parts[1:], parts[0]))
    assert differs > 20, "a chain should round differently, or these data cannot tell trees apart"


def test_equal_parts_give_equal_bytes_however_lazily_they_come():
    parts = [Moments.of(drawn(i, 3)) for i in range(23)]
    by_list, by_iterator, by_generator = tree_sum(parts), tree_sum(iter(parts)), tree_sum(part for part in parts)
    assert bits(by_list) == bits(by_iterator) == bits(by_generator)


def test_a_tree_holds_few_parts_at_a_time():
    alive: list[weakref.ref] = []

    def parts():
        for i in range(256):
            part = Moments.of(drawn(i, 2))
            alive.append(weakref.ref(part.mean_D))
            assert sum(ref() is not None for ref in alive) <= 10
            yield part

    assert tree_sum(parts()).count == 512


def test_no_parts_cannot_be_added():
    with pytest.raises(ValueError, match="no moments"):
        tree_sum([])


@given(weights=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=seeds)
@few
def test_pooled_is_the_variance_of_the_weighted_concatenation(weights, seed):
    # Streams of 1, 2, 3 and 4 tokens with means apart; repeating each 12 w / n times makes it count by w, not by n.
    streams = [drawn(seed + i, i + 1, offset=3.0 * i) for i in range(len(weights))]
    repeated = [x.repeat(12 * w // len(x), 1) for x, w in zip(streams, weights, strict=True)]
    mean, var = two_pass(torch.cat(repeated))
    total = pooled([Moments.of(x) for x in streams], [0.5 * w for w in weights])
    np.testing.assert_allclose(total.mean_D, mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(total.var_D, var, rtol=1e-9, atol=1e-20)  # one token, repeated: 0 but for rounding
    assert total.count == sum(map(len, streams))


def test_pooling_one_stream_changes_nothing_but_rounding():
    moments = Moments.of(drawn(0, 50, offset=2.0))
    total = pooled([moments], [3.0])
    torch.testing.assert_close(total.mean_D, moments.mean_D)
    torch.testing.assert_close(total.m2_D, moments.m2_D)


def test_a_covariance_that_is_added_in_place_has_the_bytes_of_the_sum():
    parts = [Covariance.of(drawn(seed, 20 + seed, offset=seed)) for seed in range(3)]
    expected = parts[0] + parts[1] + parts[2]
    total = replace(parts[0], comoment_DD=parts[0].comoment_DD.clone())
    matrix_DD = total.comoment_DD
    for part in parts[1:]:
        total += part
    assert bits(total) == bits(expected) and torch.equal(total.comoment_DD, expected.comoment_DD)
    assert total.comoment_DD is matrix_DD

    empty = Covariance.of(drawn(0, 5)[:0])
    unchanged = total
    total += empty
    empty += total
    assert total is unchanged and empty is total


# --- a part taken off again ------------------------------------------------------------------------------------------

# What is left of a stream keeps the absolute error of the whole: where the part is nearly the whole stream, the
# difference cancels, and relative to what is left the error grows by as many times as the whole is larger. A large mean
# costs its own digits besides: the mean of what is left has the rounding of mean x (tokens of all / tokens left).


def assert_is_without(left, kept, whole, tolerance):
    """Compare with the covariance of the kept tokens; errors are relative to the whole stream's deviations."""
    deviation_D = (whole.m2_D + whole.count * torch.finfo(torch.float64).eps * whole.mean_D.square()).sqrt()
    assert left.count == kept.count
    times_larger = whole.count / kept.count
    mean_error_D = tolerance * times_larger * (whole.mean_D.abs() + deviation_D)
    assert ((left.mean_D - kept.mean_D).abs() <= mean_error_D).all()
    assert ((left.m2_D - kept.m2_D).abs() <= tolerance * deviation_D.square()).all()
    assert ((left.comoment_DD - kept.comoment_DD).abs() <= tolerance * torch.outer(deviation_D, deviation_D)).all()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@given(n_kept=st.integers(1, 200), n_part=st.integers(1, 200), seed=seeds)
@few
def test_a_part_that_was_added_can_be_taken_off(n_kept, n_part, seed, offset):
    kept = Covariance.of(drawn(seed, n_kept, offset=offset))
    part = Covariance.of(drawn(seed + 1, n_part, offset=offset))
    for whole in (kept + part, part + kept):
        left = whole.without(part)
        assert_is_without(left, kept, whole, tolerance=1e-11)
        assert left.comoment_DD.dtype == left.m2_D.dtype == torch.float64


@given(n_kept=st.integers(1, 40), n_part=st.integers(1, 2000), exponent=st.integers(-8, 8), seed=seeds)
@few
def test_no_variance_is_negative_when_a_part_is_taken_off(n_kept, n_part, exponent, seed):
    constant_NO = torch.full((n_kept + n_part, 1), 0.1 * 10.0**exponent, dtype=torch.float64)
    x = torch.cat([drawn(seed, n_kept + n_part, offset=10.0**exponent), constant_NO], 1)
    kept = Covariance.of(x[:n_kept])
    part = Covariance.of(x[n_kept:])
    left = (kept + part).without(part)
    assert (left.m2_D >= 0).all() and (left.var_D >= 0).all()


def test_taking_off_a_part_changes_neither_it_nor_the_whole_and_no_part_changes_nothing():
    kept, part = (Covariance.of(drawn(seed, 20 + seed)) for seed in (0, 1))
    whole = kept + part
    fields = ("mean_D", "m2_D", "comoment_DD")
    before = [getattr(covariance, name).clone() for covariance in (whole, part) for name in fields]
    whole.without(part)
    after = [getattr(covariance, name) for covariance in (whole, part) for name in fields]
    assert all(map(torch.equal, before, after))

    empty = Covariance.of(drawn(0, 5)[:0])
    assert_is_without(whole.without(empty), whole, whole, tolerance=1e-15)


def test_half_and_a_hundredth_are_left_of_columns_with_a_large_mean():
    # A mean of 1e4 deviations is far beyond what the inputs of o_proj and down_proj have.
    x = drawn(3, 10_000, offset=1e4)
    whole = Covariance.of(x)
    for n_kept, tolerance in ((5_000, 1e-10), (100, 1e-8)):
        kept = Covariance.of(x[:n_kept])
        left = whole.without(Covariance.of(x[n_kept:]))
        # Relative to what is left this time, which has a hundredth of the whole's digits to lose.
        scale_D = kept.m2_D.sqrt()
        assert ((left.comoment_DD - kept.comoment_DD).abs() <= tolerance * torch.outer(scale_D, scale_D)).all()
        assert ((left.m2_D - kept.m2_D).abs() <= tolerance * kept.m2_D).all()
        np.testing.assert_allclose(left.mean_D, kept.mean_D, rtol=1e-12)
