"""Error correction: planned models in, the same with a file each of what corrects their layers' errors, out.

One Ray task a model runs the dense and the cut model side by side, with as much of a node as a worker of the
calibration took. What was fitted is kept in the run, so that the same command resumes what was cut short.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from torch import Tensor

from seap_ray.config import Config
from seap_ray.core.reconstruction import DEFAULT_RIDGE
from seap_ray.models.error_correction import Stream, correct_errors, is_correctable
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import OpenedLayers
from seap_ray.models.records import TensorFile, open_tensors, save_tensors
from seap_ray.models.sequences import Sequences
from seap_ray.pipeline.cluster import remote_task
from seap_ray.pipeline.plan_choice import PlannedModel
from seap_ray.pipeline.planner import Planner
from seap_ray.pipeline.repairs import with_repairs
from seap_ray.pipeline.shards import Shard
from seap_ray.progress import Progress
from seap_ray.storage.artifact import Artifact
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

SCHEMA = 2
"""Version of what is fitted; raise it when the numbers change."""
MAX_TOKENS = 1 << 17
"""Tokens of all tasks of a model that a fit reads at most: their hidden states are in memory twice."""


@dataclass(frozen=True)
class FileCorrections(Mapping[int, Mapping[str, Tensor]]):
    """Corrections of a model's layers (``export.Corrections``) in a file, read a layer at a time."""

    path: StoragePath

    def __getitem__(self, layer: int) -> Mapping[str, Tensor]:
        """Return what is added to the ``weight`` and, where compensation makes one, the ``bias`` of ``down_proj``."""
        with open_tensors(self.path) as file:
            names = [name for name in file.keys() if name.partition(".")[0] == str(layer)]
            return {name.partition(".")[2]: file.get_tensor(name) for name in names}

    def __iter__(self) -> Iterator[int]:
        """Yield the layers that are corrected, in order."""
        with open_tensors(self.path) as file:
            return iter(sorted({int(name.partition(".")[0]) for name in file.keys()}))

    def __len__(self) -> int:
        """Return the number of layers that are corrected."""
        return len(list(iter(self)))


@dataclass(frozen=True)
class CorrectionFit:
    """What is fitted for one cut model: on which sequences, and how much of it is taken."""

    export: CheckpointExport
    shards: Mapping[str, Sequence[Shard]]
    """Shards of each of the model's statistics."""
    weights: Mapping[str, float]
    """What the tokens of each count together."""
    share: float | None
    """None: the share and the ridge of each layer are those that its last shard, which is held out, says."""
    ridge: float
    key: str

    @classmethod
    def of(cls, planner: Planner, model: PlannedModel) -> "CorrectionFit":
        """Name everything that the corrections of a model depend on."""
        config = planner.config
        plan = model.export.plan
        weights = model.spec.weights
        setting = model.spec.settings.error_correction
        share = None if setting == "auto" else setting or 0.0
        ridge = DEFAULT_RIDGE if config.pruning.ridge == "auto" else config.pruning.ridge

        shards: dict[str, Sequence[Shard]] = {}
        hashes: dict[str, list[str]] = {}
        for name in weights:
            held_out = planner.held_out[name]
            shards[name] = (*held_out.others, held_out.shard)
            hashes[name] = [shard.digest for shard in shards[name]]

        settings = config.calibration
        base = model.export.base.fingerprint
        how = (config.model.dtype, settings.batch_tokens, settings.skip_first_token, MAX_TOKENS, share, ridge)
        repair = [plan.provenance[name] for name in ("tasks", "statistics", "ridge")]
        key = fingerprint(SCHEMA, base, how, weights, hashes, plan.compensation.name, plan.kept, repair)
        return cls(model.export, shards, weights, share, ridge, key)

    def artifact(self, run: Run) -> Artifact[dict[str, Any]]:
        """Return the file of corrections."""
        return Artifact(run.correction(self.key[:20]), self.key, TensorFile())

    def sequences(self, run: Run, name: str) -> tuple[Sequences, Sequences]:
        """Read the sequences of a task that are fitted on, and the held-out ones.

        They are the first ones, up to the one that reaches the task's part of ``MAX_TOKENS``. The held-out shard comes
        first, since there are no more than that of held-out tokens, and a task of a single shard has none.
        """
        *others, held_out = self.shards[name]
        room = MAX_TOKENS // len(self.shards)
        if not others:
            return _first_sequences(self.shards[name], run, room), []
        kept_out = _first_sequences([held_out], run, room // 2)
        return _first_sequences(others, run, room - sum(map(len, kept_out))), kept_out


def _first_sequences(shards: Sequence[Shard], run: Run, n_tokens: int) -> Sequences:
    """Read the sequences of some shards, up to the one that reaches a number of tokens."""
    sequences: list[Any] = []
    n_read = 0
    for shard in shards:
        for sequence in shard.sequences(run):
            if n_read >= n_tokens:
                return sequences
            sequences.append(sequence)
            n_read += len(sequence)
    return sequences


def correct_models(planner: Planner, models: Sequence[PlannedModel], progress: Progress) -> list[PlannedModel]:
    """Return the models with their corrections, which are fitted side by side on the cluster unless they are there.

    Models that ask for none, or cannot have any, stay as they are. Raises what a worker raises.
    """
    fits: dict[int, CorrectionFit] = {}
    for number, model in enumerate(models):
        plan = model.export.plan
        is_possible = is_correctable(plan, planner.checkpoint.architecture) and plan.requested
        if model.spec.settings.error_correction and is_possible:
            fits[number] = CorrectionFit.of(planner, model)

    missing = {fit.key: fit for fit in fits.values() if not fit.artifact(planner.run).is_made()}
    if missing:
        steps = _fit_missing(planner.config, planner.run, [*missing.values()])
        for _ in progress(steps, len(missing), "correcting errors", " models"):
            pass
    return [
        _corrected(model, fits[number], planner.run) if number in fits else model for number, model in enumerate(models)
    ]


def _corrected(model: PlannedModel, fit: CorrectionFit, run: Run) -> PlannedModel:
    """Return a model with its corrections, which its plan names."""
    plan = model.export.plan
    chosen = {"share": "auto"} if fit.share is None else {"share": fit.share, "ridge": fit.ridge}
    about = {**chosen, "fingerprint": fit.key}
    plan = replace(plan, provenance={**plan.provenance, "error_correction": about})
    export = replace(model.export, plan=plan, corrections=FileCorrections(fit.artifact(run).path))
    return replace(model, export=export)


def _fit_missing(config: Config, run: Run, fits: Sequence[CorrectionFit]) -> Iterator[int]:
    """Yield 1 for each model that is fitted."""
    settings = config.calibration
    task = remote_task(_fit, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)

    pending: list[Any] = []
    for fit in fits:
        (repaired,) = with_repairs((fit.export,))
        pending.append(task.remote(config, run, ray.put(replace(fit, export=repaired))))

    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        ray.get(done[0])
        yield 1


def _fit(config: Config, run: Run, fit: CorrectionFit) -> None:
    """Fit the corrections of a model in a Ray task, and write them."""
    layers = OpenedLayers.open(config, fit.export.base)
    streams: list[Stream] = []
    for name, weight in fit.weights.items():
        fitted, held_out = (layers.embed(sequences) for sequences in fit.sequences(run, name))
        streams.append(Stream([*fitted, *held_out], weight, len(held_out)))

    tensors: dict[str, Tensor] = {}
    corrections = correct_errors(layers.forwards(), streams, fit.export, share=fit.share, ridge=fit.ridge)
    for layer, correction in corrections:
        tensors |= {f"{layer}.{kind}": tensor for kind, tensor in correction.items()}
    save_tensors(fit.artifact(run).path, tensors, fingerprint=fit.key)
