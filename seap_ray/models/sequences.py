"""Sequences: token ids, and which of them count in the statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload


@dataclass(frozen=True, slots=True)
class CountedSequence(Sequence[int]):
    """Token ids of a text of which only some count in the statistics; the model sees all of them."""

    ids: Sequence[int]
    counted: Sequence[bool]
    """Whether each token counts."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.counted), "every token counts or does not"

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> "CountedSequence": ...

    def __getitem__(self, place: int | slice) -> "int | CountedSequence":
        if isinstance(place, slice):
            return CountedSequence(self.ids[place], self.counted[place])
        return self.ids[place]


Sequences = Sequence[Sequence[int]]
"""Token ids of several texts; all of a sequence's tokens count, unless it is a ``CountedSequence``."""


def counted_of(sequence: Sequence[int]) -> Sequence[bool]:
    """Return whether each token of a sequence counts in the statistics."""
    return sequence.counted if isinstance(sequence, CountedSequence) else [True] * len(sequence)


def n_counted(sequence: Sequence[int]) -> int:
    """Return how many tokens of a sequence count in the statistics."""
    return sum(counted_of(sequence))


def joined(sequences: Sequences) -> Sequence[int]:
    """Return sequences end to end, as one."""
    ids = [*chain(*sequences)]
    if not any(isinstance(sequence, CountedSequence) for sequence in sequences):
        return ids
    return CountedSequence(ids, [*chain.from_iterable(map(counted_of, sequences))])
