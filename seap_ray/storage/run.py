"""Run: the run's folder is its state. This file says where everything in it lies.

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
AFTER_STATISTICS = (".weight", ".metric", ".lm_eval", ".choices", ".evaluation_path", ".evaluation_split")
"""Ends of a task's keys that may change in a run: they are read after its statistics are recorded."""


@dataclass(frozen=True, slots=True)
class Run:
    """Paths of one run."""

    root: StoragePath

    def __post_init__(self) -> None:
        """Take a plain ``pathlib.Path`` too, as a StoragePath."""
        object.__setattr__(self, "root", storage_path(self.root))

    @classmethod
    def of(cls, config: Config) -> "Run":
        """Return the run that a config names."""
        return cls(parse_path(config.run.storage).storage_root() / config.run.name)

    @property
    def config(self) -> StoragePath:
        """The resolved config that the run was made with."""
        return self.root / "config.json"

    def shards(self, task: str) -> StoragePath:
        """Return the folder of a task's tokenised calibration rows."""
        return self.root / "shards" / task

    def synthesis(self, task: str) -> StoragePath:
        """Return the folder of the texts of a task that the dense model has written."""
        return self.root / "synthesis" / task

    def records(self, task: str) -> StoragePath:
        """Return the folder of a task's records: the statistics of every shard, one file each."""
        return self.root / "records" / task

    def statistics(self, task: str) -> StoragePath:
        """Return the file of a task's statistics, merged over its shards."""
        return self.root / "statistics" / f"{task}.safetensors"

    def part(self, name: str) -> StoragePath:
        """Return the file of statistics of some of a task's shards, which a study compares."""
        return self.root / "statistics" / "parts" / f"{name}.safetensors"

    def unit_scores(self, name: str) -> StoragePath:
        """Return the file of scores of units made from covariances, kept for a second plan and for the report."""
        return self.root / "statistics" / "scores" / f"{name}.safetensors"

    def correction(self, name: str) -> StoragePath:
        """Return the file of what corrects the errors of a cut model's layers."""
        return self.root / "corrections" / f"{name}.safetensors"

    def divergences(self, task: str) -> StoragePath:
        """Return the folder of what was measured of plans on a task's held-out tokens, before anything was written."""
        return self.root / "divergences" / task

    def plan(self, ratio: float, name: str) -> StoragePath:
        """Return the file that says what a model keeps."""
        return self.root / "plans" / ratio_name(ratio) / f"{name}.json"

    def experts(self, ratio: float) -> StoragePath:
        """Return the folder of all checkpoints of a ratio."""
        return self.root / "experts" / ratio_name(ratio)

    def expert(self, ratio: float, name: str) -> StoragePath:
        """Return the folder of a checkpoint."""
        return self.experts(ratio) / name

    def agreement(self, ratio: float, name: str) -> StoragePath:
        """Return the file that says how often an expert writes what the dense and the general model would write."""
        return self.root / "agreements" / ratio_name(ratio) / f"{name}.json"

    @property
    def shared(self) -> StoragePath:
        """Files that experts have of the base, once; those in experts' folders on a disk are hard links to them."""
        return self.root / "shared"

    @property
    def router(self) -> StoragePath:
        """Folder of the router."""
        return self.root / "router"

    @property
    def cells(self) -> StoragePath:
        """Folder of evaluation results, one file for a model on a task."""
        return self.root / "cells"

    @property
    def results(self) -> StoragePath:
        """Results of the main job."""
        return self.root / "results.json"

    def study(self, name: str) -> StoragePath:
        """Return the file of a study's results."""
        return self.root / "results" / f"{name}.json"

    @property
    def finished(self) -> StoragePath:
        """Names the last command that left nothing to do. It promises nothing: files may have changed since."""
        return self.root / ".finished.json"

    @property
    def report(self) -> StoragePath:
        """The page of the run."""
        return self.root / "report.html"

    @property
    def pictures(self) -> StoragePath:
        """Folder of the page's pictures as files."""
        return self.root / "pictures"

    def locked(self) -> AbstractContextManager[None]:
        """Keep other jobs off this run inside the block. Raises ConfigError while another job has it."""
        return lock(self.root)

    def claim(self, config: Config) -> None:
        """Write the resolved config, first of all files. Raises ConfigError if the run was made with another one.

        A run keeps the keys that something in it depends on: those of tasks that have shards or statistics, and where
        there is such a task, those of the model and of all corpora. A command that made nothing binds nothing.
        """
        # Written again even so: keys that may change in a run are those of its last command.
        if made_with := read_json(self.config):
            self._refuse_another(made_with, config)
        write_json(self.config, config.model_dump(mode="json"))

    def _refuse_another(self, made_with: dict[str, Any], config: Config) -> None:
        """Raise ConfigError for the first key on which something in the run depends and which differs."""
        made = [task for task in made_with["tasks"] if self._has_made(task["name"])]
        if not made:
            return

        # Only keys that both have: tasks may be added and left out, and an older version did not know all keys.
        old = flatten({**made_with, "tasks": made})
        new = flatten(config.model_dump(mode="json"))
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key] and _is_fixed(key):
                raise ConfigError(
                    f"{self.root}: was made with {key}={old[key]}, not {new[key]}; choose another run.name"
                )

    def _has_made(self, task: str) -> bool:
        """Return whether something in the run depends on the keys of a task."""
        # The manifest is written after all shards, and statistics may outlive both.
        return (self.shards(task) / "manifest.json").is_file() or self.statistics(task).is_file()


def _is_fixed(key: str) -> bool:
    """Return whether the run's statistics depend on a dotted key."""
    return key in FIXED or (key.startswith(("corpus.", "tasks.")) and not key.endswith(AFTER_STATISTICS))


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Return a dumped config by dotted keys; a task's keys have its name, so that tasks may be added and left out.

    Keys that the config does not have, as one of an older version, are left out.
    """
    flat: dict[str, Any] = {}
    for task in values["tasks"]:
        flat |= {f"tasks.{task['name']}.{key}": value for key, value in task.items()}

    for key, _ in walk(Config):
        section, _, name = key.rpartition(".")
        keys = _section(values, section)
        # Tasks are there already, by their names.
        if key != "tasks" and name in keys:
            flat[key] = keys[name]

    return flat


def _section(values: dict[str, Any], section: str) -> dict[str, Any]:
    """Return a section of a dumped config by its dotted name; empty where it is null or not there."""
    for part in filter(None, section.split(".")):
        values = values.get(part) or {}
    return values


def ratio_name(ratio: float) -> str:
    """Return the folder name of a ratio: 0.5 -> ``0.50``, 0.125 -> ``0.125``."""
    # Two decimals where these are exact, else all of them, so that no two ratios share a name.
    short = f"{ratio:.2f}"
    return short if float(short) == ratio else repr(ratio)


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of JSON-able values: equal for equal values, in every process."""
    # Sorted, since a dict's order says nothing about its content; Python's own hashes differ from process to process.
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
