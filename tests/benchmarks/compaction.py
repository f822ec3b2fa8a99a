"""python tests/benchmarks/compaction.py 7b|70b [ratio=0.5] [folder]

Plan and compaction at the shape of a large model, with the job's own Ray tasks: seconds of the first plan, of a plan at
another ratio, and of writing; bytes per second beside a plain copy; and the most memory that one process takes, beside
two decoder layers. The checkpoint is a sparse file of zeros and the statistics are random; what is written is written.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from shapes import SHAPES, sparse_checkpoint

from seap_ray.checkpoint import Checkpoint
from seap_ray.config import Config
from seap_ray.moments import RECORDED, Moments
from seap_ray.planner import make_planner, specs
from seap_ray.progress import progress
from seap_ray.prune import prune
from seap_ray.records import save_moments, sites_of
from seap_ray.run import Run


def main(shape: str, ratio: float, folder: Path) -> None:
    source = sparse_checkpoint(folder / "base", SHAPES[shape], max_bytes=5 * 10**9)
    config = Config.model_validate(
        {
            "run": {"name": "run", "storage": str(folder)},
            "model": {"source": str(source), "dtype": "bfloat16"},
            "tasks": ["sort"],
            "pruning": {"ratio": ratio, "general": {"score": "energy"}},
        }
    )
    checkpoint, run = Checkpoint.open(str(source)), Run.of(config)
    save_moments(run.statistics("sort"), _statistics(checkpoint))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    peak: dict[str, int] = {}
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, done))
    watch.start()
    planner: Any = None

    def plan() -> None:
        nonlocal planner
        planner = make_planner(config, checkpoint, run, {"sort": run.statistics("sort")})
        planner.plan(next(spec for spec in specs(config) if spec.task), ratio)

    found = {"first plan": _seconds(plan), "plan again": _seconds(plan)}
    drafts: list[Any] = []
    found["writing"] = _seconds(lambda: drafts.extend(prune(planner, run, lambda *a: progress(*a, unit="B"))))
    done.set()
    watch.join()
    written = [file for draft in drafts for file in draft.target.glob("*.safetensors")]
    n_bytes = sum(file.stat().st_size for file in written)
    copied = written[0]
    seconds = _seconds(lambda: (shutil.copy(copied, folder / "copy"), os.sync()))
    architecture = checkpoint.architecture
    print(
        json.dumps(
            {
                "models": len(drafts),
                "removed": drafts[0].compaction.plan.planned(architecture),
                **found,
                "bytes": n_bytes,
                "bytes per second": n_bytes / found["writing"],
                "plain copy, bytes per second": copied.stat().st_size / seconds,
                "two layers": 4 * architecture.layer_parameters(architecture.layers[0]),
                "most memory of a process": max(peak.values()),
            },
            indent=2,
        )
    )


def _statistics(checkpoint: Checkpoint) -> dict[Any, Moments]:
    generator = torch.Generator().manual_seed(0)
    attn, mlp = checkpoint.architecture.widths
    widths = {"attn": attn, "mlp": mlp, "block": 1}
    made = {}
    for layer, site in sites_of(checkpoint.architecture, RECORDED):
        mean_D, m2_D = torch.rand(2, widths[site], generator=generator, dtype=torch.float64)
        made[layer, site] = Moments(1000, mean_D, m2_D * 1000)
    return made


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _watch(peak: dict[str, int], done: threading.Event) -> None:
    """Most memory, but for pages of files, of this process and of each of Ray's workers."""
    me = psutil.Process()
    while not done.wait(0.05):
        for process in (me, *me.children(recursive=True)):
            try:
                name = "driver" if process is me else process.cmdline()[0]
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak[name] = max(peak.get(name, 0), int(status.split("RssAnon:")[1].split()[0]) * 1024)
            except (psutil.Error, OSError, IndexError):
                continue


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as temporary:
        main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.5, Path(temporary))
