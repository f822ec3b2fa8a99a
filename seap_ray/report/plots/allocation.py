"""Allocation: quality by how the ratio is spread over the layers, and over attention and MLP."""

from dataclasses import replace

from seap_ray.methods import StudyName
from seap_ray.report.charts import Figure, HeatMap
from seap_ray.report.plots.studies import study_section
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section
from seap_ray.report.study_rows import AllocationRow, mean_head_of

Means = list[tuple[AllocationRow, float]]
"""Rows with the mean quality of the experts or of the general model."""


def allocation_section(data: RunData) -> Section | None:
    """Return quality by allocation and unit of attention; None where the study was not run."""
    how_to_read = (
        "Rows are allocations, columns what is cut of attention, which auto and measured choose themselves. Where "
        "another field is empty, the ratio cannot be met. Darker is better."
    )
    return _section(data, "allocation", how_to_read)


def curve_section(data: RunData) -> Section | None:
    """Return quality by the logistic curve's steepness and midpoint; None where the study was not run."""
    how_to_read = "Rows are steepnesses k of the logistic curve, columns its midpoints x0. Darker is better."
    return _section(data, "curve", how_to_read)


def _section(data: RunData, name: StudyName, how_to_read: str) -> Section | None:
    """Return a study's quality as heat maps, two for each ratio: the experts, then the general model."""
    section = study_section(data, name)
    table = data.study_table(name)
    if section is None or table is None:
        return None

    head = mean_head_of(table.columns)
    rows = AllocationRow.from_table(table)
    maps = []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        at_ratio = [row for row in rows if row.ratio == ratio]
        experts = [(row, row.experts_mean) for row in at_ratio if row.experts_mean is not None]
        general = [(row, row.general_mean) for row in at_ratio if row.general_mean is not None]
        for models, means in (("experts", experts), ("general", general)):
            if means:
                title = f"{models} {head}, {percent(ratio)} removed"
                maps.append(_map(title, means, lower_is_better=head == "mean ppl"))
    return replace(section, how_to_read=how_to_read, figure=Figure(f"Quality by {name}.", tuple(maps)))


def _map(title: str, means: Means, *, lower_is_better: bool) -> HeatMap:
    """Return a row for every allocation or steepness, a column for every unit of attention or midpoint."""
    rows = [*dict.fromkeys(_row_name(row) for row, _ in means)]
    columns = [*dict.fromkeys(_column_name(row) for row, _ in means)]
    cells: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for row, mean in means:
        cells[rows.index(_row_name(row))][columns.index(_column_name(row))] = mean

    # The colours span what was measured, since allocations differ by little.
    values = [mean for _, mean in means]
    worst_to_best = (max(values), min(values)) if lower_is_better else (min(values), max(values))
    return HeatMap(title, "", "", columns, rows, cells, worst_to_best, digits=3)


def _row_name(row: AllocationRow) -> str:
    return row.allocation if row.k is None else f"k {row.k:g}"


def _column_name(row: AllocationRow) -> str:
    return (row.attention_unit or "") if row.x0 is None else f"x0 {row.x0:g}"
