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

SUITE = "plan"
TASK = "sort"
RATIO = 0.35
BFLOAT16_BYTES = 2
FIXED_SETTINGS: dict[str, object] = {
    "score": "wifv",
    "compensation": "mean",
    "allocation": {"kind": "logistic"},
    "attention_unit": "group",
}
"""Settings of plans that leave nothing to be judged on held-out tokens, of which random statistics have none."""


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows: the first plan, and one at another ratio."""
    settings = config.benchmarks
    connect()
    with tempfile.TemporaryDirectory() as folder:
        source = sparse_checkpoint(Path(folder) / "base", SHAPES[settings.shape])
        pruning, checkpoint, run = large_run(source, Path(folder))

        def first() -> None:
            """Plan without norms on storage."""
            run.statistics("weight_norms").unlink(missing_ok=True)
            again()

        def again() -> None:
            """Plan with what is on storage."""
            planner = planner_of(pruning, checkpoint, run)
            planner.plan(next(spec for spec in model_specs(pruning) if spec.task), RATIO)

        # Once alone: a second time the weights would be in the page cache.
        first_seconds = alternate({"first": first}, 1, warm_up=False).median("first")
        timings = alternate({"again": again}, settings.rounds)
        statistics_bytes = sum(run.statistics(name).stat().st_size for name in (TASK, "weight_norms"))

    architecture = checkpoint.architecture
    columns = architecture.n_layers * sum(architecture.widths)
    # Norms are of the two output modules of every layer.
    weight_bytes = BFLOAT16_BYTES * architecture.hidden_size * columns
    shape = settings.shape.upper()
    bandwidth = memory_bandwidth()

    yield Row.of(
        SUITE,
        f"first plan of {shape} shape, with norms of {weight_bytes / 1e9:.1f} GB of weights",
        ours=first_seconds,
        unit="s",
        limit=weight_bytes / bandwidth,
        limit_name="weights at memory bandwidth",
    )

    yield Row.of(
        SUITE,
        f"a plan of {shape} shape at another ratio",
        baseline=first_seconds,
        ours=timings.median("again"),
        unit="s",
        ratios=[seconds / first_seconds for seconds in timings.seconds["again"]],
        limit=statistics_bytes / bandwidth,
        limit_name="statistics at memory bandwidth",
        target="ours <= 2",
    )


def large_run(source: Path, folder: Path, **sections: dict[str, object]) -> tuple[Config, Checkpoint, Run]:
    """Make a run of one task that is calibrated already, with random statistics.

    Args:
        source: Folder of the dense checkpoint.
        folder: Folder to put the run in.
        sections: More of the config, by section.
    """
    config = Config.model_validate(
        {
            "run": {"name": "run", "storage": str(folder)},
            "model": {"source": str(source), "dtype": "bfloat16"},
            "tasks": [TASK],
            "pruning": {"ratio": 0.5, **FIXED_SETTINGS, "general": {"score": "energy"}},
            **sections,
        }
    )
    checkpoint = Checkpoint.open(str(source))
    run = Run.of(config)
    save_moments(run.statistics(TASK), random_statistics(checkpoint.architecture))
    return config, checkpoint, run


def planner_of(config: Config, checkpoint: Checkpoint, run: Run) -> Planner:
    """Return the planner of a run of ``large_run``."""
    return make_planner(config, checkpoint, run, {TASK: run.statistics(TASK)}, held_out={})
