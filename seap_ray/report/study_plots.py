"""Findings: results files in, pictures and tables out: what was lost, what was won, and what the studies found."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seap_ray.report.artifacts import Evidence, Results, compared, dense_of, mean_of, method_of, named, percent
from seap_ray.report.charts import REFERENCE, Chart, HeatMap, Part, Picture, Series, Table, look
from seap_ray.report.table import Model, show
from seap_ray.tasks import is_perplexity

REMOVED = "removed from the decoder layers, %"
MOST_METHODS = 9
"""Lines that one chart can hold."""
MEANS = ("mean acc", "mean ppl")
"""How the heads of those columns end that a study is judged by."""
SETTINGS = ("ratio", "samples", "k", "x0")
"""Columns of what a study has set."""
RECONSTRUCTIONS = (
    ("none", "wifv"),
    ("none", "energy"),
    ("mean", "wifv"),
    ("least_squares", "wifv"),
    ("least_squares", "obs"),
)
"""Compensations, and the scores that they are shown with."""
KINDS = {False: "mean accuracy", True: "mean perplexity"}


def _experts_first(methods: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(methods), key=lambda name: {"experts": 0, "general": 1}.get(name, 2))


def _widest(evidence: Evidence) -> list[Results]:
    """Results of many methods, those with most ratios first."""
    return [*(evidence.studies[name] for name in ("ratio", "table") if name in evidence.studies), evidence.main]


# --- quality against size --------------------------------------------------------------------------------------------


def quality(evidence: Evidence) -> Part | None:
    """Quality of every method against what it removed."""
    models = [model for model in compared(_widest(evidence)[0]["models"]) if model["realised_ratio"] is not None]
    charts = [chart for perplexity in KINDS if (chart := _quality_chart(models, perplexity=perplexity))]
    if not charts:
        return None
    return Part(
        "quality",
        "How does quality fall with size?",
        "Bars are one standard error; an accuracy is better the higher, a perplexity the lower. Where a method has a "
        "model for each task, as the experts are, each is judged on its own task, all others on all tasks.",
        _ranking(models),
        Picture("Quality against the share of the weights that is removed, by method.", tuple(charts)),
        study_tables(evidence, "ratio"),
    )


def _quality_chart(models: Sequence[Model], *, perplexity: bool) -> Chart | None:
    found = [(model, *mean) for model in models if (mean := mean_of(model, perplexity=perplexity))]
    dense = [point for point in found if point[0]["kind"] == "dense"]
    series = []
    for i, method in enumerate(_shown_methods(found, perplexity=perplexity)):
        own = sorted((p for p in found if method_of(p[0]) == method), key=lambda point: point[0]["realised_ratio"])
        _, y, errors = zip(*dense, *own, strict=True)
        x = [100 * model["realised_ratio"] for model, _, _ in (*dense, *own)]
        ends = [_ends(value, error, perplexity=perplexity) for value, error in zip(y, errors, strict=True)]
        low, high = zip(*ends, strict=True)
        series.append(Series(method, x, y, look(i), errors=(low, high)))
    return Chart(KINDS[perplexity], REMOVED, "", tuple(series), y_log=perplexity, wide=True) if series else None


def _shown_methods(found: Sequence[tuple[Model, float, float]], *, perplexity: bool) -> list[str]:
    """Experts, the general model, then those that keep most at the largest ratio, as many as can be told apart."""
    largest = max((model["ratio"] for model, _, _ in found if model["ratio"] is not None), default=None)
    at = {method_of(model): -value if perplexity else value for model, value, _ in found if model["ratio"] == largest}
    ranked = sorted((method_of(m) for m, _, _ in found if m["kind"] != "dense"), key=lambda m: -at.get(m, -math.inf))
    return _experts_first(ranked)[:MOST_METHODS]


def _ends(value: float, stderr: float, *, perplexity: bool) -> tuple[float, float]:
    """The standard error of a perplexity is that of its logarithm."""
    if perplexity:
        return value * math.exp(-stderr), value * math.exp(stderr)
    return value - stderr, value + stderr


def _ranking(models: Sequence[Model]) -> str:
    """What the methods keep at the largest ratio, in words."""
    largest = max((model["ratio"] for model in models if model["ratio"] is not None), default=None)
    at = [model for model in models if model["kind"] == "dense" or model["ratio"] == largest]
    perplexity = not any(mean_of(model, perplexity=False) for model in at)
    values = {method_of(model): mean[0] for model in at if (mean := mean_of(model, perplexity=perplexity))}
    dense = values.pop("dense", None)
    if largest is None or not values:
        return ""
    ranked = sorted(values, key=lambda method: values[method], reverse=not perplexity)[:MOST_METHODS]
    texts = [f"{method} {values[method]:.3f}" for method in ranked]
    above = f", dense {dense:.3f}" if dense else ""
    return f"The {KINDS[perplexity]} with {percent(largest)} removed: {', '.join(texts)}{above}."


# --- cross-task transfer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """Quality of the experts and the general model of one ratio on every task, relative to dense."""

    rows: list[Model]
    tasks: list[str]
    values: list[list[float | None]]

    @classmethod
    def of(cls, results: Results, ratio: float) -> "Transfer":
        dense, tasks = dense_of(results) or {"quality": {}}, list(results["tasks"])
        at = [model for model in results["models"] if model["ratio"] == ratio]
        rows = [model for kind in ("expert", "general") for model in at if model["kind"] == kind]
        cells = [[_relative(m["quality"].get(task), dense["quality"].get(task)) for task in tasks] for m in rows]
        return cls(rows, tasks, cells)

    @property
    def names(self) -> list[str]:
        return [model["name"] for model in self.rows]

    @property
    def own(self) -> frozenset[tuple[int, int]]:
        """Cells of the experts on their own tasks."""
        return frozenset((i, self.tasks.index(name)) for i, name in enumerate(self.names) if name in self.tasks)

    def mean(self, *, own: bool) -> float | None:
        """Over the experts on their own tasks, or on the others."""
        found = [
            value
            for i, row in enumerate(self.values)
            for j, value in enumerate(row)
            if value is not None and self.rows[i]["kind"] == "expert" and ((i, j) in self.own) == own
        ]
        return sum(found) / len(found) if found else None


def _relative(cell: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> float | None:
    if not cell or not dense or "error" in cell or "error" in dense or not dense["value"]:
        return None
    return dense["value"] / cell["value"] if is_perplexity(cell["metric"]) else cell["value"] / dense["value"]


def transfer(evidence: Evidence) -> Part | None:
    """Every expert on every task."""
    results = evidence.studies.get("transfer", evidence.main)
    ratios = sorted({model["ratio"] for model in results["models"] if model["kind"] == "expert"})
    found = {ratio: Transfer.of(results, ratio) for ratio in ratios}
    found = {ratio: of for ratio, of in found.items() if any(value is not None for row in of.values for value in row)}
    if not found:
        return None
    maps = [
        HeatMap(f"{percent(ratio)} removed", "task", "model", of.tasks, of.names, of.values, framed=of.own)
        for ratio, of in found.items()
    ]
    return Part(
        "transfer",
        "What does an expert still do on the other tasks?",
        "Each row is a model and each column a task, relative to the dense model: 1 is as good (a perplexity is dense "
        "over the model's). A frame marks an expert's own task.",
        " ".join(_kept(of, ratio) for ratio, of in found.items()),
        Picture("Quality of every expert on every task, relative to the dense model.", tuple(maps)),
        study_tables(evidence, "transfer"),
    )


def _kept(of: Transfer, ratio: float) -> str:
    own, others = of.mean(own=True), of.mean(own=False)
    if own is None:
        return ""
    rest = f", and {percent(others)} on the others" if others is not None else ""
    return f"With {percent(ratio)} removed an expert keeps {percent(own)} of dense on its own task{rest}."


# --- the router ------------------------------------------------------------------------------------------------------


def router(evidence: Evidence) -> Part | None:
    """Where held-out prompts go, and what a stricter threshold would change."""
    about = evidence.main.get("router")
    if not about or not about["n"]:
        return None
    return Part(
        "router",
        "Does a prompt find its expert?",
        "Rows are the tasks of held-out prompts, columns where the router sends them; a frame marks the right place. "
        "What is sent to no expert, general answers. A higher threshold sends fewer prompts to experts.",
        f"Of {about['n']:,} held-out prompts {percent(about['accuracy'])} are likeliest of their own task; the "
        f"threshold in use, {about['threshold']:.2f}, leaves {percent(1 - about['routed'])} to the general model.",
        Picture("Where the router sends prompts.", (_confusion(about["confusion"]), _coverage(about))),
    )


def _confusion(counts: Mapping[str, Mapping[str, int]]) -> HeatMap:
    others = sorted({to for row in counts.values() for to in row} - counts.keys())
    columns, rows = [*counts, *others], [task for task, row in counts.items() if row]
    values = [[counts[t][to] / sum(counts[t].values()) if to in counts[t] else None for to in columns] for t in rows]
    own = frozenset((i, columns.index(task)) for i, task in enumerate(rows))
    return HeatMap("share of a task's prompts", "sent to", "task", columns, rows, values, framed=own)


def _coverage(about: Mapping[str, Any]) -> Chart:
    curve = [point for point in about["coverage"] if point["accuracy"] is not None]
    x = [point["threshold"] for point in curve]
    series = (
        Series("right, of those sent", x, [point["accuracy"] for point in curve], look(0)),
        Series("sent to an expert", x, [point["coverage"] for point in curve], look(1)),
        Series("threshold in use", [about["threshold"]] * 2, [0, 1], REFERENCE),
    )
    return Chart("by threshold", "threshold", "share of prompts", series, y_range=(-0.04, 1.04))


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(evidence: Evidence) -> Part | None:
    """Speed-up over dense against what was removed."""
    for results in _widest(evidence):
        models = [m for m in results["models"] if m.get("speed") and m["kind"] != "summary"]
        cut = [m for m in models if m["ratio"] is not None and m["realised_ratio"] is not None]
        if cut:
            return _speed(models, sorted(cut, key=lambda m: (m["realised_ratio"], m["name"])))
    return None


def _speed(models: Sequence[Model], cut: Sequence[Model]) -> Part:
    smallest = cut[-1]
    times, ideal = smallest["speed"], 1 / (1 - smallest["realised_ratio"])
    columns = ["model", "prefill, tokens/s", "decode, tokens/s", "prefill, × dense", "decode, × dense"]
    return Part(
        "speed",
        "How much faster is it?",
        "Times the dense model's tokens per second; 1 is as fast. The dashed line is a model whose time falls as the "
        "weights of its decoder layers do.",
        f"With {percent(smallest['realised_ratio'])} removed {smallest['name']} prefills "
        f"{times['prefill_speedup']:.2f} and decodes {times['decode_speedup']:.2f} times as fast as dense; "
        f"{ideal:.2f} would be ideal.",
        Picture(
            "Speed-up over the dense model against the share of the weights that is removed.",
            tuple(_speed_chart(cut, stage) for stage in ("prefill", "decode")),
        ),
        (Table("Speed of every model", columns, [("", [_speed_row(model) for model in models])]),),
    )


def _speed_chart(cut: Sequence[Model], stage: str) -> Chart:
    x = np.linspace(0, cut[-1]["realised_ratio"], 40)
    series = [Series("ideal", (100 * x).tolist(), (1 / (1 - x)).tolist(), REFERENCE)]
    for i, method in enumerate(_experts_first(map(method_of, cut))[:MOST_METHODS]):
        own = [model for model in cut if method_of(model) == method]
        removed = [100 * model["realised_ratio"] for model in own]
        series.append(Series(method, removed, [model["speed"][f"{stage}_speedup"] for model in own], look(i)))
    return Chart(stage, REMOVED, "times dense", tuple(series), y_range=(0, None), wide=True)


def _speed_row(model: Model) -> list[str]:
    times = model["speed"]
    rates = [f"{times[f'{stage}_tokens_per_s']:,.0f}" for stage in ("prefill", "decode")]
    return [named(model), *rates, *(f"{times[f'{stage}_speedup']:.2f}" for stage in ("prefill", "decode"))]


# --- studies ---------------------------------------------------------------------------------------------------------


def corpus(evidence: Evidence) -> Part | None:
    """Quality against the number of samples, with its spread over seeds."""
    part, rows = _study(evidence, "corpus")
    mean = _mean_column(evidence, "corpus")
    if part is None or mean is None:
        return part
    series = []
    for i, ratio in enumerate(dict.fromkeys(row["ratio"] for row in rows)):
        own = [row for row in rows if row["ratio"] == ratio and row[mean] is not None]
        x, y = [row["samples"] for row in own], [row[mean] for row in own]
        spread = [row["sd over seeds"] or 0 for row in own]
        ends = [v - s for v, s in zip(y, spread, strict=True)], [v + s for v, s in zip(y, spread, strict=True)]
        series.append(Series(f"{percent(ratio)} removed", x, y, look(i), bands=(ends,)))
    chart = Chart(mean, "samples per task", "", tuple(series), x_log=True, wide=True)
    how = (
        "Points are means over seeds, bands one standard deviation between them. Where a line is flat, more samples "
        "do not help."
    )
    picture = Picture(f"{mean} against the number of samples.", (chart,))
    return replace(part, shows=_stable(rows, mean), how=how, picture=picture)


def _stable(rows: Sequence[Mapping[str, Any]], mean: str) -> str:
    """For every ratio the least samples from which on no mean is further from the last than one standard error."""
    found = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        own = [row for row in rows if row["ratio"] == ratio and row[mean] is not None]
        stable = own[-1:]
        for row in reversed(own):
            if abs(row[mean] - own[-1][mean]) > row["stderr"] * (row[mean] if mean.endswith("ppl") else 1):
                break
            stable = [row]
        found += [f"{row['samples']} with {percent(ratio)} removed" for row in stable]
    return f"Within one standard error of the largest from so many samples on: {', '.join(found)}." if found else ""


def allocation(evidence: Evidence) -> Part | None:
    """Quality over the logistic curve's steepness and midpoint, below that of the allocations without them."""
    part, rows = _study(evidence, "allocation")
    if part is None:
        return None
    maps = [
        _allocation_map([row for row in rows if row["ratio"] == ratio and row[column] is not None], column, ratio)
        for ratio in dict.fromkeys(row["ratio"] for row in rows)
        for column in evidence.studies["allocation"]["columns"]
        if column.endswith(MEANS)
    ]
    how = (
        "The upper rows are allocations of one kind, the others the logistic curve by its steepness k and midpoint x0."
    )
    return replace(part, how=how, picture=Picture("Quality by allocation.", tuple(filter(None, maps))))


def _allocation_map(rows: Sequence[Mapping[str, Any]], column: str, ratio: float) -> HeatMap | None:
    if not rows:
        return None
    x0s = sorted({row["x0"] for row in rows if row["x0"] is not None}) or [None]
    lines: dict[str, list[float | None]] = {}
    for row in rows:
        name, place = (row["allocation"], 0) if row["k"] is None else (f"k {row['k']:g}", x0s.index(row["x0"]))
        lines.setdefault(name, [None] * len(x0s))[place] = row[column]
    values = [row[column] for row in rows]
    scale = (max(values), min(values)) if column.endswith("ppl") else (min(values), max(values))
    heads = ["" if x0 is None else f"x0 {x0:g}" for x0 in x0s]
    title = f"{column}, {percent(ratio)} removed"
    return HeatMap(title, "", "", heads, list(lines), list(lines.values()), scale, digits=3)


def reconstruction(evidence: Evidence) -> Part | None:
    """Quality against size by what stands for the columns that are cut: experts, and the general model."""
    part, rows = _study(evidence, "reconstruction")
    mean = _mean_column(evidence, "reconstruction")
    if part is None or mean is None:
        return part
    charts = [
        _reconstruction_chart([row for row in rows if row["models"] == models], mean, models)
        for models in dict.fromkeys(row["models"] for row in rows)
    ]
    how = "Each line is a compensation and the score by which what is cut was chosen; bars are one standard deviation "
    how += "over draws of all data, the calibration's and the evaluation's."
    picture = Picture(f"{mean} against the share of the weights that is removed, by what stands for it.", tuple(charts))
    return replace(part, shows=_reconstructed(rows, mean), how=how, picture=picture)


def _reconstruction_chart(rows: Sequence[Mapping[str, Any]], mean: str, models: str) -> Chart:
    perplexity = mean.endswith("ppl")
    dense = [row for row in rows if row["ratio"] == 0]
    series = []
    for i, (compensation, score) in enumerate(RECONSTRUCTIONS):
        own = [row for row in rows if (row["compensation"], row["score"]) == (compensation, score)]
        points = sorted(dense + own, key=lambda row: row["realised"])
        spread = [row["sd over seeds"] or 0.0 for row in points]
        ends = [(row[mean] - s, row[mean] + s) for row, s in zip(points, spread, strict=True)]
        low, high = zip(*ends, strict=True)
        x, y = [100 * row["realised"] for row in points], [row[mean] for row in points]
        name = f"{compensation.replace('_', ' ')}, {score}"
        series.append(Series(name, x, y, look(i), errors=(low, high)))
    return Chart(models, REMOVED, mean, tuple(series), y_log=perplexity)


def _reconstructed(rows: Sequence[Mapping[str, Any]], mean: str) -> str:
    """Each compensation's best in words, where half is removed or as near as was measured."""
    ratio = min({row["ratio"] for row in rows if row["ratio"]}, key=lambda ratio: abs(ratio - 0.5))
    pick = min if mean.endswith("ppl") else max
    found = []
    for models, compensation in dict.fromkeys((row["models"], row["compensation"]) for row in rows if row["ratio"]):
        own = [r for r in rows if (r["ratio"], r["models"], r["compensation"]) == (ratio, models, compensation)]
        best = pick(own, key=lambda row: row[mean])
        found.append(f"{models} with {compensation.replace('_', ' ')} {best[mean]:.3f} ({best['score']})")
    return f"The best {mean} with {percent(ratio)} removed: {', '.join(found)}."


def ood(evidence: Evidence) -> Part | None:
    """What a task loses when the calibration has not seen it."""
    part, rows = _study(evidence, "ood")
    if part is None:
        return None
    study = evidence.studies["ood"]
    largest = max(row["ratio"] for row in rows)
    accuracies = [task for task, about in study["tasks"].items() if not is_perplexity(about["metric"])]
    rows = [row for row in rows if row["ratio"] == largest and row["task"] in accuracies]
    names = [column for column in study["columns"][2:] if not column.endswith("stderr")]
    means = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    told = [f"{name} {sum(values) / len(values):.3f}" for name, values in means.items() if len(values) == len(rows) > 0]
    if not told:
        return part
    return replace(part, shows=f"The mean accuracy with {percent(largest)} removed: {', '.join(told)}.")


def paper(evidence: Evidence) -> Part | None:
    """How far ours are from the paper's numbers."""
    part, rows = _study(evidence, "paper")
    if part is None:
        return None
    differences = [row for row in rows if row["whose"] == "difference" and row["table"].startswith("accuracy")]
    gaps = [row["average"] for row in differences if row["average"] is not None]
    if not gaps:
        return part
    told = f"Ours less the paper's average: {min(gaps):+.1f} to {max(gaps):+.1f} points over {len(gaps)} rows."
    return replace(part, shows=told)


def routing(evidence: Evidence) -> Part | None:
    return _study(evidence, "routing")[0]


def pooling(evidence: Evidence) -> Part | None:
    return _study(evidence, "pooling")[0]


def _mean_column(evidence: Evidence, name: str) -> str | None:
    columns = evidence.studies[name]["columns"] if name in evidence.studies else []
    return next((column for column in columns if column.endswith(MEANS)), None)


def _study(evidence: Evidence, name: str) -> tuple[Part | None, list[dict[str, Any]]]:
    """A study as its table, and its rows by column (the first, where columns are named alike)."""
    study = evidence.studies.get(name)
    if not study or not study["rows"]:
        return None, []
    place = {column: study["columns"].index(column) for column in study["columns"]}
    rows = [{column: row[i] for column, i in place.items()} for row in study["rows"]]
    best = _best(rows, _mean_column(evidence, name))
    return Part(name, study["question"], "", best, tables=study_tables(evidence, name)), rows


def _best(rows: Sequence[Mapping[str, Any]], mean: str | None) -> str:
    """The best and the worst row at the largest ratio, in words."""
    if mean is None:
        return ""
    found = [row for row in rows if row[mean] is not None]
    largest = max((row["ratio"] for row in found if row.get("ratio") is not None), default=None)
    found = sorted((row for row in found if row.get("ratio") == largest), key=lambda row: row[mean])
    if largest is None or len(found) < 2:
        return ""
    worst, best = found[::-1][:: len(found) - 1] if mean.endswith("ppl") else found[:: len(found) - 1]
    told = f"{_told(best, mean)} at best and {_told(worst, mean)} at worst"
    return f"With {percent(largest)} removed the {mean} is {told}."


def _told(row: Mapping[str, Any], mean: str) -> str:
    """A row's mean, and what the row is of: its words, and the numbers that were chosen."""
    words = [value for value in row.values() if isinstance(value, str)]
    chosen = [f"{key} {row[key]:g}" for key in SETTINGS[1:] if row.get(key) is not None]
    return f"{row[mean]:.3f} ({', '.join([*words, *chosen])})"


def study_tables(evidence: Evidence, name: str) -> tuple[Table, ...]:
    study = evidence.studies.get(name)
    if not study or not study["rows"]:
        return ()
    columns = study["columns"]
    rows = [[_text(column, value) for column, value in zip(columns, row, strict=True)] for row in study["rows"]]
    return (Table(study["title"], columns, [("", rows)]),)


def _text(column: str, value: Any) -> str:
    """A setting as it was set, a realised ratio in four decimals, what was measured in three or fewer."""
    if column in SETTINGS and isinstance(value, float):
        return f"{value:g}"
    return f"{value:.4f}" if column == "realised" and value is not None else show(value)
