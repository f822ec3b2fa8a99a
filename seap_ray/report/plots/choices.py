"""Choices: the plans that were judged on held-out tokens before one was taken, and how far each is from the base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from seap_ray.report.charts import DotPlot, Dots, Figure, series_style
from seap_ray.report.plots.methods import MAX_METHODS
from seap_ray.report.run_data import RunData, StoredPlan, percent
from seap_ray.report.section import Section, Table, as_sentences

REPAIR = ("score", "compensation")
"""Settings that say which units go and what makes up for them."""
WIDTHS = ("allocation", "attention_unit")
"""Settings that say how many units go from where."""
WORDS = {
    ("attention_unit", "none"): "attention whole",
    ("attention_unit", "group"): "with groups",
    ("attention_unit", "head"): "with heads",
    ("compensation", "none"): "uncompensated",
}
"""Words for settings that do not tell by themselves what they are."""

Candidate = Mapping[str, Any]
"""Settings and figures of a plan that was judged, as a plan's file has them."""


def choices_section(data: RunData) -> Section | None:
    """Return the divergence of every plan that was judged, by ratio and by what was chosen with it."""
    panels: list[DotPlot] = []
    findings: list[str] = []
    for ratio in data.shown_ratios:
        plans = _judged_plans(data, ratio)
        repairs = _choice_plot(f"repair, {percent(ratio)} removed", plans, REPAIR)
        widths = _choice_plot(f"allocation, {percent(ratio)} removed", plans, WIDTHS)
        panels += [plot for plot in (repairs, widths) if plot]
        findings += [_finding(ratio, plan) for plan in plans if plan.kind == "general" or len(plans) == 1]

    if not panels:
        return None
    return Section(
        "choices",
        "Which plans were judged, and which was taken?",
        "A point is a whole plan, measured on held-out calibration tokens before anything was written: the "
        "Kullback-Leibler divergence of its next-token distributions from the base's, so the further left, the nearer "
        "to the base. Bars are two standard errors to each side. The plan in the ring was taken. First the score and "
        "the compensation are chosen with everything else alike, then the allocation and what is cut of attention.",
        as_sentences(findings),
        Figure("Divergence of the plans that were judged.", tuple(panels)),
        (_table(data),),
    )


def _judged_plans(data: RunData, ratio: float) -> list[StoredPlan]:
    """Return the plans of a ratio that were chosen by measurement, the general model's first."""
    plans = [plan for plan in data.plans[ratio] if plan.judged]
    return sorted(plans, key=lambda plan: plan.kind != "general")


def _choice_plot(title: str, plans: Sequence[StoredPlan], keys: Sequence[str]) -> DotPlot | None:
    """Return a row for every choice of some settings; None where nothing was to choose."""
    candidates_by_plan: list[tuple[StoredPlan, dict[str, Candidate]]] = []
    for plan in plans:
        candidates = _alternatives(plan, keys)
        if len(candidates) > 1:
            candidates_by_plan.append((plan, candidates))

    if not candidates_by_plan:
        return None

    # The best of the first model is at the top. Others have the same choices, but where a ratio is out of reach.
    _, first = candidates_by_plan[0]
    rows = sorted(first, key=lambda name: first[name]["divergence"])
    for _, candidates in candidates_by_plan:
        rows += [name for name in candidates if name not in rows]

    dots: list[Dots] = []
    for i, (plan, candidates) in enumerate(candidates_by_plan[:MAX_METHODS]):
        figures = [candidates.get(row) for row in rows]
        chosen = name_of(plan.settings, keys)
        dots.append(
            Dots(
                plan.name,
                [candidate["divergence"] if candidate else None for candidate in figures],
                [2 * candidate["stderr"] if candidate else 0 for candidate in figures],
                replace(series_style(i), line="none"),
                rows.index(chosen) if chosen in rows else None,
            )
        )
    return DotPlot(title, "divergence from the base, nats a token", rows, tuple(dots))


def _alternatives(plan: StoredPlan, keys: Sequence[str]) -> dict[str, Candidate]:
    """Return the candidates that differ in some settings alone, by the names of these."""
    # Repairs are judged first, all at the same widths; widths are judged with the repair that was taken.
    common = plan.judged[0] if keys == REPAIR else plan.settings
    others = WIDTHS if keys == REPAIR else REPAIR
    candidates: dict[str, Candidate] = {}
    for candidate in plan.judged:
        if all(candidate[key] == common[key] for key in others):
            candidates.setdefault(name_of(candidate, keys), candidate)
    return candidates


def name_of(settings: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Return settings as words: ``measured, attention whole``."""
    return ", ".join(WORDS.get((key, settings[key]), settings[key].replace("_", " ")) for key in keys)


def _finding(ratio: float, plan: StoredPlan) -> str:
    """Say what was taken, and between which ends all plans lie."""
    divergences = [candidate["divergence"] for candidate in plan.judged]
    return (
        f"with {percent(ratio)} removed, {plan.name} has the allocation {name_of(plan.settings, WIDTHS)}, and the "
        f"repair {name_of(plan.settings, REPAIR)}; the {len(divergences)} plans that were judged for it diverge by "
        f"{min(divergences):.2g} to {max(divergences):.2g} nats a token"
    )


def _table(data: RunData) -> Table:
    """Return the figures of all plans that were judged; those that were taken in bold."""
    groups: list[tuple[str, list[list[str]]]] = []
    for ratio in data.plans:
        rows: list[list[str]] = []
        for plan in _judged_plans(data, ratio):
            rows += [_row(plan, candidate) for candidate in plan.judged]
        if rows:
            groups.append((f"{percent(ratio)} requested", rows))

    settings = ["score", "compensation", "allocation", "attention unit"]
    columns = ["model", *settings, "divergence", "predicted", "rise of the loss"]
    return Table("Plans that were judged, in nats a token; divergence ± standard error", columns, groups)


def _row(plan: StoredPlan, candidate: Candidate) -> list[str]:
    text = f"{candidate['divergence']:.3g} ± {candidate['stderr']:.1g}"
    is_taken = all(candidate[key] == value for key, value in plan.settings.items())
    # A score's cost is predicted only where the allocation was measured with it.
    predicted = f"{candidate['predicted']:.3g}" if "predicted" in candidate else ""
    return [
        plan.name,
        *(candidate[key] for key in (*REPAIR, *WIDTHS)),
        Markup("<strong>{}</strong>").format(text) if is_taken else text,
        predicted,
        f"{candidate['loss']:+.3g}",
    ]
