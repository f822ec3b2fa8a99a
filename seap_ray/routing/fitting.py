"""Fitting: fit a run's router on the prompts of every task, and report what it does with held-out prompts.

Letters as in ``router``, and P prompts, D hidden size, F kinds of evidence.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from seap_ray.errors import ConfigError
from seap_ray.routing.router import ROUTER_FOLDER, Arrays, PromptFrame, Route, Router, log_softmax
from seap_ray.storage.artifact import Artifact
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seap_ray.models.checkpoint import Checkpoint

MAX_DIMENSIONS = 64
"""Most dimensions that embeddings are projected to."""
SPLIT = (0.6, 0.2)
"""Shares of a task's prompts that the router is fitted and calibrated on; the rest is held out for the report."""
TARGET_PRECISION = 0.95
"""Share of the calibration prompts sent to an expert that are sent to the right one, at the fitted threshold."""
OOD_QUANTILE = 0.999
"""Probability with which a task's next prompt is below the task's bound, if surprises are normally distributed."""
INVERSE_REGULARISATIONS = (0.01, 0.1, 1.0, 10.0)
"""Values of the logistic regression's C that cross-validation chooses from."""
COVERAGE_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Thresholds of the report's coverage curve."""
BLOCK_ROWS = 8192
"""Rows of the embedding that are converted to float64 at a time."""
FORMAT_VERSION = 1
"""To be raised when the same prompts give other files."""

Labelled = list[tuple[str, str]]
"""Prompts with their tasks."""


def fit(
    checkpoint: "Checkpoint",
    prompts: Mapping[str, Sequence[str]],
    run: Run,
    *,
    seed: int,
    is_chat: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Fit the run's router and return its report; a router that was fitted on the same prompts is read back.

    Args:
        checkpoint: The dense model: its tokenizer and input embeddings are used.
        prompts: Prompts of every task, by its name.
        run: The router is written to ``run.router``.
        seed: Decides which prompts are held out.
        is_chat: Whether prompts are read where they stand in the model's chat template.
        trust_remote_code: Whether the tokenizer may run the checkpoint's own code.

    Raises:
        ConfigError: The model's tokenizer is not one of the ``tokenizers`` library.
    """
    from seap_ray.models.corpus import load_tokenizer, tokenizer_hash
    from seap_ray.models.encoding import prompt_frame

    loaded = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    around = prompt_frame(loaded) if is_chat else None
    frame = PromptFrame(*around) if around else None

    inputs = [FORMAT_VERSION, checkpoint.fingerprint, tokenizer_hash(checkpoint), list(prompts.items()), seed]
    # Without a frame the key is that of routers that knew none.
    key = fingerprint(*inputs, *(around or ()))

    def build() -> None:
        """Fit the router and write it."""
        router, report = _fit_router(checkpoint, _bare_tokenizer(checkpoint, loaded), frame, prompts, seed)
        router.save(run.router, key=key, report=report)

    # The manifest has no hash of its own: what is wrong in it shows when the router is read.
    if not _is_readable(run.router):
        build()
    return Artifact(run.router, key, ROUTER_FOLDER).get(build)["report"]


def _is_readable(folder: StoragePath) -> bool:
    try:
        Router.load(folder)
    except ConfigError:
        return False
    return True


def _bare_tokenizer(checkpoint: "Checkpoint", loaded: "PreTrainedTokenizerBase") -> Tokenizer:
    """Return the tokenizer as the service runs it: without transformers, truncation or padding."""
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(f"model.source: {checkpoint.folder} has no tokenizer.json, which the router needs")

    # A copy, since what follows would change the tokenizer of its owner, too.
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def split(prompts: Mapping[str, Sequence[str]], seed: int) -> tuple[Labelled, Labelled, Labelled]:
    """Return the prompts to fit on, to calibrate on and to report on, each with its task.

    A hash of content and seed decides, so the order of the prompts does not matter. Every task has at least one prompt
    to fit on; a prompt that a task has twice counts once.
    """
    fitting: Labelled = []
    calibration: Labelled = []
    held_out: Labelled = []

    for task, texts in prompts.items():
        # By hash, so that another order of the prompts, or more of them, moves few between the parts.
        ordered = sorted(set(texts), key=lambda text: _order_of(text, seed))
        first = round(SPLIT[0] * len(ordered))
        second = first + round(SPLIT[1] * len(ordered))
        fitting += [(text, task) for text in ordered[:first]]
        calibration += [(text, task) for text in ordered[first:second]]
        held_out += [(text, task) for text in ordered[second:]]

    return fitting, calibration, held_out


def _order_of(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "replace")).digest()


def _fit_router(
    checkpoint: "Checkpoint",
    tokenizer: Tokenizer,
    frame: PromptFrame | None,
    prompts: Mapping[str, Sequence[str]],
    seed: int,
) -> tuple[Router, dict[str, Any]]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums, and so bytes, depend on the number of threads
        fitting, calibration, held_out = split(prompts, seed)
        router = Router(tokenizer, tuple(prompts), {}, tuple(math.inf for _ in prompts), frame=frame)
        router = _fit_arrays(router, checkpoint, fitting)
        router = _calibrate(router, calibration)
        return router, measure(router, held_out)


def _fit_arrays(router: Router, checkpoint: "Checkpoint", fitting: Labelled) -> Router:
    """Return the router with all of its arrays; bounds, temperature, weight and threshold are still open."""
    n_tasks = len(router.tasks)
    ids = [router.ids(text) for text, _ in fitting]
    labels_P = np.array([router.tasks.index(task) for _, task in fitting])
    n_tokens = max(router.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    # A single task needs no classifier, so no embeddings either.
    if n_tasks > 1:
        table = _projected_embeddings(checkpoint, ids, n_tokens)
    else:
        table = np.zeros((n_tokens, 1), np.float32)

    # The classifier is fitted on the features that the router itself computes from the rounded table.
    router = replace(router, arrays={"table": table})
    features_PR = np.array([router.feature(prompt_ids) for prompt_ids in ids])
    coefficients, intercepts = _fit_regression(features_PR, labels_P, n_tasks)
    arrays = {"table": table, "coefficients": coefficients, "intercepts": intercepts}
    arrays |= _pair_probabilities(ids, labels_P, n_tasks, n_tokens)

    # safetensors writes an array's memory as it lies, transposed or not.
    return replace(router, arrays={name: np.ascontiguousarray(array) for name, array in arrays.items()})


# --- the classifier --------------------------------------------------------------------------------------------------


def _projected_embeddings(checkpoint: "Checkpoint", ids: list[np.ndarray], n_tokens: int) -> np.ndarray:
    """Return the embeddings on the whitened principal components of the prompts' means: [V, R], centred, float32."""
    from sklearn.decomposition import PCA

    name = checkpoint.architecture.family.embedding
    if name not in checkpoint.tensors:
        raise ConfigError(f"model.source: {checkpoint.folder} has no tensor {name}")

    embedding_VD = checkpoint.read(name)
    means_PD = _mean_embeddings(embedding_VD, ids)

    with np.errstate(invalid="ignore"):  # shares of no variance, where all prompts are one
        pca = PCA(min(MAX_DIMENSIONS, *means_PD.shape), random_state=0).fit(means_PD)

    # Components without variance would be divided by zero; the first stays even so, for the table needs a column.
    variance_R = pca.explained_variance_
    kept = variance_R > 1e-8 * variance_R[0]
    kept[0] = True
    # Whitened: every component has variance 1, so the regression's penalty treats all alike.
    projection_DR = (pca.components_[kept] / np.sqrt(np.maximum(variance_R[kept], 1e-30))[:, None]).T

    table_VR = np.zeros((n_tokens, projection_DR.shape[1]), np.float32)  # a token without embedding says nothing
    for start in range(0, min(n_tokens, len(embedding_VD)), BLOCK_ROWS):
        rows = _rows(embedding_VD, start)[: n_tokens - start]
        table_VR[start : start + len(rows)] = (rows - pca.mean_) @ projection_DR

    return table_VR


def _rows(embedding_VD: Any, start: int) -> np.ndarray:
    """Return a block of rows in float64: NumPy knows no bfloat16."""
    return embedding_VD[start : start + BLOCK_ROWS].double().numpy()


def _mean_embeddings(embedding_VD: Any, ids: list[np.ndarray]) -> np.ndarray:
    """Return every prompt's mean embedding [P, D], as one sparse product for each block of rows."""
    from scipy.sparse import csc_array

    lengths = [len(prompt_ids) for prompt_ids in ids]
    prompt = np.repeat(np.arange(len(ids)), lengths)
    share = np.repeat([1 / max(length, 1) for length in lengths], lengths)
    token = np.concatenate(ids)

    # The tokenizer may have more tokens than the embedding has rows.
    has = token < len(embedding_VD)
    shares_PV = csc_array((share[has], (prompt[has], token[has])), shape=(len(ids), len(embedding_VD)))

    means_PD = np.zeros((len(ids), embedding_VD.shape[1]))
    for start in range(0, len(embedding_VD), BLOCK_ROWS):
        means_PD += shares_PV[:, start : start + BLOCK_ROWS] @ _rows(embedding_VD, start)

    return means_PD


def _fit_regression(x_PR: np.ndarray, labels_P: np.ndarray, n_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients [R, T] and intercepts [T] of multinomial logistic regression."""
    if n_tasks == 1:
        return np.zeros((x_PR.shape[1], 1)), np.zeros(1)

    model = _logistic_regression(_choose_regularisation(x_PR, labels_P)).fit(x_PR, labels_P)
    if n_tasks == 2:
        # scikit-learn has one row for two classes: the second's logit less the first's.
        coefficients = np.vstack([-model.coef_, model.coef_]).T / 2
        return coefficients, np.concatenate([-model.intercept_, model.intercept_]) / 2
    return model.coef_.T, model.intercept_


def _choose_regularisation(x_PR: np.ndarray, labels_P: np.ndarray) -> float:
    """Return the C with the least log loss in cross-validation; of two equals the smaller, which regularises more."""
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    # A fold needs a prompt of every task.
    n_folds = min(3, int(np.bincount(labels_P).min()))
    if n_folds < 2:
        return 1.0

    folds = StratifiedKFold(n_folds, shuffle=True, random_state=0)
    scores = []
    for c in INVERSE_REGULARISATIONS:
        score = cross_val_score(_logistic_regression(c), x_PR, labels_P, cv=folds, scoring="neg_log_loss")
        scores.append(score.mean())

    return INVERSE_REGULARISATIONS[int(np.argmax(scores))]


def _logistic_regression(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=10_000, tol=1e-6)


# --- the pair model --------------------------------------------------------------------------------------------------


def _pair_probabilities(ids: list[np.ndarray], labels_P: np.ndarray, n_tasks: int, n_tokens: int) -> Arrays:
    """Return log probabilities of token pairs in every task, smoothed as Witten and Bell do (1991).

    p(b|a) = (count(ab) + kinds(a) p(b)) / (count(a) + kinds(a)), where kinds(a) counts the tokens seen after a; p(b) is
    smoothed in the same way by the tokens of all tasks, and these by equal shares.
    """
    n = n_tokens + 1
    streams = [np.concatenate([[n - 1], prompt_ids, [n - 1]]) for prompt_ids in ids]  # n - 1 is beginning and end
    pairs = np.concatenate([stream[:-1] * n + stream[1:] for stream in streams])
    labels = np.repeat(labels_P, [len(stream) - 1 for stream in streams])

    # Every pair of tokens is one number, and counted once for each task.
    keys_K, at = np.unique(pairs, return_inverse=True)
    before_K = keys_K // n
    after_K = keys_K % n
    counts_KT = np.bincount(at * n_tasks + labels, minlength=len(keys_K) * n_tasks).reshape(-1, n_tasks)

    # p(b): counts of tokens, smoothed by those of all tasks.
    token_counts_VT = _sum_by_token(after_K, counts_KT, n)
    all_tasks_V1 = _smooth(token_counts_VT.sum(1, keepdims=True), np.full((n, 1), 1 / n))
    token_probs_VT = _smooth(token_counts_VT, all_tasks_V1)

    # count(a) and kinds(a).
    pair_counts_VT = _sum_by_token(before_K, counts_KT, n)
    kinds_VT = _sum_by_token(before_K, counts_KT > 0, n)

    # After a token that a task has never seen, p(b) alone.
    rest_VT = np.where(pair_counts_VT > 0, kinds_VT / np.maximum(pair_counts_VT + kinds_VT, 1), 1.0)
    discounted_KT = counts_KT / np.maximum(pair_counts_VT + kinds_VT, 1)[before_K]
    return {
        "seen": token_counts_VT[:-1].any(1),  # without the last, which is no token
        "token_logs": np.log(token_probs_VT).astype(np.float32),
        "rest_logs": np.log(rest_VT).astype(np.float32),
        "pair_keys": keys_K,
        "pair_logs": np.log(discounted_KT + rest_VT[before_K] * token_probs_VT[after_K]).astype(np.float32),
    }


def _sum_by_token(tokens_K: np.ndarray, values_KT: np.ndarray, n: int) -> np.ndarray:
    """Return the sums [V, T] of the values of all pairs with the same token."""
    return np.stack([np.bincount(tokens_K, values, n) for values in values_KT.T], axis=1)


def _smooth(counts_VT: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Return probabilities by Witten and Bell: ``rest`` is the distribution of what was not seen."""
    kinds_T = np.count_nonzero(counts_VT, axis=0)
    return (counts_VT + kinds_T * rest) / (counts_VT.sum(0) + kinds_T)


# --- calibration -----------------------------------------------------------------------------------------------------


def _calibrate(router: Router, calibration: Labelled) -> Router:
    """Return the router with bounds, temperature, weight and threshold from prompts that it was not fitted on."""
    if not calibration:  # too few prompts to spare any
        return router

    ids = [router.ids(text) for text, _ in calibration]
    labels_P = np.array([router.tasks.index(task) for _, task in calibration])
    surprise_PT = np.array([router.surprise(prompt_ids) for prompt_ids in ids])
    bounds = tuple(_surprise_bound(surprise_PT[labels_P == task, task]) for task in range(len(router.tasks)))

    # The two kinds of evidence for every prompt, as ``Router.evidence`` adds them up.
    logits_PT = np.array([router.logits(prompt_ids) for prompt_ids in ids])
    lengths_P1 = np.array([[len(prompt_ids) + 1] for prompt_ids in ids])
    pairs_PT = -surprise_PT * np.sqrt(lengths_P1)
    temperature, weight = _temperature_and_weight(logits_PT, pairs_PT, labels_P)
    router = replace(router, bounds=bounds, temperature=temperature, weight=weight)

    return replace(router, threshold=_choose_threshold(list(_confidences(router, calibration))))


def _surprise_bound(surprise_P: np.ndarray) -> float:
    """Return the upper prediction limit of a task's next prompt at ``OOD_QUANTILE``, by Student's t.

    Fewer than two prompts give no bound, so infinity.
    """
    from scipy.stats import t

    n = len(surprise_P)
    if n < 2:
        return math.inf

    # The next prompt spreads around a mean that is itself uncertain: hence 1 + 1 / n.
    spread = float(surprise_P.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return float(surprise_P.mean()) + float(t.ppf(OOD_QUANTILE, n - 1)) * spread


def _temperature_and_weight(logits_PT: np.ndarray, pairs_PT: np.ndarray, labels_P: np.ndarray) -> tuple[float, float]:
    """Return the two with the least log loss, which is convex in the factors of the two kinds of evidence.

    As in Platt's scaling, the right task's target is short of 1, for a sample without errors would ask for certainty.
    """
    from scipy.optimize import minimize

    n, n_tasks = logits_PT.shape
    if n_tasks == 1:  # its probability is 1 whatever the factors are
        return 1.0, 0.0

    targets_PT = (np.eye(n_tasks)[labels_P] * n + 1) / (n + n_tasks)
    evidence_FPT = np.stack([logits_PT, pairs_PT])

    def loss(factors_F: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the log loss and its gradient."""
        log_p_PT = log_softmax(np.tensordot(factors_F, evidence_FPT, 1))
        slope_PT = np.exp(log_p_PT) - targets_PT
        return -float((targets_PT * log_p_PT).sum()) / n, (evidence_FPT * slope_PT).sum((1, 2)) / n

    # Convex, so the start does not matter. The bounds keep both finite where the tasks part without an error.
    classifier, pair_model = minimize(loss, [1.0, 0.1], jac=True, bounds=[(0.1, 10), (0, 10)], tol=1e-10).x
    return 1 / float(classifier), float(pair_model / classifier)


def _confidences(router: Router, calibration: Labelled) -> Iterator[tuple[float, bool]]:
    """Yield the confidence of every prompt that is like some task, and whether its likeliest task is right."""
    for text, task in calibration:
        # At threshold 0 a prompt has no task only where it is unlike all, which no threshold changes.
        route = router.route(text, threshold=0)
        if route.task:
            yield route.confidence, route.task == task


def _choose_threshold(routed: list[tuple[float, bool]]) -> float:
    """Return the smallest confidence from which on ``TARGET_PRECISION`` of the prompts are right.

    Where no confidence reaches it, the one with the largest share of right prompts.
    """
    # Where all together are precise enough, no prompt need be held back.
    if not routed or sum(right for _, right in routed) >= TARGET_PRECISION * len(routed):
        return 0.0

    # Only the confidence of some prompt can be the smallest that is precise enough.
    precision = {threshold: _precision(routed, threshold) for threshold, _ in sorted(routed)}
    precise = [threshold for threshold, share in precision.items() if share >= TARGET_PRECISION]
    return min(precise) if precise else max(precision, key=lambda threshold: precision[threshold])


def _precision(routed: list[tuple[float, bool]], threshold: float) -> float:
    """Return the share of right ones among the prompts whose confidence reaches the threshold."""
    return float(np.mean([right for confidence, right in routed if confidence >= threshold]))


# --- report ----------------------------------------------------------------------------------------------------------


def measure(router: Router, held_out: Labelled) -> dict[str, Any]:
    """Return the router's report: what ``route`` does with prompts of known tasks.

    ``n`` prompts. Shares of them: ``accuracy`` (the likeliest task is right), ``accuracy_of_embeddings`` (by the
    classifier alone), ``routed`` (sent to an expert), ``unsure`` and ``unlike`` (why the others were not).
    ``confusion`` counts prompts by their task and where they were sent, ``coverage`` says what other thresholds do.
    """
    routes = [(router.route(text), task) for text, task in held_out]
    confusion: dict[str, dict[str, int]] = {task: {} for task in router.tasks}
    for route, task in routes:
        to = route.task or "general"
        confusion[task][to] = confusion[task].get(to, 0) + 1

    return {
        "n": len(routes),
        "accuracy": _share([_likeliest(route) == task for route, task in routes]),
        "accuracy_of_embeddings": _share([_by_embeddings(router, text) == task for text, task in held_out]),
        "threshold": router.threshold,
        "temperature": router.temperature,
        "weight": router.weight,
        "routed": _share([route.task is not None for route, _ in routes]),
        "unsure": _share([route.reason == "unsure" for route, _ in routes]),
        "unlike": _share([route.reason == "unlike" for route, _ in routes]),
        "confusion": confusion,
        "coverage": [_coverage_at(threshold, routes) for threshold in COVERAGE_THRESHOLDS],
    }


def _likeliest(route: Route) -> str:
    return max(route.probabilities, key=route.probabilities.__getitem__)


def _by_embeddings(router: Router, text: str) -> str:
    """Return the likeliest task without the pairs of tokens: by the paper's classifier alone."""
    return router.tasks[int(router.logits(router.ids(text)).argmax())]


def _coverage_at(threshold: float, routes: list[tuple[Route, str]]) -> dict[str, float | None]:
    """Return the share of prompts that a threshold sends to an expert, and the share of these that is right."""
    # As ``route`` would decide with this threshold; its decision with the fitted one is not used.
    sent = [(route, task) for route, task in routes if route.reason != "unlike" and route.confidence >= threshold]
    return {
        "threshold": threshold,
        "coverage": len(sent) / len(routes) if routes else None,
        "accuracy": _share([_likeliest(route) == task for route, task in sent]),
    }


def _share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
