"""Where the time of calibration and export goes.

    python -m benchmarks.profiles calibrate [bfloat16]       a table by operation, of torch's profiler
    py-spy record -t -o compact.svg -- python -m benchmarks.profiles compact       a flame graph

With PYTHONPATH=FOLDER, another checkout's.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.calibrate import BATCH_TOKENS, MODELS, random_sequences
from benchmarks.merge import random_statistics
from benchmarks.shapes import SHAPES, sparse_checkpoint
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, write_tensors
from seap_ray.models.forward import record

ROUNDS, ROWS = 3, 14


def calibrate(dtype: str = "float32") -> None:
    """CPU milliseconds per 1,000 tokens, in one thread."""
    torch.set_num_threads(1)
    model, sequences = LlamaForCausalLM(MODELS[512]).eval().to(getattr(torch, dtype)), random_sequences(4096)
    record(model, sequences, batch_tokens=BATCH_TOKENS)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(ROUNDS):
            record(model, sequences, batch_tokens=BATCH_TOKENS)
    found = sorted(((one.self_cpu_time_total, one.key) for one in profiled.key_averages()), reverse=True)
    thousands = ROUNDS * sum(map(len, sequences))
    print(f"{sum(us for us, _ in found) / thousands:8.1f} all")
    for us, name in found[:ROWS]:
        print(f"{us / thousands:8.1f} {name}")


def compact() -> None:
    """Four layers of 7B shape, half of their heads and channels at random."""
    with tempfile.TemporaryDirectory() as folder:
        shape = LlamaConfig.from_dict({**SHAPES["7b"].to_dict(), "num_hidden_layers": 4})
        base = Checkpoint.open(str(sparse_checkpoint(Path(folder) / "base", shape)))
        plan = Plan("expert", 0.5, COMPENSATIONS["mean"], tuple(_half(base, layer) for layer in range(4)), {})
        export = CheckpointExport(base, plan, random_statistics(base.architecture))
        for i in range(ROUNDS):
            out, started = Path(folder) / str(i), time.perf_counter()
            out.mkdir()
            for name, outputs in export.files(10**10).items():
                write_tensors(export, outputs, out / name)
            seconds = time.perf_counter() - started
            print(f"{sum(file.stat().st_size for file in out.iterdir()) / seconds / 1e6:.0f} MB/s")


def _half(base: Checkpoint, seed: int) -> Kept:
    whole, generator = base.architecture.dense, torch.Generator().manual_seed(seed)
    heads, channels = (
        tuple(sorted(torch.randperm(n, generator=generator)[: n // 2].tolist())) for n in (whole.heads, whole.channels)
    )
    return Kept(heads, heads, (channels,))


if __name__ == "__main__":
    {"calibrate": calibrate, "compact": compact}[sys.argv[1]](*sys.argv[2:])
