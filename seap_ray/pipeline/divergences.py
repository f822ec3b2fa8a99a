"""Divergences: cut models in, how far each is from the dense model on held-out calibration tokens out.

The last shard of every task is held out: covariances that compensate a cut model which is measured on it are those of
the other shards. A Ray task measures models on the tokens of one task; what was measured is kept in the run, so that
the same command resumes what was cut short.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from torch import Tensor

from seap_ray.config import Config
from seap_ray.core.moments import Site
from seap_ray.core.sensitivity import Rise
from seap_ray.errors import DataError
from seap_ray.models.cut_costs import CutCosts, measure_cut_costs
from seap_ray.models.divergence import Divergence, measure_divergence
from seap_ray.models.export import CheckpointExport
from seap_ray.models.forward import OpenedLayers
from seap_ray.models.hidden_states import HiddenBatch
from seap_ray.models.records import PooledCovariance
from seap_ray.models.sequences import Sequences
from seap_ray.pipeline.cluster import remote_task
from seap_ray.pipeline.repairs import with_repairs
from seap_ray.pipeline.shard_records import ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.progress import Progress
from seap_ray.storage.artifact import Artifact, JsonFile
from seap_ray.storage.files import write_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

Figures = Mapping[str, Any] | None
"""What was measured of a model on a task, as files have it."""
SCHEMA = 2
"""Version of what is measured; raise it when the numbers change."""


@dataclass(frozen=True, slots=True)
class HeldOutShard:
    """The last shard of a task, on which cut models are measured."""

    shard: Shard
    record: StoragePath | None
    """Its record, whose covariances compensate no model that is measured on it; None where it is the only shard."""
    others: tuple[Shard, ...] = ()
    """All other shards of the task."""


def held_out_shard(records: ShardRecords, shards: Sequence[Shard]) -> HeldOutShard:
    """Return the last of the shards that statistics are merged from."""
    last = shards[-1]
    return HeldOutShard(last, records.path(last) if len(shards) > 1 else None, tuple(shards[:-1]))


@dataclass(frozen=True, slots=True)
class Measured:
    """How far a cut model is from the dense one on held-out tokens, in nats a token."""

    divergence: Rise
    """Kullback-Leibler divergence of the next-token distributions."""
    loss: Rise
    """Rise of the loss on the same tokens, whose noise is larger."""
    costs: Mapping[tuple[int, Site], Rise] = field(default_factory=dict)
    """What the cut of each (layer, site) contributes to the divergence, where that was asked for."""
    sequences: tuple[tuple[float, Tensor, Tensor], ...] = field(default=(), compare=False, repr=False)
    """Of each task its weight, and the summed divergence and the tokens of every sequence, (N,), float64."""

    def above(self, other: "Measured") -> Rise:
        """Return by how much a model diverges more than another one that was measured on the same sequences.

        The standard error is that of differences sequence by sequence, a part of that of either model.
        """
        differences: list[Rise] = []
        for (_, sums_N, tokens_N), (_, other_N, _) in zip(self.sequences, other.sequences, strict=True):
            differences.append(Rise.a_token(sums_N - other_N, tokens_N))
        return Rise.mean_of(differences, [weight for weight, _, _ in self.sequences])


@dataclass(frozen=True)
class Trial:
    """Cut models that are measured together on the held-out tokens of one task, by one Ray task."""

    exports: tuple[CheckpointExport, ...]
    shard: Shard
    n_tokens: int
    """Tokens that are read of the shard at the least, sequence by sequence, where it has so many."""
    by_site: bool
    """Measure what each cut costs, too; takes five forward passes in place of one."""
    key: str

    @classmethod
    def of(cls, config: Config, exports: Sequence[CheckpointExport], shard: Shard, *, by_site: bool) -> "Trial":
        """Name everything that the figures depend on: the model, the tokens, and what is cut and how it is repaired."""
        settings = config.calibration
        n_tokens = config.pruning.held_out_tokens
        cuts = [(export.plan.compensation.name, export.plan.kept, export.plan.dropped) for export in exports]
        statistics = [_statistics_of(export) for export in exports]
        model = exports[0].base.fingerprint, config.model.dtype, settings.batch_tokens, settings.skip_first_token
        key = fingerprint(SCHEMA, model, shard.digest, n_tokens, cuts, statistics, by_site)
        return cls(tuple(exports), shard, n_tokens, by_site, key)

    def artifact(self, run: Run) -> Artifact[dict[str, Any]]:
        """Return the file of what is measured."""
        return Artifact(run.divergences(self.shard.task) / f"{self.key[:20]}.json", self.key, JsonFile())

    def sequences(self, run: Run) -> Sequences:
        """Read the first sequences of the shard, up to the one that reaches the number of tokens."""
        sequences: list[Any] = []
        n_tokens = 0
        for sequence in self.shard.sequences(run):
            if n_tokens >= self.n_tokens:
                break
            sequences.append(sequence)
            n_tokens += len(sequence)
        return sequences


@dataclass(frozen=True)
class PooledTrial:
    """Cut models that are measured on the held-out tokens of several tasks."""

    trials: tuple[Trial, ...]
    """A trial of the same models on each task."""
    weights: tuple[float, ...]
    """What the tokens of each task count together."""

    def load(self, run: Run) -> list[Measured]:
        """Read what was measured of each model, over the tasks by their weights.

        Raises DataError where no task has a token to predict.
        """
        by_task = [trial.artifact(run).load()["models"] for trial in self.trials]
        return [_pooled(figures, self.weights) for figures in zip(*by_task, strict=True)]


def _statistics_of(export: CheckpointExport) -> Any:
    """Return what stands for the statistics that repair a cut model: its plan says which they are."""
    statistics = export.statistics
    sources = [export.plan.provenance.get(name) for name in ("tasks", "statistics", "ridge", "pooling")]
    # Records are named by what they were made from; the folder that they lie in changes nothing.
    records = statistics.held_out if isinstance(statistics, PooledCovariance) else ()
    held_out = [record and record.name for record in records]
    return sources, held_out


def measure_all(
    config: Config, run: Run, pooled_trials: Sequence[PooledTrial], progress: Progress
) -> list[list[Measured]]:
    """Measure the models of every trial, side by side on the cluster; what was measured before is read.

    Raises what a worker raises, and DataError where no task has a token to predict.
    """
    trials = [trial for pooled in pooled_trials for trial in pooled.trials]
    missing = {trial.key: trial for trial in trials if not trial.artifact(run).is_made()}
    if missing:
        total = sum(len(trial.exports) for trial in missing.values())
        for _ in progress(_measure_missing(config, run, [*missing.values()]), total, "judging plans", " measurements"):
            pass
    return [pooled.load(run) for pooled in pooled_trials]


def _measure_missing(config: Config, run: Run, trials: Sequence[Trial]) -> Iterator[int]:
    """Yield the number of models of each trial as it is measured."""
    # As much of a node as a worker of the calibration took.
    settings = config.calibration
    task = remote_task(_measure, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)

    # Models are repaired once for the tokens of all tasks.
    repaired: dict[tuple[int, ...], tuple[CheckpointExport, ...]] = {}
    pending: dict[Any, Trial] = {}
    for trial in trials:
        models = tuple(map(id, trial.exports))
        if models not in repaired:
            repaired[models] = with_repairs(trial.exports)
        ready = replace(trial, exports=repaired[models])
        pending[task.remote(config, run, ray.put(ready))] = trial

    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        ray.get(done)
        yield len(pending.pop(done).exports)


# --- in a Ray task ---------------------------------------------------------------------------------------------------


def _measure(config: Config, run: Run, trial: Trial) -> None:
    """Measure the models of a trial and write their figures."""
    layers = OpenedLayers.open(config, trial.exports[0].base)
    batches = layers.embed(trial.sequences(run))
    measure = _costs if trial.by_site else _divergences
    figures = measure(layers, batches, trial.exports)
    write_json(trial.artifact(run).path, {"fingerprint": trial.key, "models": figures})


def _divergences(
    layers: OpenedLayers, batches: Sequence[HiddenBatch], exports: Sequence[CheckpointExport]
) -> list[Figures]:
    """Return the figures of every model, all measured in one pass over the layers."""
    divergences = measure_divergence(layers.model, layers.forwards(), batches, exports)
    return [_to_json(divergence) for divergence in divergences]


def _costs(layers: OpenedLayers, batches: Sequence[HiddenBatch], exports: Sequence[CheckpointExport]) -> list[Figures]:
    """Return the figures of every model, with what each cut costs."""
    figures: list[Figures] = []
    for export in exports:
        cut_costs = measure_cut_costs(layers.model, layers.forwards(), layers.backwards(), batches, export)
        figures.append(_to_json(cut_costs.divergence, cut_costs))
    return figures


# --- files -----------------------------------------------------------------------------------------------------------


def _to_json(divergence: Divergence, cut_costs: CutCosts | None = None) -> Figures:
    """Return the figures of a model; None where no token is predicted."""
    if not divergence.tokens_N.sum():
        return None
    costs = cut_costs.costs() if cut_costs else {}
    return {
        "divergence": _pair(divergence.rise),
        "loss": _pair(divergence.loss),
        "sequences": [divergence.sums_N.tolist(), divergence.tokens_N.tolist()],
        "costs": [[layer, site, *_pair(cost)] for (layer, site), cost in costs.items()],
    }


def _pair(rise: Rise) -> list[float]:
    return [rise.mean, rise.stderr]


def _pooled(figures: Sequence[Figures], task_weights: Sequence[float]) -> Measured:
    """Return the figures of a model over all tasks, by their weights.

    Raises DataError where no task has a token to predict.
    """
    pairs = [(task, weight) for task, weight in zip(figures, task_weights, strict=True) if task]
    if not pairs:
        raise DataError(
            "pruning.allocation: the held-out texts of the calibration have no token that another one predicts; set "
            "allocation, score and compensation instead of auto, or use longer texts"
        )
    by_task = [task for task, _ in pairs]
    weights = [weight for _, weight in pairs]
    divergences = [Rise(*task["divergence"]) for task in by_task]
    losses = [Rise(*task["loss"]) for task in by_task]
    costs: dict[tuple[int, Site], list[Rise]] = {}
    for task in by_task:
        for layer, site, mean, stderr in task["costs"]:
            costs.setdefault((layer, site), []).append(Rise(mean, stderr))

    return Measured(
        Rise.mean_of(divergences, weights),
        Rise.mean_of(losses, weights),
        {key: Rise.mean_of(rises, weights) for key, rises in costs.items()},
        tuple((weight, *_sums(task)) for task, weight in pairs),
    )


def _sums(task: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the summed divergence and the tokens of every sequence."""
    sums_N, tokens_N = torch.tensor(task["sequences"], dtype=torch.float64)
    return sums_N, tokens_N
