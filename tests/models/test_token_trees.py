"""Token trees: every sequence is spelt by its path, a node sees its own beginning and nothing else."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.models.token_trees import (
    TokenTree,
    TreeBatch,
    group_by_beginning,
    make_tree_batches,
    shared_length,
)

often = settings(max_examples=100, deadline=None)
# Few tokens, so that many sequences begin alike, are equal, or are the beginning of one another.
few_tokens = st.lists(st.lists(st.integers(1, 3), max_size=8), min_size=1, max_size=10)
CPU = torch.device("cpu")
PAIRS = 2048.0
"""Pairs of positions that are worth a token."""


def decoder_of(module: str, attention: str = "sdpa", **config) -> SimpleNamespace:
    """Return what batches are made by: a decoder's class, configuration and device."""
    kind = type("Decoder", (), {"__module__": module})
    decoder = kind()
    decoder.config = SimpleNamespace(
        _attn_implementation=attention, **{"model_type": "llama", "hidden_size": 500, **config}
    )
    decoder.device = CPU
    return decoder


def test_a_shared_token_is_one_node_and_equal_sequences_are_one_path():
    sequences = [[5, 6, 7], [5, 6], [5, 8, 7], [5, 6, 7]]
    tree = TokenTree.of(sequences, range(4))
    assert tree.ids == [5, 6, 7, 8, 7]
    assert tree.depths == [0, 1, 2, 1, 2]
    assert tree.ends == [5, 3, 3, 5, 5]
    assert tree.paths == {0: [0, 1, 2], 1: [0, 1], 2: [0, 3, 4], 3: [0, 1, 2]}
    assert not tree.is_chain and TokenTree.of(sequences, [0, 1]).is_chain


@given(few_tokens)
@often
def test_a_path_spells_its_sequence_and_there_is_a_node_for_each_beginning(sequences):
    tree = TokenTree.of(sequences, range(len(sequences)))
    for i, sequence in enumerate(sequences):
        assert [tree.ids[node] for node in tree.paths[i]] == sequence
        assert [tree.depths[node] for node in tree.paths[i]] == [*range(len(sequence))]

    beginnings = {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert len(tree) == len(beginnings)


@given(few_tokens, few_tokens, st.integers(1, 5))
@often
def test_a_node_sees_the_last_tokens_of_its_own_beginning_and_padding_sees_itself(first, second, window):
    trees = [TokenTree.of(some, range(len(some))) for some in (first, second)]
    trees = [tree for tree in trees if len(tree)]
    if not trees:
        return
    # A row with both trees, and one that is padded to its length.
    batch = TreeBatch.of([trees, trees[:1]], CPU)
    visible_BTT = batch._visible()
    windowed_BTT = batch._within(visible_BTT, window)

    expected = torch.eye(visible_BTT.shape[1], dtype=torch.bool).repeat(2, 1, 1)
    windowed = expected.clone()
    for row, row_trees in enumerate([trees, trees[:1]]):
        offset = 0
        for tree in row_trees:
            for path in tree.paths.values():
                for i, node in enumerate(path):
                    for j, seen in enumerate(path[: i + 1]):
                        expected[row, offset + node, offset + seen] = True
                        windowed[row, offset + node, offset + seen] = i - j < window
            offset += len(tree)
    assert torch.equal(visible_BTT, expected) and torch.equal(windowed_BTT, windowed)


@given(few_tokens, st.integers(1, 30))
@often
def test_groups_are_neighbours_that_begin_alike_within_the_limit(sequences, limit):
    groups = group_by_beginning(sequences, limit, 100.0)
    assert [i for group in groups for i in group] == [i for i, sequence in enumerate(sequences) if sequence]
    for group in groups:
        assert len(group) == 1 or len(TokenTree.of(sequences, group)) <= limit
        assert len({sequences[i][0] for i in group}) == 1


def test_questions_that_share_a_few_words_are_apart_and_those_that_share_examples_together():
    random_ = random.Random(0)
    few, many = ([random_.randrange(100, 200) for _ in range(n)] for n in (3, 400))
    ends = [[random_.randrange(200, 300) for _ in range(60)] for _ in range(40)]
    assert len(group_by_beginning([few + end for end in ends], 4096, PAIRS)) > 10
    assert len(group_by_beginning([many + end for end in ends], 4096, PAIRS)) < 5

    # Apart they take 460 tokens each: a tree pays where its pairs cost less than that.
    for group in group_by_beginning([many + end for end in ends], 4096, PAIRS):
        n = 400 + 60 * len(group)
        assert n + n * n / PAIRS < len(group) * (460 + 460 * 460 / PAIRS)


@given(few_tokens, st.integers(1, 40), st.sampled_from(["transformers.models.x", "custom_code"]))
@often
def test_every_sequence_is_in_one_batch_within_the_limit(sequences, limit, module):
    places = {}
    for batch in make_tree_batches(decoder_of(module), sequences, limit):
        assert batch.ids_BT.numel() <= limit or len(batch.ids_BT) == 1
        for i, path in batch.paths.items():
            assert i not in places
            places[i] = batch.ids_BT.flatten()[path].tolist()
    assert places == {i: sequence for i, sequence in enumerate(sequences) if sequence}


@pytest.mark.parametrize("decoder", [decoder_of("custom_code"), decoder_of("transformers.x", "flash_attention_2")])
def test_where_masks_are_not_taken_a_sequence_has_a_row_of_its_own_and_no_mask(decoder):
    sequences = [[5, 6, 7], [5, 6, 8], [5], [], [5]]
    (batch,) = make_tree_batches(decoder, sequences, 100)
    assert batch.ids_BT.tolist() == [[5, 0, 0], [5, 0, 0], [5, 6, 7], [5, 6, 8]]
    assert batch.inputs(decoder.config, torch.float32).keys() == {"input_ids"}


def test_rows_of_one_sequence_each_need_no_mask():
    decoder = decoder_of("transformers.models.llama")
    batches = list(make_tree_batches(decoder, [[5, 6, 7], [5, 6], [8, 9, 9]], 3))
    assert all(batch.inputs(decoder.config, torch.float32).keys() == {"input_ids"} for batch in batches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_with_several_kinds_of_layers_gets_a_mask_for_each(attention):
    config = decoder_of("", attention, layer_types=["sliding_attention", "full_attention"], sliding_window=2).config
    batch = TreeBatch.of([[TokenTree.of([[5, 6, 7], [5, 6, 8]], [0, 1])]], CPU)
    masks = batch.inputs(config, torch.float32)["attention_mask"]
    seen = {kind: (mask if mask.dtype == torch.bool else mask == 0).int().tolist() for kind, mask in masks.items()}
    full = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    sliding = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert seen == {"full_attention": [[full]], "sliding_attention": [[sliding]]}
    assert all((mask.dtype == torch.bool) == (attention == "sdpa") for mask in masks.values())


def test_sequences_of_long_rope_are_apart_by_whether_they_are_long():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 3}
    decoder = decoder_of("transformers.models.phi3", rope_parameters=rope)
    batches = make_tree_batches(decoder, [[5, 6], [5, 6, 7, 8], [5, 6, 7], [5, 6, 7, 9]], 100)
    assert [sorted(batch.paths) for batch in batches] == [[0, 2], [1, 3]]


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
@often
def test_the_shared_length_is_that_of_the_longest_common_beginning(a, b):
    n = shared_length(a, b)
    assert a[:n] == b[:n]
    assert a[n : n + 1] != b[n : n + 1] or n == len(a) == len(b)
