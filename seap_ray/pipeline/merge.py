"""Merge: the records of a task's shards in, the task's statistics out.

Moments are merged in a tree whose shape depends on the number of shards alone, covariances one shard after another,
layer by layer: the same bytes for any number of workers, with or without faults.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import ray

from seap_ray.core.architecture import Architecture
from seap_ray.core.inputs import INPUTS
from seap_ray.core.moments import Covariance, Site, tree_sum
from seap_ray.core.reconstruction import DEFAULT_RIDGE, choose_ridge
from seap_ray.errors import DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.input_records import input_keys, inputs_file
from seap_ray.models.recorder import SiteMoments, added
from seap_ray.models.records import (
    TensorFile,
    covariance_file,
    load_covariance,
    open_tensors,
    read_moments,
    save_covariances,
    save_moments,
    sites_of,
    task_memory,
)
from seap_ray.pipeline.cluster import all_checked, work_task
from seap_ray.pipeline.shard_records import ShardRecords, all_made
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.artifact import Artifact
from seap_ray.storage.paths import StoragePath

RECORDS_HELD = 2
"""Records in memory while many are merged; opening a file costs more than what is read of it if that is little."""
STATISTICS_FILE = TensorFile("made_of")
"""Format of a task's statistics; their key has another name in the metadata than that of a record."""


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """The statistics of a task: moments, merged from the records of some of its shards, and covariances beside them."""

    records: ShardRecords
    shards: Sequence[Shard]
    path: StoragePath
    """File of the moments."""

    @property
    def key(self) -> str:
        """Fingerprint of the records that are merged."""
        return self.records.merged_key(self.shards)

    @property
    def task(self) -> str:
        """Name of the task that all shards belong to."""
        return self.shards[0].task

    @property
    def moments(self) -> Artifact[dict[str, object]]:
        """The file of moments of all layers."""
        return Artifact(self.path, self.key, STATISTICS_FILE)

    def covariances(self, layer: int) -> Artifact[dict[str, object]]:
        """Return the file of one layer's covariances and ridges."""
        return Artifact(covariance_file(self.path, layer), self.key, STATISTICS_FILE)

    @property
    def input_moments(self) -> Artifact[dict[str, object]]:
        """The file of moments of the other inputs of all layers."""
        return Artifact(inputs_file(self.path), self.key, STATISTICS_FILE)

    def input_covariances(self, layer: int) -> Artifact[dict[str, object]]:
        """Return the file of the covariances of one layer's other inputs."""
        return Artifact(covariance_file(inputs_file(self.path), layer), self.key, STATISTICS_FILE)

    def is_whole(self) -> bool:
        """Return whether moments, and covariances where they are asked for, are there, whole and of these shards."""
        return all_made(self.records.files(self.path, self.key, STATISTICS_FILE))


def find_unmerged(statistics: Sequence[TaskStatistics]) -> list[TaskStatistics]:
    """Return those that are not there, not of these shards, or damaged. Every file is read."""
    answers = zip(statistics, all_checked(TaskStatistics.is_whole, statistics), strict=True)
    return [task_statistics for task_statistics, is_whole in answers if not is_whole]


def merge_all(statistics: Sequence[TaskStatistics], checkpoint: Checkpoint) -> None:
    """Merge the records of all statistics, a Ray task for each file; what is there already stays.

    Raises IncompleteError when records are missing, DataError when a token is.
    """
    merge = work_task(merge_moments)
    ray.get([merge.remote(task_statistics) for task_statistics in statistics])

    # A matrix of a large layer is GBs: such a task states its memory, so that Ray starts no more than fit a node.
    merge_layer = work_task(merge_covariances, memory=task_memory(checkpoint.architecture))
    merge_inputs = work_task(merge_input_covariances, memory=task_memory(checkpoint.architecture))
    layers = range(checkpoint.architecture.n_layers)
    pending = []
    for task_statistics in statistics:
        if task_statistics.records.calibration.covariance:
            pending += [merge_layer.remote(task_statistics, checkpoint, layer) for layer in layers]
        if task_statistics.records.calibration.inputs:
            pending += [merge_inputs.remote(task_statistics, layer) for layer in layers]
    ray.get(pending)


# --- moments ---------------------------------------------------------------------------------------------------------


def merge_moments(statistics: TaskStatistics) -> None:
    """Merge the moments of a task's records and write them, unless they are there already.

    Raises IncompleteError when records are missing, DataError when the number of tokens is not that of the shards.
    """
    statistics.moments.make(partial(_write_moments, statistics))
    if statistics.records.calibration.inputs:
        statistics.input_moments.make(partial(_write_input_moments, statistics))


def _write_moments(statistics: TaskStatistics) -> None:
    records = statistics.records
    paths = records.existing_paths(statistics.shards)
    merged = _merged_moments(paths, [*sites_of(records.architecture)])

    # Checked before anything is written: a sum that misses a token is never taken for the task's statistics.
    n_tokens = sum(records.calibration.n_tokens(shard) for shard in statistics.shards)
    _check_counts(merged, records.architecture, n_tokens, statistics.task)
    save_moments(statistics.path, merged, task=statistics.task, made_of=statistics.key)


def _write_input_moments(statistics: TaskStatistics) -> None:
    records = statistics.records
    paths = [inputs_file(path) for path in records.existing_paths(statistics.shards)]
    merged = _merged_moments(paths, input_keys(records.architecture))
    save_moments(inputs_file(statistics.path), merged, task=statistics.task, made_of=statistics.key)


def _merged_moments(paths: Sequence[StoragePath], keys: Sequence[tuple[int, Site]]) -> SiteMoments:
    """Return the moments of some (layer, site) over all records."""
    # Some keys of all records at a time: the memory does not grow with the number of records.
    merged: SiteMoments = {}
    for some_keys in _key_groups([*keys], len(paths)):
        parts = (_read_sites(path, some_keys) for path in paths)
        total: SiteMoments = tree_sum(parts, added)
        merged |= total
    return merged


def _key_groups(keys: list[tuple[int, Site]], n_records: int) -> Iterator[list[tuple[int, Site]]]:
    """Split the keys so that the tree's open branches and what is being read are ``RECORDS_HELD`` whole records."""
    # The tree of n records has log2(n) open branches; one more part is read, one is a sum.
    n_parts_held = n_records.bit_length() + 2
    n_groups = -(-n_parts_held // RECORDS_HELD)
    size = -(-len(keys) // n_groups)
    return (keys[first : first + size] for first in range(0, len(keys), size))


def _read_sites(record: StoragePath, keys: Sequence[tuple[int, Site]]) -> SiteMoments:
    with open_tensors(record) as file:
        return {key: read_moments(file, key) for key in keys}


def _check_counts(merged: SiteMoments, architecture: Architecture, n_tokens: int, task: str) -> None:
    """Raise DataError for a site whose moments are not of all tokens of the shards, and where no token counts."""
    if not n_tokens:
        raise DataError(f"tasks.{task}: no token counts, by corpus.count and calibration.skip_first_token")

    for layer in range(architecture.n_layers):
        for site in architecture.recorded:
            experts = architecture.sites(layer, site)
            # Not every layer has every site.
            if not experts:
                continue
            count = sum(merged[layer, expert].count for expert in experts)
            # In an MoE model a token goes to several experts.
            times = architecture.experts_per_token if len(experts) > 1 else 1

            if count != times * n_tokens:
                raise DataError(f"{task}: layer {layer}, {site}: {count} tokens, the manifest has {n_tokens}")


# --- covariances -----------------------------------------------------------------------------------------------------


def merge_covariances(statistics: TaskStatistics, checkpoint: Checkpoint, layer: int) -> None:
    """Merge one layer's covariances, choose its ridges and write both, unless they are there already.

    Raises IncompleteError when records are missing.
    """
    statistics.covariances(layer).make(partial(_write_covariances, statistics, checkpoint, layer))


def _write_covariances(statistics: TaskStatistics, checkpoint: Checkpoint, layer: int) -> None:
    paths = statistics.records.existing_paths(statistics.shards)

    # One site after another: a matrix of one site is all that is in memory beside what is merged of the layer.
    merged: dict[Site, Covariance] = {}
    ridges: dict[Site, float] = {}
    for site, module in checkpoint.architecture.modules(layer).items():
        weight = checkpoint.architecture.tensor(layer, module)
        merged[site], ridges[site] = _merge_site(paths, (layer, site), checkpoint, weight)

    save_covariances(statistics.path, layer, merged, made_of=statistics.key, ridges=ridges)


def merge_input_covariances(statistics: TaskStatistics, layer: int) -> None:
    """Merge the covariances of one layer's other inputs and write them, unless they are there already.

    Raises IncompleteError when records are missing.
    """
    statistics.input_covariances(layer).make(partial(_write_input_covariances, statistics, layer))


def _write_input_covariances(statistics: TaskStatistics, layer: int) -> None:
    paths = [inputs_file(path) for path in statistics.records.existing_paths(statistics.shards)]
    merged = {site: _summed_covariance(paths, (layer, site)) for site in INPUTS}
    save_covariances(inputs_file(statistics.path), layer, merged, made_of=statistics.key)


def _summed_covariance(records: Sequence[StoragePath], key: tuple[int, Site]) -> Covariance:
    """Return a site's covariance over records, one after another: two matrices are all that is in memory."""
    total = load_covariance(records[0], key)
    for record in records[1:]:
        total += load_covariance(record, key)
    return total


def _merge_site(
    records: Sequence[StoragePath], key: tuple[int, Site], checkpoint: Checkpoint, weight: str
) -> tuple[Covariance, float]:
    """Return a site's covariance over all records, and the ridge whose compensation has the smallest error.

    The compensation is fitted on all records but the last one, and its error is that on the last one.
    """
    *fitted_records, last_record = records
    held_out = load_covariance(last_record, key)
    # With a single record there is nothing to fit on.
    if not fitted_records:
        return held_out, DEFAULT_RIDGE

    fitted = _summed_covariance(fitted_records, key)
    # A rarely used MoE expert may have seen no token of a shard.
    ridge = DEFAULT_RIDGE
    if fitted.count > 1 and held_out.count:
        ridge = choose_ridge(fitted, held_out, checkpoint.read(weight))
    fitted += held_out
    return fitted, ridge
