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

from benchmarks.calibrate import BATCH_TOKENS, SMALL, VOCABULARY, random_sequences
from benchmarks.merge import random_statistics
from benchmarks.shapes import SHAPES, sparse_checkpoint
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, write_tensors
from seap_ray.models.forward import record
from seap_ray.storage.paths import LocalPath

ROUNDS = 3
TABLE_ROWS = 14
LAYERS = 4


def calibrate(dtype: str = "float32") -> None:
    """Print the CPU milliseconds per 1,000 tokens of each operation, in one thread."""
    torch.set_num_threads(1)
    model = LlamaForCausalLM(SMALL).eval().to(getattr(torch, dtype))
    sequences = random_sequences(VOCABULARY)
    # The first run allocates and is not profiled.
    record(model, sequences, batch_tokens=BATCH_TOKENS)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(ROUNDS):
            record(model, sequences, batch_tokens=BATCH_TOKENS)

    # The profiler counts in microseconds: so many per token are as many milliseconds per 1,000 tokens.
    operations = sorted(((event.self_cpu_time_total, event.key) for event in profiled.key_averages()), reverse=True)
    n_tokens = ROUNDS * sum(map(len, sequences))
    print(f"{sum(us for us, _ in operations) / n_tokens:8.1f} all")
    for us, name in operations[:TABLE_ROWS]:
        print(f"{us / n_tokens:8.1f} {name}")


def compact() -> None:
    """Write four layers of 7B shape, half of their heads and channels at random, and print the rate."""
    with tempfile.TemporaryDirectory() as folder:
        shape = LlamaConfig.from_dict({**SHAPES["7b"].to_dict(), "num_hidden_layers": LAYERS})
        base = Checkpoint.open(str(sparse_checkpoint(Path(folder) / "base", shape)))
        kept = tuple(_random_half(base, seed=layer) for layer in range(LAYERS))
        plan = Plan("expert", 0.5, COMPENSATIONS["mean"], kept, {})
        export = CheckpointExport(base, plan, random_statistics(base.architecture))
        # The first round reads the sparse file, the others its pages.
        for i in range(ROUNDS):
            out = Path(folder) / str(i)
            out.mkdir()
            started = time.perf_counter()
            for name, outputs in export.files(10**10).items():  # all in one file
                write_tensors(export, outputs, LocalPath(out / name))
            seconds = time.perf_counter() - started
            print(f"{sum(file.stat().st_size for file in out.iterdir()) / seconds / 1e6:.0f} MB/s")


def _random_half(base: Checkpoint, seed: int) -> Kept:
    """Choose half of a layer's heads and channels."""
    dense = base.architecture.dense
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randperm(dense.heads, generator=generator)[: dense.heads // 2].sort().values
    channels = torch.randperm(dense.channels, generator=generator)[: dense.channels // 2].sort().values
    # Llama-2-7B has as many groups as heads.
    return Kept(tuple(heads.tolist()), tuple(heads.tolist()), (tuple(channels.tolist()),))


if __name__ == "__main__":
    {"calibrate": calibrate, "compact": compact}[sys.argv[1]](*sys.argv[2:])
