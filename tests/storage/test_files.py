"""Storage on a real S3 server on this machine (moto's, over HTTP), and the main job with all of its files there."""

import json
import os
import pickle
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from seap_ray.errors import ConfigError, DataError, IncompleteError
from seap_ray.models import model_sources
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import check_source
from seap_ray.models.model_sources import parse_model_source
from seap_ray.models.records import is_whole, save_tensors
from seap_ray.models.row_sources import RowFiles, calibration_rows
from seap_ray.storage import lock as lock_module
from seap_ray.storage import paths as paths_module
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.files import atomic_write, read_json, stage, write_json
from seap_ray.storage.lock import lock
from seap_ray.storage.paths import BucketPath, parse_path
from tests.support import ROOT
from tests.support.builders import task

main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]


def upload(folder: Path, to: BucketPath) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (to / file.relative_to(folder)).upload(file)


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_path_in_a_bucket_is_told_by_its_scheme_and_has_pathlibs_algebra():
    path = parse_path("s3://lab/runs") / "demo" / "statistics.safetensors"
    assert isinstance(path, BucketPath) and str(path) == "s3://lab/runs/demo/statistics.safetensors"
    assert str(path.with_suffix(".covariances")) == "s3://lab/runs/demo/statistics.covariances"
    assert path.parent.name == "demo" and str(path.parent.with_name("other")) == "s3://lab/runs/other"
    assert pickle.loads(pickle.dumps(path)) == path and len({path, parse_path(str(path))}) == 1
    assert isinstance(parse_path("gs://lab/runs"), BucketPath) and parse_path("~/runs") == Path.home() / "runs"
    with pytest.raises(TypeError, match="no local file"):
        open(path)  # type: ignore[call-overload]  # noqa: SIM115


def test_a_file_in_a_bucket_is_there_once_it_is_whole(bucket):
    path = bucket / "a" / "file.txt"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert not path.exists() and read_json(path) is None
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.is_file() and path.read_text() == "whole" and path.stat().st_size == 5
    assert bucket.is_dir() and not bucket.is_file() and bucket.bytes_below() == 5
    assert digest_of_file(path) == f"blake3:{blake3(b'whole').hexdigest()}"
    assert not list(paths_module.cache_folder().glob(".*.tmp")), "nothing stays on this machine"
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        path.stat()


def test_patterns_match_part_by_part(bucket):
    for name in ("experts/0.50/a/seap.json", "experts/0.50/b/config.json", "experts/0.20/a/seap.json"):
        write_json(bucket / name, {})
    assert [str(path.relative_to(bucket)) for path in bucket.glob("experts/*/a/seap.json")] == [
        "experts/0.20/a/seap.json",
        "experts/0.50/a/seap.json",
    ]
    assert [path.name for path in (bucket / "experts").glob("*")] == ["0.20", "0.50"]
    assert not list(bucket.glob("*.json")) and not list((bucket / "none").glob("*"))


def test_a_folder_takes_the_place_of_another_and_its_manifest_comes_last(bucket, monkeypatch):
    new, old, order = bucket / ".new", bucket / "a", []
    for name in ("seap.json", "z.bin", "a.bin"):
        write_json(new / name, "new")
    write_json(old / "seap.json", "old")
    write_json(old / "stale.bin", "old")
    rename = BucketPath.rename
    monkeypatch.setattr(BucketPath, "rename", lambda self, to: (order.append(self.name), rename(self, to)))
    new.move_folder(old, last="seap.json")
    assert order == ["a.bin", "z.bin", "seap.json"]
    assert [path.name for path, _ in old.below()] == ["a.bin", "seap.json", "z.bin"] and not new.below()
    assert {read_json(path) for path, _ in old.below()} == {"new"}
    old.remove()
    assert not old.below()


@pytest.mark.parametrize(
    "text, said",
    [
        ("s3://", "names no bucket; write s3://BUCKET/FOLDER"),
        ("s3://My Bucket/x", "names no bucket"),
        ("gcs://lab/x", "unknown scheme gcs://; use s3:// or gs://"),
    ],
)
def test_what_names_no_bucket_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_path(text)


def test_storage_that_does_not_answer_has_damaged_nothing(bucket, monkeypatch):
    save_tensors(bucket / "record.safetensors", {"x": torch.ones(3)}, task="t")
    assert is_whole(bucket / "record.safetensors", task="t")
    monkeypatch.setenv("SEAP_RAY_CACHE", str(paths_module.cache_folder() / "empty"))

    def fail(_path: BucketPath, _target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(BucketPath, "download", fail)
    with pytest.raises(IncompleteError, match="record.safetensors: cannot be read .No space left"):
        is_whole(bucket / "record.safetensors", task="t")
    assert not is_whole(bucket / "none.safetensors")
    monkeypatch.setattr(BucketPath, "read_text", lambda _path: fail(_path, Path()))
    with pytest.raises(IncompleteError, match="cannot be read"):
        read_json(bucket / "record.json")


# --- a node's copies -------------------------------------------------------------------------------------------------


def test_a_copy_is_made_once_and_again_where_the_bucket_has_something_newer(bucket, tmp_path):
    path = bucket / "file.txt"
    path.write_bytes(b"first")
    first = stage(path)
    assert first.read_text() == "first" and stage(path) == first and stage(tmp_path) == tmp_path
    path.write_bytes(b"second")
    assert stage(path).read_text() == "second"
    with pytest.raises(FileNotFoundError, match="none"):
        stage(bucket / "none")


def test_of_many_processes_that_want_a_model_one_copies_it(bucket, dense, environment, monkeypatch):
    upload(dense("llama_gqa"), bucket)
    (bucket / "pytorch_model.bin").write_bytes(b"a pickle")
    code = "import sys; from seap_ray.models.checkpoint import Checkpoint; print(Checkpoint.open(sys.argv[1]).folder)"
    start = [sys.executable, "-c", code, str(bucket)]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: subprocess.check_output(start, cwd=ROOT, text=True).strip(), range(4))]
    (folder,) = {Path(line) for line in found}
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and "pytorch_model.bin" not in names
    monkeypatch.setattr(paths_module, "_copy", lambda *_: pytest.fail("copied twice"))
    assert Checkpoint.open(str(bucket)).fingerprint == Checkpoint.open(str(dense("llama_gqa"))).fingerprint


def test_pickled_weights_and_gguf_files_are_copied_where_a_bucket_has_no_others(bucket):
    for name in ("config.json", "pytorch_model.bin", "notes.bin", "model.Q8_0.gguf"):
        (bucket / name).write_bytes(b"{}")
    folder = parse_model_source(str(bucket)).fetch()
    assert {file.name for file in folder.iterdir()} == {"config.json", "pytorch_model.bin", "model.Q8_0.gguf"}
    copy = parse_model_source(str(bucket / "model.Q8_0.gguf")).fetch()
    assert copy.name == "model.Q8_0.gguf" and copy.read_bytes() == b"{}"
    with pytest.raises(ConfigError, match="none.gguf is not there"):
        parse_model_source(str(bucket / "none.gguf")).fetch()


def test_a_copy_that_was_cut_short_is_made_again(bucket, dense, monkeypatch):
    upload(dense("llama_mha"), bucket)
    download, seen = BucketPath.download, []

    def fail_at_weights(path: BucketPath, target: Path) -> None:
        seen.append(path.name)
        if path.suffix == ".safetensors":
            target.write_bytes(b"half")
            raise OSError("the connection is gone")
        download(path, target)

    monkeypatch.setattr(BucketPath, "download", fail_at_weights)
    with pytest.raises(ConfigError, match=r"model.source: s3://lab/\w+ cannot be copied .*the connection is gone"):
        Checkpoint.open(str(bucket))
    assert "model.safetensors" in seen
    monkeypatch.setattr(BucketPath, "download", download)
    assert Checkpoint.open(str(bucket)).fingerprint == Checkpoint.open(str(dense("llama_mha"))).fingerprint


def test_a_checkpoint_travels_as_its_name_and_is_read_where_it_arrives(bucket, dense, monkeypatch, tmp_path):
    upload(dense("qwen2"), bucket)
    base = Checkpoint.open(str(bucket))
    parcel = pickle.dumps(base)
    monkeypatch.setenv("SEAP_RAY_CACHE", str(tmp_path / "another node"))
    there = pickle.loads(parcel)
    assert there.folder.is_relative_to(tmp_path) and there.fingerprint == base.fingerprint
    local, built_in = Checkpoint.open(str(dense("qwen2"))), Checkpoint.open("demo")
    assert there.source.is_copied and not local.source.is_copied and not built_in.source.is_copied
    assert len(parcel) < 500, "no weights' places, which differ from node to node"


def test_a_hubs_model_is_asked_for_on_the_node_that_it_arrives_at(dense, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(source, **_):
        asked.append(source)
        return str(dense("llama_tied"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model_sources._download.cache_clear()
    parcel = pickle.dumps(Checkpoint.open("lab/model", "main"))
    model_sources._download.cache_clear()  # another process
    assert [pickle.loads(parcel).source.is_copied for _ in range(2)] == [True, True] and asked == ["lab/model"] * 2
    model_sources._download.cache_clear()


@pytest.mark.parametrize("source, said", [("s3://lab/nothing", "holds no model"), ("s3://none/x", "NO_SUCH_BUCKET|no")])
def test_a_model_that_is_not_there_is_told(environment, source, said):
    with pytest.raises(ConfigError, match=rf"model.source: {source} .*({said})"):
        Checkpoint.open(source)


# --- corpora ---------------------------------------------------------------------------------------------------------


def test_corpora_in_a_bucket_are_a_file_a_pattern_or_a_folder_with_splits(bucket):
    for name in ("train-0.jsonl", "train-1.jsonl", "validation.jsonl", "README.md"):
        (bucket / "data" / name).write_bytes(b'{"text": "a"}\n')
    folder = str(bucket / "data")
    found = {
        (path, split): [file.name for file in RowFiles("mine", path, split).files()]
        for path, split in [
            (folder, "train"),
            (folder, "validation"),
            (f"{folder}/train-*.jsonl", "train"),
            (f"{folder}/train-1.jsonl", "validation"),
        ]
    }
    both = ["train-0.jsonl", "train-1.jsonl"]
    assert [*found.values()] == [both, ["validation.jsonl"], both, ["train-1.jsonl"]]
    assert isinstance(calibration_rows(task(folder)), RowFiles)
    check_source(task(folder), official=False)
    with pytest.raises(DataError, match="tasks.mine: no file of split 'test' under s3://lab"):
        RowFiles("mine", folder, "test").files()


# --- one job at a time -----------------------------------------------------------------------------------------------

HOLD = "import sys, time; from seap_ray.storage import lock; from seap_ray.storage.paths import parse_path\n"
HOLD += "lock.HEARTBEAT_S, lock.SETTLE_S = 0.3, 0.3\n"
HOLD += "with lock.lock(parse_path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_run_in_a_bucket_is_refused_to_a_second_job_and_free_when_the_first_is_killed(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.3)
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.3)
    start = [sys.executable, "-c", HOLD, str(bucket)]
    other = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"works on this run \(.*process {other.pid}\); wait"), lock(bucket):
            raise AssertionError("two at once")
        other.kill()
        other.wait(30)
        with lock(bucket):
            assert "seeing whether it still is" in capsys.readouterr().out
    finally:
        other.kill()
    with lock(bucket):
        assert not capsys.readouterr().out, "who ends well leaves no mark"


def test_of_two_jobs_that_come_at_once_one_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(lock_module, "SETTLE_S", 1.0)

    def attempt(_: int) -> str:
        try:
            with lock(bucket):
                time.sleep(2)
                return "held"
        except ConfigError:
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, range(2))) == ["held", "refused"]


def test_a_job_that_lost_its_mark_leaves_that_of_another(bucket, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lock_module, "SETTLE_S", 0.1)
    with lock(bucket):
        (bucket / ".lock").write_bytes(b"another, process 1, 0123")
        time.sleep(0.6)
    assert (bucket / ".lock").read_text() == "another, process 1, 0123"


def test_a_bucket_that_cannot_be_written_is_told(environment):
    with (
        pytest.raises(IncompleteError, match="s3://none/run/.lock: cannot be written"),
        lock(parse_path("s3://none/run")),
    ):
        pass


# --- the main job ----------------------------------------------------------------------------------------------------


TWICE = """
import runpy, sys
main = runpy.run_path("jobs/prune.py")["main"]
assert main(sys.argv[1:]) == 0
print("once", flush=True)
sys.stdin.readline()
assert main(sys.argv[1:]) == 0
"""


@contextmanager
def between_two_jobs(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """Run a job, yield what it printed, and run it again: in one process, whose workers have imported all by then."""
    with log.open("w") as out:
        command = [sys.executable, "-c", TWICE, *arguments]
        jobs = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out)
    try:
        while not log.read_text().endswith("once\n"):
            assert jobs.poll() is None, log.read_text()
            time.sleep(0.1)
        yield log.read_text()
        jobs.communicate(b"again\n")
        assert jobs.returncode == 0, log.read_text()
    finally:
        jobs.kill()
        jobs.wait()


@pytest.mark.ray
def test_a_job_with_model_corpora_and_run_in_a_bucket_gives_the_bytes_of_one_on_a_disk(
    cluster, bucket, environment, tmp_path
):
    """The first in a process and a cluster of its own, whose workers have the variables from their start."""
    upload(Checkpoint.open("demo").folder, bucket / "model")
    rows = [{"question": f"{i} plus {i} is", "answer": str(2 * i)} for i in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for folder in (tmp_path / "corpus", bucket / "corpus"):
        for split in ("train", "validation"):
            with atomic_write(folder / f"{split}.jsonl") as temporary:
                temporary.write_text(lines)

    def arguments(root: BucketPath | Path, model: str) -> list[str]:
        templates = "question: '{{ question }}', answer: '{{ answer }}', metric: exact_match"
        return [
            f"config={ROOT / 'ray_config.yaml'}",
            f"run.storage={root}/runs",
            "run.name=run",
            f"model.source={model}",
            f"tasks=[{{name: sums, path: {root}/corpus, {templates}}}]",
            "corpus.samples=24",
            "corpus.shard_sequences=8",
            "calibration.workers=1",
            "evaluation.samples=8",
            "pruning.ratio=0.5",
            "pruning.score=wifv",
            "pruning.compensation=least_squares",
            "pruning.held_out_tokens=64",
            "pruning.baselines={}",
        ]

    variables = {**os.environ, **environment, "RAY_ADDRESS": "local"}
    with between_two_jobs(arguments(bucket, str(bucket / "model")), variables, tmp_path / "log") as output:
        assert f"{bucket}/runs/run is complete" in output and f"{bucket}/runs/run/report.html" in output
        assert main([*arguments(tmp_path, "demo"), "evaluation.samples=0"]) == 0  # results are not compared
        kinds = ("statistics", "divergences", "plans", "experts", "shards")
        local = {
            str(file.relative_to(tmp_path / "runs" / "run")): digest_of_file(file)
            for kind in kinds
            for file in (tmp_path / "runs" / "run" / kind).rglob("*")
            if file.suffix in (".safetensors", ".parquet") or (kind == "divergences" and file.is_file())
        }
        there = {
            str(file.relative_to(bucket / "runs" / "run")): digest_of_file(file)
            for kind in kinds
            for file, _ in (bucket / "runs" / "run" / kind).below()
            if file.suffix in (".safetensors", ".parquet") or kind == "divergences"
        }
        assert there == local and len(local) > 10
        record = next((bucket / "runs" / "run" / "records").glob("*/*.safetensors"))
        before = {str(file): status for file, status in (bucket / "runs").below()}
        record.write_bytes(b"damaged")
        (bucket / "runs" / "run" / "statistics" / "sums.safetensors").unlink()
    after = {str(file): status for file, status in (bucket / "runs").below()}
    assert {name: status.st_size for name, status in before.items()} == {n: s.st_size for n, s in after.items()}
    kept = {name for name in before if before[name] == after[name]}
    assert any("experts" in name and name.endswith(".safetensors") for name in kept), "what is whole stays"
    assert str(record) not in kept
