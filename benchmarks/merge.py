"""Merge: a task's records of a large model's size, merged; beside reading the same bytes.

Eight records are written, the others are hard links to them.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, alternate, memory_bandwidth
from benchmarks.shapes import SHAPES
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import RECORDED, Moments, Statistics
from seap_ray.models.records import save_moments, sites_of
from seap_ray.pipeline.merge import TaskStatistics, merge_moments
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.run import Run

SUITE, DISTINCT = "merge", 8


def rows(config: Config) -> Iterator[Row]:
    settings = config.benchmarks
    architecture = Architecture.of(SHAPES[settings.shape].to_dict())
    calibration = Calibration("model", "torch.bfloat16", skip_first_token=False, batch_tokens=4096)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        records = ShardRecords(calibration, run, architecture)
        shards = [Shard("sort", f"{i:05d}", 1, 1000, str(i)) for i in range(settings.records)]
        paths = [records.path(shard) for shard in shards]
        for i, path in enumerate(paths[:DISTINCT]):
            save_moments(path, random_statistics(architecture, seed=i))
        for i, path in enumerate(paths[DISTINCT:]):
            os.link(paths[i % DISTINCT], path)
        record_bytes, merged = paths[0].stat().st_size, run.statistics("sort")

        def merge() -> None:
            merged.unlink(missing_ok=True)
            merge_moments(TaskStatistics(records, shards, merged))

        def read() -> None:
            for path in paths:
                path.read_bytes()

        with peak_memory() as peak:
            merge()
        found = alternate({"read": read, "merge": merge}, settings.rounds)
    n_bytes = len(paths) * record_bytes
    name = f"{len(paths)} records of {settings.shape.upper()} shape, {n_bytes / 1e9:.1f} GB"
    yield Row.of(
        SUITE,
        name,
        baseline=n_bytes / found.median("read") / 1e9,
        ours=n_bytes / found.median("merge") / 1e9,
        unit="GB/s",
        ratios=found.speedups("merge", "read"),
        limit=memory_bandwidth() / 1e9,
        limit_name="memory bandwidth",
    )
    yield Row.of(
        SUITE,
        f"memory for {name}",
        baseline=float(len(paths)),
        ours=peak[0] / record_bytes,
        unit="records",
        ratios=[peak[0] / n_bytes],
        target="ours <= 4",
        why="an allocator that keeps pages counts, too, and a record of a small model is little beside them",
    )


def random_statistics(architecture: Architecture, seed: int = 0) -> Statistics:
    """Moments of 1,000 tokens at every site of a dense model."""
    generator = torch.Generator().manual_seed(seed)
    attn, mlp = architecture.widths
    widths = {"attn": attn, "mlp": mlp, "block": 1}
    made: dict[Any, Moments] = {}
    for layer, site in sites_of(architecture, RECORDED):
        mean_D, m2_D = torch.rand(2, widths[site], generator=generator, dtype=torch.float64)
        made[layer, site] = Moments(1000, mean_D, m2_D * 1000)
    return made


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes of this process above what it had before, in a list of one; pages of files are the kernel's."""
    done, before, peak = threading.Event(), private_bytes(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], private_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def private_bytes(process: int | str = "self") -> int:
    """Bytes of a process that are no file's."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
