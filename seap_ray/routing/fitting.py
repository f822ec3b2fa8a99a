"""Fitting: prompts of every task in, the run's router and a report of what it does with held-out prompts out.

Letters as in ``router``, and P prompts, D hidden size, F kinds of evidence.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from seap_ray.errors import ConfigError
from seap_ray.routing.router import Arrays, Route, Router, log_softmax
from seap_ray.storage.files import read_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

if TYPE_CHECKING:
    from seap_ray.models.checkpoint import Checkpoint

DIMENSIONS = 64
"""Most dimensions that embeddings are projected to."""
PARTS = (0.6, 0.2)
"""Shares of a task's prompts that are fitted and calibrated with; the others are reported on."""
PROMISE = 0.95
"""Share of the accepted calibration prompts that are their task's at the threshold."""
USUAL = 0.999
"""Probability with which a task's next prompt is below the task's bound, were their scores normal."""
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse regularisations that cross-validation chooses from."""
CURVE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Thresholds of the coverage curve."""
ROWS = 8192
"""Rows of the embedding that are converted at a time."""
LAYOUT = 1
"""Changes when the same prompts would give other files."""

Labelled = list[tuple[str, str]]
"""Prompts with their tasks."""


def fit(
    checkpoint: "Checkpoint",
    prompts: Mapping[str, Sequence[str]],
    run: Run,
    *,
    seed: int,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Fit on every task's prompts, write the run's router folder and return the report; nothing to do if it holds.

    Raises ConfigError when the model's tokenizer is not one of the ``tokenizers`` library.
    """
    from seap_ray.models.corpus import load_tokenizer, tokenizer_hash

    made_of = fingerprint(LAYOUT, checkpoint.fingerprint, tokenizer_hash(checkpoint), list(prompts.items()), seed)
    if report := _stored(run.router, made_of):
        return report
    backend = getattr(load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code), "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(f"model.source: {checkpoint.folder} has no tokenizer.json, which the router needs")
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    router, report = _fitted(checkpoint, tokenizer, prompts, seed)
    router.save(run.router, made_of=made_of, report=report)
    return report


def _stored(folder: StoragePath, made_of: str) -> dict[str, Any] | None:
    about = read_json(folder / "router.json")
    if not isinstance(about, dict) or about.get("fingerprint") != made_of:
        return None
    try:
        Router.load(folder)
    except ConfigError:
        return None
    return about["report"]


def split(prompts: Mapping[str, Sequence[str]], seed: int) -> tuple[Labelled, Labelled, Labelled]:
    """Prompts, each with its task, to fit, to calibrate and to report; a hash of content and seed decides.

    Every task has one to fit with at least, and a prompt that it has twice counts once.
    """
    parts: tuple[Labelled, Labelled, Labelled] = ([], [], [])
    for task, texts in prompts.items():
        ordered = sorted(
            set(texts), key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "replace")).digest()
        )
        first = round(PARTS[0] * len(ordered))
        second = first + round(PARTS[1] * len(ordered))
        for part, some in zip(parts, (ordered[:first], ordered[first:second], ordered[second:]), strict=True):
            part.extend((text, task) for text in some)
    return parts


def _fitted(
    checkpoint: "Checkpoint", tokenizer: Tokenizer, prompts: Mapping[str, Sequence[str]], seed: int
) -> tuple[Router, dict[str, Any]]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums, and so bytes, depend on the number of threads
        fitting, calibration, held_out = split(prompts, seed)
        router = Router(tokenizer, tuple(prompts), {}, tuple(math.inf for _ in prompts))
        router = _classifier(router, checkpoint, fitting)
        router = _calibrated(router, calibration)
        return router, measure(router, held_out)


def _classifier(router: Router, checkpoint: "Checkpoint", fitting: Labelled) -> Router:
    """The router with all of its arrays; bounds, temperature, weight and threshold are still open."""
    ids = [router.ids(text) for text, _ in fitting]
    labels_P = np.array([router.tasks.index(task) for _, task in fitting])
    n_tokens = max(router.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    table = _table(checkpoint, ids, n_tokens) if len(router.tasks) > 1 else np.zeros((n_tokens, 1), np.float32)
    router = replace(router, arrays={"table": table})
    coefficients, intercepts = _regression(np.array([router.feature(i) for i in ids]), labels_P, len(router.tasks))
    arrays = {"table": table, "coefficients": coefficients, "intercepts": intercepts}
    arrays |= _pairs(ids, labels_P, len(router.tasks), n_tokens)
    # safetensors writes an array's memory as it lies, transposed or not.
    return replace(router, arrays={name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _table(checkpoint: "Checkpoint", ids: list[np.ndarray], n_tokens: int) -> np.ndarray:
    """Embeddings on the whitened principal components of the prompts' means: [V, R], centred, float32."""
    from sklearn.decomposition import PCA

    name = checkpoint.architecture.layout.embedding
    if name not in checkpoint.tensors:
        raise ConfigError(f"model.source: {checkpoint.folder} has no tensor {name}")
    embedding_VD = checkpoint.read(name)
    means_PD = _means(embedding_VD, ids)
    with np.errstate(invalid="ignore"):  # shares of no variance, where all prompts are one
        pca = PCA(min(DIMENSIONS, *means_PD.shape), random_state=0).fit(means_PD)
    variance_R = pca.explained_variance_
    kept = variance_R > 1e-8 * variance_R[0]
    kept[0] = True
    projection_DR = (pca.components_[kept] / np.sqrt(np.maximum(variance_R[kept], 1e-30))[:, None]).T
    table_VR = np.zeros((n_tokens, projection_DR.shape[1]), np.float32)  # a token without embedding says nothing
    for start in range(0, min(n_tokens, len(embedding_VD)), ROWS):
        rows = _rows(embedding_VD, start)[: n_tokens - start]
        table_VR[start : start + len(rows)] = (rows - pca.mean_) @ projection_DR
    return table_VR


def _rows(embedding_VD: Any, start: int) -> np.ndarray:
    """Some rows in float64: NumPy knows no bfloat16."""
    return embedding_VD[start : start + ROWS].double().numpy()


def _means(embedding_VD: Any, ids: list[np.ndarray]) -> np.ndarray:
    """Every prompt's mean embedding, as one sparse product a block of rows."""
    from scipy.sparse import csc_array

    prompt = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    share = np.repeat([1 / max(len(i), 1) for i in ids], [len(i) for i in ids])
    token = np.concatenate(ids)
    has = token < len(embedding_VD)
    shares_PV = csc_array((share[has], (prompt[has], token[has])), shape=(len(ids), len(embedding_VD)))
    means_PD = np.zeros((len(ids), embedding_VD.shape[1]))
    for start in range(0, len(embedding_VD), ROWS):
        means_PD += shares_PV[:, start : start + ROWS] @ _rows(embedding_VD, start)
    return means_PD


def _regression(x_PR: np.ndarray, labels_P: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [R, T] and intercepts [T] of multinomial logistic regression."""
    if n_tasks == 1:
        return np.zeros((x_PR.shape[1], 1)), np.zeros(1)
    model = _model(_strength(x_PR, labels_P)).fit(x_PR, labels_P)
    if n_tasks == 2:  # one row: the second task's logit less the first's
        return np.vstack([-model.coef_, model.coef_]).T / 2, np.concatenate([-model.intercept_, model.intercept_]) / 2
    return model.coef_.T, model.intercept_


def _strength(x_PR: np.ndarray, labels_P: np.ndarray) -> float:
    """The inverse regularisation of least log loss in cross-validation, the stronger of two equals."""
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = min(3, int(np.bincount(labels_P).min()))
    if folds < 2:
        return 1.0
    cut = StratifiedKFold(folds, shuffle=True, random_state=0)
    scores = [cross_val_score(_model(c), x_PR, labels_P, cv=cut, scoring="neg_log_loss").mean() for c in STRENGTHS]
    return STRENGTHS[int(np.argmax(scores))]


def _model(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=10_000, tol=1e-6)


def _pairs(ids: list[np.ndarray], labels_P: np.ndarray, n_tasks: int, n_tokens: int) -> Arrays:
    """Log probabilities of token pairs in every task, smoothed as Witten and Bell do (1991).

    p(b|a) = (count(ab) + kinds(a) p(b)) / (count(a) + kinds(a)), where kinds(a) counts the tokens seen after a; p(b) is
    smoothed in the same way by the tokens of all tasks, and these by equal shares.
    """
    n = n_tokens + 1
    streams = [np.concatenate([[n - 1], i, [n - 1]]) for i in ids]
    pairs = np.concatenate([stream[:-1] * n + stream[1:] for stream in streams])
    labels = np.repeat(labels_P, [len(stream) - 1 for stream in streams])
    keys_K, at = np.unique(pairs, return_inverse=True)
    before_K, after_K = keys_K // n, keys_K % n
    counts_KT = np.bincount(at * n_tasks + labels, minlength=len(keys_K) * n_tasks).reshape(-1, n_tasks)
    tokens_VT = _sums(after_K, counts_KT, n)
    token_VT = _smoothed(tokens_VT, _smoothed(tokens_VT.sum(1, keepdims=True), np.full((n, 1), 1 / n)))
    total_VT, kinds_VT = _sums(before_K, counts_KT, n), _sums(before_K, counts_KT > 0, n)
    # After a token that a task has never seen, p(b) alone.
    rest_VT = np.where(total_VT > 0, kinds_VT / np.maximum(total_VT + kinds_VT, 1), 1.0)
    seen_KT = counts_KT / np.maximum(total_VT + kinds_VT, 1)[before_K]
    return {
        "seen": tokens_VT[:-1].any(1),
        "token_logs": np.log(token_VT).astype(np.float32),
        "rest_logs": np.log(rest_VT).astype(np.float32),
        "pair_keys": keys_K,
        "pair_logs": np.log(seen_KT + rest_VT[before_K] * token_VT[after_K]).astype(np.float32),
    }


def _sums(places_K: np.ndarray, values_KT: np.ndarray, n: int) -> np.ndarray:
    return np.stack([np.bincount(places_K, values, n) for values in values_KT.T], axis=1)


def _smoothed(counts_VT: np.ndarray, rest: np.ndarray) -> np.ndarray:
    kinds_T = np.count_nonzero(counts_VT, axis=0)
    return (counts_VT + kinds_T * rest) / (counts_VT.sum(0) + kinds_T)


def _calibrated(router: Router, calibration: Labelled) -> Router:
    """The router with bounds, temperature, weight and threshold from prompts that it was not fitted on."""
    if not calibration:
        return router
    ids = [router.ids(text) for text, _ in calibration]
    labels_P = np.array([router.tasks.index(task) for _, task in calibration])
    surprise_PT = np.array([router.surprise(i) for i in ids])
    bounds = tuple(_bound(surprise_PT[labels_P == task, task]) for task in range(len(router.tasks)))
    pairs_PT = -surprise_PT * np.sqrt([[len(i) + 1] for i in ids])
    temperature, weight = _temperature_and_weight(np.array([router.logits(i) for i in ids]), pairs_PT, labels_P)
    router = replace(router, bounds=bounds, temperature=temperature, weight=weight)
    routes = [(router.route(text, threshold=0), task) for text, task in calibration]
    return replace(router, threshold=_threshold([(r.confidence, r.task == task) for r, task in routes if r.task]))


def _bound(surprise_P: np.ndarray) -> float:
    """What the next prompt of a task stays below with probability ``USUAL``; no bound from fewer than two prompts."""
    from scipy.stats import t

    n = len(surprise_P)
    if n < 2:
        return math.inf
    spread = float(surprise_P.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return float(surprise_P.mean()) + float(t.ppf(USUAL, n - 1)) * spread


def _temperature_and_weight(logits_PT: np.ndarray, pairs_PT: np.ndarray, labels_P: np.ndarray) -> tuple[float, float]:
    """Those of least log loss, which is convex in the factors of the two kinds of evidence.

    As in Platt's scaling, the right task's target is short of 1, for a sample without errors would ask for certainty.
    """
    from scipy.optimize import minimize

    n, n_tasks = logits_PT.shape
    if n_tasks == 1:
        return 1.0, 0.0
    targets_PT = (np.eye(n_tasks)[labels_P] * n + 1) / (n + n_tasks)

    evidence_FPT = np.stack([logits_PT, pairs_PT])

    def loss(factors_F: np.ndarray) -> tuple[float, np.ndarray]:
        log_p_PT = log_softmax(np.tensordot(factors_F, evidence_FPT, 1))
        slope_PT = np.exp(log_p_PT) - targets_PT
        return -float((targets_PT * log_p_PT).sum()) / n, (evidence_FPT * slope_PT).sum((1, 2)) / n

    ours, theirs = minimize(loss, [1.0, 0.1], jac=True, bounds=[(0.1, 10), (0, 10)], tol=1e-10).x
    return 1 / float(ours), float(theirs / ours)


def _threshold(routed: list[tuple[float, bool]]) -> float:
    """The smallest confidence from which on ``PROMISE`` of the prompts are right; else that with the largest share."""
    if not routed or sum(right for _, right in routed) >= PROMISE * len(routed):
        return 0.0
    shares = {c: np.mean([right for confidence, right in routed if confidence >= c]) for c, _ in sorted(routed)}
    kept = [confidence for confidence, share in shares.items() if share >= PROMISE]
    return min(kept) if kept else max(shares, key=lambda confidence: shares[confidence])


# --- report ----------------------------------------------------------------------------------------------------------


def measure(router: Router, held_out: Labelled) -> dict[str, Any]:
    """What ``route`` does with prompts of known tasks: shares of all of them, and a count for every pair of tasks."""
    routes = [(router.route(text), task) for text, task in held_out]
    confusion: dict[str, dict[str, int]] = {task: {} for task in router.tasks}
    for route, task in routes:
        to = route.task or "general"
        confusion[task][to] = confusion[task].get(to, 0) + 1
    likeliest = [max(route.probabilities, key=route.probabilities.__getitem__) == task for route, task in routes]
    return {
        "n": len(routes),
        "accuracy": _share(likeliest),
        "accuracy_of_embeddings": _share([_by_embeddings(router, text) == task for text, task in held_out]),
        "threshold": router.threshold,
        "temperature": router.temperature,
        "weight": router.weight,
        "routed": _share([route.task is not None for route, _ in routes]),
        "unsure": _share([route.reason == "unsure" for route, _ in routes]),
        "unlike": _share([route.reason == "unlike" for route, _ in routes]),
        "confusion": confusion,
        "coverage": [_covered(routes, threshold) for threshold in CURVE],
    }


def _by_embeddings(router: Router, text: str) -> str:
    """The likeliest task without the pairs of tokens: the paper's classifier alone."""
    return router.tasks[int(router.logits(router.ids(text)).argmax())]


def _covered(routes: list[tuple[Route, str]], threshold: float) -> dict[str, float | None]:
    """Share of prompts that a threshold sends to a task, and the share of these that is right."""
    sure = [(r, task) for r, task in routes if r.reason != "unlike" and r.confidence >= threshold]
    right = [max(r.probabilities, key=r.probabilities.__getitem__) == task for r, task in sure]
    return {
        "threshold": threshold,
        "coverage": len(sure) / len(routes) if routes else None,
        "accuracy": _share(right),
    }


def _share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
