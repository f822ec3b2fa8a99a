"""Allocation: quality by how the ratio is spread over the layers."""

from dataclasses import replace

from seap_ray.report.charts import Figure, HeatMap
from seap_ray.report.plots.studies import study_section
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section
from seap_ray.report.study_rows import AllocationRow, mean_head_of

Means = list[tuple[AllocationRow, float]]
"""Rows with the mean quality of the experts or of the general model."""


def allocation_section(data: RunData) -> Section | None:
    """Return quality over the logistic curve's steepness and midpoint, and that of the other allocations."""
    section = study_section(data, "allocation")
    table = data.study_table("allocation")
    if section is None or table is None:
        return None

    head = mean_head_of(table.columns)
    rows = AllocationRow.from_table(table)

    # One row of panels for a ratio: the experts at the left, the general model at the right.
    maps = []
    for ratio in dict.fromkeys(row.ratio for row in rows):
        at_ratio = [row for row in rows if row.ratio == ratio]
        experts = [(row, row.experts_mean) for row in at_ratio if row.experts_mean is not None]
        general = [(row, row.general_mean) for row in at_ratio if row.general_mean is not None]
        for models, means in (("experts", experts), ("general", general)):
            if means:
                title = f"{models} {head}, {percent(ratio)} removed"
                maps.append(_allocation_map(title, means, lower_is_better=head == "mean ppl"))

    how_to_read = (
        "Rows with a k are the logistic curve of that steepness, columns its midpoint x0; the rows above are the other "
        "allocations, which have neither. Darker is better."
    )
    return replace(section, how_to_read=how_to_read, figure=Figure("Quality by allocation.", tuple(maps)))


def _allocation_map(title: str, means: Means, *, lower_is_better: bool) -> HeatMap:
    """Return a row for every steepness of the logistic curve, above them one for every other allocation."""
    midpoints = sorted({row.x0 for row, _ in means if row.x0 is not None})
    n_columns = max(len(midpoints), 1)
    cells: dict[str, list[float | None]] = {}
    for row, mean in means:
        # An allocation without a curve has one value, which is in the first column.
        name = row.allocation if row.k is None else f"k {row.k:g}"
        column = 0 if row.x0 is None else midpoints.index(row.x0)
        cells.setdefault(name, [None] * n_columns)[column] = mean

    # The colours span what was measured, since allocations differ by little.
    values = [mean for _, mean in means]
    worst_to_best = (max(values), min(values)) if lower_is_better else (min(values), max(values))
    columns = [f"x0 {x0:g}" for x0 in midpoints] or [""]
    return HeatMap(title, "", "", columns, list(cells), list(cells.values()), worst_to_best, digits=3)
