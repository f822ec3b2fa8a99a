"""Paper: the tables of arXiv 2503.07605 as data, the settings behind their rows, and ours beside them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.report.table import mean_quality

CORPUS = "wikitext2"
"""Task that the paper's baselines are calibrated on."""
PERPLEXITY = f"{CORPUS} perplexity"
"""Column of what the paper has as a picture only, without numbers."""
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
    accuracies = [*tables()["tasks"], "average", "stderr"]
    return ["table", "method", "ratio", "whose", *accuracies, PERPLEXITY, "tokens/s", "speed-up"]


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
    """Rows ``ours``, ``paper`` and ``difference`` of every row of the paper that has one of ours at its ratio.

    Table 3 is of a 13B, so beside a 7B it has no difference.
    """
    size = "Llama-2-13B" if "13b" in config.model.source.lower() else "Llama-2-7B"
    by_method = {(model["method"], model["ratio"] or 0.0): model for model in models}

    def ours(name: str, ratio: float) -> Mapping[str, Any] | None:
        return by_method.get(("dense" if name == "Dense" else slug(ALIAS.get(name, name)), ratio))

    rows: list[list[Any]] = []
    for name, ratio, *numbers in tables()["accuracy"][size]:
        if model := ours(name, ratio):
            theirs = {**dict(zip(tables()["tasks"], numbers, strict=True)), "average": sum(numbers) / len(numbers)}
            rows += _three(f"accuracy, {size}", name, ratio, _accuracies(model), theirs)
    for name, ratio, average in tables()["allocation"]:
        if model := ours(name, ratio):
            own = {key: _accuracies(model)[key] for key in ("average", "stderr")}
            is_same = size == "Llama-2-13B"
            rows += _three("allocation, Llama-2-13B", name, ratio, own, {"average": average}, is_same=is_same)
    dense = tables()["speed"][size][0][2]
    for name, ratio, tokens in tables()["speed"][size]:
        if (model := ours(name, ratio)) and (speed := model.get("speed")):
            own = {"tokens/s": speed["decode_tokens_per_s"], "speed-up": speed["decode_speedup"]}
            rows += _three(f"speed, {size}", name, ratio, own, {"tokens/s": tokens, "speed-up": tokens / dense})
    return rows


def _accuracies(model: Mapping[str, Any]) -> dict[str, float | None]:
    """Percent by task, their average where all are there, and its standard error; and the perplexity."""
    quality = model["quality"]
    cells = {task: quality.get(task, {"error": "not judged"}) for task in tables()["tasks"]}
    average = mean_quality(cells.values())
    return {
        **{task: 100 * cell["value"] for task, cell in cells.items() if "value" in cell},
        "average": 100 * average[0] if average else None,
        "stderr": 100 * average[1] if average else None,
        PERPLEXITY: quality.get(CORPUS, {}).get("value"),
    }


def _three(
    table: str,
    name: str,
    ratio: float,
    ours: Mapping[str, float | None],
    theirs: Mapping[str, float],
    *,
    is_same: bool = True,
) -> list[list[Any]]:
    gap = {key: own - theirs[key] for key in theirs if is_same and (own := ours.get(key)) is not None}
    three: tuple[tuple[str, Mapping[str, Any]], ...] = (("ours", ours), ("paper", theirs), ("difference", gap))
    return [[table, name, ratio, whose, *(values.get(key) for key in columns()[4:])] for whose, values in three]
