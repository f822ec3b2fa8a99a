"""Sensitivities: what the cut of every layer's attention and MLP costs, and whether the sum of these costs is right."""

import math
from collections.abc import Sequence
from dataclasses import replace

from seap_ray.report.charts import CHOSEN, REFERENCE, Chart, Figure, HeatMap, Series, series_style
from seap_ray.report.plots.layers import BLOCKS, layer_map
from seap_ray.report.plots.methods import MAX_METHODS
from seap_ray.report.run_data import RunData, StoredPlan, percent
from seap_ray.report.section import Section, as_sentences


def sensitivities_section(data: RunData) -> Section | None:
    """Return what the cuts of the plans that were taken cost, and the predicted against the measured divergence."""
    maps: list[HeatMap] = []
    findings: list[str] = []
    for ratio in data.shown_ratios:
        plans = _predicted_plans(data, ratio)
        if plans:
            maps.append(_cost_map(ratio, plans[:MAX_METHODS]))
            findings.append(_finding(ratio, plans[0]))

    if not maps:
        return None
    chart = _prediction_chart([plan for ratio in data.shown_ratios for plan in _predicted_plans(data, ratio)])
    return Section(
        "sensitivities",
        "What does each cut cost?",
        "A cell is by how much the cut of one layer's attention or MLP alone makes the model diverge from the base, in "
        "thousandths of a nat a token, as measured in models that are cut about as much; an empty cell is a site that "
        "stays whole. The chart compares the sum of these costs with the divergence of the whole plan on held-out "
        "tokens: on the dashed line they are equal, and where the order from left to right is the order from bottom to "
        "top, the costs lead to the best plan. Bars are two standard errors to each side.",
        as_sentences(findings),
        Figure("What each cut costs, and predicted against measured divergence.", (*maps, *([chart] if chart else []))),
    )


def _predicted_plans(data: RunData, ratio: float) -> list[StoredPlan]:
    """Return the plans of a ratio whose cuts' costs are known, the general model's first."""
    plans = [plan for plan in data.plans[ratio] if plan.predicted_costs]
    return sorted(plans, key=lambda plan: plan.kind != "general")


def _cost_map(ratio: float, plans: Sequence[StoredPlan]) -> HeatMap:
    columns: dict[str, list[float | None]] = {}
    for plan in plans:
        # One model needs no name.
        name = f"{plan.name} " if len(plans) > 1 else ""
        for unit, costs in plan.predicted_costs.items():
            # What is cut costs its noise at the least, so that 0 is a site which stays whole.
            columns[name + BLOCKS[unit]] = [1000 * cost if cost else None for cost in costs]

    highest = max((cost for costs in columns.values() for cost in costs if cost), default=1.0)
    # Two significant digits of the largest number, which suffice beside colours.
    digits = max(0, 1 - math.floor(math.log10(highest)))
    return layer_map(f"{percent(ratio)} removed, 10⁻³ nats a token", columns, highest, digits)


def _prediction_chart(plans: Sequence[StoredPlan]) -> Chart | None:
    """Return the measured divergence over the predicted one, by allocation; None where no plan was judged."""
    judged = [(plan, candidate) for plan in plans for candidate in plan.judged if "predicted" in candidate]
    # A logarithmic axis has no place for what is not above 0.
    judged = [(plan, values) for plan, values in judged if min(values["predicted"], values["divergence"]) > 0]
    if not judged:
        return None

    series: list[Series] = []
    for i, allocation in enumerate(dict.fromkeys(values["allocation"] for _, values in judged)):
        of_kind = [values for _, values in judged if values["allocation"] == allocation]
        measured = [values["divergence"] for values in of_kind]
        # The lower end of a bar stays on the axis.
        low = [max(values["divergence"] - 2 * values["stderr"], values["divergence"] / 10) for values in of_kind]
        high = [values["divergence"] + 2 * values["stderr"] for values in of_kind]
        style = replace(series_style(i), line="none")
        series.append(Series(allocation, [values["predicted"] for values in of_kind], measured, style, (low, high)))

    taken = [values for plan, values in judged if plan.settings.items() <= values.items()]
    if taken:
        x = [values["predicted"] for values in taken]
        series.append(Series("chosen", x, [values["divergence"] for values in taken], CHOSEN))

    ends = [values[key] for _, values in judged for key in ("predicted", "divergence")]
    diagonal = (min(ends), max(ends))
    return Chart(
        "predicted and measured",
        "sum of the costs, nats a token",
        "divergence, nats a token",
        (Series("as predicted", diagonal, diagonal, REFERENCE), *series),
        x_log=True,
        y_log=True,
        wide=True,
    )


def _finding(ratio: float, plan: StoredPlan) -> str:
    """Say what the cuts cost together, and which costs most."""
    cells = [(cost, unit, layer) for unit, costs in plan.predicted_costs.items() for layer, cost in enumerate(costs)]
    total = math.fsum(cost for cost, *_ in cells)
    cost, unit, layer = max(cells)
    text = (
        f"with {percent(ratio)} removed, the cuts of {plan.name} cost {total:.2g} nats a token together, that of the "
        f"{BLOCKS[unit]} of layer {layer} most ({percent(cost / total if total else 0)} of it)"
    )

    measured = [values for values in plan.judged if plan.settings.items() <= values.items()]
    if not measured:
        return text
    return f"{text}; {measured[-1]['divergence']:.2g} ± {measured[-1]['stderr']:.1g} were measured of the whole plan"
