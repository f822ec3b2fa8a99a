"""Reconstruction: quality against size by the compensation of what is removed."""

from collections.abc import Sequence
from dataclasses import replace

from seap_ray.report.charts import Chart, Figure, Series, series_style
from seap_ray.report.plots.methods import REMOVED_LABEL
from seap_ray.report.plots.studies import study_section
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section
from seap_ray.report.study_rows import ReconstructionRow, mean_column_of

SHOWN = (
    ("none", "wifv"),
    ("none", "energy"),
    ("mean", "wifv"),
    ("least_squares", "wifv"),
    ("least_squares", "obs"),
    ("least_squares_without_bias", "obs"),
)
"""Compensations that have a line, each with the score that chose what to remove."""


def reconstruction_section(data: RunData) -> Section | None:
    """Return quality against size by compensation: of the experts, and of the general model."""
    section = study_section(data, "reconstruction")
    table = data.study_table("reconstruction")
    if section is None or table is None:
        return None

    mean = mean_column_of(table.columns)
    if mean is None:
        return section

    rows = ReconstructionRow.from_table(table)
    charts = []
    for models in dict.fromkeys(row.models for row in rows):
        charts.append(_reconstruction_chart([row for row in rows if row.models == models], mean, models))

    how_to_read = (
        "Each line is a compensation with the score that chose what to remove; bars are one standard deviation between "
        "seeds, each of which draws the data of calibration and evaluation anew."
    )
    label = f"{mean} against the share of the decoder weights that is removed, by compensation."
    figure = Figure(label, tuple(charts))
    return replace(section, finding=_finding(rows, mean), how_to_read=how_to_read, figure=figure)


def _reconstruction_chart(rows: Sequence[ReconstructionRow], mean: str, models: str) -> Chart:
    # The dense model's row has ratio 0 and no compensation, so it is none of the lines.
    dense = [row for row in rows if row.ratio == 0]
    series = []
    for i, (compensation, score) in enumerate(SHOWN):
        pruned = [row for row in rows if (row.compensation, row.score) == (compensation, score)]
        # Every line starts at the dense model.
        line = sorted(dense + pruned, key=lambda row: row.realised)
        low = [row.mean - (row.sd_over_seeds or 0.0) for row in line]
        high = [row.mean + (row.sd_over_seeds or 0.0) for row in line]
        removed = [100 * row.realised for row in line]
        means = [row.mean for row in line]
        name = f"{compensation.replace('_', ' ')}, {score}"
        series.append(Series(name, removed, means, series_style(i), errors=(low, high)))

    return Chart(models, REMOVED_LABEL, mean, tuple(series), y_log=mean.endswith("ppl"))


def _finding(rows: Sequence[ReconstructionRow], mean: str) -> str:
    """Say which score is best for every compensation, where half is removed or as near as was measured."""
    pruned = [row for row in rows if row.ratio]
    ratio = min({row.ratio for row in pruned}, key=lambda ratio: abs(ratio - 0.5))
    # Of perplexities the smallest is best.
    pick = min if mean.endswith("ppl") else max

    # At the given ratio, a compensation has one row for every score.
    clauses = []
    for models, compensation in dict.fromkeys((row.models, row.compensation) for row in pruned):
        candidates = [
            row for row in pruned if (row.ratio, row.models, row.compensation) == (ratio, models, compensation)
        ]
        best = pick(candidates, key=lambda row: row.mean)
        clauses.append(f"{models} with {compensation.replace('_', ' ')} {best.mean:.3f} ({best.score})")

    return f"Best {mean} with {percent(ratio)} removed: {', '.join(clauses)}."
