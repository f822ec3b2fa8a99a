"""Page: a run's report as one HTML file with all that it needs inside. What the run has no files for is left out."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from seap_ray.models.corpus import REASONS
from seap_ray.progress import count
from seap_ray.report.charts import Panel, SeriesStyle
from seap_ray.report.plots.activations import clusters_section
from seap_ray.report.plots.allocation import allocation_section, curve_section
from seap_ray.report.plots.choices import choices_section
from seap_ray.report.plots.corpus import corpus_section
from seap_ray.report.plots.overlap import overlap_section
from seap_ray.report.plots.quality import MEAN_NAMES, quality_section
from seap_ray.report.plots.reconstruction import reconstruction_section
from seap_ray.report.plots.router import router_section
from seap_ray.report.plots.scores import scores_section
from seap_ray.report.plots.sensitivities import sensitivities_section
from seap_ray.report.plots.sparsity import sparsity_section
from seap_ray.report.plots.speed import speed_section
from seap_ray.report.plots.studies import (
    ood_section,
    paper_section,
    pooling_section,
    routing_section,
    synthesis_section,
)
from seap_ray.report.plots.transfer import transfer_section
from seap_ray.report.rows import FailedCell, ModelRow, QualityCell, TaskRow
from seap_ray.report.run_data import RunData, compared, mean_of, percent
from seap_ray.report.section import Section, Table
from seap_ray.storage.artifact import Artifact, KeyedFile
from seap_ray.storage.files import atomic_write, read_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint
from seap_ray.tasks import is_perplexity

SECTIONS = (
    quality_section,
    transfer_section,
    choices_section,
    sparsity_section,
    sensitivities_section,
    overlap_section,
    clusters_section,
    scores_section,
    router_section,
    speed_section,
    corpus_section,
    allocation_section,
    curve_section,
    reconstruction_section,
    ood_section,
    routing_section,
    pooling_section,
    synthesis_section,
    paper_section,
)
"""In the order of the page."""


PAGE_FILE = KeyedFile()
"""Format of the page, whose key stands for all that it shows."""
CUT = "cut"
"""Key of the number of texts that are cut, among the reasons of ``corpus.REASONS``."""
SUMMARY_CAPTION = (
    "Value ± standard error, an expert's own task in bold; removed is the share of the decoder layers' weights"
)


def write_report(run: Run) -> StoragePath:
    """Write ``report.html`` and return its path; a page that shows the same already stays.

    Raises:
        ConfigError: Nothing was measured with the run.
    """
    content = PageContent.of(RunData.of(run))
    key = fingerprint(repr(content), _drawn_by())

    def build() -> None:
        # The whole page is made before a file is touched.
        page = render(content)
        with atomic_write(run.report) as temporary:
            temporary.write_text(page, encoding="utf-8")
        PAGE_FILE.save_key(run.report, key)

    return Artifact(run.report, key, PAGE_FILE).get(build)


@cache
def _drawn_by() -> str:
    """Return a hash of what turns content into a page: the files of this folder, and Matplotlib's version."""
    digest = hashlib.sha256(version("matplotlib").encode())
    for file in sorted(Path(__file__).parent.rglob("*.[pj]*")):
        if file.suffix in (".py", ".jinja"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def save_figures(run: Run, folder: StoragePath) -> list[StoragePath]:
    """Write every figure of the report as an SVG file of its own, and return their paths."""
    # It imports Matplotlib, which a page that stays does without.
    from seap_ray.report.svg import figure_svg

    paths = []
    for section in sections(RunData.of(run)):
        if section.figure:
            path = folder / f"{section.key}.svg"
            with atomic_write(path) as temporary:
                temporary.write_text(figure_svg(section.figure), encoding="utf-8")

            paths.append(path)

    return paths


def sections(data: RunData) -> list[Section]:
    """Return the sections that the run has files for."""
    # Each decides itself whether the run has what it shows.
    return [section for make in SECTIONS if (section := make(data))]


# --- tables ----------------------------------------------------------------------------------------------------------


def summary_table(data: RunData) -> Table:
    """Return every model on every task; sizes that nobody knows are blank, and why a cell has failed is a note."""
    results = data.comparison
    notes: list[str] = []
    models = [model for model in results.models if model.kind == "expert" or compared([model])]

    # A task that no model was evaluated on has no column, and a mean over one task neither: it is that task's own.
    judged = {task for model in models for task in model.quality}
    tasks = [task for task in results.tasks if task in judged]
    means = {}
    for perplexity in MEAN_NAMES:
        averaged = [task for task in tasks if is_perplexity(results.tasks[task].metric) == perplexity]
        if len(averaged) > 1 and any(mean_of(model, perplexity=perplexity) for model in models):
            means[perplexity] = averaged

    # Metrics stand below the tasks, so that a table of eight tasks fits a window of 1280 pixels.
    columns = ["model", "removed", "parameters", *(MEAN_NAMES[perplexity].replace(" ", "\n") for perplexity in means)]
    columns += [f"{task}\n{results.tasks[task].short}" for task in tasks]

    # The dense model has no ratio and is first.
    groups = []
    for ratio in sorted({model.ratio for model in models}, key=lambda ratio: -1 if ratio is None else ratio):
        rows = [_summary_row(model, means, tasks, notes) for model in models if model.ratio == ratio]
        groups.append((_heading(ratio), rows))

    return Table(SUMMARY_CAPTION, columns, groups, notes)


def _summary_row(model: ModelRow, means: Mapping[bool, Sequence[str]], tasks: list[str], notes: list[str]) -> list[str]:
    is_planned = model.ratio is not None and model.realised_ratio is not None
    # A dense model has no ratio, and a model that could not be made has no realised one.
    row = [
        model.name,
        f"{model.realised_ratio:.4f}" if is_planned else "",
        "" if model.parameters is None else count(model.parameters),
    ]

    for perplexity, averaged in means.items():
        # A mean over some of the tasks does not compare with one over all.
        is_whole = {*averaged} <= model.quality.keys()
        mean = mean_of(model, perplexity=perplexity) if is_whole else None
        row.append(_with_error(*mean, perplexity=perplexity) if mean else "")

    # Last, for their cells number the notes in the order of the page.
    for task in tasks:
        row.append(_cell(model, task, notes))

    return row


def _heading(ratio: float | None) -> str:
    return "" if ratio is None else f"{percent(ratio)} requested"


def _cell(model: ModelRow, task: str, notes: list[str]) -> str:
    """Return a cell of the summary; why it has failed is added to the notes, each reason once."""
    cell = model.quality.get(task)
    if cell is None:
        return ""
    if isinstance(cell, FailedCell):
        if cell.error not in notes:
            notes.append(cell.error)
        # Markup.format escapes what it is given: errors and names come from files.
        return Markup("failed<sup>{}</sup>").format(notes.index(cell.error) + 1)

    text = _with_error(cell.value, cell.stderr, perplexity=is_perplexity(cell.metric))
    is_own_task = model.kind == "expert" and model.name == task
    return Markup("<strong>{}</strong>").format(text) if is_own_task else text


def _with_error(value: float, stderr: float, *, perplexity: bool) -> str:
    """Return a value with its standard error; that of a perplexity is stored as that of its logarithm, so relative."""
    # Perplexities of models that are lost have no digits worth a column's width.
    digits = 3 if not perplexity else 2 if value < 1000 else 0
    error = value * stderr if perplexity else stderr
    return Markup("{:.{}f} <small>±{:.{}f}</small>").format(value, digits, error, digits)


def tasks_table(data: RunData) -> Table:
    """Return what every task was calibrated and evaluated with."""
    sizes = ["calibration sequences", "calibration tokens", "evaluated on"]
    columns = ["task", "metric", "evaluated by", "texts", *sizes]
    rows = [_task_row(data, name, task) for name, task in data.comparison.tasks.items()]
    return Table("Data of every task", columns, [("", rows)])


def _task_row(data: RunData, name: str, task: TaskRow) -> list[str]:
    # Shards may be gone, or not be made yet where a run holds one study alone.
    manifest = read_json(data.run.shards(name) / "manifest.json") or {"shards": []}
    n_sequences = sum(shard["n_sequences"] for shard in manifest["shards"])
    n_tokens = sum(shard["n_tokens"] for shard in manifest["shards"])

    # All models are evaluated on the same rows; the dense one was on every task.
    cell = data.dense.quality.get(name) if data.dense else None
    n_judged = cell.n if isinstance(cell, QualityCell) else None
    unit = "tokens" if is_perplexity(task.metric) else "items"
    sizes = [f"{n:,}" if n else "" for n in (n_sequences, n_tokens)]
    form = "chat template" if manifest.get("chat") else "plain"
    return [name, task.metric, task.judge, form, *sizes, f"{n_judged:,} {unit}" if n_judged else ""]


def rows_table(data: RunData) -> Table:
    """Return how many rows of every task were left out of calibration and evaluation, or are worth a look, and why."""
    sides: list[tuple[str, str, int, Mapping[str, int]]] = []
    for name, task in data.comparison.tasks.items():
        manifest = read_json(data.run.shards(name) / "manifest.json") or {}
        # A run of an older version counted blank rows alone.
        counts = {"blank": manifest.get("n_blank", 0), **manifest.get("counts", {}), CUT: manifest.get("n_cut", 0)}
        sides.append((name, "calibration", manifest.get("n_rows", 0), counts))
        sides.append((name, "evaluation", task.n_rows, task.counts))

    # Reasons that no row has are left out, and with them the sides of which nothing is to be said.
    total: Counter[str] = Counter()
    for *_, side_counts in sides:
        total.update(side_counts)

    words = {**REASONS, CUT: "cut at the longest sequence"}
    reasons = [reason for reason in words if total[reason]]
    rows = []
    for name, side, n_rows, side_counts in sides:
        if any(side_counts.values()):
            cells = [f"{side_counts[reason]:,}" if side_counts.get(reason) else "" for reason in reasons]
            rows.append([name, side, f"{n_rows:,}", *cells])

    columns = ["task", "drawn for", "rows", *(words[reason] for reason in reasons)]
    return Table("Rows that were left out, or are worth a look", columns, [("", rows)] if rows else [])


# --- facts -----------------------------------------------------------------------------------------------------------


def facts(data: RunData) -> dict[str, str]:
    """Return what the run was made with, as far as it says."""
    # A run that was made by hand may lack any part of the config.
    config = data.config
    model = config.get("model", {})
    versions = data.main.versions
    entries = {
        "Model": " ".join(filter(None, (model.get("source"), model.get("revision")))),
        "Parameters": f"{data.dense.parameters:,}" if data.dense else "",
        "Dtype": _dtype(model.get("dtype", ""), data.main.dtype),
        "Requested ratio": ", ".join(map(percent, data.ratios)),
        "Pruning": _method(data, config["pruning"]) if "pruning" in config else "",
        "Seed": str(config["run"]["seed"]) if "run" in config else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }

    return {name: value for name, value in entries.items() if value}


def _dtype(setting: str, computed_in: str) -> str:
    """Return the type that models computed in; with ``auto`` where the base's weights decided."""
    # A results file of an older version holds the setting alone.
    if setting == "auto" and computed_in:
        return f"{computed_in} (auto)"
    return computed_in or setting


def _method(data: RunData, pruning: Mapping[str, Any]) -> str:
    """Return how models were pruned; what the config leaves open is what the plans have."""
    allocation = pruning["allocation"]
    # Other allocations do not read k and x0.
    curve = f" (k {allocation['k']:g}, x0 {allocation['x0']:g})" if allocation["kind"] == "logistic" else ""
    settings = {
        "score": pruning["score"],
        "allocation": f"{allocation['kind']}{curve}",
        "compensation": pruning["compensation"],
        "attention_unit": pruning.get("attention_unit", "group"),
    }

    parts: list[str] = []
    for name, setting in settings.items():
        value = _chosen(data, name) if setting == "auto" else setting
        parts.append(f"{name.replace('_', ' ')} {value}")
    # Nothing of these where they are off, as by default.
    if pruning.get("mlp_unit") == "expert":
        parts.append("mlp unit expert")
    if share := pruning.get("error_correction"):
        parts.append(f"error correction {share}")
    return ", ".join(parts)


def _chosen(data: RunData, name: str) -> str:
    """Return what a setting that is ``auto`` became, for every ratio where ratios differ; of several, all."""
    values_by_ratio: dict[float, str] = {}
    for ratio, plans in data.plans.items():
        # In the order of the models; most often all have the same.
        values_by_ratio[ratio] = " or ".join(dict.fromkeys(plan.settings[name] for plan in plans))

    # Plans may be gone.
    if not values_by_ratio:
        return "auto"
    if len({*values_by_ratio.values()}) == 1:
        return f"{next(iter(values_by_ratio.values()))} (auto)"
    return " and ".join(f"{value} at {percent(ratio)}" for ratio, value in values_by_ratio.items()) + " (auto)"


def commands(data: RunData) -> list[str]:
    """Return the commands that measured what the page shows, each once."""
    # A dict, since it keeps the order, and a set does not.
    results = (data.main, *data.studies.values())
    return list(dict.fromkeys(each.command for each in results if each.command))


# --- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PageContent:
    """All that a page shows."""

    name: str
    """Name of the run."""
    facts: Mapping[str, str]
    commands: Sequence[str]
    tables: Sequence[Table]
    sections: Sequence[Section]

    @classmethod
    def of(cls, data: RunData) -> "PageContent":
        """Collect what the run has files for."""
        tables = [table for table in (summary_table(data), tasks_table(data), rows_table(data)) if table.groups]
        return cls(data.run.root.name, facts(data), commands(data), tables, sections(data))


def render(content: PageContent) -> str:
    """Return the page as HTML."""
    # It imports Matplotlib, which a page that stays does without.
    from seap_ray.report.svg import legend_key_svg, panel_svg

    # StrictUndefined: a name that the template does not get is an error, not an empty text.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("template.html.jinja").read_text(encoding="utf-8"))
    n_drawn = 0

    def draw(drawable: Panel | SeriesStyle, label: str = "") -> str:
        """Return a panel, or a legend's key, as SVG; every SVG of the page has ids of its own."""
        nonlocal n_drawn
        n_drawn += 1
        svg = legend_key_svg(drawable) if isinstance(drawable, SeriesStyle) else panel_svg(drawable, label)
        return Markup(_with_id_prefix(svg, f"p{n_drawn}-"))

    return template.render(
        name=content.name,
        facts=content.facts,
        commands=content.commands,
        tables=content.tables,
        sections=content.sections,
        draw=draw,
    )


def _with_id_prefix(svg: str, prefix: str) -> str:
    """Return an SVG with a prefix before its ids and what refers to them: two SVGs may have the same marker."""
    # The places where an SVG defines an id or refers to one.
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{prefix}")
    return svg
