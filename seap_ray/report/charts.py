"""Pictures: panels of numbers in, SVG text out, for light and dark pages, narrow screens and grey paper.

Text and axes take the colour of the text around them. A series has a marker and a line of its own besides its colour,
and a cell its number. The same numbers give the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

Line = Literal["-", "none"] | tuple[float, Sequence[float]]
"""Solid, none at all, or dashes."""
INK = "#010203"
"""Stands for the colour of the text around a picture."""
PAPER = "background:#fff;color:#1f2328"
"""Style of a picture that stands alone: light wherever it is shown."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
COLOURS = ("#0072b2", "#d55e00", "#00875f", "#b8579b", "#8f6f00", "#3f7fd0", "#7a6a5f")
"""After Okabe and Ito, the light ones darkened: 3 to 1 or better on white and on near black."""
MARKERS = "osD^vPX*<"
LINES: tuple[Line, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "seap_ray",
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
Numbers = Sequence[float]
Range = tuple[Numbers, Numbers]
"""Lower and upper ends."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Look:
    """What tells a series from the others."""

    colour: str
    marker: str = ""
    line: Line = "-"
    hollow: bool = False

    def sample(self, x: Numbers, y: Numbers) -> Line2D:
        """A line or points that look so."""
        bar = self.marker == "_"
        return Line2D(
            x,
            y,
            color=self.colour,
            linestyle=self.line,
            marker=self.marker,
            markersize=12 if bar else 7 if self.hollow else 5.5,
            markeredgewidth=2.2 if bar else 1.3 if self.hollow else 0.8,
            markerfacecolor="none" if self.hollow else self.colour,
        )


REFERENCE = Look(INK, line=(0, (4, 2)))
"""What the others are held against: a request, chance, an ideal."""
SECOND_REFERENCE = Look(INK, line=(0, (1, 1.5)))


LOWER_BOUND = Look(INK, "_", "none")


def look(i: int) -> Look:
    """The looks repeat, but not before many. Every other one is hollow, so that what lies below it is seen."""
    return Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)], hollow=i % 2 == 1)


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or with the line ``none`` points. ``errors`` are bars, ``bands`` areas, the widest first."""

    label: str
    x: Numbers
    y: Numbers
    look: Look
    errors: Range | None = None
    bands: tuple[Range, ...] = ()

    def draw(self, axes: Axes) -> None:
        colour = self.look.colour
        for low, high in self.bands:
            axes.fill_between(self.x, low, high, color=colour, alpha=0.22, linewidth=0)
        if self.errors:
            low, high = self.errors
            axes.vlines(self.x, low, high, colors=colour, linewidth=1)
        axes.add_line(self.look.sample(self.x, self.y))


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over an axis."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_integer: bool = False
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float | None] | None = None
    wide: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return (440, 300) if self.wide else (350, 250)

    @property
    def legend(self) -> dict[str, Look]:
        return {series.label: series.look for series in self.series if series.label}

    def draw(self, axes: Axes) -> None:
        axes.set_xscale("log" if self.x_log else "linear")
        axes.set_yscale("log" if self.y_log else "linear")
        for series in self.series:
            series.draw(axes)
        axes.autoscale_view()
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if self.y_range:
            axes.set_ylim(*self.y_range)
        axes.set_title(self.title, loc="left")
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        if self.x_integer:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if self.x_log:
            _log_ticks(axes.xaxis, axes.get_xlim())
        if self.y_log:
            _log_ticks(axes.yaxis, axes.get_ylim())


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Rows and columns of numbers, the colour the stronger the nearer to the scale's end. An empty cell is None."""

    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    scale: tuple[float, float] = (0, 1)
    digits: int = 2
    framed: frozenset[tuple[int, int]] = frozenset()
    """Cells (row, column) with a frame."""

    @property
    def legend(self) -> dict[str, Look]:
        return {}

    @property
    def longest(self) -> int:
        return max(map(len, self.columns))

    @property
    def slanted(self) -> bool:
        """Whether the columns' names are too long to stand beside each other."""
        return self.longest > 6

    @property
    def size(self) -> tuple[int, int]:
        """Every cell has the same room, whatever its labels."""
        across, up = (4 * self.longest, 5 * self.longest) if self.slanted else (0, 16)
        width = 40 + 7 * max(map(len, self.rows)) + 46 * len(self.columns) + across
        return max(width, 9 * len(self.title)), 56 + 28 * len(self.rows) + up

    def draw(self, axes: Axes) -> None:
        for row, values in enumerate(self.values):
            for column, value in enumerate(values):
                if value is not None:
                    self._draw_cell(axes, row, column, value)
        axes.set(xlim=(0, len(self.columns)), ylim=(len(self.rows), 0), xlabel=self.x_label, ylabel=self.y_label)
        axes.set_title(self.title, loc="left", pad=8)
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(len(self.columns))], list(self.columns))
        axes.set_yticks([i + 0.5 for i in range(len(self.rows))], list(self.rows))
        if self.slanted:
            for text in axes.get_xticklabels():
                text.set(rotation=40, ha="left", rotation_mode="anchor")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    def _draw_cell(self, axes: Axes, row: int, column: int, value: float) -> None:
        low, high = self.scale
        share = min(max((value - low) / (high - low), 0), 1) if high != low else 0
        axes.add_patch(
            Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, color=COLOURS[0], alpha=0.05 + 0.5 * share, linewidth=0)
        )
        if (row, column) in self.framed:
            axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.4))
        axes.text(column + 0.5, row + 0.5, f"{value:.{self.digits}f}", ha="center", va="center", fontsize=10.5)


Panel = Chart | HeatMap


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels that share a legend."""

    label: str
    """What it shows, for those who cannot see it."""
    panels: tuple[Panel, ...]

    @property
    def legend(self) -> dict[str, Look]:
        entries: dict[str, Look] = {}
        for panel in self.panels:
            entries |= panel.legend
        return entries if len(entries) > 1 else {}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in groups, each under a heading or none; the first cell of a row names it."""

    caption: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
    notes: Sequence[str] = ()
    """What the numbers in its cells stand for."""


@dataclass(frozen=True, slots=True)
class Part:
    """A question with its answer: how to read the picture, what it shows, and the numbers."""

    key: str
    question: str
    how: str
    shows: str = ""
    picture: Picture | None = None
    tables: tuple[Table, ...] = ()


# --- SVG -------------------------------------------------------------------------------------------------------------


def panel_svg(panel: Panel, label: str) -> str:
    """One panel, in the colour of the text around it; its legend is the page's."""
    with style.context(["default", RC]):
        figure = _figure(*panel.size)
        panel.draw(figure.add_subplot())
        return _svg(figure, f"{label} {panel.title}".strip())


def swatch_svg(of: Look) -> str:
    """A legend's sample of a look; decoration, for the label says it."""
    with style.context(["default", RC]):
        figure = Figure(figsize=(36 / 72, 14 / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        line = of.sample([0, 0.5, 1], [0, 0, 0])
        line.set_markevery([1])
        axes.add_line(line)
        axes.set(xlim=(-0.05, 1.05), ylim=(-1, 1))
        return _svg(figure, "")


def whole_svg(picture: Picture) -> str:
    """All panels with their legend, three or two beside each other, on a ground of its own."""
    panels, legend = picture.panels, picture.legend
    n_columns = 2 if len(panels) == 4 else min(len(panels), 3)
    n_rows = math.ceil(len(panels) / n_columns)
    width, height = (max(sizes) for sizes in zip(*(panel.size for panel in panels), strict=True))
    across = _across(list(legend), n_columns * width)
    with style.context(["default", RC]):
        figure = _figure(n_columns * width, n_rows * height + 24 * math.ceil(len(legend) / across))
        for i, panel in enumerate(panels):
            panel.draw(figure.add_subplot(n_rows, n_columns, i + 1))
        if legend:
            handles = [of.sample([], []) for of in legend.values()]
            figure.legend(handles, list(legend), loc="outside lower center", ncols=across, frameon=False)
        svg = _svg(figure, picture.label)
    return svg.replace("<svg ", f'<svg style="{PAPER}" font-family="{FONT}" ', 1)


def _across(labels: Sequence[str], width: float) -> int:
    """Entries of a legend that fit beside each other, each a line of 60 pixels and its label."""
    longest = max(map(len, labels), default=0)
    return max(1, min(len(labels), 5, int(width // (60 + 8 * longest))))


def _figure(width: float, height: float) -> Figure:
    """One unit of the SVG is one pixel of the page."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)  # it would hold for the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ?", "", svg)
    svg = svg.replace(INK, "currentColor")
    named = f'role="img" aria-label="{_escaped(label)}"' if label else 'aria-hidden="true"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {named}'
    return f'{head} viewBox="0 0 {width} {height}" stroke-linejoin="round">{svg.strip()}'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _log_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Round numbers within a decade, else 1, 2 and 5, or powers of ten; as text, for formulas bring fonts along."""
    low, high = limits
    decades = math.log10(high / low)
    even = [tick for tick in MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(low, high) if low <= tick <= high]
    subs = (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(FixedLocator(even) if decades < 1 else LogLocator(subs=subs, numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _: int | None = None) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10**exponent:.3g}"
    return ("" if factor == "1" else f"{factor}·") + "10" + str(exponent).translate(SUPERSCRIPTS)
