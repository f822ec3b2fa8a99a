"""Files: writes that end whole or leave nothing, JSON and a node's copies, on a disk or in a bucket."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seap_ray.errors import DataError, IncompleteError
from seap_ray.storage.paths import LocalPath, StoragePath, storage_path


def _file_mode() -> int:
    """Return the mode of an ordinary new file by the process's umask, which can be read only by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _file_mode()


@contextmanager
def atomic_write(path: StoragePath | Path) -> Iterator[Path]:
    """Yield a local file to write, which is at ``path`` only if the block ends well; racing writers are harmless.

    Raises IncompleteError, and leaves nothing, when the storage is full or cannot be written to.
    """
    # Beside the target on a disk, where a rename is one step; in this node's cache for a bucket. The random part of the
    # name keeps two writers of one path apart.
    target = storage_path(path)
    folder = target.scratch_folder()
    temporary = folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with writable(path):
            folder.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(_MODE)  # safetensors makes files that their owner alone can read
            target.commit(temporary)

    # After a commit on a disk the temporary file is gone, and after one to a bucket it is still there.
    finally:
        with suppress(OSError):  # a folder that could not be made holds nothing to remove
            temporary.unlink()


@contextmanager
def writable(path: StoragePath | Path) -> Iterator[None]:
    """Turn errors of writing to ``path`` inside the block into IncompleteError, one line for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise IncompleteError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); fix that and run the same "
            "command again"
        ) from error


@contextmanager
def readable(path: StoragePath | Path) -> Iterator[None]:
    """Turn errors of reading ``path`` inside the block into IncompleteError, except those that say it is not there."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):  # the caller knows what a missing file means
        raise
    except OSError as error:
        raise IncompleteError(f"{path}: cannot be read ({error.strerror or error})") from error


def write_json(path: StoragePath | Path, value: Any) -> None:
    """Write a value as a JSON file, whole or not at all; what JSON does not know is written as text."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: StoragePath | Path) -> Any:
    """Return the content of a JSON file, or None when it is missing or incomplete.

    Raises:
        IncompleteError: A bucket or disk does not answer.
        DataError: It is nested deeper than Python can read.
    """
    try:
        with readable(path):
            return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    except RecursionError:
        raise DataError(f"{path}: JSON that is nested too deeply") from None


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
        # A link is not made over a file that is there.
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:  # also where the two lie on different disks
            with atomic_write(target) as temporary:
                shutil.copyfile(file, temporary)
