"""Study runner: specs at ratios in, evaluated models out. Every study is made of this.

A model of a study is written only for as long as its evaluation takes. Its statistics are the run's, or merged anew
from some of the run's records.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from seap_ray.models.model_sources import parse_model_source
from seap_ray.models.records import load_statistics
from seap_ray.pipeline.calibrate import make_records
from seap_ray.pipeline.checkpoint_writer import PendingCheckpoint, prepare_checkpoint
from seap_ray.pipeline.cluster import remote_task
from seap_ray.pipeline.divergences import held_out_shard
from seap_ray.pipeline.error_correction import correct_models
from seap_ray.pipeline.evaluate import EvalResult, EvalTarget, EvalTask, Failure, eval_target, eval_task, evaluate
from seap_ray.pipeline.job import CalibratedRun
from seap_ray.pipeline.merge import TaskStatistics, merge_all
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.plan_choice import PlanChooser, PlannedModel
from seap_ray.pipeline.planner import Planner
from seap_ray.pipeline.ray_errors import known_error
from seap_ray.pipeline.results import dense_row, pruned_row, quality_cells
from seap_ray.pipeline.shard_records import ShardRecords
from seap_ray.pipeline.shards import Manifest, Shard
from seap_ray.progress import progress, say
from seap_ray.report.rows import ModelRow, SpeedCell
from seap_ray.report.table import mean_head
from seap_ray.storage.artifact import Artifact, JsonFile
from seap_ray.storage.files import read_json, stage, write_json
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import fingerprint
from seap_ray.tasks import Task

SourceOrFailure = Checkpoint | PendingCheckpoint | Failure
"""Where a model of a study comes from, or why there is no such model."""
HfConfig = dict[str, Any]
"""Contents of a model's config.json."""


@dataclass(frozen=True)
class ModelRequest:
    """One model of a study, the dense one or a spec at a ratio, and the tasks that it is to be judged on."""

    spec: ModelSpec | None = None
    """None: the dense model."""
    ratio: float = 0.0
    tasks: tuple[str, ...] | None = None
    """Names of the tasks; None: all."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of a study that was judged: its row of the results file, and what the row leaves out."""

    row: ModelRow
    config: HfConfig | None
    """What its speed depends on; None where there is no such model."""
    results: Mapping[str, EvalResult] = field(default_factory=dict)
    """By task, with each item's part in it."""

    @classmethod
    def of(cls, row: ModelRow, config: HfConfig | None, results: Mapping[str, EvalResult]) -> "EvaluatedModel":
        """Add the results to a row that has none yet."""
        return cls(replace(row, quality=quality_cells(results)), config, results)

    def beside(self, dense: "EvaluatedModel") -> "EvaluatedModel":
        """Add the differences to the dense model."""
        return replace(self, row=replace(self.row, quality=quality_cells(self.results, dense.results)))


@dataclass(frozen=True)
class StudyRunner:
    """A calibrated run and the judges of its tasks."""

    calibrated: CalibratedRun
    lm_eval: bool = True
    """Whether lm-eval judges the tasks that it has."""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.calibrated.config

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the run's tasks."""
        return tuple(task.name for task in self.config.tasks)

    @property
    def mean_head(self) -> str:
        """Name of the column of the mean over the tasks that can be judged."""
        judged = [task for task in self.eval_tasks.values() if isinstance(task, EvalTask)]
        return mean_head(task.metric for task in judged)

    @cached_property
    def eval_tasks(self) -> dict[str, EvalTask | Failure]:
        """The run's tasks with their judges; a failure where a task cannot be judged, which is then every result."""
        return {task.name: self._eval_task(task) for task in self.config.tasks}

    def _eval_task(self, task: Task) -> EvalTask | Failure:
        try:
            return eval_task(self.config, self.calibrated.run, task, by_lm_eval=self.lm_eval)
        except Exception as error:
            # Rows that are not as the task describes them raise whatever they raise, and cost that task only.
            failure = Failure.of(known_error(error) or error)
            say(f"cannot judge {task.name}: {failure.error}")
            return failure

    # --- statistics --------------------------------------------------------------------------------------------------

    def manifest(self, task: str) -> Manifest:
        """Return the manifest of a task's shards."""
        return next(manifest for manifest in self.calibrated.manifests if manifest.task == task)

    def planner_with_parts(self, parts: Mapping[str, Sequence[Shard]]) -> Planner:
        """Return a planner that also knows statistics by new names, each merged from the records of some shards."""
        planner = self.calibrated.planner
        run = self.calibrated.run
        checkpoint = self.calibrated.checkpoint
        records = ShardRecords.of(self.config, checkpoint, run)

        # The files of parts are named by what they are made from, so that studies share them.
        keys = {name: records.merged_key(shards) for name, shards in parts.items()}
        files = {name: run.part(key[:20]) for name, key in keys.items()}

        # A shard that several parts have is recorded once.
        shards = _distinct(parts.values())
        make_records(self.config, records, shards, progress, n_merged=len(parts))
        merge_all([TaskStatistics(records, shards, files[name]) for name, shards in parts.items()], checkpoint)

        held_out = {name: held_out_shard(records, shards) for name, shards in parts.items()}
        merged = {name: load_statistics(file, checkpoint.architecture) for name, file in files.items()}
        return replace(
            planner,
            statistics={**planner.statistics, **merged},
            statistics_keys={**planner.statistics_keys, **keys},
            statistics_files={**planner.statistics_files, **files},
            held_out={**planner.held_out, **held_out},
        )

    # --- models ------------------------------------------------------------------------------------------------------

    def evaluate_models(self, requests: Iterable[ModelRequest], planner: Planner | None = None) -> list[EvaluatedModel]:
        """Plan, prune and judge every model, in order; one that cannot be says why in its results."""
        requests = list(requests)

        # All are planned first, because all are judged together, side by side on the cluster.
        sources = self._sources(requests, planner or self.calibrated.planner)
        tasks = [request.tasks or self.task_names for request in requests]

        # What cannot be planned is no target.
        targets = [
            eval_target(source, names)
            for source, names in zip(sources, tasks, strict=True)
            if not isinstance(source, Failure)
        ]

        # Results come in the order of the targets, so each source that is one takes the next result.
        judged = iter(self._evaluate(targets))
        models = []
        for request, source, names in zip(requests, sources, tasks, strict=True):
            if isinstance(source, Failure):
                results: dict[str, EvalResult] = dict.fromkeys(names, source)
            else:
                results = next(judged)
            models.append(_evaluated_model(request, source, results))
        return models

    def _sources(self, requests: Sequence[ModelRequest], planner: Planner) -> list[SourceOrFailure]:
        """Return where each model comes from: the dense one's folder, or a planned checkpoint."""
        chooser = PlanChooser(planner, progress)
        planned = [_planned(request, chooser) for request in requests]

        # Corrections of all models are fitted side by side.
        models = [model for model in planned if isinstance(model, PlannedModel)]
        corrected = iter(correct_models(planner, models, progress))

        sources: list[SourceOrFailure] = []
        for model in planned:
            if model is None:
                sources.append(self.calibrated.checkpoint)
            elif isinstance(model, Failure):
                sources.append(model)
            else:
                sources.append(prepare_checkpoint(next(corrected), self.config.export, self.calibrated.run))
        return sources

    def _evaluate(self, targets: Sequence[EvalTarget]) -> list[dict[str, EvalResult]]:
        return evaluate(self.config, self.calibrated.run, targets, self.eval_tasks, progress)

    def evaluate_checkpoints(self) -> list[EvaluatedModel]:
        """Judge the checkpoints of ``evaluation.models``; one that cannot be read says so in its results."""
        folders = {name: parse_path(path).absolute() for name, path in self.config.evaluation.models.items()}
        opened = {name: _open(folder) for name, folder in folders.items()}

        # What cannot be read is no target, so each other checkpoint takes the next result.
        targets = [
            EvalTarget(name, _fingerprint(checkpoint), self.task_names, checkpoint)
            for name, checkpoint in opened.items()
            if isinstance(checkpoint, Checkpoint)
        ]

        judged = iter(self._evaluate(targets))
        models = []
        for name, checkpoint in opened.items():
            if isinstance(checkpoint, Failure):
                results: dict[str, EvalResult] = dict.fromkeys(self.task_names, checkpoint)
                config = None
            else:
                results = next(judged)
                config = checkpoint.config

            row = _checkpoint_row(name, folders[name], checkpoint)
            models.append(EvaluatedModel.of(row, config, results))
        return models

    # --- speed -------------------------------------------------------------------------------------------------------

    def with_speed(self, models: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
        """Add the speed of every model whose config is known; models of equal shapes share a measurement."""
        if not self.config.evaluation.speed.rounds:
            return list(models)

        configs = {_shape(model.config): model.config for model in models if model.config}
        speeds = self._speeds(configs)

        timed = []
        for model in models:
            if model.config:
                row = replace(model.row, speed=speeds.get(_shape(model.config)))
                model = replace(model, row=row)
            timed.append(model)
        return timed

    def _speeds(self, configs: dict[str, HfConfig]) -> dict[str, SpeedCell]:
        """Return speeds by shape: those that were stored, or measured now; none where they cannot be measured."""
        calibration = self.config.calibration
        # What was measured on another machine, or with other versions, is measured again.
        machine = platform.node(), calibration.num_cpus, calibration.num_gpus, versions()
        dtype = model_dtype(self.config.model, self.calibrated.checkpoint)
        settings = self.config.evaluation.speed.model_dump()
        # All shapes are measured together, so another set of shapes is another measurement.
        key = fingerprint(sorted(configs), settings, str(dtype), machine)

        path = self.calibrated.run.cells / f"speed-{key[:20]}.json"
        stored: Artifact[dict[str, Any]] = Artifact(path, key, JsonFile(key_in_name=True))

        try:
            rates_by_shape = stored.get(partial(self._measure_speeds, configs, dtype, path))
        except RayError as error:
            # A model may be too large for the device at this batch; what was judged stays.
            say(f"speed: not measured; {Failure.of(getattr(error, 'cause', None) or error).error}")
            return {}
        return {shape: SpeedCell(**rates) for shape, rates in rates_by_shape.items()}

    def _measure_speeds(self, configs: dict[str, HfConfig], dtype: torch.dtype, path: StoragePath) -> None:
        calibration = self.config.calibration
        settings = self.config.evaluation.speed
        say(f"measuring the speed of {len(configs)} shapes in {settings.rounds} rounds")

        dense = self.calibrated.checkpoint.config
        # In a task, as large as a worker's, so that the driver needs no GPU.
        measure = remote_task(_measure_in_worker, num_cpus=calibration.num_cpus, num_gpus=calibration.num_gpus)
        speeds = ray.get(
            measure.remote(
                # The speed-ups are those over the dense model, which has to be measured too.
                {_shape(dense): dense, **configs},
                settings,
                _shape(dense),
                dtype,
                "cuda" if calibration.num_gpus else "cpu",
                calibration.num_cpus,
            )
        )

        write_json(path, {shape: asdict(speed) for shape, speed in speeds.items()})


def _measure_in_worker(
    configs: Any, settings: SpeedSection, dense: str, dtype: torch.dtype, device: str, num_cpus: int
) -> dict[str, Speed]:
    torch.set_num_threads(num_cpus)
    return measure_speeds(configs, settings, dense=dense, dtype=dtype, device=device)


def _distinct(parts: Iterable[Sequence[Shard]]) -> list[Shard]:
    """Return the shards of all parts, each once, in the order of first appearance."""
    shards: dict[Shard, None] = {}
    for part in parts:
        shards |= dict.fromkeys(part)
    return list(shards)


def _shape(config: HfConfig) -> str:
    """Return a fingerprint of what a model's speed depends on."""
    # Depth and widths by the names of all families, and what adds weights or work to a layer.
    keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
        *("head_dim", "attention_bias", "mlp_bias", "vocab_size", "ffn_dim", "model_type"),
    )
    return fingerprint([config.get(key) for key in keys], config.get("per_layer_config") or {})


# --- rows of the results file ----------------------------------------------------------------------------------------


def _planned(request: ModelRequest, chooser: PlanChooser) -> PlannedModel | Failure | None:
    """Return the model that a request asks for, or why there is none; None for the dense one."""
    if request.spec is None:
        return None
    try:
        return chooser.plan_model(request.spec, request.ratio)
    except ConfigError as error:
        # A ratio that this spec cannot meet is a result, not the end of the study.
        return Failure.of(error)


def _evaluated_model(request: ModelRequest, source: SourceOrFailure, results: dict[str, EvalResult]) -> EvaluatedModel:
    if isinstance(source, Checkpoint):
        return EvaluatedModel.of(dense_row(source), source.config, results)
    if isinstance(source, PendingCheckpoint):
        return EvaluatedModel.of(pruned_row(source), source.export.config(), results)

    # No sizes are known of a model that cannot be planned.
    spec = request.spec
    assert spec is not None, "the dense model needs no plan, so it cannot fail here"
    row = ModelRow(spec.name, spec.method, spec.kind, spec.task, request.ratio)
    return EvaluatedModel.of(row, None, results)


def _checkpoint_row(name: str, folder: StoragePath, opened: Checkpoint | Failure) -> ModelRow:
    """Return the row of a checkpoint that was made elsewhere."""
    # One that seap_ray did not make has no manifest.
    manifest = read_json(folder / "seap.json") or {}
    keys = ("planned_ratio", "realised_ratio", "parameters", "bytes", "kv_bytes_per_token")
    sizes: dict[str, Any] = {key: manifest.get(key) for key in keys}
    # Its weights are counted, whatever its manifest says.
    if isinstance(opened, Checkpoint):
        sizes |= {"parameters": opened.parameters, "bytes": opened.n_bytes}

    ratio = manifest.get("requested_ratio")
    return ModelRow(name, name, kind="baseline", ratio=ratio, folder=str(folder), **sizes)


def _open(folder: StoragePath) -> Checkpoint | Failure:
    try:
        return Checkpoint.at(stage(folder), parse_model_source(str(folder)))
    except OSError as error:
        return Failure(f"{folder} cannot be read ({error})")
    except ConfigError as error:
        # The folder is one of evaluation.models, so another key is at fault than the message names.
        return Failure(str(error).removeprefix("model.source: "), error.exit_code)


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Return the hash of weights and tokenizer: a run's own models have the base's tokenizer, others may have any."""
    return fingerprint(checkpoint.fingerprint, tokenizer_hash(checkpoint))
