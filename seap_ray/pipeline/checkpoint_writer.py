"""Checkpoint writer: planned models in, smaller checkpoints out, written by Ray tasks, one for each file.

Writing a checkpoint takes as long as copying it. One that is there, whole and made from the same inputs stays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from seap_ray.config import ExportSection
from seap_ray.core.architecture import Shape
from seap_ray.models.checkpoint import Checkpoint, completed_config, versions
from seap_ray.models.export import (
    SHARED,
    CheckpointExport,
    OutputTensor,
    finish,
    parse_size,
    write_companions,
    write_tensors,
)
from seap_ray.models.gguf.companions import modelfile
from seap_ray.models.gguf.layouts import layout_of_plan
from seap_ray.models.quantization import QuantizedExport
from seap_ray.models.records import task_memory
from seap_ray.pipeline.cluster import all_checked, work_task
from seap_ray.pipeline.gguf_files import write_gguf, write_preset
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.plan_choice import PlannedModel
from seap_ray.pipeline.plan_files import describe_plan, save_plan
from seap_ray.progress import Progress
from seap_ray.storage.artifact import Artifact, ChecksummedFile, ManifestFolder, checksum_path
from seap_ray.storage.digests import stated_digest
from seap_ray.storage.files import atomic_write, link, writable
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

MANIFEST = "seap.json"
"""File of a checkpoint that says what the checkpoint is made from; written last."""


def _manifest_digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of every weight file."""
    return {name: stated_digest(about) for name, about in manifest["files"].items()}


def _manifest_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of every weight file."""
    return {name: about["bytes"] for name, about in manifest["files"].items()}


CHECKPOINT_FOLDER = ManifestFolder(MANIFEST, _manifest_digests, _manifest_sizes)
"""Format of a finished checkpoint."""
MODELFILE = "Modelfile"
"""File by which Ollama imports a GGUF file beside it."""
WEIGHT_FILE = ChecksummedFile()
"""Format of a weight file whose checkpoint is not finished."""


# --- checkpoints to be -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint to be: written to a hidden folder, which gets its name when it is whole."""

    spec: ModelSpec
    export: CheckpointExport
    target: StoragePath
    """Folder of the finished checkpoint."""
    fingerprint: str
    """Hash of everything that the checkpoint is made from."""
    files: dict[str, list[OutputTensor]]
    """Tensors of every weight file, by the file's name."""
    gguf_type: str | None = None
    """Type of the matrices in its GGUF file; None where it has no such file."""

    @property
    def gguf_file(self) -> str:
        """Name of its GGUF file."""
        return f"model-{self.gguf_type}.gguf"

    @property
    def title(self) -> str:
        """What its GGUF file calls it: the base, the model, and the ratio."""
        base = self.export.base.source.name.rstrip("/").rpartition("/")[2]
        return f"{base} {self.spec.name} {self.target.parent.name}"

    @property
    def partial(self) -> StoragePath:
        """The hidden folder. Its name carries the fingerprint, so an earlier attempt's files are found again."""
        return self.target.with_name(f".{self.target.name}.{self.fingerprint[:12]}.partial")

    @property
    def artifact(self) -> Artifact[dict[str, Any]]:
        """The finished checkpoint; it is made if every weight file hashes to what the manifest says."""
        return Artifact(self.target, self.fingerprint, CHECKPOINT_FOLDER)

    def has_sizes(self) -> bool:
        """Return whether the finished checkpoint is there, with files of the right sizes; none of them is read."""
        return CHECKPOINT_FOLDER.has_sizes(self.target, self.fingerprint)


def write_checkpoints(
    models: Iterable[PlannedModel], settings: ExportSection, run: Run, progress: Progress
) -> list[PendingCheckpoint]:
    """Write the plan and the checkpoint of every model; a checkpoint that is there and made the same way stays."""
    checkpoints = [prepare_checkpoint(model, settings, run) for model in models]

    # Plans are small, so they are written again whether or not the checkpoint is there.
    for checkpoint in checkpoints:
        plan = checkpoint.export.plan
        save_plan(plan, checkpoint.export.base.architecture, run.plan(plan.requested, plan.name))

    missing = _not_whole(checkpoints)
    if missing:
        files = _pending_files(missing, run.shared)
        n_bytes = sum(file.n_bytes for file in files)

        for _ in progress(_write_all(missing, files), n_bytes, "writing", "B"):
            pass

    if settings.format == "gguf":
        write_preset(run)
    return checkpoints


def prepare_checkpoint(model: PlannedModel, settings: ExportSection, run: Run) -> PendingCheckpoint:
    """Lay out the checkpoint of a planned model: its tensors, files and folder. No weight is read."""
    export = model.export
    plan = export.plan

    # A plan's name and ratio are in the folder's path already.
    cut = (plan.compensation.name, plan.kept, plan.dropped)
    provenance = {**plan.provenance, **({"target": plan.target.asked} if plan.target else {})}
    key = fingerprint(export.base.fingerprint, provenance, cut, _export_settings(settings), versions())
    files = export.files(parse_size(settings.max_shard_size))
    gguf_type = settings.gguf_type if settings.format == "gguf" else None
    return PendingCheckpoint(model.spec, export, run.expert(plan.requested, plan.name), key, files, gguf_type)


def _export_settings(settings: ExportSection) -> dict[str, Any]:
    """Return the settings that a checkpoint depends on."""
    unused = {"gguf_type"} if settings.format != "gguf" else set()
    # As if the key were not there, so that checkpoints from before it stay.
    if settings.quantization.scheme is None:
        unused.add("quantization")
    return settings.model_dump(exclude=unused)


def _not_whole(checkpoints: list[PendingCheckpoint]) -> list[PendingCheckpoint]:
    """Return those that are missing, made in another way, or damaged.

    Every file is read to its end, but only where all sizes are right.
    """
    # Manifests and sizes are looked at here, at once; hashing a checkpoint takes as long as reading it.
    likely = [checkpoint for checkpoint in checkpoints if checkpoint.has_sizes()]
    answers = all_checked(Artifact.is_made, [checkpoint.artifact for checkpoint in likely])
    whole = {checkpoint.target for checkpoint, is_made in zip(likely, answers, strict=True) if is_made}

    return [checkpoint for checkpoint in checkpoints if checkpoint.target not in whole]


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PendingFile:
    """A file to be written once, for every checkpoint that has it."""

    checkpoints: tuple[PendingCheckpoint, ...]
    name: str
    path: StoragePath
    """Where it is written: in its checkpoint's hidden folder, or, if several may have it, in a folder beside them."""

    @property
    def tensors(self) -> list[OutputTensor]:
        """What the file holds, the same for every checkpoint that has it."""
        return self.checkpoints[0].files[self.name]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    def link_into(self, checkpoint: PendingCheckpoint) -> None:
        """Link a file that lies beside the checkpoints into one of them."""
        if self.path.parent != checkpoint.partial:
            link(Path(self.path), Path(checkpoint.partial / self.name))


def _pending_files(checkpoints: list[PendingCheckpoint], shared: StoragePath) -> list[PendingFile]:
    """List what is to be written, in the order of the base. On a disk a file of the base's tensors is written once."""
    files: dict[StoragePath, PendingFile] = {}
    for checkpoint, name in in_order_of_base(checkpoints):
        # A bucket has no links: there every checkpoint has a copy of its own.
        is_shared = name.startswith(SHARED) and not shared.is_remote
        path = (shared if is_shared else checkpoint.partial) / name

        # A shared file's name tells what is in it, so that of one name every checkpoint has the same bytes.
        others = files[path].checkpoints if path in files else ()
        files[path] = PendingFile((*others, checkpoint), name, path)
    return list(files.values())


def in_order_of_base(checkpoints: Iterable[PendingCheckpoint]) -> list[tuple[PendingCheckpoint, str]]:
    """Sort the files of all models by where the middle of what each is cut from lies in the base."""
    files = [(checkpoint, name) for checkpoint in checkpoints for name in checkpoint.files]
    return sorted(files, key=lambda file: _place_in_base(*file))


def _place_in_base(checkpoint: PendingCheckpoint, name: str) -> int:
    """Return the sum of the first and the last base layer that a file is cut from; -1 for a file without layers."""
    # The plan's layers are numbered anew where whole layers go.
    old_layers = checkpoint.export.plan.layers
    split = checkpoint.export.base.architecture.split
    layers = [layer for tensor in checkpoint.files[name] if (layer := split(tensor.name)[0]) is not None]

    # A file's tensors are in the base's order. The sum is twice the middle, which sorts alike and stays whole.
    return old_layers[layers[0]] + old_layers[layers[-1]] if layers else -1


def _write_all(checkpoints: list[PendingCheckpoint], files: list[PendingFile]) -> Iterator[int]:
    """Yield the bytes of each file as it is written; finish each folder when its last file is there.

    Files of the same part of the base come one after another, whichever model they belong to: what was read for one is
    in the page cache for the next, so the base is read about once, not once a model.
    """
    pending = _start_writing(checkpoints, files)

    # By checkpoint, its files that are written; a file that several share counts for each.
    digests: dict[StoragePath, dict[str, str]] = {checkpoint.target: {} for checkpoint in checkpoints}
    # GGUF files are made of whole checkpoints, each as soon as its weights are there.
    converting: dict[Any, PendingCheckpoint] = {}
    while pending or converting:
        # In the order of finishing, so that no folder waits for a file of another one.
        (done,), _ = ray.wait([*pending, *converting], num_returns=1)
        if done in converting:
            checkpoint = converting.pop(done)
            digests[checkpoint.target][checkpoint.gguf_file] = ray.get(done)
            _finish(checkpoint, digests[checkpoint.target])
            continue
        file = pending.pop(done)
        digest = ray.get(done)

        for checkpoint in file.checkpoints:
            file.link_into(checkpoint)
            written = digests[checkpoint.target]
            written[file.name] = digest
            if len(written) < len(checkpoint.files):
                continue
            if checkpoint.gguf_type:
                converting[_start_gguf(checkpoint)] = checkpoint
            else:
                _finish(checkpoint, written)
        yield file.n_bytes


def _start_gguf(checkpoint: PendingCheckpoint) -> Any:
    """Start the Ray task that makes the GGUF file of a checkpoint whose weights are written; return its reference."""
    export = checkpoint.export
    # The file is made of the folder, which needs its config and tokenizer for that.
    write_companions(export, checkpoint.partial, checkpoint.files)
    with atomic_write(checkpoint.partial / MODELFILE) as temporary:
        longest = export.base.architecture.max_position_embeddings
        temporary.write_text(modelfile(checkpoint.gguf_file, export.base.folder, longest))

    # The largest tensor, in single precision, beside what is made of its pieces.
    largest = max(torch.Size(tensor.shape).numel() for tensors in checkpoint.files.values() for tensor in tensors)
    task = work_task(write_gguf).options(memory=2 * torch.float32.itemsize * largest)
    path = checkpoint.partial / checkpoint.gguf_file
    return task.remote(checkpoint.partial, checkpoint.gguf_type, checkpoint.title, path)


def _start_writing(checkpoints: list[PendingCheckpoint], files: list[PendingFile]) -> dict[Any, PendingFile]:
    """Start a Ray task for every file, in order, and return the files by the tasks' references."""
    task = work_task(_write_file)
    architecture = checkpoints[0].export.base.architecture
    covariance_memory = task_memory(architecture)

    # Stored once: each of a checkpoint's tasks gets the same export, statistics and all.
    exports = {checkpoint.target: ray.put(checkpoint.export) for checkpoint in checkpoints}

    pending: dict[Any, PendingFile] = {}
    for file in files:
        first = file.checkpoints[0]
        # Ray starts no more tasks on a node than its memory holds.
        memory = first.export.memory_factor * covariance_memory
        limited = task.options(memory=memory)
        pending[limited.remote(exports[first.target], file.tensors, file.path)] = file
    return pending


def _write_file(export: CheckpointExport, tensors: list[OutputTensor], path: StoragePath) -> str:
    """Write one file, or keep it when an earlier attempt at the same plan finished it; return its digest."""

    def build() -> None:
        """Write the file, then its checksum, which makes it whole."""
        WEIGHT_FILE.save_checksum(path, write_tensors(export, tensors, path))

    # The name of the hidden folder, or of a shared file itself, carries the key.
    return Artifact(path, str(path), WEIGHT_FILE).get(build)


def write_temporarily(checkpoint: PendingCheckpoint) -> StoragePath:
    """Write a checkpoint to its hidden folder, which is the caller's to remove, and return that folder.

    A checkpoint that is there for good is not written again; then its own folder is returned.
    """
    # Sizes are enough here: a checkpoint that stays was hashed when the job last wrote or found it.
    if checkpoint.has_sizes():
        return checkpoint.target

    digests = {
        name: _write_file(checkpoint.export, tensors, checkpoint.partial / name)
        for name, tensors in checkpoint.files.items()
    }
    _complete_partial(checkpoint, digests)
    return checkpoint.partial


def _finish(checkpoint: PendingCheckpoint, digests: dict[str, str]) -> None:
    """Complete the hidden folder, give it its name and remove what earlier attempts left."""
    _complete_partial(checkpoint, digests)
    with writable(checkpoint.target):
        checkpoint.partial.move_folder(checkpoint.target, last=MANIFEST)

    # Attempts at other plans of the same name have other fingerprints.
    for leftover in checkpoint.target.parent.glob(f".{checkpoint.target.name}.*.partial"):
        leftover.remove()


def _complete_partial(checkpoint: PendingCheckpoint, digests: dict[str, str]) -> None:
    """Add everything but the weights to the hidden folder, the manifest last."""
    # The manifest says the digests from here on; files beside the weights are no part of a checkpoint.
    for name in digests:
        with writable(checkpoint.partial):
            checksum_path(checkpoint.partial / name).unlink(missing_ok=True)

    finish(checkpoint.export, checkpoint.partial, checkpoint.files, _manifest(checkpoint, digests))


# --- manifest ---------------------------------------------------------------------------------------------------------


def _manifest(checkpoint: PendingCheckpoint, digests: dict[str, str]) -> dict[str, Any]:
    """Return the content of ``seap.json``."""
    base = checkpoint.export.base
    return {
        "fingerprint": checkpoint.fingerprint,
        "source": {
            "model": base.source.name,
            "model_type": base.config["model_type"],
            # The hub's cache holds a model under snapshots/<commit>.
            "revision": base.folder.name if base.folder.parent.name == "snapshots" else None,
            "fingerprint": base.fingerprint,
        },
        **checkpoint_sizes(checkpoint),
        **_target_met(checkpoint),
        "plan": describe_plan(checkpoint.export.plan, base.architecture),
        "files": {
            name: {"digest": digests[name], "bytes": (checkpoint.partial / name).stat().st_size}
            # In the checkpoint's order, whichever was written first.
            for name in sorted(digests, key=[*checkpoint.files, checkpoint.gguf_file].index)
        },
        **_gguf_file(checkpoint, digests),
        **_quantization(checkpoint.export),
        "versions": versions(),
    }


def checkpoint_sizes(checkpoint: PendingCheckpoint) -> dict[str, Any]:
    """Return ratios, parameters and bytes of a checkpoint, as its manifest states them."""
    base = checkpoint.export.base
    plan = checkpoint.export.plan
    stored = [tensor for file in checkpoint.files.values() for tensor in file]
    # Codes and scales of a quantised weight are no parameters: its weights are.
    tensors = checkpoint.export.unquantized_outputs()

    # The ratio counts decoder layers alone, neither embeddings nor head.
    in_layers = [tensor for tensor in tensors if base.architecture.split(tensor.name)[0] is not None]

    return {
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(base.architecture),
        "realised_ratio": 1 - _n_elements(in_layers) / base.architecture.decoder_parameters,
        "parameters": _n_elements(tensors),
        "bytes": sum(tensor.n_bytes for tensor in stored),
        "kv_bytes_per_token": kv_bytes(plan.shapes, base),
    }


def _gguf_file(checkpoint: PendingCheckpoint, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return what the manifest says of the GGUF file; nothing where there is none."""
    if checkpoint.gguf_file not in digests:
        return {}
    base = checkpoint.export.base
    layout = layout_of_plan(checkpoint.export.plan, completed_config(base.config), base.architecture)
    return {"gguf": {"file": checkpoint.gguf_file, "architecture": layout.name, "type": checkpoint.gguf_type}}


def _quantization(export: CheckpointExport) -> dict[str, Any]:
    """Return what the manifest says of how weights are rounded; nothing where they are not."""
    return {"quantization": export.settings.model_dump()} if isinstance(export, QuantizedExport) else {}


def _target_met(checkpoint: PendingCheckpoint) -> dict[str, Any]:
    """Return what was asked for of a target, what was planned, and what the files have; nothing without a target."""
    plan = checkpoint.export.plan
    if plan.target is None:
        return {}
    layers = plan.layers_after(checkpoint.export.base.architecture)
    sizes = checkpoint_sizes(checkpoint)
    met = plan.target.met(layers, parameters=sizes["parameters"], n_bytes=sizes["bytes"])
    return {"target": {**plan.target.to_json(plan.target.cost(layers)), "met": met}}


def target_lines(checkpoints: Iterable[PendingCheckpoint]) -> list[str]:
    """Return a line for each model that has a target: what it may take, and what it takes."""
    lines: list[str] = []
    for checkpoint in checkpoints:
        target = checkpoint.export.plan.target
        if target is not None:
            about = _target_met(checkpoint)["target"]
            planned = target.shown(about["planned"])
            written = "" if about["met"] is None else f", written {target.shown(about['met'])}"
            asked = f"{target.bound} {target.shown(target.limit)}"
            lines.append(f"{checkpoint.spec.name}: {target.kind} {asked}: planned {planned}{written}")
    return lines


def _n_elements(tensors: Iterable[OutputTensor]) -> int:
    """Return the number of elements of some tensors together."""
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors)


def kv_bytes(shapes: Sequence[Shape], base: Checkpoint) -> int:
    """Return the bytes of key-value cache per token, in the checkpoint's dtype."""
    architecture = base.architecture
    name = architecture.first_output
    itemsize = OutputTensor(name, base.tensors[name].dtype, ()).n_bytes

    # Keys and values.
    return sum(2 * shape.groups * architecture.head_dim * itemsize for shape in shapes)
