"""Router: where held-out prompts go, and what another threshold would change."""

from collections.abc import Mapping
from typing import Any

from seap_ray.report.charts import REFERENCE, Chart, Figure, HeatMap, Series, series_style
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section

Counts = Mapping[str, Mapping[str, int]]
"""Numbers of prompts by their task and where they were sent."""


def router_section(data: RunData) -> Section | None:
    """Return the router's confusion and coverage on held-out prompts; None where there were none."""
    report = data.main.router
    if not report or not report["n"]:
        return None

    return Section(
        "router",
        "Does the router send prompts to the right expert?",
        "Left: rows are the tasks of held-out prompts, columns the models that the router sends them to; a frame marks "
        "the right expert, and general answers what is sent to no expert. Right: a higher threshold sends fewer "
        "prompts to experts, and more of these to the right one.",
        f"For {percent(report['accuracy'])} of {report['n']:,} held-out prompts the likeliest task is the right one. "
        f"With the threshold in use, {report['threshold']:.2f}, {percent(1 - report['routed'])} go to the general "
        "model.",
        Figure("Where the router sends prompts.", (_confusion_map(report["confusion"]), _coverage_chart(report))),
    )


def _confusion_map(counts: Counts) -> HeatMap:
    """Return the share of every task's prompts that goes to each expert, and to the general model."""
    # The experts in the order of the tasks, then what is no task: the general model.
    targets = {target for row in counts.values() for target in row}
    columns = [*counts, *sorted(targets - counts.keys())]
    # A task without held-out prompts has no shares.
    tasks = [task for task, row in counts.items() if row]
    values = [_shares(counts[task], columns) for task in tasks]
    own = frozenset((i, columns.index(task)) for i, task in enumerate(tasks))
    return HeatMap("share of each task's prompts", "sent to", "task", columns, tasks, values, framed=own)


def _shares(row: Mapping[str, int], columns: list[str]) -> list[float | None]:
    # Where no prompt went the cell is empty: a grid of zeros would hide the few that went astray.
    n_prompts = sum(row.values())
    return [row[column] / n_prompts if column in row else None for column in columns]


def _coverage_chart(report: Mapping[str, Any]) -> Chart:
    """Return how many prompts a threshold sends to an expert, and how many of these it sends to the right one."""
    # A threshold that no prompt reaches has no accuracy.
    points = [point for point in report["coverage"] if point["accuracy"] is not None]
    x = [point["threshold"] for point in points]
    series = (
        Series("right expert, of those sent", x, [point["accuracy"] for point in points], series_style(0)),
        Series("sent to an expert", x, [point["coverage"] for point in points], series_style(1)),
        Series("threshold in use", [report["threshold"]] * 2, [0, 1], REFERENCE),
    )
    return Chart("effect of the threshold", "threshold", "share of prompts", series, y_range=(-0.04, 1.04))
