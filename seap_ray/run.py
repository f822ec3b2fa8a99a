"""Run: the run directory is the state. Where everything lies, and what makes a file whole.

A file is written under another name and renamed, so that what is there is complete; a folder is complete when its
manifest, written last, is there.
"""

import fcntl
import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seap_ray.config import Config, walk
from seap_ray.errors import ConfigError, IncompleteError

FIXED = ("run.seed", "model.source", "model.revision", "model.dtype", "calibration.skip_first_token")
"""Keys that a run keeps for life, besides ``corpus`` and every task: its statistics depend on them."""


@dataclass(frozen=True, slots=True)
class Run:
    """Paths of one run."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> "Run":
        return cls(_home() / Path(config.run.storage).expanduser() / config.run.name)

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    def shards(self, task: str) -> Path:
        return self.root / "shards" / task

    def records(self, task: str) -> Path:
        return self.root / "records" / task

    def statistics(self, task: str) -> Path:
        return self.root / "statistics" / f"{task}.safetensors"

    def part(self, name: str) -> Path:
        """Statistics of some of a task's shards, which a study compares."""
        return self.root / "statistics" / "parts" / f"{name}.safetensors"

    def unit_scores(self, name: str) -> Path:
        """Scores of units that were made from covariances, for a second plan and for the report."""
        return self.root / "statistics" / "scores" / f"{name}.safetensors"

    def plan(self, ratio: float, name: str) -> Path:
        return self.root / "plans" / ratio_name(ratio) / f"{name}.json"

    def experts(self, ratio: float) -> Path:
        return self.root / "experts" / ratio_name(ratio)

    def expert(self, ratio: float, name: str) -> Path:
        return self.experts(ratio) / name

    @property
    def router(self) -> Path:
        return self.root / "router"

    @property
    def cells(self) -> Path:
        return self.root / "cells"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    def study(self, name: str) -> Path:
        return self.root / "results" / f"{name}.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, no other job works on this run; the system lets go of it when a process ends, however it ends.

        Raises ConfigError while another one does. A file system without locks has none.
        """
        with writable(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".lock").open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                other = file.read().strip() or "another one"
                raise ConfigError(
                    f"{self.root}: a job works on this run ({other}); wait for its end, or choose another run.name"
                ) from None
            except OSError:
                pass
            with writable(self.root):
                file.truncate(0)
                print(f"{platform.node()}, process {os.getpid()}", file=file, flush=True)
            yield

    def claim(self, config: Config) -> None:
        """Write the resolved config, first of all files. Raises ConfigError if the run was made with another one."""
        if made_with := read_json(self.config):
            self._refuse_another(made_with, config)
        write_json(self.config, config.model_dump(mode="json"))

    def _refuse_another(self, made_with: dict[str, Any], config: Config) -> None:
        old, new = flat(made_with), flat(config.model_dump(mode="json"))
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key] and _is_fixed(key):
                raise ConfigError(
                    f"{self.root}: was made with {key}={old[key]}, not {new[key]}; choose another run.name"
                )


def _home() -> Path:
    """What a relative storage is below: the current folder, but never the copy that Ray makes for a job and drops."""
    here = Path.cwd()
    return Path.home() if "working_dir_files" in here.parts else here


def _is_fixed(key: str) -> bool:
    after_statistics = key.endswith(
        (".weight", ".metric", ".lm_eval", ".choices", ".evaluation_path", ".evaluation_split")
    )
    return key in FIXED or (key.startswith(("corpus.", "tasks.")) and not after_statistics)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a dumped config; tasks by name, so that tasks may be added and left out."""
    flat = {f"tasks.{task['name']}.{key}": value for task in values["tasks"] for key, value in task.items()}
    for key, _ in walk(Config):
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if key != "tasks":
            flat[key] = value
    return flat


def ratio_name(ratio: float) -> str:
    """Folder name of a ratio: 0.5 -> ``0.50``, 0.125 -> ``0.125``."""
    short = f"{ratio:.2f}"
    return short if float(short) == ratio else repr(ratio)


def _file_mode() -> int:
    """Mode of an ordinary new file, by the process's umask, which can be read only by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _file_mode()


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it there if the block ends well; racing writers are harmless.

    Raises IncompleteError, and leaves nothing, when the disk is full or cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(_MODE)  # safetensors' own files are for nobody but their owner
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a folder that could not be made holds nothing to remove
            temporary.unlink()


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raises IncompleteError where the disk is full or cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise IncompleteError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); mend that and run the same "
            "command again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    with publishing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Contents of a JSON file, or None when it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Hash of JSON-able values: equal for equal values, whatever the process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
