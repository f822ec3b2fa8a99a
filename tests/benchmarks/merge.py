"""python tests/benchmarks/merge.py [records=1000] [7b|70b]

The merge of a task's records at the size of a large model: seconds, bytes per second, peak memory; beside reading the
same bytes. Eight records are written, the others are hard links to them.
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from layerwise import private, watch
from shapes import SHAPES

from seap_ray.architecture import Architecture
from seap_ray.calibrate import Calibration, merge_records
from seap_ray.moments import RECORDED, Moments
from seap_ray.records import save_moments, sites_of
from seap_ray.run import Run
from seap_ray.shards import Shard

DISTINCT = 8


def main(n: int, shape: str) -> None:
    architecture = Architecture.of(SHAPES[shape].to_dict())
    calibration = Calibration("model", "torch.bfloat16", skip_first_token=False, batch_tokens=4096)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        shards = [Shard("sort", f"{i:05d}", 1, 1000, str(i)) for i in range(n)]
        paths = [calibration.record(run, shard) for shard in shards]
        for i, path in enumerate(paths[:DISTINCT]):
            save_moments(path, _statistics(architecture, seed=i))
        for i, path in enumerate(paths[DISTINCT:]):
            os.link(paths[i % DISTINCT], path)
        size, out = paths[0].stat().st_size, run.statistics("sort")
        before, peak, done = private(), [0], threading.Event()
        thread = threading.Thread(target=watch, args=(peak, done))
        thread.start()
        started = time.perf_counter()
        merge_records(calibration, run, shards, architecture, out)
        merging = time.perf_counter() - started
        done.set()
        thread.join()
        started = time.perf_counter()
        for path in paths:
            path.read_bytes()
        reading = time.perf_counter() - started
    print(
        json.dumps(
            {
                "records": n,
                "bytes of a record": size,
                "seconds": merging,
                "bytes per second": n * size / merging,
                "reading alone, bytes per second": n * size / reading,
                "peak in records": (peak[0] - before) / size,
            },
            indent=2,
        )
    )


def _statistics(architecture: Architecture, seed: int) -> dict[Any, Moments]:
    generator = torch.Generator().manual_seed(seed)
    attn, mlp = architecture.widths
    widths = {"attn": attn, "mlp": mlp, "block": 1}
    made = {}
    for layer, site in sites_of(architecture, RECORDED):
        mean_D, m2_D = torch.rand(2, widths[site], generator=generator, dtype=torch.float64)
        made[layer, site] = Moments(1000, mean_D, m2_D)
    return made


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, sys.argv[2] if len(sys.argv) > 2 else "70b")
