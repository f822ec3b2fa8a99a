"""Overlap: which heads and channels the models of one ratio have in common.

Letters: M models, U units (query heads or channels of a layer).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from seap_ray.report.charts import REFERENCE, SECOND_REFERENCE, Chart, Figure, HeatMap, Series, series_style
from seap_ray.report.plots.layers import UnitGroup, unit_groups
from seap_ray.report.run_data import UNITS, RunData, StoredPlan, percent
from seap_ray.report.section import Section, as_sentences


@dataclass(frozen=True)
class Overlap:
    """Intersection over union (Jaccard) of the units that every two of M models keep, and what chance would give."""

    jaccard_MM: np.ndarray
    chance_MM: np.ndarray

    @classmethod
    def of(cls, plans: Sequence[StoredPlan], groups: Sequence[UnitGroup]) -> "Overlap":
        """Compare plans over some groups of units.

        Chance is the expected intersection of models as wide as these whose units are drawn at random.
        """
        both_MM = np.zeros((len(plans), len(plans)))
        expected_MM = both_MM.copy()
        n_M = np.zeros(len(plans))
        for layer, unit, width in groups:
            # 1 where a model keeps a unit, so that products count units that both keep.
            kept_MU = np.zeros((len(plans), width))
            for kept_U, plan in zip(kept_MU, plans, strict=True):
                kept_U[plan.indices(layer, unit)] = 1

            # Intersections are sums over all groups, so that a large layer counts more.
            size_M = kept_MU.sum(1)
            both_MM += kept_MU @ kept_MU.T
            # A layer without such units has nothing to share.
            expected_MM += np.outer(size_M, size_M) / max(width, 1)
            n_M += size_M

        # The union is both sizes less the intersection.
        sum_MM = n_M[:, None] + n_M
        with np.errstate(invalid="ignore"):  # where neither keeps a unit there is nothing to share: no number
            return cls(both_MM / (sum_MM - both_MM), expected_MM / (sum_MM - expected_MM))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two models, once."""
        return list(combinations(range(len(self.jaccard_MM)), 2))

    @property
    def mean(self) -> float:
        """Mean overlap of two models."""
        return float(np.mean([self.jaccard_MM[pair] for pair in self.pairs]))

    @property
    def mean_chance(self) -> float:
        """Mean overlap of two models by chance."""
        return float(np.mean([self.chance_MM[pair] for pair in self.pairs]))


def overlap_section(data: RunData) -> Section | None:
    """Return what the models of one ratio have in common, over all layers and layer by layer."""
    # One model has nothing to share with another.
    ratios = [ratio for ratio in data.shown_ratios if len(data.plans[ratio]) > 1]
    if data.architecture is None or not ratios:
        return None

    groups_by_unit = {unit: unit_groups(data.architecture, unit) for unit in UNITS}
    all_groups = [group for groups in groups_by_unit.values() for group in groups]

    maps = []
    charts = []
    findings = []
    for ratio in ratios:
        plans = sorted(data.plans[ratio], key=lambda plan: plan.kind == "general")  # the general model last
        overlap = Overlap.of(plans, all_groups)
        maps.append(_overlap_map(plans, overlap, ratio))
        findings.append(_finding(plans, overlap, ratio))
        if chart := _overlap_by_layer(plans, ratio, groups_by_unit):
            charts.append(chart)

    return Section(
        "overlap",
        "How many heads and channels do the experts share?",
        "A cell is the number of heads and channels that both models keep, divided by the number that at least one of "
        "them keeps: 1 means that both keep the same. Chance is the overlap of heads and channels drawn at random in "
        "layers of the same widths. The nearer to chance, the more do the tasks need different parts of the model.",
        as_sentences(findings),
        Figure("Overlap of the heads and channels that models keep.", (*maps, *charts)),
    )


def _overlap_map(plans: Sequence[StoredPlan], overlap: Overlap, ratio: float) -> HeatMap:
    names = [plan.name for plan in plans]
    title = f"{percent(ratio)} removed (chance: {overlap.mean_chance:.2f})"
    # The colours begin at chance, but a scale needs two ends.
    scale = (min(overlap.mean_chance, 0.99), 1)
    return HeatMap(title, "", "", names, names, overlap.jaccard_MM.tolist(), scale=scale)


def _overlap_by_layer(
    plans: Sequence[StoredPlan], ratio: float, groups_by_unit: Mapping[str, list[UnitGroup]]
) -> Chart | None:
    """Return the mean overlap of two experts in every layer, for heads and for channels."""
    # Without the general model: this chart asks how the tasks differ.
    experts = [plan for plan in plans if plan.kind == "expert"]
    if len(experts) < 2:
        return None

    series = []
    for i, (unit, chance_style) in enumerate(zip(UNITS, (SECOND_REFERENCE, REFERENCE), strict=True)):
        overlaps = [Overlap.of(experts, [group]) for group in groups_by_unit[unit]]
        layers = range(len(overlaps))
        series.append(Series(unit, layers, [overlap.mean for overlap in overlaps], series_style(i)))
        chances = [overlap.mean_chance for overlap in overlaps]
        series.append(Series(f"{unit}, by chance", layers, chances, chance_style))

    title = f"between experts, {percent(ratio)} removed"
    return Chart(title, "layer", "mean overlap", tuple(series), x_integer=True, y_range=(-0.04, 1.04))


def _finding(plans: Sequence[StoredPlan], overlap: Overlap, ratio: float) -> str:
    """Say how much two models share on average, and which two share most."""
    a, b = max(overlap.pairs, key=lambda pair: overlap.jaccard_MM[pair])
    return (
        f"with {percent(ratio)} removed, the overlap of two models is {overlap.mean:.2f} on average and would be "
        f"{overlap.mean_chance:.2f} by chance; most alike are {plans[a].name} and {plans[b].name} "
        f"({overlap.jaccard_MM[a, b]:.2f})"
    )
