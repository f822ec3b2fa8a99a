"""Batching: sequences are grouped and packed within a limit, none is lost, and little is padding."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.models.batching import Batch, chunk_stream, group_by_length, pack_by_cost, pack_sequences
from seap_ray.models.sequences import CountedSequence, counted_of

often = settings(max_examples=100, deadline=None)


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
@often
def test_batches_cover_every_sequence_once_and_stay_within_the_limit(lengths, limit):
    grouped = group_by_length(lengths, limit)
    assert sorted(i for group in grouped for i in group) == list(range(len(lengths)))
    assert all(grouped), "no empty batch"
    for group in grouped:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit
    assert group_by_length(lengths, limit) == grouped


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
@often
def test_batches_are_no_smaller_than_they_must_be(lengths):
    limit = max(lengths)
    grouped = group_by_length(lengths, limit)
    for one, following in zip(grouped, grouped[1:], strict=False):
        assert (len(one) + 1) * lengths[following[0]] > limit


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
@often
def test_packed_rows_hold_every_sequence_once_and_stay_within_the_limit(lengths, limit):
    grouped = pack_sequences(lengths, limit)
    assert sorted(i for rows in grouped for row in rows for i in row) == list(range(len(lengths)))
    for rows in grouped:
        assert all(rows)
        longest = max(sum(lengths[i] for i in row) for row in rows)
        assert len(rows) * longest <= limit or len(rows) == 1 and longest <= max(lengths)
    assert pack_sequences(lengths, limit) == grouped


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.5])
def test_packing_leaves_less_than_two_percent_to_padding(spread):
    random_ = random.Random(0)
    lengths = [1 + min(2000, int(random_.lognormvariate(4.5, spread))) for _ in range(64)]
    batches = pack_sequences(lengths, 4096)
    computed = sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in batches)
    assert sum(lengths) > 0.98 * computed


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12), st.integers(1, 10))
@often
def test_pack_keeps_every_token_in_order(sequences, length):
    pieces = chunk_stream(sequences, length)
    assert [t for piece in pieces for t in piece] == [t for sequence in sequences for t in sequence]
    assert all(len(piece) == length for piece in pieces[:-1])
    assert all(1 <= len(piece) <= length for piece in pieces)


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), max_size=12))
@often
def test_pack_keeps_with_every_token_whether_it_counts(texts):
    marked = [CountedSequence(*zip(*text, strict=True)) for text in texts]
    pieces = chunk_stream([*marked, [1, 2]], 5)
    pairs = [pair for piece in pieces for pair in zip(piece, counted_of(piece), strict=True)]
    assert pairs == [*(pair for text in texts for pair in text), (1, True), (2, True)]


def test_a_batch_counts_what_counts_and_no_padding():
    rows = [[CountedSequence([5, 6, 7], [False, True, True]), [8, 9]], [[4]]]
    cpu = torch.device("cpu")
    assert Batch.of(rows, False, cpu).rows_N.tolist() == [1, 2, 3, 4, 5]
    assert Batch.of(rows, True, cpu).rows_N.tolist() == [1, 2, 4]
    assert Batch.of([[[4]], [[5]]], False, cpu).rows_N is None


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300), st.sampled_from([1.0, 100.0, 1e6]))
@often
def test_rows_by_cost_hold_every_sequence_once_and_stay_within_the_limit(lengths, limit, pairs_per_token):
    batches = pack_by_cost(lengths, limit, pairs_per_token)
    assert sorted(i for rows in batches for row in rows for i in row) == list(range(len(lengths)))
    for rows in batches:
        widest = max(sum(lengths[i] for i in row) for row in rows)
        assert len(rows) * widest <= limit or [len(row) for row in rows] == [1]
    assert pack_by_cost(lengths, limit, pairs_per_token) == batches


def test_rows_are_short_where_attention_is_dear_and_full_where_it_is_cheap():
    random_ = random.Random(0)
    lengths = [random_.randint(50, 100) for _ in range(40)]

    def shape_of(pairs_per_token: float) -> tuple[int, int]:
        (rows,) = pack_by_cost(lengths, 4096, pairs_per_token)
        widest = max(sum(lengths[i] for i in row) for row in rows)
        return widest, widest * len(rows) - sum(lengths)

    (short, short_padding), (long, long_padding) = shape_of(100), shape_of(1e9)
    assert short < 250 and long_padding < short_padding
    seconds = (short_padding + sum(lengths)) * (1 + short / 100)
    one_a_row, one_row = len(lengths) * max(lengths) * (1 + max(lengths) / 100), sum(lengths) * (1 + sum(lengths) / 100)
    assert seconds <= min(one_a_row, one_row)
    assert long_padding < 10 < short < long


def test_one_long_sequence_makes_no_other_batch_wide():
    first, last = pack_by_cost([10] * 90 + [900], 1000, 100.0)
    assert max(map(len, first)) < 10 and last == [[90]]


def test_no_batch_is_one_wide_row_because_it_is_full():
    random_ = random.Random(0)
    for shortest, longest in ((40, 60), (200, 400), (700, 900)):
        lengths = [random_.randint(shortest, longest) for _ in range(200)]
        for rows in pack_by_cost(lengths, 4096, 1000.0):
            assert max(sum(lengths[i] for i in row) for row in rows) < 1100, (
                "one of 4,096 takes more than twice the time"
            )
