"""Storage: files that end whole, on a disk or in a bucket. What can read a local file alone has a node's copy."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seap_ray.errors import IncompleteError
from seap_ray.storage.paths import AnyPath, BucketPath

CACHE_VARIABLE = "SEAP_RAY_CACHE"
COPIES_AT_A_TIME = 8


def _file_mode() -> int:
    """Mode of an ordinary new file, by the process's umask, which can be read only by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _file_mode()


@contextmanager
def publishing(path: AnyPath) -> Iterator[Path]:
    """Yield a local file to be written, which is at ``path`` if the block ends well; racing writers are harmless.

    Raises IncompleteError, and leaves nothing, when the storage is full or cannot be written to.
    """
    folder = path.parent if isinstance(path, Path) else cache_folder()
    temporary = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with writable(path):
            folder.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(_MODE)  # safetensors' own files are for nobody but their owner
            if isinstance(path, BucketPath):
                path.upload(temporary)
            else:
                os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a folder that could not be made holds nothing to remove
            temporary.unlink()


@contextmanager
def writable(path: AnyPath) -> Iterator[None]:
    """Raises IncompleteError where the disk is full or cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise IncompleteError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); mend that and run the same "
            "command again"
        ) from error


@contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Raises IncompleteError where storage does not answer, or not to us; what is not there is left to the caller."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise IncompleteError(f"{path}: cannot be read ({error.strerror or error})") from error


def write_json(path: AnyPath, value: Any) -> None:
    with publishing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: AnyPath) -> Any:
    """Contents of a JSON file, or None when it is missing or torn."""
    try:
        with readable(path):
            return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def sha256_of(path: AnyPath) -> str:
    with path.open("rb") as file:
        content: Any = file
        return hashlib.file_digest(content, "sha256").hexdigest()


# --- a node's copies -------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this node's copies are: SEAP_RAY_CACHE, or ``~/.cache/seap_ray``. What no job uses may be deleted."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/seap_ray").expanduser()


def staged(path: AnyPath, patterns: tuple[str, ...] = ("*",)) -> Path:
    """``path`` itself, or this node's copy of a file or folder in a bucket, made once by whichever process is first.

    Of a folder the files whose names match ``patterns``. Names, sizes and times of change name the copy, so that one
    of something older is never taken for it. Raises FileNotFoundError when nothing is there, OSError when no copy can
    be made.
    """
    if isinstance(path, Path):
        return path
    files = [(path, path.stat())] if path.is_file() else path.below()
    files = [(file, status) for file, status in files if any(fnmatchcase(file.name, p) for p in patterns)]
    if not files:
        raise FileNotFoundError(f"{path}: there is nothing")
    about = json.dumps([[str(file), status.st_size, status.st_mtime_ns] for file, status in files])
    copy = cache_folder() / hashlib.sha256(about.encode()).hexdigest()[:20] / path.name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _locked(copy.parent / ".lock"):
            if not copy.exists():
                _copy(path, [file for file, _ in files], copy)
    return copy


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(path: BucketPath, files: list[BucketPath], copy: Path) -> None:
    partial = copy.with_name(f".{copy.name}.partial")
    remove(partial)

    def fetch(file: BucketPath) -> None:
        target = partial / file.relative_to(path) if file != path else partial
        target.parent.mkdir(parents=True, exist_ok=True)
        file.download(target)

    with ThreadPoolExecutor(COPIES_AT_A_TIME) as pool:
        list(pool.map(fetch, files))
    os.replace(partial, copy)


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Files and folders below ``folder`` by a pattern of names, sorted."""
    found: list[AnyPath] = [*folder.glob(pattern)]
    return sorted(found)


# --- folders ---------------------------------------------------------------------------------------------------------


def remove(path: AnyPath) -> None:
    """A file, or a folder with all that is in it, if it is there."""
    if isinstance(path, BucketPath):
        for file, _ in path.below():
            file.unlink(missing_ok=True)
    elif path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def link(file: Path, target: Path) -> None:
    """The same file under another name, or where a disk has no hard links, a copy."""
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            with publishing(target) as temporary:
                shutil.copyfile(file, temporary)


def move_folder(folder: AnyPath, target: AnyPath, *, last: str) -> None:
    """Put a folder in the place of another; ``last`` is the file that says that the folder is whole."""
    if not isinstance(folder, BucketPath) or not isinstance(target, BucketPath):
        remove(target)
        Path(folder).rename(target)
        return
    (target / last).unlink(missing_ok=True)
    remove(target)
    for file in sorted((file for file, _ in folder.below()), key=lambda file: file.name == last):
        file.rename(target / file.relative_to(folder))


def free_bytes(folder: AnyPath) -> float:
    """Room on the disk that holds a folder; a bucket has no bound."""
    return math.inf if isinstance(folder, BucketPath) else shutil.disk_usage(folder).free


def bytes_in(folder: AnyPath) -> int:
    """Bytes of all files below a folder; they may come and go meanwhile."""
    if isinstance(folder, BucketPath):
        return sum(status.st_size for _, status in folder.below())
    n_bytes = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                n_bytes += os.stat(os.path.join(where, name)).st_size
    return n_bytes
