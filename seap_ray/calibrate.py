"""Calibrate: shards in, one record of moments per (task, shard), merged statistics out. Ray Data runs the model.

A record is replaced, never added to: an actor that is killed, or a row that Ray delivers twice, changes nothing. What
is whole is reused, so the same command resumes whatever was cut short. Records are merged in a tree whose shape depends
on the number of shards alone: the same bytes for any number of workers, with or without faults.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from seap_ray.architecture import Architecture
from seap_ray.checkpoint import Checkpoint
from seap_ray.config import Config, ModelSection
from seap_ray.errors import ConfigError, DataError, IncompleteError
from seap_ray.moments import RECORDED, Moments, Site, Statistics, tree_sum
from seap_ray.recorder import record
from seap_ray.records import is_whole, read_moments, save_moments, sites_of
from seap_ray.run import Run, fingerprint
from seap_ray.shards import Manifest, Shard

SCHEMA = 2
"""Version of the record's contents; raise it when the numbers change."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a record depends on besides its shard."""

    model: str
    """Fingerprint of the checkpoint."""
    dtype: str
    skip_first_token: bool
    batch_tokens: int
    schema: int = SCHEMA

    @classmethod
    def of(cls, config: Config, checkpoint: Checkpoint) -> "Calibration":
        calibration = config.calibration
        return cls(
            checkpoint.fingerprint,
            str(model_dtype(config.model, checkpoint)),
            calibration.skip_first_token,
            calibration.batch_tokens,
        )

    def fingerprint(self, shard: Shard) -> str:
        parts = (self.model, self.dtype, self.skip_first_token, self.batch_tokens, self.schema)
        return fingerprint(parts, shard.sha256, RECORDED)

    def record(self, run: Run, shard: Shard) -> Path:
        return run.records(shard.task) / f"{shard.shard}-{self.fingerprint(shard)[:12]}.safetensors"

    def tokens(self, shard: Shard) -> int:
        return shard.n_tokens - self.skip_first_token * shard.n_sequences


def model_dtype(model: ModelSection, checkpoint: Checkpoint) -> torch.dtype:
    """The type to compute in; ``auto`` is the one in the model's config."""
    name = model.dtype
    if name == "auto":
        name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    return getattr(torch, name)


def load_model(config: Config, base: Checkpoint, folder: Path) -> PreTrainedModel:
    """The model in ``folder``, the base or one cut from it, in evaluation mode on this worker's device."""
    torch.set_num_threads(config.calibration.num_cpus)  # sums, and so bytes, depend on the number of threads
    transformers_logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=model_dtype(config.model, base),
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
    )
    return loaded.to("cuda" if config.calibration.num_gpus else "cpu").eval()


# --- the actors ------------------------------------------------------------------------------------------------------


class Calibrator:
    """A Ray Data actor that holds the model: a shard's descriptor in, its record on storage, one small row out."""

    def __init__(self, config: Config, calibration: Calibration, run: Run):
        self.config, self.calibration, self.run = config, calibration, run
        checkpoint = Checkpoint.open(config.model.source, config.model.revision)
        if checkpoint.fingerprint != calibration.model:
            raise ConfigError(f"model.source: {checkpoint.folder} differs between the nodes of this cluster")
        self.model = load_model(config, checkpoint, checkpoint.folder)

    def __call__(self, rows: pa.Table) -> pa.Table:
        for shard in (Shard(**row) for row in rows.to_pylist()):
            self._measure(shard)
        return rows.select(["task", "shard", "n_tokens"])

    def _measure(self, shard: Shard) -> None:
        settings = self.config.calibration
        sequences = shard.sequences(self.run)
        try:
            moments = record(
                self.model,
                sequences,
                batch_tokens=settings.batch_tokens,
                skip_first_token=settings.skip_first_token,
            )
        except DataError as error:
            raise DataError(f"shard {shard.task}/{shard.shard}: {error}") from None
        save_moments(
            self.calibration.record(self.run, shard),
            moments,
            task=shard.task,
            shard=shard.shard,
            fingerprint=self.calibration.fingerprint(shard),
        )


def calibrate(
    config: Config,
    checkpoint: Checkpoint,
    run: Run,
    manifests: list[Manifest],
    progress: Callable[[Iterable[int], int, str], Iterable[int]],
) -> dict[str, Path]:
    """Make what records are missing, merge every task's, and return the statistics' files by task.

    Raises IncompleteError when records are missing afterwards, DataError for activations that are not finite.
    """
    calibration = Calibration.of(config, checkpoint)
    missing = [shard for manifest in manifests for shard in manifest.shards if not _has(calibration, run, shard)]
    if missing:
        total = sum(shard.n_tokens for shard in missing)
        for _ in progress(_measure_all(config, calibration, run, missing), total, "calibrating"):
            pass
    merge = ray.remote(merge_records)
    paths = ray.get([merge.remote(calibration, run, m, checkpoint.architecture) for m in manifests])
    return {manifest.task: path for manifest, path in zip(manifests, paths, strict=True)}


def _has(calibration: Calibration, run: Run, shard: Shard) -> bool:
    return is_whole(calibration.record(run, shard), fingerprint=calibration.fingerprint(shard))


def _measure_all(config: Config, calibration: Calibration, run: Run, missing: list[Shard]) -> Iterator[int]:
    """Yield the tokens of each shard as its record is done."""
    settings = config.calibration
    workers = n_workers(config, len(missing))
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # a large model's first shard may take longer than the default 30 min
    context.max_consecutive_actor_init_deaths = 2 * workers
    rows = ray.data.from_items(
        [{name: getattr(shard, name) for name in Shard.__slots__} for shard in missing],
        override_num_blocks=len(missing),
    )
    measured = rows.map_batches(
        Calibrator,
        fn_constructor_args=(config, calibration, run),
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
    )
    for row in measured.iter_rows():
        yield row["n_tokens"]


def n_workers(config: Config, n_shards: int) -> int:
    """Replicas that the cluster holds. Raises ConfigError when it holds none, or fewer than the config asks for."""
    settings, has = config.calibration, ray.cluster_resources()
    room = int(has.get("CPU", 0) // settings.num_cpus)
    if settings.num_gpus:
        room = min(room, int(has.get("GPU", 0) // settings.num_gpus))
    wanted = 1 if settings.workers == "auto" else settings.workers
    if room < wanted:
        raise ConfigError(
            f"calibration.workers: {wanted} of {settings.num_cpus} CPUs and {settings.num_gpus:g} GPUs do not fit the "
            f"cluster's {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
        )
    return min(room, n_shards) if settings.workers == "auto" else wanted


def merge_records(calibration: Calibration, run: Run, manifest: Manifest, architecture: Architecture) -> Path:
    """Merge a task's records, site by site, and write its statistics unless they are there already."""
    path = run.statistics(manifest.task)
    made_of = fingerprint([calibration.fingerprint(shard) for shard in manifest.shards])
    if is_whole(path, made_of=made_of):
        return path
    records = [calibration.record(run, shard) for shard in manifest.shards]
    lost = [record.name for record in records if not record.is_file()]
    if lost:
        raise IncompleteError(
            f"{manifest.task}: {len(lost)} records are missing ({lost[0]}, ...); run the command again"
        )
    save_moments(path, merged(calibration, run, manifest.shards, architecture), task=manifest.task, made_of=made_of)
    return path


def merged(calibration: Calibration, run: Run, shards: Sequence[Shard], architecture: Architecture) -> Statistics:
    """Statistics of some shards of a task, from their records. Raises DataError when a token is missing."""
    records = [calibration.record(run, shard) for shard in shards]
    statistics = {key: tree_sum(_moments_of(record, key) for record in records) for key in sites_of(architecture)}
    tokens = sum(calibration.tokens(shard) for shard in shards)
    for (layer, site), moments in statistics.items():
        if moments.count != tokens:
            raise DataError(
                f"{shards[0].task}: layer {layer}, {site}: {moments.count} tokens, the manifest has {tokens}"
            )
    return statistics


def _moments_of(record: Path, key: tuple[int, Site]) -> Moments:
    with safe_open(record, "pt") as file:
        return read_moments(file, key)
