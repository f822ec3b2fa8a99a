"""Bench: specs at ratios in, judged models out. What every study is made of.

A model of a study is written only for as long as its judging takes; its statistics are the run's, or merged anew from
some of the run's records.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from seap_ray.config import Config, SpeedSection
from seap_ray.errors import ConfigError
from seap_ray.judges.speed import Speed, measure_speeds
from seap_ray.models.checkpoint import Checkpoint, versions
from seap_ray.models.corpus import tokenizer_hash
from seap_ray.models.loading import model_dtype
from seap_ray.models.records import load_statistics
from seap_ray.pipeline.calibrate import Calibration, made_of, make_records, merge_all
from seap_ray.pipeline.evaluate import EvalResult, EvalTarget, EvalTask, Failure, eval_target, eval_task, evaluate
from seap_ray.pipeline.job import CalibratedRun, known_error
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.planner import Planner
from seap_ray.pipeline.prune import PendingCheckpoint, prepare_checkpoint
from seap_ray.pipeline.results import ModelRow, dense_row, pruned_row
from seap_ray.pipeline.shards import Manifest, Shard
from seap_ray.progress import progress, say
from seap_ray.storage.files import read_json, stage, write_json
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import fingerprint


@dataclass(frozen=True)
class Asked:
    """One model of a study: a spec at a ratio, or the dense one, and the tasks that it is judged on."""

    spec: ModelSpec | None = None
    ratio: float = 0.0
    tasks: tuple[str, ...] | None = None
    """None: all."""


@dataclass(frozen=True)
class Judged:
    """A model of a study with its row of the results file."""

    asked: Asked
    model: ModelRow
    cells: dict[str, EvalResult]
    config: dict[str, Any] | None
    """Contents of its config.json; None where there is no such model."""


@dataclass(frozen=True)
class Bench:
    """A calibrated run and the judges of its tasks."""

    made: CalibratedRun
    lm_eval: bool = True
    """Whether lm-eval judges the tasks that it has."""

    @property
    def config(self) -> Config:
        return self.made.config

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.config.tasks)

    @cached_property
    def exams(self) -> dict[str, EvalTask | Failure]:
        """By task; one that cannot be judged says why in all of its cells."""
        return {task.name: self._exam(task) for task in self.config.tasks}

    def _exam(self, task: Any) -> EvalTask | Failure:
        try:
            return eval_task(self.config, self.made.run, task, by_lm_eval=self.lm_eval)
        except Exception as error:  # whatever rows do that are not as the task has it
            failure = Failure.of(known_error(error) or error)
            say(f"cannot judge {task.name}: {failure.error}")
            return failure

    # --- statistics --------------------------------------------------------------------------------------------------

    def manifest(self, task: str) -> Manifest:
        return next(manifest for manifest in self.made.manifests if manifest.task == task)

    def with_parts(self, parts: Mapping[str, Sequence[Shard]]) -> Planner:
        """A planner that also knows statistics by new names, each merged from the records of some shards."""
        planner, run, checkpoint = self.made.planner, self.made.run, self.made.checkpoint
        calibration = Calibration.of(self.config, checkpoint)
        prints = {name: made_of(calibration, shards) for name, shards in parts.items()}
        files = {name: run.part(made[:20]) for name, made in prints.items()}
        shards = list({shard: None for part in parts.values() for shard in part})
        make_records(self.config, checkpoint, run, shards, partial(progress, unit=" tokens"), n_merged=len(parts))
        merge_all(calibration, run, checkpoint, [(files[name], shards) for name, shards in parts.items()])
        found = {name: load_statistics(file, checkpoint.architecture) for name, file in files.items()}
        return replace(
            planner,
            statistics={**planner.statistics, **found},
            made_of={**planner.made_of, **prints},
            files={**planner.files, **files},
        )

    # --- models ------------------------------------------------------------------------------------------------------

    def judge(self, asked: Iterable[Asked], planner: Planner | None = None) -> list[Judged]:
        """Plan, cut and judge every model; one that cannot be planned or judged says why in its cells."""
        asked = list(asked)
        drafts = [self._draft(one, planner or self.made.planner) for one in asked]
        subjects = [self._subject(one, source) for one, source in zip(asked, drafts, strict=True)]
        known = [subject for subject in subjects if subject]
        rows = iter(evaluate(self.config, self.made.run, known, self.exams, progress))
        return [
            self._judged(one, source, next(rows) if subject else {})
            for one, source, subject in zip(asked, drafts, subjects, strict=True)
        ]

    def _draft(self, asked: Asked, planner: Planner) -> Checkpoint | PendingCheckpoint | Failure:
        if asked.spec is None:
            return self.made.checkpoint
        try:
            return prepare_checkpoint(planner, self.made.run, asked.spec, planner.plan(asked.spec, asked.ratio))
        except ConfigError as error:
            return Failure.of(error)

    def _subject(self, asked: Asked, source: Checkpoint | PendingCheckpoint | Failure) -> EvalTarget | None:
        return None if isinstance(source, Failure) else eval_target(source, asked.tasks or self.tasks)

    def _judged(
        self, asked: Asked, source: Checkpoint | PendingCheckpoint | Failure, cells: dict[str, EvalResult]
    ) -> Judged:
        if isinstance(source, Checkpoint):
            return Judged(asked, dense_row(source).with_quality(cells), cells, source.config)
        if isinstance(source, PendingCheckpoint):
            return Judged(asked, pruned_row(source).with_quality(cells), cells, source.compaction.config())
        assert asked.spec is not None
        cells = dict.fromkeys(asked.tasks or self.tasks, source)
        return Judged(asked, _unplanned(asked.spec, asked.ratio).with_quality(cells), cells, None)

    def others(self) -> list[Judged]:
        """The checkpoints of ``evaluation.models``; what cannot be read says so in its cells."""
        known = {name: parse_path(folder).absolute() for name, folder in self.config.evaluation.models.items()}
        found = {name: _opened(folder) for name, folder in known.items()}
        subjects = [
            EvalTarget(name, _print(opened), self.tasks, opened)
            for name, opened in found.items()
            if isinstance(opened, Checkpoint)
        ]
        judged_cells = evaluate(self.config, self.made.run, subjects, self.exams, progress)
        by_name = {subject.name: cells for subject, cells in zip(subjects, judged_cells, strict=True)}
        judged = []
        for name, opened in found.items():
            cells = by_name.get(name, {})
            if isinstance(opened, Failure):
                cells = dict.fromkeys(self.tasks, opened)
            config = opened.config if isinstance(opened, Checkpoint) else None
            judged.append(Judged(Asked(), _other(name, known[name], opened).with_quality(cells), cells, config))
        return judged

    # --- speed -------------------------------------------------------------------------------------------------------

    def with_speed(self, judged: Sequence[Judged]) -> list[Judged]:
        """Add the speed of every model whose config is known; models of equal shapes share a measurement."""
        settings = self.config.evaluation.speed
        if not settings.rounds:
            return list(judged)
        configs = {_shape(one.config): one.config for one in judged if one.config is not None}
        speeds = self._speeds(configs, settings)
        return [
            replace(one, model=replace(one.model, speed=speeds.get(_shape(one.config)))) if one.config else one
            for one in judged
        ]

    def _speeds(self, configs: dict[str, dict[str, Any]], settings: SpeedSection) -> dict[str, Speed]:
        calibration, checkpoint = self.config.calibration, self.made.checkpoint
        dense, dtype = _shape(checkpoint.config), model_dtype(self.config.model, checkpoint)
        place = platform.node(), calibration.num_cpus, calibration.num_gpus, versions()
        made_of = fingerprint(sorted(configs), settings.model_dump(), str(dtype), place)
        path = self.made.run.cells / f"speed-{made_of[:20]}.json"
        stored = read_json(path)
        if not stored:
            say(f"measuring the speed of {len(configs)} shapes in {settings.rounds} rounds")
            measure = ray.remote(num_cpus=calibration.num_cpus, num_gpus=calibration.num_gpus)(_measure_speeds)
            configs = {dense: checkpoint.config, **configs}
            device = "cuda" if calibration.num_gpus else "cpu"
            try:
                speeds = ray.get(measure.remote(configs, settings, dense, dtype, device, calibration.num_cpus))
            except RayError as error:  # too large for the device at this batch, say: what was judged stays
                say(f"speed: not measured; {Failure.of(getattr(error, 'cause', None) or error).error}")
                return {}
            stored = {name: asdict(speed) for name, speed in speeds.items()}
            write_json(path, stored)
        return {name: Speed(**rates) for name, rates in stored.items()}


def _measure_speeds(
    configs: Any, settings: SpeedSection, dense: str, dtype: torch.dtype, device: str, num_cpus: int
) -> dict[str, Speed]:
    torch.set_num_threads(num_cpus)
    return measure_speeds(configs, settings, dense=dense, dtype=dtype, device=device)


def _shape(config: dict[str, Any]) -> str:
    """What a model's speed depends on."""
    keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
        *("head_dim", "attention_bias", "mlp_bias", "vocab_size", "ffn_dim", "model_type"),
    )
    return fingerprint([config.get(key) for key in keys], config.get("per_layer_config") or {})


def _unplanned(spec: ModelSpec, ratio: float) -> ModelRow:
    """The row of a model that cannot be planned: sizes unknown."""
    return ModelRow(
        name=spec.name,
        method=spec.method,
        kind=spec.kind,
        task=spec.task,
        ratio=ratio,
        realised_ratio=None,
        parameters=None,
        bytes=None,
        kv_bytes_per_token=None,
    )


def _opened(folder: StoragePath) -> Checkpoint | Failure:
    try:
        return Checkpoint.at(stage(folder), str(folder))
    except OSError as error:
        return Failure(f"{folder} cannot be read ({error})")
    except ConfigError as error:
        return Failure(str(error).removeprefix("model.source: "))


def _print(checkpoint: Checkpoint) -> str:
    """Of weights and tokenizer: that of a run's own models is the base's, that of others may be any."""
    return fingerprint(checkpoint.fingerprint, tokenizer_hash(checkpoint))


def _other(name: str, folder: StoragePath, opened: Checkpoint | Failure) -> ModelRow:
    """The row of a checkpoint that was made elsewhere."""
    manifest = read_json(folder / "seap.json") or {}
    keys = ("planned_ratio", "realised_ratio", "parameters", "bytes", "kv_bytes_per_token")
    sizes: dict[str, Any] = {key: manifest.get(key) for key in keys}
    if isinstance(opened, Checkpoint):
        sizes |= {"parameters": opened.parameters, "bytes": opened.n_bytes}
    ratio = manifest.get("requested_ratio")
    return ModelRow(name, name, kind="baseline", task=None, ratio=ratio, folder=str(folder), **sizes)
