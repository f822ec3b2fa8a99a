"""python -m benchmarks.layerwise 7b|70b [tokens]

Calibration layer by layer at the shape of a large model: seconds per layer, and peak memory against what two layers,
the hidden states and the input embeddings take. The checkpoint is a sparse file of zeros, so that neither memory nor
disk limits the shape, and nothing is read from a real disk; the code is what a worker runs.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig

from benchmarks.merge import peak_memory
from benchmarks.shapes import BFLOAT16_BYTES, SHAPES, sparse_checkpoint
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.layerwise import LayerwiseModel

SEQUENCE = 512
BATCH_SEQUENCES = 4
MEMORY_BUDGET = 1 << 40
"""Bytes that hidden states may take: all fit."""


def main(shape: str, tokens: int) -> None:
    """Record one shard, and print sizes, times and peak memory as JSON."""
    # Two threads of one core would share its units for products.
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    config = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(str(sparse_checkpoint(Path(folder), config)))
        model = LayerwiseModel(checkpoint, torch.bfloat16, torch.device("cpu"), MEMORY_BUDGET)
        # As many whole sequences as hold the tokens.
        n_sequences = -(-tokens // SEQUENCE)
        sequences = torch.randint(config.vocab_size, (n_sequences, SEQUENCE)).tolist()
        with peak_memory() as peak:
            # A model of one shard yields once a layer.
            ends = [time.perf_counter()]
            for _ in model.record({"shard": sequences}, batch_tokens=BATCH_SEQUENCES * SEQUENCE):
                ends.append(time.perf_counter())
                print(f"layer {len(ends) - 2}: {ends[-1] - ends[-2]:.1f} s", file=sys.stderr)

    print(json.dumps({**_sizes(config, n_sequences * SEQUENCE), **_times(ends), "peak": peak[0]}, indent=2))


def _sizes(config: LlamaConfig, tokens: int) -> dict[str, Any]:
    """Return the bytes of the model's parts in bfloat16."""
    hidden = config.hidden_size
    head_dim = hidden // config.num_attention_heads
    n_heads = config.num_attention_heads + (config.num_key_value_heads or config.num_attention_heads)
    # Queries and output are as wide as all heads, keys and values as the groups: each counts twice.
    attention = 2 * hidden * head_dim * n_heads
    mlp = 3 * hidden * config.intermediate_size
    norms = 2 * hidden
    layer = BFLOAT16_BYTES * (attention + mlp + norms)
    embeddings = BFLOAT16_BYTES * config.vocab_size * hidden

    return {
        "tokens": tokens,
        "layers": config.num_hidden_layers,
        "layer": layer,
        "model": layer * config.num_hidden_layers + 2 * embeddings,
        "two layers": 2 * layer,
        "hidden states": BFLOAT16_BYTES * tokens * hidden,
        "embeddings": embeddings,
    }


def _times(ends: list[float]) -> dict[str, Any]:
    """Return the seconds in all, and the median of a layer after the first, which waits for the embeddings."""
    per_layer = sorted(after - before for before, after in pairwise(ends[1:]))
    return {"seconds": ends[-1] - ends[0], "seconds per layer": per_layer[len(per_layer) // 2]}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2048)
