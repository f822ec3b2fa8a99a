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

HEARTBEAT_S = 10.0
"""Seconds between two changes of the lock file in a bucket. One that does not change for three of them is nobody's."""
SETTLE_S = 2.0
"""Of two jobs that come at the same time, the last one that wrote within this time has the lock."""


def lock(root: StoragePath | Path) -> AbstractContextManager[None]:
    """Keep other jobs off the run at ``root`` inside the block; the lock ends with this process, however that ends.

    Raises ConfigError while another job has the lock, IncompleteError where nothing can be written. On a file system
    without locks nothing is locked.
    """
    path = storage_path(root)
    return _lock_in_bucket(path) if path.is_remote else _lock_on_disk(path)


def _locked_error(root: StoragePath, owner: str) -> ConfigError:
    other = owner or "another one"
    return ConfigError(f"{root}: a job works on this run ({other}); wait for its end, or choose another run.name")


def _process_name() -> str:
    return f"{platform.node()}, process {os.getpid()}"


@contextmanager
def _lock_on_disk(root: LocalPath) -> Iterator[None]:
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        # Opened without truncation: until the lock is held, the text in it is its owner's.
        file = (root / ".lock").open("a+")

    with file:
        # The system releases the lock when the file is closed, and so when the process ends in any way.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _locked_error(root, file.read().strip()) from None
        except OSError:
            pass  # a file system without locks

        with writable(root):
            file.truncate(0)
            print(_process_name(), file=file, flush=True)

        yield


@contextmanager
def _lock_in_bucket(root: BucketPath) -> Iterator[None]:
    # A store has no locks, and no step that both looks and writes. So a job looks, writes its mark, waits, and looks
    # again whether the mark is still its own.
    path = root / ".lock"
    mark = f"{_process_name()}, {uuid.uuid4().hex}"
    _wait_until_free(root, path)
    _acquire(root, path, mark)

    # A thread, since the job's own work may take hours without a pause.
    ended = threading.Event()
    heartbeat = threading.Thread(target=_keep_changing, args=(path, mark, ended), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        # Joined before the file is removed, or a last heartbeat could write it anew.
        ended.set()
        heartbeat.join()

        with suppress(OSError):
            if path.read_text().startswith(mark):
                path.unlink(missing_ok=True)


def _wait_until_free(root: BucketPath, path: BucketPath) -> None:
    """Raise ConfigError if the lock file still changes; one that does not was left by a job that was killed."""
    before = _read(path)
    if not before:
        return

    # Three heartbeats, so that one which is late does not lose the lock.

    say(f"{root} is marked as worked on by {_owner(before)}; seeing whether it still is")
    time.sleep(3 * HEARTBEAT_S)
    now = _read(path)
    if now not in (before, ""):
        raise _locked_error(root, _owner(now))


def _acquire(root: BucketPath, path: BucketPath, mark: str) -> None:
    """Write the mark, and raise ConfigError if another job wrote its own at the same time and later."""
    with writable(path):
        path.write_bytes(mark.encode())

    # Of several that write now, all read the same text after this time: the last one's.
    time.sleep(SETTLE_S)
    now = _read(path)
    if now != mark:
        raise _locked_error(root, _owner(now))


def _keep_changing(path: BucketPath, mark: str, ended: threading.Event) -> None:
    """Change the lock file until the lock ends, to show other jobs that this one lives."""
    while not ended.wait(HEARTBEAT_S):
        with suppress(OSError):
            # Another job may have taken the lock after this one could not write for a while.
            if path.read_text().startswith(mark):
                path.write_bytes(f"{mark}, {time.monotonic()}".encode())


def _read(path: BucketPath) -> str:
    """Return the text of the lock file, or nothing where there is none."""
    with writable(path), suppress(FileNotFoundError):
        return path.read_text()
    return ""


def _owner(text: str) -> str:
    """Return node and process of a lock file's text, which are its first two words."""
    return ", ".join(text.split(", ")[:2])
