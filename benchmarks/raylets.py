"""python -m benchmarks.raylets [shards=8]

The cost model against calibrations by the job's own pipeline, with its real code: a Llama of 4 layers with random
weights in float32, its moments and covariances, on one raylet of one CPU and on two. Seconds are from when all workers
have the model to the last record. What a machine does in a second is measured first, in one thread; processors whose
cores share memory and clock do less beside each other.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.cost import (
    VOCABULARY,
    computing_seconds,
    covariance_seconds,
    save_model,
)
from benchmarks.machine import SEQUENCE, Machine, measure_machine
from benchmarks.scaling import raylets
from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline import calibrate
from seap_ray.pipeline.calibrate import Calibrator, make_records
from seap_ray.pipeline.needs import ModelSize, covariance_files_bytes
from seap_ray.pipeline.shard_records import ShardRecords
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.run import Run

WORKERS = (1, 2)
HIDDEN_SIZE = 1280
SEQUENCES = 4
"""Sequences of a shard."""
TASK = "random"


class Started(Calibrator):
    """A calibrator that begins when all workers have the model."""

    def __init__(self, config: Config, records: ShardRecords):
        super().__init__(config, records)
        root = Path(str(records.run.root))
        (root / f"worker-{os.getpid()}").touch()
        while len(list(root.glob("worker-*"))) < int(config.calibration.workers):
            time.sleep(0.01)


def main(n_shards: int) -> None:
    """Print seconds for every number of workers as JSON, predicted and measured."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        machine = measure_machine(Path(folder))
        checkpoint = save_model(HIDDEN_SIZE, Path(folder) / "base")

        # The pipeline finds the class by its name in the module.
        calibrate.Calibrator = Started  # type: ignore[misc]
        with raylets(max(WORKERS)):
            for workers in WORKERS:
                predicted = -(-n_shards // workers) * _shard_seconds(ModelSize.from_checkpoint(checkpoint), machine)
                measured = _measure(Path(folder) / str(workers), checkpoint, n_shards, workers)
                report[f"{workers} workers"] = {"predicted": predicted, "measured": measured}
    print(json.dumps(report, indent=2))


def _shard_seconds(model: ModelSize, machine: Machine) -> float:
    """Return the seconds of a shard: its tokens, and its covariances added up, hashed and written."""
    n_tokens = SEQUENCES * SEQUENCE
    n_bytes = covariance_files_bytes(model.architecture)
    storing = n_bytes * (1 / machine.hashed + 1 / machine.write)
    return n_tokens * (computing_seconds(model, machine, n_tokens) + covariance_seconds(model, machine)) + storing


def _measure(folder: Path, checkpoint: Checkpoint, n_shards: int, workers: int) -> float:
    """Make all records of a run, and return the seconds that files tell of."""
    values: dict[str, Any] = {
        "run": {"storage": str(folder)},
        "model": {"source": str(checkpoint.folder), "dtype": "float32"},
        "calibration": {
            "workers": workers,
            "num_cpus": 1,
            "statistics": "covariance",
            "batch_tokens": SEQUENCES * SEQUENCE,
        },
    }
    config = Config.model_validate(values)
    run = Run.of(config)
    records = ShardRecords.of(config, checkpoint, run)
    shards = [_write_shard(run, number) for number in range(n_shards)]
    make_records(config, records, shards, lambda steps, *_: steps, n_merged=0)

    started = max(path.stat().st_mtime for path in Path(str(run.root)).glob("worker-*"))
    ended = max(path.stat().st_mtime for path in Path(str(run.records(TASK))).rglob("*.safetensors"))
    return ended - started


def _write_shard(run: Run, number: int) -> Shard:
    """Write a shard of random sequences."""
    sequences = torch.randint(VOCABULARY, (SEQUENCES, SEQUENCE)).tolist()
    # The hash is known once the file is written.
    shard = Shard(TASK, f"{number:05d}", SEQUENCES, SEQUENCES * SEQUENCE, "")
    path = Path(str(shard.path(run)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"ids": pa.array(sequences, pa.list_(pa.int32()))}), path)
    return Shard(TASK, shard.shard, SEQUENCES, SEQUENCES * SEQUENCE, digest_of_file(path))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
