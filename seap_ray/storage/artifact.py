"""Artifact: a file or folder that is made once from known inputs, then read. Resumption is promised here alone.

An artifact has a path, a key (the fingerprint of all that it is made from) and a format. The format knows where the key
is kept, and what shows that the content is damaged. The same command resumes whatever was cut short, because an
artifact that is whole is never made again, and one that is missing, damaged or made from other inputs always is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from seap_ray.storage.digests import digest_of_file, has_digest, stated_digest
from seap_ray.storage.files import read_json, write_json
from seap_ray.storage.paths import StoragePath, inside

Content = TypeVar("Content")
Loaded = TypeVar("Loaded", covariant=True)


class Format(Protocol[Loaded]):
    """How artifacts of one kind lie in storage."""

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the artifact is there, undamaged and made from the inputs that ``key`` stands for."""

    def load(self, path: StoragePath) -> Loaded:
        """Read an artifact that is whole."""


@dataclass(frozen=True, slots=True)
class Artifact(Generic[Content]):
    """A file or folder that is made once from known inputs."""

    path: StoragePath
    key: str
    """Fingerprint of everything that the content depends on."""
    format: Format[Content]

    def is_made(self) -> bool:
        """Return whether the artifact is there, undamaged and made from the same inputs."""
        return self.format.is_whole(self.path, self.key)

    def load(self) -> Content:
        """Read an artifact that is made."""
        return self.format.load(self.path)

    def get(self, build: Callable[[], object]) -> Content:
        """Read the artifact; where it is not made, ``build`` writes it first."""
        self.make(build)
        # Read back from storage, so that a first run goes on with what a second one would find.
        return self.load()

    def make(self, build: Callable[[], object]) -> None:
        """Let ``build`` write the artifact unless it is made already."""
        if not self.is_made():
            build()


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A JSON object that carries its key in the field ``fingerprint``, or, if ``key_in_name``, in its file name."""

    key_in_name: bool = False

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the file is there, is complete and has the key."""
        content = read_json(path)
        if not isinstance(content, dict):  # missing, incomplete, or something else of this name
            return False

        return self.key_in_name or content.get("fingerprint") == key

    def load(self, path: StoragePath) -> Any:
        """Read the object."""
        return read_json(path)


def _no_sizes(manifest: Mapping[str, Any]) -> Mapping[str, int]:
    """Stand for a manifest that states no sizes."""
    return {}


@dataclass(frozen=True, slots=True)
class ManifestFolder:
    """A folder with a JSON manifest, written last, that holds the key and the digest of every other file."""

    manifest: str
    """Name of the manifest."""
    digests: Callable[[Mapping[str, Any]], Mapping[str, str]]
    """Names and digests of the files, from the manifest's content."""
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] = _no_sizes
    """Names and bytes of the files, from the manifest's content."""

    def has_sizes(self, path: StoragePath, key: str) -> bool:
        """Return whether the manifest has the key and every file the size that the manifest states.

        No file is read: this says at once which folders are worth the time that ``is_whole`` takes.
        """
        content = self._content_with_key(path, key)
        if content is None:
            return False

        manifest = path / self.manifest
        return all(has_size(inside(path, name, manifest), n_bytes) for name, n_bytes in self.sizes(content).items())

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the manifest has the key and every file the bytes that the manifest states."""
        content = self._content_with_key(path, key)
        if content is None:
            return False

        # The manifest is written last, so one that is there promises all files. Only their bytes can have changed.
        manifest = path / self.manifest
        return all(has_digest(inside(path, name, manifest), digest) for name, digest in self.digests(content).items())

    def _content_with_key(self, path: StoragePath, key: str) -> Mapping[str, Any] | None:
        content = read_json(path / self.manifest)
        has_key = isinstance(content, dict) and content.get("fingerprint") == key
        return content if has_key else None

    def load(self, path: StoragePath) -> Any:
        """Read the manifest."""
        return read_json(path / self.manifest)


@dataclass(frozen=True, slots=True)
class ChecksummedFile:
    """A file with its digest in a hidden file beside it; its folder's name carries the key."""

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the file has the bytes that were hashed when it was written."""
        # The checksum is written after the file, so a file without one may be incomplete.
        digest = read_json(checksum_path(path))
        return digest is not None and has_digest(path, digest)

    def load(self, path: StoragePath) -> str:
        """Read the digest."""
        return read_json(checksum_path(path))

    def save_checksum(self, path: StoragePath, digest: str) -> None:
        """Mark the file as whole."""
        write_json(checksum_path(path), digest)


@dataclass(frozen=True, slots=True)
class KeyedFile:
    """A file with its key and its digest in a hidden file beside it."""

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the file has the key, and the bytes that were hashed when it was written."""
        about = read_json(checksum_path(path))
        has_key = isinstance(about, dict) and about.get("fingerprint") == key
        return has_key and has_digest(path, stated_digest(about))

    def load(self, path: StoragePath) -> StoragePath:
        """Return the path: the file is for others to read."""
        return path

    def save_key(self, path: StoragePath, key: str) -> None:
        """Mark the file as whole."""
        write_json(checksum_path(path), {"fingerprint": key, "digest": digest_of_file(path)})


def checksum_path(path: StoragePath) -> StoragePath:
    """Return where the digest of a file lies that no manifest names."""
    return path.with_name(f".{path.name}.digest")


def has_size(path: StoragePath, n_bytes: int) -> bool:
    """Return whether a file is there and has this many bytes."""
    return path.is_file() and path.stat().st_size == n_bytes
