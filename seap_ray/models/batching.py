"""Batching: token sequences in, padded batches out.

Several short sequences share a row (sequence packing), so that little of what is computed is padding.
Letters in names of tensors: B rows, T positions, N tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seap_ray.core.families import family_of
from seap_ray.models.sequences import Sequences, counted_of, joined

PADDING_TARGET = 0.02
"""Share of the computed tokens that packing leaves to padding where it can."""


def make_batches(decoder: Any, sequences: Sequences, batch_tokens: int) -> list[list[Sequences]]:
    """Return batches, each a list of rows, each row the sequences that stand one after another in it.

    Sequences share a row only where the decoder keeps them apart, which code that is not transformers' own may not do,
    and mixers do not: their states run through a whole row.
    """
    lengths = [len(sequence) for sequence in sequences]

    is_packable = family_of(decoder.config.model_type).shares_rows
    if is_packable and type(decoder).__module__.startswith("transformers."):
        batches = pack_sequences(lengths, batch_tokens)
    else:
        batches = [_one_a_row(indices) for indices in group_by_length(lengths, batch_tokens)]

    return [_pick(sequences, rows) for rows in batches]


def _one_a_row(indices: list[int]) -> list[list[int]]:
    return [[i] for i in indices]


def _pick(sequences: Sequences, rows: list[list[int]]) -> list[Sequences]:
    picked: list[Sequences] = []
    for row in rows:
        picked.append([sequences[i] for i in row])
    return picked


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of sequences on a device, each row padded at its end to the longest."""

    ids_BT: Tensor
    """Token ids, int64."""
    positions_BT: Tensor | None
    """Position of each token in its sequence, int64. Where positions begin anew, transformers' masks keep apart what is
    before; at padding they are 0, so that nothing there is seen. None where every row is one sequence: attention then
    needs no mask, since nothing sees the padding behind it."""
    rows_N: Tensor | None
    """Indices of the tokens that count, as ``counted_rows`` returns them."""

    @classmethod
    def of(cls, rows: Sequence[Sequences], skip_first: bool, device: torch.device) -> "Batch":
        """Put rows on a device; with ``skip_first`` the first token of every sequence does not count, either."""
        width = max(_row_length(row) for row in rows)
        # Padding is token 0, which every vocabulary has; nothing sees it and it does not count.
        ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        positions_BT = torch.zeros_like(ids_BT)
        counted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)

        for i, row in enumerate(rows):
            n_tokens = _row_length(row)
            positions = chain.from_iterable(range(len(sequence)) for sequence in row)
            ids_BT[i, :n_tokens] = torch.tensor([*chain(*row)])
            positions_BT[i, :n_tokens] = torch.tensor([*positions])
            counted_BT[i, :n_tokens] = torch.tensor([*chain.from_iterable(map(counted_of, row))])
        if skip_first:
            # Every sequence begins at position 0; padding, which is 0 there too, does not count
            # anyway.
            counted_BT &= positions_BT > 0

        # Found on the CPU, where nothing has to wait for a device.
        rows_N = counted_rows(counted_BT)
        is_packed = any(len(row) > 1 for row in rows)
        return cls(
            ids_BT.to(device, non_blocking=True),
            positions_BT.to(device, non_blocking=True) if is_packed else None,
            None if rows_N is None else rows_N.to(device, non_blocking=True),
        )


def _row_length(row: Sequences) -> int:
    return sum(map(len, row))


def counted_rows(counted_BT: Tensor) -> Tensor | None:
    """Return the indices of the tokens that count among all of a batch, or None where all of them do.

    It waits for the device of its input.
    """
    rows_N = counted_BT.flatten().nonzero().squeeze(1)
    return rows_N if len(rows_N) < counted_BT.numel() else None


# --- which sequences share a batch -----------------------------------------------------------------------------------


def chunk_stream(sequences: Sequences, length: int) -> list[Sequence[int]]:
    """Join sequences end to end and cut the stream into chunks of ``length``; the last may be shorter."""
    stream = joined(sequences)
    return [stream[start : start + length] for start in range(0, len(stream), length)]


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices of similar length so that group size x longest, padding included, stays within ``max_tokens``.

    The groups are a pure function of the lengths; a sequence longer than the limit is a group of its own.
    """
    groups: list[list[int]] = []
    # Ascending, so that the sequence at hand is its group's longest; the index settles equal
    # lengths.
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class _Packing(NamedTuple):
    """One way to put all sequences into rows; the first fields decide which of several is taken."""

    computed_tokens: int
    """Number of rows x width, padding included."""
    width: int
    """Tokens of the longest row."""
    rows: list[list[int]]
    """Indices of the sequences of every row."""


def pack_sequences(lengths: Sequence[int], max_tokens: int) -> list[list[list[int]]]:
    """Put sequences into rows of about one length, and rows into batches, with little padding.

    Rows are as short as ``PADDING_TARGET`` allows, since attention takes longer in long ones. The result is a pure
    function of the lengths.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Bound on the tokens of a batch, padding included; a batch of one row may be as long as the longest
            sequence.

    Returns:
        Batches of rows of indices into ``lengths``; the sequences of a row stand one after another in it.
    """
    if not lengths:
        return []

    total = sum(lengths)
    longest = max(lengths)
    max_width = max(longest, max_tokens)
    # Best fit takes the long ones first, which leaves the short ones for the gaps.
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    # Begin with as many rows, and so as short ones, as there can be, and take fewer until padding is little enough.
    packings: list[_Packing] = []
    n_rows = total // longest
    while n_rows:
        # The mean length of so many rows, rounded up, but for the longest sequence.
        min_width = min(max(longest, -(-total // n_rows)), max_width)
        packings.append(_narrowest_packing(lengths, longest_first, n_rows, range(min_width, max_width + 1)))
        if total >= (1 - PADDING_TARGET) * packings[-1].computed_tokens or min_width == max_width:
            break
        n_rows = min(n_rows - 1, n_rows * 9 // 10)
    best = min(packings)

    # Rows of similar length share a batch, whose padding goes up to its longest row.
    rows = sorted(best.rows, key=lambda row: _tokens_of(row, lengths))
    batch_rows = max(1, max_tokens // best.width)
    return [rows[first : first + batch_rows] for first in range(0, len(rows), batch_rows)]


def pack_by_cost(lengths: Sequence[int], max_tokens: int, pairs_per_token: float) -> list[list[list[int]]]:
    """Put sequences into batches, and those of a batch into the rows that take the least time.

    A row's attention is between all pairs of its positions, so wide rows cost time as padding does. Batches are made of
    sequences of similar length, so that a long one makes the rows of its own batch wide and no others. The result is a
    pure function of the arguments.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Bound on the tokens of a batch, padding included; a longer sequence is a batch of its own.
        pairs_per_token: Pairs of positions whose attention takes as long as the rest of the model takes for a token.

    Returns:
        Batches of rows of indices into ``lengths``, as ``pack_sequences`` returns them.
    """
    groups: list[list[int]] = []
    n_tokens = 0
    # Room for the padding of rows: a full batch would have to be one row, the widest there is.
    limit = max_tokens - max_tokens // 16
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and n_tokens + lengths[i] <= limit:
            groups[-1].append(i)
            n_tokens += lengths[i]
        else:
            groups.append([i])
            n_tokens = lengths[i]

    batches: list[list[list[int]]] = []
    for group in groups:
        best = _cheapest_packing(lengths, group[::-1], max_tokens, pairs_per_token)
        # Long sequences may pad more than there is room for: then rows are shared out evenly.
        n_batches = -(-len(best.rows) // max(1, max_tokens // best.width))
        batch_rows = -(-len(best.rows) // n_batches)
        batches += [best.rows[first : first + batch_rows] for first in range(0, len(best.rows), batch_rows)]
    return batches


def _cheapest_packing(
    lengths: Sequence[int], longest_first: list[int], max_tokens: int, pairs_per_token: float
) -> _Packing:
    """Return the rows that take the least time for sequences of similar length."""
    total = _tokens_of(longest_first, lengths)
    longest = lengths[longest_first[0]]
    packings = [_Packing(total, total, [longest_first])]

    # From the narrowest rows there can be to a single one.
    n_rows = len(_best_fit(lengths, longest_first, longest))
    while n_rows > 1:
        min_width = max(longest, -(-total // n_rows))
        widths = range(min_width, max(min_width, max_tokens) + 1)
        packings.append(_narrowest_packing(lengths, longest_first, n_rows, widths))
        n_rows = min(n_rows - 1, n_rows * 9 // 10)

    return min(packings, key=lambda packing: packing.computed_tokens * (1 + packing.width / pairs_per_token))


def _narrowest_packing(lengths: Sequence[int], order: Sequence[int], n_rows: int, widths: range) -> _Packing:
    """Find the least width at which ``n_rows`` rows do (MULTIFIT: best fit within a binary search over widths)."""
    # Best fit wastes less than a fifth of a row, so that wider rows need not be tried.
    tried = range(widths.start, min(widths.start * 6 // 5, widths[-1]) + 1)

    # The first width that is wide enough: False sorts before True.
    position = bisect_left(tried, True, key=lambda width: len(_best_fit(lengths, order, width)) <= n_rows)
    # Where none is, the widest one is taken, and there are more rows.
    rows = _best_fit(lengths, order, tried[min(position, len(tried) - 1)])
    width = max(_tokens_of(row, lengths) for row in rows)
    return _Packing(len(rows) * width, width, rows)


def _best_fit(lengths: Sequence[int], order: Sequence[int], width: int) -> list[list[int]]:
    """Put each sequence, by ``order``, into the fullest row of at most ``width`` tokens that it still fits."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # free tokens of each row and its number, sorted
    for i in order:
        # The fullest row with enough room; of equally full ones the first.
        position = bisect_left(free, (lengths[i], 0))
        if position < len(free):
            free_tokens, row = free.pop(position)
        else:
            free_tokens, row = width, len(rows)
            rows.append([])
        rows[row].append(i)
        insort(free, (free_tokens - lengths[i], row))
    return rows


def _tokens_of(row: list[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in row)
