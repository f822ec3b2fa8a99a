"""SVG: figures and their panels as SVG text. The same numbers give the same bytes, whatever Matplotlib's settings."""

import io
import math
import re
from collections.abc import Sequence
from functools import cache

from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from seap_ray.report.charts import INK, Figure, Panel, SeriesStyle

STANDALONE_STYLE = "background:#fff;color:#1f2328"
"""Style of a figure in a file of its own: light wherever it is shown."""
STANDALONE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PIXELS_PER_INCH = 72
"""Matplotlib's unit in an SVG is a point; here one point is one pixel of the page."""
RC_PARAMS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "seap_ray",  # ids are the same in every process
    "text.parse_math": False,
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def panel_svg(panel: Panel, label: str) -> str:
    """Return one panel without a legend, in the colour of the text around it."""
    with style.context(["default", RC_PARAMS]):
        canvas = _canvas(*panel.size)
        panel.draw(canvas.add_subplot())
        return _svg(canvas, f"{label} {panel.title}".strip())


@cache
def legend_key_svg(series_style: SeriesStyle) -> str:
    """Return the sample of a style for a legend; it is hidden from screen readers, which read its label."""
    with style.context(["default", RC_PARAMS]):
        # Room for a line with one marker: 36 by 14 pixels, a line of text high.
        canvas = Canvas(figsize=(36 / PIXELS_PER_INCH, 14 / PIXELS_PER_INCH))
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        line = series_style.line_2d([0, 0.5, 1], [0, 0, 0])
        line.set_markevery([1])  # only in the middle
        axes.add_line(line)
        axes.set(xlim=(-0.05, 1.05), ylim=(-1, 1))
        return _svg(canvas, "")


def figure_svg(figure: Figure) -> str:
    """Return all panels with their legend, two or three in a row, on a white ground: an SVG file's content."""
    # Four panels look best as a square; all panels get the room of the largest.
    panels = figure.panels
    n_columns = 2 if len(panels) == 4 else min(len(panels), 3)
    n_rows = math.ceil(len(panels) / n_columns)
    width = max(panel.size[0] for panel in panels)
    height = max(panel.size[1] for panel in panels)

    # The legend is below the panels, in rows of 24 pixels.
    legend = figure.legend
    n_legend_columns = _legend_columns(list(legend), n_columns * width)
    legend_height = 24 * math.ceil(len(legend) / n_legend_columns)

    with style.context(["default", RC_PARAMS]):
        canvas = _canvas(n_columns * width, n_rows * height + legend_height)
        for i, panel in enumerate(panels):
            panel.draw(canvas.add_subplot(n_rows, n_columns, i + 1))

        if legend:
            handles = [series_style.line_2d([], []) for series_style in legend.values()]
            canvas.legend(handles, list(legend), loc="outside lower center", ncols=n_legend_columns, frameon=False)

        svg = _svg(canvas, figure.label)

    return svg.replace("<svg ", f'<svg style="{STANDALONE_STYLE}" font-family="{STANDALONE_FONT}" ', 1)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many entries of a legend fit beside each other, each a key of 60 pixels and its label."""
    # By the longest label, since Matplotlib's columns are equally wide; 8 pixels are enough for a character.
    longest = max(map(len, labels), default=0)
    return max(1, min(len(labels), 5, int(width // (60 + 8 * longest))))


def _canvas(width: float, height: float) -> Canvas:
    return Canvas(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), layout="constrained")


def _svg(canvas: Canvas, label: str) -> str:
    """Return a canvas as SVG without what would act outside of it: style sheets, ids, fonts."""
    _lay_out(canvas)
    buffer = io.StringIO()
    # Metadata hold the date and the version of Matplotlib, so bytes that change.
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    width, height = (round(PIXELS_PER_INCH * inches) for inches in canvas.get_size_inches())

    # Keep what is inside of the svg element: its own head is written below.
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)  # it would hold for the whole page

    # Groups have names that repeat on a page; fonts and the ink are those of the text around.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ?", "", svg)
    svg = svg.replace(INK, "currentColor")

    named = f'role="img" aria-label="{_escape(label)}"' if label else 'aria-hidden="true"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {named}'
    return f'{head} viewBox="0 0 {width} {height}" stroke-linejoin="round">{svg.strip()}'


def _lay_out(canvas: Canvas) -> None:
    """Find the places of all panels, once: ``savefig`` would draw everything a first time to find them."""
    layout = canvas.get_layout_engine()
    if layout is None:
        return

    # By the sizes of text that savefig takes: those of the SVG backend, at its resolution.
    FigureCanvasSVG(canvas)
    canvas.set_dpi(PIXELS_PER_INCH)
    layout.execute(canvas)
    canvas.set_layout_engine(None)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
