"""jobs/eval.py on a real Ray cluster: every study from one calibration, resumed, failing in parts, refused."""

import csv
import json
import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoTokenizer

from seap_ray.config import Baseline, Config
from seap_ray.methods import METHODS, STUDIES
from seap_ray.pipeline.evaluate import Failure
from seap_ray.report.rows import cell_from_json
from seap_ray.report.table import mean_quality
from seap_ray.storage.run import Run
from seap_ray.studies import allocation, reconstruction
from seap_ray.studies import table as table_study
from seap_ray.studies.run import RUNS
from tests.support import DATA, NOTHING_TO_JUDGE, ROOT

pytestmark = pytest.mark.ray

SMALL = [
    "run.name=run",
    "tasks=[sort, logic]",
    "corpus.samples=48",
    "corpus.shard_sequences=8",
    "calibration.workers=1",  # each is a process that imports torch and transformers
    "evaluation.samples=12",
    "evaluation.speed={rounds: 1, prompt_tokens: 16, new_tokens: 2}",
    "pruning.ratio=0.5",
    "pruning.baselines={}",
    *(f"{key}={value}" for key, value in NOTHING_TO_JUDGE.items()),
]
SAME_RUN = [name for name, study in STUDIES.items() if not study.own_run]
main = runpy.run_path(str(ROOT / "jobs" / "eval.py"))["main"]
prune = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]


def arguments(storage: Path, *more: str) -> list[str]:
    return [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}", *SMALL, *more]


def read(storage: Path, study: str, run: str = "run") -> dict:
    return json.loads(Run(storage / run).study(study).read_text())


def rows_of(results: dict) -> list[dict]:
    return [dict(zip(results["columns"], row, strict=True)) for row in results["rows"]]


def models_of(results: dict) -> dict:
    return {model["name"]: model for model in results["models"]}


def mean_of(model: dict) -> float:
    mean = mean_quality(map(cell_from_json, model["quality"].values()))
    assert mean
    return mean[0]


@contextmanager
def without_a_page() -> Iterator[None]:
    """Draw no report after a study: seconds for a page that the next study draws anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("seap_ray.studies.run.write_report", lambda run: run.report)
        yield


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory) -> Path:
    """Storage of a run with every study that needs no corpus of its own; the last one draws the report of all."""
    storage = tmp_path_factory.mktemp("finished")
    assert prune(arguments(storage)) == 0
    for study in SAME_RUN:
        ratios = ["pruning.ratio=[0.3, 0.5]"] if study == "ratio" else []
        is_last = study == SAME_RUN[-1]
        with nullcontext() if is_last else without_a_page(), pytest.MonkeyPatch.context() as fewer:
            if study == "reconstruction":  # all of it is thirty-six models for each of three seeds
                fewer.setattr(reconstruction, "SEEDS", range(2))
                fewer.setattr(reconstruction, "SCORES", ("obs",))
            if study == "curve":  # the grid is twenty, of three models each
                fewer.setattr(allocation, "CURVES", allocation.CURVES[:3])
            assert main(arguments(storage, f"study={study}", *ratios)) == 0, study
    return storage


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_study_has_a_run_and_every_method_is_a_baseline():
    assert RUNS.keys() == STUDIES.keys()
    for own in METHODS.values():
        Baseline.model_validate(own)


@pytest.mark.parametrize("study", SAME_RUN)
def test_a_study_leaves_one_table_as_json_and_csv_with_its_command(finished, study):
    results = read(finished, study)
    assert results["study"] == study and results["rows"] and "python" in results["command"]
    assert len(set(results["columns"])) == len(results["columns"])

    with Run(finished / "run").study(study).with_suffix(".csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == results["columns"]
    assert rows == [["" if value is None else str(value) for value in row] for row in results["rows"]]


@pytest.mark.parametrize("study", ["table", "ratio"])
def test_studies_of_models_leave_every_model_beside_the_dense_one_by_task(finished, study):
    path = Run(finished / "run").study(study)
    with path.with_name(f"{study}_by_task.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = json.loads(path.read_text())["models"]
    qualities = {(m["name"], str(m["ratio"] or "")): m["quality"] for m in models}
    dense = qualities["dense", ""]
    judged = [(*model, task) for model, quality in qualities.items() for task in quality]
    assert [(r["model"], r["ratio"], r["task"]) for r in rows if r["task"] != "mean acc"] == judged

    for row in rows:
        quality, value = qualities[row["model"], row["ratio"]], float(row["value"])
        if row["task"] == "mean acc":
            tasks = [task for task, cell in quality.items() if "perplexity" not in cell["metric"]]
            assert value == pytest.approx(mean(quality[task]["value"] for task in tasks))
            others = mean(dense[task]["value"] for task in tasks)
        else:
            assert value == quality[row["task"]]["value"]
            others = dense[row["task"]]["value"]
        against = value / others if "perplexity" in row["metric"] else value - others
        assert float(row["against dense"]) == pytest.approx(against)
        if row["model"] == "dense":
            assert float(row["against dense stderr"]) == 0


def test_reconstruction_has_every_compensation_over_seeds_that_draw_anew(finished):
    rows = rows_of(read(finished, "reconstruction"))
    dense = {row["models"]: row for row in rows if row["ratio"] == 0}
    assert set(dense) == {"experts", "general"} and dense["experts"]["realised"] == 0

    cut = {(row["models"], row["compensation"]): row for row in rows if row["ratio"]}
    ways = {(models, way) for models in dense for way in reconstruction.WAYS}
    assert cut.keys() == ways

    for row in cut.values():
        assert row["realised"] == pytest.approx(0.5, abs=0.01) and row["score"] == "obs"
        assert row["sd over seeds"] is not None and 0 <= row["mean acc"] <= 1
    one, other = (json.loads((finished / name / "config.json").read_text()) for name in ("run", "run-seed1"))

    assert (one["run"]["seed"], other["run"]["seed"]) == (0, 1)
    shards = [
        sorted(p.read_bytes() for p in (finished / n / "shards" / "logic").glob("0*")) for n in ("run", "run-seed1")
    ]

    assert shards[0] != shards[1]


def test_all_studies_read_one_set_of_statistics(finished):
    found = (finished / "run" / "statistics").glob("*.safetensors")
    statistics = [path for path in found if path.stem != "weight_norms"]
    newest = max(path.stat().st_mtime for path in statistics)
    assert newest < min(path.stat().st_mtime for path in (finished / "run" / "results").iterdir())
    assert {path.stem for path in statistics} == {"sort", "logic"}


def test_the_table_has_every_method_at_equal_size(finished):
    models = models_of(read(finished, "table"))
    for score in ("wanda_sp", "flap", "magnitude", "random"):
        assert {f"{score}.{allocation}" for allocation in ("uniform", "logistic", "global")} <= models.keys()

    assert {
        "dense",
        "general",
        "sort",
        "logic",
        "flap.standardised",
        "depth",
        "seap_exact.wifv.logistic, own task",
    } <= models.keys()
    assert {"random.uniform.1", "random.uniform.2", "seap_official.official_wifn.logistic.gen"} <= models.keys()

    tile = 16 * 3 * 192 / 2_200_000  # of channels, as a share of the decoder
    for name, model in models.items():
        if name != "dense" and not name.startswith("seap_official"):
            assert model["realised_ratio"] == pytest.approx(0.5, abs=2 * tile), name

    assert models["seap_official.official_wifn.logistic.gen"]["realised_ratio"] < 0.45  # as its authors' code does


def test_the_main_jobs_models_have_the_main_jobs_quality(finished):
    main_job = models_of(json.loads(Run(finished / "run").results.read_text()))
    table = models_of(read(finished, "table"))
    for name in ("dense", "general", "sort", "logic"):
        assert table[name]["quality"] == main_job[name]["quality"]
        assert table[name]["parameters"] == main_job[name]["parameters"]


def test_speed_and_memory_stand_in_the_same_table(finished):
    rows = {row["model"]: row for row in rows_of(read(finished, "table"))}
    for name, row in rows.items():
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0, name
        assert row["bytes"] == 2 * row["parameters"] > 0 and row["kv_bytes_per_token"] > 0, name
    assert rows["dense"]["decode_speedup"] == rows["dense"]["prefill_speedup"] == 1
    assert rows["sort"]["kv_bytes_per_token"] < rows["dense"]["kv_bytes_per_token"]


def test_equal_shapes_share_a_measurement_of_speed(finished):
    models = models_of(read(finished, "table"))
    assert models["sort"]["speed"] == models["logic"]["speed"] == models["experts, own task"]["speed"]


# --- what each study says --------------------------------------------------------------------------------------------


def test_the_ratio_sweep_has_every_method_at_every_ratio(finished):
    rows = rows_of(read(finished, "ratio"))
    by_model = {name: {row["ratio"] for row in rows if row["model"] == name} for name in ("general", "depth", "flap")}
    assert by_model == dict.fromkeys(by_model, {0.3, 0.5})


def test_transfer_is_every_model_on_every_task(finished):
    rows = {row["model"]: row for row in rows_of(read(finished, "transfer"))}
    models = models_of(read(finished, "transfer"))
    assert list(rows) == ["dense", "general", "sort", "logic"]
    for name, row in rows.items():
        for task in ("sort", "logic"):
            assert row[task] == models[name]["quality"][task]["value"]


def test_a_task_left_out_is_missing_from_the_plan_and_judged(finished):
    results = read(finished, "ood")
    models = models_of(results)
    (row,) = [row for row in rows_of(results) if row["task"] == "sort"]

    # Of two tasks the one that is left decides alone, with the general model's settings.
    assert list(models["without_sort"]["quality"]) == ["sort"]
    assert row["general without it"] == models["without_sort"]["quality"]["sort"]["value"]
    assert row["other experts"] == models["logic"]["quality"]["sort"]["value"]


def test_routing_by_the_true_task_is_every_expert_on_its_own_and_to_none_is_the_general_model(finished):
    rows = {row["routing"]: row for row in rows_of(read(finished, "routing"))}
    models = models_of(read(finished, "transfer"))
    own = sum(models[task]["quality"][task]["value"] for task in ("sort", "logic")) / 2

    assert rows["oracle"]["mean acc"] == pytest.approx(own)
    assert rows["general"]["mean acc"] == pytest.approx(mean_of(models["general"]))
    assert rows["general"]["to general"] == 1 and rows["oracle"]["to general"] == 0
    assert 0 <= rows["random"]["mean acc"] <= 1 and rows["classifier"]["p50 ms"] > 0
    # Always the likeliest task's expert, whatever was measured, and by what was measured on the other half.
    assert rows["argmax"]["to general"] <= rows["classifier"]["to general"]
    assert 0 <= rows["expected quality"]["mean acc"] <= 1 and rows["expected quality"]["p50 ms"] > 0


def test_pooling_compares_at_an_experts_tokens_and_at_all(finished):
    rows = {row["model"]: row for row in rows_of(read(finished, "pooling"))}
    of_experts = rows["experts, own task"]["tokens"]
    for like in ("general", "experts"):
        for pooling in ("pooled", "score_average"):
            name = f"general_like_{like}.{pooling}"
            assert rows[f"{name}.all_tokens"]["tokens"] == pytest.approx(2 * of_experts, abs=1)
            for seed in range(3):
                assert rows[f"{name}.experts_tokens.{seed}"]["tokens"] == pytest.approx(of_experts, rel=0.25)


def test_the_general_model_of_all_tokens_is_the_runs_own(finished):
    pooling, transfer = models_of(read(finished, "pooling")), models_of(read(finished, "transfer"))
    assert pooling["general_like_general.pooled.all_tokens"]["quality"] == transfer["general"]["quality"]


def test_the_allocation_study_holds_the_runs_own_setting_beside_the_others(finished):
    rows = rows_of(read(finished, "allocation"))
    (default,) = [row for row in rows if (row["allocation"], row["attention unit"]) == ("logistic", "group")]
    transfer = models_of(read(finished, "transfer"))
    own = sum(transfer[task]["quality"][task]["value"] for task in ("sort", "logic")) / 2

    assert default["experts mean acc"] == pytest.approx(own)
    assert default["general mean acc"] == pytest.approx(mean_of(transfer["general"]))
    pairs = {(row["allocation"], row["attention unit"]) for row in rows}
    fixed = {*product(("uniform", "logistic", "global", "standardised"), ("group", "head", "none"))}
    assert pairs == fixed | {("auto", "auto"), ("measured", "auto")} and len(rows) == len(pairs)
    assert all(row["realised"] == pytest.approx(0.5, abs=0.02) for row in rows)


def test_the_corpus_study_has_a_spread_over_seeds_in_a_run_of_its_own(cluster, tmp_path, capsys):
    small = ["corpus.samples=150", "corpus.shard_sequences=50", "tasks=[sort]"]
    assert main(arguments(tmp_path, "study=corpus", *small)) == 0

    (row,) = rows_of(read(tmp_path, "corpus", run="run-corpus"))
    assert (row["samples"], row["tasks"], row["ratio"]) == (50, 1, 0.5) and row["sd over seeds"] >= 0

    models = models_of(read(tmp_path, "corpus", run="run-corpus"))
    values = [models[f"sort.50.{seed}"]["quality"]["sort"]["value"] for seed in range(3)]
    assert row["mean acc"] == pytest.approx(sum(values) / 3)

    capsys.readouterr()
    assert main(arguments(tmp_path, "study=corpus", *small, "corpus.samples=90", "run.name=few")) == 2
    assert "corpus.samples: 90 in shards of 50" in capsys.readouterr().err


# --- resumed, failing, refused ---------------------------------------------------------------------------------------


def test_what_was_judged_once_is_read_back(finished, capsys):
    before = Run(finished / "run").study("table").read_text()
    capsys.readouterr()
    assert main(arguments(finished)) == 0
    said = capsys.readouterr().out
    assert "evaluating" not in said and "calibrating" not in said and "measuring" not in said
    assert Run(finished / "run").study("table").read_text() == before


def test_a_study_that_was_cut_short_judges_only_what_is_missing_in_cells_that_were_carried(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    carried = tmp_path / "carried"
    carried.mkdir()
    for cell in (tmp_path / "run" / "cells").glob("*-*.json"):
        if not cell.name.startswith("speed-"):  # of this machine, so the run's own
            cell.rename(carried / cell.name)
    cells = carried.glob("sort-*.json")
    for path in sorted(cells, key=lambda path: path.stat().st_mtime)[:3]:  # of the main job, so in every study
        path.write_text(path.read_text()[:40])  # torn
    capsys.readouterr()
    for study in ("table", "ratio", "pooling", "ood", "allocation"):
        more = ["pruning.ratio=[0.3, 0.5]"] if study == "ratio" else []
        with without_a_page():
            assert main(arguments(tmp_path, f"study={study}", f"evaluation.cells={carried}", *more)) == 0
        assert read(tmp_path, study)["rows"] == read(finished, study)["rows"]
    judged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluating") and " in " in line]

    assert sum(int(line.split()[1]) for line in judged) == 3


def test_cells_that_cannot_be_judged_say_why_and_cost_no_others(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    stranger = tmp_path / "stranger"
    shutil.copytree(ROOT / "seap_ray" / "demo" / "model", stranger)
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(stranger)
    torn = tmp_path / "torn"
    shutil.copytree(ROOT / "seap_ray" / "demo" / "model", torn)
    (torn / "config.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "2 1 =", "a": "1 2"}\n' * 60)
    lost = (
        f"{{name: lost, path: {rows}, question: '{{{{ q }}}}', answer: '{{{{ a }}}}', evaluation_path: {tmp_path}/no}}"
    )
    odd_rows = tmp_path / "odd.jsonl"
    odd_rows.write_text('{"other": "2 1 ="}\n' * 3)
    odd = lost.replace("name: lost", "name: odd").replace(f"{tmp_path}/no", str(odd_rows))
    models = f"evaluation.models={{stranger: {stranger}, torn: {torn}, gone: {tmp_path / 'nowhere'}}}"
    capsys.readouterr()

    with pytest.MonkeyPatch.context() as fewer:  # each method is planned again, for the mixture of four tasks
        fewer.setattr(table_study, "SCORED_METHODS", table_study.SCORED_METHODS[:1])
        assert main(arguments(tmp_path, f"tasks=[sort, logic, {lost}, {odd}]", models)) in (1, 2, 3)
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out

    table = models_of(read(tmp_path, "table"))
    errors = {name: table[name]["quality"]["sort"].get("error", "") for name in ("stranger", "torn", "gone")}
    assert "another tokenizer" in errors["stranger"]
    assert "model_type" in errors["torn"] and "no config.json" in errors["gone"]
    assert table["general"]["quality"]["lost"]["error"].startswith("tasks.lost: no file of split ")
    assert table["general"]["quality"]["odd"]["error"] == "tasks.odd: 'q' is undefined; the columns are other"

    before = models_of(read(finished, "table"))
    assert table["dense"]["quality"]["sort"] == before["dense"]["quality"]["sort"]
    assert table["sort"]["quality"]["logic"] == before["sort"]["quality"]["logic"]
    assert all(f"failed: {name} on" in out for name in ("stranger", "torn", "gone"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks=[sort, sortt]", "tasks.1.path: Field required; built-in tasks are"),
        ("study=tabel", "study: "),
        ("evaluation.cells=ftp://x", "evaluation.cells: ftp://x: unknown scheme ftp://; use"),
        ("evaluation.samples=0", "evaluation.samples: 0 leaves a study nothing to judge"),
        ("pruning={mlp_unit: expert}", "compares how channels are cut; set pruning.mlp_unit=channel"),
        ("tasks=[{name: piqa, lm_eval: piqua}]", "tasks.piqa.lm_eval: lm-eval has no task 'piqua'; near it are piqa"),
        (
            "tasks=[sort, {name: logic, path: 'demo:logik'}]",
            "tasks.logic: no demo:logik; there are demo:arithmetic, ",
        ),
        ("model.source=/no/such/folder", "model.source: "),
        ("pruning.baselines={sort: {}}", "pruning.baselines: sort is the name of another model of this run"),
        ("evaluation.models={sort: x}", "evaluation.models: sort is the name of another model of this run"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, capsys, override, said):
    assert main(arguments(tmp_path, override)) in (2, 3)
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


def test_a_failure_is_one_line_whatever_was_raised():
    assert Failure.of(ValueError("first\nsecond")).error == "ValueError: first"
    assert Failure.of(ValueError()).error == "ValueError: "


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data beside the repository")
def test_the_papers_recipe_runs_on_a_real_model_and_local_files(cluster, tmp_path):
    tasks = DATA / "tasks"
    local = {
        "winogrande": f"path: {tasks}/winogrande/winogrande_m_train_0000.parquet, evaluation_path: {tasks}/winogrande/"
        "winogrande_m_validation_0000.parquet",
        "piqa": f"path: {tasks}/piqa",
        "wikitext2": f"path: {tasks}/wikitext2/wiki_train_raw_first1MB.txt, evaluation_path: {tasks}/wikitext2/"
        "raw_test_0000.parquet",
    }
    listed = ", ".join(f"{{name: {name}, {more}}}" for name, more in local.items())
    small = ["corpus.samples=24", "evaluation.samples=6", "corpus.sequence_length=128", "pruning.ratio=0.5"]
    # The study's own score and compensation, which the tests' shared keys would go before.
    papers = ["pruning.score=wifv", "pruning.compensation=mean"]
    override = [f"model.source={DATA / 'models' / 'stories260k'}", f"tasks=[{listed}]", *small, *papers]

    assert main(arguments(tmp_path, "study=paper", *override)) == 0
    results = read(tmp_path, "paper", run="run-paper")
    rows = rows_of(results)
    tables = {row["table"] for row in rows}

    assert {"accuracy, Llama-2-7B", "allocation, Llama-2-13B", "speed, Llama-2-7B"} == tables
    for ours, paper, difference in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert (ours["whose"], paper["whose"], difference["whose"]) == ("ours", "paper", "difference")
        if ours["piqa"] is not None:
            assert difference["piqa"] == pytest.approx(ours["piqa"] - paper["piqa"])
    models = models_of(results)

    assert models["dense"]["quality"]["wikitext2"]["metric"] == "window_perplexity"
    assert results["tasks"]["piqa"] == {
        "metric": "acc_norm",
        "short": "acc_n",
        "judge": results["tasks"]["piqa"]["judge"],
        "n_rows": 1838,
        "counts": {},
    }
    assert results["tasks"]["piqa"]["judge"].startswith("lm-eval 0.4")
    assert Config.model_validate(json.loads(Run(tmp_path / "run-paper").config.read_text())).model.dtype == "auto"
