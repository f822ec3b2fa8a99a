"""Calibrate: shards in, a record of each and the merged statistics of every task out. Ray Data runs the model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.inputs import INPUTS
from seap_ray.core.moments import Covariance, Moments
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.forward import make_runner
from seap_ray.models.input_records import input_files_bytes, inputs_file
from seap_ray.models.recorder import SiteMoments
from seap_ray.models.records import save_covariances, save_moments, task_memory
from seap_ray.pipeline.cluster import need_cluster, working_nodes
from seap_ray.pipeline.merge import TaskStatistics, find_unmerged, merge_all
from seap_ray.pipeline.needs import covariance_files_bytes
from seap_ray.pipeline.placement import workers_that_fit
from seap_ray.pipeline.shard_records import MAX_ATTEMPTS, ShardRecords
from seap_ray.pipeline.shards import Manifest, Shard
from seap_ray.progress import Progress
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run

MAX_GROUP_SHARDS = 32
"""Shards that pass through a streamed model together, at most."""


# --- the actors ------------------------------------------------------------------------------------------------------


class Calibrator:
    """A Ray Data actor that has the model: shards' descriptors in, their records on storage, a number of tokens out."""

    def __init__(self, config: Config, records: ShardRecords):
        # Every worker opens the model on its own node, where other files may lie under the same path.
        checkpoint = Checkpoint.open(config.model.source, config.model.revision)
        if checkpoint.fingerprint != records.calibration.model:
            raise ConfigError(f"model.source: {checkpoint.folder} differs between the nodes of this cluster")

        self.records = records
        self.runner = make_runner(config, checkpoint)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Measure the group of shards in every row."""
        groups = [_group_of(row) for row in rows.to_pylist()]
        for group in groups:
            self._attempt(group)

        return pa.table({"n_tokens": [_total_tokens(group) for group in groups]})

    def _attempt(self, group: list[Shard]) -> None:
        """Measure shards together, and keep count of attempts that end this process.

        The last time each is measured alone, so that a shard that ends processes costs no other.
        """
        for shards in self._split_at_last_attempt(group):
            try:
                # Counted before it begins: a process that is killed can count nothing afterwards.
                for shard in shards:
                    self.records.mark_attempt(shard)
                self._measure(shards)
            finally:
                # An error ends the attempt, but not the process, so it does not count either.
                for shard in shards:
                    self.records.clear_attempts(shard)

    def _split_at_last_attempt(self, group: list[Shard]) -> list[list[Shard]]:
        """Return the shards to measure together: all, or at the last attempt one by one, without those given up."""
        attempts = {shard: self.records.attempts(shard) for shard in group}
        if max(attempts.values()) < MAX_ATTEMPTS - 1:
            return [group]

        # Ray delivers a group again as a whole, with shards whose records an earlier attempt has finished.
        left = [shard for shard in group if attempts[shard] < MAX_ATTEMPTS]
        return [[shard] for shard in left if not self.records.is_whole(shard)]

    def _measure(self, shards: list[Shard]) -> None:
        """Run the model over shards and write their records; covariances as they come, as they are large."""
        by_name = {f"{shard.task}/{shard.shard}": shard for shard in shards}

        # A streamed model yields a layer of every shard, then the next layer, so parts of a record come one by one.
        sequences = {name: shard.sequences(self.records.run) for name, shard in by_name.items()}
        moments: dict[str, SiteMoments] = {name: {} for name in by_name}
        for name, recorded in self.runner.record(sequences):
            self._save_covariances(by_name[name], recorded)
            # A record's moments are without the co-moments, which lie in files of their own.
            moments[name] |= {key: Moments(part.count, part.mean_D, part.m2_D) for key, part in recorded.items()}

        for name, shard in by_name.items():
            path = self.records.path(shard)
            about = {"task": shard.task, "shard": shard.shard, "fingerprint": self.records.key(shard)}
            # Those of the inputs have a file of their own, so that the other one is the same with them and without.
            inputs = {key: part for key, part in moments[name].items() if key[1] in INPUTS}
            others = {key: part for key, part in moments[name].items() if key[1] not in INPUTS}
            save_moments(path, others, **about)
            if inputs:
                save_moments(inputs_file(path), inputs, **about)

    def _save_covariances(self, shard: Shard, recorded: SiteMoments) -> None:
        """Write the covariances among what was recorded, a file for each layer."""
        # ``block`` has moments alone, and so has a layer whose covariances are left to another pass.
        covariances = {key: part for key, part in recorded.items() if isinstance(part, Covariance)}
        path = self.records.path(shard)
        key = self.records.key(shard)
        for layer in sorted({layer for layer, _ in covariances}):
            by_site = {site: covariances[layer, site] for site in self.records.architecture.modules(layer)}
            save_covariances(path, layer, by_site, fingerprint=key)
            inputs = {site: covariances[layer, site] for site in INPUTS if (layer, site) in covariances}
            if inputs:
                save_covariances(inputs_file(path), layer, inputs, fingerprint=key)


def _row_of(group: list[Shard]) -> dict[str, Any]:
    """Return the row of Ray Data that hands a group of shards to an actor."""
    return {"shards": [asdict(shard) for shard in group]}


def _group_of(row: dict[str, Any]) -> list[Shard]:
    """Return the shards of a row."""
    return [Shard(**shard) for shard in row["shards"]]


def _total_tokens(shards: Iterable[Shard]) -> int:
    """Return the number of tokens of some shards together."""
    return sum(shard.n_tokens for shard in shards)


# --- the job ---------------------------------------------------------------------------------------------------------


def calibrate(
    config: Config,
    checkpoint: Checkpoint,
    run: Run,
    manifests: list[Manifest],
    progress: Progress,
) -> dict[str, StoragePath]:
    """Make what records are missing, merge every task's, and return the statistics' files by task.

    Raises IncompleteError when records are missing afterwards, DataError for activations that are not finite.
    """
    records = ShardRecords.of(config, checkpoint, run)
    statistics = [TaskStatistics(records, manifest.shards, run.statistics(manifest.task)) for manifest in manifests]

    # A task whose statistics are whole needs no records any more, even where they were removed.
    unmerged = find_unmerged(statistics)
    shards = [shard for task_statistics in unmerged for shard in task_statistics.shards]
    make_records(config, records, shards, progress, n_merged=len(unmerged))
    if unmerged:
        merge_all(unmerged, checkpoint)
    return {manifest.task: run.statistics(manifest.task) for manifest in manifests}


def make_records(
    config: Config,
    records: ShardRecords,
    shards: list[Shard],
    progress: Progress,
    *,
    n_merged: int,
) -> None:
    """Make what records of these shards are missing; ``n_merged`` statistics will be made from them.

    Raises ConfigError where no node could work on the covariances, IncompleteError where they do not fit the disk.
    """
    missing = records.missing(shards)
    if not missing and not n_merged:
        return

    # Before the model runs: what cannot be merged or stored is refused while it has cost nothing.
    if records.calibration.covariance:
        check_memory(records.architecture)
        n_files = len(missing) + n_merged
        check_disk(records.run, records.architecture, n_files=n_files, inputs=records.calibration.inputs)

    if missing:
        # A new job tries again what another one gave up.
        for shard in missing:
            records.clear_attempts(shard)

        for _ in progress(_measure_all(config, records, missing), _total_tokens(missing), "calibrating", " tokens"):
            pass


def check_memory(architecture: Architecture) -> None:
    """Raise ConfigError when no node could ever run a task on one layer's covariances: Ray would wait for one."""
    largest = max((node["Resources"].get("memory", 0) for node in working_nodes()), default=0)
    if (needed := task_memory(architecture)) > largest:
        raise ConfigError(
            f"calibration.statistics: covariance needs a node with {needed / 1e9:.1f} GB of memory for tasks, and the "
            f"largest has {largest / 1e9:.1f}; use moments, with pruning.score=wifv pruning.compensation=mean"
        )


def check_disk(run: Run, architecture: Architecture, *, n_files: int, inputs: bool = False) -> None:
    """Raise IncompleteError when the covariances will not fit the disk: a triangle for each shard and task to come."""
    needed = n_files * (covariance_files_bytes(architecture) + (input_files_bytes(architecture) if inputs else 0))

    # A disk is asked by a path that exists.
    run.root.mkdir(parents=True, exist_ok=True)
    free = run.root.free_bytes()

    if needed > free:
        raise IncompleteError(
            f"calibration.statistics: covariance takes {needed / 1e9:.1f} GB under {run.root}, which has "
            f"{free / 1e9:.1f} ({n_files} shards and tasks); make room and run the same command again, raise "
            "corpus.shard_sequences, or use moments, with pruning.score=wifv pruning.compensation=mean"
        )


def _measure_all(config: Config, records: ShardRecords, missing: list[Shard]) -> Iterator[int]:
    """Yield the tokens of each group of shards as their records are done."""
    need_cluster()
    settings = config.calibration
    workers = n_workers(config, len(missing))

    context = DataContext.get_current()
    # A large model's first shard may take longer than Ray Data's 30 minutes without progress.
    context.execution_no_progress_timeout_s = -1
    # By default Ray Data ends the job with the first worker that dies while it loads the model.
    context.max_consecutive_actor_init_deaths = 2 * workers

    # A streamed model is read once for each group, so groups are large; a whole model takes each shard by itself.
    max_tokens = settings.stream_tokens if settings.placement == "stream" else 0
    groups = group_shards(missing, max_tokens, workers)

    # A block for each group, and one group at a time on its way to an actor: what an actor's end costs is one group.
    rows = ray.data.from_items([_row_of(group) for group in groups], override_num_blocks=len(groups))
    measured = rows.map_batches(
        Calibrator,
        fn_constructor_args=(config, records),
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
    )

    for row in measured.iter_rows():
        yield row["n_tokens"]


def group_shards(shards: Sequence[Shard], max_tokens: int, workers: int) -> list[list[Shard]]:
    """Put neighbours together, up to ``max_tokens``, but in no fewer groups than workers if the shards allow it.

    A worker keeps the moments of a whole group, so it has ``MAX_GROUP_SHARDS`` at most.
    """
    max_shards = min(MAX_GROUP_SHARDS, -(-len(shards) // workers))
    groups: list[list[Shard]] = []

    # Neighbours stay together, so that groups depend on the order of the shards alone.
    for shard in shards:
        has_place = groups and len(groups[-1]) < max_shards
        if has_place and _total_tokens(groups[-1]) + shard.n_tokens <= max_tokens:
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return groups


def n_workers(config: Config, n_shards: int) -> int:
    """Return the number of calibration actors to start.

    Raises ConfigError when the cluster has room for none, or for fewer than the config asks for.
    """
    settings = config.calibration
    room = sum(workers_that_fit(node["Resources"], settings) for node in ray.nodes() if node["Alive"])

    wanted = 1 if settings.workers == "auto" else settings.workers
    if room < wanted:
        total = ray.cluster_resources()
        raise ConfigError(
            f"calibration.workers: the nodes have room for {room} of {wanted} workers with {settings.num_cpus} CPUs "
            f"and {settings.num_gpus:g} GPUs each; the cluster has {total.get('CPU', 0):g} CPUs and "
            f"{total.get('GPU', 0):g} GPUs"
        )

    # A shard is measured by one worker: more workers than shards would have nothing to do.
    return min(room, n_shards) if settings.workers == "auto" else wanted
