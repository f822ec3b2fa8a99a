"""Anatomy: a run's plans, scores and activations in, pictures out: what each layer gives, and what the experts share.

Letters: M models, U units (query heads or channels of a layer), P shards, D channels, R principal components.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import SITES, Site, mixed
from seap_ray.core.plan import Rules, layer_sparsity
from seap_ray.core.scores import SCORES, Norms, column_scores, head_scores
from seap_ray.models.records import is_whole, load_statistics, load_unit_scores, open_tensors, read_moments
from seap_ray.report.artifacts import UNITS, Cut, Evidence, percent
from seap_ray.report.charts import LOWER_BOUND, REFERENCE, SECOND_REFERENCE, Chart, HeatMap, Part, Picture, Series, look
from seap_ray.storage.paths import StoragePath

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SITE_NAMES = {"heads": "attention", "channels": "MLP"}

Place = tuple[int, str, int]
"""Layer, kind of unit, and how many of them the layer has before it is cut."""


def _places(architecture: Architecture, unit: str) -> list[Place]:
    times = max(architecture.n_experts, 1) if unit == "channels" else 1
    return [(i, unit, times * getattr(layer.shape, unit)) for i, layer in enumerate(architecture.layers)]


def _sentence(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}." if text else ""


# --- what each layer gives -------------------------------------------------------------------------------------------


def sparsity(evidence: Evidence) -> Part | None:
    """Shares that the layers give, asked for and real."""
    architecture = evidence.architecture
    if architecture is None or not evidence.cuts:
        return None
    panels = [_sparsity_chart(evidence, architecture, ratio, unit) for ratio in evidence.shown_ratios for unit in UNITS]
    return Part(
        "sparsity",
        "How much does each layer give?",
        "The dashed line is the share of its weights that the allocation asks of a layer. Heads go by whole groups, so "
        "the attention moves in steps and the MLP makes up for them.",
        _sentence([_most_cut(evidence, ratio, architecture) for ratio in evidence.shown_ratios]),
        Picture("Share that every layer gives of its attention and its MLP, asked for and realised.", tuple(panels)),
    )


def _sparsity_chart(evidence: Evidence, architecture: Architecture, ratio: float, unit: str) -> Chart:
    cuts = evidence.cuts[ratio]
    series = [*_asked(evidence, architecture, cuts[0]), *_given(cuts, unit, architecture)]
    title = f"{SITE_NAMES[unit]}, {percent(ratio)} removed"
    return Chart(title, "layer", "removed, %", tuple(series), x_integer=True, y_range=(-4, 104))


def _asked(evidence: Evidence, architecture: Architecture, cut: Cut) -> list[Series]:
    """The allocation's share of every layer, where it is known before the scores are."""
    about = cut.about
    allocation = AllocationSection.model_validate(about["allocation"])
    if about.get("budget", "exact") != "exact" or allocation.kind not in ("uniform", "logistic"):
        return []
    pruning = PruningSection.model_validate(evidence.config["pruning"])
    rules_L = Rules.of(architecture, pruning, compensated=about["compensation"] != "none")
    shares = layer_sparsity(rules_L, allocation, about["requested_ratio"])
    return [Series("asked of the layer", range(len(shares)), [100 * share for share in shares], REFERENCE)]


def _given(cuts: Sequence[Cut], unit: str, architecture: Architecture) -> Iterator[Series]:
    """The experts' mean with the range between them, and the general model."""
    for i, (label, kind) in enumerate((("experts", "expert"), ("general", "general"))):
        shares = 100 * np.array([cut.share_cut(unit, architecture) for cut in cuts if cut.kind == kind])
        if len(shares):
            range_ = shares.min(0).tolist(), shares.max(0).tolist()
            bands = (range_,) if range_[0] != range_[1] else ()
            yield Series(label, range(shares.shape[1]), shares.mean(0).tolist(), look(i), bands=bands)


def _most_cut(evidence: Evidence, ratio: float, architecture: Architecture) -> str:
    realised = [
        model["realised_ratio"]
        for model in evidence.main["models"]
        if model["ratio"] == ratio and model["name"] in {cut.name for cut in evidence.cuts[ratio]}
    ]
    ends = dict.fromkeys(f"{end:.4f}" for end in (min(realised), max(realised)))
    cut = evidence.cuts[ratio][0]
    shares = cut.share_cut("channels", architecture)
    deepest = shares.index(max(shares))
    return (
        f"of {ratio:g} asked for, {' to '.join(ends)} is gone, most in layer {deepest}, where {cut.name} loses "
        f"{percent(shares[deepest])} of its channels"
    )


# --- what the experts share ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of what every two of M models keep, and what chance would give."""

    jaccard_MM: np.ndarray
    chance_MM: np.ndarray

    @classmethod
    def of(cls, cuts: Sequence[Cut], places: Sequence[Place]) -> "Overlap":
        """By chance: the expected intersection of models as wide as these, whose units are drawn at random."""
        both_MM = np.zeros((len(cuts), len(cuts)))
        expected_MM, n_M = both_MM.copy(), np.zeros(len(cuts))
        for layer, unit, width in places:
            kept_MU = np.zeros((len(cuts), width))
            for kept_U, cut in zip(kept_MU, cuts, strict=True):
                kept_U[cut.indices(layer, unit)] = 1
            size_M = kept_MU.sum(1)
            both_MM += kept_MU @ kept_MU.T
            expected_MM += np.outer(size_M, size_M) / width
            n_M += size_M
        sum_MM = n_M[:, None] + n_M
        with np.errstate(invalid="ignore"):  # where neither keeps a unit there is nothing to share: no number
            return cls(both_MM / (sum_MM - both_MM), expected_MM / (sum_MM - expected_MM))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.jaccard_MM)), 2))

    @property
    def mean(self) -> float:
        return float(np.mean([self.jaccard_MM[pair] for pair in self.pairs]))

    @property
    def mean_chance(self) -> float:
        return float(np.mean([self.chance_MM[pair] for pair in self.pairs]))


def overlap(evidence: Evidence) -> Part | None:
    """What the models of one ratio have in common, over all layers and layer by layer."""
    ratios = [ratio for ratio in evidence.shown_ratios if len(evidence.cuts[ratio]) > 1]
    if evidence.architecture is None or not ratios:
        return None
    of_unit = {unit: _places(evidence.architecture, unit) for unit in UNITS}
    places = [at for of in of_unit.values() for at in of]
    by_ratio = {ratio: sorted(evidence.cuts[ratio], key=lambda cut: cut.kind == "general") for ratio in ratios}
    whole = {ratio: Overlap.of(cuts, places) for ratio, cuts in by_ratio.items()}
    maps = [_overlap_map(by_ratio[ratio], whole[ratio], ratio) for ratio in ratios]
    charts = [chart for ratio in ratios if (chart := _overlap_by_layer(by_ratio[ratio], ratio, of_unit))]
    return Part(
        "overlap",
        "Which neurons do the experts share?",
        "A cell is the number of heads and channels that both models keep over the number that either keeps: 1 is the "
        "same model. Chance is what random heads and channels would give in layers of the same widths.",
        _sentence([_most_alike(by_ratio[ratio], whole[ratio], ratio) for ratio in ratios]),
        Picture("Overlap of the heads and channels that models keep.", (*maps, *charts)),
    )


def _overlap_map(cuts: Sequence[Cut], of: Overlap, ratio: float) -> HeatMap:
    names = [cut.name for cut in cuts]
    title = f"{percent(ratio)} removed (by chance {of.mean_chance:.2f})"
    return HeatMap(title, "", "", names, names, of.jaccard_MM.tolist(), scale=(min(of.mean_chance, 0.99), 1))


def _overlap_by_layer(cuts: Sequence[Cut], ratio: float, of_unit: Mapping[str, list[Place]]) -> Chart | None:
    experts = [cut for cut in cuts if cut.kind == "expert"]
    if len(experts) < 2:
        return None
    series = []
    for i, (unit, by_chance) in enumerate(zip(UNITS, (SECOND_REFERENCE, REFERENCE), strict=True)):
        each = [Overlap.of(experts, [at]) for at in of_unit[unit]]
        layers = range(len(each))
        series.append(Series(unit, layers, [one.mean for one in each], look(i)))
        series.append(Series(f"{unit}, by chance", layers, [one.mean_chance for one in each], by_chance))
    title = f"between experts, {percent(ratio)} removed"
    return Chart(title, "layer", "mean overlap", tuple(series), x_integer=True, y_range=(-0.04, 1.04))


def _most_alike(cuts: Sequence[Cut], of: Overlap, ratio: float) -> str:
    a, b = max(of.pairs, key=lambda pair: of.jaccard_MM[pair])
    return (
        f"with {percent(ratio)} removed two models share {of.mean:.2f} on average, where chance would give "
        f"{of.mean_chance:.2f}; most alike are {cuts[a].name} and {cuts[b].name} ({of.jaccard_MM[a, b]:.2f})"
    )


# --- what tasks activate ---------------------------------------------------------------------------------------------


def clusters(evidence: Evidence) -> Part | None:
    """Mean activations of every shard, at three depths."""
    records: list[tuple[str, StoragePath]] = [
        (task, path)
        for task in evidence.main["tasks"]
        for path in evidence.run.records(task).sorted_glob("*.safetensors")
    ]
    tasks = [task for task, _ in records]
    if evidence.architecture is None or len(set(tasks)) < 2 or len(tasks) < 3:
        return None
    last = evidence.architecture.n_layers - 1
    panels, said = [], []
    for layer in dict.fromkeys((0, (last + 1) // 2, last)):
        keys = [(layer, site) for site in evidence.architecture.sites("mlp")]
        x_PD = standardised(np.array([_means(path, keys) for _, path in records]))
        panels.append(_scatter(layer, x_PD, tasks))
        if (share := with_own_kind(x_PD, tasks)) is not None:
            said.append(f"{percent(share)} in layer {layer}")
    return Part(
        "clusters",
        "Do tasks activate different neurons?",
        "A point is the mean activation of the MLP channels over a shard, standardised, on the first two principal "
        "components. Tasks that use different neurons lie apart.",
        f"Shards whose nearest neighbour, over all channels, is of the same task: {', '.join(said)}." if said else "",
        Picture("Mean activations of the MLP channels over every shard, by task.", tuple(panels)),
    )


def _means(path: StoragePath, keys: Sequence[tuple[int, Site]]) -> np.ndarray:
    with open_tensors(path) as file:
        return np.concatenate([read_moments(file, key).mean_D.numpy() for key in keys])


def standardised(x_PD: np.ndarray) -> np.ndarray:
    """Every column with mean 0 and variance 1; a constant one is all zeros."""
    centred_PD = x_PD - x_PD.mean(0)
    spread_D = centred_PD.std(0)
    return centred_PD / np.where(spread_D > 0, spread_D, 1)


def principal(x_PD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First two principal components of centred points [P, 2], and the share of the variance that each explains.

    A component's sign is free; its largest coordinate is made positive, so that a picture comes out the same.
    """
    u_PR, s_R, _ = np.linalg.svd(x_PD, full_matrices=False)
    at_P2 = (u_PR * s_R)[:, :2]
    at_P2 *= np.sign(at_P2[np.abs(at_P2).argmax(0), [0, 1]])
    return at_P2, s_R[:2] ** 2 / max(float((s_R**2).sum()), 1e-300)


def with_own_kind(x_PD: np.ndarray, labels: Sequence[str]) -> float | None:
    """Share of the points whose nearest neighbour has their label, among those with a label that others have too."""
    distance_PP = np.linalg.norm(x_PD[:, None] - x_PD, axis=-1)
    np.fill_diagonal(distance_PP, np.inf)
    nearest_P = distance_PP.argmin(1)
    own = [labels[nearest_P[p]] == label for p, label in enumerate(labels) if labels.count(label) > 1]
    return sum(own) / len(own) if own else None


def _scatter(layer: int, x_PD: np.ndarray, tasks: Sequence[str]) -> Chart:
    at_P2, (first, second) = principal(x_PD)
    series = []
    for i, task in enumerate(dict.fromkeys(tasks)):
        x, y = at_P2[[own == task for own in tasks]].T.tolist()
        series.append(Series(task, x, y, replace(look(i), line="none")))
    labels = f"1st component ({percent(first)})", f"2nd component ({percent(second)})"
    return Chart(f"layer {layer}", *labels, tuple(series))


# --- scores ----------------------------------------------------------------------------------------------------------


def scores(evidence: Evidence) -> Part | None:
    """Quantiles of the scores in every layer: of the general model, the first expert and the last one."""
    if evidence.architecture is None or not evidence.cuts:
        return None
    ratio, cuts = list(evidence.cuts.items())[-1]
    experts = [cut for cut in cuts if cut.kind == "expert"]
    chosen = [*(cut for cut in cuts if cut.kind == "general"), *experts[:1], *experts[1:][-1:]]
    scored = [(cut, of) for cut in chosen if (of := unit_scores(evidence, evidence.architecture, cut))]
    if not scored:
        return None
    panels = [_score_chart(cut, unit, of[unit]) for unit in reversed(UNITS) for cut, of in scored]
    held = [f"{percent(_held_by_best(of['channels']))} in {cut.name}" for cut, of in scored]
    return Part(
        "scores",
        "How unequal are the scores?",
        "The line is the median of a layer's scores, in a mixture those of all its experts, the bands hold half and "
        f"90 % of them; a dash is the lowest score that stays with {percent(ratio)} removed. The taller the bands, the "
        "less goes with what lies low.",
        f"Of all of a layer's scores, the best tenth of its channels holds on average {', '.join(held)}.",
        Picture("Quantiles of the scores of channels and heads in every layer.", tuple(panels)),
    )


def unit_scores(evidence: Evidence, architecture: Architecture, cut: Cut) -> dict[str, list[np.ndarray]] | None:
    """Scores of every layer's heads and channels that a plan was made from, of a mixture those of all its experts, one
    after another; None where they cannot be had again."""
    about = cut.about
    if "unit_scores" in about:
        path, layers = evidence.run.unit_scores(about["unit_scores"]), range(architecture.n_layers)
        made = load_unit_scores(path, layers) if is_whole(path) else []
        return {unit: [of[unit].numpy() for of in made] for unit in ("heads", "channels")} if made else None
    paths = [evidence.run.statistics(name) for name in (*about["tasks"], "weight_norms")]
    if about["score"] not in SCORES or not all(path.is_file() for path in paths):
        return None
    *parts, stored = (load_statistics(path, architecture, sites=SITES) for path in paths)
    norms = {key: Norms(moments.mean_D, moments.m2_D) for key, moments in stored.items()}
    score, weights = SCORES[about["score"]], list(about["tasks"].values())
    streams = [*zip(weights, parts, strict=True)]
    if about["pooling"] == "pooled":
        streams = [(1.0, mixed(parts, weights))]

    def of(layer: int, site: Site) -> torch.Tensor:
        keys = [(layer, one) for one in architecture.sites(site)]
        return torch.stack([weight * column_scores(score, part, norms, keys) for weight, part in streams]).sum(0)

    layers = range(architecture.n_layers)
    heads = [head_scores(of(layer, "attn"), architecture.head_dim).numpy() for layer in layers]
    return {"heads": heads, "channels": [of(layer, "mlp").flatten().numpy() for layer in layers]}


def _score_chart(cut: Cut, unit: str, of: Sequence[np.ndarray]) -> Chart:
    positive = np.concatenate([score_U[score_U > 0] for score_U in of])
    floor = positive.min() if len(positive) else 1.0  # a logarithmic axis has no place for zero
    low, below, median, above, high = np.array([np.quantile(np.maximum(s, floor), QUANTILES) for s in of]).T.tolist()
    stays = {
        layer: max(float(score_U[kept].min()), floor)
        for layer, score_U in enumerate(of)
        if 0 < len(kept := cut.indices(layer, unit)) < len(score_U)
    }
    series = (
        Series("median", range(len(of)), median, look(0), bands=((low, high), (below, above))),
        Series("lowest that stays", list(stays), list(stays.values()), LOWER_BOUND),
    )
    return Chart(f"{cut.name}: {unit}", "layer", cut.about["score"], series, x_integer=True, y_log=True)


def _held_by_best(of: Sequence[np.ndarray]) -> float:
    """Share of the sum that the best tenth has, on average over the layers."""
    best = [np.sort(score_U)[-max(len(score_U) // 10, 1) :].sum() for score_U in of]
    return float(np.mean([top / max(score_U.sum(), 1e-300) for top, score_U in zip(best, of, strict=True)]))
