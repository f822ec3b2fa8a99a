"""Summary: the results files of runs in, text for a terminal out."""

import math

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.methods import STUDIES
from seap_ray.report.artifacts import Results, study_path
from seap_ray.report.table import mean_head, mean_quality, show, table, text_table
from seap_ray.storage.files import read_json, readable
from seap_ray.storage.paths import StoragePath, parse_path
from seap_ray.storage.run import Run, flat


def find(config: Config, name: str) -> Run:
    """A run by its folder, or by its name below ``run.storage``. Raises ConfigError when there is none with results."""
    named = Run.of(config.model_copy(update={"run": config.run.model_copy(update={"name": name})}))
    at = parse_path(name)
    with readable(at):
        run = Run(at.absolute()) if at.is_dir() else named
    if not _files(run):
        raise ConfigError(f"{name}: no run with results at {run.root}; make it with jobs/prune.py or jobs/eval.py")
    return run


def summary(run: Run) -> str:
    """The table of the main job, and those of every study."""
    return "\n\n".join(_text(name, results) for name, results in _files(run).items())


def _files(run: Run) -> dict[str, Results]:
    """What was found, by study; the main job's first."""
    paths: dict[str, StoragePath] = {name: path for name in STUDIES if (path := study_path(run, name))}
    paths = {"main job": run.results, **paths}
    return {name: results for name, path in paths.items() if (results := read_json(path))}


def _text(name: str, results: Results) -> str:
    if "rows" not in results:
        return table(results)
    whole = table(results) if name in ("table", "ratio") else text_table(results["columns"], results["rows"])
    return f"{results['title']}: {results['question']}\n\n{whole}"


def compare(a: Run, b: Run) -> str:
    """What differs between two runs: keys of their configs, then every model that both have, its mean in each."""
    texts, others = [f"a: {a.root}", f"b: {b.root}"], _files(b)
    for name, results in _files(a).items():
        if other := others.get(name):
            texts += ["", f"{name}:", *_changed_keys(results, other), "", _changed_models(results, other)]
    return "\n".join(texts)


def _changed_keys(a: Results, b: Results) -> list[str]:
    old, new = (flat(results.get("config") or {"tasks": []}) for results in (a, b))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"  {key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _changed_models(a: Results, b: Results) -> str:
    """Mean quality in both, with the standard error of the difference, over the tasks that both have."""
    tasks = [task for task in a["tasks"] if task in b["tasks"]]
    others = {(model["name"], model["ratio"]): model for model in b["models"]}
    rows = []
    for model in a["models"]:
        if other := others.get((model["name"], model["ratio"])):
            old, new = (mean_quality(q for t, q in m["quality"].items() if t in tasks) for m in (model, other))
            if old and new:
                error = math.hypot(old[1], new[1])
                rows.append([model["name"], show(model["ratio"]), old[0], new[0], new[0] - old[0], error])
    head = mean_head({task: a["tasks"][task] for task in tasks}) if tasks else "mean"
    return text_table(["model", "ratio", f"{head} a", f"{head} b", "b - a", "stderr"], rows)
