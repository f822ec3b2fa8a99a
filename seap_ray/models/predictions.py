"""Predictions: what models predict of the tokens that follow, at the positions that count alone.

Logits of all positions of a batch may not fit the memory, so they are computed for some places of its rows at a time.

Letters: B rows, T positions, D hidden size, V vocabulary, P positions whose logits are computed; N counts predicted
tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seap_ray.models.hidden_states import HiddenBatch, head_logits
from seap_ray.models.sequences import Sequences, counted_of

LOGIT_BYTES = 1 << 28
"""Bytes of the logits, float32, that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class PredictedTokens:
    """The tokens of a batch that are predicted: those that count, and are not the first of their sequence."""

    row_N: Tensor
    """Row of the position that predicts each."""
    position_N: Tensor
    """Place of that position in its row."""
    ids_N: Tensor
    """The tokens that follow."""
    sequence_N: Tensor
    """Number of the sequence of each, among those of all batches."""

    @classmethod
    def of(cls, rows: Sequence[Sequences], first_sequence: int) -> "PredictedTokens":
        """List the predicted tokens of rows of sequences, whose first has the number ``first_sequence``."""
        tokens: list[tuple[int, int, int, int]] = []
        number = first_sequence
        for row, sequences in enumerate(rows):
            start = 0
            for sequence in sequences:
                counted = counted_of(sequence)
                for place in range(1, len(sequence)):
                    if counted[place]:
                        tokens.append((row, start + place - 1, sequence[place], number))
                start += len(sequence)
                number += 1
        return cls(*torch.tensor(tokens, dtype=torch.int64).reshape(-1, 4).T)

    def chunks(self, model: Any, batch: HiddenBatch) -> "Iterator[PredictedChunk]":
        """Yield the tokens in chunks whose positions' logits are ``LOGIT_BYTES`` at most."""
        n_rows = batch.batch.ids_BT.shape[0]
        vocabulary = model.get_output_embeddings().weight.shape[0]
        size = max(1, LOGIT_BYTES // (4 * n_rows * vocabulary))

        for positions_P in self.position_N.unique().split(size):
            is_here_N = torch.isin(self.position_N, positions_P)
            # Both are ascending, so the place among the chunk's positions is found by bisection.
            place_N = torch.searchsorted(positions_P, self.position_N[is_here_N])
            yield PredictedChunk(
                positions_P, self.row_N[is_here_N], place_N, self.ids_N[is_here_N], self.sequence_N[is_here_N]
            )


@dataclass(frozen=True, slots=True)
class PredictedChunk:
    """Predicted tokens of a batch whose positions are among some places of the rows."""

    positions_P: Tensor
    """Places whose logits are computed, in every row."""
    row_N: Tensor
    """Row of the position that predicts each token."""
    place_N: Tensor
    """Index of that position among ``positions_P``."""
    ids_N: Tensor
    """The tokens, int64."""
    sequence_N: Tensor
    """Number of the sequence of each."""

    def log_probabilities(self, model: Any, batch: HiddenBatch, hidden_BTD: Tensor) -> Tensor:
        """Return the logarithms of the next-token distributions, (N, V), float32."""
        logits_BPV = head_logits(model, batch.batch, hidden_BTD, self.positions_P.to(batch.batch.ids_BT.device))
        logits_NV = logits_BPV[self.row_N.to(logits_BPV.device), self.place_N.to(logits_BPV.device)]
        return torch.log_softmax(logits_NV, -1)


def count_sequences(batch: HiddenBatch) -> int:
    """Return the number of sequences in a batch."""
    return sum(map(len, batch.rows))
