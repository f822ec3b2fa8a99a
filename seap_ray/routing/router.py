"""Router: a prompt in; its task, or none, out, with a calibrated probability. ``fitting`` makes it, once a run.

Two things know the tasks. The paper's layer-0 classifier is logistic regression on the mean of the dense model's input
embeddings over a prompt's tokens; embeddings are projected once, so it is a table look-up, a mean and a small product.
And each task has the probabilities of its pairs of tokens: a prompt that surprises its likeliest task is unlike all.
Letters: V tokens, R projected dimensions, T tasks, N tokens of a prompt, K pairs of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from seap_ray.errors import ConfigError
from seap_ray.storage.files import atomic_write, read_json, sha256_of, stage, write_json
from seap_ray.storage.paths import StoragePath

LONGEST = 4096
"""Characters of a prompt that are read, from its beginning."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a prompt goes: a task's expert or, for None, the general model, and why."""

    task: str | None
    reason: Literal["routed", "unsure", "unlike"]
    confidence: float
    """Probability of the likeliest task."""
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Router:
    """A fitted router; ``route`` may be called from several threads."""

    tokenizer: Tokenizer
    tasks: tuple[str, ...]
    arrays: Arrays
    """table [V, R] float32; coefficients [R, T], intercepts [T]; seen [V]; token_logs, rest_logs [V + 1, T], pair_keys
    [K] int64 and pair_logs [K, T]: natural logarithms of the probabilities of pairs."""
    bounds: tuple[float, ...]
    """Nats per token of each task beyond which a prompt is unlike it."""
    temperature: float = 1.0
    """Divisor of the evidence."""
    weight: float = 0.0
    """Of the pairs of tokens, in units of the classifier's logits."""
    threshold: float = 0.0

    @classmethod
    def load(cls, folder: StoragePath) -> "Router":
        """Read what ``fit`` wrote. Raises ConfigError, one line, when it is missing, torn or does not match."""
        about = read_json(folder / "router.json")
        if not isinstance(about, dict):
            raise ConfigError(f"{folder}: no router, or a torn one; the job that made the run makes it again")
        try:
            if any(sha256_of(folder / name) != digest for name, digest in about["files"].items()):
                raise ValueError("a file is not the one that it was fitted with")
            bounds = tuple(math.inf if bound is None else bound for bound in about["unlike"].values())
            return cls(
                Tokenizer.from_file(str(stage(folder / "tokenizer.json"))),
                tuple(about["unlike"]),
                load_file(stage(folder / "router.safetensors")),
                bounds,
                about["temperature"],
                about["weight"],
                about["threshold"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"{folder}: the router cannot be read ({reason}); the job makes it again") from None

    def save(self, folder: StoragePath, *, made_of: str, report: dict[str, Any]) -> None:
        """Write ``tokenizer.json``, ``router.safetensors`` and, last, ``router.json`` with the hashes of the others."""
        with atomic_write(folder / "tokenizer.json") as temporary:
            self.tokenizer.save(str(temporary))
        with atomic_write(folder / "router.safetensors") as temporary:
            save_file(self.arrays, temporary)
        bounds = (None if math.isinf(bound) else bound for bound in self.bounds)
        about = {
            "fingerprint": made_of,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "weight": self.weight,
            "unlike": dict(zip(self.tasks, bounds, strict=True)),
            "files": {name: sha256_of(folder / name) for name in ("tokenizer.json", "router.safetensors")},
            "report": report,
        }
        write_json(folder / "router.json", about)

    def route(self, text: str, *, threshold: float | None = None) -> Route:
        """The task of a prompt, or None where it is unlike all tasks or less sure than the threshold."""
        ids_N = self.ids(text)
        surprise_T = self.surprise(ids_N)
        p_T = np.exp(log_softmax(self.evidence(ids_N, surprise_T) / self.temperature))
        best = int(p_T.argmax())
        confidence, probabilities = float(p_T[best]), dict(zip(self.tasks, p_T.tolist(), strict=True))
        if self.is_unlike(ids_N, surprise_T, best):
            return Route(None, "unlike", confidence, probabilities)
        if confidence < (self.threshold if threshold is None else threshold):
            return Route(None, "unsure", confidence, probabilities)
        return Route(self.tasks[best], "routed", confidence, probabilities)

    def ids(self, text: str) -> np.ndarray:
        """Tokens of a prompt's beginning; what UTF-8 cannot hold is a question mark."""
        text = text[:LONGEST].strip().encode("utf-8", "replace").decode()
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; those that the tokenizer does not have are left out."""
        size = self.tokenizer.get_vocab_size()
        return self.tokenizer.decode([i for i in ids if 0 <= i < size])

    def feature(self, ids_N: np.ndarray) -> np.ndarray:
        """Mean of the projected embeddings; that of all fitted prompts is zero."""
        table_VR = self.arrays["table"]
        if not len(ids_N):
            return np.zeros(table_VR.shape[1])
        return table_VR.take(ids_N, axis=0).mean(0, dtype=np.float64)

    def logits(self, ids_N: np.ndarray) -> np.ndarray:
        # A BLAS product's last bits depend on where its operands lie, and a threshold is some prompt's confidence.
        return (self.feature(ids_N)[:, None] * self.arrays["coefficients"]).sum(0) + self.arrays["intercepts"]

    def evidence(self, ids_N: np.ndarray, surprise_T: np.ndarray) -> np.ndarray:
        """For each task. Tokens depend on one another, so n of them count as the square root of n."""
        return self.logits(ids_N) - self.weight * math.sqrt(len(ids_N) + 1) * surprise_T

    def is_unlike(self, ids_N: np.ndarray, surprise_T: np.ndarray, task: int) -> bool:
        """Whether a prompt is empty, mostly of tokens that no fitted prompt has, or beyond the task's bound."""
        if not len(ids_N) or 2 * np.count_nonzero(self.arrays["seen"][ids_N]) < len(ids_N):
            return True
        return bool(surprise_T[task] > self.bounds[task])

    def surprise(self, ids_N: np.ndarray) -> np.ndarray:
        """Mean negative log probability in each task of a token after the one before it, the end included, in nats."""
        keys_K, n = self.arrays["pair_keys"], len(self.arrays["token_logs"])
        ids = np.concatenate([[n - 1], ids_N, [n - 1]])  # the last id stands for beginning and end
        pairs = ids[:-1] * n + ids[1:]
        at = np.minimum(np.searchsorted(keys_K, pairs), len(keys_K) - 1)
        unknown_NT = self.arrays["rest_logs"][ids[:-1]] + self.arrays["token_logs"][ids[1:]]
        logs_NT = np.where((keys_K[at] == pairs)[:, None], self.arrays["pair_logs"][at], unknown_NT)
        return -logs_NT.mean(0, dtype=np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
