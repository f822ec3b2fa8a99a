"""Study ``allocation``: which allocation over the layers is best, and which logistic curve?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from seap_ray.pipeline.results import own_task_rows
from seap_ray.report.rows import ModelRow
from seap_ray.report.study_rows import AllocationRow, Estimate
from seap_ray.studies.requests import at_every_ratio, run_specs, variant
from seap_ray.studies.result import StudyResult
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
    def experts(self) -> str:
        """Name of the experts' method."""
        # Only the logistic curve has parameters.
        if self.k is None:
            return self.allocation
        return f"{self.allocation}.k{self.k:g}.x{self.x0:g}"

    @property
    def general(self) -> str:
        """Name of the general model."""
        return f"{self.experts}.general"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a model that set this curve."""
        if self.k is None:
            return {"allocation": self.allocation}

        return {"allocation": self.allocation, "k": self.k, "x0": self.x0}


CURVES = (
    _Curve("auto"),
    _Curve("measured"),
    _Curve("uniform"),
    _Curve("global"),
    *(_Curve("logistic", k, x0) for k, x0 in product(STEEPNESSES, MIDPOINTS)),
)
"""All that is compared."""


def run(runner: StudyRunner) -> StudyResult:
    """Compare the experts and the general model under every allocation, and over a grid of logistic curves."""
    config = runner.config
    wanted = []
    for curve in CURVES:
        for spec in run_specs(config):
            # The experts of all tasks are one method, so that they get one row of means.
            method = curve.experts if spec.task else curve.general
            wanted.append(variant(spec, method, **curve.settings))
    models = runner.evaluate_models(at_every_ratio(config, wanted))

    by_method = _by_method([model.row for model in models])
    rows = [_row(ratio, curve, by_method) for ratio, curve in product(config.pruning.ratio, CURVES)]
    return StudyResult(models, AllocationRow.columns(runner.mean_head), rows)


def _row(ratio: float, curve: _Curve, by_method: Mapping[tuple[str, float | None], ModelRow]) -> AllocationRow:
    # Where no expert could be judged, there is no row of the experts together.
    experts_row = by_method.get((curve.experts, ratio))
    experts = Estimate.mean(experts_row.quality.values()) if experts_row else Estimate()
    general = Estimate.mean(by_method[curve.general, ratio].quality.values())

    return AllocationRow(
        ratio=ratio,
        allocation=curve.allocation,
        k=curve.k,
        x0=curve.x0,
        experts_mean=experts.value,
        experts_stderr=experts.stderr,
        general_mean=general.value,
        general_stderr=general.stderr,
    )


def _by_method(rows: Sequence[ModelRow]) -> dict[tuple[str, float | None], ModelRow]:
    """Return models by method and ratio; those that are made for one task each as one row."""
    for_all_tasks = [row for row in rows if not row.task]
    return {(row.method, row.ratio): row for row in [*for_all_tasks, *own_task_rows(rows)]}
