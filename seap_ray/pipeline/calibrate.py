"""Calibrate: shards in, one record per (task, shard), merged statistics out. Ray Data runs the model.

A record is replaced, never added to: an actor that is killed, or a row that Ray delivers twice, changes nothing. What
is whole is reused, so the same command resumes whatever was cut short. Records are merged in a tree whose shape depends
on the number of shards alone: the same bytes for any number of workers, with or without faults. Covariances go the
same way, layer by layer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import RECORDED, SITES, Covariance, Moments, Site, tree_sum
from seap_ray.core.reconstruction import USUAL_RIDGE, choose_ridge
from seap_ray.errors import ConfigError, DataError, IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.forward import make_runner
from seap_ray.models.loading import model_dtype
from seap_ray.models.recorder import SiteMoments
from seap_ray.models.records import (
    covariance_bytes,
    covariance_file,
    is_whole,
    load_covariance,
    open_tensors,
    read_moments,
    save_covariances,
    save_moments,
    sites_of,
    task_memory,
)
from seap_ray.pipeline.cluster import work_task, working_nodes
from seap_ray.pipeline.placement import workers_that_fit
from seap_ray.pipeline.shards import Manifest, Shard
from seap_ray.storage.files import atomic_write, writable
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

SCHEMA = 3
"""Version of the record's contents; raise it when the numbers change."""
RECORDS_HELD = 2
"""Records in memory while many are merged; opening a file costs more than what is read of it if that is little."""
SHARDS_TOGETHER = 32
"""Shards that pass through a streamed model together, at most."""
ATTEMPTS = 3
"""Times that a shard may end its worker's process before it is given up: Ray itself would try for ever."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a record depends on besides its shard."""

    model: str
    """Fingerprint of the checkpoint."""
    dtype: str
    skip_first_token: bool
    batch_tokens: int
    covariance: bool = False
    """Whether covariances are recorded, too; the moments are the same bytes either way."""
    schema: int = SCHEMA

    @classmethod
    def of(cls, config: Config, checkpoint: Checkpoint) -> "Calibration":
        calibration = config.calibration
        return cls(
            checkpoint.fingerprint,
            str(model_dtype(config.model, checkpoint)),
            calibration.skip_first_token,
            calibration.batch_tokens,
            calibration.statistics == "covariance",
        )

    def fingerprint(self, shard: Shard) -> str:
        parts = (self.model, self.dtype, self.skip_first_token, self.batch_tokens, self.schema)
        return fingerprint(parts, shard.sha256, RECORDED)

    def record(self, run: Run, shard: Shard) -> StoragePath:
        return run.records(shard.task) / f"{shard.shard}-{self.fingerprint(shard)[:12]}.safetensors"

    def tried(self, run: Run, shard: Shard) -> StoragePath:
        """A file with a byte for each attempt at a record: it outlives the process, and goes when an attempt ends."""
        record = self.record(run, shard)
        return record.with_name(f".{record.stem}.tried")

    def attempts(self, run: Run, shard: Shard) -> int:
        path = self.tried(run, shard)
        return path.stat().st_size if path.exists() else 0

    def is_whole(self, moments: StoragePath, architecture: Architecture, **expected: Any) -> bool:
        """Whether a record or a task's statistics are there, with their covariances where those are asked for."""
        layers = range(architecture.n_layers * self.covariance)
        files = [moments, *(covariance_file(moments, layer) for layer in layers)]
        return all(file.is_file() for file in files) and all(is_whole(file, **expected) for file in files)

    def tokens(self, shard: Shard) -> int:
        return shard.n_tokens - self.skip_first_token * shard.n_sequences


# --- the actors ------------------------------------------------------------------------------------------------------


class Calibrator:
    """A Ray Data actor that has the model: shards' descriptors in, their records on storage, a number of tokens out."""

    def __init__(self, config: Config, calibration: Calibration, run: Run):
        self.calibration, self.run = calibration, run
        checkpoint = Checkpoint.open(config.model.source, config.model.revision)
        if checkpoint.fingerprint != calibration.model:
            raise ConfigError(f"model.source: {checkpoint.folder} differs between the nodes of this cluster")
        self.architecture = checkpoint.architecture
        self.runner = make_runner(config, checkpoint)

    def __call__(self, rows: pa.Table) -> pa.Table:
        shards = [[Shard(**shard) for shard in row["shards"]] for row in rows.to_pylist()]
        for together in shards:
            self._attempt(together)
        return pa.table({"n_tokens": [sum(shard.n_tokens for shard in together) for together in shards]})

    def _attempt(self, together: list[Shard]) -> None:
        """Measure shards together; the last time each alone, so that one that ends processes costs no other."""
        parts = [together]
        if max(self.calibration.attempts(self.run, shard) for shard in together) >= ATTEMPTS - 1:
            missing = [shard for shard in together if not _has(self.calibration, self.run, shard, self.architecture)]
            parts = [[shard] for shard in missing if self.calibration.attempts(self.run, shard) < ATTEMPTS]
        for part in parts:
            tried = [self.calibration.tried(self.run, shard) for shard in part]
            try:
                for shard, path in zip(part, tried, strict=True):
                    with atomic_write(path) as temporary:
                        temporary.write_bytes(b"." * (self.calibration.attempts(self.run, shard) + 1))
                self._measure(part)
            finally:
                for path in tried:
                    with writable(path):
                        path.unlink(missing_ok=True)

    def _measure(self, together: list[Shard]) -> None:
        shards = {f"{shard.task}/{shard.shard}": shard for shard in together}
        moments: dict[str, SiteMoments] = {name: {} for name in shards}
        for name, recorded in self.runner.record({name: shard.sequences(self.run) for name, shard in shards.items()}):
            self._save_covariances(shards[name], recorded)
            moments[name] |= {key: Moments(of.count, of.mean_D, of.m2_D) for key, of in recorded.items()}
        for name, shard in shards.items():
            path, made_of_shard = self.calibration.record(self.run, shard), self.calibration.fingerprint(shard)
            save_moments(path, moments[name], task=shard.task, shard=shard.shard, fingerprint=made_of_shard)

    def _save_covariances(self, shard: Shard, recorded: SiteMoments) -> None:
        path, made_of_shard = self.calibration.record(self.run, shard), self.calibration.fingerprint(shard)
        of = {key: found for key, found in recorded.items() if isinstance(found, Covariance)}
        for layer in sorted({layer for layer, _ in of}):
            save_covariances(path, layer, {site: of[layer, site] for site in SITES}, fingerprint=made_of_shard)


# --- the job ---------------------------------------------------------------------------------------------------------


def calibrate(
    config: Config,
    checkpoint: Checkpoint,
    run: Run,
    manifests: list[Manifest],
    progress: Callable[[Iterable[int], int, str], Iterable[int]],
) -> dict[str, StoragePath]:
    """Make what records are missing, merge every task's, and return the statistics' files by task.

    Raises IncompleteError when records are missing afterwards, DataError for activations that are not finite.
    """
    calibration = Calibration.of(config, checkpoint)
    stale = _stale(calibration, run, manifests, checkpoint.architecture)
    shards = [shard for manifest in stale for shard in manifest.shards]
    make_records(config, checkpoint, run, shards, progress, n_merged=len(stale))
    merge_all(calibration, run, checkpoint, [(run.statistics(m.task), m.shards) for m in stale])
    return {manifest.task: run.statistics(manifest.task) for manifest in manifests}


def make_records(
    config: Config,
    checkpoint: Checkpoint,
    run: Run,
    shards: list[Shard],
    progress: Callable[[Iterable[int], int, str], Iterable[int]],
    *,
    n_merged: int,
) -> None:
    """Make what records of these shards are missing; ``n_merged`` statistics will be made from them."""
    calibration, architecture = Calibration.of(config, checkpoint), checkpoint.architecture
    missing = _missing(calibration, run, shards, architecture)
    if calibration.covariance:
        check_memory(architecture)
        _check_room(run, architecture, n_files=len(missing) + n_merged)
    if missing:
        for shard in missing:
            with writable(run.root):
                calibration.tried(run, shard).unlink(missing_ok=True)
        total = sum(shard.n_tokens for shard in missing)
        for _ in progress(_measure_all(config, calibration, run, missing), total, "calibrating"):
            pass


def check_memory(architecture: Architecture) -> None:
    """Raises ConfigError when no node could ever run a task on one layer's covariances: Ray would wait for one."""
    largest = max((node["Resources"].get("memory", 0) for node in working_nodes()), default=0)
    if (needed := task_memory(architecture)) > largest:
        raise ConfigError(
            f"calibration.statistics: covariance needs a node with {needed / 1e9:.1f} GB of memory for tasks, and the "
            f"largest has {largest / 1e9:.1f}; use moments, with pruning.score=wifv pruning.compensation=mean"
        )


def _check_room(run: Run, architecture: Architecture, *, n_files: int) -> None:
    """Raises IncompleteError when the covariances will not fit the disk: a triangle for each shard and task to come."""
    needed = n_files * architecture.n_layers * covariance_bytes(architecture) // 2
    run.root.mkdir(parents=True, exist_ok=True)
    free = run.root.free_bytes()
    if needed > free:
        raise IncompleteError(
            f"calibration.statistics: covariance takes {needed / 1e9:.1f} GB under {run.root}, which has "
            f"{free / 1e9:.1f} ({n_files} shards and tasks); make room and run the same command again, raise "
            "corpus.shard_sequences, or use moments, with pruning.score=wifv pruning.compensation=mean"
        )


def _stale(calibration: Calibration, run: Run, manifests: list[Manifest], architecture: Architecture) -> list[Manifest]:
    """Tasks whose statistics are not there, or not of these shards, or damaged."""
    check = work_task(_is_merged)
    found = ray.get([check.remote(calibration, run, manifest, architecture) for manifest in manifests])
    return [manifest for manifest, whole in zip(manifests, found, strict=True) if not whole]


def _is_merged(calibration: Calibration, run: Run, manifest: Manifest, architecture: Architecture) -> bool:
    made = made_of(calibration, manifest.shards)
    return calibration.is_whole(run.statistics(manifest.task), architecture, made_of=made)


def _missing(calibration: Calibration, run: Run, shards: list[Shard], architecture: Architecture) -> list[Shard]:
    """Shards without a whole record."""
    check = work_task(_has)
    found = ray.get([check.remote(calibration, run, shard, architecture) for shard in shards])
    return [shard for shard, whole in zip(shards, found, strict=True) if not whole]


def _has(calibration: Calibration, run: Run, shard: Shard, architecture: Architecture) -> bool:
    record = calibration.record(run, shard)
    return calibration.is_whole(record, architecture, fingerprint=calibration.fingerprint(shard))


def _measure_all(config: Config, calibration: Calibration, run: Run, missing: list[Shard]) -> Iterator[int]:
    """Yield the tokens of each group of shards as their records are done."""
    settings = config.calibration
    workers = n_workers(config, len(missing))
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # a large model's first shard may take longer than the default 30 min
    context.max_consecutive_actor_init_deaths = 2 * workers
    together = settings.stream_tokens if settings.placement == "stream" else 0
    groups = grouped(missing, together, workers)
    rows = ray.data.from_items(
        [{"shards": [asdict(shard) for shard in group]} for group in groups], override_num_blocks=len(groups)
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


def grouped(shards: list[Shard], max_tokens: int, workers: int) -> list[list[Shard]]:
    """Neighbours together, up to ``max_tokens``, but no fewer groups than workers if the shards allow it.

    A worker keeps the moments of a whole group, so it has ``SHARDS_TOGETHER`` at most.
    """
    most = min(SHARDS_TOGETHER, -(-len(shards) // workers))
    groups: list[list[Shard]] = []
    for shard in shards:
        fits = groups and len(groups[-1]) < most
        if fits and sum(one.n_tokens for one in groups[-1]) + shard.n_tokens <= max_tokens:
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return groups


def n_workers(config: Config, n_shards: int) -> int:
    """Replicas that the cluster holds. Raises ConfigError when it holds none, or fewer than the config asks for."""
    settings, has = config.calibration, ray.cluster_resources()
    room = sum(workers_that_fit(node["Resources"], settings) for node in ray.nodes() if node["Alive"])
    wanted = 1 if settings.workers == "auto" else settings.workers
    if room < wanted:
        raise ConfigError(
            f"calibration.workers: {wanted} of {settings.num_cpus} CPUs and {settings.num_gpus:g} GPUs do not fit the "
            f"nodes of the cluster, {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs in all"
        )
    return min(room, n_shards) if settings.workers == "auto" else wanted


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_all(
    calibration: Calibration, run: Run, checkpoint: Checkpoint, targets: Sequence[tuple[StoragePath, Sequence[Shard]]]
) -> None:
    """Merge the records of the shards of every target; what is there already stays. A Ray task a file.

    Raises IncompleteError when records are missing, DataError when a token is.
    """
    architecture, moments = checkpoint.architecture, work_task(merge_records)
    ray.get([moments.remote(calibration, run, shards, architecture, path) for path, shards in targets])
    if calibration.covariance:
        layers = work_task(merge_layer, memory=task_memory(architecture))
        ray.get(
            [
                layers.remote(calibration, run, shards, checkpoint, path, layer)
                for path, shards in targets
                for layer in range(architecture.n_layers)
            ]
        )


def made_of(calibration: Calibration, shards: Sequence[Shard]) -> str:
    """Fingerprint of the statistics of some shards."""
    return fingerprint([calibration.fingerprint(shard) for shard in shards])


def merge_records(
    calibration: Calibration, run: Run, shards: Sequence[Shard], architecture: Architecture, path: StoragePath
) -> None:
    """Merge the moments of some shards of a task, site by site, and write them unless they are there already."""
    if is_whole(path, made_of=made_of(calibration, shards)):
        return
    records = _records(calibration, run, shards)
    statistics: SiteMoments = {}
    for keys in _key_groups([*sites_of(architecture)], len(records)):
        merged: SiteMoments = tree_sum((_moments_of(record, keys) for record in records), _added)
        statistics |= merged
    tokens = sum(calibration.tokens(shard) for shard in shards)
    for layer in range(architecture.n_layers):
        for site in RECORDED:
            parts = architecture.sites(site)
            count, times = sum(statistics[layer, one].count for one in parts), 1
            if len(parts) > 1:  # a token goes to several experts
                times = architecture.experts_per_token
            if count != times * tokens:
                raise DataError(f"{shards[0].task}: layer {layer}, {site}: {count} tokens, the manifest has {tokens}")
    save_moments(path, statistics, task=shards[0].task, made_of=made_of(calibration, shards))


def _records(calibration: Calibration, run: Run, shards: Sequence[Shard]) -> list[StoragePath]:
    """Raises IncompleteError when one is missing, and says so of a shard that was given up."""
    task, without = shards[0].task, [shard for shard in shards if not calibration.record(run, shard).is_file()]
    if poison := [shard for shard in without if calibration.attempts(run, shard) >= ATTEMPTS]:
        names = ", ".join(shard.shard for shard in poison)
        raise IncompleteError(
            f"{task}: shard {names} ended its worker's process {ATTEMPTS} times and was given up; look at its texts, "
            f"{poison[0].path(run)}, and at the workers' memory; all records are kept, the same command goes on"
        )
    if without:
        lost = calibration.record(run, without[0]).name
        raise IncompleteError(f"{task}: {len(without)} records are missing ({lost}, ...); run the command again")
    return [calibration.record(run, shard) for shard in shards]


def _key_groups(keys: list[tuple[int, Site]], n_records: int) -> Iterator[list[tuple[int, Site]]]:
    """So many keys at a time that the tree's open branches and what is being read are ``RECORDS_HELD`` records."""
    n_groups = -(-(n_records.bit_length() + 2) // RECORDS_HELD)
    size = -(-len(keys) // n_groups)
    return (keys[first : first + size] for first in range(0, len(keys), size))


def _moments_of(record: StoragePath, keys: Sequence[tuple[int, Site]]) -> SiteMoments:
    with open_tensors(record) as file:
        return {key: read_moments(file, key) for key in keys}


def _added(one: SiteMoments, other: SiteMoments) -> SiteMoments:
    return {key: one[key] + other[key] for key in one}


def merge_layer(
    calibration: Calibration, run: Run, shards: Sequence[Shard], checkpoint: Checkpoint, path: StoragePath, layer: int
) -> None:
    """Merge the covariances of one layer, two at a time, and choose its ridges: the last shard is held out for that."""
    if is_whole(covariance_file(path, layer), made_of=made_of(calibration, shards)):
        return
    records, merged, ridges = [calibration.record(run, shard) for shard in shards], {}, {}
    for site, module in checkpoint.architecture.modules.items():
        *rest, last = (partial(load_covariance, record, (layer, site)) for record in records)
        merged[site], ridges[site] = last(), USUAL_RIDGE
        if rest:
            fitted, held_out = reduce(lambda total, load: total + load(), rest[1:], rest[0]()), merged[site]
            weight_OD = checkpoint.read(checkpoint.architecture.tensor(layer, module))
            merged[site] = fitted + held_out
            if fitted.count > 1 and held_out.count:
                ridges[site] = choose_ridge(fitted, held_out, weight_OD)
    save_covariances(path, layer, merged, made_of=made_of(calibration, shards), ridges=ridges)
