"""Suites: names in, rows printed and written out, and from what is written the tables of a page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from benchmarks import calibrate, compact, merge, plan, route, serve, startup, widths
from benchmarks.measure import Row, load_rows, save_rows
from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.progress import say
from seap_ray.report.table import text_table
from seap_ray.storage.files import writable
from seap_ray.vllm_plugin.plugin import check_registered

SUITES: Mapping[str, Callable[[Config], Iterable[Row]]] = {
    "calibrate": calibrate.rows,
    "merge": merge.rows,
    "plan": plan.rows,
    "compact": compact.rows,
    "startup": startup.rows,
    "serve": serve.rows,
    "route": route.rows,
    "widths": widths.rows,
}
DEFAULT = ("calibrate", "merge", "plan", "compact", "startup")
"""Suites that need no engine."""
WITH_VLLM = {"serve", "route", "widths"}
BEGIN = "<!-- measured: written by jobs/bench.py docs -->"
END = "<!-- end of what is measured -->"
FOLDED = 40
"""A table of more rows than these is shown when a reader opens it."""
COLUMNS = ("what", "baseline", "ours", "unit", "ratio", "limit", "target", "met")


def run_suites(config: Config, names: Sequence[str], keys: Sequence[str]) -> None:
    """Measure, print and write suites.

    Args:
        config: The job's settings; ``benchmarks`` is what suites read.
        names: Suites to run; none means those of ``DEFAULT``.
        keys: The settings on the command line, which the rows repeat.

    Raises:
        ConfigError: A name is unknown, or a suite needs vLLM and it is not there; before any work.
    """
    # Everything is checked before minutes are spent.
    for name in names:
        if name not in SUITES:
            raise ConfigError(f"{name}: no such suite; there are {', '.join(SUITES)}, and docs")

    if WITH_VLLM & {*names}:
        check_registered()

    transformers_logging.disable_progress_bar()
    folder = Path(config.benchmarks.folder)
    for name in names or DEFAULT:
        say(f"{name}:")
        # What a user types to measure the same again.
        command = " ".join(["python jobs/bench.py", name, *_portable(keys)])
        rows = [replace(row, command=command) for row in SUITES[name](config)]
        path = save_rows(folder, name, rows)
        say(f"{text_table(COLUMNS, [_cells(row) for row in rows])}\n")
        for row in rows:
            if row.met is False:
                say(f"not met: {_miss(row)}")
        say(f"{path}\n")


def _portable(keys: Sequence[str]) -> list[str]:
    """Return settings as a page may show them: folders of one machine mean nothing on another."""
    shown: list[str] = []
    for key in keys:
        name, _, value = key.partition("=")
        if name == "benchmarks.official" or (name == "model.source" and value.startswith(("/", "~"))):
            shown.append(f"{name}=FOLDER")
        elif name not in ("benchmarks.folder", "benchmarks.table", "config"):
            shown.append(key)
    return shown


def _cells(row: Row) -> list[Any]:
    """Return a row's cells in the order of ``COLUMNS``."""
    met = {True: "yes", False: "no", None: None}[row.met]
    limit = None if row.limit is None else f"{_number(row.limit)} ({row.limit_name})"
    # Ratios have a column of their own.
    numbers = [_number(row.baseline), _number(row.ours)]
    return [row.name, *numbers, row.unit, _ratio(row), limit, row.target or None, met]


def _number(value: float | None, digits: int = 3) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _ratio(row: Row) -> str | None:
    if row.ratio is None or row.spread is None:
        return None
    low, high = row.spread
    return f"{row.ratio:.3g}" if low == high else f"{row.ratio:.3g} ({low:.3g} to {high:.3g})"


def _miss(row: Row) -> str:
    """Say by how much a row misses its target, and why."""
    quantity, _, bound = row.target.split()
    value = row.ratio if quantity == "ratio" else row.ours
    shown = _number(value, digits=4)  # 1.476 is not the 1.48 that was wanted
    return f"{row.name}: {shown} where {bound} was the target; {row.why}"


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(config: Config) -> Path:
    """Put tables of all rows in the folder between two lines of ``<folder>.md``, which it makes where it is missing.

    Raises:
        ConfigError: The page has no such lines, or there are no rows.
    """
    folder = Path(config.benchmarks.folder)
    page = folder.with_name(f"{folder.name}.md")
    files = sorted(folder.glob("*.json"))
    text = page.read_text() if page.is_file() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if not files:
        raise ConfigError(f"benchmarks.folder: nothing is measured in {folder}")
    # What people wrote before and after the lines stays.
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page}: has no lines {BEGIN} and {END}")

    tables = "\n".join(_section(*load_rows(file)) for file in files)
    with writable(page):
        page.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}")
    return page


def _section(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return a suite's part of the page: command, machine, table, missed targets."""
    hardware = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB"
    if machine["gpu"]:
        hardware += f", {machine['gpu']}"
    versions = [
        f"{name} {value}" for name, value in machine.items() if name not in ("cpu", "cores", "memory_gb", "gpu")
    ]

    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(_line, rows), ""]
    if len(rows) > FOLDED:
        table = [f"<details><summary>{len(rows)} rows</summary>", "", *table, "</details>", ""]
    lines = [f"## {rows[0].suite}", "", f"`{rows[0].command}` on {hardware}; {', '.join(versions)}.", "", *table]
    missed = [f"- Not met: {_miss(row)}" for row in rows if row.met is False]
    if missed:
        missed.append("")
    return "\n".join([*lines, *missed])


def _line(row: Row) -> str:
    """Return a row as a line of a table in Markdown."""
    cells = ["" if cell is None else str(cell) for cell in _cells(row)]
    return f"| {' | '.join(cells)} |"
