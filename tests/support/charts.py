"""Charts: a small one of each kind."""

from typing import Any

from seap_ray.report.charts import Chart, DotPlot, Dots, HeatMap, Series, series_style


def chart(**changes: Any) -> Chart:
    """Return a chart of two series, one with error bars."""
    x = (1.0, 2.0, 4.0)
    y = (0.2, 0.5, 0.9)
    series = (
        Series("one", x, y, series_style(0)),
        Series("two", x, y[::-1], series_style(1), errors=((0.8, 0.4, 0.1), (1, 0.6, 0.3))),
    )
    return Chart(**{"title": "Chart", "x_label": "x", "y_label": "y", "series": series, **changes})


def heat_map(**changes: Any) -> HeatMap:
    """Return a map of four cells, one of them empty."""
    values = [[0.25, None], [0.5, 1.0]]
    named = {"title": "Map", "x_label": "x", "y_label": "y", "columns": ["p", "q"], "rows": ["r", "s"]}
    return HeatMap(**{**named, "values": values, **changes})


def dot_plot(**changes: Any) -> DotPlot:
    """Return a dot plot of two series, the second with a gap, and each with a mark."""
    dots = (
        Dots("one", (0.2, 0.5), (0.05, 0.1), series_style(0), chosen=0),
        Dots("two", (None, 0.9), (0, 0.1), series_style(1), chosen=1),
    )
    return DotPlot(**{"title": "Dots", "x_label": "x", "rows": ["r", "s"], "dots": dots, **changes})
