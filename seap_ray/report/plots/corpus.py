"""Corpus: quality against the number of samples that the models were calibrated on."""

from collections.abc import Sequence
from dataclasses import replace

from seap_ray.report.charts import Chart, Figure, Series, series_style
from seap_ray.report.plots.studies import study_section
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section
from seap_ray.report.study_rows import CorpusRow, mean_column_of


def corpus_section(data: RunData) -> Section | None:
    """Return quality against the number of samples, with its spread over seeds."""
    section = study_section(data, "corpus")
    table = data.study_table("corpus")
    if section is None or table is None:
        return None

    mean = mean_column_of(table.columns)
    if mean is None:
        return section

    # A size whose models could not be judged has no mean.
    rows = [row for row in CorpusRow.from_table(table) if row.mean is not None]
    by_ratio: dict[float, list[CorpusRow]] = {}
    for row in rows:
        by_ratio.setdefault(row.ratio, []).append(row)

    series = [_series(ratio, by_ratio[ratio], i) for i, ratio in enumerate(by_ratio)]
    chart = Chart(mean, "samples per task", "", tuple(series), x_log=True, wide=True)
    how_to_read = (
        "Points are means over seeds, bands one standard deviation between seeds. Where a line is flat, more samples "
        "do not help."
    )
    figure = Figure(f"{mean} against the number of samples.", (chart,))
    finding = _smallest_stable(by_ratio, is_perplexity=mean.endswith("ppl"))
    return replace(section, finding=finding, how_to_read=how_to_read, figure=figure)


def _series(ratio: float, rows: Sequence[CorpusRow], i: int) -> Series:
    # One seed alone has no spread, and so no band.
    low = [row.mean - (row.sd_over_seeds or 0) for row in rows]
    high = [row.mean + (row.sd_over_seeds or 0) for row in rows]
    samples = [row.samples for row in rows]
    means = [row.mean for row in rows]
    return Series(f"{percent(ratio)} removed", samples, means, series_style(i), bands=((low, high),))


def _smallest_stable(by_ratio: dict[float, list[CorpusRow]], *, is_perplexity: bool) -> str:
    """Say, for every ratio, from how many samples on no mean is further from the last than one standard error."""
    clauses = []
    for ratio, rows in by_ratio.items():
        largest = rows[-1]
        # From the largest size downwards, until a mean is too far from the last.
        stable = largest
        for row in reversed(rows):
            # The standard error of a perplexity is relative.
            tolerance = row.stderr * (row.mean if is_perplexity else 1)
            if abs(row.mean - largest.mean) > tolerance:
                break

            stable = row

        clauses.append(f"{stable.samples} with {percent(ratio)} removed")

    if not clauses:
        return ""
    return f"Samples from which on the mean stays within one standard error of the last: {', '.join(clauses)}."
