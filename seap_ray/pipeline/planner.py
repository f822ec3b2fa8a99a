"""Planner: statistics and weight norms in, plans out. The driver plans; what reads weights is Ray tasks, a layer each.

A plan takes a second at most, so another ratio or score of a finished run costs seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from seap_ray.config import Config, PruningSection
from seap_ray.core.moments import SITES, Moments, Site, Statistics, mixed
from seap_ray.core.plan import Kept, LayerScores, Plan, choose_dropped, choose_shapes, keep
from seap_ray.core.reconstruction import UNIT_SCORES
from seap_ray.core.scores import SCORES, Norms, WeightNorms, column_scores, head_scores, random_score, standardised
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import check_stock
from seap_ray.models.records import (
    PooledCovariance,
    is_whole,
    load_statistics,
    load_unit_scores,
    read_metadata,
    save_moments,
    save_tensors,
    task_memory,
)
from seap_ray.pipeline.cluster import work_task
from seap_ray.pipeline.model_specs import ModelSpec, pruning_section
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint


@dataclass(frozen=True)
class Planner:
    """Everything that plans are made from, read once."""

    config: Config
    checkpoint: Checkpoint
    statistics: dict[str, Statistics]
    norms: WeightNorms
    made_of: dict[str, str]
    """Fingerprint of each task's statistics."""
    files: dict[str, StoragePath]
    """The statistics' files, with covariances beside them where the run has them."""
    run: Run

    def plan(self, spec: ModelSpec, ratio: float) -> Plan:
        """Raises ConfigError when floors, caps and protection do not allow the ratio."""
        pruning = pruning_section(self.config, spec.settings)
        make = self._depth_plan if pruning.allocation.kind == "depth" else self._width_plan
        plan = make(spec, pruning, ratio)
        if self.config.export.format == "stock":
            check_stock(plan, self.checkpoint.architecture)
        return plan

    def _width_plan(self, spec: ModelSpec, pruning: PruningSection, ratio: float) -> Plan:
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
        layers = zip(shapes, architecture.layers, scores_L, strict=True)
        kept = tuple(keep(shape, layer.shape, *scores) for shape, layer, scores in layers)
        about: dict[str, Any] = {"seed": spec.settings.seed} if pruning.score == "random" else {}
        if of_units:
            about = {"unit_scores": self._unit_scores_print(spec, pruning)}
        if of_units or pruning.compensation == "least_squares":
            about["ridge"] = pruning.ridge
        provenance = self._provenance(spec, pruning, score=pruning.score, **about)
        return Plan(spec.name, ratio, pruning.compensation, kept, provenance)

    def _depth_plan(self, spec: ModelSpec, pruning: PruningSection, ratio: float) -> Plan:
        """Whole layers go, by ShortGPT's Block Influence (arXiv 2403.03853); there is nothing to compensate."""
        architecture, mixed = self.checkpoint.architecture, self.mixed(spec)
        influence_L = [1 - float(mixed[layer, "block"].mean_D) for layer in range(architecture.n_layers)]
        dropped = choose_dropped(architecture, pruning, ratio=ratio, influence_L=influence_L)
        kept = tuple(Kept.whole(architecture, i) for i in range(architecture.n_layers) if i not in dropped)
        return Plan(spec.name, ratio, "none", kept, self._provenance(spec, pruning, score=None), dropped)

    def _provenance(self, spec: ModelSpec, pruning: PruningSection, **scored: Any) -> dict[str, Any]:
        return {
            "kind": spec.kind,
            **scored,
            "allocation": pruning.allocation.model_dump(),
            "budget": pruning.budget,
            "pooling": spec.pooling,
            "tasks": spec.weights,
            "statistics": {task: self.made_of[task] for task in spec.weights},
        }

    def _scores(self, spec: ModelSpec) -> list[LayerScores]:
        attn, mlp = (self._site_scores(spec, site) for site in SITES)
        if spec.settings.allocation == "standardised":  # column by column; a layer's own ranking stays as it is
            attn, mlp = ([standardised(score_D) for score_D in score_L] for score_L in (attn, mlp))
        head_dim = self.checkpoint.architecture.head_dim
        return [(head_scores(a, head_dim), m) for a, m in zip(attn, mlp, strict=True)]

    def _site_scores(self, spec: ModelSpec, site: Site) -> list[torch.Tensor]:
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
        self, score: Callable[[Moments, Norms], torch.Tensor], spec: ModelSpec, layer: int, site: Site
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
        keys = [(layer, one) for one in self.checkpoint.architecture.sites(site)]
        return column_scores(score, of, self.norms, keys)

    def _unit_scores(self, spec: ModelSpec, pruning: PruningSection) -> list[LayerScores]:
        """Scores from covariances, made in Ray tasks, a layer each, and kept for the next plan."""
        architecture, name = self.checkpoint.architecture, self._unit_scores_print(spec, pruning)
        path = self.run.unit_scores(name)
        if not is_whole(path):
            mixtures = [self.mixture(spec)]
            if spec.pooling == "score_average":
                ridge = self.mixture(spec).ridge
                mixtures = [PooledCovariance((self.files[t],), (w,), ridge) for t, w in spec.weights.items()]
            score = work_task(_layer_scores, memory=task_memory(architecture))
            parts = [
                score.remote(self.checkpoint, mixtures, pruning.score, pruning.attention_unit, layer)
                for layer in range(architecture.n_layers)
            ]
            found = enumerate(ray.get(parts))
            save_tensors(path, {f"{layer}.{unit}": tensor for layer, part in found for unit, tensor in part.items()})
        return [(of["heads"], of["channels"]) for of in load_unit_scores(path, range(architecture.n_layers))]

    def _unit_scores_print(self, spec: ModelSpec, pruning: PruningSection) -> str:
        made_of = {task: (weight, self.made_of[task]) for task, weight in spec.weights.items()}
        return fingerprint(made_of, spec.pooling, pruning.score, pruning.ridge, pruning.attention_unit)[:20]

    def mixture(self, spec: ModelSpec) -> PooledCovariance:
        """Covariances of the spec's tasks as one stream, read when they are asked for."""
        ridge = self.config.pruning.ridge
        files = tuple(self.files[task] for task in spec.weights)
        return PooledCovariance(files, tuple(spec.weights.values()), None if ridge == "auto" else ridge)

    def mixed(self, spec: ModelSpec) -> Statistics:
        """Moments of the spec's tasks as one stream, each task counting by its weight."""
        parts, weights = [self.statistics[task] for task in spec.weights], list(spec.weights.values())
        return parts[0] if len(parts) == 1 else mixed(parts, weights)


def make_planner(config: Config, checkpoint: Checkpoint, run: Run, statistics: dict[str, StoragePath]) -> Planner:
    """Read the statistics and the weight norms; norms are computed once per run, in Ray tasks."""
    made_of = {task: read_metadata(path)["sha256"] for task, path in statistics.items()}
    loaded = {task: load_statistics(path, checkpoint.architecture) for task, path in statistics.items()}
    return Planner(config, checkpoint, loaded, _weight_norms(checkpoint, run), made_of, statistics, run)


def _layer_scores(
    checkpoint: Checkpoint, mixtures: Sequence[PooledCovariance], score: str, attention_unit: str, layer: int
) -> dict[str, torch.Tensor]:
    """Scores of one layer's heads and channels, summed over the mixtures by their weights, float64.

    Where whole groups go, a group is a block, and its score is spread evenly over its heads.
    """
    architecture = checkpoint.architecture
    heads = 1 if attention_unit == "head" else architecture.layers[layer].shape.heads_per_group
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
