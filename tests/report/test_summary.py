"""jobs/report.py: the tables of a run, what differs between two, the page."""

import runpy

import pytest

from tests.support import ROOT
from tests.support.made_run import RATIOS, TASKS, edit, make_run

main = runpy.run_path(str(ROOT / "jobs" / "report.py"))["main"]


@pytest.fixture
def storage(tmp_path):
    make_run(tmp_path / "a", studies=("table", "routing"))
    return tmp_path


def report(storage, *words):
    return main([*words, f"config={ROOT / 'ray_config.yaml'}", f"run.storage={storage}"])


def test_a_run_by_name_or_folder_has_its_tables_printed_and_its_page_written(storage, capsys):
    assert report(storage, "a") == 0
    by_name = capsys.readouterr().out
    assert report(storage, str(storage / "a")) == 0
    assert capsys.readouterr().out == by_name
    questions = ("All methods: Which method keeps the most quality at equal size?", "Routing: What do the router's")
    for head in ("mean acc", *questions):
        assert head in by_name
    assert by_name.rstrip().endswith("report.html") and (storage / "a" / "report.html").is_file()
    assert {"quality", "transfer", "router"} <= {path.stem for path in (storage / "a" / "pictures").glob("*.svg")}
    assert all(by_name.count(f"\n{task} ") >= 2 * len(RATIOS) for task in TASKS)  # in two tables, at every ratio


def test_without_a_name_it_is_the_run_of_the_config(storage, capsys):
    assert report(storage, "run.name=a") == 0
    assert "mean acc" in capsys.readouterr().out


def test_two_runs_differ_in_keys_and_in_models_that_both_have(storage, capsys):
    make_run(storage / "b")

    def worse(results):
        results["config"]["run"]["seed"] = 3
        general = next(m for m in results["models"] if (m["name"], m["ratio"]) == ("general", 0.2))
        for cell in general["quality"].values():
            cell["value"] -= 0.25

    edit(storage / "b" / "results.json", worse)
    assert report(storage, "compare", "a", "b") == 0
    out = capsys.readouterr().out
    assert "run.seed: 0 -> 3" in out and out.count(" -> ") == 1
    rows = {tuple(line.split()[:2]): line.split() for line in out.splitlines() if line.count("0.") > 3}
    assert rows["general", "0.200"][-2] == "-0.250" and rows["sort", "0.200"][-2] == "0.000"
    assert rows["general", "0.200"][-1] == f"{0.02 * 2**0.5 / 3**0.5:.3f}"  # both errors, each over three tasks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere: no run with results at "),
        (("compare", "a"), "compare: name two runs"),
        (("compare", "a", "nowhere"), "nowhere: no run with results at "),
        (("a", "run.nam=a"), "run.nam: unknown key"),
    ],
)
def test_what_is_not_there_is_one_line(storage, capsys, words, message):
    assert report(storage, *words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
