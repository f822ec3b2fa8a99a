"""Study ``paper``: can the numbers of arXiv 2503.07605 be reproduced?

Its tables are in ``paper.yaml``; here are the settings behind their rows, and ours beside them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.results import own_task_rows
from seap_ray.report.rows import FailedCell, ModelRow, QualityCell
from seap_ray.report.study_rows import Estimate, PaperRow
from seap_ray.studies.requests import at_every_ratio, method_specs
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import ModelRequest, StudyRunner

CORPUS = "wikitext2"
"""Task that the paper's baselines are calibrated on. Its perplexity the paper has as a picture only."""
BY_NAME: dict[str, dict[str, Any]] = {
    "WandA-sp (s_W)": {"score": "wifn", "allocation": "logistic", "tasks": (CORPUS,)},
    "SEAP (s_W)": {"score": "wifn", "allocation": "logistic", "per_task": True},
    "SEAP-gen (s_W)": {"score": "wifn", "allocation": "logistic", "pooling": "score_average"},
    "FLAP (s_F)": {"score": "wifv", "allocation": "logistic", "tasks": (CORPUS,)},
    "SEAP (s_F)": {"score": "wifv", "allocation": "logistic", "per_task": True},
    "SEAP-gen (s_F)": {"score": "wifv", "allocation": "logistic", "pooling": "score_average"},
    "WandA-sp UL": {"score": "wifn", "allocation": "uniform", "tasks": (CORPUS,)},
    "FLAP AL": {"score": "wifv", "allocation": "standardised", "tasks": (CORPUS,)},
    "SEAP-gen UL": {"score": "wifv", "allocation": "uniform", "pooling": "score_average"},
}
"""Settings of the rows of Tables 1, 3 and 4, by the paper's own names; no bias anywhere, k = 1, x0 = 0.3."""
ALIAS = {
    "WandA-sp LB": "WandA-sp (s_W)",
    "FLAP LB": "FLAP (s_F)",
    "SEAP-gen LB": "SEAP-gen (s_F)",
    "FLAP": "FLAP AL",
    "SEAP-gen": "SEAP-gen (s_F)",
}
"""Rows of Tables 2 and 3 that are rows of Table 1 under another name."""

Figures = Mapping[str, float | None]
"""Values of a row by the fields of ``PaperRow``."""


def run(runner: StudyRunner) -> StudyResult:
    """Make Tables 1 (or 4), 2 and 3, ours beside the paper's, and the perplexity that it has a picture of."""
    config = runner.config
    wanted = []
    for name, settings in methods(config):
        wanted += method_specs(config, name, **settings)

    # Models for one task have that task already; all others are judged on what the paper judges them on.
    tasks = tuple(task for task in (*tables()["tasks"], CORPUS) if task in runner.task_names)
    requests = []
    for request in [ModelRequest(), *at_every_ratio(config, wanted)]:
        requests.append(replace(request, tasks=request.tasks or tasks))

    models = runner.with_speed(runner.evaluate_models(requests))

    # The paper's rows of experts are means too, each expert on its own task.
    rows = [model.row for model in models]
    for_all_tasks = [row for row in rows if not row.task]
    compared = compare(config, [*for_all_tasks, *own_task_rows(rows)])
    return StudyResult(models, PaperRow.columns(), compared)


@cache
def tables() -> dict[str, Any]:
    """Read the paper's tables."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def methods(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name, fit for a file, and the baseline settings of every method.

    Raises ConfigError without the corpus that the baselines are calibrated on.
    """
    names = {task.name for task in config.tasks}
    if CORPUS not in names:
        raise ConfigError(f"tasks: study=paper calibrates WandA-sp and FLAP on {CORPUS}, which is not among them")

    # A run may have some of the paper's tasks only.
    judged = tuple(task for task in tables()["tasks"] if task in names)
    for name, settings in BY_NAME.items():
        common: dict[str, Any] = {"compensation": "none", "k": 1.0, "x0": 0.3}
        if settings.get("per_task"):
            common["tasks"] = judged
        yield slug(name), {**common, **settings}


def slug(name: str) -> str:
    """Return a name that is fit for a file: ``SEAP-gen (s_F)`` -> ``SEAP-gen_s_F``."""
    return name.replace(" ", "_").replace("(", "").replace(")", "")


# --- ours beside the paper's -----------------------------------------------------------------------------------------


def compare(config: Config, models: Sequence[ModelRow]) -> list[PaperRow]:
    """Return three rows for every row of the paper that has one of ours: ours, the paper's, and the difference."""
    size = "Llama-2-13B" if "13b" in config.model.source.lower() else "Llama-2-7B"
    by_method = {(model.method, model.ratio or 0.0): model for model in models}

    return [*_accuracy(size, by_method), *_allocation(size, by_method), *_speed(size, by_method)]


Ours = Mapping[tuple[str, float], ModelRow]
"""Our models by method and ratio; the dense one has ratio 0."""


def _find(ours: Ours, name: str, ratio: float) -> ModelRow | None:
    """Return our model for a row of the paper, or None."""
    method = "dense" if name == "Dense" else slug(ALIAS.get(name, name))
    return ours.get((method, ratio))


def _accuracy(size: str, ours: Ours) -> Iterator[PaperRow]:
    """Yield the rows of Table 1, or for a 13B of Table 4."""
    for name, ratio, *numbers in tables()["accuracy"][size]:
        if model := _find(ours, name, ratio):
            theirs = dict(zip(tables()["tasks"], numbers, strict=True))
            # Not the printed average, which is rounded.
            theirs["average"] = sum(numbers) / len(numbers)
            yield from _three_rows(f"accuracy, {size}", name, ratio, _accuracies(model), theirs)


def _allocation(size: str, ours: Ours) -> Iterator[PaperRow]:
    """Yield the rows of Table 3, which is of a 13B, so that beside a 7B it has no difference."""
    for name, ratio, average in tables()["allocation"]:
        if model := _find(ours, name, ratio):
            accuracies = _accuracies(model)
            yield from _three_rows(
                "allocation, Llama-2-13B",
                name,
                ratio,
                {key: accuracies[key] for key in ("average", "stderr")},
                {"average": average},
                is_same_size=size == "Llama-2-13B",
            )


def _speed(size: str, ours: Ours) -> Iterator[PaperRow]:
    """Yield the rows of Table 2."""
    rows = tables()["speed"][size]
    # The dense model is the first row; the paper's speed-ups are computed anew, since it prints rounded ones.
    _, _, dense = rows[0]

    for name, ratio, tokens in rows:
        model = _find(ours, name, ratio)
        if model and model.speed:
            yield from _three_rows(
                f"speed, {size}",
                name,
                ratio,
                {"tokens_per_s": model.speed.decode_tokens_per_s, "speedup": model.speed.decode_speedup},
                {"tokens_per_s": tokens, "speedup": tokens / dense},
            )


def _accuracies(model: ModelRow) -> dict[str, float | None]:
    """Return percent by task, their average where all are there, and its standard error; and the perplexity."""
    # There is an average only where there are all tasks: other averages do not compare with the paper's.
    cells = {task: model.quality.get(task, FailedCell("not judged")) for task in tables()["tasks"]}
    average = Estimate.mean(cells.values())

    figures: dict[str, float | None] = {}
    for task, cell in cells.items():
        if isinstance(cell, QualityCell):
            figures[task] = 100 * cell.value
    figures["average"] = _percent(average.value)
    figures["stderr"] = _percent(average.stderr)

    on_corpus = model.quality.get(CORPUS)
    figures["perplexity"] = on_corpus.value if isinstance(on_corpus, QualityCell) else None
    return figures


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _three_rows(
    table: str, name: str, ratio: float, ours: Figures, theirs: Mapping[str, float], *, is_same_size: bool = True
) -> list[PaperRow]:
    differences = {}
    for key, their_value in theirs.items():
        our_value = ours.get(key)
        # Figures of a model of another size do not compare.
        if is_same_size and our_value is not None:
            differences[key] = our_value - their_value

    figures: dict[str, Figures] = {"ours": ours, "paper": theirs, "difference": differences}
    return [PaperRow(table, name, ratio, whose, **values) for whose, values in figures.items()]
