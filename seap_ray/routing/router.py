"""Router: send a prompt to its task's expert, or to the general model, with a calibrated probability.

Two kinds of evidence tell the tasks apart. The paper's layer-0 classifier is a logistic regression on the mean of the
dense model's input embeddings over a prompt's tokens; the embeddings are projected once, so that a prompt costs a table
look-up, a mean and a small product. The pair model gives each task a probability for every pair of tokens: a prompt
that is very improbable in its likeliest task is unlike all tasks. ``fitting`` fits a router, once a run.

Letters: V tokens of the vocabulary, R projected dimensions, T tasks, N tokens of a prompt, K pairs of tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from seap_ray.errors import ConfigError
from seap_ray.storage.artifact import ManifestFolder
from seap_ray.storage.digests import digest_of_file, has_digest
from seap_ray.storage.files import atomic_write, read_json, stage, write_json
from seap_ray.storage.paths import StoragePath, inside

MAX_PROMPT_CHARACTERS = 4096
"""Only the beginning of a prompt is read, so many characters."""
TOKENIZER_FILE = "tokenizer.json"
ARRAYS_FILE = "router.safetensors"
MANIFEST_FILE = "router.json"

Arrays = dict[str, np.ndarray]


def _file_digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest that a manifest states for every file; an empty one where it states none, as no file has it."""
    digests = manifest.get("files", {})
    return {name: digests.get(name, "") for name in (TOKENIZER_FILE, ARRAYS_FILE)}


ROUTER_FOLDER = ManifestFolder(MANIFEST_FILE, _file_digests)
"""How a router lies in storage."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a prompt goes, and why."""

    task: str | None
    """Task whose expert answers; None for the general model."""
    reason: Literal["routed", "unsure", "unlike"]
    confidence: float
    """Probability of the likeliest task."""
    probabilities: dict[str, float]
    """Probability of every task; they sum to 1."""


@dataclass(frozen=True, slots=True)
class PromptFrame:
    """What the model's chat template writes around a user's only message."""

    head: str
    tail: str


@dataclass(frozen=True)
class Router:
    """A fitted router. Any number of threads may call ``route`` at the same time."""

    tokenizer: Tokenizer
    tasks: tuple[str, ...]
    arrays: Arrays
    """Parameters of the classifier: table [V, R] float32, coefficients [R, T], intercepts [T]. Parameters of the pair
    model: seen [V] bool, token_logs and rest_logs [V + 1, T], pair_keys [K] int64 and pair_logs [K, T]; its
    probabilities are natural logarithms."""
    bounds: tuple[float, ...]
    """Largest surprise of each task's prompts, in nats per token; a prompt beyond its task's bound is unlike it."""
    temperature: float = 1.0
    """Divisor of the evidence before the softmax."""
    weight: float = 0.0
    """Weight of the pair model's evidence; that of the classifier's logits is 1."""
    threshold: float = 0.0
    """Least confidence with which a prompt goes to an expert."""
    frame: PromptFrame | None = None
    """Where prompts stand in a chat; None where the tasks' texts are not in a chat template."""

    @classmethod
    def load(cls, folder: StoragePath) -> "Router":
        """Read a router that ``fit`` wrote.

        Raises:
            ConfigError: A file is missing, damaged or not the one that the router was fitted with.
        """
        manifest = read_json(folder / MANIFEST_FILE)
        if not isinstance(manifest, dict):
            raise ConfigError(f"{folder}: no usable router; run jobs/prune.py again, which makes it")

        try:
            for name, digest in manifest["files"].items():
                if not has_digest(inside(folder, name, folder / MANIFEST_FILE), digest):
                    raise ValueError("a file is not the one that it was fitted with")

            # JSON has no infinity: a task without a bound has null.
            bounds = tuple(math.inf if bound is None else bound for bound in manifest["unlike"].values())
            # Routers of plain texts have no frame, as those of older versions.
            frame = PromptFrame(**manifest["frame"]) if "frame" in manifest else None
            return cls(
                Tokenizer.from_file(str(stage(folder / TOKENIZER_FILE))),
                tuple(manifest["unlike"]),
                load_file(stage(folder / ARRAYS_FILE)),
                bounds,
                manifest["temperature"],
                manifest["weight"],
                manifest["threshold"],
                frame,
            )
        # What a damaged manifest can lead to has many kinds, and all have the same remedy.
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"{folder}: the router cannot be read ({reason}); the job makes it again") from None

    def save(self, folder: StoragePath, *, key: str, report: dict[str, Any]) -> None:
        """Write the tokenizer, the arrays and, last of all, the manifest with their hashes.

        Args:
            folder: The run's router folder.
            key: Fingerprint of everything that the router was fitted on.
            report: What ``fitting.measure`` says of the router.
        """
        with atomic_write(folder / TOKENIZER_FILE) as temporary:
            self.tokenizer.save(str(temporary))

        with atomic_write(folder / ARRAYS_FILE) as temporary:
            save_file(self.arrays, temporary)

        # JSON has no infinity.
        bounds = (None if math.isinf(bound) else bound for bound in self.bounds)
        manifest = {
            "fingerprint": key,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "weight": self.weight,
            "unlike": dict(zip(self.tasks, bounds, strict=True)),
            "files": {name: digest_of_file(folder / name) for name in (TOKENIZER_FILE, ARRAYS_FILE)},
            "report": report,
        }
        if self.frame:
            manifest["frame"] = asdict(self.frame)
        write_json(folder / MANIFEST_FILE, manifest)

    def route(self, text: str, *, threshold: float | None = None) -> Route:
        """Return a prompt's task; None where the prompt is unlike all tasks or the confidence below the threshold.

        Args:
            text: The prompt, without a chat template.
            threshold: Used in place of the fitted one.
        """
        # Both kinds of evidence need the surprise, so it is computed once.
        ids_N = self.ids(text)
        surprise_T = self.surprise(ids_N)
        p_T = np.exp(log_softmax(self.evidence(ids_N, surprise_T) / self.temperature))
        likeliest = int(p_T.argmax())
        confidence = float(p_T[likeliest])
        probabilities = dict(zip(self.tasks, p_T.tolist(), strict=True))

        if self.is_unlike(ids_N, surprise_T, likeliest):
            return Route(None, "unlike", confidence, probabilities)
        if confidence < (self.threshold if threshold is None else threshold):
            return Route(None, "unsure", confidence, probabilities)
        return Route(self.tasks[likeliest], "routed", confidence, probabilities)

    def ids(self, text: str) -> np.ndarray:
        """Return the token ids (int64) of a prompt's beginning; what UTF-8 cannot hold is a question mark.

        They are those of the user's words where these stand in the model's prompt, as they are in the calibration; the
        tokens that every prompt has are evidence of nothing.
        """
        text = _beginning(text)
        if self.frame is None or not text:
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

        start = len(self.frame.head)
        encoded = self.tokenizer.encode(self._framed(text), add_special_tokens=False)
        # A token may have a character of the frame beside those of the text, such as a space.
        places = (i for i, (first, end) in enumerate(encoded.offsets) if end > start and first < start + len(text))
        return np.array([encoded.ids[i] for i in places], np.int64)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of the whole prompt that a model is given for a text, of the text's beginning."""
        text = _beginning(text)
        if self.frame is not None:
            return self.tokenizer.encode(self._framed(text), add_special_tokens=False).ids

        bare = self.tokenizer.encode(text, add_special_tokens=False).ids
        whole = self.tokenizer.encode(text)
        # Special tokens before the text stay; an end token behind what is continued does not.
        n_before = [*whole.special_tokens_mask, 0].index(0)
        return bare if bare[:n_before] == whole.ids[:n_before] else [*whole.ids[:n_before], *bare]

    def _framed(self, text: str) -> str:
        return f"{self.frame.head}{text}{self.frame.tail}" if self.frame else text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; those that the tokenizer does not have are left out."""
        # A client may send any number, and the tokenizer raises at a negative one.
        size = self.tokenizer.get_vocab_size()
        return self.tokenizer.decode([i for i in ids if 0 <= i < size])

    def feature(self, ids_N: np.ndarray) -> np.ndarray:
        """Return the mean of a prompt's projected embeddings [R]; the mean over all fitted prompts is zero."""
        table_VR = self.arrays["table"]
        if not len(ids_N):  # no token, so no mean: the middle of all prompts favours no task
            return np.zeros(table_VR.shape[1])

        # The table is float32 to be small; sums in float64 hardly depend on the order of the tokens.
        return table_VR.take(ids_N, axis=0).mean(0, dtype=np.float64)

    def logits(self, ids_N: np.ndarray) -> np.ndarray:
        """Return the classifier's logits [T]."""
        # A BLAS product's last bits depend on where its operands lie, and a threshold is some prompt's confidence.
        return (self.feature(ids_N)[:, None] * self.arrays["coefficients"]).sum(0) + self.arrays["intercepts"]

    def evidence(self, ids_N: np.ndarray, surprise_T: np.ndarray) -> np.ndarray:
        """Return the evidence for each task [T]: the classifier's logits and the weighted log probability of the pairs.

        Tokens depend on one another, so n of them count as the square root of n.
        """
        return self.logits(ids_N) - self.weight * math.sqrt(len(ids_N) + 1) * surprise_T

    def is_unlike(self, ids_N: np.ndarray, surprise_T: np.ndarray, task: int) -> bool:
        """Return whether a prompt is empty, mostly of tokens that no fitted prompt has, or beyond the task's bound."""
        if not len(ids_N) or 2 * np.count_nonzero(self.arrays["seen"][ids_N]) < len(ids_N):
            return True
        return bool(surprise_T[task] > self.bounds[task])

    def surprise(self, ids_N: np.ndarray) -> np.ndarray:
        """Return the mean negative log probability, in each task [T], of a token after the one before it, in nats.

        The beginning and the end of the prompt count as tokens.
        """
        keys_K = self.arrays["pair_keys"]
        n = len(self.arrays["token_logs"])
        ids = np.concatenate([[n - 1], ids_N, [n - 1]])  # the last id stands for beginning and end
        pairs = ids[:-1] * n + ids[1:]

        # Pairs that the fitted prompts have are looked up by binary search; all others follow from single tokens.
        at = np.minimum(np.searchsorted(keys_K, pairs), len(keys_K) - 1)
        unknown_NT = self.arrays["rest_logs"][ids[:-1]] + self.arrays["token_logs"][ids[1:]]
        logs_NT = np.where((keys_K[at] == pairs)[:, None], self.arrays["pair_logs"][at], unknown_NT)
        return -logs_NT.mean(0, dtype=np.float64)


def _beginning(text: str) -> str:
    """Return what is read of a prompt; what UTF-8 cannot hold is a question mark."""
    return text[:MAX_PROMPT_CHARACTERS].strip().encode("utf-8", "replace").decode()


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last axis."""
    x = x - x.max(-1, keepdims=True)  # so that no exponential overflows
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
