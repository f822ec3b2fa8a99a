import pytest

from seap_ray.report.page import SECTIONS
from seap_ray.report.plots.allocation import allocation_section, curve_section
from seap_ray.report.plots.corpus import corpus_section
from seap_ray.report.plots.studies import ood_section, paper_section, pooling_section, routing_section
from seap_ray.report.run_data import RunData
from seap_ray.storage.files import write_json
from tests.support.made_run import RATIOS, REPORT_STUDIES


def test_the_corpus_picture_has_a_line_for_each_ratio_and_the_spread_over_seeds(studied):
    (chart,) = corpus_section(studied).figure.panels
    rows = [row for row in studied.study_table("corpus").rows if row[0] == 0.2]
    line = chart.series[0]
    assert (line.x, line.y) == ([row[1] for row in rows], [row[3] for row in rows])
    ((low, high),) = line.bands
    assert [(b - a) / 2 for a, b in zip(low, high, strict=True)] == pytest.approx([row[4] for row in rows])


def test_the_smallest_stable_corpus_is_within_a_standard_error_of_the_largest(studied):
    finding = corpus_section(studied).finding  # the made-up means are 3 / samples below their limit, the error 0.01
    assert finding.endswith("within one standard error of the last: 500 with 20 % removed, 500 with 40 % removed.")


@pytest.mark.parametrize(("study", "section"), [("allocation", allocation_section), ("curve", curve_section)])
def test_the_maps_of_allocations_and_curves_hold_every_value_where_it_belongs(studied, study, section):
    maps = section(studied).figure.panels
    assert [panel.title for panel in maps] == [
        f"{whose} mean acc, {100 * ratio:g} % removed" for ratio in RATIOS for whose in ("experts", "general")
    ]
    for ratio, kind, unit, k, x0, _, experts, _, general, _ in studied.study_table(study).rows:
        for panel, value in zip(maps[2 * RATIOS.index(ratio) :][:2], (experts, general), strict=True):
            row = panel.rows.index(kind if k is None else f"k {k:g}")
            column = panel.columns.index(unit if k is None else f"x0 {x0:g}")
            assert panel.values[row][column] == value


def test_a_study_says_what_is_best_and_worst_at_the_largest_ratio(studied):
    rows = [row for row in studied.study_table("routing").rows if row[1] == 0.4]
    best = max(rows, key=lambda row: row[2])
    worst = min(rows, key=lambda row: row[2])
    finding = routing_section(studied).finding
    assert f"{best[2]:.3f} ({best[0]}) at best" in finding and f"{worst[2]:.3f} ({worst[0]}) at worst" in finding


def test_a_studys_table_has_settings_as_set_and_measurements_in_three_decimals(studied):
    (table,) = pooling_section(studied).tables
    assert table.groups[0][1][-1] == [
        "general_like_experts.score_average.experts_tokens.2",
        "0.4",
        "0.4012",
        "0.100",
        "0.010",
    ]
    assert corpus_section(studied).tables[0].groups[0][1][0] == ["0.2", "50", "3", "0.640", "0.010", "0.010"]


def test_out_of_distribution_is_averaged_over_tasks_judged_by_accuracy(own_run):
    quality = {"metric": "exact_match"}
    study = {
        "title": "Out of distribution",
        "question": "What?",
        "tasks": {"a": quality, "b": quality, "c": {"metric": "perplexity"}},
        "models": [],
        "columns": ["ratio", "task", "general", "general stderr", "general without it", "general without it stderr"],
        "rows": [[0.4, "a", 0.9, 0.1, 0.5, 0.1], [0.4, "b", 0.7, 0.1, None, None], [0.4, "c", 30.0, 0.1, 99.0, 0.1]],
    }
    write_json(own_run.study("ood"), study)
    assert ood_section(RunData.of(own_run)).finding == "Mean accuracy with 40 % removed: general 0.800."


def test_the_papers_distance_is_told_in_points(studied):
    assert "+0.5 to +0.5 points over 1 rows" in paper_section(studied).finding


@pytest.mark.parametrize("name", REPORT_STUDIES[2:])
def test_a_study_without_rows_is_left_out(own_run, name):
    study = {"title": "", "question": "", "columns": ["ratio", "mean acc"], "rows": [], "tasks": {}, "models": []}
    write_json(own_run.study(name), study)
    data = RunData.of(own_run)
    (make,) = (make for make in SECTIONS if make.__name__ == f"{name}_section")
    assert make(data) is None


def test_a_study_that_has_a_run_for_itself_is_found_there(own_run, studied):
    beside = own_run.root.with_name(f"{own_run.root.name}-corpus")
    write_json(beside / "results" / "corpus.json", studied.studies["corpus"].to_json())
    assert list(RunData.of(own_run).studies) == ["corpus"]
