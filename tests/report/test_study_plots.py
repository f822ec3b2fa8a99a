import math

import pytest

from seap_ray.report import study_plots as findings
from seap_ray.report.artifacts import Evidence, mean_of
from seap_ray.storage.files import write_json
from tests.support.made_run import RATIOS, TASKS, edit, make_run

STUDIES = ("table", "ratio", "corpus", "allocation", "ood", "transfer", "routing", "pooling", "paper")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    return Evidence.of(make_run(tmp_path_factory.mktemp("runs") / "demo", studies=STUDIES))


def model_of(evidence, name, ratio):
    return next(m for m in evidence.main["models"] if m["name"] == name and m["ratio"] == ratio)


# --- quality ---------------------------------------------------------------------------------------------------------


def test_quality_is_the_mean_accuracy_from_dense_on(run):
    evidence = Evidence.of(run)
    (chart,) = findings.quality(evidence).picture.panels
    assert [series.label for series in chart.series] == ["experts", "general", "uniform"]
    for series in chart.series[1:]:
        models = [model_of(evidence, "dense", None), *(model_of(evidence, series.label, r) for r in RATIOS)]
        means = [sum(m["quality"][task]["value"] for task in TASKS) / 3 for m in models]
        assert series.x == pytest.approx([100 * m["realised_ratio"] for m in models])
        assert series.y == pytest.approx(means)
        assert series.errors[1] == pytest.approx([mean + 0.02 / math.sqrt(3) for mean in means])
    own = [sum(model_of(evidence, task, r)["quality"][task]["value"] for task in TASKS) / 3 for r in RATIOS]
    assert chart.series[0].y[1:] == pytest.approx(own)
    assert f"With 40 % removed: experts {own[1]:.3f}" in findings.quality(evidence).shows.replace("with", "With")


def test_perplexities_have_an_axis_of_their_own_and_their_error_is_a_factor(studied):
    accuracy, perplexity = findings.quality(studied).picture.panels
    assert not accuracy.y_log and perplexity.y_log
    general = next(series for series in perplexity.series if series.label == "general")
    for low, value, high in zip(general.errors[0], general.y, general.errors[1], strict=True):
        assert value / low == pytest.approx(high / value) == pytest.approx(math.exp(0.015))
    models = [m for m in studied.studies["ratio"]["models"] if m["name"] in ("dense", "general")]
    assert general.y == pytest.approx([m["quality"]["prose"]["value"] for m in models])


def test_a_mean_with_a_failed_cell_is_none(run):
    edit(run.results, lambda results: results["models"][1]["quality"].update(sort={"error": "no room"}))
    evidence = Evidence.of(run)
    assert mean_of(model_of(evidence, "general", 0.2), perplexity=False) is None
    general = next(s for s in findings.quality(evidence).picture.panels[0].series if s.label == "general")
    assert len(general.x) == 2, "dense and the other ratio"


def test_of_many_methods_the_best_are_drawn_and_always_ours(run):
    def crowd(results):
        uniform = [m for m in results["models"] if m["name"] == "uniform"]
        for i in range(20):
            quality = {task: {"metric": "exact_match", "value": i / 20, "stderr": 0.0, "n": 9} for task in TASKS}
            results["models"] += [{**m, "name": f"m{i}", "method": f"m{i}", "quality": quality} for m in uniform]

    edit(run.results, crowd)
    (chart,) = findings.quality(Evidence.of(run)).picture.panels
    labels = [series.label for series in chart.series]
    assert labels[:2] == ["experts", "general"] and len(labels) == findings.MOST_METHODS
    assert {"m19", "m18", "m17"} < set(labels) and "m0" not in labels


# --- transfer --------------------------------------------------------------------------------------------------------


def test_transfer_is_relative_to_dense_with_own_tasks_framed(run):
    evidence = Evidence.of(run)
    part = findings.transfer(evidence)
    for ratio, panel in zip(RATIOS, part.picture.panels, strict=True):
        assert panel.rows == [*TASKS, "general"]
        assert panel.framed == {(0, 0), (1, 1), (2, 2)}
        for name, row in zip(panel.rows, panel.values, strict=True):
            dense = evidence.dense["quality"]
            quality = model_of(evidence, name, ratio)["quality"]
            assert row == pytest.approx([quality[task]["value"] / dense[task]["value"] for task in TASKS])


def test_transfer_turns_a_perplexity_round_and_leaves_failed_cells_empty(run):
    def change(results):
        for i, model in enumerate(results["models"]):
            model["quality"]["prose"] = {"metric": "perplexity", "value": 10.0 + i, "stderr": 0.1, "n": 9}
        results["models"][2]["quality"]["sort"] = {"error": "no room"}

    edit(run.results, change)
    panel = findings.transfer(Evidence.of(run)).picture.panels[0]
    assert panel.values[0][1] is None
    assert panel.values[0][2] == pytest.approx(10 / 12)


# --- router and speed ------------------------------------------------------------------------------------------------


def test_confusion_is_shares_of_each_tasks_prompts(run):
    edit(run.results, lambda results: results["router"]["confusion"].update(sort={"sort": 30, "prose": 10}))
    confusion, coverage = findings.router(Evidence.of(run)).picture.panels
    assert confusion.columns == [*TASKS, "general"] and confusion.rows == list(TASKS)
    assert confusion.values[1] == [None, 0.75, 0.25, None]
    assert confusion.values[0] == [0.95, None, None, 0.05]
    assert [series.label for series in coverage.series] == [
        "right, of those sent",
        "sent to an expert",
        "threshold in use",
    ]


@pytest.mark.parametrize("router", [None, {"n": 0}])
def test_without_held_out_prompts_there_is_no_router_to_show(run, router):
    edit(run.results, lambda results: results.update(router=router))
    assert findings.router(Evidence.of(run)) is None


def test_the_ideal_speed_is_one_over_what_is_left(studied):
    prefill, decode = findings.speed(studied).picture.panels
    ideal = prefill.series[0]
    assert ideal.label == "ideal" and (ideal.x[0], ideal.y[0]) == (0, 1)
    assert ideal.y[-1] == pytest.approx(1 / (1 - ideal.x[-1] / 100))
    models = [m for m in studied.studies["ratio"]["models"] if m["name"] == "uniform"]
    uniform = next(series for series in decode.series if series.label == "uniform")
    assert uniform.y == [m["speed"]["decode_speedup"] for m in models]


# --- studies ---------------------------------------------------------------------------------------------------------


def test_the_corpus_picture_has_a_line_for_each_ratio_and_the_spread_over_seeds(studied):
    (chart,) = findings.corpus(studied).picture.panels
    rows = [row for row in studied.studies["corpus"]["rows"] if row[0] == 0.2]
    line = chart.series[0]
    assert (line.x, line.y) == ([row[1] for row in rows], [row[3] for row in rows])
    ((low, high),) = line.bands
    assert [(b - a) / 2 for a, b in zip(low, high, strict=True)] == pytest.approx([row[4] for row in rows])


def test_the_smallest_stable_corpus_is_within_a_standard_error_of_the_largest(studied):
    shows = findings.corpus(studied).shows  # the made-up means are 3 / samples below their limit, the error 0.01
    assert shows.endswith("so many samples on: 500 with 20 % removed, 500 with 40 % removed.")


def test_the_allocation_map_holds_every_value_where_it_belongs(studied):
    maps = findings.allocation(studied).picture.panels
    assert [panel.title for panel in maps] == [
        f"{whose} mean acc, {100 * ratio:g} % removed" for ratio in RATIOS for whose in ("experts", "general")
    ]
    for ratio, kind, k, x0, experts, _, general, _ in studied.studies["allocation"]["rows"]:
        for panel, value in zip(maps[2 * RATIOS.index(ratio) :][:2], (experts, general), strict=True):
            row = panel.rows.index(kind if k is None else f"k {k:g}")
            column = 0 if k is None else panel.columns.index(f"x0 {x0:g}")
            assert panel.values[row][column] == value


def test_a_study_says_what_is_best_and_worst_at_the_largest_ratio(studied):
    rows = [row for row in studied.studies["routing"]["rows"] if row[1] == 0.4]
    best, worst = max(rows, key=lambda row: row[2]), min(rows, key=lambda row: row[2])
    shows = findings.routing(studied).shows
    assert f"{best[2]:.3f} ({best[0]}) at best" in shows and f"{worst[2]:.3f} ({worst[0]}) at worst" in shows


def test_a_studys_table_has_settings_as_set_and_measurements_in_three_decimals(studied):
    (table,) = findings.pooling(studied).tables
    assert table.groups[0][1][-1] == [
        "general_like_experts.score_average.experts_tokens.2",
        "0.4",
        "0.4012",
        "0.100",
        "0.010",
    ]
    assert findings.corpus(studied).tables[0].groups[0][1][0] == ["0.2", "50", "3", "0.640", "0.010", "0.010"]


def test_out_of_distribution_is_averaged_over_tasks_judged_by_accuracy(run):
    quality = {"metric": "exact_match"}
    study = {
        "title": "Out of distribution",
        "question": "What?",
        "tasks": {"a": quality, "b": quality, "c": {"metric": "perplexity"}},
        "models": [],
        "columns": ["ratio", "task", "general", "general stderr", "general without it", "general without it stderr"],
        "rows": [[0.4, "a", 0.9, 0.1, 0.5, 0.1], [0.4, "b", 0.7, 0.1, None, None], [0.4, "c", 30.0, 0.1, 99.0, 0.1]],
    }
    write_json(run.study("ood"), study)
    assert findings.ood(Evidence.of(run)).shows == "The mean accuracy with 40 % removed: general 0.800."


def test_the_papers_distance_is_told_in_points(studied):
    assert "+0.5 to +0.5 points over 1 rows" in findings.paper(studied).shows


@pytest.mark.parametrize("name", STUDIES[2:])
def test_a_study_without_rows_is_left_out(run, name):
    study = {"title": "", "question": "", "columns": ["ratio", "mean acc"], "rows": [], "tasks": {}, "models": []}
    write_json(run.study(name), study)
    evidence = Evidence.of(run)
    if name == "transfer":
        assert findings.transfer(evidence) is None
    else:
        assert getattr(findings, name)(evidence) is None


def test_a_study_that_has_a_run_for_itself_is_found_there(run, studied):
    beside = run.root.with_name(f"{run.root.name}-corpus")
    write_json(beside / "results" / "corpus.json", studied.studies["corpus"])
    assert list(Evidence.of(run).studies) == ["corpus"]
