"""Lines below the table of models."""

import pytest

from seap_ray.report.rows import FailedCell, ModelRow, QualityCell
from seap_ray.report.table import outdone_experts


def models(own, general, metric):
    """An expert of ``sort`` and a general model with these cells, and another expert that is better than it."""
    cells = {"sort": QualityCell(metric, *general), "sums": QualityCell(metric, *general)}
    good = QualityCell(metric, 0.9 if metric == "accuracy" else 2.0, 0.01)
    return [
        ModelRow("general", "general", "general", ratio=0.2, quality=cells),
        ModelRow("sort", "seap", "expert", "sort", 0.2, quality={"sort": own or cells["sort"]}),
        ModelRow("sums", "seap", "expert", "sums", 0.2, quality={"sums": good}),
    ]


@pytest.mark.parametrize(
    "own, general, metric, is_outdone",
    [
        ((0.60, 0.02), (0.70, 0.02), "accuracy", True),
        ((0.65, 0.02), (0.70, 0.02), "accuracy", False),  # within two errors of the difference, 0.057
        ((0.80, 0.02), (0.70, 0.02), "accuracy", False),
        ((98.1, 0.107), (65.5, 0.103), "perplexity", True),
        ((80.0, 0.107), (65.5, 0.103), "perplexity", False),
        ((40.0, 0.107), (65.5, 0.103), "perplexity", False),
    ],
)
def test_an_expert_that_the_general_model_beats_on_its_task_is_named_with_both_values(own, general, metric, is_outdone):
    lines = outdone_experts(models(QualityCell(metric, *own), general, metric))
    assert len(lines) == is_outdone
    if is_outdone:
        shown = "(0.600, 0.700)" if metric == "accuracy" else "(98.1, 65.5)"
        assert lines[0].startswith(f"sort: its expert is worse on it than the general model {shown}; ")


def test_failed_cells_and_other_ratios_are_not_compared():
    expert = ModelRow("sort", "seap", "expert", "sort", 0.5, quality={"sort": QualityCell("accuracy", 0.1, 0.01)})
    others = models(None, (0.7, 0.02), "accuracy")
    assert outdone_experts([*others, expert]) == []
    failed = ModelRow("sort", "seap", "expert", "sort", 0.2, quality={"sort": FailedCell("no memory")})
    assert outdone_experts([others[0], failed]) == []
