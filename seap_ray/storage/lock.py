"""Lock: one job at a time on a run, on a disk by the system's own locks, in a bucket by a file that keeps changing."""

import fcntl
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from seap_ray.errors import ConfigError
from seap_ray.progress import say
from seap_ray.storage.files import writable
from seap_ray.storage.paths import BucketPath, LocalPath, StoragePath, storage_path

BEAT_S = 10.0
"""Seconds between two changes of the file in a bucket. One that does not change for three of them is nobody's."""
SETTLE_S = 2.0
"""Of two jobs that come at the same time, the last one that wrote within this time has the lock."""


def lock(root: StoragePath | Path) -> AbstractContextManager[None]:
    """While inside, no other job works on the run at ``root``, however this process ends.

    Raises ConfigError while another one does, IncompleteError where nothing can be written. A file system without
    locks has none.
    """
    path = storage_path(root)
    return _in_bucket(path) if path.is_remote else _on_disk(path)


def _taken(root: StoragePath, by: str) -> ConfigError:
    other = by or "another one"
    return ConfigError(f"{root}: a job works on this run ({other}); wait for its end, or choose another run.name")


def _me() -> str:
    return f"{platform.node()}, process {os.getpid()}"


@contextmanager
def _on_disk(root: LocalPath) -> Iterator[None]:
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(root, file.read().strip()) from None
        except OSError:
            pass
        with writable(root):
            file.truncate(0)
            print(_me(), file=file, flush=True)
        yield


@contextmanager
def _in_bucket(root: BucketPath) -> Iterator[None]:
    path, mine, ended = root / ".lock", f"{_me()}, {uuid.uuid4().hex}", threading.Event()
    before = _read(path)
    if before:
        say(f"{root} is marked as worked on by {_owner(before)}; seeing whether it still is")
        time.sleep(3 * BEAT_S)
        if (now := _read(path)) not in (before, ""):
            raise _taken(root, _owner(now))
    with writable(path):
        path.write_bytes(mine.encode())
    time.sleep(SETTLE_S)
    if (now := _read(path)) != mine:
        raise _taken(root, _owner(now))

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with suppress(OSError):
                if path.read_text().startswith(mine):  # another may have taken it after a silence of ours
                    path.write_bytes(f"{mine}, {time.monotonic()}".encode())

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            if path.read_text().startswith(mine):
                path.unlink(missing_ok=True)


def _read(path: BucketPath) -> str:
    with writable(path), suppress(FileNotFoundError):
        return path.read_text()
    return ""


def _owner(text: str) -> str:
    return ", ".join(text.split(", ")[:2])
