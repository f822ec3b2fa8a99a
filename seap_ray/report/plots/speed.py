"""Speed: how much faster every method is than the dense model."""

import numpy as np

from seap_ray.report.charts import REFERENCE, Chart, Figure, Series, series_style
from seap_ray.report.plots.methods import MAX_METHODS, REMOVED_LABEL, experts_first, widest_comparisons
from seap_ray.report.rows import ModelRow, SpeedCell
from seap_ray.report.run_data import RunData, method_of, name_at_ratio, percent
from seap_ray.report.section import Section, Table
from seap_ray.report.table import STAGES

Measured = list[tuple[ModelRow, SpeedCell]]
"""Models with their speeds."""


def speed_section(data: RunData) -> Section | None:
    """Return the speed-up over the dense model against what was removed."""
    for results in widest_comparisons(data):
        # A summary stands for models that are rows themselves.
        measured = [(model, model.speed) for model in results.models if model.speed and model.kind != "summary"]
        pruned = [(m, speed) for m, speed in measured if m.ratio is not None and m.realised_ratio is not None]
        if pruned:
            return _section(measured, sorted(pruned, key=_by_size))
    return None


def _by_size(measured: tuple[ModelRow, SpeedCell]) -> tuple[float, str]:
    model, _ = measured
    return _removed(model), model.name


def _removed(model: ModelRow) -> float:
    return model.realised_ratio or 0.0


def _section(measured: Measured, pruned: Measured) -> Section:
    # The models are in the order of what was removed, so the last is the smallest.
    smallest, speed = pruned[-1]
    removed = _removed(smallest)
    ideal = 1 / (1 - removed)  # time in proportion to the weights that are left
    columns = ["model", "prefill, tokens/s", "decode, tokens/s", "prefill, × dense", "decode, × dense"]
    rows = [_table_row(model, cell) for model, cell in measured]
    return Section(
        "speed",
        "How much faster are the pruned models?",
        "Tokens per second divided by the dense model's: 1 is as fast. The dashed line is the ideal, a model whose "
        "time falls in proportion to the weights of its decoder layers.",
        f"With {percent(removed)} removed, {smallest.name} is {speed.prefill_speedup:.2f} times as fast as the dense "
        f"model in prefill and {speed.decode_speedup:.2f} times in decoding; the ideal is {ideal:.2f}.",
        Figure(
            "Speed-up over the dense model against the share of the decoder weights that is removed.",
            tuple(_speed_chart(pruned, stage) for stage in STAGES),
        ),
        (Table("Speed of every model", columns, [("", rows)]),),
    )


def _speed_chart(pruned: Measured, stage: str) -> Chart:
    """Return the ideal speed-up, and a line for every shown method."""
    largest, _ = pruned[-1]
    # The ideal is a curve, drawn by 40 points up to the smallest model.
    x = np.linspace(0, _removed(largest), 40)
    series = [Series("ideal", (100 * x).tolist(), (1 / (1 - x)).tolist(), REFERENCE)]

    methods = experts_first(method_of(model) for model, _ in pruned)[:MAX_METHODS]
    for i, method in enumerate(methods):
        of_method = [(model, speed) for model, speed in pruned if method_of(model) == method]
        removed = [100 * _removed(model) for model, _ in of_method]
        speedups = [speed.speedup(stage) for _, speed in of_method]
        series.append(Series(method, removed, speedups, series_style(i)))

    return Chart(stage, REMOVED_LABEL, "× dense model", tuple(series), y_range=(0, None), wide=True)


def _table_row(model: ModelRow, speed: SpeedCell) -> list[str]:
    rates = [f"{speed.tokens_per_s(stage):,.0f}" for stage in STAGES]
    speedups = [f"{speed.speedup(stage):.2f}" for stage in STAGES]
    return [name_at_ratio(model), *rates, *speedups]
