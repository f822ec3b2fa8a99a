"""Prune: statistics in, plans and compacted checkpoints out. The driver plans; Ray tasks write, one a file.

A plan takes a second at most and a checkpoint a copy, so another ratio or score of a finished run costs seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from safetensors.torch import save_file

from seap_ray.architecture import Architecture, Shape
from seap_ray.bucket import AnyPath
from seap_ray.checkpoint import (
    Checkpoint,
    Compaction,
    OutputTensor,
    check_stock,
    finish,
    parse_size,
    versions,
    write_tensors,
)
from seap_ray.cluster import work_task
from seap_ray.config import Baseline, Config, PlanSettings, PruningSection
from seap_ray.moments import SITES, Moments, Site, Statistics, pooled
from seap_ray.plan import Kept, LayerScores, Plan, choose_dropped, choose_shapes, keep
from seap_ray.reconstruction import UNIT_SCORES
from seap_ray.records import (
    Mixture,
    about_moments,
    is_whole,
    load_statistics,
    load_unit_scores,
    save_moments,
    save_tensors,
    task_memory,
)
from seap_ray.run import Run, fingerprint
from seap_ray.scores import SCORES, Norms, WeightNorms, head_scores, random_score, standardised, trusted
from seap_ray.storage import move_folder, publishing, read_json, remove, sha256_of, writable, write_json


@dataclass(frozen=True, slots=True)
class Spec:
    """One model to be cut: its name, the statistics that it uses with their weights, and how."""

    name: str
    kind: str
    """``expert``, ``general`` or ``baseline``."""
    method: str
    """Name of the settings; those of several tasks are one method."""
    weights: dict[str, float]
    """By name of the statistics: a task's, or a part of them."""
    settings: PlanSettings
    pooling: str = "pooled"
    task: str | None = None
    """The one task that it is made for."""


def specs(config: Config) -> list[Spec]:
    """The general model, one expert per task, and the baselines."""
    pruning, weights = config.pruning, {task.name: task.weight for task in config.tasks}
    general, fill = pruning.general, config.plan_settings
    made = [Spec("general", "general", "general", weights, fill(general), general.pooling)]
    made += [
        Spec(task, "expert", "experts", _expert_weights(config, task), fill(pruning.experts), task=task)
        for task in weights
    ]
    for name, baseline in pruning.baselines.items():
        made += baseline_specs(config, name, baseline)
    return made


def _expert_weights(config: Config, task: str) -> dict[str, float]:
    """Weights of an expert's statistics: its task alone, or with a share of all tasks."""
    mix, total = config.pruning.experts.mix, sum(task.weight for task in config.tasks)
    shares = {other.name: mix * other.weight / total + (1 - mix) * (other.name == task) for other in config.tasks}
    return {name: share for name, share in shares.items() if share}


def baseline_specs(config: Config, name: str, baseline: Baseline) -> list[Spec]:
    """One model of a baseline, or one for each task."""
    weights, settings = {task.name: task.weight for task in config.tasks}, config.plan_settings(baseline)
    chosen = baseline.tasks or tuple(weights)
    if baseline.per_task:
        return [Spec(f"{name}.{t}", "baseline", name, {t: 1.0}, settings, task=t) for t in chosen]
    return [Spec(name, "baseline", name, {t: weights[t] for t in chosen}, settings, baseline.pooling)]


# --- plans -----------------------------------------------------------------------------------------------------------


def section_of(config: Config, settings: PlanSettings) -> PruningSection:
    """The pruning section as one plan has it. ``settings`` leave nothing out (``Config.plan_settings``)."""
    own = settings.model_dump(include={"score", "compensation", "budget"})
    curve = settings.model_dump(include={"k", "x0"})
    allocation = config.pruning.allocation.model_copy(update={"kind": settings.allocation, **curve})
    return config.pruning.model_copy(update={**own, "allocation": allocation})


@dataclass(frozen=True)
class Planner:
    """Everything that plans are made from, read once."""

    config: Config
    checkpoint: Checkpoint
    statistics: dict[str, Statistics]
    norms: WeightNorms
    made_of: dict[str, str]
    """Fingerprint of each task's statistics."""
    files: dict[str, AnyPath]
    """The statistics' files, with covariances beside them where the run has them."""
    run: Run

    def plan(self, spec: Spec, ratio: float) -> Plan:
        """Raises ConfigError when floors, caps and protection do not allow the ratio."""
        pruning = section_of(self.config, spec.settings)
        make = self._depth_plan if pruning.allocation.kind == "depth" else self._width_plan
        plan = make(spec, pruning, ratio)
        if self.config.export.format == "stock":
            check_stock(plan, self.checkpoint.architecture)
        return plan

    def _width_plan(self, spec: Spec, pruning: PruningSection, ratio: float) -> Plan:
        architecture, of_units = self.checkpoint.architecture, pruning.score in UNIT_SCORES
        scores_L = self._unit_scores(spec, pruning) if of_units else self._scores(spec)
        shapes = choose_shapes(
            architecture,
            pruning,
            ratio=ratio,
            compensated=pruning.compensation != "none",
            scores_L=scores_L,
            comparable=of_units,
            stock=self.config.export.format == "stock",
        )
        kept = tuple(keep(s, architecture.dense, *scores) for s, scores in zip(shapes, scores_L, strict=True))
        about: dict[str, Any] = {"seed": spec.settings.seed} if pruning.score == "random" else {}
        if of_units:
            about = {"unit_scores": self._unit_scores_print(spec, pruning)}
        if of_units or pruning.compensation == "least_squares":
            about["ridge"] = pruning.ridge
        provenance = self._provenance(spec, pruning, score=pruning.score, **about)
        return Plan(spec.name, ratio, pruning.compensation, kept, provenance)

    def _depth_plan(self, spec: Spec, pruning: PruningSection, ratio: float) -> Plan:
        """Whole layers go, by ShortGPT's Block Influence (arXiv 2403.03853); there is nothing to compensate."""
        architecture, mixed = self.checkpoint.architecture, self.mixed(spec)
        influence_L = [1 - float(mixed[layer, "block"].mean_D) for layer in range(architecture.n_layers)]
        dropped = choose_dropped(architecture, pruning, ratio=ratio, influence_L=influence_L)
        kept = (Kept.whole(architecture),) * (architecture.n_layers - len(dropped))
        return Plan(spec.name, ratio, "none", kept, self._provenance(spec, pruning, score=None), dropped)

    def _provenance(self, spec: Spec, pruning: PruningSection, **scored: Any) -> dict[str, Any]:
        return {
            "kind": spec.kind,
            **scored,
            "allocation": pruning.allocation.model_dump(),
            "budget": pruning.budget,
            "pooling": spec.pooling,
            "tasks": spec.weights,
            "statistics": {task: self.made_of[task] for task in spec.weights},
        }

    def _scores(self, spec: Spec) -> list[LayerScores]:
        attn, mlp = (self._site_scores(spec, site) for site in SITES)
        if spec.settings.allocation == "standardised":  # column by column; a layer's own ranking stays as it is
            attn, mlp = ([standardised(score_D) for score_D in score_L] for score_L in (attn, mlp))
        head_dim = self.checkpoint.architecture.head_dim
        return [(head_scores(a, head_dim), m) for a, m in zip(attn, mlp, strict=True)]

    def _site_scores(self, spec: Spec, site: Site) -> list[torch.Tensor]:
        """Scores of a site's columns in every layer: (D,), of a mixture's experts (E, C)."""
        layers = range(self.checkpoint.architecture.n_layers)
        if spec.settings.score == "random":
            return [self._random_score(spec.settings.seed or 0, layer, site) for layer in layers]
        score = SCORES[spec.settings.score or ""]
        if spec.pooling == "pooled":
            mixed = self.mixed(spec)
            return [self._score(score, mixed, layer, site) for layer in layers]
        return [self._summed_score(score, spec, layer, site) for layer in layers]

    def _summed_score(
        self, score: Callable[[Moments, Norms], torch.Tensor], spec: Spec, layer: int, site: Site
    ) -> torch.Tensor:
        """The paper's general score: the sum over tasks, weighted 3 for language-model corpora and 2 for the others."""
        each = [w * self._score(score, self.statistics[t], layer, site) for t, w in spec.weights.items()]
        return torch.stack(each).sum(0)

    def _random_score(self, seed: int, layer: int, site: Site) -> torch.Tensor:
        sites = self.checkpoint.architecture.sites(site)
        of = [random_score(self.norms[layer, s].l1_D.numel(), seed, layer=layer, site=s) for s in sites]
        return of[0] if len(of) == 1 else torch.stack(of)

    def _score(
        self, score: Callable[[Moments, Norms], torch.Tensor], of: Statistics, layer: int, site: Site
    ) -> torch.Tensor:
        sites = self.checkpoint.architecture.sites(site)
        if len(sites) == 1:
            return score(of[layer, site], self.norms[layer, site])
        experts = trusted([of[layer, one] for one in sites])
        return torch.stack([score(e, self.norms[layer, one]) for e, one in zip(experts, sites, strict=True)])

    def _unit_scores(self, spec: Spec, pruning: PruningSection) -> list[LayerScores]:
        """Scores from covariances, made in Ray tasks, a layer each, and kept for the next plan."""
        architecture, name = self.checkpoint.architecture, self._unit_scores_print(spec, pruning)
        path = self.run.unit_scores(name)
        if not is_whole(path):
            mixtures = [self.mixture(spec)]
            if spec.pooling == "score_average":
                mixtures = [Mixture((self.files[t],), (w,), self.mixture(spec).ridge) for t, w in spec.weights.items()]
            score = work_task(_layer_scores, memory=task_memory(architecture))
            parts = [
                score.remote(self.checkpoint, mixtures, pruning.score, pruning.attention_unit, layer)
                for layer in range(architecture.n_layers)
            ]
            found = enumerate(ray.get(parts))
            save_tensors(path, {f"{layer}.{unit}": tensor for layer, part in found for unit, tensor in part.items()})
        return [(of["heads"], of["channels"]) for of in load_unit_scores(path, range(architecture.n_layers))]

    def _unit_scores_print(self, spec: Spec, pruning: PruningSection) -> str:
        made_of = {task: (weight, self.made_of[task]) for task, weight in spec.weights.items()}
        return fingerprint(made_of, spec.pooling, pruning.score, pruning.ridge, pruning.attention_unit)[:20]

    def mixture(self, spec: Spec) -> Mixture:
        """Covariances of the spec's tasks as one stream, read when they are asked for."""
        ridge = self.config.pruning.ridge
        files = tuple(self.files[task] for task in spec.weights)
        return Mixture(files, tuple(spec.weights.values()), None if ridge == "auto" else ridge)

    def mixed(self, spec: Spec) -> Statistics:
        """Moments of the spec's tasks as one stream, each task counting by its weight."""
        parts, weights = [self.statistics[task] for task in spec.weights], list(spec.weights.values())
        if len(parts) == 1:
            return parts[0]
        return {key: pooled([part[key] for part in parts], _shares(parts, weights, key)) for key in parts[0]}


def _shares(parts: Sequence[Statistics], weights: Sequence[float], key: tuple[int, Site]) -> list[float]:
    """What each stream is of the mixture at a site: of an expert's, by how much of the stream is routed to it."""
    layer, _ = key
    routed = [w * part[key].count / part[layer, "attn"].count for w, part in zip(weights, parts, strict=True)]
    return routed if sum(routed) else list(weights)


def make_planner(config: Config, checkpoint: Checkpoint, run: Run, statistics: dict[str, AnyPath]) -> Planner:
    """Read the statistics and the weight norms; norms are computed once per run, in Ray tasks."""
    made_of = {task: about_moments(path)["sha256"] for task, path in statistics.items()}
    loaded = {task: load_statistics(path, checkpoint.architecture) for task, path in statistics.items()}
    return Planner(config, checkpoint, loaded, _weight_norms(checkpoint, run), made_of, statistics, run)


def _layer_scores(
    checkpoint: Checkpoint, mixtures: Sequence[Mixture], score: str, attention_unit: str, layer: int
) -> dict[str, torch.Tensor]:
    """Scores of one layer's heads and channels, summed over the mixtures by their weights, float64.

    Where whole groups go, a group is a block, and its score is spread evenly over its heads.
    """
    architecture = checkpoint.architecture
    heads = 1 if attention_unit == "head" else architecture.dense.heads_per_group
    blocks: dict[Site, int] = {"attn": heads * architecture.head_dim, "mlp": 1}

    def of(site: Site) -> torch.Tensor:
        weight, key = checkpoint.read(architecture.tensor(layer, architecture.modules[site])), (layer, site)
        found = [UNIT_SCORES[score](m[key], weight, block=blocks[site], ridge=m.ridge_of(key)) for m in mixtures]
        return torch.stack([sum(m.weights) * scores for m, scores in zip(mixtures, found, strict=True)]).sum(0)

    return {"heads": of("attn").repeat_interleave(heads) / heads, "channels": of("mlp")}


def _weight_norms(checkpoint: Checkpoint, run: Run) -> WeightNorms:
    path, architecture = run.statistics("weight_norms"), checkpoint.architecture
    if not is_whole(path, model=checkpoint.fingerprint):
        layers = work_task(_layer_norms)
        parts = ray.get([layers.remote(checkpoint, layer) for layer in range(architecture.n_layers)])
        # Stored as moments: mean holds the L1 norm, m2 the squared L2 norm, count the output width.
        named = {
            (layer, site): Moments(architecture.hidden_size, norms.l1_D, norms.l2_D)
            for layer, part in enumerate(parts)
            for site, norms in part.items()
        }
        save_moments(path, named, model=checkpoint.fingerprint)
    stored = load_statistics(path, architecture, sites=SITES)
    return {key: Norms(moments.mean_D, moments.m2_D) for key, moments in stored.items()}


def _layer_norms(checkpoint: Checkpoint, layer: int) -> dict[Site, Norms]:
    names = {
        site: checkpoint.architecture.tensor(layer, module) for site, module in checkpoint.architecture.modules.items()
    }
    return {site: Norms.of(checkpoint.read(name)) for site, name in names.items()}


def save_plan(plan: Plan, architecture: Architecture, path: AnyPath) -> None:
    """``<name>.json`` for people, ``<name>.safetensors`` with the kept indices, int32.

    A channel of a mixture's expert has the number that it would have if all experts lay one after another.
    """
    indices = {}
    for layer, kept in _by_layer(plan).items():
        width = len(kept.channels) // kept.experts
        channels = [c + i // max(width, 1) * architecture.dense.channels for i, c in enumerate(kept.channels)]
        for unit, of in (("groups", kept.groups), ("heads", kept.heads), ("channels", channels)):
            indices[f"layers.{layer}.{unit}"] = torch.tensor(of, dtype=torch.int32)
    with publishing(path.with_suffix(".safetensors")) as temporary:
        save_file(indices, temporary)
    write_json(path, describe(plan, architecture))


def _by_layer(plan: Plan) -> dict[int, Kept]:
    """What is kept of every layer of the base: of one that goes as a whole, nothing."""
    of = dict(zip(plan.layers, plan.kept, strict=True)) | dict.fromkeys(plan.dropped, Kept((), (), ()))
    return dict(sorted(of.items()))


def describe(plan: Plan, architecture: Architecture) -> dict[str, Any]:
    """What a plan does, without its indices; widths are those of every layer of the base."""
    of = _by_layer(plan).values()
    widths = [{"heads": len(k.heads), "kv_heads": len(k.groups), "channels": len(k.channels) // k.experts} for k in of]
    kept_layers = {"kept_layers": list(plan.layers)} if plan.dropped else {}
    return {
        "name": plan.name,
        "requested_ratio": plan.requested,
        "planned_ratio": plan.planned(architecture),
        "compensation": plan.compensation,
        **plan.provenance,
        **kept_layers,
        "layers": widths,
    }


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A checkpoint to be: written to a hidden folder, which gets its name when it is whole."""

    spec: Spec
    compaction: Compaction
    target: AnyPath
    fingerprint: str
    files: dict[str, list[OutputTensor]]

    @property
    def hidden(self) -> AnyPath:
        return self.target.with_name(f".{self.target.name}.{self.fingerprint[:12]}.partial")


def prune(planner: Planner, run: Run, progress: Callable[[Iterable[int], int, str], Iterable[int]]) -> list[Draft]:
    """Plan and write every model at every ratio; a checkpoint that is there and made the same way stays.

    All plans are made before anything is written, so a ratio that cannot be met costs nothing.
    """
    config = planner.config
    plans = [(spec, planner.plan(spec, ratio)) for ratio in config.pruning.ratio for spec in specs(config)]
    for _, plan in plans:
        save_plan(plan, planner.checkpoint.architecture, run.plan(plan.requested, plan.name))
    jobs = [draft(planner, run, spec, plan) for spec, plan in plans]
    todo = _unwritten(jobs)
    if todo:
        total = sum(output.n_bytes for job in todo for outputs in job.files.values() for output in outputs)
        for _ in progress(_write_all(todo), total, "writing"):
            pass
    return jobs


def draft(planner: Planner, run: Run, spec: Spec, plan: Plan) -> Draft:
    export = planner.config.export
    statistics: Statistics | Mixture | None = None
    if plan.compensation != "none":
        statistics = planner.mixture(spec) if plan.compensation == "least_squares" else planner.mixed(spec)
    compaction = Compaction(planner.checkpoint, plan, statistics, stock=export.format == "stock")
    cut = (plan.compensation, plan.kept, plan.dropped)
    made_of = fingerprint(planner.checkpoint.fingerprint, plan.provenance, cut, export.model_dump(), versions())
    files = compaction.files(parse_size(export.max_shard_size))
    return Draft(spec, compaction, run.expert(plan.requested, plan.name), made_of, files)


def _unwritten(jobs: list[Draft]) -> list[Draft]:
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


def _is_written(job: Draft) -> bool:
    manifest = read_json(job.target / "seap.json")
    return (
        bool(manifest)
        and manifest.get("fingerprint") == job.fingerprint
        and all(
            (job.target / name).is_file() and (job.target / name).stat().st_size == about["bytes"]
            for name, about in manifest["files"].items()
        )
    )


def _write_all(jobs: list[Draft]) -> Iterator[int]:
    """Yield the bytes of each file as it is written; finish each folder when its last file is there.

    Files of the same part of the base come one after another, whichever model they are of: what was read for one is
    in the page cache for the next, so the base is read about once, not once a model.
    """
    write = work_task(_write_file)
    architecture = jobs[0].compaction.base.architecture
    memory = {"none": 0, "mean": 0, "least_squares": task_memory(architecture)}
    pending: dict[Any, tuple[Draft, str]] = {}
    hashes: dict[AnyPath, dict[str, str]] = {job.target: {} for job in jobs}
    shared = {job.target: ray.put(job.compaction) for job in jobs}
    for job, name in in_order_of_base(jobs):
        task = write.options(memory=memory[job.compaction.plan.compensation])
        pending[task.remote(shared[job.target], job.files[name], job.hidden / name)] = job, name
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        job, name = pending.pop(done)
        hashes[job.target][name] = ray.get(done)
        if len(hashes[job.target]) == len(job.files):
            _finish(job, hashes[job.target])
        yield sum(output.n_bytes for output in job.files[name])


def in_order_of_base(jobs: Iterable[Draft]) -> list[tuple[Draft, str]]:
    """Every file of every model, by where the middle of what it is cut from lies in the base."""

    def middle(draft: Draft, name: str) -> int:
        old, split = draft.compaction.plan.layers, draft.compaction.base.architecture.split
        layers = [layer for output in draft.files[name] if (layer := split(output.name)[0]) is not None]
        return old[layers[0]] + old[layers[-1]] if layers else -1

    return sorted(((job, name) for job in jobs for name in job.files), key=lambda file: middle(*file))


def write_draft(draft: Draft) -> AnyPath:
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


def _finish_hidden(draft: Draft, hashes: dict[str, str]) -> None:
    for name in draft.files:
        with writable(draft.hidden):
            _told(draft.hidden / name).unlink(missing_ok=True)
    finish(draft.compaction, draft.hidden, draft.files, _manifest(draft, hashes))


def _finish(job: Draft, hashes: dict[str, str]) -> None:
    _finish_hidden(job, hashes)
    with writable(job.target):
        move_folder(job.hidden, job.target, last="seap.json")
    for leftover in job.target.parent.glob(f".{job.target.name}.*.partial"):
        remove(leftover)


def _manifest(job: Draft, hashes: dict[str, str]) -> dict[str, Any]:
    base, plan = job.compaction.base, job.compaction.plan
    return {
        "fingerprint": job.fingerprint,
        "source": {
            "model": base.source,
            # The hub's cache holds a model under snapshots/<commit>.
            "revision": base.folder.name if base.folder.parent.name == "snapshots" else None,
            "fingerprint": base.fingerprint,
        },
        **sizes(job),
        "plan": describe(plan, base.architecture),
        "files": {name: {"sha256": hashes[name], "bytes": (job.hidden / name).stat().st_size} for name in job.files},
        "versions": versions(),
    }


def sizes(draft: Draft) -> dict[str, Any]:
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
