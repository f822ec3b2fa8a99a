"""Studies: a calibrated run in; models, a table and files out, one question each. ``methods.STUDIES`` lists them."""

import csv
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import product
from statistics import mean, median, stdev
from typing import Any, get_args

from seap_ray.config import GENERAL, Baseline, Budget, Compensation, Config, Pooling
from seap_ray.core.reconstruction import UNIT_SCORES
from seap_ray.errors import ConfigError, DataError, IncompleteError
from seap_ray.judges import lm_eval
from seap_ray.judges.quality import Quality
from seap_ray.judges.speed import Speed
from seap_ray.methods import METHODS, STUDIES
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.evaluate import EvalTask, Failure
from seap_ray.pipeline.job import calibrate_run, on_cluster, route
from seap_ray.pipeline.model_specs import ModelSpec, baseline_specs, model_specs
from seap_ray.pipeline.results import ModelRow, own_task_rows, results_json
from seap_ray.pipeline.shards import Shard
from seap_ray.progress import say
from seap_ray.report.page import write_report
from seap_ray.report.table import mean_head, mean_over, mean_quality, table, text_table
from seap_ray.routing.router import Router
from seap_ray.storage.files import atomic_write, write_json
from seap_ray.storage.run import Run
from seap_ray.studies import paper
from seap_ray.studies.runner import Asked, Bench, Judged

SEEDS = range(3)
"""Seeds of what a study draws at random."""
SAMPLES = (50, 100, 200, 500, 1000)
"""Samples per task of the corpus study."""
CURVES = tuple(product((0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.3, 0.5, 0.7)))
"""k and x0 of the allocation study."""
ALLOCATIONS = ("uniform", "logistic", "global")
KINDS = ("experts", "general")
RANKED_BY = ("wifv", "energy", "obs")
"""Scores of the reconstruction study."""
SIZE_COLUMNS = ("parameters", "bytes", "kv_bytes_per_token")
RATE_COLUMNS = tuple(rate.name for rate in fields(Speed))
"""Columns of a model's size and speed, as a results file names them."""


@dataclass(frozen=True)
class Found:
    """What a study has found: its models, and its own flat table."""

    judged: list[Judged]
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)


def run_study(config: Config) -> None:
    """Calibrate where that is not done, run ``config.study``, print its table; write JSON, CSV and the report.

    Raises ConfigError for what a study cannot do without, and IncompleteError, at the very end, when cells have failed.
    """
    _check(config)
    on_cluster(config, _run, check_evaluation_rows=False)  # a task that cannot be judged costs its own cells only


def _check(config: Config) -> None:
    """Raises ConfigError, before any work, for what would leave a study without an answer."""
    if config.evaluation.samples == 0:
        raise ConfigError("evaluation.samples: 0 leaves a study nothing to judge; null takes all rows")
    if config.study == "ood" and len(config.tasks) < 2:
        raise ConfigError("tasks: study=ood leaves out one task at a time, so it needs two or more")
    if config.study == "corpus" and config.corpus.packing == "pack":
        raise ConfigError("corpus.packing: study=corpus counts samples, and packing joins them; leave it at bucket")
    if config.study == "reconstruction":
        for allocation in {spec.settings.allocation for spec in _usual(config)} & {"standardised", "depth"}:
            raise ConfigError(
                "pruning.allocation.kind: study=reconstruction compares scores of whole heads and channels, and "
                f"{allocation} does not rank by them; choose {', '.join(ALLOCATIONS)}"
            )
    for task in config.tasks:
        if task.lm_eval and _asks_lm_eval(config):
            with suppress(DataError):  # rows that are missing cost their own cells only
                lm_eval.check(task)


def _asks_lm_eval(config: Config) -> bool:
    """Routing needs each prompt, which lm-eval does not show."""
    return config.study != "routing"


def _run(config: Config, checkpoint: Checkpoint, run: Run) -> None:
    study = STUDIES[config.study]
    bench = Bench(calibrate_run(config, checkpoint, run), lm_eval=_asks_lm_eval(config))
    router = route(bench.made)
    say(f"{study.title}: {study.question}")
    found = RUNS[config.study](bench)
    written = results_json(config, bench.exams, [one.model for one in found.judged], router)
    about = {"study": config.study, "title": study.title, "question": study.question, "columns": found.columns}
    write_json(run.study(config.study), {**about, "rows": found.rows, **written})
    with atomic_write(run.study(config.study).with_suffix(".csv")) as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([found.columns, *found.rows])
    say("")
    say(table(written) if config.study in ("table", "ratio") else text_table(found.columns, found.rows))
    say("")
    say(f"{write_report(run)} has the pictures")
    tried = [one for one in found.judged if one.model.folder]  # what no plan can be made for stays so
    failed = {cell.error for one in tried for cell in one.cells.values() if isinstance(cell, Failure)}
    if failed:
        raise IncompleteError(f"{len(failed)} reasons for failed cells, first: {min(failed)}; mend, run it again")


# --- models ----------------------------------------------------------------------------------------------------------


def _asked(bench: Bench, made: Iterable[ModelSpec]) -> list[Asked]:
    """Each spec at each ratio; a baseline for one task is judged on that task only."""
    made = list(made)
    return [
        Asked(spec, ratio, (spec.task,) if spec.task and spec.kind == "baseline" else None)
        for ratio in bench.config.pruning.ratio
        for spec in made
    ]


def _named(bench: Bench, name: str, *, like: str | None = None, **settings: Any) -> list[ModelSpec]:
    """Specs of a built-in method, or of settings alone, under a name."""
    base = METHODS[like] if like else {}
    return baseline_specs(bench.config, name, Baseline(**{**base, **settings}))


def _usual(config: Config) -> list[ModelSpec]:
    """The experts and the general model."""
    return [spec for spec in model_specs(config) if spec.kind != "baseline"]


def _variant(spec: ModelSpec, method: str, **settings: Any) -> ModelSpec:
    """The same model with some settings of its own, as a baseline named by them."""
    name = f"{method}.{spec.task}" if spec.task else method
    own = spec.settings.model_copy(update=settings)
    return replace(spec, name=name, kind="baseline", method=method, settings=own)


def _mean_of(model: ModelRow) -> list[float | None]:
    """Mean quality and its standard error."""
    return list(mean_quality(model.quality_json.values()) or (None, None))


def _head(bench: Bench) -> str:
    judged = [exam for exam in bench.exams.values() if isinstance(exam, EvalTask)]
    return mean_head({exam.task.name: {"metric": exam.metric} for exam in judged})


def _with_error(names: Iterable[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name} stderr")]


def _compared(bench: Bench, judged: Sequence[Judged]) -> Found:
    """The table of studies whose rows are models; below, for every method with a model a task, these as one row."""
    models = [one.model for one in judged]
    of_tasks = [*_with_error(bench.tasks), _head(bench), "stderr"]
    columns = ["model", "ratio", "realised", *SIZE_COLUMNS, *of_tasks, *RATE_COLUMNS]
    rows = [_row_of(model, bench.tasks) for model in [*models, *own_task_rows(models)]]
    return Found(list(judged), columns, rows)


def _row_of(model: ModelRow, tasks: Sequence[str]) -> list[Any]:
    quality = model.quality_json
    cells = [quality.get(task, {}) for task in tasks]
    return [
        *(getattr(model, key) for key in ("name", "ratio", "realised_ratio", *SIZE_COLUMNS)),
        *(cell.get(key) for cell in cells for key in ("value", "stderr")),
        *(mean_over(model.to_json(), tasks) or (None, None)),
        *(getattr(model.speed, key, None) for key in RATE_COLUMNS),
    ]


# --- all methods -----------------------------------------------------------------------------------------------------


def _table(bench: Bench) -> Found:
    own = model_specs(bench.config)
    names = {spec.name for spec in own}
    judged = bench.judge([Asked(), *_asked(bench, [*own, *(s for s in _all_methods(bench) if s.name not in names)])])
    return _compared(bench, bench.with_speed([*judged, *bench.others()]))


def _all_methods(bench: Bench) -> list[ModelSpec]:
    """Every built-in method with every allocation, and where a corpus is plain text, calibrated on that alone."""
    made = [
        spec
        for name, score, bias in (
            ("wanda_sp", "wanda_sp", "none"),
            ("flap", "wifv", "mean"),
            ("flap_without_bias", "wifv", "none"),
            ("magnitude", "magnitude", "none"),
            ("random", "random", "none"),
        )
        for allocation in ALLOCATIONS
        for spec in _named(bench, f"{name}.{allocation}", score=score, allocation=allocation, compensation=bias)
    ]
    for seed in SEEDS[1:]:
        made += _named(bench, f"random.uniform.{seed}", like="random", seed=bench.config.run.seed + seed)
    made += _named(bench, "flap.standardised", like="flap")
    for corpus in _plain_corpora(bench.config):
        made += _named(bench, f"wanda_sp.on_{corpus}", like="wanda_sp", tasks=(corpus,))
        made += _named(bench, f"flap.on_{corpus}", like="flap", tasks=(corpus,))
    for budget, score, allocation in product(get_args(Budget), ("wifv", "wifn", "official_wifn"), ALLOCATIONS):
        if budget == "official" and (allocation == "global" or score == "wifn"):
            continue  # its authors' schedule is one of shares by layer, and their code has no L1 norm
        settings = {"score": score, "budget": budget, "compensation": "none", "allocation": allocation}
        name = f"seap_{budget}.{score}.{allocation}"
        made += _named(bench, name, **settings, per_task=True)
        made += _named(bench, f"{name}.gen", **settings, pooling="score_average")
    if bench.config.calibration.statistics == "covariance":
        for score, allocation in product(("wifv", *UNIT_SCORES), ALLOCATIONS):
            settings = {"score": score, "compensation": "least_squares", "allocation": allocation}
            name = f"least_squares.{score}.{allocation}"
            made += [*_named(bench, name, **settings, per_task=True), *_named(bench, f"{name}.gen", **settings)]
    return made + _named(bench, "depth", like="depth")


def _plain_corpora(config: Config) -> list[str]:
    """Language-model corpora, which the paper weighs 3, tasks 2; others calibrate on such a corpus alone."""
    return [task.name for task in config.tasks if task.weight > 2]


def _ratio(bench: Bench) -> Found:
    methods = [spec for name in METHODS for spec in _named(bench, name, like=name) if name != "seap_official"]
    made = _usual(bench.config)
    made += _named(bench, "uniform", allocation="uniform", score="energy", compensation="none")
    judged = bench.judge([Asked(), *_own(_asked(bench, [*made, *methods]))])
    return _compared(bench, bench.with_speed(judged))


def _own(asked: Iterable[Asked]) -> list[Asked]:
    """The same models, experts on their own task only."""
    return [Asked(a.spec, a.ratio, (a.spec.task,)) if a.spec and a.spec.task else a for a in asked]


# --- how much data ---------------------------------------------------------------------------------------------------


def _corpus(bench: Bench) -> Found:
    """Nested within a seed, disjoint between seeds: size n is the first n samples of the seed's own share of shards."""
    parts: dict[tuple[str, int, int], Sequence[Shard]] = {}
    for task, size in product(bench.tasks, SAMPLES):
        found = {(task, size, seed): _first(bench.manifest(task).shards, size, seed) for seed in SEEDS}
        if all(found.values()):
            parts |= {key: shards for key, shards in found.items() if shards}
    if not parts:
        raise ConfigError(
            f"corpus.samples: {bench.config.corpus.samples} in shards of {bench.config.corpus.shard_sequences} leave "
            f"none of the {len(SEEDS)} seeds {SAMPLES[0]} samples"
        )
    planner = bench.with_parts({_part(*key): shards for key, shards in parts.items()})
    asked = _own(Asked(_expert(bench, *key), ratio) for ratio in bench.config.pruning.ratio for key in parts)
    judged = bench.judge(asked, planner)
    keys = [(ratio, *key) for ratio in bench.config.pruning.ratio for key in parts]
    by_key = dict(zip(keys, judged, strict=True))
    return Found(judged, ["ratio", "samples", "tasks", _head(bench), "sd over seeds", "stderr"], _sizes(by_key))


def _first(shards: Sequence[Shard], size: int, seed: int) -> Sequence[Shard] | None:
    """The first ``size`` sequences of a seed's share of the shards, or None where it has fewer."""
    share = shards[len(shards) // len(SEEDS) * seed : len(shards) // len(SEEDS) * (seed + 1)]
    for n in range(1, len(share) + 1):
        if sum(shard.n_sequences for shard in share[:n]) == size:
            return share[:n]
    return None


def _part(task: str, size: int, seed: int) -> str:
    return f"{task}.{size}.{seed}"


def _expert(bench: Bench, task: str, size: int, seed: int) -> ModelSpec:
    name = _part(task, size, seed)
    settings = bench.config.plan_settings(bench.config.pruning.experts)
    return ModelSpec(name, "baseline", f"{size}.{seed}", {name: 1.0}, settings, task=task)


def _sizes(judged: Mapping[tuple[float, str, int, int], Judged]) -> list[list[Any]]:
    """Mean over those tasks that have the largest size, per ratio and size; its spread over the seeds."""
    rows: list[list[Any]] = []
    for ratio in dict.fromkeys(key[0] for key in judged):
        sizes = sorted({key[2] for key in judged})
        tasks = [t for t in dict.fromkeys(key[1] for key in judged) if (ratio, t, sizes[-1], 0) in judged]
        for size in sizes:
            per_seed = [
                mean_quality([judged[ratio, task, size, seed].model.quality_json[task] for task in tasks])
                for seed in SEEDS
            ]
            found = [pair for pair in per_seed if pair]
            values = [value for value, _ in found]
            if found:
                spread = stdev(values) if len(values) > 1 else None
                rows.append([ratio, size, len(tasks), mean(values), spread, mean(error for _, error in found)])
    return rows


def _pooling(bench: Bench) -> Found:
    """General models from as many tokens as an expert has on average, and from all of them."""
    share = {
        f"{task}.{seed}": _share(bench.manifest(task).shards, 1 / len(bench.tasks), seed)
        for task, seed in product(bench.tasks, SEEDS)
    }
    made = [spec for spec in model_specs(bench.config) if spec.kind == "expert"]
    made += [spec for like in ("general", "experts") for spec in _pooled(bench, like)]
    judged = bench.judge(_own(_asked(bench, made)), bench.with_parts(share))
    shards = {**share, **{task: bench.manifest(task).shards for task in bench.tasks}}
    tokens = {spec.name: sum(shard.n_tokens for part in spec.weights for shard in shards[part]) for spec in made}
    own = round(mean(tokens[task] for task in bench.tasks))
    found = _compared(bench, judged)
    rows = [[row[0], tokens.get(row[0], own), *row[1:]] for row in found.rows if row[0] not in bench.tasks]
    return Found(judged, ["model", "tokens", *found.columns[1:]], rows)


def _pooled(bench: Bench, like: str) -> list[ModelSpec]:
    """General models with the settings of the general one or of the experts, by pooling and tokens."""
    of = bench.config.pruning.general if like == "general" else bench.config.pruning.experts
    settings, weights = bench.config.plan_settings(of), {task.name: task.weight for task in bench.config.tasks}
    made = []
    for pooling in get_args(Pooling):
        method = f"general_like_{like}.{pooling}"
        made.append(ModelSpec(f"{method}.all_tokens", "baseline", method, weights, settings, pooling))
        for seed in SEEDS:
            parts = {f"{task}.{seed}": weight for task, weight in weights.items()}
            made.append(ModelSpec(f"{method}.experts_tokens.{seed}", "baseline", method, parts, settings, pooling))
    return made


def _share(shards: Sequence[Shard], share: float, seed: int) -> list[Shard]:
    """Shards, drawn by ``seed``, whose tokens come nearest to that share of all."""
    order = random.Random(seed).sample(list(shards), len(shards))
    wanted = share * sum(shard.n_tokens for shard in shards)
    sizes = [sum(shard.n_tokens for shard in order[:n]) for n in range(1, len(order) + 1)]
    return order[: 1 + min(range(len(sizes)), key=lambda i: abs(sizes[i] - wanted))]


# --- how it is cut ---------------------------------------------------------------------------------------------------


def _allocation(bench: Bench) -> Found:
    usual = _usual(bench.config)
    rows: list[tuple[str, float | None, float | None]] = [("uniform", None, None), ("global", None, None)]
    rows += [("logistic", k, x0) for k, x0 in CURVES]
    made, names = [], {}
    for kind, k, x0 in rows:
        name = kind if k is None else f"logistic.k{k:g}.x{x0:g}"
        names[name] = [kind, k, x0]
        own = {"allocation": kind} if k is None else {"allocation": kind, "k": k, "x0": x0}
        made += [_variant(spec, name if spec.task else f"{name}.general", **own) for spec in usual]
    judged = bench.judge(_asked(bench, made))
    models = [one.model for one in judged]
    by_row = {(m.method, m.ratio): m for m in [*(m for m in models if not m.task), *own_task_rows(models)]}
    table_rows = []
    for ratio, name in product(bench.config.pruning.ratio, names):
        experts, one = by_row.get((name, ratio)), by_row[f"{name}.general", ratio]
        table_rows.append([ratio, *names[name], *(_mean_of(experts) if experts else (None, None)), *_mean_of(one)])
    head = _head(bench)
    columns = [
        "ratio",
        "allocation",
        "k",
        "x0",
        f"experts {head}",
        "experts stderr",
        f"general {head}",
        "general stderr",
    ]
    return Found(judged, columns, table_rows)


def _reconstruction(bench: Bench) -> Found:
    """What stands for the cut columns, and by which score they were chosen; every seed draws all data anew."""
    judged: dict[tuple[float, str, str, str, int], list[Judged]] = {}
    for seed in SEEDS:
        of = bench if seed == 0 else _reseeded(bench, seed)
        keys, asked = zip(*_ways(of, seed), strict=True)
        for key, one in zip(keys, of.judge(asked), strict=True):
            judged.setdefault((*key, seed), []).append(one)
    rows = []
    for key in dict.fromkeys(key[:-1] for key in judged):
        models = [[one.model for one in judged[*key, seed]] for seed in SEEDS]
        per_seed = [mean_quality([c for model in of_seed for c in model.quality_json.values()]) for of_seed in models]
        found = [pair for pair in per_seed if pair]
        if found:
            realised = mean(model.realised_ratio or 0.0 for of_seed in models for model in of_seed)
            values, errors = zip(*found, strict=True)
            spread = stdev(values) if len(values) > 1 else None
            rows.append([*key, realised, mean(values), spread, mean(errors)])
    columns = ["ratio", "models", "compensation", "score", "realised", _head(bench), "sd over seeds", "stderr"]
    return Found([one for of_key in judged.values() for one in of_key], columns, rows)


def _ways(bench: Bench, seed: int) -> list[tuple[tuple[float, str, str, str], Asked]]:
    """The dense model, and experts and general by every compensation and score."""
    usual = _usual(bench.config)
    ways: list[tuple[tuple[float, str, str, str], Asked]] = [((0.0, kind, "", ""), Asked()) for kind in KINDS]
    for ratio, compensation, score in product(bench.config.pruning.ratio, get_args(Compensation), RANKED_BY):
        for spec in usual:
            own = _variant(spec, f"{compensation}.{score}.{seed}", compensation=compensation, score=score)
            key = (ratio, KINDS[not spec.task], compensation, score)
            ways.append((key, Asked(own, ratio, (spec.task,) if spec.task else None)))
    return ways


def _reseeded(bench: Bench, seed: int) -> Bench:
    """The same run with another seed, in a folder of its own: other rows to calibrate on and to judge by."""
    run = bench.config.run
    own = run.model_copy(update={"name": f"{run.name}-seed{seed}", "seed": run.seed + seed})
    config = bench.config.model_copy(update={"run": own})
    Run.of(config).claim(config)
    made = calibrate_run(config, bench.made.checkpoint, Run.of(config))
    return Bench(made, lm_eval=bench.lm_eval)


# --- other tasks -----------------------------------------------------------------------------------------------------


def _ood(bench: Bench) -> Found:
    """Each task left out of the general model's calibration in turn, and judged."""
    general = bench.config.pruning.general
    without = {task: tuple(other for other in bench.tasks if other != task) for task in bench.tasks}
    settings = bench.config.plan_settings(general).model_dump()
    made = [
        spec
        for task, others in without.items()
        for spec in _named(bench, f"without_{task}", **settings, tasks=others, pooling=general.pooling)
    ]
    usual = _usual(bench.config)
    left_out = [Asked(s, r, (s.name.removeprefix("without_"),)) for r in bench.config.pruning.ratio for s in made]
    judged = bench.judge([Asked(), *_asked(bench, usual), *left_out])
    by = {(one.model.name, one.model.ratio): one.model.quality_json for one in judged}
    rows = []
    for ratio, task in product(bench.config.pruning.ratio, bench.tasks):
        strangers = [by[other, ratio][task] for other in without[task]]
        cells = [by["dense", None], by[task, ratio], by[GENERAL, ratio], by[f"without_{task}", ratio]]
        found = [*(mean_quality([cell[task]]) for cell in cells), mean_quality(strangers)]
        rows.append([ratio, task, *(v for pair in found for v in pair or (None, None))])
    names = ("dense", "its expert", "general", "general without it")
    columns = ["ratio", "task", *_with_error([*names, "other experts"])]
    return Found(judged, columns, rows)


def _transfer(bench: Bench) -> Found:
    usual = _usual(bench.config)
    judged = bench.judge([Asked(), *_asked(bench, usual)])
    rows = []
    for one in judged:
        cells = [one.model.quality_json[task] for task in bench.tasks]
        found = [mean_quality([cell]) for cell in cells]
        rows.append([one.model.name, one.model.ratio, *(v for pair in found for v in pair or (None, None))])
    columns = ["model", "ratio", *_with_error(bench.tasks)]
    return Found(judged, columns, rows)


def _routing(bench: Bench) -> Found:
    """Every evaluation prompt by the run's router, by its true task, at random, and all to the general model."""
    if not bench.made.run.router.is_dir():
        raise ConfigError("model.source: study=routing needs a router, which this model's tokenizer cannot have")
    asked = [e for e in bench.exams.values() if isinstance(e, EvalTask) and e.task.metric != "window_perplexity"]
    if not asked:
        raise ConfigError("tasks: study=routing needs one with prompts; windows of a text are none")
    usual = _usual(bench.config)
    judged = bench.judge(_asked(bench, usual))
    cells = {(one.model.ratio or 0.0, one.model.name): one.cells for one in judged}
    router = Router.load(bench.made.run.router)
    routed, seconds = _routed(router, asked)
    random_ = [_at_random(bench.tasks, asked, seed) for seed in SEEDS]
    ways = {
        "classifier": [routed],
        "oracle": [{e.task.name: [e.task.name] * len(e.items) for e in asked}],
        "random": random_,
        "general": [{e.task.name: [GENERAL] * len(e.items) for e in asked}],
    }
    latency = {"classifier": median(seconds) * 1e3}
    rows = []
    for ratio, (way, choices) in product(bench.config.pruning.ratio, ways.items()):
        rows.append([way, ratio, *_routed_quality(cells, ratio, asked, choices), latency.get(way, 0.0)])
    names = [e.task.name for e in asked]
    columns = ["routing", "ratio", _head(bench), "stderr", "to general", *_with_error(names), "p50 ms"]
    return Found(judged, columns, rows)


def _routed(router: Router, asked: Sequence[EvalTask]) -> tuple[dict[str, list[str]], list[float]]:
    """The model of every prompt as the service chooses it, and the seconds of each choice."""
    chosen: dict[str, list[str]] = {}
    seconds = []
    for one in asked:
        for item in one.items:
            started = time.perf_counter()
            task = router.route(item.question or item.text).task
            seconds.append(time.perf_counter() - started)
            chosen.setdefault(one.task.name, []).append(task or GENERAL)
    return chosen, seconds


def _at_random(tasks: Sequence[str], asked: Sequence[EvalTask], seed: int) -> dict[str, list[str]]:
    rng = random.Random(seed)
    return {one.task.name: [rng.choice(tasks) for _ in one.items] for one in asked}


def _routed_quality(
    cells: Mapping[tuple[float, str], Mapping[str, Any]],
    ratio: float,
    asked: Sequence[EvalTask],
    choices: Sequence[Mapping[str, Sequence[str]]],
) -> list[Any]:
    """Mean, standard error, share that the general model answered, and every task's value; over several choices."""
    found = [{e.task.name: _picked(cells, ratio, e, choice[e.task.name]) for e in asked} for choice in choices]
    per_task = {e.task.name: mean_quality([one[e.task.name] for one in found]) for e in asked}
    means = [pair for one in found if (pair := mean_quality(one.values()))]
    to_general = mean(name == GENERAL for choice in choices for names in choice.values() for name in names)
    value, error = (mean(v for v, _ in means), mean(e for _, e in means)) if means else (None, None)
    return [value, error, to_general, *(v for pair in per_task.values() for v in pair or (None, None))]


def _picked(
    cells: Mapping[tuple[float, str], Mapping[str, Any]], ratio: float, exam: EvalTask, names: Sequence[str]
) -> dict[str, Any]:
    """A task's quality when each item is answered by the model of ``names``."""
    own = {name: cells[ratio, name][exam.task.name] for name in set(names)}
    if failed := [cell for cell in own.values() if isinstance(cell, Failure)]:
        return failed[0].brief()
    values = [own[name].values[i] for i, name in enumerate(names)]
    weights = [own[name].weights[i] for i, name in enumerate(names)]
    return Quality.of(exam.task.metric, values, weights).brief()


# --- the paper -------------------------------------------------------------------------------------------------------


def _paper(bench: Bench) -> Found:
    """Tables 1 (or 4), 2 and 3, ours beside the paper's, and the perplexity that it has a picture of."""
    made = [spec for name, own in paper.methods(bench.config) for spec in _named(bench, name, **own)]
    tasks = tuple(task for task in (*paper.tables()["tasks"], paper.CORPUS) if task in bench.tasks)
    asked = [replace(one, tasks=one.tasks or tasks) for one in [Asked(), *_asked(bench, made)]]
    judged = bench.with_speed(bench.judge(asked))
    models = [one.model for one in judged]
    whole = [m for m in models if not m.task] + own_task_rows(models)
    return Found(judged, paper.columns(), paper.compare(bench.config, [row.to_json() for row in whole]))


RUNS: dict[str, Callable[[Bench], Found]] = {
    "table": _table,
    "ratio": _ratio,
    "corpus": _corpus,
    "allocation": _allocation,
    "reconstruction": _reconstruction,
    "ood": _ood,
    "transfer": _transfer,
    "routing": _routing,
    "pooling": _pooling,
    "paper": _paper,
}
