"""Merge: a task's records of a large model's size, merged; beside reading the same bytes.

Eight records are written, the others are hard links to them.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import Row, alternate, memory_bandwidth
from benchmarks.shapes import SHAPES
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import RECORDED, Moments, Site, Statistics
from seap_ray.models.records import save_moments, sites_of
from seap_ray.pipeline.merge import TaskStatistics, merge_moments
from seap_ray.pipeline.shard_records import Calibration, ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.paths import LocalPath
from seap_ray.storage.run import Run

SUITE = "merge"
DISTINCT = 8
"""Records that are files of their own."""
TASK = "sort"
SHARD_TOKENS = 1000
POLL_S = 0.02
"""Seconds between two looks at a process's memory."""


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows: rate and memory of one merge."""
    settings = config.benchmarks
    architecture = Architecture.of(SHAPES[settings.shape].to_dict())
    with tempfile.TemporaryDirectory() as folder:
        statistics = _write_records(Run(LocalPath(folder)), architecture, settings.records)
        paths = statistics.records.existing_paths(statistics.shards)
        record_bytes = paths[0].stat().st_size

        def merge() -> None:
            """Merge all records anew."""
            statistics.path.unlink(missing_ok=True)
            merge_moments(statistics)

        def read() -> None:
            """Read all records, as a merge does."""
            for path in paths:
                path.read_bytes()

        # The first merge is watched and not timed.
        with peak_memory() as peak:
            merge()
        timings = alternate({"read": read, "merge": merge}, settings.rounds)

    n_bytes = len(paths) * record_bytes
    name = f"{len(paths)} records of {settings.shape.upper()} shape, {n_bytes / 1e9:.1f} GB"
    yield Row.of(
        SUITE,
        name,
        baseline=n_bytes / timings.median("read") / 1e9,
        ours=n_bytes / timings.median("merge") / 1e9,
        unit="GB/s",
        ratios=timings.speedups("merge", "read"),
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


def _write_records(run: Run, architecture: Architecture, n_records: int) -> TaskStatistics:
    """Write a task's records, and return its statistics, which are to be merged from them."""
    calibration = Calibration("model", "torch.bfloat16", skip_first_token=False, batch_tokens=4096)
    records = ShardRecords(calibration, run, architecture)
    shards = [Shard(TASK, f"{i:05d}", 1, SHARD_TOKENS, str(i)) for i in range(n_records)]
    paths = [records.path(shard) for shard in shards]
    for i, path in enumerate(paths[:DISTINCT]):
        save_moments(path, random_statistics(architecture, seed=i))
    # A link is read like a file of its own, and takes no disk.
    for i, path in enumerate(paths[DISTINCT:]):
        os.link(paths[i % DISTINCT], path)
    return TaskStatistics(records, shards, run.statistics(TASK))


def random_statistics(architecture: Architecture, seed: int = 0) -> Statistics:
    """Return random moments of 1,000 tokens at every site of a dense model."""
    generator = torch.Generator().manual_seed(seed)
    attn, mlp = architecture.widths
    # The cosine of a layer is one column.
    widths = {"attn": attn, "mlp": mlp, "block": 1}
    statistics: dict[tuple[int, Site], Moments] = {}
    for layer, site in sites_of(architecture, RECORDED):
        mean_D, m2_D = torch.rand(2, widths[site], generator=generator, dtype=torch.float64)
        statistics[layer, site] = Moments(SHARD_TOKENS, mean_D, m2_D * SHARD_TOKENS)
    return statistics


# --- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Watch this process's memory inside the block.

    Yields:
        A list of one: the most bytes above what it had before. Pages of files are the kernel's, and do not count.
    """
    done = threading.Event()
    before = private_bytes()
    peak = [0]

    def watch() -> None:
        """Look again and again until the block ends."""
        while not done.wait(POLL_S):
            peak[0] = max(peak[0], private_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def private_bytes(process: int | str = "self") -> int:
    """Return the bytes of a process that are no file's."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
