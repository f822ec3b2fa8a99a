"""The command `seap-ray`: its verbs are the jobs, help is light, and what is wrong is one line."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version

import pytest

from seap_ray.cli import VERBS, main, run_verb
from seap_ray.errors import ConfigError, IncompleteError
from tests.support import ROOT

HEAVY = {"torch", "ray", "transformers", "vllm", "datasets", "pyarrow", "numpy"}
MAIN_AND_LIST_MODULES = """
import json, sys
from seap_ray.cli import main
code = main()
print(json.dumps([code, sorted(sys.modules)]))
"""
WITHOUT_BENCHMARKS = """
import sys
sys.modules["benchmarks"] = None
from seap_ray.cli import main
sys.exit(main())
"""
each_verb = pytest.mark.parametrize("verb", VERBS)


def run(code, *arguments, folder=ROOT):
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # so that another folder finds the package, too
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def ended(*arguments):
    """Exit code, output without the last line, and the heavy packages that were imported."""
    done = run(MAIN_AND_LIST_MODULES, *arguments)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    return code, "\n".join(lines), done.stderr, HEAVY & set(modules)


def test_the_verbs_are_the_jobs():
    assert {*VERBS} == {path.stem for path in (ROOT / "jobs").glob("*.py")}


def test_the_command_is_installed_with_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"seap-ray": "seap_ray.cli:main"}
    (script,) = entry_points(group="console_scripts", name="seap-ray") or [None]
    assert script is None or script.load() is main, "an installation may be older than this test"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_with_a_line(arguments):
    code, text, errors, heavy = ended(*arguments)
    assert (code, errors, heavy) == (0, "", set())
    for name, verb in VERBS.items():
        assert any(line.split() == [name, *verb.summary.split()] for line in text.splitlines())


@each_verb
def test_a_verbs_help_names_both_forms_what_goes_in_and_out_an_example_and_every_key(verb):
    code, text, errors, heavy = ended(verb, "--help")
    assert (code, errors, heavy) == (0, "", set())
    lines = text.splitlines()
    assert lines[0].startswith(f"seap-ray {verb} ") and any(line.startswith(f"python jobs/{verb}.py") for line in lines)
    for word in ("In:   ", "Out:  ", "Example", "Exit codes: 0 ", "  pruning.ratio = ", "Built-in tasks: "):
        assert any(line.startswith(word) for line in lines), word


@each_verb
def test_a_verb_says_in_its_help_what_its_job_says(verb):
    done = subprocess.run(
        [sys.executable, f"jobs/{verb}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.rstrip("\n") == ended(verb, "-h")[1]


def test_a_verb_that_is_not_there_is_one_line_with_the_nearest():
    code, text, errors, heavy = ended("prun", "pruning.ratio=0.3")
    assert (code, text, heavy) == (2, "", set())
    assert errors == "error: seap-ray has no verb 'prun'; did you mean prune?\n"
    _, _, errors, _ = ended("xyzzy")
    assert errors == f"error: seap-ray has no verb 'xyzzy'; known are {', '.join(VERBS)}\n"


def test_an_empty_folder_has_help_and_the_demos_settings(tmp_path):
    command = "import sys; from seap_ray.cli import main; sys.exit(main())"
    done = run(command, "prune", "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "  pruning.ratio = " in done.stdout
    done = run(command, "report", folder=tmp_path)
    note, error = done.stderr.splitlines()
    assert note.startswith("there is no ray_config.yaml here: the demo's settings hold")
    assert done.returncode == ConfigError.exit_code and error.startswith("error: ") and "demo" in error, (
        "the run's name"
    )


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"seap-ray {version('seap-ray')}\n"


@each_verb
def test_a_wrong_key_is_one_line_before_any_heavy_import(verb):
    code, text, errors, heavy = ended(verb, "config=ray_config.yaml", "pruning.ratoi=0.3")
    assert (code, text, heavy) == (2, "", set())
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "did you mean pruning.ratio?" in errors


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if not verb.takes_words])
def test_a_word_is_refused_where_none_is_taken(verb, capsys):
    assert main([verb, "word"]) == 2
    assert capsys.readouterr().err.startswith("error: 'word' is not an override; write dotted.key=value")


@pytest.mark.parametrize("verb", ["report", "bench"])
def test_an_option_that_is_not_known_is_refused(verb, capsys):
    assert main([verb, "--fast"]) == 2
    assert "'--fast' is not an override" in capsys.readouterr().err


def test_words_and_keys_come_apart_whatever_their_order(monkeypatch):
    seen = []
    verb = VERBS["report"]
    monkeypatch.setitem(VERBS, "report", type(verb)(verb.summary, verb.usage, seen.append, takes_words=True))
    assert run_verb("report", ["a", f"config={ROOT / 'ray_config.yaml'}", "b", "run.name=other"]) == 0
    (request,) = seen
    assert [*request.words] == ["a", "b"] and [*request.overrides][1:] == ["run.name=other"]
    assert request.config.run.name == "other"


def test_compare_takes_two_runs(capsys):
    assert main(["report", "compare", "a", f"config={ROOT / 'ray_config.yaml'}"]) == 2
    assert capsys.readouterr().err == "error: compare: name two runs: seap-ray report compare RUN_A RUN_B\n"


@pytest.mark.parametrize(
    "verb, code", [("prune", 4), ("eval", 4), ("bench", 4), ("deploy", 0), ("report", 0), ("doctor", 0)]
)
def test_who_is_stopped_says_so_and_ends_with_its_code(verb, code, monkeypatch, capsys):
    def stop(_request):
        raise KeyboardInterrupt

    entry = VERBS[verb]
    monkeypatch.setitem(
        VERBS,
        verb,
        type(entry)(entry.summary, entry.usage, stop, entry.takes_words, entry.stopped, entry.stopped_code),
    )
    assert main([verb, f"config={ROOT / 'ray_config.yaml'}"]) == code
    assert capsys.readouterr().err == entry.stopped + "\n" and entry.stopped.startswith("stopped")
    assert code in (0, IncompleteError.exit_code)


def test_benchmarks_without_a_clone_are_one_line():
    done = run(WITHOUT_BENCHMARKS, "bench", "config=ray_config.yaml")
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("error: bench: benchmarks are no part of the installed package; clone")
    assert done.stderr.count("\n") == 1


def test_the_wheel_has_the_service_and_the_types_but_no_benchmarks():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["seap_ray", "serve"]
    assert (ROOT / "seap_ray" / "py.typed").is_file() and (ROOT / "serve" / "app.py").is_file()
