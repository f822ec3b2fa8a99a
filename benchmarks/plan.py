"""Plan: the first plan of a large model, which reads weights for their norms, and one at another ratio, which does not.

The checkpoint is a sparse file of zeros and the statistics are random.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Row, alternate, memory_bandwidth
from benchmarks.merge import random_statistics
from benchmarks.shapes import SHAPES, sparse_checkpoint
from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.records import save_moments
from seap_ray.pipeline.cluster import connect
from seap_ray.pipeline.model_specs import model_specs
from seap_ray.pipeline.planner import Planner, make_planner
from seap_ray.storage.run import Run

SUITE, TASK = "plan", "sort"


def rows(config: Config) -> Iterator[Row]:
    settings = config.benchmarks
    connect()
    with tempfile.TemporaryDirectory() as folder:
        source = sparse_checkpoint(Path(folder) / "base", SHAPES[settings.shape])
        pruning, checkpoint, run = large_run(source, Path(folder))

        def first() -> None:
            run.statistics("weight_norms").unlink(missing_ok=True)
            again()

        def again() -> None:
            plan(planner_of(pruning, checkpoint, run), 0.35)

        found = alternate({"first": first}, 1, warm_up=False)
        repeated = alternate({"again": again}, settings.rounds)
        n_bytes = sum(run.statistics(name).stat().st_size for name in (TASK, "weight_norms"))
    architecture = checkpoint.architecture
    matrices = 2 * architecture.n_layers * architecture.hidden_size * sum(architecture.widths)
    shape, bandwidth = settings.shape.upper(), memory_bandwidth()
    yield Row.of(
        SUITE,
        f"first plan of {shape} shape, with norms of {matrices / 1e9:.1f} GB of weights",
        ours=found.median("first"),
        unit="s",
        limit=matrices / bandwidth,
        limit_name="weights at memory bandwidth",
    )
    first_seconds = found.median("first")
    yield Row.of(
        SUITE,
        f"a plan of {shape} shape at another ratio",
        baseline=first_seconds,
        ours=repeated.median("again"),
        unit="s",
        ratios=[seconds / first_seconds for seconds in repeated.seconds["again"]],
        limit=n_bytes / bandwidth,
        limit_name="statistics at memory bandwidth",
        target="ours <= 2",
    )


def large_run(source: Path, folder: Path, **sections: dict[str, object]) -> tuple[Config, Checkpoint, Run]:
    """A run of one task whose statistics are there."""
    config = Config.model_validate(
        {
            "run": {"name": "run", "storage": str(folder)},
            "model": {"source": str(source), "dtype": "bfloat16"},
            "tasks": [TASK],
            "pruning": {"ratio": 0.5, "general": {"score": "energy"}},
            **sections,
        }
    )
    checkpoint, run = Checkpoint.open(str(source)), Run.of(config)
    save_moments(run.statistics(TASK), random_statistics(checkpoint.architecture))
    return config, checkpoint, run


def planner_of(config: Config, checkpoint: Checkpoint, run: Run) -> Planner:
    return make_planner(config, checkpoint, run, {TASK: run.statistics(TASK)})


def plan(planner: Planner, ratio: float) -> None:
    planner.plan(next(spec for spec in model_specs(planner.config) if spec.task), ratio)
