"""Evidence: a run's folder in; results, studies and plans out, as far as they are there. What a report is made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from seap_ray.core.architecture import Architecture
from seap_ray.errors import ConfigError
from seap_ray.methods import STUDIES, StudyName
from seap_ray.report.table import Model, mean_quality
from seap_ray.storage.files import read_json, stage
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import Run
from seap_ray.tasks import is_perplexity

Results = Mapping[str, Any]
UNITS = ("heads", "channels")


@dataclass(frozen=True)
class Cut:
    """A plan with the indices that it keeps."""

    about: dict[str, Any]
    kept: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def kind(self) -> str:
        return self.about["kind"]

    def indices(self, layer: int, unit: str) -> np.ndarray:
        return self.kept[f"layers.{layer}.{unit}"]

    def share_cut(self, unit: str, architecture: Architecture) -> list[float]:
        """Share of the units of every layer that goes."""
        pairs = zip(self.about["layers"], architecture.layers, strict=True)
        return [1 - kept[unit] / getattr(given.shape, unit) for kept, given in pairs]


@dataclass(frozen=True)
class Evidence:
    """What a run's files say, read once."""

    run: Run
    config: dict[str, Any]
    main: Results
    """The main job's results, or those of a study where only that was run."""
    studies: Mapping[str, Results]
    architecture: Architecture | None
    """None where the model that all are cut from is gone, and no expert says what it was like."""
    cuts: Mapping[float, list[Cut]]
    """Plans of the general model and the experts, by ratio."""

    @classmethod
    def of(cls, run: Run) -> "Evidence":
        """Raises ConfigError for a run that nothing was measured with."""
        studies: dict[str, Results] = {name: read_json(path) for name in STUDIES if (path := study_path(run, name))}
        main = read_json(run.results) or next(iter(studies.values()), None)
        if main is None:
            raise ConfigError(f"{run.root}: has no results; run jobs/prune.py or jobs/eval.py first")
        found = cls(run, main.get("config") or read_json(run.config) or {}, main, studies, _architecture(main), {})
        return replace(found, cuts={ratio: cuts for ratio in found.ratios if (cuts := _cuts(run, main, ratio))})

    @property
    def summary(self) -> Results:
        """The widest comparison of models at hand."""
        return self.studies.get("table", self.main)

    @property
    def dense(self) -> Model | None:
        return dense_of(self.summary)

    @property
    def ratios(self) -> list[float]:
        return sorted({model["ratio"] for model in self.main["models"] if model["ratio"] is not None})

    @property
    def shown_ratios(self) -> list[float]:
        """Those with plans, no more than a page can show."""
        ratios = list(self.cuts)
        return ratios if len(ratios) <= 3 else [ratios[0], ratios[len(ratios) // 2], ratios[-1]]


def study_path(run: Run, name: StudyName) -> StoragePath | None:
    """A study's results file, in this run or in the one that it has for itself, ``<name>-<study>``."""
    own = [Run(run.root.with_name(f"{run.root.name}-{name}"))] if STUDIES[name].own_run else []
    return next((path for each in (run, *own) if read_json(path := each.study(name))), None)


def _architecture(results: Results) -> Architecture | None:
    """From the dense model's folder, or where that is gone, from a compacted one, whose config has both.

    That has only the first model's widths, not those of a base that was compacted itself.
    """
    for model in results["models"]:
        folder = parse_path(model["folder"]) if model.get("folder") else None
        config = read_json(folder / "config.json") if folder else None
        if config and model["kind"] == "dense":
            return Architecture.of(config)
        if folder and config and config["model_type"].startswith("seap_"):
            source = (read_json(folder / "seap.json") or {}).get("source", {})
            is_of_dense = not source.get("model_type", "").startswith("seap_")
            return Architecture.of({**config, "per_layer_config": None}) if is_of_dense else None
    return None


def _cuts(run: Run, results: Results, ratio: float) -> list[Cut]:
    models = (m for m in results["models"] if m["ratio"] == ratio and m["kind"] in ("general", "expert"))
    paths = [run.plan(ratio, model["name"]) for model in models]
    whole = [path for path in paths if path.is_file() and path.with_suffix(".safetensors").is_file()]
    return [Cut(read_json(path), load_file(stage(path.with_suffix(".safetensors")))) for path in whole]


# --- models of a results file ----------------------------------------------------------------------------------------


def dense_of(results: Results) -> Model | None:
    return next((model for model in results["models"] if model["kind"] == "dense"), None)


def method_of(model: Model) -> str:
    return "experts" if model["kind"] == "expert" else model["method"]


def compared(models: Iterable[Model]) -> list[Model]:
    """One row for a method and ratio: those with a model for each task by their summary."""
    return [model for model in models if model["kind"] != "expert" and not model.get("task")]


def mean_of(model: Model, *, perplexity: bool) -> tuple[float, float] | None:
    """``mean_quality`` over the tasks of one kind; None also where any cell has failed: other means do not compare."""
    cells = list(model["quality"].values())
    if any("error" in cell for cell in cells):
        return None
    return mean_quality(cell for cell in cells if is_perplexity(cell["metric"]) == perplexity)


def percent(share: float) -> str:
    return f"{round(100 * share, 1):g} %"


def named(model: Model) -> str:
    return model["name"] if model["ratio"] is None else f"{model['name']} at {percent(model['ratio'])}"
