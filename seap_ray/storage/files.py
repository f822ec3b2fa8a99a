"""Files: writes that end whole or leave nothing, JSON, hashes and a node's copies, on a disk or in a bucket."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seap_ray.errors import IncompleteError
from seap_ray.storage.paths import LocalPath, StoragePath, storage_path


def _file_mode() -> int:
    """Mode of an ordinary new file, by the process's umask, which can be read only by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _file_mode()


@contextmanager
def atomic_write(path: StoragePath | Path) -> Iterator[Path]:
    """Yield a local file to be written, which is at ``path`` if the block ends well; racing writers are harmless.

    Raises IncompleteError, and leaves nothing, when the storage is full or cannot be written to.
    """
    target = storage_path(path)
    folder = target.scratch_folder()
    temporary = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with writable(path):
            folder.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(_MODE)  # safetensors' own files are for nobody but their owner
            target.commit(temporary)
    finally:
        with suppress(OSError):  # a folder that could not be made holds nothing to remove
            temporary.unlink()


@contextmanager
def writable(path: StoragePath | Path) -> Iterator[None]:
    """Raises IncompleteError where the disk is full or cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise IncompleteError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); mend that and run the same "
            "command again"
        ) from error


@contextmanager
def readable(path: StoragePath | Path) -> Iterator[None]:
    """Raises IncompleteError where storage does not answer, or not to us; what is not there is left to the caller."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise IncompleteError(f"{path}: cannot be read ({error.strerror or error})") from error


def write_json(path: StoragePath | Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: StoragePath | Path) -> Any:
    """Contents of a JSON file, or None when it is missing or torn."""
    try:
        with readable(path):
            return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def sha256_of(path: StoragePath | Path) -> str:
    with path.open("rb") as file:
        content: Any = file
        return hashlib.file_digest(content, "sha256").hexdigest()


def stage(path: StoragePath | Path, patterns: tuple[str, ...] = ("*",)) -> LocalPath:
    """Return a local path with the content of ``path``: itself on a disk, this node's copy of what is in a bucket.

    Of a folder in a bucket, files whose names match ``patterns`` are copied. Raises FileNotFoundError when nothing is
    there, OSError when no copy can be made.
    """
    return storage_path(path).stage(patterns)


def link(file: Path, target: Path) -> None:
    """Give a file on a disk a second name, or where the disk has no hard links, make a copy."""
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            with atomic_write(target) as temporary:
                shutil.copyfile(file, temporary)
