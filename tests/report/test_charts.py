import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from seap_ray.report import charts
from seap_ray.report.charts import (
    COLOURS,
    INK,
    MARKERS,
    REFERENCE,
    Dots,
    Figure,
    Series,
    series_style,
)
from seap_ray.report.svg import _legend_columns, figure_svg, legend_key_svg, panel_svg
from tests.support import ROOT
from tests.support.charts import chart, dot_plot, heat_map
from tests.support.oracles import contrast

ODD = 'a<b> & "c" $x_1$'
PAGES = re.findall(r"--page: (#\w+)", Path(charts.__file__).with_name("template.html.jinja").read_text())


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("panel", [chart(), chart(y_log=True, x_log=True), dot_plot(), heat_map()])
def test_a_panel_is_one_labelled_svg_in_the_colour_of_the_text_around_it(panel):
    svg = panel_svg(panel, "What it is.")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("role") == "img"
    assert root.get("aria-label") == f"What it is. {panel.title}"
    assert root.get("viewBox") == f"0 0 {panel.size[0]} {panel.size[1]}"
    assert "currentColor" in svg and INK not in svg


@pytest.mark.parametrize("svg", [panel_svg(chart(), "x"), panel_svg(heat_map(), "x"), legend_key_svg(series_style(0))])
def test_an_svg_brings_no_style_script_font_or_address_of_its_own(svg):
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r'https?://[^"\s]*', svg)) == namespaces
    assert not re.search(r"<style|<script|<image|@import|font-family|<\?xml|<!DOCTYPE", svg)


def test_text_stays_text_and_odd_names_are_no_markup_and_no_formula():
    svg = panel_svg(heat_map(rows=[ODD, "s"], title=ODD), ODD)
    assert {ODD, "p", "q", "0.25", "0.50", "1.00"} <= set(texts(svg))
    assert ElementTree.fromstring(svg).get("aria-label") == f"{ODD} {ODD}"


def test_a_logarithmic_axis_has_plain_numbers():
    series = (Series("", (0, 1, 2), (2e-6, 3e-2, 40.0), series_style(0)),)
    wide = texts(panel_svg(chart(series=series, y_log=True), ""))
    assert {"10⁻⁵", "0.1"} <= set(wide) or {"10⁻⁴", "0.01"} <= set(wide)
    narrow = texts(panel_svg(chart(series=(Series("", (0, 1), (11.0, 45.0), series_style(0)),), y_log=True), ""))
    assert {"20", "30", "40"} <= set(narrow)
    tiny = texts(panel_svg(chart(series=(Series("", (0, 1), (1.5e-4, 1.9e-4), series_style(0)),), y_log=True), ""))
    assert {"1.6·10⁻⁴", "1.8·10⁻⁴"} <= set(tiny)
    decades = texts(panel_svg(chart(series=(Series("", (0, 1), (1.5, 90.0), series_style(0)),), y_log=True), ""))
    assert {"2", "5", "10", "20", "50"} <= set(decades)


def test_a_line_goes_through_its_points():
    x, y = (0.0, 1.0, 5.0), (2.0, 8.0, 3.0)
    svg = panel_svg(chart(series=(Series("", x, y, series_style(0)),)), "")
    path = re.search(rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: {COLOURS[0]}', svg)
    drawn = [tuple(map(float, point)) for point in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.group(1))]
    for values, at in ((x, [p[0] for p in drawn]), (y, [-p[1] for p in drawn])):
        scale = (at[1] - at[0]) / (values[1] - values[0])
        assert scale > 0
        assert at[2] == pytest.approx(at[0] + scale * (values[2] - values[0]), abs=1e-3)


def test_a_cell_is_the_stronger_the_better_its_number_and_an_empty_one_is_not_drawn():
    def opacities(**changes):
        svg = panel_svg(heat_map(**changes), "")
        return [float(o) for o in re.findall(rf"fill: {COLOURS[0]}; opacity: ([\d.]+)", svg)]

    assert len(opacities()) == 3
    assert opacities() == sorted(opacities()) and len(set(opacities())) == 3
    better_when_lower = opacities(scale=(1, 0))
    assert better_when_lower == sorted(better_when_lower, reverse=True) and len(set(better_when_lower)) == 3
    assert len(set(opacities(values=[[0.5, 0.5], [0.5, 0.5]], scale=(0.5, 0.5)))) == 1


def test_a_dot_plot_has_a_row_for_every_name_and_a_ring_around_what_was_chosen():
    svg = panel_svg(dot_plot(), "")
    assert {"r", "s", "Dots"} <= set(texts(svg))
    unmarked = dot_plot(dots=tuple(replace(dots, chosen=None) for dots in dot_plot().dots))
    assert svg.count("<use") == panel_svg(unmarked, "").count("<use") + 2
    assert list(dot_plot().legend) == ["one", "two", "chosen"]
    assert list(unmarked.legend) == ["one", "two"]


def test_points_far_apart_are_on_a_logarithmic_axis_and_numbers_below_zero_are_not():
    def of(*values):
        return dot_plot(dots=(Dots("one", values, (0.3, 0.3), series_style(0)),))

    assert not of(0.2, 1.9).x_log and of(0.1, 1.9).x_log and not of(-0.1, 1.9).x_log
    assert {"0.1", "0.2", "0.5", "1", "2"} <= set(texts(panel_svg(of(0.1, 1.9), "")))
    assert {"0", "1"} <= set(texts(panel_svg(of(-0.1, 1.9), "")))


@pytest.mark.parametrize("page", [*PAGES, "#ffffff", "#0d1117"])
def test_every_colour_can_be_told_from_the_page(page):
    assert len(PAGES) == 2
    assert [colour for colour in COLOURS if contrast(colour, page) < 3] == []


def test_series_can_be_told_apart_without_colour():
    styles = [series_style(i) for i in range(len(MARKERS))]
    assert all(a.marker != b.marker for a, b in combinations(styles, 2))
    assert all(a.line != b.line for a, b in combinations(styles[:4], 2))
    assert REFERENCE.marker == ""


def test_the_same_numbers_give_the_same_bytes_in_another_process_with_other_settings():
    code = (
        "import sys; sys.path[:0] = ['.']; "
        "import matplotlib; matplotlib.rcParams['font.size'] = 30; "
        "from seap_ray.report.svg import panel_svg; from tests.support.charts import chart, heat_map; "
        "print(panel_svg(chart(), 'x'), panel_svg(heat_map(), 'x'))"
    )
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120, check=True
    )
    before = dict(matplotlib.rcParams)
    assert done.stdout == f"{panel_svg(chart(), 'x')} {panel_svg(heat_map(), 'x')}\n"
    assert dict(matplotlib.rcParams) == before


def test_a_legend_names_each_look_once_and_one_series_needs_none():
    assert list(Figure("", (chart(), chart(), heat_map())).legend) == ["one", "two"]
    assert Figure("", (chart(series=chart().series[:1]),)).legend == {}


def test_a_picture_stands_alone_with_its_legend_on_a_ground_of_its_own():
    svg = figure_svg(Figure("Both.", (chart(), heat_map())))
    assert {"one", "two", "Chart", "Map"} <= set(texts(svg))
    assert "background:#fff;color:#1f2328" in ElementTree.fromstring(svg).get("style")


def test_a_legend_is_no_wider_than_its_picture():
    assert _legend_columns(["experts", "wanda_sp", "magnitude", "random"], 440) == 3  # 60 + 8 * 9 pixels each
    assert (
        _legend_columns(["a"] * 9, 2000) == 5
        and _legend_columns(["a label as long as this one"], 100) == 1
        and _legend_columns([], 440) == 1
    )
