"""Studies ``allocation`` and ``curve``: which allocation over the layers is best, and which logistic curve?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

from seap_ray.config import AttentionUnit
from seap_ray.pipeline.results import own_task_rows
from seap_ray.report.rows import ModelRow
from seap_ray.report.study_rows import AllocationRow, Estimate
from seap_ray.studies.requests import at_every_ratio, on_own_task, run_specs, variant
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import StudyRunner

FIXED = ("uniform", "logistic", "global", "standardised")
"""Allocations that are compared with each unit of attention."""
JUDGED = ("auto", "measured")
"""Allocations that choose their unit of attention themselves."""
STEEPNESSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Values of the logistic curve's k that are compared."""
MIDPOINTS = (0.1, 0.3, 0.5, 0.7)
"""Values of the logistic curve's x0 that are compared."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """One way of allocating the sparsity to the layers, and to attention and MLP."""

    allocation: str
    attention_unit: str | None = None
    """None: the run's own."""
    k: float | None = None
    x0: float | None = None

    @property
    def experts(self) -> str:
        """Name of the experts' method."""
        parts = [self.allocation]
        if self.attention_unit not in (None, "auto"):
            parts.append(self.attention_unit)
        # Only the logistic curve has parameters.
        if self.k is not None:
            parts.append(f"k{self.k:g}.x{self.x0:g}")
        return ".".join(parts)

    @property
    def general(self) -> str:
        """Name of the general model."""
        return f"{self.experts}.general"

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that it gives a model."""
        names = ("allocation", "attention_unit", "k", "x0")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


ALLOCATIONS = (
    *(_Settings(allocation, "auto") for allocation in JUDGED),
    *(_Settings(allocation, unit) for allocation, unit in product(FIXED, get_args(AttentionUnit))),
)
"""All that ``allocation`` compares."""
CURVES = tuple(_Settings("logistic", None, k, x0) for k, x0 in product(STEEPNESSES, MIDPOINTS))
"""All that ``curve`` compares."""


def run(runner: StudyRunner) -> StudyResult:
    """Compare the experts and the general model under every allocation, with every unit of attention."""
    return _compare(runner, ALLOCATIONS)


def run_curve(runner: StudyRunner) -> StudyResult:
    """Compare the experts and the general model over a grid of logistic curves."""
    return _compare(runner, CURVES)


def _compare(runner: StudyRunner, compared: Sequence[_Settings]) -> StudyResult:
    config = runner.config
    wanted = []
    for settings in compared:
        for spec in run_specs(config):
            # The experts of all tasks are one method, so that they get one row of means.
            method = settings.experts if spec.task else settings.general
            # Still experts, which under ``allocation.shared`` have widths in common.
            wanted.append(replace(variant(spec, method, **settings.changes), kind=spec.kind))
    models = runner.evaluate_models(on_own_task(at_every_ratio(config, wanted)))

    by_method = _by_method([model.row for model in models])
    rows = [_row(ratio, settings, by_method) for ratio, settings in product(config.pruning.ratio, compared)]
    return StudyResult(models, AllocationRow.columns(runner.mean_head), rows)


def _row(ratio: float, settings: _Settings, by_method: Mapping[tuple[str, float | None], ModelRow]) -> AllocationRow:
    # Where no expert could be judged, there is no row of the experts together.
    experts_row = by_method.get((settings.experts, ratio))
    experts = Estimate.mean(experts_row.quality.values()) if experts_row else Estimate()
    general_row = by_method[settings.general, ratio]
    general = Estimate.mean(general_row.quality.values())

    return AllocationRow(
        ratio=ratio,
        allocation=settings.allocation,
        attention_unit=settings.attention_unit,
        k=settings.k,
        x0=settings.x0,
        realised=general_row.realised_ratio,
        experts_mean=experts.value,
        experts_stderr=experts.stderr,
        general_mean=general.value,
        general_stderr=general.stderr,
    )


def _by_method(rows: Sequence[ModelRow]) -> dict[tuple[str, float | None], ModelRow]:
    """Return models by method and ratio; those that are made for one task each as one row."""
    for_all_tasks = [row for row in rows if not row.task]
    return {(row.method, row.ratio): row for row in [*for_all_tasks, *own_task_rows(rows)]}
