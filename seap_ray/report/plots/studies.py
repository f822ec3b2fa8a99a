"""Studies: a study's section with its table, and the studies that have no chart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from seap_ray.report.rows import StudyTable
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section, Table
from seap_ray.report.study_rows import OutOfDistributionRow, PaperRow, mean_column_of
from seap_ray.report.table import show
from seap_ray.tasks import is_perplexity

SETTINGS = ("ratio", "samples", "k", "x0")
"""Columns of what a study has set, in contrast to what it measured."""


def study_section(data: RunData, name: str) -> Section | None:
    """Return a study's question with its table, and its best and worst row in words; None where it was not run."""
    table = data.study_table(name)
    if table is None:
        return None
    return Section(name, table.question, "", _best_and_worst(table), tables=study_tables(data, name))


def study_tables(data: RunData, name: str) -> tuple[Table, ...]:
    """Return a study's table, or nothing where it was not run."""
    table = data.study_table(name)
    if table is None:
        return ()
    # One group without a heading: only the summary is grouped by ratio.
    rows = [_texts(table.columns, row) for row in table.rows]
    return (Table(table.title, table.columns, [("", rows)]),)


def _texts(columns: Sequence[str], row: Sequence[Any]) -> list[str]:
    return [_text(column, value) for column, value in zip(columns, row, strict=True)]


def _text(column: str, value: Any) -> str:
    """Return a setting as it was set, a realised ratio in four decimals, what was measured in three or fewer."""
    if column in SETTINGS and isinstance(value, float):
        return f"{value:g}"
    return f"{value:.4f}" if column == "realised" and value is not None else show(value)


def _best_and_worst(table: StudyTable) -> str:
    """Say which rows are best and worst at the largest ratio."""
    mean = mean_column_of(table.columns)
    if mean is None:
        return ""

    # Rows of different ratios do not compare; the largest ratio shows most.
    rows = [row for row in _by_column(table) if row[mean] is not None]
    largest = max((row["ratio"] for row in rows if row.get("ratio") is not None), default=None)
    ascending = sorted((row for row in rows if row.get("ratio") == largest), key=lambda row: row[mean])
    if largest is None or len(ascending) < 2:
        return ""

    worst = ascending[0]
    best = ascending[-1]
    if mean.endswith("ppl"):
        worst = ascending[-1]
        best = ascending[0]

    range_text = f"{_row_text(best, mean)} at best and {_row_text(worst, mean)} at worst"
    name = mean.replace("mean acc", "mean accuracy").replace("mean ppl", "mean perplexity")
    return f"With {percent(largest)} removed, the {name} is {range_text}."


def _by_column(table: StudyTable) -> list[dict[str, Any]]:
    """Return the rows by the names of the columns; of columns with the same name the first counts."""
    # Columns of tasks may be named like one of the study.
    places = {column: table.columns.index(column) for column in table.columns}
    rows = []
    for row in table.rows:
        rows.append({column: row[place] for column, place in places.items()})
    return rows


def _row_text(row: Mapping[str, Any], mean: str) -> str:
    """Return a row's mean, and what the row is about: its words, and the numbers that were set."""
    words = [value for value in row.values() if isinstance(value, str)]
    settings = [f"{name} {row[name]:g}" for name in SETTINGS[1:] if row.get(name) is not None]
    return f"{row[mean]:.3f} ({', '.join([*words, *settings])})"


# --- studies without a chart -----------------------------------------------------------------------------------------


def ood_section(data: RunData) -> Section | None:
    """Return what a task loses when the calibration has not seen it."""
    section = study_section(data, "ood")
    table = data.study_table("ood")
    if section is None or table is None:
        return None

    tasks = data.studies["ood"].tasks
    # At the largest ratio, and by accuracies alone: these have a common mean, and perplexities have none with them.
    rows = OutOfDistributionRow.from_table(table)
    largest = max(row.ratio for row in rows)
    rows = [row for row in rows if row.ratio == largest and row.task in tasks]
    rows = [row for row in rows if not is_perplexity(tasks[row.task].metric)]

    # A mean over some of the tasks would not compare with one over all.
    means = []
    for model in OutOfDistributionRow.MODELS:
        values = [value for row in rows if (value := getattr(row, model)) is not None]
        if len(values) == len(rows) > 0:
            means.append(f"{model.replace('_', ' ')} {sum(values) / len(values):.3f}")

    if not means:
        return section
    return replace(section, finding=f"Mean accuracy with {percent(largest)} removed: {', '.join(means)}.")


def paper_section(data: RunData) -> Section | None:
    """Return how far ours are from the paper's numbers."""
    section = study_section(data, "paper")
    table = data.study_table("paper")
    if section is None or table is None:
        return None

    gaps = []
    for row in PaperRow.from_table(table):
        # The paper's tables of accuracy are about the same tasks; the others have their own units.
        is_difference = row.whose == "difference" and row.table.startswith("accuracy")
        if is_difference and row.average is not None:
            gaps.append(row.average)

    if not gaps:
        return section

    gap = f"Our average accuracy less the paper's: {min(gaps):+.1f} to {max(gaps):+.1f} points over {len(gaps)} rows."
    return replace(section, finding=gap)


def routing_section(data: RunData) -> Section | None:
    """Return what each way of routing costs."""
    return study_section(data, "routing")


def synthesis_section(data: RunData) -> Section | None:
    """Return experts by whether rows or the model's own texts calibrated them."""
    return study_section(data, "synthesis")


def pooling_section(data: RunData) -> Section | None:
    """Return general models by the amount of data that they were calibrated on."""
    return study_section(data, "pooling")
