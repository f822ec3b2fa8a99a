"""python -m benchmarks.scaling [shards=64] [seconds=2]

How calibration scales over nodes: the model only sleeps, so that eight nodes fit this machine, on real raylets with
one CPU each, through the job's own Ray Data pipeline and to real records. From when all workers are
there to the last record, against the sleep alone; and the driver's own CPU time, for as many tokens and for four times.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.cluster_utils import Cluster

from seap_ray.config import Config
from seap_ray.core.moments import RECORDED, Moments
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.recorder import SiteMoments
from seap_ray.models.records import sites_of
from seap_ray.pipeline import calibrate
from seap_ray.pipeline.calibrate import Calibrator, make_records
from seap_ray.pipeline.cluster import connect_driver
from seap_ray.pipeline.shard_records import ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.run import Run

WORKERS = (1, 2, 4, 8)
TOKENS = 1000
"""Tokens of a shard."""
TASK = "sort"
SLEEP_VARIABLE = "SLEEP_S"
"""Environment variable that says how long a shard takes."""


class Sleeper(Calibrator):
    """A calibrator that takes a shard's time, and leaves a record of the demo's size."""

    def __init__(self, config: Config, records: ShardRecords):
        self.records = records
        self.architecture = records.architecture
        self.seconds = float(os.environ[SLEEP_VARIABLE])
        self.runner = self  # it has the one method of a runner

        # Time counts from when all workers are there: each leaves a file, and waits for the others'.
        root = Path(str(records.run.root))
        (root / f"worker-{os.getpid()}").touch()
        while len(list(root.glob("worker-*"))) < int(config.calibration.workers):
            time.sleep(0.01)

    def record(self, shards: Mapping[str, Any]) -> Iterator[tuple[str, SiteMoments]]:
        """Sleep for every shard, and yield moments of its number of tokens."""
        attn, mlp = self.architecture.widths
        widths = {"attn": attn, "mlp": mlp, "block": 1}
        for name, sequences in shards.items():
            time.sleep(self.seconds)
            n_tokens = sum(map(len, sequences))
            moments: SiteMoments = {}
            for layer, site in sites_of(self.architecture, RECORDED):
                ones_D = torch.ones(widths[site], dtype=torch.float64)
                moments[layer, site] = Moments(n_tokens, ones_D, ones_D.clone())
            yield name, moments


def main(n_shards: int, seconds: float) -> None:
    """Measure every number of workers on one cluster, and print the results as JSON."""
    os.environ[SLEEP_VARIABLE] = str(seconds)
    # The pipeline finds the class by its name in the module.
    calibrate.Calibrator = Sleeper  # type: ignore[misc]
    report = {}
    with raylets(max(WORKERS)), tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            run_folder = Path(folder) / str(workers)
            report[f"{workers} workers"] = _measure(run_folder, n_shards, seconds, workers, TOKENS)
        run_folder = Path(folder) / "more-tokens"
        report["8 workers, four times the tokens"] = _measure(run_folder, n_shards, seconds, 8, 4 * TOKENS)

    print(json.dumps(report, indent=2))


@contextmanager
def raylets(n: int) -> Iterator[None]:
    """Start a cluster of nodes with one CPU each, beside a head that does no work, and connect to it."""
    os.environ["RAY_worker_niceness"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(n):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        connect_driver()
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def _measure(folder: Path, n_shards: int, seconds: float, workers: int, tokens: int) -> dict[str, float]:
    """Make all records of a run, and return seconds, efficiency and the driver's CPU time."""
    values: Any = {"run": {"storage": str(folder)}, "calibration": {"workers": workers}}
    config = Config.model_validate(values)
    run = Run.of(config)
    records = ShardRecords.of(config, Checkpoint.open("demo"), run)
    shards = [_write_shard(run, i, tokens) for i in range(n_shards)]
    before = _cpu_seconds()
    make_records(config, records, shards, lambda steps, *_: steps, n_merged=0)
    driver = _cpu_seconds() - before

    # Files say when the last worker came, and when the last record was there.
    started = max(path.stat().st_mtime for path in Path(str(run.root)).glob("worker-*"))
    ended = max(path.stat().st_mtime for path in Path(str(run.records(TASK))).glob("*.safetensors"))
    # Rounds of all workers, the last one perhaps not full.
    ideal = -(-n_shards // workers) * seconds
    return {"seconds": ended - started, "efficiency": ideal / (ended - started), "driver's CPU seconds": driver}


def _cpu_seconds() -> float:
    return sum(psutil.Process().cpu_times()[:2])


def _write_shard(run: Run, number: int, tokens: int) -> Shard:
    """Write a shard of one sequence."""
    # The hash is known once the file is written.
    shard = Shard(TASK, f"{number:05d}", 1, tokens, "")
    path = Path(str(shard.path(run)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"ids": pa.array([[1] * tokens], pa.list_(pa.int32()))}), path)
    return Shard(TASK, shard.shard, 1, tokens, digest_of_file(path))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64, float(sys.argv[2]) if len(sys.argv) > 2 else 2.0)
