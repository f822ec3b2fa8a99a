"""Study ``allocation``: is the logistic curve better than equal shares, and which curve?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from seap_ray.pipeline.results import ModelRow, own_task_rows
from seap_ray.report.study_rows import AllocationRow, Estimate
from seap_ray.studies.requests import at_every_ratio, run_specs, variant
from seap_ray.studies.result import StudyResult, estimate, mean_column
from seap_ray.studies.runner import StudyRunner

STEEPNESSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Values of the logistic curve's k that are compared."""
MIDPOINTS = (0.1, 0.3, 0.5, 0.7)
"""Values of the logistic curve's x0 that are compared."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """One way of allocating the sparsity to the layers."""

    allocation: str
    k: float | None = None
    x0: float | None = None

    @property
    def name(self) -> str:
        if self.k is None:
            return self.allocation
        return f"{self.allocation}.k{self.k:g}.x{self.x0:g}"

    @property
    def settings(self) -> dict[str, Any]:
        if self.k is None:
            return {"allocation": self.allocation}
        return {"allocation": self.allocation, "k": self.k, "x0": self.x0}


CURVES = (
    _Curve("uniform"),
    _Curve("global"),
    *(_Curve("logistic", k, x0) for k, x0 in product(STEEPNESSES, MIDPOINTS)),
)


def run(runner: StudyRunner) -> StudyResult:
    """Compare the experts and the general model under every allocation, and over a grid of logistic curves."""
    config = runner.config
    wanted = []
    for curve in CURVES:
        for spec in run_specs(config):
            method = curve.name if spec.task else _general(curve)
            wanted.append(variant(spec, method, **curve.settings))
    models = runner.evaluate_models(at_every_ratio(config, wanted))

    by_method = _by_method([model.row for model in models])
    rows = []
    for ratio, curve in product(config.pruning.ratio, CURVES):
        summary = by_method.get((curve.name, ratio))
        experts = estimate(summary.quality.values()) if summary else Estimate()
        general = estimate(by_method[_general(curve), ratio].quality.values())
        rows.append(
            AllocationRow(
                ratio,
                curve.allocation,
                curve.k,
                curve.x0,
                experts.value,
                experts.stderr,
                general.value,
                general.stderr,
            )
        )
    return StudyResult(models, AllocationRow.columns(mean_column(runner)), rows)


def _general(curve: _Curve) -> str:
    """Return the name of the general model; that of the experts is the curve's own."""
    return f"{curve.name}.general"


def _by_method(rows: Sequence[ModelRow]) -> dict[tuple[str, float | None], ModelRow]:
    """Return models by method and ratio; those that are made for one task each as one row."""
    for_all_tasks = [row for row in rows if not row.task]
    return {(row.method, row.ratio): row for row in [*for_all_tasks, *own_task_rows(rows)]}
