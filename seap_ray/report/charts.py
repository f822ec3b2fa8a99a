"""Charts: frozen descriptions of line charts, dot plots and heat maps, and how each is drawn with Matplotlib.

A chart can be read on light and dark pages, narrow screens and grey paper: text and axes take the colour of the text
around them, every series has a marker and a line style besides its colour, and every cell of a heat map its number.
Matplotlib is imported only where something is drawn: it takes most of a second, and most charts are drawn already.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.lines import Line2D

LineStyle = Literal["-", "none"] | tuple[float, Sequence[float]]
"""A solid line, none at all, or dashes as Matplotlib has them: an offset and the lengths of dashes and gaps."""
INK = "#010203"
"""Stands for the colour of the text around a figure; no series has it."""
COLOURS = ("#0072b2", "#d55e00", "#00875f", "#b8579b", "#8f6f00", "#3f7fd0", "#7a6a5f")
"""After Okabe and Ito, the light ones darkened: a contrast of 3 to 1 or better on white and on near black."""
MARKERS = "osD^vPX*<"
LINE_STYLES: tuple[LineStyle, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Numbers = Sequence[float]
Range = tuple[Numbers, Numbers]
"""Lower and upper ends."""


@dataclass(frozen=True, slots=True)
class SeriesStyle:
    """The colour, marker and line that tell a series from the others."""

    colour: str
    marker: str = ""
    line: LineStyle = "-"
    hollow: bool = False
    """Whether the marker is only an outline, so that what lies below it is seen."""
    ring: bool = False
    """Whether the marker goes around that of another series."""

    def line_2d(self, x: Numbers, y: Numbers) -> "Line2D":
        """Return a line, or points, in this style."""
        from matplotlib.lines import Line2D

        # A dash is wide and thick; an outline is larger than what may lie below it.
        size = 5.5
        edge_width = 0.8
        if self.hollow:
            size = 7
            edge_width = 1.3
        if self.ring:
            size = 12
        if self.marker == "_":
            size = 12
            edge_width = 2.2

        return Line2D(
            x,
            y,
            color=self.colour,
            linestyle=self.line,
            marker=self.marker,
            markersize=size,
            markeredgewidth=edge_width,
            markerfacecolor="none" if self.hollow else self.colour,
        )


REFERENCE = SeriesStyle(INK, line=(0, (4, 2)))
"""Style of what the other series are compared with: a target, chance, an ideal."""
SECOND_REFERENCE = SeriesStyle(INK, line=(0, (1, 1.5)))
LOWER_BOUND = SeriesStyle(INK, "_", "none")
"""Style of a bound at every x: a short dash."""
CHOSEN = SeriesStyle(INK, "o", "none", hollow=True, ring=True)
"""Style of the mark around the point that was taken of several."""


def series_style(i: int) -> SeriesStyle:
    """Return the style of a chart's i-th series; the first 9 have different markers, the first 7 different colours."""
    # The three lists have different lengths, so that a combination does not come back soon.
    return SeriesStyle(
        COLOURS[i % len(COLOURS)],
        MARKERS[i % len(MARKERS)],
        LINE_STYLES[i % len(LINE_STYLES)],
        hollow=i % 2 == 1,
    )


@dataclass(frozen=True, slots=True)
class Series:
    """A line through points, or with the line style ``none`` the points alone."""

    label: str
    x: Numbers
    y: Numbers
    style: SeriesStyle
    errors: Range | None = None
    """Ends of an error bar at every point."""
    bands: tuple[Range, ...] = ()
    """Areas around the line, the widest first."""

    def draw(self, axes: "Axes") -> None:
        """Draw bands, error bars and the line, each over the one before."""
        colour = self.style.colour
        for low, high in self.bands:
            axes.fill_between(self.x, low, high, color=colour, alpha=0.22, linewidth=0)

        if self.errors:
            low, high = self.errors
            axes.vlines(self.x, low, high, colors=colour, linewidth=1)

        axes.add_line(self.style.line_2d(self.x, self.y))


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over a common x axis."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_integer: bool = False
    """Whether ticks lie on whole numbers only."""
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float | None] | None = None
    wide: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return (440, 300) if self.wide else (350, 250)

    @property
    def legend(self) -> dict[str, SeriesStyle]:
        """The style of every labelled series."""
        return {series.label: series.style for series in self.series if series.label}

    def draw(self, axes: "Axes") -> None:
        """Draw the series, then the axes around them."""
        from matplotlib.ticker import MaxNLocator

        # The scale comes first: a change of it would reset ticks and limits.
        axes.set_xscale("log" if self.x_log else "linear")
        axes.set_yscale("log" if self.y_log else "linear")

        for series in self.series:
            series.draw(axes)

        # Lines that are added by hand change no limits by themselves.
        axes.autoscale_view()

        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if self.y_range:
            axes.set_ylim(*self.y_range)

        axes.set_title(self.title, loc="left")
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)  # the grid lies below the series

        # Ticks depend on the limits, which are final only now.
        if self.x_integer:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if self.x_log:
            _set_log_ticks(axes.xaxis, axes.get_xlim())
        if self.y_log:
            _set_log_ticks(axes.yaxis, axes.get_ylim())


@dataclass(frozen=True, slots=True)
class Dots:
    """Points of a dot plot that belong together."""

    label: str
    values: Sequence[float | None]
    """A number for every row; None leaves the row without a point."""
    errors: Numbers
    """Half the length of every point's error bar."""
    style: SeriesStyle
    chosen: int | None = None
    """Row whose point is marked."""


@dataclass(frozen=True, slots=True)
class DotPlot:
    """Named rows with points along a common axis of numbers above 0, which is logarithmic where they lie far apart."""

    title: str
    x_label: str
    rows: Sequence[str]
    dots: tuple[Dots, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels; a row has room for the points of all series, one below the other."""
        # 260 pixels for the points, 6.5 for each character of a row's name.
        width = 260 + round(6.5 * max(map(len, self.rows)))
        return max(width, 9 * len(self.title)), 72 + max(26, 11 * len(self.dots)) * len(self.rows)

    @property
    def legend(self) -> dict[str, SeriesStyle]:
        """The style of every series, and that of the mark."""
        entries = {dots.label: dots.style for dots in self.dots}
        if any(dots.chosen is not None for dots in self.dots):
            entries["chosen"] = CHOSEN
        return entries

    @property
    def x_log(self) -> bool:
        """Whether the points span more than a factor of 10."""
        values = self._values()
        return min(values) > 0 and max(values) > 10 * min(values)

    def draw(self, axes: "Axes") -> None:
        """Draw the points of every series with their error bars, then the axes around them."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.set_xscale("log" if self.x_log else "linear")
        low, high = self._limits()
        axes.set(xlim=(low, high), ylim=(len(self.rows) - 0.4, -0.6), xlabel=self.x_label)

        for i, dots in enumerate(self.dots):
            # Series share a row, each a little below the one before.
            shift = 0.7 * ((i + 0.5) / len(self.dots) - 0.5)
            self._draw_dots(axes, dots, shift, low)

        axes.set_title(self.title, loc="left")
        axes.set_yticks(range(len(self.rows)), list(self.rows))
        axes.tick_params(axis="y", length=0)  # names need no tick marks
        axes.grid(axis="both", color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)  # the grid lies below the points
        axes.spines["left"].set_visible(False)

        # Ticks depend on the limits, which are final only now.
        if self.x_log:
            _set_log_ticks(axes.xaxis, (low, high))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))

    def _draw_dots(self, axes: "Axes", dots: Dots, shift: float, low: float) -> None:
        colour = dots.style.colour
        for row, (value, error) in enumerate(zip(dots.values, dots.errors, strict=True)):
            if value is None:
                continue

            y = row + shift
            # A logarithmic axis has no place for what is not above 0.
            axes.hlines(y, max(value - error, low), value + error, colors=colour, linewidth=1.2)
            axes.add_line(dots.style.line_2d([value], [y]))
            if row == dots.chosen:
                axes.add_line(CHOSEN.line_2d([value], [y]))

    def _values(self) -> list[float]:
        return [value for dots in self.dots for value in dots.values if value is not None]

    def _limits(self) -> tuple[float, float]:
        """Return the ends of the axis: all points and error bars, and some room."""
        highest = 0.0
        for dots in self.dots:
            for value, error in zip(dots.values, dots.errors, strict=True):
                highest = max(highest, (value or 0) + error)

        if self.x_log:
            return min(self._values()) / 1.6, 1.25 * highest
        # From 0 on, so that lengths compare; a divergence that is below 0 by rounding is shown, too.
        return min(0.0, *self._values()), 1.06 * highest or 1.0


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A grid of numbers; a cell's colour is the stronger the nearer its number is to the scale's second end."""

    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """Numbers by row and column; None leaves a cell empty."""
    scale: tuple[float, float] = (0, 1)
    """Numbers of the faintest and of the strongest colour; the first is the larger where lower is better."""
    digits: int = 2
    """Decimals of the numbers in the cells."""
    framed: frozenset[tuple[int, int]] = frozenset()
    """Cells (row, column) with a frame."""

    @property
    def legend(self) -> dict[str, SeriesStyle]:
        """Nothing: a cell shows its number."""
        return {}

    @property
    def longest_column_name(self) -> int:
        """Characters of the longest name of a column."""
        return max(map(len, self.columns))

    @property
    def slanted(self) -> bool:
        """Whether the columns' names are too long to stand beside each other."""
        return self.longest_column_name > 6

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels; every cell has the same room, whatever the names."""
        if self.slanted:
            beside = 4 * self.longest_column_name
            above = 5 * self.longest_column_name
        else:
            beside = 0
            above = 16

        # 40 pixels of margin, 7 for each character of a row's name, 46 for each column.
        width = 40 + 7 * max(map(len, self.rows)) + 46 * len(self.columns) + beside
        return max(width, 9 * len(self.title)), 56 + 28 * len(self.rows) + above

    def draw(self, axes: "Axes") -> None:
        """Draw the cells, then the names of rows and columns."""
        for row, values in enumerate(self.values):
            for column, value in enumerate(values):
                if value is not None:
                    self._draw_cell(axes, row, column, value)

        # The first row is at the top, so y runs downwards.
        axes.set(xlim=(0, len(self.columns)), ylim=(len(self.rows), 0), xlabel=self.x_label, ylabel=self.y_label)
        axes.set_title(self.title, loc="left", pad=8)
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(len(self.columns))], list(self.columns))
        axes.set_yticks([i + 0.5 for i in range(len(self.rows))], list(self.rows))

        if self.slanted:
            # The end of a name is at its column, and the name leans away from it.
            for text in axes.get_xticklabels():
                text.set(rotation=40, ha="left", rotation_mode="anchor")

        axes.tick_params(length=0)  # names need no tick marks
        axes.spines[:].set_visible(False)

    def _draw_cell(self, axes: "Axes", row: int, column: int, value: float) -> None:
        from matplotlib.patches import Rectangle

        low, high = self.scale
        # A value outside of the scale has the colour of its nearer end.
        # Where all numbers are equal, none is stronger.
        share = min(max((value - low) / (high - low), 0), 1) if high != low else 0

        # At full strength the number could not be read on either a light or a dark page.
        axes.add_patch(
            Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, color=COLOURS[0], alpha=0.05 + 0.5 * share, linewidth=0)
        )
        if (row, column) in self.framed:
            axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.4))

        axes.text(column + 0.5, row + 0.5, f"{value:.{self.digits}f}", ha="center", va="center", fontsize=10.5)


Panel = Chart | DotPlot | HeatMap
"""One set of axes of a figure."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels side by side that share a legend."""

    label: str
    """What the figure shows, for readers who cannot see it."""
    panels: tuple[Panel, ...]

    @property
    def legend(self) -> dict[str, SeriesStyle]:
        """The style of every series by its label; empty where there is only one series to name."""
        # Series with the same label have the same style in every panel.
        entries: dict[str, SeriesStyle] = {}
        for panel in self.panels:
            entries |= panel.legend
        return entries if len(entries) > 1 else {}


# --- logarithmic axes ------------------------------------------------------------------------------------------------


def _set_log_ticks(axis: "Axis", limits: tuple[float, float]) -> None:
    """Put ticks at round numbers within one decade, at 1, 2 and 5 within a few, else at powers of ten.

    Labels are plain text, for Matplotlib's formulas bring fonts along.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = limits
    n_decades = math.log10(high / low)

    # Within one decade there may be no power of ten, and so no tick at all.
    if n_decades < 1:
        axis.set_major_locator(FixedLocator(_round_ticks(low, high)))
    else:
        steps = (1, 2, 5) if n_decades < 2.5 else (1,)
        axis.set_major_locator(LogLocator(subs=steps, numticks=6))

    # Matplotlib would label the minor ticks of a short axis, in its own way.
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain_number))


def _round_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    # The locator also returns the next round numbers outside of the limits.
    ticks: Iterable[float] = MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(low, high)
    return [tick for tick in ticks if low <= tick <= high]


def _plain_number(value: float, _: int | None = None) -> str:
    """Return a number as text: ``0.1``, ``10⁻⁵``, ``1.6·10⁻⁴``."""
    if 1e-3 <= abs(value) < 1e5 or not value:
        return f"{value:g}"

    exponent = math.floor(math.log10(abs(value)) + 1e-9)  # a tick a little below its power of ten belongs to it
    factor = f"{value / 10**exponent:.3g}"
    return ("" if factor == "1" else f"{factor}·") + "10" + str(exponent).translate(SUPERSCRIPTS)
