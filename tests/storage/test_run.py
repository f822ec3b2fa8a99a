"""Run directories: files that are whole or not there, and a run that stays what it was made as."""

import errno
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from seap_ray.config import Config, load_config
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.storage.files import atomic_write, read_json, write_json
from seap_ray.storage.run import Run, fingerprint, ratio_name
from tests.support import ROOT


def listed(folder):
    """Names of everything below a folder, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_published_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename is atomic on one file system only"
        temporary.write_text("all of it")
    assert path.read_text() == "all of it"
    assert listed(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_nothing_and_is_passed_on(tmp_path, error):
    with pytest.raises(type(error)), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), SafetensorError("No space")],
)
def test_a_disk_that_fails_is_incomplete_work_and_the_old_file_stays(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(IncompleteError, match="same command again") as raised, atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert str(path) in str(raised.value)
    assert (getattr(error, "strerror", None) or "No space") in str(raised.value)
    assert raised.value.exit_code == 4
    assert path.read_text() == "old"
    assert listed(tmp_path) == ["file"]


def test_who_reads_while_a_file_is_replaced_reads_the_old_one_to_its_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_racing_writers_are_harmless(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert listed(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_incomplete_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "config.json", tmp_path / "file" / "below" / "config.json"):
        with pytest.raises(IncompleteError, match=r"config\.json: cannot be written"):
            write_json(path, {})
    assert listed(tmp_path) == ["file"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from seap_ray.errors import IncompleteError
from seap_ray.storage.files import write_json

folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_json(folder / "small.json", "fits")
try:
    write_json(folder / "large.json", "x" * 5000)
except IncompleteError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_write_that_the_disk_has_no_room_for_leaves_no_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (4, "")
    assert "large.json: cannot be written (File too large)" in done.stdout
    assert listed(tmp_path) == ["small.json"]


def test_json_comes_back_as_it_was(tmp_path):
    value = {"ratio": 0.1 + 0.2, "names": ["ä", "b\n"], "none": None}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


@pytest.mark.parametrize("contents", [None, b"", b'{"half": ', b"\xff\xfe\x00"])
def test_a_missing_or_torn_json_file_is_none(tmp_path, contents):
    if contents is not None:
        (tmp_path / "file.json").write_bytes(contents)
    assert read_json(tmp_path / "file.json") is None
    assert read_json(tmp_path / "file.json" / "below.json") is None


def test_fingerprints_are_equal_for_equal_values_alone():
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    different = [(1,), (1.5,), ("1",), (1, 2), ([1, 2],), ({"a": 1},), ({"a": 2},), ()]
    assert len({fingerprint(*parts) for parts in different}) == len(different)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "name"),
    [(0.5, "0.50"), (0.2, "0.20"), (0.125, "0.125"), (0.0, "0.00"), (0.35, "0.35"), (0.7001, "0.7001")],
)
def test_a_ratio_has_a_folder_name(ratio, name):
    assert ratio_name(ratio) == name


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_a_ratios_folder_name_is_its_own(ratio):
    assert float(ratio_name(ratio)) == ratio


def test_every_file_of_a_run_has_its_own_place(tmp_path):
    run = Run(tmp_path)
    paths = [run.config, run.cells, run.results]
    for task in ("sort", "logic"):
        paths += [run.shards(task), run.records(task), run.statistics(task)]
        paths += [path(ratio, task) for path in (run.plan, run.expert) for ratio in (0.2, 0.5)]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)


# --- one run, one corpus and model -----------------------------------------------------------------------------------


@pytest.fixture
def claimed(tmp_path):
    """Load a config of a run that has shards of ``sort`` and statistics of ``logic``, with other settings on top."""
    (tmp_path / "config.yaml").write_text(f"run: {{storage: {tmp_path}/runs}}\ntasks: [sort, logic]")

    def load(*arguments):
        return load_config([f"config={tmp_path}/config.yaml", *arguments])

    config = load()
    run = Run.of(config)
    run.claim(config)
    write_json(run.shards("sort") / "manifest.json", {})
    run.statistics("logic").parent.mkdir(parents=True)
    run.statistics("logic").touch()
    return load


def test_a_claim_writes_the_resolved_config(claimed):
    config = claimed()
    stored = json.loads(Run.of(config).config.read_text())
    assert Config.model_validate(stored) == config
    assert stored["calibration"]["batch_tokens"] == config.calibration.batch_tokens, "defaults included"


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("model.source=other/model", "model.source=demo, not other/model"),
        ("model.revision=abc", "model.revision=None, not abc"),
        ("model.dtype=bfloat16", "model.dtype=auto, not bfloat16"),
        ("run.seed=1", "run.seed=0, not 1"),
        ("corpus.samples=7", "corpus.samples=200, not 7"),
        ("corpus.packing=pack", "corpus.packing=bucket, not pack"),
        ("calibration.skip_first_token=true", "calibration.skip_first_token=False, not True"),
        ("tasks=[{name: sort, path: /elsewhere}, logic]", "tasks.sort.path=demo:sort, not /elsewhere"),
    ],
)
def test_another_model_corpus_or_seed_is_refused_by_its_field(claimed, argument, field):
    config = claimed(argument)
    before = Run.of(config).config.read_bytes()
    with pytest.raises(ConfigError) as error:
        Run.of(config).claim(config)
    assert field in str(error.value) and "choose another run.name" in str(error.value)
    assert Run.of(config).config.read_bytes() == before


@pytest.mark.parametrize(
    "argument",
    [
        "pruning.ratio=0.35",
        "pruning.score=energy",
        "pruning.allocation.kind=global",
        "calibration.workers=2",
        "calibration.batch_tokens=100",
        "evaluation.samples=5",
        "tasks=[sort, logic, prose]",
        "tasks=[logic]",
        "tasks=[logic, sort]",
        "tasks=[facts]",
    ],
)
def test_another_plan_more_tasks_and_fewer_are_the_same_run(claimed, argument):
    config = claimed(argument)
    Run.of(config).claim(config)
    assert Config.model_validate(read_json(Run.of(config).config)) == config


def test_a_run_of_an_older_version_goes_on_where_that_did_not_know_a_key(claimed):
    config = claimed()
    run = Run.of(config)
    made_with = read_json(run.config)
    del made_with["corpus"]["chat"], made_with["tasks"][0]["held_out"]
    write_json(run.config, made_with)
    run.claim(config)
    assert Config.model_validate(read_json(run.config)) == config

    write_json(run.config, {**made_with, "corpus": {**made_with["corpus"], "samples": 7}})
    with pytest.raises(ConfigError, match="corpus.samples=7, not 200"):
        run.claim(config)


def test_a_run_that_has_made_nothing_keeps_no_keys(claimed):
    """A first attempt that failed binds nothing; what is there of a task binds that task and what all share."""
    run = Run.of(claimed())
    other = claimed(
        "run.seed=1", "model.source=other/model", "corpus.samples=7", "tasks=[{name: sort, path: /x}, logic]"
    )
    (run.shards("sort") / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="corpus.samples=200, not 7"):
        run.claim(other)

    # The failed task alone may be another one now.
    run.claim(claimed("tasks=[{name: sort, path: /x}, logic]"))
    with pytest.raises(ConfigError, match="tasks.logic.path"):
        run.claim(claimed("tasks=[sort, {name: logic, path: /x}]"))

    run.statistics("logic").unlink()
    (run.shards("logic")).mkdir(parents=True)
    (run.shards("logic") / "00000.parquet").touch()
    run.claim(other)
    assert Config.model_validate(read_json(run.config)) == other


def test_another_name_is_another_run(claimed):
    config = claimed("run.name=other", "run.seed=1")
    Run.of(config).claim(config)
    assert Run.of(config).root != Run.of(claimed()).root


def test_what_is_published_is_as_readable_as_any_other_file(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "published") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "published").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- one job at a time -----------------------------------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from seap_ray.storage.run import Run\n"
HOLD += "with Run(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"


def test_a_run_that_a_job_works_on_is_refused_to_another_until_that_ends_however_it_ends(tmp_path):
    run = Run(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.root], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"a job works on this run \(.*process {other.pid}\); wait"),
            run.locked(),
        ):
            raise AssertionError("two at once")
        other.kill()
        other.wait(30)
        with run.locked():
            pass
    finally:
        other.kill()
    with run.locked(), Run(tmp_path / "another").locked():
        pass


def test_a_run_where_nothing_can_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IncompleteError, match="cannot be written"), Run(tmp_path / "file" / "run").locked():
        pass
