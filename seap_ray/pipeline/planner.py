"""Planner: statistics, weight norms and settings that leave nothing open in, plans out.

The driver plans; Ray tasks, one for each layer, read weights. A plan takes a second at most, so another ratio or score
of a finished run costs seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import ray
import torch

from seap_ray.config import Config, PruningSection
from seap_ray.core.allocation import choose_dropped, choose_shapes
from seap_ray.core.architecture import Shape
from seap_ray.core.compensation import COMPENSATIONS, Compensation
from seap_ray.core.experts import choose_count
from seap_ray.core.moments import SITES, Moments, Site, Statistics, pooled_statistics
from seap_ray.core.plan import Kept, Plan, keep, keep_experts
from seap_ray.core.reconstruction import BIAS_SCORES, UNIT_SCORES
from seap_ray.core.scores import (
    SCORES,
    LayerScores,
    Norms,
    WeightNorms,
    column_scores,
    head_scores,
    random_score,
    scores_of_experts,
    standardised,
)
from seap_ray.core.sensitivity import Sensitivities
from seap_ray.core.targets import Target
from seap_ray.models.checkpoint import Checkpoint, completed_config
from seap_ray.models.export import CheckpointExport, check_stock
from seap_ray.models.gguf.layouts import layout_of_plan
from seap_ray.models.records import (
    PooledCovariance,
    TensorFile,
    load_norms,
    load_statistics,
    load_unit_scores,
    read_metadata,
    save_norms,
    save_tensors,
    task_memory,
)
from seap_ray.pipeline.cluster import work_task
from seap_ray.pipeline.divergences import HeldOutShard
from seap_ray.pipeline.gguf_files import is_uniform
from seap_ray.pipeline.model_specs import ModelSpec, compensation_for, pruning_section
from seap_ray.pipeline.quantization import quantized
from seap_ray.pipeline.run_target import checkpoint_target
from seap_ray.storage.artifact import Artifact
from seap_ray.storage.digests import stated_digest
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

ColumnScore = Callable[[Moments, Norms], torch.Tensor]
"""A score of a site's columns, (D,), from their moments and the norms of the weight that reads them."""
UnitScore = Callable[..., torch.Tensor]
"""One of ``UNIT_SCORES``, told whether the compensation has a bias."""


@dataclass(frozen=True)
class Planner:
    """Everything that plans are made from, read once."""

    config: Config
    checkpoint: Checkpoint
    statistics: dict[str, Statistics]
    """Moments by name of the statistics: a task's, or those of a part of its shards."""
    norms: WeightNorms
    statistics_keys: dict[str, str]
    """Fingerprint of each of the statistics."""
    statistics_files: dict[str, StoragePath]
    """Files of the statistics, with covariances beside them where the run has them."""
    run: Run

    held_out: Mapping[str, HeldOutShard]
    """By name of the statistics, the shard on which plans that are made from them are judged."""

    @cached_property
    def target(self) -> Target | None:
        """What every model may take; None where the config has ratios."""
        return checkpoint_target(self.config, self.checkpoint)

    def export(self, spec: ModelSpec, plan: Plan) -> CheckpointExport:
        """Add to a plan what its compensation, and the rounding of its weights, need."""
        statistics = self.repair_statistics(spec, plan.compensation)
        is_stock = self.config.export.format == "stock"
        export = CheckpointExport(self.checkpoint, plan, statistics, stock=is_stock)
        if self.config.export.quantization.scheme is None:
            return export
        return quantized(export, self.config.export.quantization, self.pooled_covariance(spec))

    def judged_exports(self, spec: ModelSpec, plans: Sequence[Plan]) -> list[CheckpointExport]:
        """Add to plans what their compensations need on held-out tokens: covariances are those of the other shards."""
        held_out = tuple(self.held_out[task].record for task in spec.weights)
        # Plans that are compensated alike share one object, which reads each covariance once for all.
        shared: dict[str, Statistics | PooledCovariance | None] = {}
        exports: list[CheckpointExport] = []
        for plan in plans:
            name = plan.compensation.name
            if name not in shared:
                statistics = self.repair_statistics(spec, plan.compensation)
                if isinstance(statistics, PooledCovariance):
                    statistics = replace(statistics, held_out=held_out)
                shared[name] = statistics
            exports.append(CheckpointExport(self.checkpoint, plan, shared[name]))
        return exports

    def repair_statistics(self, spec: ModelSpec, compensation: Compensation) -> Statistics | PooledCovariance | None:
        """Return the statistics that a compensation needs, and no more, since every task of a model is sent them."""
        if compensation.required == "moments":
            return self.pooled_moments(spec)
        if compensation.required == "covariance":
            return self.pooled_covariance(spec)
        return None

    def plan(self, spec: ModelSpec, ratio: float, shapes: Sequence[Shape] | None = None) -> Plan:
        """Choose what a model keeps at a ratio.

        Args:
            spec: The model, with settings that leave nothing open.
            ratio: Share of the decoder weights to remove; where the config has a target, the ratio that stands for it.
            shapes: Widths of all layers where they are chosen already; None: by the allocation, which is not measured.

        Raises:
            ConfigError: Floors, caps and protection do not allow the ratio.
        """
        pruning = pruning_section(self.config, spec.settings)
        if pruning.allocation.kind == "depth":
            plan = self._depth_plan(spec, pruning, ratio)
        elif pruning.mlp_unit == "expert":
            plan = self._expert_plan(spec, pruning, ratio)
        else:
            plan = self._width_plan(spec, pruning, ratio, shapes)

        if self.target is not None:
            plan = replace(plan, target=self.target)
        # A stock checkpoint cannot have layers of different shapes; that is refused before anything is written.
        if self.config.export.format == "stock":
            check_stock(plan, self.checkpoint.architecture)
        if self.config.export.format == "gguf":
            layout_of_plan(plan, completed_config(self.checkpoint.config), self.checkpoint.architecture)
        return plan

    def pooled_moments(self, spec: ModelSpec) -> Statistics:
        """Return the moments of the spec's tasks as one stream, each task counting by its weight."""
        parts = [self.statistics[task] for task in spec.weights]

        # One task's moments stay as they are, to the last bit.
        return parts[0] if len(parts) == 1 else pooled_statistics(parts, list(spec.weights.values()))

    def pooled_covariance(self, spec: ModelSpec) -> PooledCovariance:
        """Return the covariances of the spec's tasks as one stream, read from files when they are asked for."""
        ridge = self.config.pruning.ridge
        files = tuple(self.statistics_files[task] for task in spec.weights)

        # Without a ridge of the config, each file has the one that was chosen when it was merged.
        return PooledCovariance(files, tuple(spec.weights.values()), None if ridge == "auto" else ridge)

    # --- plans -------------------------------------------------------------------------------------------------------

    def _width_plan(
        self, spec: ModelSpec, pruning: PruningSection, ratio: float, shapes: Sequence[Shape] | None
    ) -> Plan:
        """Choose widths for every layer, then the units with the best scores."""
        architecture = self.checkpoint.architecture
        scores_L = self.scores(spec)

        # First how many units each layer keeps, then which: the best by score within the layer.
        shapes = shapes or self.shapes(spec, ratio, scores_L)
        layers = zip(shapes, architecture.layers, scores_L, strict=True)
        kept = tuple(keep(shape, layer.shape, *scores) for shape, layer, scores in layers)

        provenance = self._provenance(spec, pruning, score=pruning.score, **self._score_provenance(spec, pruning))
        return Plan(spec.name, ratio, compensation_for(spec.settings), kept, provenance)

    def scores(self, spec: ModelSpec) -> list[LayerScores]:
        """Return scores of every layer's heads and channels."""
        pruning = pruning_section(self.config, spec.settings)
        return self._unit_scores(spec, pruning) if pruning.score in UNIT_SCORES else self._column_scores(spec)

    def shapes(
        self,
        spec: ModelSpec,
        ratio: float,
        scores_L: Sequence[LayerScores],
        sensitivities: Sensitivities | None = None,
    ) -> list[Shape]:
        """Return the widths of every layer by the spec's allocation, which needs sensitivities where it is measured.

        Raises ConfigError when floors, caps and protection do not allow the ratio.
        """
        pruning = pruning_section(self.config, spec.settings)
        adds_biases = compensation_for(spec.settings).adds_biases
        return choose_shapes(
            self.checkpoint.architecture,
            pruning,
            ratio=ratio,
            adds_biases=adds_biases,
            scores_L=scores_L,
            comparable=pruning.score in UNIT_SCORES,
            stock=is_uniform(self.config, self.checkpoint.architecture, adds_biases=adds_biases),
            sensitivities=sensitivities,
            target=self.target,
        )

    def _depth_plan(self, spec: ModelSpec, pruning: PruningSection, ratio: float) -> Plan:
        """Drop whole layers by ShortGPT's Block Influence (arXiv 2403.03853); there is nothing to compensate."""
        architecture = self.checkpoint.architecture
        moments = self.pooled_moments(spec)

        # Block Influence is one less the mean cosine of a layer's input and output.
        influence_L = [1 - float(moments[layer, "block"].mean_D) for layer in range(architecture.n_layers)]
        dropped = choose_dropped(architecture, pruning, ratio=ratio, influence_L=influence_L, target=self.target)
        kept = tuple(Kept.whole(architecture, i) for i in range(architecture.n_layers) if i not in dropped)
        return Plan(spec.name, ratio, COMPENSATIONS["none"], kept, self._provenance(spec, pruning, score=None), dropped)

    def _expert_plan(self, spec: ModelSpec, pruning: PruningSection, ratio: float) -> Plan:
        """Remove whole MoE experts, equally many of every layer that has any; there is nothing to compensate."""
        architecture = self.checkpoint.architecture
        n_experts = choose_count(architecture, pruning, ratio=ratio, target=self.target)
        n_groups, _ = architecture.expert_groups
        kept: list[Kept] = []
        for number, layer in enumerate(architecture.layers):
            whole = Kept.whole(architecture, number)
            if layer.n_experts:
                whole = keep_experts(whole, n_experts, self._expert_scores(spec, number), n_groups)
            kept.append(whole)

        provenance = self._provenance(
            spec, pruning, score=pruning.score, **self._score_provenance(spec, pruning), mlp_unit="expert"
        )
        return Plan(spec.name, ratio, COMPENSATIONS["none"], tuple(kept), provenance)

    def _expert_scores(self, spec: ModelSpec, layer: int) -> torch.Tensor:
        """Return scores of a layer's MoE experts, (E,)."""
        if spec.settings.score == "random":
            n_experts = self.checkpoint.architecture.layers[layer].n_experts
            return random_score(n_experts, spec.settings.seed or 0, layer=layer, site="experts")
        if spec.pooling == "pooled":
            return self._expert_score(spec, self.pooled_moments(spec), layer)
        scores = [
            weight * self._expert_score(spec, self.statistics[task], layer) for task, weight in spec.weights.items()
        ]
        return torch.stack(scores).sum(0)

    def _expert_score(self, spec: ModelSpec, moments: Statistics, layer: int) -> torch.Tensor:
        """Return scores of a layer's MoE experts from the moments of some tokens."""
        keys = [(layer, site) for site in self.checkpoint.architecture.sites(layer, "mlp")]
        return scores_of_experts(spec.settings.score or "", moments, self.norms, keys)

    def _provenance(self, spec: ModelSpec, pruning: PruningSection, **scored: Any) -> dict[str, Any]:
        """Return what a plan is made from and how, as plans and manifests on disk say it."""
        return {
            "kind": spec.kind,
            **scored,
            "allocation": pruning.allocation.model_dump(),
            "attention_unit": pruning.attention_unit,
            "budget": pruning.budget,
            "pooling": spec.pooling,
            "tasks": spec.weights,
            "statistics": {task: self.statistics_keys[task] for task in spec.weights},
        }

    def _score_provenance(self, spec: ModelSpec, pruning: PruningSection) -> dict[str, Any]:
        """Return the settings that only some scores or compensations depend on."""
        # A setting that changes nothing is left out: a checkpoint whose provenance changes is written again.
        provenance: dict[str, Any] = {}
        if pruning.score == "random":
            provenance["seed"] = spec.settings.seed
        if pruning.score in UNIT_SCORES:
            provenance["unit_scores"] = self._unit_scores_key(spec, pruning)
        is_fitted = compensation_for(spec.settings).required == "covariance"
        if pruning.score in UNIT_SCORES or is_fitted:
            provenance["ridge"] = pruning.ridge
        if spec.settings.bias is False and (is_fitted or pruning.score in BIAS_SCORES):
            provenance["bias"] = False
        return provenance

    # --- scores of columns, from moments -----------------------------------------------------------------------------

    def _column_scores(self, spec: ModelSpec) -> list[LayerScores]:
        """Return scores of every layer's heads and channels, made from scores of single columns."""
        attn_L, mlp_L = (self._site_scores(spec, site) for site in SITES)
        # Layers and sites are compared column by column; a layer's own ranking stays as it is.
        if spec.settings.allocation == "standardised":
            attn_L = [standardised(score_D) for score_D in attn_L]
            mlp_L = [standardised(score_D) for score_D in mlp_L]

        head_dim = self.checkpoint.architecture.head_dim
        return [(head_scores(attn, head_dim), mlp) for attn, mlp in zip(attn_L, mlp_L, strict=True)]

    def _site_scores(self, spec: ModelSpec, site: Site) -> list[torch.Tensor]:
        """Return scores of a site's columns in every layer: (D,), in an MoE model for all its experts (E, C)."""
        layers = range(self.checkpoint.architecture.n_layers)
        if spec.settings.score == "random":
            return [self._random_score(spec.settings.seed or 0, layer, site) for layer in layers]

        score = SCORES[spec.settings.score or ""]
        if spec.pooling == "pooled":
            moments = self.pooled_moments(spec)
            return [self._score(score, moments, layer, site) for layer in layers]

        return [self._summed_score(score, spec, layer, site) for layer in layers]

    def _summed_score(self, score: ColumnScore, spec: ModelSpec, layer: int, site: Site) -> torch.Tensor:
        """Return the paper's general score: the sum over tasks, by weight.

        The paper weighs language-model corpora 3 and the others 2.
        """
        scores = [
            weight * self._score(score, self.statistics[task], layer, site) for task, weight in spec.weights.items()
        ]
        return torch.stack(scores).sum(0)

    def _random_score(self, seed: int, layer: int, site: Site) -> torch.Tensor:
        """Return random scores of a site's columns, the same for every task."""
        experts = self.checkpoint.architecture.sites(layer, site)
        scores = [random_score(self.norms[layer, s].l1_D.numel(), seed, layer=layer, site=s) for s in experts]
        if not scores:
            return torch.zeros(0, dtype=torch.float64)
        return scores[0] if len(scores) == 1 else torch.stack(scores)

    def _score(self, score: ColumnScore, moments: Statistics, layer: int, site: Site) -> torch.Tensor:
        """Return a score of a site's columns from the moments of its activations."""
        keys = [(layer, expert) for expert in self.checkpoint.architecture.sites(layer, site)]
        return column_scores(score, moments, self.norms, keys)

    # --- scores of units, from covariances ---------------------------------------------------------------------------

    def _unit_scores(self, spec: ModelSpec, pruning: PruningSection) -> list[LayerScores]:
        """Return scores of every layer's heads and channels, made once and kept for the next plan and the report."""
        layers = range(self.checkpoint.architecture.n_layers)
        key = self._unit_scores_key(spec, pruning)
        scores_file = TensorFile(key_name=None, read=partial(load_unit_scores, layers=layers))
        # The key is in the file's name, which the format therefore need not check.
        artifact = Artifact(self.run.unit_scores(key), key, scores_file)

        scores_L = artifact.get(lambda: save_tensors(artifact.path, self._score_units(spec, pruning)))
        return [(scores["heads"], scores["channels"]) for scores in scores_L]

    def _unit_scores_key(self, spec: ModelSpec, pruning: PruningSection) -> str:
        """Return the fingerprint of everything that scores of units depend on."""
        sources = {task: (weight, self.statistics_keys[task]) for task, weight in spec.weights.items()}
        settings: list[Any] = [pruning.score, pruning.ridge, pruning.attention_unit]
        # A setting that changes nothing is left out.
        if pruning.bias is False and pruning.score in BIAS_SCORES:
            settings.append("without bias")
        # Twenty digits are enough to name the file.
        return fingerprint(sources, spec.pooling, *settings)[:20]

    def _score_units(self, spec: ModelSpec, pruning: PruningSection) -> dict[str, torch.Tensor]:
        """Score the units of every layer in Ray tasks, one for each layer; return them by their names in the file."""
        architecture = self.checkpoint.architecture
        streams = self._scored_streams(spec)
        unit_score = partial(UNIT_SCORES[pruning.score], has_bias=pruning.bias is not False)

        # A layer's covariances take GBs: such a task states its memory, so that Ray starts no more than fit a node.
        task = work_task(_score_layer, memory=task_memory(architecture))
        pending = [
            task.remote(self.checkpoint, streams, unit_score, pruning.attention_unit, layer)
            for layer in range(architecture.n_layers)
        ]

        # The names are those that ``load_unit_scores`` reads.
        tensors = {}
        for layer, scores in enumerate(ray.get(pending)):
            for unit, tensor in scores.items():
                tensors[f"{layer}.{unit}"] = tensor
        return tensors

    def _scored_streams(self, spec: ModelSpec) -> list[PooledCovariance]:
        """Return the covariances to score: of all tasks together, or of each for scores that are averaged."""
        pooled = self.pooled_covariance(spec)
        if spec.pooling != "score_average":
            return [pooled]

        weights = spec.weights.items()
        return [PooledCovariance((self.statistics_files[task],), (weight,), pooled.ridge) for task, weight in weights]


def make_planner(
    config: Config,
    checkpoint: Checkpoint,
    run: Run,
    statistics: dict[str, StoragePath],
    held_out: Mapping[str, HeldOutShard],
) -> Planner:
    """Read the statistics and the weight norms; norms are computed once per run, in Ray tasks."""
    # The hash of the numbers, not the key of what they were merged from: equal statistics give equal plans.
    keys = {task: stated_digest(read_metadata(path)) for task, path in statistics.items()}
    loaded = {task: load_statistics(path, checkpoint.architecture) for task, path in statistics.items()}
    return Planner(config, checkpoint, loaded, _weight_norms(checkpoint, run), keys, statistics, run, held_out)


# --- Ray tasks -------------------------------------------------------------------------------------------------------


def _score_layer(
    checkpoint: Checkpoint, streams: Sequence[PooledCovariance], score: UnitScore, attention_unit: str, layer: int
) -> dict[str, torch.Tensor]:
    """Return scores of one layer's ``heads`` (H,) and ``channels`` (C,), float64.

    Where whole groups go, a group is a block, and its score is spread evenly over its heads.
    """
    architecture = checkpoint.architecture
    # A layer without attention has no head.
    n_heads = 1 if attention_unit == "head" else max(architecture.layers[layer].shape.heads_per_group, 1)

    block_U = _score_site(checkpoint, streams, score, (layer, "attn"), block=n_heads * architecture.head_dim)
    channel_C = _score_site(checkpoint, streams, score, (layer, "mlp"), block=1)
    return {"heads": block_U.repeat_interleave(n_heads) / n_heads, "channels": channel_C}


def _score_site(
    checkpoint: Checkpoint, streams: Sequence[PooledCovariance], score: UnitScore, key: tuple[int, Site], *, block: int
) -> torch.Tensor:
    """Return scores of a site's blocks of columns (U,), summed over the streams by their weights."""
    layer, site = key
    architecture = checkpoint.architecture
    modules = architecture.modules(layer)
    if site not in modules:
        return torch.zeros(0, dtype=torch.float64)
    weight_OD = checkpoint.read(architecture.tensor(layer, modules[site]))

    # One stream is read after another, as each is a matrix of D x D.
    scores = [score(stream[key], weight_OD, block=block, ridge=stream.ridge_of(key)) for stream in streams]
    weighted = [sum(stream.weights) * score_U for stream, score_U in zip(streams, scores, strict=True)]
    return torch.stack(weighted).sum(0)


def _weight_norms(checkpoint: Checkpoint, run: Run) -> WeightNorms:
    """Return the norms of every output module's weight, computed once in Ray tasks, a layer each."""
    architecture = checkpoint.architecture
    norms_file = TensorFile(read=partial(load_norms, architecture=architecture))
    artifact = Artifact(run.statistics("weight_norms"), checkpoint.fingerprint, norms_file)

    # They depend on the base alone, so every other ratio and score of the run finds them here.
    return artifact.get(lambda: save_norms(artifact.path, _compute_norms(checkpoint), fingerprint=artifact.key))


def _compute_norms(checkpoint: Checkpoint) -> WeightNorms:
    """Compute the norms of every (layer, site) in Ray tasks."""
    task = work_task(_layer_norms)
    by_layer = ray.get([task.remote(checkpoint, layer) for layer in range(checkpoint.architecture.n_layers)])

    norms: dict[tuple[int, Site], Norms] = {}
    for layer, site_norms in enumerate(by_layer):
        norms |= {(layer, site): norms_of_site for site, norms_of_site in site_norms.items()}
    return norms


def _layer_norms(checkpoint: Checkpoint, layer: int) -> dict[Site, Norms]:
    """Compute the norms of one layer's output modules, by site."""
    architecture = checkpoint.architecture
    norms: dict[Site, Norms] = {}
    for site, module in architecture.modules(layer).items():
        norms[site] = Norms.of(checkpoint.read(architecture.tensor(layer, module)))
    return norms
