"""Report: a run's folder in, one page out, with all it needs inside. What the run has no files for is left out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from seap_ray.progress import count
from seap_ray.report import model_plots, study_plots
from seap_ray.report.artifacts import Evidence, compared, mean_of, percent
from seap_ray.report.charts import Look, Panel, Part, Table, panel_svg, swatch_svg, whole_svg
from seap_ray.report.table import Model
from seap_ray.storage.files import atomic_write, read_json
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run
from seap_ray.tasks import is_perplexity

PARTS = (
    study_plots.quality,
    study_plots.transfer,
    model_plots.sparsity,
    model_plots.overlap,
    model_plots.clusters,
    model_plots.scores,
    study_plots.router,
    study_plots.speed,
    study_plots.corpus,
    study_plots.allocation,
    study_plots.reconstruction,
    study_plots.ood,
    study_plots.routing,
    study_plots.pooling,
    study_plots.paper,
)
"""In the order of the page."""


def write_report(run: Run) -> StoragePath:
    """Write ``report.html``. Raises ConfigError for a run that nothing was measured with."""
    page = render(Evidence.of(run))
    with atomic_write(run.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run.report


def save_pictures(run: Run, folder: StoragePath) -> list[StoragePath]:
    """Write the pictures of the report as SVG files that stand alone."""
    pictures = {part.key: part.picture for part in parts(Evidence.of(run)) if part.picture}
    for key, picture in pictures.items():
        with atomic_write(folder / f"{key}.svg") as temporary:
            temporary.write_text(whole_svg(picture), encoding="utf-8")
    return [folder / f"{key}.svg" for key in pictures]


def parts(evidence: Evidence) -> list[Part]:
    return [part for make in PARTS if (part := make(evidence))]


# --- tables ----------------------------------------------------------------------------------------------------------


def summary_table(evidence: Evidence) -> Table:
    """Every model on every task; sizes that nobody knows are blank, and why a cell has failed is a note below."""
    results, notes = evidence.summary, list[str]()
    models = [model for model in results["models"] if model["kind"] == "expert" or compared([model])]
    means = [perplexity for perplexity in study_plots.KINDS if any(mean_of(m, perplexity=perplexity) for m in models)]
    columns = ["model", "removed", "weights", *(study_plots.KINDS[perplexity] for perplexity in means)]
    tasks = [task for task in results["tasks"] if any(task in model["quality"] for model in models)]
    columns += [f"{task} {results['tasks'][task]['short']}" for task in tasks]

    def row(model: Model) -> list[str]:
        found = [(mean_of(model, perplexity=perplexity), perplexity) for perplexity in means]
        return [
            model["name"],
            "" if model["ratio"] is None or model["realised_ratio"] is None else f"{model['realised_ratio']:.4f}",
            "" if model["parameters"] is None else count(model["parameters"]),
            *(_shown(*mean, perplexity=perplexity) if mean else "" for mean, perplexity in found),
            *(_cell(model, task, notes) for task in tasks),
        ]

    ratios = sorted({m["ratio"] for m in models}, key=lambda ratio: -1 if ratio is None else ratio)
    groups = [(_heading(ratio), [row(m) for m in models if m["ratio"] == ratio]) for ratio in ratios]
    return Table("Value ± standard error; an expert's own task in bold", columns, groups, notes)


def _heading(ratio: float | None) -> str:
    return "" if ratio is None else f"{percent(ratio)} asked for"


def _cell(model: Model, task: str, notes: list[str]) -> str:
    cell = model["quality"].get(task)
    if cell is None:
        return ""
    if "error" in cell:
        if cell["error"] not in notes:
            notes.append(cell["error"])
        return Markup("failed<sup>{}</sup>").format(notes.index(cell["error"]) + 1)
    text = _shown(cell["value"], cell["stderr"], perplexity=is_perplexity(cell["metric"]))
    own = model["kind"] == "expert" and model["name"] == task
    return Markup("<strong>{}</strong>").format(text) if own else text


def _shown(value: float, stderr: float, *, perplexity: bool) -> str:
    """The standard error of a perplexity is that of its logarithm, so relative."""
    return f"{value:.2f} ± {value * stderr:.2f}" if perplexity else f"{value:.3f} ± {stderr:.3f}"


def tasks_table(evidence: Evidence) -> Table:
    """What every task was calibrated and judged with."""
    columns = ["task", "metric", "judge", "calibration sequences", "calibration tokens", "judged on"]
    rows = [_task_row(evidence, task, about) for task, about in evidence.summary["tasks"].items()]
    return Table("What every task was calibrated and judged with", columns, [("", rows)])


def _task_row(evidence: Evidence, task: str, about: Mapping[str, Any]) -> list[str]:
    manifest = read_json(evidence.run.shards(task) / "manifest.json") or {"shards": []}
    sums = [sum(shard[key] for shard in manifest["shards"]) for key in ("n_sequences", "n_tokens")]
    judged = (evidence.dense or {"quality": {}})["quality"].get(task, {}).get("n")
    unit = "tokens" if is_perplexity(about["metric"]) else "items"
    sizes = [f"{n:,}" if n else "" for n in sums]
    return [task, about["metric"], about.get("judge", ""), *sizes, f"{judged:,} {unit}" if judged else ""]


# --- facts -----------------------------------------------------------------------------------------------------------


def facts(evidence: Evidence) -> dict[str, str]:
    """What the run was made with, as far as it says."""
    config, dense = evidence.config, evidence.dense
    model, versions = config.get("model", {}), evidence.main.get("versions", {})
    found = {
        "Model": " ".join(filter(None, (model.get("source"), model.get("revision")))),
        "Weights": f"{dense['parameters']:,}" if dense else "",
        "Computed in": model.get("dtype", ""),
        "Asked to remove": ", ".join(map(percent, evidence.ratios)),
        "Cut by": _method(config["pruning"]) if "pruning" in config else "",
        "Seed": str(config["run"]["seed"]) if "run" in config else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: value for name, value in found.items() if value}


def _method(pruning: Mapping[str, Any]) -> str:
    allocation = pruning["allocation"]
    curve = f" (k {allocation['k']:g}, x0 {allocation['x0']:g})" if allocation["kind"] == "logistic" else ""
    return f"score {pruning['score']}, allocation {allocation['kind']}{curve}, compensation {pruning['compensation']}"


def commands(evidence: Evidence) -> list[str]:
    sources = (evidence.main, *evidence.studies.values())
    return list(dict.fromkeys(source["command"] for source in sources if source.get("command")))


# --- the page --------------------------------------------------------------------------------------------------------


def render(evidence: Evidence) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("template.html.jinja").read_text(encoding="utf-8"))
    drawn: list[str] = []

    def draw(of: Panel | Look, label: str = "") -> str:
        drawn.append(swatch_svg(of) if isinstance(of, Look) else panel_svg(of, label))
        return Markup(_with_own_ids(drawn[-1], f"p{len(drawn)}-"))

    return template.render(
        name=evidence.run.root.name,
        facts=facts(evidence),
        commands=commands(evidence),
        tables=[table for table in (summary_table(evidence), tasks_table(evidence)) if table.groups],
        parts=parts(evidence),
        draw=draw,
    )


def _with_own_ids(svg: str, prefix: str) -> str:
    """What two SVGs of a page have alike, such as a marker, has the same id in both."""
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{prefix}")
    return svg
