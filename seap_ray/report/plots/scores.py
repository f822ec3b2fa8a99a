"""Scores: how unequal the scores of heads and channels are in every layer.

Letters: U units (query heads or channels of a layer), L layers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import SafetensorError

from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import SITES, Site, Statistics, pooled_statistics
from seap_ray.core.scores import SCORES, WeightNorms, column_scores, head_scores, scores_of_experts
from seap_ray.models.records import is_whole, load_norms, load_statistics, load_unit_scores
from seap_ray.report.charts import LOWER_BOUND, Chart, Figure, Series, series_style
from seap_ray.report.run_data import UNITS, RunData, StoredPlan, percent
from seap_ray.report.section import Section

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

UnitScores = dict[str, list[np.ndarray]]
"""Scores [U] of every layer, by kind of unit; in a mixture the channels of all MoE experts, one after another.

Where whole MoE experts go, these are the one kind of unit, and layers that have none have no scores.
"""
UNITS_SHOWN = ("experts", *reversed(UNITS))
"""Kinds of units in the order of their charts: channels before heads, since they are most of the weights."""


def scores_section(data: RunData) -> Section | None:
    """Return quantiles of the scores in every layer: of the general model, the first expert and the last one."""
    if data.architecture is None or not data.plans:
        return None

    # At the largest ratio the lowest score that is kept says most.
    ratio, plans = list(data.plans.items())[-1]
    experts = [plan for plan in plans if plan.kind == "expert"]
    shown = [plan for plan in plans if plan.kind == "general"] + experts[:1] + experts[1:][-1:]

    # Scores are computed again or read, and either may need files that the run has not kept.
    scored = []
    for plan in shown:
        if scores := unit_scores(data, data.architecture, plan):
            scored.append((plan, scores))

    if not scored:
        return None

    panels = []
    for unit in UNITS_SHOWN:
        # A model whose attention is not looked at has no scores of heads.
        panels += [
            _score_chart(plan, unit, scores[unit]) for plan, scores in scored if any(map(len, scores.get(unit, ())))
        ]

    return Section(
        "scores",
        "How unequal are the scores?",
        "The line is the median of a layer's scores (in a mixture of experts, of all MoE experts together); the bands "
        f"hold the middle 50 % and 90 % of them, and a dash is the lowest score that is kept with {percent(ratio)} "
        "removed. The wider the bands, the less is lost with the lowest scores.",
        _finding(scored),
        Figure("Quantiles of the scores of units in every layer.", tuple(panels)),
    )


def _finding(scored: Sequence[tuple[StoredPlan, UnitScores]]) -> str:
    """Say how much of the scores the best tenth has."""
    held: list[str] = []
    for plan, scores in scored:
        unit = "experts" if "experts" in scores else "channels"
        share = _share_of_best_tenth([score_U for score_U in scores[unit] if len(score_U)])
        held.append(f"{percent(share)} of its {unit} in {plan.name}")
    return f"Share of a layer's sum of scores in the best tenth, on average: {', '.join(held)}."


def unit_scores(data: RunData, architecture: Architecture, plan: StoredPlan) -> UnitScores | None:
    """Return the scores that a plan was made from; None where they cannot be computed again."""
    if "unit_scores" in plan.metadata:
        return _stored_scores(data, architecture, plan.metadata["unit_scores"])
    return _computed_scores(data, architecture, plan)


def _stored_scores(data: RunData, architecture: Architecture, name: str) -> UnitScores | None:
    """Read scores that took covariances to compute, and so were stored."""
    path = data.run.unit_scores(name)
    if not is_whole(path):
        return None

    by_layer = load_unit_scores(path, range(architecture.n_layers))
    if not by_layer:
        return None

    heads = [scores["heads"].numpy() for scores in by_layer]
    channels = [scores["channels"].numpy() for scores in by_layer]
    return {"heads": heads, "channels": channels}


def _computed_scores(data: RunData, architecture: Architecture, plan: StoredPlan) -> UnitScores | None:
    """Compute scores from the run's statistics, as the planner does."""
    metadata = plan.metadata
    paths = [data.run.statistics(name) for name in (*metadata["tasks"], "weight_norms")]
    removes_experts = metadata.get("mlp_unit") == "expert"
    # Other scores are no function of the moments alone: ``random``, and those from covariances.
    is_computable = metadata["score"] in SCORES or (removes_experts and metadata["score"] == "reap")
    if not is_computable or not all(path.is_file() for path in paths):
        return None

    *task_paths, norms_path = paths
    sites = (*SITES, "experts") if removes_experts else SITES
    parts = [load_statistics(path, architecture, sites=sites) for path in task_paths]
    try:
        norms = load_norms(norms_path, architecture)
    except SafetensorError:  # damaged; the next job computes them again, a report does without
        return None

    weights = list(metadata["tasks"].values())

    # Under score_average every task is scored by itself, else once all tasks are one stream.
    streams = list(zip(weights, parts, strict=True))
    if metadata["pooling"] == "pooled":
        streams = [(1.0, pooled_statistics(parts, weights))]

    if removes_experts:
        return {"experts": _expert_scores(metadata["score"], streams, norms, architecture)}
    score = SCORES[metadata["score"]]

    def site_scores(layer: int, site: Site) -> torch.Tensor:
        """Return the weighted scores of one site's columns."""
        keys = [(layer, member) for member in architecture.sites(layer, site)]
        weighted = [weight * column_scores(score, part, norms, keys) for weight, part in streams]
        return torch.stack(weighted).sum(0)

    heads = []
    channels = []
    for layer in range(architecture.n_layers):
        heads.append(head_scores(site_scores(layer, "attn"), architecture.head_dim).numpy())
        channels.append(site_scores(layer, "mlp").flatten().numpy())

    return {"heads": heads, "channels": channels}


def _expert_scores(
    score: str, streams: Sequence[tuple[float, Statistics]], norms: WeightNorms, architecture: Architecture
) -> list[np.ndarray]:
    """Return the scores of every layer's MoE experts, summed over weighted streams."""
    by_layer: list[np.ndarray] = []
    for number, layer in enumerate(architecture.layers):
        keys = [(number, site) for site in architecture.sites(number, "mlp")]
        weighted = [weight * scores_of_experts(score, part, norms, keys) for weight, part in streams if layer.n_experts]
        by_layer.append(torch.stack(weighted).sum(0).numpy() if weighted else np.empty(0))
    return by_layer


def _score_chart(plan: StoredPlan, unit: str, scores: Sequence[np.ndarray]) -> Chart:
    """Return the quantiles of every layer's scores, and the lowest score that stays."""
    # A logarithmic axis has no place for zero: it is drawn at the smallest positive score.
    positive = np.concatenate([score_U[score_U > 0] for score_U in scores])
    floor = positive.min() if len(positive) else 1.0
    # Layers of hybrids may have no attention, or no MLP.
    layers = [layer for layer, score_U in enumerate(scores) if len(score_U)]
    quantiles_LQ = np.array([np.quantile(np.maximum(scores[layer], floor), QUANTILES) for layer in layers])
    low, below, median, above, high = quantiles_LQ.T.tolist()

    # A layer that keeps all or nothing has no lowest score.
    lowest_kept = {}
    for layer in layers:
        kept = plan.indices(layer, unit)
        if 0 < len(kept) < len(scores[layer]):
            lowest_kept[layer] = max(float(scores[layer][kept].min()), floor)

    series = (
        Series("median", layers, median, series_style(0), bands=((low, high), (below, above))),
        Series("lowest kept", list(lowest_kept), list(lowest_kept.values()), LOWER_BOUND),
    )
    return Chart(f"{plan.name}: {unit}", "layer", f"{plan.metadata['score']} score", series, x_integer=True, y_log=True)


def _share_of_best_tenth(scores: Sequence[np.ndarray]) -> float:
    """Return the share of a layer's sum that its best tenth has, on average over the layers."""
    shares = []
    for score_U in filter(len, scores):
        n_best = max(len(score_U) // 10, 1)
        # Sorted upwards, so the best are the last.
        best = np.sort(score_U)[-n_best:].sum()
        shares.append(best / max(score_U.sum(), 1e-300))
    return float(np.mean(shares))
