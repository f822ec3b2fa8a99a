"""Quality: one model and one task's rows in; accuracy or perplexity with its standard error out."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from seap_ray.errors import DataError
from seap_ray.judges.scoring import Continuation, Scored, score
from seap_ray.models.corpus import Item
from seap_ray.models.encoding import Encoding
from seap_ray.tasks import Task, is_perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric's value on one task with its standard error.

    The standard error of a perplexity is that of the mean token loss, so relative to the perplexity.
    """

    metric: str
    value: float
    stderr: float
    n: int
    """Number of items, or for perplexity of tokens."""
    values: tuple[float, ...] = ()
    """Each item's part: 1 or 0 for right or wrong, or its summed token loss in nats."""
    weights: tuple[int, ...] = ()
    """Number of tokens of each item; for an accuracy all 1."""

    @classmethod
    def of(cls, metric: str, values: Sequence[float], weights: Sequence[int] | None = None) -> "Quality":
        """Take the mean ``sum(values) / sum(weights)``, for perplexity its exponential.

        The standard error is that of a ratio of sums over independent items; for an accuracy p over n items it is
        sqrt(p (1 - p) / (n - 1)), as lm-eval computes it.
        """
        weights = tuple(weights or [1] * len(values))
        n = len(values)
        total = sum(weights)
        mean = sum(values) / total

        # One item has no spread: the divisor keeps it from dividing by 0.
        squares = sum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
        stderr = math.sqrt(squares * n / max(n - 1, 1)) / total

        return cls(metric, math.exp(mean) if is_perplexity(metric) else mean, stderr, total, tuple(values), weights)

    def against(self, other: "Quality") -> tuple[float, float] | None:
        """Return how far this is from another model's quality on the same items, and the standard error of that.

        Of accuracies it is the difference, of perplexities the quotient, whose standard error is that of its logarithm.
        The standard error is that of the items' differences: what is hard for both models does not widen it. None where
        the two were not measured over the same tokens or as many items, as of models with different tokenizers.
        """
        if self.metric != other.metric or self.weights != other.weights or not self.values:
            return None
        differences = [mine - others for mine, others in zip(self.values, other.values, strict=True)]
        difference = Quality.of(self.metric, differences, self.weights)
        return difference.value, difference.stderr

    @classmethod
    def stored(cls, values: dict[str, Any]) -> "Quality":
        """Read the JSON of ``dataclasses.asdict``; what else a result's file has is passed over."""
        names = [field.name for field in fields(cls)]
        stored = {name: values[name] for name in names}
        return cls(**{**stored, "values": tuple(values["values"]), "weights": tuple(values["weights"])})


def measure(
    model: "PreTrainedModel",
    encoding: Encoding,
    task: Task,
    items: Sequence[Item],
    *,
    batch_tokens: int,
) -> Quality:
    """Judge a model on one task's rows.

    A perplexity is of whole texts; of conversations in a chat template it is of the answers, given what comes before.

    Args:
        model: A causal language model.
        encoding: How the task's texts become token ids of the model.
        task: A task with one of our metrics; windows of a text are for ``measure_windows``.
        items: The task's rows.
        batch_tokens: Tokens in a batch, padding included.

    Raises:
        DataError: The chat template does not take a row, or the model has no embedding for a token; it names the task.
    """
    embedding: Any = model.get_input_embeddings()
    try:
        encoded = _encode(encoding, task, items)
        encoding.check_ids([ids for ids, _ in encoded], embedding.num_embeddings)
    except DataError as error:
        raise DataError(f"tasks.{task.name}: {error}") from None

    scored = score(model, _cut(model, encoded), batch_tokens=batch_tokens)
    if task.metric == "perplexity":
        return _perplexity(task.metric, scored)
    if task.metric == "exact_match":
        return Quality.of(task.metric, [float(s.is_greedy) for s in scored])

    # The choices of all items were scored in one go, so that batches are full, and are dealt out again.
    scored_choices = iter(scored)
    right = []
    for item in items:
        of_item = [next(scored_choices) for _ in item.choices]
        right.append(float(_is_right(item, of_item, task.metric)))

    return Quality.of(task.metric, right)


def _encode(encoding: Encoding, task: Task, items: Sequence[Item]) -> list[Continuation]:
    """Return what is scored of the items: their texts, their answers, or all of their choices."""
    if task.metric == "perplexity":
        return [encoding.whole(item) for item in items]
    if task.metric == "exact_match":
        return [encoding.continuation(item, item.answer) for item in items]
    return [encoding.continuation(item, choice) for item in items for choice in item.choices]


def windows(ids: Sequence[int], window: int, *, samples: int | None, seed: int) -> list[Sequence[int]]:
    """Cut a text's token ids into windows that do not overlap, and draw ``samples`` of them at random, in order.

    What is left at the end is dropped; a text shorter than a window is one window.
    """
    starts = list(range(0, len(ids) - window + 1, window)) or [0]

    # Sorted, so that the order of the windows does not depend on the draw.
    if samples is not None and samples < len(starts):
        starts = sorted(random.Random(seed).sample(starts, samples))
    return [ids[start : start + window] for start in starts]


def measure_windows(model: "PreTrainedModel", windows: list[Sequence[int]], *, batch_tokens: int) -> Quality:
    """Measure the perplexity over windows of one text, each predicted from its second token on by itself alone.

    This is the convention of GPTQ, SparseGPT and Wanda. The text is tokenised as a whole, so only the first window may
    begin with a special token.
    """
    scored = score(model, [(list(ids), 1) for ids in windows], batch_tokens=batch_tokens)
    return _perplexity("window_perplexity", scored)


def _perplexity(metric: str, scored: Sequence[Scored]) -> Quality:
    return Quality.of(metric, [-s.log_likelihood for s in scored], [s.n_tokens for s in scored])


def _is_right(item: Item, scored: list[Scored], metric: str) -> bool:
    """Return whether the likeliest choice is the right one.

    The metric ``acc_norm`` divides by the choice's bytes, as lm-eval does.
    """
    values = []
    for choice_scored, choice in zip(scored, item.choices, strict=True):
        divisor = len(choice.encode()) if metric == "acc_norm" else 1
        # A blank choice is no answer, and may have no token that could be unlikely.
        values.append(choice_scored.log_likelihood / divisor if choice.strip() else -math.inf)

    # Of two equally likely choices the first counts.
    return item.is_right(values.index(max(values)))


def _cut(model: "PreTrainedModel", encoded: Sequence[Continuation]) -> list[Continuation]:
    """Leave out the beginning of texts that are longer than the model's positions."""
    # A config without that key has a model without a bound on positions; 2048 is what lm-eval takes there too.
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    return [_last(ids, start, limit) for ids, start in encoded]


def _last(ids: list[int], start: int, limit: int) -> Continuation:
    """Return the last ``limit`` token ids, and where the continuation starts in them."""
    # Of a continuation that fills the context its first token is given.
    if len(ids) > limit and start < len(ids) - limit + 1:
        start = len(ids) - limit + 1

    # The end is kept: it has the continuation.
    dropped = max(0, len(ids) - limit)
    return ids[dropped:], start - dropped
