"""Paths: one path type for disks and object stores, with pathlib's names and the operations that differ between them.

A :data:`StoragePath` is a :class:`LocalPath` or a :class:`BucketPath`. Both have pathlib's methods, and below them the
same set of storage operations, so that no caller asks which of the two it holds.

Credentials and endpoints of object stores are those of the environment, on every node: ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, or the machine's own role.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PosixPath, PurePath, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Literal, TypeVar

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from seap_ray.errors import ConfigError

SCHEMES = ("s3", "gs")
"""Schemes of object stores: Amazon S3 and whatever speaks its protocol, and Google Cloud Storage."""
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]+(/|$)")
"""Beginning of what may stand after the scheme: the name of a bucket."""
CACHE_VARIABLE = "SEAP_RAY_CACHE"
"""Environment variable that names the folder of this node's copies."""
PARALLEL_DOWNLOADS = 8
Folder = TypeVar("Folder", bound=PurePath)


class LocalPath(PosixPath):
    """A path on a disk: pathlib's own, with the storage operations."""

    __slots__ = ()

    is_remote: Literal[False] = False
    """A failed read means damage; there are hard links and the system's file locks."""

    def storage_root(self) -> "LocalPath":
        """Return the folder itself; a relative one lies below the current folder.

        A job submitted with ``--working-dir`` runs in a copy that Ray drops: there a relative one lies below home.
        """
        here = LocalPath.cwd()
        # Ray unpacks working directories below a folder of this name.
        is_dropped_copy = "working_dir_files" in here.parts
        return (LocalPath.home() if is_dropped_copy else here) / self

    def stage(self, patterns: tuple[str, ...] = ("*",)) -> "LocalPath":
        """Return the path itself, which every local reader can open."""
        return self

    def scratch_folder(self) -> "LocalPath":
        """Return the folder in which a file is written until it is whole: the file's own, so that a rename ends it."""
        return self.parent

    def commit(self, temporary: Path) -> None:
        """Put a finished local file at this path, in one step."""
        os.replace(temporary, self)

    def remove(self) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        if self.is_file():
            self.unlink(missing_ok=True)
        else:
            shutil.rmtree(self, ignore_errors=True)

    def move_folder(self, target: "StoragePath", *, last: str) -> None:
        """Rename this folder to ``target``, whose old content goes; all files appear at once, ``last`` among them."""
        target.remove()  # a rename does not replace a folder that holds files
        self.rename(target)

    def free_bytes(self) -> float:
        """Return the free bytes of the disk that holds the path."""
        return shutil.disk_usage(self).free

    def bytes_below(self) -> int:
        """Return the bytes of all files below the folder; files may come and go meanwhile."""
        n_bytes = 0
        for folder, _, names in os.walk(self):
            for name in names:
                with suppress(OSError):  # removed since it was listed
                    n_bytes += os.stat(os.path.join(folder, name)).st_size
        return n_bytes

    def sorted_glob(self, pattern: str) -> "list[LocalPath]":
        """Return files and folders below this one that match, sorted."""
        return sorted(self.glob(pattern))

    def select_files(self, choose: Callable[[Path], list[Path]]) -> "list[LocalPath]":
        """Return what ``choose`` selects, by names alone, of the files below the folder that it is given."""
        return [LocalPath(file) for file in choose(self)]


@dataclass(frozen=True, slots=True)
class Status:
    """Size and time of change of a file in a bucket, under the names of ``os.stat_result``."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        """Seconds since the epoch."""
        return self.st_mtime_ns / 1e9


class BucketPath(PurePosixPath):
    """``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``, with the methods of ``pathlib.Path``; errors are OSError.

    A file there is whole or absent; a folder is no more than a prefix of names.
    """

    is_remote: Literal[True] = True
    """A failed read says nothing about the bytes; there are neither hard links nor file locks."""

    def __str__(self) -> str:
        # pathlib folds two slashes into one; the URI has both.
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        # Without this ``open(path)`` would look for a local file called s3:.
        raise TypeError(f"{self} is no local file; storage.files.stage makes one")

    @property
    def _key(self) -> str:
        return "/".join(self.parts[1:])

    @property
    def _filesystem(self) -> FileSystem:
        return _opened(self.parts[0], *self.parts[1:2])

    def _info(self) -> FileInfo:
        return self._filesystem.get_file_info(self._key)

    # --- pathlib's methods ---

    def absolute(self) -> "BucketPath":
        """Return the path itself: names in a bucket depend on no current folder."""
        return self

    def exists(self) -> bool:
        """Return whether there is a file of this name, or one below it."""
        return self._info().type != FileType.NotFound

    def is_file(self) -> bool:
        """Return whether there is a file of this name."""
        return self._info().type == FileType.File

    def is_dir(self) -> bool:
        """Return whether there are files below this name."""
        return self._info().type == FileType.Directory

    def stat(self) -> Status:
        """Return size and time of change. Raises FileNotFoundError."""
        info = self._info()
        if info.type == FileType.NotFound:
            raise FileNotFoundError(f"{self} is not there")

        # A folder, and a store that does not say, has neither.
        return Status(info.size or 0, info.mtime_ns or 0)

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open the file for reading; it can seek, and fetches only the bytes that are read."""
        return self._filesystem.open_input_file(self._key)

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        # By default pyarrow decompresses what is named like a compressed file.
        with self._filesystem.open_input_stream(self._key, compression=None) as file:
            return file.read()

    def read_text(self) -> str:
        """Read the whole file as UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file; readers see it once it is complete."""
        # By default pyarrow compresses what is named like a compressed file.
        with self._filesystem.open_output_stream(self._key, compression=None) as file:
            file.write(content)

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Do nothing: a folder is there as soon as a file below it is."""

    def touch(self) -> None:
        """Write an empty file."""
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file. Raises FileNotFoundError, unless ``missing_ok``."""
        try:
            self._filesystem.delete_file(self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: "BucketPath") -> None:
        """Move a file within its bucket, which the store does by itself."""
        self._filesystem.move(self._key, target._key)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield files and folders that match part by part, sorted; ``**`` is not known."""
        wanted = PurePosixPath(pattern).parts
        names = [path.relative_to(self).parts for path, _ in self.below()]

        # A folder is there once for each file below it, so a set.
        candidates = {parts[: len(wanted)] for parts in names if len(parts) >= len(wanted)}
        for parts in sorted(candidates):
            if all(map(fnmatchcase, parts, wanted)):
                yield self.joinpath(*parts)

    # --- what a bucket alone has ---

    def download(self, target: Path) -> None:
        """Copy the file to a disk."""
        copy_files(self._key, str(target), source_filesystem=self._filesystem, destination_filesystem=LocalFileSystem())

    def upload(self, source: Path) -> None:
        """Make the file a copy of a local one; others see it once it is whole."""
        copy_files(str(source), self._key, source_filesystem=LocalFileSystem(), destination_filesystem=self._filesystem)

    def below(self) -> list[tuple["BucketPath", Status]]:
        """Return every file below this name with its status, sorted."""
        infos = self._filesystem.get_file_info(FileSelector(self._key, recursive=True, allow_not_found=True))
        files = [(BucketPath(self.parts[0], i.path), Status(i.size, i.mtime_ns or 0)) for i in infos if _is_content(i)]
        return sorted(files)

    # --- storage operations ---

    def storage_root(self) -> "BucketPath":
        """Return the folder itself."""
        return self

    def stage(self, patterns: tuple[str, ...] = ("*",)) -> LocalPath:
        """Return this node's copy of the file or folder, made once by whichever process is first.

        Of a folder, files whose names match ``patterns`` are copied. Names, sizes and times of change name the copy,
        so that a copy of older content is never taken for it. Raises FileNotFoundError when nothing is there, OSError
        when no copy can be made.
        """
        # A single file is copied as a folder with one file would be.
        files = [(self, self.stat())] if self.is_file() else self.below()
        files = [(file, status) for file, status in files if _matches_any(file.name, patterns)]
        if not files:  # such a folder does not exist in a bucket
            raise FileNotFoundError(f"{self}: there is nothing")

        content = json.dumps([[str(file), status.st_size, status.st_mtime_ns] for file, status in files])
        key = hashlib.sha256(content.encode()).hexdigest()[:20]
        return make_once(cache_folder() / key / self.name, lambda copy: _copy(self, [file for file, _ in files], copy))

    def scratch_folder(self) -> LocalPath:
        """Return the folder in which a file is written until it is whole: this node's cache."""
        return cache_folder()

    def commit(self, temporary: Path) -> None:
        """Upload a finished local file to this path; others see it once it is whole."""
        self.upload(temporary)

    def remove(self) -> None:
        """Remove a file, or every file below a folder, if it is there."""
        if self.is_file():
            self.unlink(missing_ok=True)

        # A file and a folder may have the same name in a bucket.
        for file, _ in self.below():
            file.unlink(missing_ok=True)

    def move_folder(self, target: "StoragePath", *, last: str) -> None:
        """Move this folder's files to ``target``, whose old content goes; ``last`` marks it as whole.

        The old ``last`` goes first, so that nobody takes a mixture of both for whole.
        """
        (target / last).unlink(missing_ok=True)
        target.remove()
        # False sorts before True: ``last`` comes last, the others in the order of their names.
        for file in sorted((file for file, _ in self.below()), key=lambda file: file.name == last):
            file.rename(BucketPath(target / file.relative_to(self)))

    def free_bytes(self) -> float:
        """Return infinity: a bucket has no bound."""
        return math.inf

    def bytes_below(self) -> int:
        """Return the bytes of all files below the folder."""
        return sum(status.st_size for _, status in self.below())

    def sorted_glob(self, pattern: str) -> "list[BucketPath]":
        """Return files and folders below this one that match, sorted."""
        return list(self.glob(pattern))

    def select_files(self, choose: Callable[[Path], list[Path]]) -> "list[BucketPath]":
        """Return what ``choose`` selects, by names alone, of the files below the folder that it is given.

        It is given a local folder of empty files that have the names of those in the bucket.
        """
        # ``choose`` looks for patterns in a folder on a disk, as it does for data that lie on one.
        with TemporaryDirectory() as names:
            for file, _ in self.below():
                empty = inside(Path(names), str(file.relative_to(self)), self)
                empty.parent.mkdir(parents=True, exist_ok=True)
                empty.touch()
            return [self / file.relative_to(names) for file in choose(Path(names))]


StoragePath = LocalPath | BucketPath
"""A path that runs, models and corpora lie at."""


def _is_content(info: FileInfo) -> bool:
    """Return False for a folder, and for the empty object that some clients leave to stand for one."""
    return info.type == FileType.File and not info.path.endswith("/")


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@cache
def _opened(scheme: str, bucket: str) -> FileSystem:
    """Return the file system of a bucket, once a process: finding out the bucket's region is a request."""
    return FileSystem.from_uri(f"{scheme}//{bucket}")[0]


# --- a node's copies -------------------------------------------------------------------------------------------------


def cache_folder() -> LocalPath:
    """Return where this node's copies are: SEAP_RAY_CACHE, or ``~/.cache/seap_ray``.

    What no job uses may be deleted.
    """
    return LocalPath(os.environ.get(CACHE_VARIABLE) or "~/.cache/seap_ray").expanduser()


def make_once(path: LocalPath, make: Callable[[LocalPath], None]) -> LocalPath:
    """Return a file or folder of this node's cache, made by whichever process is first; others wait for it.

    Args:
        path: Where it is, in a folder of its own, whose name tells the content.
        make: Makes it at the path that it is given, which is renamed when it is whole. What a process leaves there that
            is killed, nobody takes for whole.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / ".lock"):
            if not path.exists():  # another process may have made it while this one waited
                # What a process left that was killed in the middle.
                partial = path.with_name(f".{path.name}.partial")
                partial.remove()
                make(partial)
                os.replace(partial, path)

    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Other processes of this node wait here for the one that makes it. The lock goes with the process, even killed.
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(path: BucketPath, files: list[BucketPath], copy: LocalPath) -> None:
    """Download files below ``path`` to ``copy``. Raises ConfigError for one whose name leads out of it."""
    # Whoever may write to the bucket has chosen the names.
    targets = {file: inside(copy, str(file.relative_to(path)), path) if file != path else copy for file in files}

    def fetch(file: BucketPath) -> None:
        target = targets[file]
        target.parent.mkdir(parents=True, exist_ok=True)
        file.download(target)

    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(fetch, files))  # a list, so that errors are raised here


# --- from text and from other paths ----------------------------------------------------------------------------------


def is_uri(text: str) -> bool:
    """Return whether a text names a path in a bucket."""
    return text.partition("://")[0] in SCHEMES


def parse_path(text: str) -> StoragePath:
    """Return the path that a config names: ``s3://``, ``gs://``, or one on a disk, whose ``~`` is the home folder.

    Raises ConfigError for another scheme, or a bucket without a valid name.
    """
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return LocalPath(text).expanduser()

    if scheme not in SCHEMES:
        raise ConfigError(f"{text}: unknown scheme {scheme}://; use {' or '.join(f'{s}://' for s in SCHEMES)}")
    if not BUCKET.match(rest):
        raise ConfigError(f"{text}: names no bucket; write {scheme}://BUCKET/FOLDER, the bucket in small letters")
    return BucketPath(text)


def inside(folder: Folder, name: object, named_by: object) -> Folder:
    """Return the path of a file by its name in a manifest, an index or a bucket.

    Args:
        folder: The folder that it is to lie in, or below.
        name: Its name, which others may have made.
        named_by: What names it, for the error.

    Raises:
        ConfigError: The name is no text, or leads out of the folder.
    """
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ConfigError(f"{named_by}: names the file {name!r}, which does not lie in its folder")
    return folder / name


def storage_path(path: PurePath) -> StoragePath:
    """Return any path as a StoragePath; a plain ``pathlib.Path`` becomes a LocalPath."""
    return BucketPath(path) if is_uri(str(path)) else LocalPath(path)
