"""Artifacts: what is whole is read, and what is missing, torn, damaged or of other inputs is built again, once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from seap_ray.errors import IncompleteError
from seap_ray.storage.artifact import Artifact, ChecksummedFile, JsonFile, ManifestFolder, checksum_path
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.files import atomic_write, read_json, write_json
from seap_ray.storage.paths import BucketPath, LocalPath, StoragePath

FILES = {"a.bin": b"some bytes", "b.bin": b"other bytes"}
FOLDER = ManifestFolder(
    "manifest.json",
    digests=lambda manifest: {name: about["digest"] for name, about in manifest["files"].items()},
    sizes=lambda manifest: {name: about["bytes"] for name, about in manifest["files"].items()},
)


def write_file(path: StoragePath, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_folder(path: StoragePath, key: str) -> None:
    for name, content in FILES.items():
        write_file(path / name, content)
    files = {name: {"digest": digest_of_file(path / name), "bytes": len(c)} for name, c in FILES.items()}
    write_json(path / "manifest.json", {"fingerprint": key, "files": files})


def write_checksummed(path: StoragePath, _key: str) -> None:
    write_file(path, FILES["a.bin"])
    ChecksummedFile().save_checksum(path, digest_of_file(path))


@dataclass
class Kind:
    """A format, how an artifact of it is written, and the file whose bytes are its content."""

    format: Any
    write: Callable[[StoragePath, str], None]
    file: Callable[[StoragePath], StoragePath] = field(default=lambda path: path)


KINDS = {
    "json": Kind(JsonFile(), lambda path, key: write_json(path, {"fingerprint": key, "value": 1})),
    "manifest": Kind(FOLDER, write_folder, lambda path: path / "b.bin"),
    "checksum": Kind(ChecksummedFile(), write_checksummed),
}


class Maker:
    """An artifact of one kind, and how many times it was built."""

    def __init__(self, kind: Kind, path: StoragePath, key: str = "k") -> None:
        self.artifact = Artifact(path, key, kind.format)
        self.content = kind.file(path)
        self._write = kind.write
        self.builds = 0

    def get(self) -> Any:
        return self.artifact.get(self._build)

    def _build(self) -> None:
        self.builds += 1
        self._write(self.artifact.path, self.artifact.key)


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path) -> StoragePath:
    return LocalPath(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket") / request.node.name


def damage(path: StoragePath) -> None:
    """Change one byte; neither the size nor anything else tells."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_whole_is_read_and_not_built_again(kind, folder):
    maker = Maker(kind, folder / "artifact")
    assert not maker.artifact.is_made()
    first = maker.get()
    assert maker.builds == 1 and maker.artifact.is_made()
    assert maker.get() == maker.artifact.load() == first and maker.builds == 1
    again = Maker(kind, folder / "artifact")
    assert again.get() == first and again.builds == 0, "another process reads it too"


@pytest.mark.parametrize("kind", [KINDS["manifest"], KINDS["checksum"]], ids=["manifest", "checksum"])
@pytest.mark.parametrize("harm", [damage, lambda path: path.unlink(), lambda path: path.write_bytes(b"so")])
def test_content_that_is_damaged_missing_or_cut_short_is_built_again(kind, harm, folder):
    maker = Maker(kind, folder / "artifact")
    expected = maker.get()
    harm(maker.content)
    assert not maker.artifact.is_made()
    assert maker.get() == expected and maker.builds == 2
    assert maker.get() == expected and maker.builds == 2


@pytest.mark.parametrize("content", [b"", b'{"fingerprint": "k", "val', b"\xff\xfe", b"[]", b"null", b'"k"', b"{}"])
@pytest.mark.parametrize("name", ["json", "manifest"])
def test_a_torn_or_foreign_json_is_no_artifact(name, content, tmp_path):
    maker = Maker(KINDS[name], LocalPath(tmp_path) / "artifact")
    expected = maker.get()
    (maker.artifact.path if name == "json" else maker.artifact.path / "manifest.json").write_bytes(content)
    assert maker.get() == expected and maker.builds == 2


@pytest.mark.parametrize("name", ["json", "manifest"])
def test_an_artifact_of_other_inputs_is_built_again_in_its_place(name, folder):
    old, new = Maker(KINDS[name], folder / "artifact", "old"), Maker(KINDS[name], folder / "artifact", "new")
    old.get()
    assert new.get()["fingerprint"] == "new" and new.builds == 1
    assert not old.artifact.is_made()


def test_a_key_in_the_files_name_needs_none_inside(tmp_path):
    artifact = Artifact(LocalPath(tmp_path) / "0123.json", "0123", JsonFile(key_in_name=True))
    assert artifact.get(lambda: write_json(artifact.path, {"value": 1})) == {"value": 1}
    assert artifact.get(lambda: pytest.fail("built again")) == {"value": 1}
    artifact.path.write_bytes(b"[1]")
    assert not artifact.is_made(), "no object"


def test_a_checksum_lies_hidden_beside_its_file_and_one_without_it_is_not_whole(tmp_path):
    maker = Maker(KINDS["checksum"], LocalPath(tmp_path) / "model.safetensors")
    assert maker.get() == digest_of_file(maker.artifact.path)
    hidden = checksum_path(maker.artifact.path)
    assert hidden.name == ".model.safetensors.digest" and read_json(hidden) == maker.get()
    hidden.unlink()
    assert not maker.artifact.is_made() and maker.artifact.path.is_file()


def test_sizes_are_looked_at_without_reading_a_file(tmp_path, monkeypatch):
    path = LocalPath(tmp_path) / "artifact"
    assert not FOLDER.has_sizes(path, "k")
    write_folder(path, "k")
    damage(path / "a.bin")
    monkeypatch.setattr("seap_ray.storage.digests.digest_of_file", lambda _: pytest.fail("a file was read"))
    assert FOLDER.has_sizes(path, "k") and not FOLDER.has_sizes(path, "other")
    (path / "a.bin").write_bytes(b"short")
    assert not FOLDER.has_sizes(path, "k")
    (path / "a.bin").unlink()
    assert not FOLDER.has_sizes(path, "k")


def test_a_build_that_fails_leaves_no_artifact(tmp_path):
    artifact = Artifact(LocalPath(tmp_path) / "a.json", "k", JsonFile())
    with pytest.raises(ZeroDivisionError):
        artifact.get(lambda: 1 / 0)
    assert not artifact.is_made() and not artifact.path.exists()


def test_a_bucket_that_does_not_answer_is_told_and_nothing_is_built(bucket, monkeypatch):
    maker = Maker(KINDS["json"], bucket / "artifact")
    maker.get()

    def fail(_path: BucketPath) -> str:
        raise OSError("the network is gone")

    monkeypatch.setattr(BucketPath, "read_text", fail)
    with pytest.raises(IncompleteError, match="cannot be read .the network is gone"):
        maker.get()
    assert maker.builds == 1
