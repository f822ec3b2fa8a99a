"""Paper: the tables of arXiv 2503.07605 as data, the settings behind their rows, and ours beside them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.table import mean_quality

CORPUS = "wikitext2"
"""Task that the paper's baselines are calibrated on."""
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
"""Settings of the rows of Tables 1, 3 and 4; no bias anywhere, k = 1, x0 = 0.3."""
ALIAS = {
    "WandA-sp LB": "WandA-sp (s_W)",
    "FLAP LB": "FLAP (s_F)",
    "SEAP-gen LB": "SEAP-gen (s_F)",
    "FLAP": "FLAP AL",
    "SEAP-gen": "SEAP-gen (s_F)",
}
"""Rows of Tables 2 and 3 that are rows of Table 1 under another name."""


@cache
def tables() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def columns() -> list[str]:
    return ["table", "method", "ratio", "whose", *tables()["tasks"], "average", "stderr", "tokens/s", "speed-up"]


def methods(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, fit for a file, and baseline settings of every method. Raises ConfigError without the corpus."""
    names = {task.name for task in config.tasks}
    if CORPUS not in names:
        raise ConfigError(f"tasks: study=paper calibrates WandA-sp and FLAP on {CORPUS}, which is not among them")
    judged = tuple(task for task in tables()["tasks"] if task in names)
    common = {"compensation": "none", "k": 1.0, "x0": 0.3}
    for name, own in BY_NAME.items():
        yield slug(name), {**common, **({"tasks": judged} if own.get("per_task") else {}), **own}


def slug(name: str) -> str:
    """``SEAP-gen (s_F)`` -> ``SEAP-gen_s_F``."""
    return name.replace(" ", "_").replace("(", "").replace(")", "")


def compare(config: Config, models: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows ``ours``, ``paper`` and ``difference`` of every row of the paper that has one of ours at its ratio."""
    size = "Llama-2-13B" if "13b" in config.model.source.lower() else "Llama-2-7B"
    by_method = {(model["method"], model["ratio"] or 0.0): model for model in models}
    rows: list[list[Any]] = []
    for name, ratio, *numbers in tables()["accuracy"][size]:
        if model := by_method.get(("dense" if name == "Dense" else slug(name), ratio)):
            average = sum(numbers) / len(numbers)
            rows += _three(f"accuracy, {size}", name, ratio, _accuracies(model), [*numbers, average], speed=False)
    for name, ratio, average in tables()["allocation"]:
        if model := by_method.get((slug(ALIAS.get(name, name)), ratio)):
            blank = [None] * len(tables()["tasks"])
            rows += _three("allocation, Llama-2-13B", name, ratio, _accuracies(model), [*blank, average], speed=False)
    dense = tables()["speed"][size][0][2]
    for name, ratio, tokens in tables()["speed"][size]:
        model = by_method.get(("dense" if name == "Dense" else slug(ALIAS[name]), ratio))
        if model and (speed := model.get("speed")):
            ours = [speed["decode_tokens_per_s"], speed["decode_speedup"]]
            rows += _three(f"speed, {size}", name, ratio, ours, [tokens, tokens / dense], speed=True)
    return rows


def _accuracies(model: Mapping[str, Any]) -> list[float | None]:
    """Percent by task, their average where all are there, and its standard error."""
    cells = [model["quality"].get(task, {}) for task in tables()["tasks"]]
    found = [100 * cell["value"] if "value" in cell else None for cell in cells]
    whole = mean_quality(cells) if None not in found else None
    return [*found, *((100 * whole[0], 100 * whole[1]) if whole else (None, None))]


def _three(
    table: str, name: str, ratio: float, ours: Sequence[Any], theirs: Sequence[Any], *, speed: bool
) -> list[list[Any]]:
    n_accuracy = len(tables()["tasks"]) + 2
    width = 2 if speed else n_accuracy
    theirs = [*theirs, *[None] * (width - len(theirs))]
    own = [None if theirs[i] is None and i < n_accuracy - 1 and not speed else value for i, value in enumerate(ours)]
    difference = [None if a is None or b is None else a - b for a, b in zip(own, theirs, strict=True)]

    def row(whose: str, values: Sequence[Any]) -> list[Any]:
        blank = [None] * (n_accuracy if speed else 2)
        return [table, name, ratio, whose, *([*blank, *values] if speed else [*values, *blank])]

    return [row("ours", own), row("paper", theirs), row("difference", difference)]
