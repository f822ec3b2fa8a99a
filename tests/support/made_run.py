"""A run's folder as the jobs leave it, made in a moment: real plans of random statistics, results out of the air."""

import json
import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch

from seap_ray.config import AttentionUnit, Compensation, Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import Moments, Statistics
from seap_ray.core.scores import Norms
from seap_ray.methods import STUDIES, StudyName
from seap_ray.models.records import save_moments, save_norms
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.plan_files import save_plan
from seap_ray.pipeline.planner import Planner
from seap_ray.pipeline.results import own_task_rows
from seap_ray.report.rows import ModelRow, QualityCell, Results
from seap_ray.report.study_rows import (
    AllocationRow,
    CorpusRow,
    Estimate,
    OutOfDistributionRow,
    ReconstructionRow,
    RoutingRow,
    SynthesisRow,
    TransferRow,
)
from seap_ray.report.table import mean_quality
from seap_ray.storage.files import write_json
from seap_ray.storage.run import Run
from seap_ray.studies.reconstruction import MODEL_GROUPS, SCORES, WAYS
from seap_ray.studies.synthesis import CORPORA
from tests.support.builders import CONFIGS, MORE_CONFIGS, random_statistics

TASKS = ("arithmetic", "sort", "prose")
RATIOS = (0.2, 0.4)
N_SHARDS = 3
REPORT_STUDIES = (
    *("table", "ratio", "corpus", "allocation", "curve", "reconstruction"),
    *("ood", "transfer", "routing", "pooling", "synthesis", "paper"),
)
"""Studies that the report shows."""
ARCHITECTURE = Architecture.of(CONFIGS["llama_gqa"]().to_dict())


def make_run(
    root: Path,
    *,
    model: str = "llama_gqa",
    studies: tuple[str, ...] = (),
    ratios: tuple[float, ...] = RATIOS,
    pruning: Mapping[str, Any] = {},
) -> Run:
    run = Run(root)
    config = Config.model_validate(
        {
            "tasks": list(TASKS),
            # Nothing is left to be judged, which would need a model.
            "pruning": {
                "ratio": ratios,
                "score": "wifv",
                "compensation": "mean",
                "allocation": {"kind": "logistic"},
                "attention_unit": "group",
                "baselines": {"uniform": {"allocation": "uniform", "score": "energy"}},
                **pruning,
            },
        }
    )
    write_json(run.config, config.model_dump(mode="json"))
    write_json(root / "model" / "config.json", (CONFIGS | MORE_CONFIGS)[model]().to_dict())
    planner = make_planner(config, run, model)
    for ratio in ratios:
        for spec in model_specs(config):
            save_plan(planner.plan(spec, ratio), planner.checkpoint.architecture, run.plan(ratio, spec.name))
    for task in TASKS:
        shard = {"task": task, "shard": "00000", "n_sequences": 64, "n_tokens": 1234, "digest": ""}
        write_json(run.shards(task) / "manifest.json", {"task": task, "shards": [shard] * N_SHARDS})
    write_json(run.results, results(config, root / "model"))
    for name in studies:
        write_json(run.study(name), study(name, config, root / "model"))
    return run


def make_planner(config: Config, run: Run, model: str = "llama_gqa") -> Planner:
    """A planner, and the files that it reads: shards of one task are alike, those of different tasks are not."""
    architecture = Architecture.of((CONFIGS | MORE_CONFIGS)[model]().to_dict())
    statistics: dict[str, Statistics] = {}
    for i, task in enumerate(TASKS):
        shards = [_near(random_statistics(architecture, seed=i), seed=10 * i + n) for n in range(N_SHARDS)]
        for n, part in enumerate(shards):
            save_moments(run.records(task) / f"{n:05}-abc.safetensors", part)
        statistics[task] = _sum(shards)
        save_moments(run.statistics(task), statistics[task])
    random_moments = random_statistics(architecture, seed=99)
    weights = {key: Norms(moments.mean_D.abs(), moments.m2_D) for key, moments in random_moments.items()}
    save_norms(run.statistics("weight_norms"), weights)
    checkpoint: Any = SimpleNamespace(architecture=architecture)
    files = {task: run.statistics(task) for task in TASKS}
    return Planner(config, checkpoint, statistics, weights, dict.fromkeys(TASKS, "hash"), files, run, held_out={})


def _sum(parts: list[Statistics]) -> Statistics:
    first, *others = parts
    total = dict(first)
    for part in others:
        total = {key: moments + part[key] for key, moments in total.items()}
    return total


def _near(statistics: Statistics, seed: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: Moments(m.count, m.mean_D + 0.1 * torch.randn(len(m.mean_D), generator=generator), m.m2_D)
        for key, m in statistics.items()
    }


# --- results ---------------------------------------------------------------------------------------------------------


def results(config: Config, folder: Path, *, speed: bool = False, perplexity: bool = False) -> dict[str, Any]:
    """A results file as the jobs write it; ``perplexity`` makes prose a task of that metric."""
    rng = random.Random(1)
    tasks = {task: {"metric": "exact_match", "short": "em", "judge": "seap_ray"} for task in TASKS}
    if perplexity:
        tasks["prose"] = {"metric": "window_perplexity", "short": "ppl", "judge": "seap_ray"}
    models = [_model("dense", "dense", None, tasks, rng)]
    for ratio in config.pruning.ratio:
        models += [_model(spec.name, spec.kind, ratio, tasks, rng) for spec in model_specs(config)]
    for model in models:
        model["folder"] = str(folder) if model["kind"] == "dense" else None
        if speed:
            model["speed"] = _speed(model["realised_ratio"])
    summaries = own_task_rows([ModelRow.from_json(model) for model in models])
    confusion = {task: {task: 38, "general": 2} for task in TASKS}
    coverage = [{"threshold": t / 10, "coverage": 1 - t / 20, "accuracy": 0.9 + t / 100} for t in range(10)]
    router = {
        "n": 120,
        "accuracy": 0.95,
        "threshold": 0.3,
        "routed": 0.95,
        "confusion": confusion,
        "coverage": coverage,
    }
    return {
        "config": config.model_dump(mode="json"),
        "seed": 0,
        "tasks": tasks,
        "models": [*models, *(row.to_json() for row in summaries)],
        "router": {**router, "confusion": confusion, "coverage": coverage},
        "versions": {"seap-ray": "0.1.0"},
    }


def _model(name: str, kind: str, ratio: float | None, tasks: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    removed = 0.0 if ratio is None else ratio + rng.uniform(-0.003, 0.003)
    quality = {task: _cell(about["metric"], removed, name == task, rng) for task, about in tasks.items()}
    return {
        "name": name,
        "method": "experts" if kind == "expert" else name,
        "kind": kind,
        "task": name if kind == "expert" else None,
        "ratio": ratio,
        "planned_ratio": removed,
        "realised_ratio": removed,
        "parameters": round(1e6 * (1 - 0.9 * removed)),
        "bytes": round(2e6 * (1 - 0.9 * removed)),
        "kv_bytes_per_token": 512,
        "quality": quality,
    }


def _cell(metric: str, removed: float, own: bool, rng: random.Random) -> dict[str, Any]:
    kept = 1 - removed * rng.uniform(0.5, 1) * (0.3 if own else 1)
    if metric == "exact_match":
        return {"metric": metric, "value": round(kept, 3), "stderr": 0.02, "n": 200}
    return {"metric": metric, "value": 12.5 / kept**3, "stderr": 0.015, "n": 5000}


def _speed(removed: float) -> dict[str, float]:
    prefill = 1 / (1 - 0.8 * removed)
    decode = 1 / (1 - 0.5 * removed)
    return {
        "prefill_tokens_per_s": 9000 * prefill,
        "decode_tokens_per_s": 120 * decode,
        "prefill_speedup": prefill,
        "decode_speedup": decode,
    }


# --- studies ---------------------------------------------------------------------------------------------------------


def study(name: StudyName, config: Config, folder: Path) -> dict[str, Any]:
    """A study's results file with the columns that the study has; the numbers are made up."""
    content = results(config, folder, speed=name in ("table", "ratio", "paper"), perplexity=name == "ratio")
    columns, rows = _table(name, config, content)
    return {
        "study": name,
        "title": STUDIES[name].title,
        "question": STUDIES[name].question,
        "command": f"python jobs/eval.py study={name}",
        "columns": columns,
        "rows": rows,
        **content,
    }


def _table(name: str, config: Config, content: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rng = random.Random(2)
    ratios = config.pruning.ratio
    if name == "corpus":
        return CorpusRow.columns(), [
            [r, n, 3, 0.9 - r - 3 / n, 0.5 / n, 0.01] for r in ratios for n in (50, 100, 200, 500, 1000)
        ]
    if name == "allocation":
        kinds = [*product(("uniform", "logistic", "global"), get_args(AttentionUnit)), ("auto", "auto")]
        return AllocationRow.columns(), [
            [r, *kind, None, None, r, rng.uniform(0.5, 1 - r), 0.01, rng.random() / 2, 0.01]
            for r, kind in product(ratios, kinds)
        ]
    if name == "curve":
        return AllocationRow.columns(), [
            [r, "logistic", None, k, x0, r, rng.uniform(0.5, 1 - r), 0.01, rng.random() / 2, 0.01]
            for r, k, x0 in product(ratios, (0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.3, 0.5, 0.7))
        ]
    if name == "reconstruction":
        rows: list[list[Any]] = [[0.0, kind, "", "", 0.0, 0.98, 0.0, 0.01] for kind in MODEL_GROUPS]
        for r, kind, way, score in product(ratios, MODEL_GROUPS, WAYS, SCORES):
            rows.append([r, kind, way, score, r, 0.98 - r * rng.uniform(0.1, 1), 0.02, 0.01])
        return ReconstructionRow.columns(), rows
    if name == "ood":
        numbers = [1.0, 0.0, 0.9, 0.02, 0.8, 0.02, 0.6, 0.03, 0.4, 0.01]
        return OutOfDistributionRow.columns(), [[r, task, *numbers] for r in ratios for task in TASKS]
    if name == "routing":
        ways = {"classifier": 0.88, "oracle": 0.9, "random": 0.4, "general": 0.7}
        return RoutingRow.columns(tasks=TASKS), [
            [w, r, v - r / 2, 0.01, 0.02, v, 0.01, v, 0.01, None, None, 0.3] for r in ratios for w, v in ways.items()
        ]
    if name == "synthesis":
        return SynthesisRow.columns(tasks=TASKS), [
            [r, corpus, 1000, 0.9 - r, 0.01, 0.9, 0.01, 0.9, 0.01, 0.9, 0.01] for r in ratios for corpus in CORPORA
        ]
    if name == "paper":
        columns = ["table", "method", "ratio", "whose", *TASKS, "average", "stderr"]
        rows = [["ours", 61.0, 62.0, 63.0, 62.0, 0.5], ["paper", 60.5, 62.5, None, 61.5, None]]
        rows.append(["difference", 0.5, -0.5, None, 0.5, None])
        return columns, [["accuracy, Llama-2-7B", "SEAP (s_F)", 0.2, *row] for row in rows]

    models = Results.from_json(content).models
    if name == "transfer":
        rows = []
        for model in models:
            if model.kind != "summary":
                rows.append(TransferRow(model.name, model.ratio, _estimates(model)).to_json())
        return TransferRow.columns(tasks=TASKS), rows
    rows = []
    for model in models:
        mean = mean_quality(model.quality.values()) or (None, None)
        rows.append([model.name, model.ratio, model.realised_ratio, *mean])
    rows.append(["general_like_experts.score_average.experts_tokens.2", 0.4, 0.4012, 0.1, 0.01])
    return ["model", "ratio", "realised", "mean acc", "stderr"], rows


def _estimates(model: ModelRow) -> dict[str, Estimate]:
    estimates = {}
    for task, cell in model.quality.items():
        assert isinstance(cell, QualityCell)
        estimates[task] = Estimate(cell.value, cell.stderr)
    return estimates


def edit(path: Path, change: Any) -> None:
    """Change a JSON file in place: ``change`` is called with its value."""
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


# --- plans that were judged ------------------------------------------------------------------------------------------


def judge_plans(run: Run) -> None:
    """Say of every plan that it was judged: repairs of each model, allocations of the general one; made-up figures."""
    rng = random.Random(3)
    for path in sorted(run.root.glob("plans/*/*.json")):
        edit(path, lambda plan: plan.update(_judged(plan, rng)))


def _judged(plan: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    taken = {name: plan[name] for name in ("score", "compensation", "attention_unit")}
    taken["allocation"] = plan["allocation"]["kind"]
    judged = [{**taken, "allocation": "uniform", "compensation": way} for way in get_args(Compensation)]
    if plan["kind"] != "general":
        return {"judged": [{**settings, **_figures(rng)} for settings in judged]}

    kinds = ("measured", "uniform", "logistic", "global")
    widths = [{**taken, "allocation": kind, "attention_unit": unit} for kind in kinds for unit in ("none", "group")]
    judged += [{**settings, "predicted": rng.uniform(0.01, 0.2)} for settings in widths]
    predicted = [{"attn": 0.0 if i == 0 else rng.random() / 100, "mlp": rng.random() / 10} for i in range(4)]
    return {"judged": [{**settings, **_figures(rng)} for settings in judged], "predicted": predicted}


def _figures(rng: random.Random) -> dict[str, float]:
    return {"divergence": rng.uniform(0.01, 0.2), "stderr": 0.002, "loss": rng.uniform(-0.01, 0.2)}
