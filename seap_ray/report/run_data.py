"""Run data: what the files of a run say, as far as they are there. The report is made from it alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from seap_ray.core.architecture import Architecture
from seap_ray.errors import ConfigError
from seap_ray.methods import STUDIES, StudyName
from seap_ray.models.multimodal import language_config
from seap_ray.report.rows import ModelRow, QualityCell, Results, StudyTable
from seap_ray.report.table import mean_quality
from seap_ray.storage.files import read_json, stage
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import Run
from seap_ray.tasks import is_perplexity

UNITS = ("heads", "channels")
"""Units that plans remove: query heads of the attention, channels of the MLP."""

SETTINGS = ("score", "compensation", "allocation", "attention_unit")
"""Settings that may be left to ``auto``, in which plans that are judged differ."""
SITE_OF_UNIT = {"heads": "attn", "channels": "mlp"}
"""Sites by the units that plans remove from them, as plans' files name them."""


@dataclass(frozen=True)
class StoredPlan:
    """A plan as it lies in storage: its JSON file, and the indices that it keeps."""

    metadata: dict[str, Any]
    """Content of the JSON file."""
    kept: dict[str, np.ndarray]
    """Indices by tensor name, ``layers.<layer>.<unit>``."""

    @property
    def name(self) -> str:
        """Name of the model that the plan is for."""
        return self.metadata["name"]

    @property
    def kind(self) -> str:
        """Kind of the model that the plan is for."""
        return self.metadata["kind"]

    @property
    def settings(self) -> dict[str, str]:
        """What the plan was made with: score, compensation, allocation and unit of attention."""
        # A plan that drops layers has no score.
        values = {**self.metadata, "allocation": self.metadata["allocation"]["kind"]}
        return {name: values.get(name) or "none" for name in SETTINGS}

    @property
    def judged(self) -> list[dict[str, Any]]:
        """Settings and figures of the plans that were judged before this one was taken; empty where none were."""
        by_settings: dict[tuple[str, ...], dict[str, Any]] = {}
        for values in self.metadata.get("judged", []):
            # A plan may have been judged as a repair and again as an allocation, with more figures.
            key = tuple(values[name] for name in SETTINGS)
            by_settings.pop(key, None)
            by_settings[key] = values
        return list(by_settings.values())

    @property
    def predicted_costs(self) -> dict[str, list[float]]:
        """What the cuts of every layer cost by units that were cut, in nats a token; empty where that is not known."""
        by_layer = self.metadata.get("predicted", [])
        if not by_layer:
            return {}
        by_unit: dict[str, list[float]] = {}
        for unit, site in SITE_OF_UNIT.items():
            by_unit[unit] = [costs[site] for costs in by_layer]
        return by_unit

    def indices(self, layer: int, unit: str) -> np.ndarray:
        """Return the indices of the units that stay in a layer; none where a plan keeps all of its MoE experts."""
        if unit == "experts":
            return self.kept.get(f"layers.{layer}.{unit}", np.empty(0, dtype=np.int32))
        return self.kept[f"layers.{layer}.{unit}"]

    def removed_shares(self, unit: str, architecture: Architecture) -> list[float]:
        """Return the share of the units that goes from every layer, 0 of one without; channels go with MoE experts."""
        shares: list[float] = []
        for kept, original in zip(self.metadata["layers"], architecture.layers, strict=True):
            n_units = getattr(original.shape, unit)
            kept_share = kept[unit] / n_units if n_units else 1.0
            if unit == "channels" and "experts" in kept:
                kept_share *= kept["experts"] / original.n_experts
            shares.append(1 - kept_share)
        return shares


@dataclass(frozen=True)
class RunData:
    """What a run's files say, read once."""

    run: Run
    config: Mapping[str, Any]
    main: Results
    """Results of the main job, or where only studies were run, those of the first one."""
    studies: Mapping[str, Results]
    """Results of the studies that were run, by name."""
    architecture: Architecture | None
    """None where the model that all others are cut from is gone, and no expert says what it was like."""
    plans: Mapping[float, list[StoredPlan]]
    """Plans of the general model and the experts, by ratio."""

    @classmethod
    def of(cls, run: Run) -> "RunData":
        """Read a run.

        Raises:
            ConfigError: Nothing was measured with the run.
        """
        # A run may hold studies alone: the first of them then stands for the main job.
        studies = _studies(run)
        content = read_json(run.results)
        main = Results.from_json(content) if content else next(iter(studies.values()), None)
        if main is None:
            raise ConfigError(f"{run.root}: has no results; run jobs/prune.py or jobs/eval.py first")

        # A ratio whose plans are gone is left out.
        plans = {}
        for ratio in _ratios(main):
            if at_ratio := _plans(run, main, ratio):
                plans[ratio] = at_ratio

        return cls(run, main.config or read_json(run.config) or {}, main, studies, _architecture(main), plans)

    @property
    def comparison(self) -> Results:
        """The results that compare the most models."""
        return self.studies.get("table", self.main)

    @property
    def dense(self) -> ModelRow | None:
        """The model that all others are cut from, if it was judged."""
        return self.comparison.dense

    @property
    def ratios(self) -> list[float]:
        """Requested ratios, ascending."""
        return _ratios(self.main)

    @property
    def shown_ratios(self) -> list[float]:
        """Ratios with plans, ascending; of more than three the smallest, a middle one and the largest."""
        ratios = list(self.plans)
        return ratios if len(ratios) <= 3 else [ratios[0], ratios[len(ratios) // 2], ratios[-1]]

    def study_table(self, name: str) -> StudyTable | None:
        """Return the table of a study, or None where it was not run or has no rows."""
        results = self.studies.get(name)
        return results.table if results and results.table and results.table.rows else None


def study_path(run: Run, name: StudyName) -> StoragePath | None:
    """Return a study's results file, in this run or in the study's own run, ``<name>-<study>``; None if it has none."""
    # Studies with a corpus of their own have a run of their own, beside this one.
    runs = [run]
    if STUDIES[name].own_run:
        runs.append(Run(run.root.with_name(f"{run.root.name}-{name}")))

    for candidate in runs:
        path = candidate.study(name)
        if read_json(path):
            return path

    return None


def _studies(run: Run) -> dict[str, Results]:
    studies: dict[str, Results] = {}
    for name in STUDIES:
        if path := study_path(run, name):
            studies[name] = Results.from_json(read_json(path))
    return studies


def _ratios(results: Results) -> list[float]:
    return sorted({model.ratio for model in results.models if model.ratio is not None})


def _architecture(results: Results) -> Architecture | None:
    """Read the architecture from the dense model's folder, or where that is gone, from an expert's.

    An expert's config has the dense widths beside its own. That holds only for an expert of a dense model: that of a
    base which was pruned itself has the first model's widths, not those of the base.
    """
    # The dense model is the first row, so an expert counts only where the dense model's folder is gone.
    for model in results.models:
        folder = parse_path(model.folder) if model.folder else None
        config = read_json(folder / "config.json") if folder else None
        if config and model.kind == "dense":
            return Architecture.of(language_config(config))
        if folder and config and config["model_type"].startswith("seap_"):
            manifest = read_json(folder / "seap.json") or {}
            is_of_dense = not manifest.get("source", {}).get("model_type", "").startswith("seap_")
            # No key of a config says how many MoE experts there were.
            is_of_dense &= manifest.get("plan", {}).get("mlp_unit") != "expert"
            return Architecture.of({**language_config(config), "per_layer_config": None}) if is_of_dense else None

    return None


def _plans(run: Run, results: Results, ratio: float) -> list[StoredPlan]:
    """Read the plans of one ratio that are whole."""
    plans = []
    for model in results.models:
        if model.ratio == ratio and model.kind in ("general", "expert"):
            # Both files are written whole, but a job may be between the two.
            path = run.plan(ratio, model.name)
            tensors = path.with_suffix(".safetensors")
            if path.is_file() and tensors.is_file():
                plans.append(StoredPlan(read_json(path), load_file(stage(tensors))))

    return plans


# --- models of a results file ----------------------------------------------------------------------------------------


def method_of(model: ModelRow) -> str:
    """Return the method that a model is shown under: the experts, or what the row says."""
    return "experts" if model.kind == "expert" else model.method


def compared(models: Iterable[ModelRow]) -> list[ModelRow]:
    """Return one row for every method and ratio: a method with a model for each task has its summary."""
    return [model for model in models if model.kind != "expert" and not model.task]


def mean_of(model: ModelRow, *, perplexity: bool) -> tuple[float, float] | None:
    """Return ``mean_quality`` over the tasks with a perplexity, or over all others.

    None where there are none, and where any cell has failed: means over other tasks do not compare.
    """
    if model.failures:
        return None
    qualities = [cell for cell in model.quality.values() if isinstance(cell, QualityCell)]
    return mean_quality(cell for cell in qualities if is_perplexity(cell.metric) == perplexity)


def percent(share: float) -> str:
    """Return a share as text: 0.125 -> ``12.5 %``."""
    return f"{round(100 * share, 1):g} %"


def name_at_ratio(model: ModelRow) -> str:
    """Return a model's name with its ratio, if it has one."""
    return model.name if model.ratio is None else f"{model.name} at {percent(model.ratio)}"
