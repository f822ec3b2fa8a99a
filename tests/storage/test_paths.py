"""Paths: one type for disks and buckets; what is done with one is a method that both have."""

import math
import pickle
from pathlib import Path, PosixPath, PurePosixPath

import pytest

from seap_ray.errors import ConfigError
from seap_ray.storage.files import stage
from seap_ray.storage.paths import BucketPath, LocalPath, Status, StoragePath, inside, parse_path, storage_path


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path) -> StoragePath:
    return LocalPath(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket") / request.node.name


def write(folder: StoragePath, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def names_below(folder: StoragePath) -> list[str]:
    n_parts = 3  # deep enough for these tests
    found = [path for depth in range(1, n_parts + 1) for path in folder.glob("/".join("*" * depth))]
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def test_a_local_path_is_pathlibs_and_keeps_its_type():
    path = LocalPath("/a/b.txt")
    made = [
        *(path / "c", "/z" / path, path.parent, *path.parents, path.joinpath("g", "h"), path.relative_to("/a")),
        *(path.with_name("d"), path.with_suffix(".e"), path.with_stem("f"), path.absolute(), path.resolve()),
        *(LocalPath.cwd(), LocalPath.home(), LocalPath("~/i").expanduser(), LocalPath(path), LocalPath(Path("j"))),
        pickle.loads(pickle.dumps(path)),
    ]
    assert {type(each) for each in made} == {LocalPath}
    assert path == Path("/a/b.txt") and hash(path) == hash(Path("/a/b.txt")) and {path: 1}[Path("/a/b.txt")] == 1
    assert sorted([path, Path("/a/a")]) == [Path("/a/a"), path]


@pytest.mark.parametrize("name", ["../b", "a/../../b", "/etc/b", "..", 1, None])
def test_a_name_that_leads_out_of_its_folder_is_refused_with_what_names_it(name):
    for folder in (LocalPath("/runs/a"), BucketPath("s3://lab/a")):
        with pytest.raises(ConfigError, match="^seap.json: names the file .*, which does not lie in its folder$"):
            inside(folder, name, "seap.json")
        assert inside(folder, "b/c..d", "seap.json") == folder / "b/c..d"


def test_a_bucket_whose_names_lead_out_of_the_copy_is_not_copied(monkeypatch, tmp_path):
    run = BucketPath("s3://lab/run")
    monkeypatch.setenv("SEAP_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(BucketPath, "is_file", lambda self: False)
    monkeypatch.setattr(BucketPath, "below", lambda self: [(run / "a", Status(1, 1)), (run / "../../b", Status(1, 1))])
    monkeypatch.setattr(BucketPath, "download", lambda self, target: target.write_text("x"))
    for read in (run.stage, lambda: run.select_files(lambda folder: [])):
        with pytest.raises(ConfigError, match=r"^s3://lab/run: names the file '../../b', which does not lie"):
            read()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def test_what_a_folder_lists_keeps_its_type(tmp_path):
    write(LocalPath(tmp_path), "a/b.txt", "c.txt")
    folder = LocalPath(tmp_path)
    listed = [*folder.iterdir(), *folder.glob("*"), *folder.rglob("*.txt"), *folder.sorted_glob("*/*")]
    assert len(listed) == 7 and {type(path) for path in listed} == {LocalPath}


def test_both_have_the_same_operations():
    def operations(kind: type, base: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_") and name not in dir(base)}

    local = operations(LocalPath, PosixPath)
    bucket = operations(BucketPath, PurePosixPath)
    assert local and local <= bucket
    only_a_buckets = {"download", "upload", "below"}
    assert bucket - local - only_a_buckets <= {*dir(Path)}, "the rest are pathlib's own"


def test_any_path_becomes_one_of_the_two():
    assert type(storage_path(Path("a"))) is LocalPath and storage_path(Path("a")) == Path("a")
    assert type(storage_path(Path("~/a"))) is LocalPath and str(storage_path(Path("~/a"))) == "~/a", "no shell's text"
    bucket = BucketPath("s3://lab/a")
    assert type(storage_path(bucket)) is BucketPath and storage_path(bucket) == bucket
    assert type(parse_path("a")) is LocalPath and type(parse_path("gs://lab/a")) is BucketPath
    assert not LocalPath("a").is_remote and bucket.is_remote


def test_a_relative_storage_is_never_in_the_copy_that_ray_makes_for_a_job_and_drops(tmp_path, monkeypatch):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    for folder, root in ((tmp_path, tmp_path), (copy, Path.home())):
        monkeypatch.chdir(folder)
        assert LocalPath("runs").storage_root() == root / "runs"
        assert LocalPath("/mnt/runs").storage_root() == Path("/mnt/runs")
        assert BucketPath("s3://lab/runs").storage_root() == BucketPath("s3://lab/runs")


def test_a_plain_path_is_staged_as_itself(tmp_path):
    assert stage(tmp_path) == tmp_path and LocalPath(tmp_path).stage() == tmp_path


def test_a_file_and_a_folder_are_removed_with_what_is_below(folder):
    write(folder, "a/b", "a/c/d", "e", "ab")
    (folder / "a").remove()
    (folder / "e").remove()
    (folder / "none").remove()
    assert names_below(folder) == ["ab"]


def test_a_folder_takes_the_place_of_another(folder):
    write(folder, "new/a", "new/deep/b", "new/seap.json", "old/seap.json", "old/stale")
    (folder / "new").move_folder(folder / "old", last="seap.json")
    assert names_below(folder) == ["old/a", "old/deep/b", "old/seap.json"]
    assert (folder / "old" / "seap.json").read_bytes() == b"new/seap.json"


def test_bytes_below_a_folder_and_free_beside_it(folder):
    write(folder, "a", "deep/er/bc")
    assert folder.bytes_below() == len("a") + len("deep/er/bc")
    assert folder.free_bytes() == math.inf if folder.is_remote else 0 < folder.free_bytes() < math.inf


def test_a_pattern_gives_sorted_paths(folder):
    write(folder, "b.json", "a.json", "c.txt", "d/e.json")
    assert [path.name for path in folder.sorted_glob("*.json")] == ["a.json", "b.json"]
    assert [path.name for path in folder.sorted_glob("*/e.json")] == ["e.json"]


def test_files_are_selected_by_names_alone(folder):
    write(folder, "train-1.jsonl", "deep/train-0.jsonl", "test.jsonl")

    def choose(names: Path) -> list[Path]:
        return sorted(names.rglob("train*"))

    chosen = folder.select_files(choose)
    assert [str(path.relative_to(folder)) for path in chosen] == ["deep/train-0.jsonl", "train-1.jsonl"]
    assert {type(path) for path in chosen} == {type(folder)}
    assert chosen[0].read_bytes() == b"deep/train-0.jsonl", "names in, the files themselves out"
