"""python -m benchmarks.layerwise 7b|70b [tokens]

Calibration layer by layer at the shape of a large model: seconds per layer, and peak memory against what two layers,
the hidden states and the input embeddings take. The checkpoint is a sparse file of zeros, so that neither memory nor
disk limits the shape, and nothing is read from a real disk; the code is what a worker runs.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig

from benchmarks.shapes import SHAPES, sparse_checkpoint
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.layerwise import LayerwiseModel

SEQUENCE = 512


def main(shape: str, tokens: int) -> None:
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    config = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(str(sparse_checkpoint(Path(folder), config)))
        model = LayerwiseModel(checkpoint, torch.bfloat16, torch.device("cpu"), 1 << 40)
        sequences = torch.randint(config.vocab_size, (-(-tokens // SEQUENCE), SEQUENCE)).tolist()
        before, peak, done = private(), [0], threading.Event()
        thread = threading.Thread(target=watch, args=(peak, done))
        thread.start()
        ends = [time.perf_counter()]
        for _ in model.record({"shard": sequences}, batch_tokens=4 * SEQUENCE):
            ends.append(time.perf_counter())
            print(f"layer {len(ends) - 2}: {ends[-1] - ends[-2]:.1f} s", file=sys.stderr)
        done.set()
        thread.join()
    print(json.dumps({**_sizes(config, len(sequences) * SEQUENCE), **_times(ends), "peak": peak[0] - before}, indent=2))


def _sizes(config: LlamaConfig, tokens: int) -> dict[str, Any]:
    """Bytes, bfloat16."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = hidden // config.num_attention_heads
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = 2 * (attention + 3 * hidden * inner + 2 * hidden)
    return {
        "tokens": tokens,
        "layers": config.num_hidden_layers,
        "layer": layer,
        "model": layer * config.num_hidden_layers + 4 * hidden * config.vocab_size,
        "two layers": 2 * layer,
        "hidden states": 2 * tokens * hidden,
        "embeddings": 2 * config.vocab_size * hidden,
    }


def _times(ends: list[float]) -> dict[str, Any]:
    of_layers = sorted(after - before for before, after in zip(ends[1:], ends[2:], strict=False))
    return {"seconds": ends[-1] - ends[0], "seconds per layer": of_layers[len(of_layers) // 2]}


def private() -> int:
    """Bytes of this process that are no file's: pages of mapped files are the kernel's to drop."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def watch(peak: list[int], done: threading.Event) -> None:
    """Keep the most of them in ``peak`` until ``done``."""
    while not done.wait(0.02):
        peak[0] = max(peak[0], private())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2048)
