"""Token trees: sequences that begin alike in; batches out in which what they share stands once.

A tree has a node for each token that sequences do not share. Its nodes are in preorder, so that a node's descendants
stand right behind it: a node sees another where that stands before it and its subtree is not over yet. Trees that stand
one after another in a row do not see each other by the same rule.

Letters in names of tensors: B rows, T positions, of which each is a node or padding.
"""

from bisect import bisect, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seap_ray.core.families import family_of
from seap_ray.models.batching import group_by_length, pack_by_cost

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations of transformers that take any mask."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Sequences of token ids as a tree, or as several trees where their first tokens differ."""

    ids: list[int]
    """Token of each node, in preorder."""
    depths: list[int]
    """Position of each node's token in its sequences."""
    ends: list[int]
    """Index behind the last node of each node's subtree."""
    paths: dict[int, list[int]]
    """The nodes of each sequence's tokens, by the sequence's number."""

    @classmethod
    def of(cls, sequences: Sequence[list[int]], members: Sequence[int]) -> "TokenTree":
        """Build the tree of some of the sequences, those with the numbers ``members``."""
        ids: list[int] = []
        depths: list[int] = []
        ends: list[int] = []
        paths: dict[int, list[int]] = {}

        path: list[int] = []
        previous: list[int] = []
        # Sorted by their tokens, so that a branch is complete once a sequence leaves it.
        for i in sorted(members, key=lambda i: sequences[i]):
            sequence = sequences[i]
            n_shared = shared_length(previous, sequence)
            for node in path[n_shared:]:
                ends[node] = len(ids)

            path = [*path[:n_shared], *range(len(ids), len(ids) + len(sequence) - n_shared)]
            ids += sequence[n_shared:]
            depths += range(n_shared, len(sequence))
            ends += [0] * (len(sequence) - n_shared)
            paths[i] = path
            previous = sequence

        for node in path:
            ends[node] = len(ids)
        return cls(ids, depths, ends, paths)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_chain(self) -> bool:
        """Return whether the tree has no branch."""
        return self.depths == list(range(len(self.ids)))


def shared_length(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    shorter = min(len(a), len(b))
    # Most that share a beginning share all of it, which one comparison shows.
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


# --- which sequences share a tree, and which trees a batch -----------------------------------------------------------


def break_even_pairs(config: Any) -> float:
    """Return the pairs of positions whose attention takes as long as the rest of a model takes for a token.

    By the number of operations it is 6 x hidden size, where the MLP is four times as wide as that; attention under a
    mask reaches about a third of the speed of products with weights.
    """
    return 2.0 * config.hidden_size


def group_by_beginning(sequences: Sequence[list[int]], max_tokens: int, pairs_per_token: float) -> list[list[int]]:
    """Group numbers of consecutive sequences that are computed faster as one tree than apart.

    A tree computes a shared token once, and its attention is between all pairs of its nodes. Empty sequences are in no
    group.

    Args:
        sequences: Token ids of each sequence.
        max_tokens: Bound on the nodes of a tree of more than one sequence.
        pairs_per_token: Pairs of positions whose attention takes as long as the rest of the model takes for a token.
    """
    groups: list[list[int]] = []
    size = 0
    in_order: list[list[int]] = []  # the last group's sequences, sorted

    for i, sequence in enumerate(sequences):
        if not sequence:
            continue

        # Of sorted sequences none shares more with a new one than its neighbours.
        place = bisect(in_order, sequence)
        neighbours = in_order[max(0, place - 1) : place + 1]
        n_shared = max((shared_length(sequence, other) for other in neighbours), default=0)

        joined = size + len(sequence) - n_shared
        added_pairs = joined**2 - size**2 - len(sequence) ** 2
        if n_shared and joined <= max_tokens and added_pairs <= n_shared * pairs_per_token:
            groups[-1].append(i)
            size = joined
        else:
            groups.append([i])
            size = len(sequence)
            in_order = []
        insort(in_order, sequence)

    return groups


def make_tree_batches(decoder: Any, sequences: Sequence[list[int]], batch_tokens: int) -> Iterator["TreeBatch"]:
    """Yield batches in which every sequence that is not empty is once.

    Sequences share a tree, and trees a row, only where the decoder takes the masks that keep them apart. Code that is
    not transformers' own may not do so, other attention implementations have no such masks, and mixers with a state
    read none: there each sequence has a row of its own.

    Args:
        decoder: A model's decoder.
        sequences: Token ids of each sequence. Those that begin alike are to stand side by side.
        batch_tokens: Tokens in a batch, padding included.
    """
    is_own_code = type(decoder).__module__.startswith("transformers.")
    # No mask keeps branches apart in the state of a mixer.
    has_states = family_of(decoder.config.model_type).mixer is not None
    takes_masks = is_own_code and not has_states and decoder.config._attn_implementation in MASKED_ATTENTION

    for part in _parts(decoder.config, sequences):
        make_batches = _packed if takes_masks else _one_a_row
        for rows in make_batches(decoder.config, part, batch_tokens):
            yield TreeBatch.of(rows, decoder.device)


Rows = list[list[TokenTree]]
"""Rows of a batch, each with the trees that stand one after another in it."""


def _packed(config: Any, sequences: Sequence[list[int]], batch_tokens: int) -> Iterator[Rows]:
    """Yield the rows of batches in which sequences share trees, and trees rows."""
    pairs = break_even_pairs(config)
    trees = [TokenTree.of(sequences, members) for members in group_by_beginning(sequences, batch_tokens, pairs)]
    for batch in pack_by_cost([len(tree) for tree in trees], batch_tokens, pairs):
        rows: Rows = []
        for row in batch:
            rows.append([trees[i] for i in row])
        yield rows


def _one_a_row(_config: Any, sequences: Sequence[list[int]], batch_tokens: int) -> Iterator[Rows]:
    """Yield the rows of batches in which each sequence has a row of its own."""
    trees = [TokenTree.of(sequences, [i]) for i, sequence in enumerate(sequences) if sequence]
    for group in group_by_length([len(tree) for tree in trees], batch_tokens):
        yield [[trees[i]] for i in group]


def _parts(config: Any, sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """Return the sequences in parts that may share batches; what is in another part is empty in a list.

    LongRoPE (Phi 3) has other frequencies for a batch with a sequence longer than the model was first trained on, so
    that a short one would have another value beside a long one.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return [list(sequences)]

    limit = rope["original_max_position_embeddings"]
    short = [sequence if len(sequence) <= limit else [] for sequence in sequences]
    long = [sequence if len(sequence) > limit else [] for sequence in sequences]
    return [short, long]


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Rows of token trees on a device, each row padded at its end to the longest."""

    ids_BT: Tensor
    """Token ids, int64."""
    positions_BT: Tensor
    """Position of each node's token in its sequences, int64; 0 at padding."""
    ends_BT: Tensor
    """Index in the row behind the last node of each node's subtree, int64. Padding is a node without descendants."""
    is_causal: bool
    """Whether every row is one sequence: attention then needs no mask, since nothing sees the padding behind it."""
    paths: dict[int, list[int]]
    """The places of each sequence's tokens in ``ids_BT.flatten()``, by the sequence's number."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[TokenTree]], device: torch.device) -> "TreeBatch":
        """Put rows on a device."""
        width = max(sum(map(len, row)) for row in rows)
        # Padding is token 0, which every vocabulary has, and sees itself alone: a row of a mask
        # without anything to see would be no number.
        ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        positions_BT = torch.zeros_like(ids_BT)
        ends_BT = torch.arange(1, width + 1).repeat(len(rows), 1)
        paths: dict[int, list[int]] = {}

        for i, row in enumerate(rows):
            first = 0
            for tree in row:
                places = slice(first, first + len(tree))
                ids_BT[i, places] = torch.tensor(tree.ids)
                positions_BT[i, places] = torch.tensor(tree.depths)
                ends_BT[i, places] = torch.tensor(tree.ends) + first
                offset = i * width + first
                for sequence, path in tree.paths.items():
                    paths[sequence] = [offset + node for node in path]
                first += len(tree)

        return cls(
            ids_BT.to(device, non_blocking=True),
            positions_BT.to(device, non_blocking=True),
            ends_BT.to(device, non_blocking=True),
            all(len(row) == 1 and row[0].is_chain for row in rows),
            paths,
        )

    def inputs(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of a decoder of transformers: ids, and where they are needed positions and masks.

        Args:
            config: The decoder's configuration.
            dtype: Type that the decoder computes in.
        """
        if self.is_causal:
            return {"input_ids": self.ids_BT}

        visible_BTT = self._visible()
        masks: Any
        # A model with several kinds of layers takes a mask for each kind.
        if layer_types := getattr(config, "layer_types", None):
            masks = {"full_attention": _mask(visible_BTT, config, dtype)}
            if "sliding_attention" in layer_types:
                masks["sliding_attention"] = _mask(self._within(visible_BTT, config.sliding_window), config, dtype)
        else:
            masks = _mask(self._within(visible_BTT, getattr(config, "sliding_window", None)), config, dtype)

        return {"input_ids": self.ids_BT, "position_ids": self.positions_BT, "attention_mask": masks}

    def _visible(self) -> Tensor:
        """Return which nodes (last axis) each node (axis before) sees: its ancestors and itself."""
        place_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        is_behind_TT = place_T[:, None] >= place_T
        return is_behind_TT & (place_T[:, None] < self.ends_BT[:, None, :])

    def _within(self, visible_BTT: Tensor, window: int | None) -> Tensor:
        """Leave of what each node sees the last ``window`` tokens of its sequence."""
        if window is None:
            return visible_BTT
        return visible_BTT & (self.positions_BT[:, :, None] - self.positions_BT[:, None, :] < window)


def _mask(visible_BTT: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """Return a mask as the config's attention takes it: booleans, or what is added to scores before the softmax."""
    visible_B1TT = visible_BTT[:, None]
    if config._attn_implementation == "sdpa":
        return visible_B1TT
    return torch.zeros_like(visible_B1TT, dtype=dtype).masked_fill(~visible_B1TT, torch.finfo(dtype).min)
