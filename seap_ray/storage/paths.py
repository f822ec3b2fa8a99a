"""Bucket: paths in object stores under pathlib's names, through ``pyarrow.fs``.

Credentials and endpoints are those of the environment, on every node: ``AWS_PROFILE``, ``AWS_ENDPOINT_URL``,
``GOOGLE_APPLICATION_CREDENTIALS``, or the machine's own role.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from seap_ray.errors import ConfigError

SCHEMES = ("s3", "gs")
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]+(/|$)")


@dataclass(frozen=True, slots=True)
class Status:
    """What ``stat`` says of a file in a bucket."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        return self.st_mtime_ns / 1e9


class BucketPath(PurePosixPath):
    """``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``. Methods are those of ``pathlib.Path``, errors OSError.

    A file there is whole, or is not there; a folder is no more than the beginning of names.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no local file; storage.staged makes one")

    @property
    def _key(self) -> str:
        return "/".join(self.parts[1:])

    @property
    def _filesystem(self) -> FileSystem:
        return _opened(self.parts[0], *self.parts[1:2])

    def _info(self) -> FileInfo:
        return self._filesystem.get_file_info(self._key)

    def absolute(self) -> "BucketPath":
        return self

    def exists(self) -> bool:
        return self._info().type != FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == FileType.File

    def is_dir(self) -> bool:
        return self._info().type == FileType.Directory

    def stat(self) -> Status:
        info = self._info()
        if info.type == FileType.NotFound:
            raise FileNotFoundError(f"{self} is not there")
        return Status(info.size or 0, info.mtime_ns or 0)

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """May seek, and reads what is asked for alone."""
        return self._filesystem.open_input_file(self._key)

    def read_bytes(self) -> bytes:
        with self._filesystem.open_input_stream(self._key) as file:
            return file.read()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        with self._filesystem.open_output_stream(self._key) as file:
            file.write(content)

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Nothing to do: names below a folder make it."""

    def touch(self) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._filesystem.delete_file(self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def download(self, target: Path) -> None:
        """Copy the file to a disk."""
        copy_files(self._key, str(target), source_filesystem=self._filesystem, destination_filesystem=LocalFileSystem())

    def upload(self, source: Path) -> None:
        """Make the file a copy of a local one; others see it once it is whole."""
        copy_files(str(source), self._key, source_filesystem=LocalFileSystem(), destination_filesystem=self._filesystem)

    def rename(self, target: "BucketPath") -> None:
        """Move a file within its bucket, which the store does by itself."""
        self._filesystem.move(self._key, target._key)

    def below(self) -> list[tuple["BucketPath", Status]]:
        """Every file below this name, sorted."""
        found = self._filesystem.get_file_info(FileSelector(self._key, recursive=True, allow_not_found=True))
        files = [(BucketPath(self.parts[0], i.path), Status(i.size, i.mtime_ns or 0)) for i in found if _is_content(i)]
        return sorted(files)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Files and folders that match, part by part; ``**`` is not known."""
        wanted = PurePosixPath(pattern).parts
        names = [path.relative_to(self).parts for path, _ in self.below()]
        cut = {parts[: len(wanted)] for parts in names if len(parts) >= len(wanted)}
        for parts in sorted(cut):
            if all(map(fnmatchcase, parts, wanted)):
                yield self.joinpath(*parts)


AnyPath = Path | BucketPath


def _is_content(info: FileInfo) -> bool:
    """Not a folder, nor the empty object that some clients leave to stand for one."""
    return info.type == FileType.File and not info.path.endswith("/")


@cache
def _opened(scheme: str, bucket: str) -> FileSystem:
    """Once per bucket: finding out its region is a request."""
    return FileSystem.from_uri(f"{scheme}//{bucket}")[0]


def is_uri(text: str) -> bool:
    return text.partition("://")[0] in SCHEMES


def place(text: str) -> AnyPath:
    """The path that a config names: ``s3://``, ``gs://``, or one on a disk, whose ``~`` is the home folder.

    Raises ConfigError for another scheme, or none of a bucket's names.
    """
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return Path(text).expanduser()
    if scheme not in SCHEMES:
        raise ConfigError(f"{text}: {scheme}:// is not known; known are {', '.join(f'{s}://' for s in SCHEMES)}")
    if not BUCKET.match(rest):
        raise ConfigError(f"{text}: names no bucket; write {scheme}://BUCKET/FOLDER, the bucket in small letters")
    return BucketPath(text)
