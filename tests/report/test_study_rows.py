"""Rows of the studies' tables: what a study writes is what a report reads, column by column."""

import csv

import pytest

from seap_ray.report.rows import StudyTable
from seap_ray.report.study_rows import (
    AllocationRow,
    CorpusRow,
    Estimate,
    ModelComparisonRow,
    OutOfDistributionRow,
    PaperRow,
    PoolingRow,
    ReconstructionRow,
    RoutingRow,
    SynthesisRow,
    TaskQualityRow,
    TransferRow,
    mean_head_of,
)
from tests.support import ROOT

ROW_TYPES = {
    "table": ModelComparisonRow,
    "ratio": ModelComparisonRow,
    "corpus": CorpusRow,
    "allocation": AllocationRow,
    "curve": AllocationRow,
    "reconstruction": ReconstructionRow,
    "reconstruction_bias": ReconstructionRow,
    "ood": OutOfDistributionRow,
    "transfer": TransferRow,
    "routing": RoutingRow,
    "pooling": PoolingRow,
    "synthesis": SynthesisRow,
}
FILES = sorted((ROOT / "docs" / "results").glob("*/*.csv"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_tables_have_the_columns_of_their_row_type_and_come_back_as_they_are(path):
    with path.open(newline="") as file:
        columns, *cells = csv.reader(file)
    row_type = TaskQualityRow if path.stem.endswith("_by_task") else ROW_TYPES[path.stem]
    rows = row_type.from_table(StudyTable(path.stem, "", "", columns, cells))
    assert [row.to_json() for row in rows] == cells
    tasks = list(getattr(rows[0], "by_task", ()))
    assert row_type.columns(mean_head_of(columns) or "", tasks) == columns


def test_a_task_may_be_called_like_a_column():
    tasks = {"model": Estimate(0.5, 0.1), "stderr": Estimate(0.7, 0.2), "ratio": Estimate()}
    row = ModelComparisonRow("dense", 0.3, 0.29, 10, 20, 4, tasks, 0.6, 0.15, 1.0, 2.0, 3.0, 4.0)
    columns = ModelComparisonRow.columns("mean acc", tasks)
    assert columns.count("model") == columns.count("ratio") == columns.count("stderr") == 2
    (read,) = ModelComparisonRow.from_table(StudyTable("table", "", "", columns, [row.to_json()]))
    assert read == row


def test_a_mean_is_found_by_either_name_and_a_column_that_is_missing_is_none():
    columns = ["ratio", "samples", "tasks", "mean ppl", "stderr"]
    (row,) = CorpusRow.from_table(StudyTable("corpus", "", "", columns, [[0.2, 50, 3, 9.5, 0.1]]))
    assert row == CorpusRow(0.2, 50, 3, 9.5, None, 0.1)


def test_a_row_without_figures_has_empty_cells():
    row = PaperRow("speed, Llama-2-7B", "Dense", 0.0, "paper", tokens_per_s=31.88)
    assert row.to_json() == ["speed, Llama-2-7B", "Dense", 0.0, "paper", *[None] * 10, 31.88, None]
    assert len(PaperRow.columns()) == len(row.to_json())
