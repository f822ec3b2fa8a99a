"""Prune: statistics in, plans and compacted checkpoints out. The driver plans; Ray tasks write, one a file.

A plan takes a second at most and a checkpoint a copy, so another ratio or score of a finished run costs seconds.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save_file

from seap_ray.checkpoint import (
    Checkpoint,
    Compaction,
    OutputTensor,
    check_stock,
    finish,
    parse_size,
    split_name,
    versions,
    write_tensors,
)
from seap_ray.compact import COLUMNS
from seap_ray.config import Config, PlanSettings
from seap_ray.moments import SITES, Moments, Site, Statistics, pooled
from seap_ray.plan import Plan, choose_shapes, keep
from seap_ray.records import about_moments, is_whole, load_statistics, save_moments
from seap_ray.run import Run, fingerprint, publishing, read_json, sha256_of, write_json
from seap_ray.scores import SCORES, Norms, WeightNorms, head_scores

MODULE_OF: dict[Site, str] = dict(zip(SITES, COLUMNS, strict=True))


@dataclass(frozen=True, slots=True)
class Spec:
    """One model to be cut: its name, the tasks whose statistics it uses with their weights, and how."""

    name: str
    kind: str
    """``expert``, ``general`` or ``baseline``."""
    weights: dict[str, float]
    settings: PlanSettings
    pooling: str = "pooled"


def specs(config: Config) -> list[Spec]:
    """The general model, one expert per task, and the baselines."""
    pruning, weights = config.pruning, {task.name: task.weight for task in config.tasks}
    general, fill = pruning.general, config.plan_settings
    made = [Spec("general", "general", weights, fill(general), general.pooling)]
    made += [Spec(task, "expert", {task: 1.0}, fill(pruning.experts)) for task in weights]
    for name, baseline in pruning.baselines.items():
        chosen = {task: weights[task] for task in baseline.tasks or weights}
        made.append(Spec(name, "baseline", chosen, fill(baseline), baseline.pooling))
    return made


# --- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planner:
    """Everything that plans are made from, read once."""

    config: Config
    checkpoint: Checkpoint
    statistics: dict[str, Statistics]
    norms: WeightNorms
    made_of: dict[str, str]
    """Fingerprint of each task's statistics."""

    def plan(self, spec: Spec, ratio: float) -> Plan:
        """Raises ConfigError when floors, caps and protection do not allow the ratio."""
        architecture, pruning, settings = self.checkpoint.architecture, self.config.pruning, spec.settings
        scores_L = self._scores(spec)
        stock = self.config.export.format == "stock"
        shapes = choose_shapes(
            architecture,
            pruning,
            ratio=ratio,
            kind=settings.allocation or "",
            compensated=settings.compensation != "none",
            scores_L=scores_L,
            stock=stock,
        )
        kept = tuple(keep(s, architecture.dense, *scores) for s, scores in zip(shapes, scores_L, strict=True))
        provenance = {
            "kind": spec.kind,
            "score": settings.score,
            "allocation": {**pruning.allocation.model_dump(), "kind": settings.allocation},
            "budget": pruning.budget,
            "pooling": spec.pooling,
            "tasks": spec.weights,
            "statistics": {task: self.made_of[task] for task in spec.weights},
        }
        plan = Plan(spec.name, ratio, settings.compensation or "none", kept, provenance)
        if stock:
            check_stock(plan, architecture)
        return plan

    def _scores(self, spec: Spec) -> list[tuple[torch.Tensor, torch.Tensor]]:
        architecture = self.checkpoint.architecture
        attn, mlp = (self._site_scores(spec, site) for site in SITES)
        return [(head_scores(a, architecture.head_dim), m) for a, m in zip(attn, mlp, strict=True)]

    def _site_scores(self, spec: Spec, site: Site) -> list[torch.Tensor]:
        score, layers = SCORES[spec.settings.score or ""], range(self.checkpoint.architecture.n_layers)
        if spec.pooling == "pooled":
            mixed = self.mixed(spec)
            return [score(mixed[layer, site], self.norms[layer, site]) for layer in layers]
        # The paper's general score: the sum over tasks, weighted 3 for language-model corpora and 2 for the others.
        return [
            torch.stack(
                [w * score(self.statistics[t][layer, site], self.norms[layer, site]) for t, w in spec.weights.items()]
            ).sum(0)
            for layer in layers
        ]

    def mixed(self, spec: Spec) -> Statistics:
        """Moments of the spec's tasks as one stream, each task counting by its weight."""
        parts, weights = [self.statistics[task] for task in spec.weights], list(spec.weights.values())
        if len(parts) == 1:
            return parts[0]
        return {key: pooled([part[key] for part in parts], weights) for key in parts[0]}


def make_planner(config: Config, checkpoint: Checkpoint, run: Run, statistics: dict[str, Path]) -> Planner:
    """Read the statistics and the weight norms; norms are computed once per run, in Ray tasks."""
    made_of = {task: about_moments(path)["sha256"] for task, path in statistics.items()}
    loaded = {task: load_statistics(path, checkpoint.architecture) for task, path in statistics.items()}
    return Planner(config, checkpoint, loaded, _weight_norms(config, checkpoint, run), made_of)


def _weight_norms(config: Config, checkpoint: Checkpoint, run: Run) -> WeightNorms:
    path, architecture = run.statistics("weight_norms"), checkpoint.architecture
    if not is_whole(path, model=checkpoint.fingerprint):
        layers = ray.remote(_layer_norms)
        model = config.model
        parts = ray.get([layers.remote(model.source, model.revision, layer) for layer in range(architecture.n_layers)])
        # Stored as moments: mean holds the L1 norm, m2 the squared L2 norm, count the output width.
        named = {
            (layer, site): Moments(architecture.hidden_size, norms.l1_D, norms.l2_D)
            for layer, part in enumerate(parts)
            for site, norms in part.items()
        }
        save_moments(path, named, model=checkpoint.fingerprint)
    stored = load_statistics(path, architecture)
    return {key: Norms(moments.mean_D, moments.m2_D) for key, moments in stored.items()}


def _layer_norms(source: str, revision: str | None, layer: int) -> dict[Site, Norms]:
    checkpoint = Checkpoint.open(source, revision)
    names = {site: checkpoint.architecture.tensor(layer, module) for site, module in MODULE_OF.items()}
    return {site: Norms.of(checkpoint.read(name)) for site, name in names.items()}


def save_plan(plan: Plan, architecture: Any, path: Path) -> None:
    """``<name>.json`` for people, ``<name>.safetensors`` with the kept indices, int32."""
    indices = {
        f"layers.{layer}.{unit}": torch.tensor(getattr(kept, unit), dtype=torch.int32)
        for layer, kept in enumerate(plan.kept)
        for unit in ("groups", "heads", "channels")
    }
    with publishing(path.with_suffix(".safetensors")) as temporary:
        save_file(indices, temporary)
    write_json(path, describe(plan, architecture))


def describe(plan: Plan, architecture: Any) -> dict[str, Any]:
    """What a plan does, without its indices."""
    widths = [{"heads": s.heads, "kv_heads": s.groups, "channels": s.channels} for s in plan.shapes]
    return {
        "name": plan.name,
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(architecture),
        "compensation": plan.compensation,
        **plan.provenance,
        "layers": widths,
    }


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expert:
    """A written checkpoint."""

    name: str
    kind: str
    ratio: float
    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """A checkpoint on its way: written to a hidden folder, which gets its name when it is whole."""

    spec: Spec
    compaction: Compaction
    target: Path
    fingerprint: str
    files: dict[str, list[OutputTensor]]

    @property
    def hidden(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{self.fingerprint[:12]}.partial")


def prune(planner: Planner, run: Run, progress: Callable[[Iterable[int], int, str], Iterable[int]]) -> list[Expert]:
    """Plan and write every model at every ratio; a checkpoint that is there and made the same way stays.

    All plans are made before anything is written, so a ratio that cannot be met costs nothing.
    """
    config = planner.config
    plans = [(spec, planner.plan(spec, ratio)) for ratio in config.pruning.ratio for spec in specs(config)]
    for _, plan in plans:
        save_plan(plan, planner.checkpoint.architecture, run.plan(plan.requested, plan.name))
    jobs = [_job(planner, run, spec, plan) for spec, plan in plans]
    todo = [job for job in jobs if not _is_written(job)]
    if todo:
        total = sum(output.n_bytes for job in todo for outputs in job.files.values() for output in outputs)
        for _ in progress(_write_all(todo), total, "writing"):
            pass
    return [
        Expert(
            job.spec.name, job.spec.kind, job.compaction.plan.requested, job.target, read_json(job.target / "seap.json")
        )
        for job in jobs
    ]


def _job(planner: Planner, run: Run, spec: Spec, plan: Plan) -> _Job:
    export = planner.config.export
    statistics = planner.mixed(spec) if plan.compensation != "none" else None
    compaction = Compaction(planner.checkpoint, plan, statistics, stock=export.format == "stock")
    made_of = fingerprint(
        planner.checkpoint.fingerprint, plan.provenance, plan.compensation, plan.kept, export.model_dump(), versions()
    )
    files = compaction.files(parse_size(export.max_shard_size))
    return _Job(spec, compaction, run.expert(plan.requested, plan.name), made_of, files)


def _is_written(job: _Job) -> bool:
    manifest = read_json(job.target / "seap.json")
    return (
        bool(manifest)
        and manifest.get("fingerprint") == job.fingerprint
        and all(
            (job.target / name).is_file() and (job.target / name).stat().st_size == about["bytes"]
            for name, about in manifest["files"].items()
        )
    )


def _write_all(jobs: list[_Job]) -> Iterator[int]:
    """Yield the bytes of each file as it is written; finish each folder when its last file is there."""
    write = ray.remote(_write_file)
    pending: dict[Any, tuple[_Job, str]] = {}
    hashes: dict[Path, dict[str, str]] = {job.target: {} for job in jobs}
    for job in jobs:
        compaction = ray.put(job.compaction)
        for name, outputs in job.files.items():
            pending[write.remote(compaction, outputs, job.hidden / name)] = job, name
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        job, name = pending.pop(done)
        hashes[job.target][name] = ray.get(done)
        if len(hashes[job.target]) == len(job.files):
            _finish(job, hashes[job.target])
        yield sum(output.n_bytes for output in job.files[name])


def _write_file(compaction: Compaction, outputs: list[OutputTensor], path: Path) -> str:
    """Write one file, or keep it when an earlier attempt at the same plan finished it; return its sha256."""
    return sha256_of(path) if path.is_file() else write_tensors(compaction, outputs, path)


def _finish(job: _Job, hashes: dict[str, str]) -> None:
    finish(job.compaction, job.hidden, job.files, _manifest(job, hashes))
    shutil.rmtree(job.target, ignore_errors=True)
    job.hidden.rename(job.target)
    for leftover in job.target.parent.glob(f".{job.target.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _manifest(job: _Job, hashes: dict[str, str]) -> dict[str, Any]:
    base, plan = job.compaction.base, job.compaction.plan
    tensors = [output for outputs in job.files.values() for output in outputs]
    after = sum(_numel(output) for output in tensors if split_name(output.name)[0] is not None)
    return {
        "fingerprint": job.fingerprint,
        "source": {
            "model": str(base.folder),
            # The hub's cache holds a model under snapshots/<commit>.
            "revision": base.folder.name if base.folder.parent.name == "snapshots" else None,
            "fingerprint": base.fingerprint,
        },
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(base.architecture),
        "realised_ratio": 1 - after / base.architecture.decoder_parameters,
        "parameters": sum(_numel(output) for output in tensors),
        "bytes": sum(output.n_bytes for output in tensors),
        "kv_bytes_per_token": _kv_bytes(plan, base),
        "plan": describe(plan, base.architecture),
        "files": {name: {"sha256": hashes[name], "bytes": (job.hidden / name).stat().st_size} for name in job.files},
        "versions": versions(),
    }


def _numel(output: OutputTensor) -> int:
    return torch.Size(output.shape).numel()


def _kv_bytes(plan: Plan, base: Checkpoint) -> int:
    """Bytes of key-value cache per token, in the checkpoint's dtype."""
    architecture = base.architecture
    name = architecture.tensor(0, "self_attn.o_proj")
    item = OutputTensor(name, base.tensors[name].dtype, ()).n_bytes
    return sum(2 * shape.groups * architecture.head_dim * item for shape in plan.shapes)
