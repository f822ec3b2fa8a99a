"""Latency: checkpoints that ``pruning.target.latency`` made, the tokens per second asked for beside measured ones.

    python -m benchmarks.latency RUN [key=value ...]

The dense model and all checkpoints of a run take turns in vLLM with the batch of their targets; ``benchmarks.rounds``,
``benchmarks.clock``, ``serve.num_cpus`` and ``serve.engine`` are as in the suite ``widths``.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import Load, answer
from benchmarks.measure import Rounds, alternate
from benchmarks.widths import CLOCKS, prepare_process, start_engine, stderr_of_median
from seap_ray.config import Config, load_config
from seap_ray.core.targets import make_target
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.run_target import read_table, stored_sizes
from seap_ray.report.table import text_table
from seap_ray.storage.files import read_json

DENSE = "dense"
COLUMNS = ("model", "asked", "planned", "measured", "of asked", "speed-up planned", "measured", "by the wall clock")
"""Tokens per second, then times as fast as the dense model."""


def main(arguments: Sequence[str]) -> None:
    """Measure the checkpoints of a run and print a table."""
    run, *overrides = arguments
    config = load_config(overrides)
    manifests = {str(path.parent): read_json(path) for path in sorted(Path(run).glob("experts/*/*/seap.json"))}
    first = next(iter(manifests.values()))
    base = Checkpoint.open(first["source"]["model"])
    target = first["target"]
    load = Load(target["batch"], target["prompt_tokens"], target["new_tokens"])

    folders = {DENSE: str(base.folder), **{path: path for path in manifests}}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        chosen, wall = pool.submit(measure, folders, load, config).result()

    keys = {key: target[key] for key in ("tokens_per_second", "table", "batch", "prompt_tokens", "new_tokens")}
    planned_dense = _dense_rate(base, keys)
    tokens = load.requests * load.reply
    dense = f"{tokens / chosen.median(DENSE):.1f}"
    rows: list[list[Any]] = [[DENSE, None, f"{planned_dense:.1f}", dense, None, None, None, None]]
    for path, manifest in manifests.items():
        asked = manifest["target"]["tokens_per_second"]
        planned = manifest["target"]["planned_tokens_per_second"]
        measured = tokens / chosen.median(path)
        name = "/".join(Path(path).parts[-2:])
        rates = [f"{asked:g}", f"{planned:.1f}", f"{measured:.1f}", f"{measured / asked:.3f}"]
        rows.append([name, *rates, f"{planned / planned_dense:.3f}", _speedup(chosen, path), _speedup(wall, path)])
    print(text_table(COLUMNS, rows))


def measure(folders: Mapping[str, str], load: Load, config: Config) -> tuple[Rounds, Rounds]:
    """Time every model in turns; return seconds by the chosen clock, and by the wall clock."""
    prepare_process(config)
    clock = CLOCKS[config.benchmarks.clock]
    chosen: dict[str, list[float]] = {name: [] for name in folders}

    def timed(name: str, engine: Any, vocabulary: int) -> Callable[[], None]:
        """Return a turn of a model, which notes its seconds by the chosen clock."""

        def turn() -> None:
            """Answer once."""
            started = clock()
            answer(engine, load, vocabulary)
            chosen[name].append(clock() - started)

        return turn

    contestants: dict[str, Callable[[], object]] = {}
    for name, folder in folders.items():
        checkpoint = Checkpoint.at(Path(folder))
        engine = start_engine(folder, checkpoint.architecture, load, config)
        contestants[name] = timed(name, engine, checkpoint.vocabulary_size)
    wall = alternate(contestants, config.benchmarks.rounds)
    # The first turn was to warm up.
    return Rounds({name: seconds[1:] for name, seconds in chosen.items()}), wall


def _speedup(rounds: Rounds, name: str) -> str:
    """Return how many times as fast as the dense model one is, with the standard error."""
    ratios = rounds.speedups(name, DENSE)
    return f"{median(ratios):.3f} +- {stderr_of_median(ratios):.3f}"


def _dense_rate(base: Checkpoint, keys: Mapping[str, Any]) -> float:
    """Return the tokens per second that the table of times has for the dense model."""
    config = Config.model_validate({"pruning": {"target": {"latency": keys}}})
    target = make_target(config.pruning.target, base.architecture, stored_sizes(base), read_table(config))
    assert target is not None
    return target.tokens_per_second(target.dense)


if __name__ == "__main__":
    main(sys.argv[1:])
