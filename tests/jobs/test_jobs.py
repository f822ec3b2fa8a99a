"""Jobs as files: help at once, one line for what is wrong, names that hide no module."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest

from tests.support import ROOT

JOBS = sorted((ROOT / "jobs").glob("*.py"))
HEAVY = {"torch", "ray", "transformers", "vllm", "datasets", "pyarrow", "numpy"}
RUN_AND_LIST_MODULES = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""
each_job = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def ended(job, *arguments):
    """Exit code and output of a job, and the heavy packages that it has imported by its end."""
    done = run("-c", RUN_AND_LIST_MODULES, job, *arguments)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, done, HEAVY & set(modules)


def test_there_are_jobs():
    assert "prune" in {job.stem for job in JOBS}


@each_job
def test_help_is_answered_without_a_heavy_import(job):
    for flag in ("--help", "-h"):
        code, done, heavy = ended(job, flag)
        assert (code, heavy) == (0, set())
        assert f"python jobs/{job.name}" in done.stdout and "pruning.ratio" in done.stdout
        assert done.stderr == ""


@each_job
def test_help_is_answered_at_once(job):
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert run(job, "--help").returncode == 0
        seconds.append(time.monotonic() - start)
        if seconds[-1] < 1:
            break
    assert min(seconds) < 3, "a second on an idle machine; the imports are counted above"


@each_job
def test_a_wrong_key_is_one_line_before_any_heavy_import(job):
    code, done, heavy = ended(job, "config=ray_config.yaml", "pruning.ratoi=0.3")
    assert (code, heavy) == (2, set())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "did you mean pruning.ratio?" in done.stderr
    assert len(done.stdout.splitlines()) == 1, "nothing but the list of modules"


@each_job
def test_a_jobs_docstring_begins_with_its_command(job):
    assert job.read_text().startswith(f'"""python jobs/{job.name}')


@each_job
def test_a_jobs_name_hides_no_module(job):
    # Python puts the folder of the file that it runs before all others.
    assert job.stem not in sys.stdlib_module_names
    assert importlib.util.find_spec(job.stem) is None
