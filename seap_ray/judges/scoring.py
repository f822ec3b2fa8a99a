"""Scoring: a model and token sequences in; log-likelihoods of their ends out.

Letters: B rows, T positions, N positions that predict, P predicted tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seap_ray.core.families import family_of
from seap_ray.models.loading import decoder_of
from seap_ray.models.token_trees import TreeBatch, make_tree_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LOGITS = 1 << 25
"""Logits that are in memory at a time, 128 MiB in float32: those of a batch would not fit beside a large vocabulary."""
BLOCK_LOGITS = 1 << 21
"""Logits that are summed at a time: sums over more of them wait for memory, not for cores."""

Continuation = tuple[list[int], int]
"""Token ids, and where in them begins what is scored, never at 0: a first token has nothing that predicts it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-likelihood of a continuation, its length in tokens, and whether greedy decoding would have written it."""

    log_likelihood: float
    n_tokens: int
    is_greedy: bool


@torch.inference_mode()
def score(model: "PreTrainedModel", continuations: Sequence[Continuation], *, batch_tokens: int) -> list[Scored]:
    """Score each continuation, in order, as one forward pass over its sequence alone would.

    Where neighbours begin alike, as the choices of a question do, what they share is computed once. The last token of a
    sequence is predicted and not read.

    Args:
        model: A causal language model of a supported family.
        continuations: What to score; no sequence is longer than the model's positions and a last token.
        batch_tokens: Tokens in a batch, padding included.
    """
    # A continuation of no token, such as a blank choice, needs nothing to be read.
    read = [ids[:-1] if start < len(ids) else [] for ids, start in continuations]

    log_likelihoods = [0.0] * len(continuations)
    is_greedy = [True] * len(continuations)
    decoder = decoder_of(model)
    for batch in make_tree_batches(decoder, read, batch_tokens):
        hidden_BTD = decoder(**batch.inputs(decoder.config, model.dtype), use_cache=False).last_hidden_state
        predictions = _predictions(batch, continuations)
        scores = _score_predictions(model, hidden_BTD.flatten(0, 1), predictions)

        # Sums of Python's floats are in float64: texts may be long.
        for (_, _, i), log_probability, is_first in zip(predictions, *scores, strict=True):
            log_likelihoods[i] += log_probability
            is_greedy[i] &= is_first

    n_tokens = [len(ids) - start for ids, start in continuations]
    return [Scored(*values) for values in zip(log_likelihoods, n_tokens, is_greedy, strict=True)]


Prediction = tuple[int, int, int]
"""A place in a batch, the token that is predicted there, and the number of its continuation."""


def _predictions(batch: TreeBatch, continuations: Sequence[Continuation]) -> list[Prediction]:
    """Return what is predicted in a batch, by place; several tokens where branches part."""
    predictions: list[Prediction] = []
    for i, path in batch.paths.items():
        ids, start = continuations[i]
        # A position predicts the token after it.
        predictions += [(place, target, i) for place, target in zip(path[start - 1 :], ids[start:], strict=True)]
    return sorted(predictions)


def _score_predictions(
    model: "PreTrainedModel", hidden_ND: Tensor, predictions: Sequence[Prediction]
) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each predicted token, and whether it is the likeliest at its place."""
    head: Any = model.get_output_embeddings()
    # Some families scale logits in their own forward, which is not run here, and Gemma 2 caps them.
    scale = _logit_scale(decoder_of(model).config)
    cap = getattr(model.config, "final_logit_softcapping", None)

    places, targets, _ = zip(*predictions, strict=True)
    # Logits are made once for each place that predicts anything.
    unique_N, place_P = torch.tensor(places).unique_consecutive(return_inverse=True)
    target_P = torch.tensor(targets)

    log_probabilities: list[float] = []
    is_first: list[bool] = []
    for chunk in _chunks(place_P, max(1, MAX_LOGITS // model.config.vocab_size)):
        chunk_P = place_P[chunk]
        first = int(chunk_P[0])
        chosen_N = unique_N[first : int(chunk_P[-1]) + 1].to(hidden_ND.device)
        logits_NV = head(hidden_ND[chosen_N])
        log_total_N, likeliest_N = _totals(logits_NV, scale, cap)

        # With a device map the head may be on another GPU than the decoder's output.
        row_P = (chunk_P - first).to(logits_NV.device)
        chunk_target_P = target_P[chunk].to(logits_NV.device)
        chosen_P = _finished(logits_NV[row_P, chunk_target_P], scale, cap)
        log_probabilities += (chosen_P - log_total_N[row_P]).tolist()
        is_first += (likeliest_N[row_P] == chunk_target_P).tolist()

    return log_probabilities, is_first


def _chunks(place_P: Tensor, size: int) -> Iterator[slice]:
    """Yield slices of predictions, ordered by place, with at most ``size`` places each."""
    bounds = torch.arange(0, int(place_P[-1]) + 1 + size, size)
    edges = torch.searchsorted(place_P, bounds).tolist()
    for first, behind in zip(edges, edges[1:], strict=False):
        if first < behind:
            yield slice(first, behind)


def _totals(logits_NV: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum over each place's exponentials, and its likeliest token, the first of equals."""
    log_totals: list[Tensor] = []
    likeliest: list[Tensor] = []
    for block_NV in logits_NV.split(max(1, BLOCK_LOGITS // logits_NV.shape[1])):
        block_NV = _finished(block_NV, scale, cap)
        log_totals.append(block_NV.logsumexp(-1))
        likeliest.append(block_NV.argmax(-1))
    return torch.cat(log_totals), torch.cat(likeliest)


def _logit_scale(config: Any) -> float:
    """Return what a family's forward multiplies logits by, 1 where it leaves them as the head makes them."""
    family = family_of(config.model_type)
    times = getattr(config, family.logits_times) if family.logits_times else 1.0
    return times / getattr(config, family.logits_over) if family.logits_over else times


def _finished(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """Return logits as the family's forward gives them, float32."""
    scaled = logits.float() if scale == 1 else logits.float() * scale
    return cap * (scaled / cap).tanh() if cap else scaled
