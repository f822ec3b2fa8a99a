"""Suites: names in, rows printed and written out, and from what is written the tables of a page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from benchmarks import calibrate, compact, merge, plan, route, serve, startup
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
}
DEFAULT = ("calibrate", "merge", "plan", "compact", "startup")
"""Those that need no engine."""
WITH_VLLM = {"serve", "route"}
BEGIN, END = "<!-- measured: written by jobs/bench.py docs -->", "<!-- end of what is measured -->"
FOLDED = 40
"""A table of more rows than these is shown when a reader opens it."""
COLUMNS = ("what", "baseline", "ours", "unit", "ratio", "limit", "target", "met")


def run_suites(config: Config, names: Sequence[str], keys: Sequence[str]) -> None:
    """Measure and write every suite of ``names``, or those of ``DEFAULT``; ``keys`` are what the command sets.

    Raises ConfigError for an unknown name, or where one needs vLLM and it is not there, before any work.
    """
    for name in names:
        if name not in SUITES:
            raise ConfigError(f"{name}: no such suite; there are {', '.join(SUITES)}, and docs")
    if WITH_VLLM & {*names}:
        check_registered()
    transformers_logging.disable_progress_bar()
    folder = Path(config.benchmarks.folder)
    for name in names or DEFAULT:
        say(f"{name}:")
        command = " ".join(["python jobs/bench.py", name, *_told(keys)])
        rows = [replace(row, command=command) for row in SUITES[name](config)]
        path = save_rows(folder, name, rows)
        say(f"{text_table(COLUMNS, [_cells(row) for row in rows])}\n")
        for row in rows:
            if row.met is False:
                say(f"not met: {_short_of(row)}")
        say(f"{path}\n")


def _told(keys: Sequence[str]) -> list[str]:
    """Keys as a page may show them: folders of one machine mean nothing on another."""
    shown = {"benchmarks.official": "benchmarks.official=FOLDER"}
    named = ((key.partition("=")[0], key) for key in keys)
    return [shown.get(name, key) for name, key in named if name not in ("benchmarks.folder", "config")]


def _cells(row: Row) -> list[Any]:
    met = {True: "yes", False: "no", None: None}[row.met]
    limit = None if row.limit is None else f"{_number(row.limit)} ({row.limit_name})"
    numbers = [_number(row.baseline), _number(row.ours)]
    return [row.name, *numbers, row.unit, _ratio(row), limit, row.target or None, met]


def _number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _ratio(row: Row) -> str | None:
    if row.ratio is None or row.spread is None:
        return None
    low, high = row.spread
    return f"{row.ratio:.3g}" if low == high else f"{row.ratio:.3g} ({low:.3g} to {high:.3g})"


def _short_of(row: Row) -> str:
    quantity, _, bound = row.target.split()
    value = row.ratio if quantity == "ratio" else row.ours
    shown = _number(value, digits=4)  # 1.476 is not the 1.48 that was wanted
    return f"{row.name}: {shown} where {bound} was the target; {row.why}"


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(config: Config) -> Path:
    """Put tables of all rows in the folder between two lines of ``<folder>.md``, which it makes where it is missing.

    Raises ConfigError where the page has no such lines, or there are no rows.
    """
    folder = Path(config.benchmarks.folder)
    page = folder.with_name(f"{folder.name}.md")
    files = sorted(folder.glob("*.json"))
    text = page.read_text() if page.is_file() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if not files:
        raise ConfigError(f"benchmarks.folder: nothing is measured in {folder}")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page}: has no lines {BEGIN} and {END}")
    tables = "\n".join(_section(*load_rows(file)) for file in files)
    with writable(page):
        page.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}")
    return page


def _section(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in machine.items() if n not in ("cpu", "cores", "memory_gb", "gpu"))
    hardware = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB"
    hardware += f", {machine['gpu']}" if machine["gpu"] else ""
    table = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(f"| {' | '.join('' if cell is None else str(cell) for cell in _cells(row))} |" for row in rows),
        "",
    ]
    if len(rows) > FOLDED:
        table = [f"<details><summary>{len(rows)} rows</summary>", "", *table, "</details>", ""]
    lines = [f"## {rows[0].suite}", "", f"`{rows[0].command}` on {hardware}; {versions}.", "", *table]
    missed = [f"- Not met: {_short_of(row)}" for row in rows if row.met is False]
    return "\n".join([*lines, *missed, *([""] if missed else [])])
