"""Run: the run directory is the state. Where everything lies.

A file that is there is complete; a folder is complete when its manifest, written last, is there.
"""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from seap_ray.config import Config, walk
from seap_ray.errors import ConfigError
from seap_ray.storage.files import read_json, write_json
from seap_ray.storage.lock import lock
from seap_ray.storage.paths import StoragePath, parse_path, storage_path

FIXED = ("run.seed", "model.source", "model.revision", "model.dtype", "calibration.skip_first_token")
"""Keys that a run keeps for life, besides ``corpus`` and every task: its statistics depend on them."""


@dataclass(frozen=True, slots=True)
class Run:
    """Paths of one run."""

    root: StoragePath

    def __post_init__(self) -> None:
        """Take a plain ``pathlib.Path`` too, as a StoragePath."""
        object.__setattr__(self, "root", storage_path(self.root))

    @classmethod
    def of(cls, config: Config) -> "Run":
        return cls(parse_path(config.run.storage).storage_root() / config.run.name)

    @property
    def config(self) -> StoragePath:
        return self.root / "config.json"

    def shards(self, task: str) -> StoragePath:
        return self.root / "shards" / task

    def records(self, task: str) -> StoragePath:
        return self.root / "records" / task

    def statistics(self, task: str) -> StoragePath:
        return self.root / "statistics" / f"{task}.safetensors"

    def part(self, name: str) -> StoragePath:
        """Statistics of some of a task's shards, which a study compares."""
        return self.root / "statistics" / "parts" / f"{name}.safetensors"

    def unit_scores(self, name: str) -> StoragePath:
        """Scores of units that were made from covariances, for a second plan and for the report."""
        return self.root / "statistics" / "scores" / f"{name}.safetensors"

    def plan(self, ratio: float, name: str) -> StoragePath:
        return self.root / "plans" / ratio_name(ratio) / f"{name}.json"

    def experts(self, ratio: float) -> StoragePath:
        return self.root / "experts" / ratio_name(ratio)

    def expert(self, ratio: float, name: str) -> StoragePath:
        return self.experts(ratio) / name

    @property
    def shared(self) -> StoragePath:
        """What experts have of the base, once; those on a disk are hard links to it."""
        return self.root / "shared"

    @property
    def router(self) -> StoragePath:
        return self.root / "router"

    @property
    def cells(self) -> StoragePath:
        return self.root / "cells"

    @property
    def results(self) -> StoragePath:
        return self.root / "results.json"

    def study(self, name: str) -> StoragePath:
        return self.root / "results" / f"{name}.json"

    @property
    def report(self) -> StoragePath:
        return self.root / "report.html"

    @property
    def pictures(self) -> StoragePath:
        return self.root / "pictures"

    def held(self) -> AbstractContextManager[None]:
        """While inside, no other job works on this run. Raises ConfigError while another one does."""
        return lock(self.root)

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


def fingerprint(*parts: Any) -> str:
    """Hash of JSON-able values: equal for equal values, whatever the process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
