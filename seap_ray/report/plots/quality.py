"""Quality: how good every method is against how much it removes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from seap_ray.report.charts import Chart, Figure, Series, series_style
from seap_ray.report.plots.methods import MAX_METHODS, REMOVED_LABEL, experts_first, widest_comparisons
from seap_ray.report.plots.studies import study_tables
from seap_ray.report.rows import ModelRow
from seap_ray.report.run_data import RunData, compared, mean_of, method_of, percent
from seap_ray.report.section import Section

MEAN_NAMES = {False: "mean accuracy", True: "mean perplexity"}
"""Names of the means, by whether they are perplexities."""


@dataclass(frozen=True, slots=True)
class Point:
    """A model's mean quality."""

    model: ModelRow
    mean: float
    stderr: float

    @property
    def removed(self) -> float:
        """Share of the decoder layers' weights that is removed, in percent."""
        return 100 * (self.model.realised_ratio or 0.0)

    def error_bar(self, *, perplexity: bool) -> tuple[float, float]:
        """Return the ends of the bar; the standard error of a perplexity is that of its logarithm."""
        if perplexity:
            return self.mean * math.exp(-self.stderr), self.mean * math.exp(self.stderr)
        return self.mean - self.stderr, self.mean + self.stderr


def quality_section(data: RunData) -> Section | None:
    """Return the quality of every method against what it removed."""
    # A model that could not be made has no place on the axis of what is removed.
    rows = compared(widest_comparisons(data)[0].models)
    models = [model for model in rows if model.realised_ratio is not None]

    # Accuracies and perplexities have charts of their own.
    charts = []
    for perplexity in MEAN_NAMES:
        if points := _points(models, perplexity=perplexity):
            if chart := _quality_chart(points, perplexity=perplexity):
                charts.append(chart)

    if not charts:
        return None

    return Section(
        "quality",
        "How does quality fall as more is removed?",
        "Each line is a method, from the dense model on; bars are one standard error. A higher accuracy is better, and "
        "a lower perplexity. A method with a model for each task, such as the experts, is evaluated with each model on "
        "its own task, every other method with its one model on all tasks.",
        _ranking(models),
        Figure("Quality against the share of the decoder weights that is removed, by method.", tuple(charts)),
        study_tables(data, "ratio"),
    )


def _points(models: Sequence[ModelRow], *, perplexity: bool) -> list[Point]:
    """Return the means of the models that have one."""
    points = []
    for model in models:
        if mean := mean_of(model, perplexity=perplexity):
            points.append(Point(model, *mean))
    return points


def _quality_chart(points: Sequence[Point], *, perplexity: bool) -> Chart | None:
    """Return a line for every shown method, from the dense model on."""
    dense = [point for point in points if point.model.kind == "dense"]

    # Every line starts at the dense model, from which nothing is removed.
    series = []
    for i, method in enumerate(_shown_methods(points, perplexity=perplexity)):
        by_size = sorted((p for p in points if method_of(p.model) == method), key=lambda point: point.removed)
        line = [*dense, *by_size]

        error_bars = [point.error_bar(perplexity=perplexity) for point in line]
        low, high = zip(*error_bars, strict=True)
        x = [point.removed for point in line]
        y = [point.mean for point in line]
        series.append(Series(method, x, y, series_style(i), errors=(low, high)))

    if not series:
        return None
    return Chart(MEAN_NAMES[perplexity], REMOVED_LABEL, "", tuple(series), y_log=perplexity, wide=True)


def _shown_methods(points: Sequence[Point], *, perplexity: bool) -> list[str]:
    """Return the experts, the general model, then the best at the largest ratio, as many as can be told apart."""
    largest = _largest_ratio([point.model for point in points])
    goodness = {}
    for point in points:
        if point.model.ratio == largest:
            goodness[method_of(point.model)] = -point.mean if perplexity else point.mean

    # A method without a model at the largest ratio comes last.
    methods = [method_of(point.model) for point in points if point.model.kind != "dense"]
    ranked = sorted(methods, key=lambda method: -goodness.get(method, -math.inf))
    return experts_first(ranked)[:MAX_METHODS]


def _largest_ratio(models: Sequence[ModelRow]) -> float | None:
    return max((model.ratio for model in models if model.ratio is not None), default=None)


def _ranking(models: Sequence[ModelRow]) -> str:
    """Say what the methods keep at the largest ratio."""
    largest = _largest_ratio(models)
    at_largest = [model for model in models if model.kind == "dense" or model.ratio == largest]

    # Perplexities are named only where there is no accuracy.
    perplexity = not any(mean_of(model, perplexity=False) for model in at_largest)
    means = {method_of(point.model): point.mean for point in _points(at_largest, perplexity=perplexity)}
    dense = means.pop("dense", None)
    if largest is None or not means:
        return ""

    ranked = sorted(means, key=lambda method: means[method], reverse=not perplexity)[:MAX_METHODS]
    texts = [f"{method} {means[method]:.3f}" for method in ranked]
    unpruned = f"; the dense model has {dense:.3f}" if dense else ""
    return f"{MEAN_NAMES[perplexity].capitalize()} with {percent(largest)} removed: {', '.join(texts)}{unpruned}."
