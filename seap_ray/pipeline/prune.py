"""Prune: plans in, compacted checkpoints out, by Ray tasks, one a file.

A checkpoint takes as long as copying it; one that is there, whole and made the same way stays.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from seap_ray.core.architecture import Shape
from seap_ray.core.moments import Statistics
from seap_ray.core.plan import Plan
from seap_ray.models.checkpoint import Checkpoint, versions
from seap_ray.models.export import SHARED, Compaction, OutputTensor, finish, parse_size, write_tensors
from seap_ray.models.records import (
    Mixture,
    task_memory,
)
from seap_ray.pipeline.cluster import work_task
from seap_ray.pipeline.planner import Planner, Spec, describe, save_plan, specs
from seap_ray.storage.files import link, move_folder, read_json, remove, sha256_of, writable, write_json
from seap_ray.storage.paths import AnyPath
from seap_ray.storage.run import Run, fingerprint


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint to be: written to a hidden folder, which gets its name when it is whole."""

    spec: Spec
    compaction: Compaction
    target: AnyPath
    fingerprint: str
    files: dict[str, list[OutputTensor]]

    @property
    def hidden(self) -> AnyPath:
        return self.target.with_name(f".{self.target.name}.{self.fingerprint[:12]}.partial")


def prune(
    planner: Planner, run: Run, progress: Callable[[Iterable[int], int, str], Iterable[int]]
) -> list[PendingCheckpoint]:
    """Plan and write every model at every ratio; a checkpoint that is there and made the same way stays.

    All plans are made before anything is written, so a ratio that cannot be met costs nothing.
    """
    config = planner.config
    plans = [(spec, planner.plan(spec, ratio)) for ratio in config.pruning.ratio for spec in specs(config)]
    for _, plan in plans:
        save_plan(plan, planner.checkpoint.architecture, run.plan(plan.requested, plan.name))
    jobs = [prepare_checkpoint(planner, run, spec, plan) for spec, plan in plans]
    todo = _unwritten(jobs)
    if todo:
        writes = _writes(todo, run.shared)
        for _ in progress(_write_all(todo, writes), sum(write.n_bytes for write in writes), "writing"):
            pass
    return jobs


def prepare_checkpoint(planner: Planner, run: Run, spec: Spec, plan: Plan) -> PendingCheckpoint:
    export = planner.config.export
    statistics: Statistics | Mixture | None = None
    if plan.compensation != "none":
        statistics = planner.mixture(spec) if plan.compensation == "least_squares" else planner.mixed(spec)
    compaction = Compaction(planner.checkpoint, plan, statistics, stock=export.format == "stock")
    cut = (plan.compensation, plan.kept, plan.dropped)
    made_of = fingerprint(planner.checkpoint.fingerprint, plan.provenance, cut, export.model_dump(), versions())
    files = compaction.files(parse_size(export.max_shard_size))
    return PendingCheckpoint(spec, compaction, run.expert(plan.requested, plan.name), made_of, files)


def _unwritten(jobs: list[PendingCheckpoint]) -> list[PendingCheckpoint]:
    """Those whose checkpoints are not there, made in another way, or damaged; every file is read to its end."""
    check = work_task(_is_hashed)
    found = [(job, check.remote(job.target)) for job in jobs if _is_written(job)]
    whole = {job.target for job, ref in found if ray.get(ref)}
    return [job for job in jobs if job.target not in whole]


def _is_hashed(target: AnyPath) -> bool:
    manifest = read_json(target / "seap.json")
    return bool(manifest) and all(
        _hash_of(target / name) == about["sha256"] for name, about in manifest["files"].items()
    )


def _hash_of(path: AnyPath) -> str | None:
    try:
        return sha256_of(path)
    except OSError:
        return None


def _is_written(job: PendingCheckpoint) -> bool:
    manifest = read_json(job.target / "seap.json")
    return (
        bool(manifest)
        and manifest.get("fingerprint") == job.fingerprint
        and all(
            (job.target / name).is_file() and (job.target / name).stat().st_size == about["bytes"]
            for name, about in manifest["files"].items()
        )
    )


@dataclass(frozen=True)
class Write:
    """A file to be written, for every checkpoint that has it."""

    jobs: tuple[PendingCheckpoint, ...]
    name: str
    path: AnyPath
    """Where it is written; that of a file which several checkpoints may have is beside them all."""

    @property
    def outputs(self) -> list[OutputTensor]:
        return self.jobs[0].files[self.name]

    @property
    def n_bytes(self) -> int:
        return sum(output.n_bytes for output in self.outputs)


def _writes(jobs: list[PendingCheckpoint], shared: AnyPath) -> list[Write]:
    """What is to be written, in the order of the base. On a disk a file of the base's tensors is written once."""
    writes: dict[AnyPath, Write] = {}
    for job, name in in_order_of_base(jobs):
        is_shared = name.startswith(SHARED) and isinstance(shared, Path)
        path = (shared if is_shared else job.hidden) / name
        before = writes[path].jobs if path in writes else ()
        writes[path] = Write((*before, job), name, path)
    return list(writes.values())


def _write_all(jobs: list[PendingCheckpoint], writes: list[Write]) -> Iterator[int]:
    """Yield the bytes of each file as it is written; finish each folder when its last file is there.

    Files of the same part of the base come one after another, whichever model they are of: what was read for one is
    in the page cache for the next, so the base is read about once, not once a model.
    """
    task = work_task(_write_file)
    architecture = jobs[0].compaction.base.architecture
    memory = {"none": 0, "mean": 0, "least_squares": task_memory(architecture)}
    pending: dict[Any, Write] = {}
    hashes: dict[AnyPath, dict[str, str]] = {job.target: {} for job in jobs}
    compactions = {job.target: ray.put(job.compaction) for job in jobs}
    for write in writes:
        first = write.jobs[0]
        limited = task.options(memory=memory[first.compaction.plan.compensation])
        pending[limited.remote(compactions[first.target], write.outputs, write.path)] = write
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        write, digest = pending.pop(done), ray.get(done)
        for job in write.jobs:
            if write.path.parent != job.hidden:
                link(Path(write.path), Path(job.hidden / write.name))
            hashes[job.target][write.name] = digest
            if len(hashes[job.target]) == len(job.files):
                _finish(job, hashes[job.target])
        yield write.n_bytes


def in_order_of_base(jobs: Iterable[PendingCheckpoint]) -> list[tuple[PendingCheckpoint, str]]:
    """Every file of every model, by where the middle of what it is cut from lies in the base."""

    def middle(draft: PendingCheckpoint, name: str) -> int:
        old, split = draft.compaction.plan.layers, draft.compaction.base.architecture.split
        layers = [layer for output in draft.files[name] if (layer := split(output.name)[0]) is not None]
        return old[layers[0]] + old[layers[-1]] if layers else -1

    return sorted(((job, name) for job in jobs for name in job.files), key=lambda file: middle(*file))


def write_temporarily(draft: PendingCheckpoint) -> AnyPath:
    """Write a checkpoint for a while, unless it is there for good; its folder. A hidden one is the caller's to drop."""
    if _is_written(draft):
        return draft.target
    hashes = {
        name: _write_file(draft.compaction, outputs, draft.hidden / name) for name, outputs in draft.files.items()
    }
    _finish_hidden(draft, hashes)
    return draft.hidden


def _write_file(compaction: Compaction, outputs: list[OutputTensor], path: AnyPath) -> str:
    """Write one file, or keep it when an earlier attempt at the same plan finished it; return its sha256."""
    stored = read_json(_told(path))
    if stored is None or _hash_of(path) != stored:
        stored = write_tensors(compaction, outputs, path)
        write_json(_told(path), stored)
    return stored


def _told(path: AnyPath) -> AnyPath:
    """The hash of a file of a checkpoint that is not whole yet."""
    return path.with_name(f".{path.name}.sha256")


def _finish_hidden(draft: PendingCheckpoint, hashes: dict[str, str]) -> None:
    for name in draft.files:
        with writable(draft.hidden):
            _told(draft.hidden / name).unlink(missing_ok=True)
    finish(draft.compaction, draft.hidden, draft.files, _manifest(draft, hashes))


def _finish(job: PendingCheckpoint, hashes: dict[str, str]) -> None:
    _finish_hidden(job, hashes)
    with writable(job.target):
        move_folder(job.hidden, job.target, last="seap.json")
    for leftover in job.target.parent.glob(f".{job.target.name}.*.partial"):
        remove(leftover)


def _manifest(job: PendingCheckpoint, hashes: dict[str, str]) -> dict[str, Any]:
    base, plan = job.compaction.base, job.compaction.plan
    return {
        "fingerprint": job.fingerprint,
        "source": {
            "model": base.source,
            "model_type": base.config["model_type"],
            # The hub's cache holds a model under snapshots/<commit>.
            "revision": base.folder.name if base.folder.parent.name == "snapshots" else None,
            "fingerprint": base.fingerprint,
        },
        **checkpoint_sizes(job),
        "plan": describe(plan, base.architecture),
        "files": {name: {"sha256": hashes[name], "bytes": (job.hidden / name).stat().st_size} for name in job.files},
        "versions": versions(),
    }


def checkpoint_sizes(draft: PendingCheckpoint) -> dict[str, Any]:
    """Ratios, parameters and bytes of a checkpoint, as its manifest has them."""
    base, plan = draft.compaction.base, draft.compaction.plan
    tensors = [output for outputs in draft.files.values() for output in outputs]
    after = sum(_numel(output) for output in tensors if base.architecture.split(output.name)[0] is not None)
    return {
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(base.architecture),
        "realised_ratio": 1 - after / base.architecture.decoder_parameters,
        "parameters": sum(_numel(output) for output in tensors),
        "bytes": sum(output.n_bytes for output in tensors),
        "kv_bytes_per_token": kv_bytes(plan.shapes, base),
    }


def _numel(output: OutputTensor) -> int:
    return torch.Size(output.shape).numel()


def kv_bytes(shapes: Sequence[Shape], base: Checkpoint) -> int:
    """Bytes of key-value cache per token, in the checkpoint's dtype."""
    architecture = base.architecture
    name = architecture.tensor(0, architecture.layout.o_proj)
    item = OutputTensor(name, base.tensors[name].dtype, ()).n_bytes
    return sum(2 * shape.groups * architecture.head_dim * item for shape in shapes)
