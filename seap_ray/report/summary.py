"""Summary: the results of a run, and what differs between two, as text for a terminal."""

import math
from collections.abc import Container

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.methods import STUDIES
from seap_ray.report.rows import ModelRow, Results
from seap_ray.report.run_data import study_path
from seap_ray.report.table import mean_head, mean_quality, show, table, text_table
from seap_ray.storage.files import read_json, readable
from seap_ray.storage.paths import parse_path
from seap_ray.storage.run import Run, flatten

MAIN_JOB = "main job"


def find(config: Config, name: str) -> Run:
    """Return a run by its folder, or by its name below ``run.storage``.

    Raises:
        ConfigError: There is no such run with results.
    """
    run = Run.of(config.model_copy(update={"run": config.run.model_copy(update={"name": name})}))
    folder = parse_path(name)
    # A folder wins over a run of the same name.
    with readable(folder):
        if folder.is_dir():
            run = Run(folder.absolute())

    # A folder without results is as good as none: there is nothing to print.
    if not _results(run):
        raise ConfigError(f"{name}: no run with results at {run.root}; make it with jobs/prune.py or jobs/eval.py")
    return run


def summary(run: Run) -> str:
    """Return the table of the main job and those of every study."""
    return "\n\n".join(_text(name, results) for name, results in _results(run).items())


def _results(run: Run) -> dict[str, Results]:
    """Read the results files that are there, by study; the main job's is first."""
    contents = {MAIN_JOB: read_json(run.results)}
    for name in STUDIES:
        if path := study_path(run, name):
            contents[name] = read_json(path)
    return {name: Results.from_json(content) for name, content in contents.items() if content}


def _text(name: str, results: Results) -> str:
    if results.table is None:
        return table(results)

    # The tables of these two studies are about models, and so have the main job's form.
    if name in ("table", "ratio"):
        text = table(results)
    else:
        text = text_table(results.table.columns, results.table.rows)

    return f"{results.table.title}: {results.table.question}\n\n{text}"


def compare(a: Run, b: Run) -> str:
    """Return what differs between two runs: keys of their configs, then the means of every model that both have."""
    lines = [f"a: {a.root}", f"b: {b.root}"]
    results_b = _results(b)

    # Studies that only one of the two has made compare with nothing.
    for name, results in _results(a).items():
        if other := results_b.get(name):
            lines += ["", f"{name}:", *_changed_keys(results, other), "", _changed_models(results, other)]
    return "\n".join(lines)


def _changed_keys(a: Results, b: Results) -> list[str]:
    old = _flat_config(a)
    new = _flat_config(b)
    # A key that only one of them has counts as changed: versions of the package may differ.
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"  {key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _flat_config(results: Results) -> dict[str, object]:
    # A results file that was made by hand may have no config.
    return flatten(dict(results.config) or {"tasks": []})


def _changed_models(a: Results, b: Results) -> str:
    """Return a table of the mean quality in both, with the standard error of the difference, over the common tasks."""
    tasks = {name: task for name, task in a.tasks.items() if name in b.tasks}
    models_b = {(model.name, model.ratio): model for model in b.models}

    # Models are the same where name and ratio are; others have nothing to compare with.
    rows = []
    for model in a.models:
        other = models_b.get((model.name, model.ratio))
        if other is None:
            continue

        mean_a = _mean_over_common(model, tasks.keys())
        mean_b = _mean_over_common(other, tasks.keys())
        if mean_a and mean_b:
            # The two runs are independent, so their variances add up.
            stderr = math.hypot(mean_a[1], mean_b[1])
            rows.append([model.name, show(model.ratio), mean_a[0], mean_b[0], mean_b[0] - mean_a[0], stderr])

    head = mean_head(task.metric for task in tasks.values()) if tasks else "mean"
    return text_table(["model", "ratio", f"{head} a", f"{head} b", "b - a", "stderr"], rows)


def _mean_over_common(model: ModelRow, tasks: Container[str]) -> tuple[float, float] | None:
    return mean_quality(cell for task, cell in model.quality.items() if task in tasks)
