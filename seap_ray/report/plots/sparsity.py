"""Sparsity: how much every layer gives of its attention and its MLP, requested and realised."""

from collections.abc import Iterator, Sequence

import numpy as np

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core.architecture import Architecture
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.shares import layer_sparsity
from seap_ray.core.widths import WidthConstraints
from seap_ray.report.charts import REFERENCE, Chart, Figure, HeatMap, Panel, Series, series_style
from seap_ray.report.plots.layers import BLOCKS, layer_map
from seap_ray.report.run_data import UNITS, RunData, StoredPlan, percent
from seap_ray.report.section import Section, as_sentences

MAX_MODELS = 9
"""Models that a map has room for, each with two columns."""

HOW_TO_READ = (
    "Lines are what was removed: for the experts their mean, with a band from the least to the most. Heads are removed "
    "by whole groups, so the attention changes in steps and the channels of the MLP make up for the difference. The "
    "maps have the same shares as numbers: a cell is what one layer gives of its attention or of its MLP, in percent; "
    "models that are cut alike have their columns in common."
)
REQUESTED = " The dashed line is the share of a layer's weights that the allocation requests."


def sparsity_section(data: RunData) -> Section | None:
    """Return the shares that the layers give, as the allocation requests them and as the plans realise them."""
    architecture = data.architecture
    if architecture is None or not data.plans:
        return None

    # One row of panels for a ratio: the attention at the left, the MLP beside it, then both as numbers.
    panels: list[Panel] = []
    for ratio in data.shown_ratios:
        panels += [_sparsity_chart(data, architecture, ratio, unit) for unit in UNITS]
        panels.append(_share_map(data, architecture, ratio))

    lines = [series for panel in panels if isinstance(panel, Chart) for series in panel.series]
    asks_beforehand = any(series.style == REFERENCE for series in lines)
    return Section(
        "sparsity",
        "How much is removed from each layer?",
        HOW_TO_READ + (REQUESTED if asks_beforehand else ""),
        as_sentences([_finding(data, ratio, architecture) for ratio in data.shown_ratios]),
        Figure("Share of the heads and channels removed from every layer.", tuple(panels)),
    )


def _sparsity_chart(data: RunData, architecture: Architecture, ratio: float, unit: str) -> Chart:
    plans = data.plans[ratio]
    series = [*_requested_shares(data, architecture, plans[0]), *_realised_shares(plans, unit, architecture)]
    title = f"{BLOCKS[unit]}, {percent(ratio)} removed"
    return Chart(title, "layer", f"{unit} removed, %", tuple(series), x_integer=True, y_range=(-4, 104))


def _requested_shares(data: RunData, architecture: Architecture, plan: StoredPlan) -> list[Series]:
    """Return the allocation's share of every layer; nothing where it depends on the scores."""
    metadata = plan.metadata
    allocation = AllocationSection.model_validate(metadata["allocation"])
    # A target is met by a ratio of each model's own, and a ratio to the nearest number of whole MoE experts.
    if "target" in metadata or metadata.get("budget", "exact") != "exact" or metadata.get("mlp_unit") == "expert":
        return []
    if allocation.kind not in ("uniform", "logistic"):
        return []

    # The config says which widths are allowed, which bounds what a layer can give.
    pruning = PruningSection.model_validate(data.config["pruning"])
    adds_biases = COMPENSATIONS[metadata["compensation"]].adds_biases
    constraints_L = WidthConstraints.of(architecture, pruning, adds_biases=adds_biases)
    shares = layer_sparsity(constraints_L, allocation, metadata["requested_ratio"])
    return [Series("requested", range(len(shares)), [100 * share for share in shares], REFERENCE)]


def _realised_shares(plans: Sequence[StoredPlan], unit: str, architecture: Architecture) -> Iterator[Series]:
    """Yield the experts' mean with the range between them, and the general model."""
    for i, (label, kind) in enumerate((("experts", "expert"), ("general", "general"))):
        shares = [plan.removed_shares(unit, architecture) for plan in plans if plan.kind == kind]
        if shares:
            percent_ML = 100 * np.array(shares)
            low = percent_ML.min(0).tolist()
            high = percent_ML.max(0).tolist()
            # A band needs a range: experts of equal widths have none.
            bands = ((low, high),) if low != high else ()
            layers = range(percent_ML.shape[1])
            yield Series(label, layers, percent_ML.mean(0).tolist(), series_style(i), bands=bands)


def _share_map(data: RunData, architecture: Architecture, ratio: float) -> HeatMap:
    """Return what every layer gives of its attention and of its MLP, for all models that differ."""
    plans_by_shares: dict[tuple[tuple[float, ...], ...], list[StoredPlan]] = {}
    for plan in data.plans[ratio]:
        shares = tuple(tuple(plan.removed_shares(unit, architecture)) for unit in UNITS)
        plans_by_shares.setdefault(shares, []).append(plan)

    columns: dict[str, list[float]] = {}
    for shares, plans in [*plans_by_shares.items()][:MAX_MODELS]:
        # One kind of models needs no name.
        name = f"{_common_name(plans)} " if len(plans_by_shares) > 1 else ""
        for unit, share_L in zip(UNITS, shares, strict=True):
            columns[name + BLOCKS[unit]] = [100 * share for share in share_L]
    return layer_map(f"{percent(ratio)} removed, in %", columns, highest=100, digits=0)


def _common_name(plans: Sequence[StoredPlan]) -> str:
    """Return a short name of models that are cut alike."""
    if len(plans) == 1:
        return plans[0].name
    return "experts" if all(plan.kind == "expert" for plan in plans) else f"{plans[0].name} +{len(plans) - 1}"


def _finding(data: RunData, ratio: float, architecture: Architecture) -> str:
    """Say what was realised of a ratio, and which layer gives most."""
    plans = data.plans[ratio]
    names = {plan.name for plan in plans}
    realised = []
    for model in data.main.models:
        if model.ratio == ratio and model.name in names and model.realised_ratio is not None:
            realised.append(model.realised_ratio)

    # One number where all models realise the same ratio.
    ends = dict.fromkeys(f"{end:.4f}" for end in (min(realised), max(realised)))

    shares = plans[0].removed_shares("channels", architecture)
    most = shares.index(max(shares))
    return (
        f"of {ratio:g} requested, {' to '.join(ends)} of the decoder weights is removed; {plans[0].name} loses most in "
        f"layer {most}, {percent(shares[most])} of its channels"
    )
