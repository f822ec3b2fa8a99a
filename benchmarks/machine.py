"""Machine: what one thread does in a second, measured: products, passes over memory, files, calls."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import linear, scaled_dot_product_attention

from seap_ray.core.moments import Moments
from seap_ray.core.ridge_regression import factor_in_place, solve_rows
from seap_ray.models.records import read_moments

FRESH_PAGES_BYTES = 32 << 20
"""Size from which glibc has an array's pages from the kernel each time; it may keep those of smaller ones."""
ARRAY_BYTES = (1 << 18, 1 << 23, 1 << 26)
"""Sizes of arrays in the core's cache, in the socket's, in memory."""
SEQUENCE = 512
"""Tokens of a sequence, and the size of a head, of the attention that is measured."""
HEAD_DIM = 64


@dataclass(frozen=True)
class Machine:
    """What one worker, a thread or a GPU, does in a second."""

    flops: float
    """FLOP of products of matrices."""
    attention: float
    """FLOP of causal attention, the half that is not masked."""
    factored: float
    """FLOP of a Cholesky factor, float32."""
    solved: float
    """FLOP of triangular solves of rows, float32."""
    passes: tuple[float, ...]
    """Bytes that an elementwise pass reads and writes, for each of ``ARRAY_BYTES``."""
    faults: float
    """Bytes of new pages that the kernel maps and clears."""
    read: float
    """Bytes of a safetensors file in the page cache, mapped and read once."""
    write: float
    """Bytes of a file that is copied."""
    hashed: float
    """Bytes, BLAKE3."""
    gathered: float
    """Elements picked from columns by their indices."""
    sorted: float
    """Elements, float64."""
    opened: float
    """Files of one tensor."""
    listed: float
    """Tensors in the header of a file that is opened."""
    got: float
    """Moments of one column from an open file."""
    added: float
    """Sums of two Moments of one column."""
    calls: float
    """Operations of torch on one element."""

    def over(self, elements: float, moved: float, new: float = 0, itemsize: float = 8) -> float:
        """Return the seconds of passes that move ``moved`` bytes an element, ``new`` of them in arrays just made."""
        n_bytes = itemsize * elements
        # The measured size that is nearest to this one, as a ratio.
        nearest = min(range(len(ARRAY_BYTES)), key=lambda i: abs(math.log(ARRAY_BYTES[i] / n_bytes)))
        faulting = new / self.faults if n_bytes >= FRESH_PAGES_BYTES else 0
        return elements * (moved / self.passes[nearest] + faulting)

    def in_blocks(self, read: float, moved: float) -> float:
        """Return the seconds of an element that is read once from memory, and passed over in a cache."""
        return read / self.passes[-1] + moved / self.passes[0]


def measure_machine(folder: Path) -> Machine:
    """Measure one thread here; files lie in ``folder``."""
    side = 2048
    size = ARRAY_BYTES[-1]
    x_ND = torch.randn(side, side)
    positive_DD = torch.addmm(torch.eye(side), x_ND, x_ND.T, alpha=1 / side)
    factor_DD = factor_in_place(positive_DD.clone())
    odd = torch.arange(0, side, 2).numpy()
    blocks = [block_ND.numpy() for block_ND in x_ND.split(128)]
    q_BHTD = torch.randn(4, 16, SEQUENCE, HEAD_DIM)
    arrays = [torch.rand(n // 8, dtype=torch.float64) for n in ARRAY_BYTES]
    out = torch.empty_like(arrays[-1])
    scalar = torch.ones(1)
    moments = Moments(1, torch.ones(1), torch.zeros(1))

    large = folder / "large"
    small = folder / "small"
    copy = folder / "copy"
    save_file({"x": torch.rand(size // 4)}, large)
    names = [f"layers.{i}.attn.{part}" for i in range(80) for part in ("mean", "m2", "count")]
    save_file({name: torch.ones(1) for name in names}, small)
    weights, records = (safe_open(path, "pt").__enter__() for path in (large, small))

    # Small arrays are squared more often, so that every measurement takes some milliseconds.
    squares = [
        usual_seconds(lambda x: torch.square(x, out=out[: len(x)]), x, calls=1 + size // 64 // len(x)) for x in arrays
    ]
    opening = usual_seconds(lambda: safe_open(large, "pt").get_tensor("x"), calls=100)
    listing = usual_seconds(lambda: safe_open(small, "pt").get_tensor("layers.0.attn.m2"), calls=100) - opening

    return Machine(
        flops=2 * side**3 / usual_seconds(linear, x_ND, x_ND),
        attention=2
        * q_BHTD.numel()
        * SEQUENCE
        / usual_seconds(lambda: scaled_dot_product_attention(q_BHTD, q_BHTD, q_BHTD, is_causal=True)),
        factored=side**3 / 3 / usual_seconds(lambda: factor_in_place(positive_DD.clone())),
        solved=2 * side**3 / usual_seconds(lambda: solve_rows(x_ND, factor_DD)),
        passes=tuple(2 * n / seconds for n, seconds in zip(ARRAY_BYTES, squares, strict=True)),
        faults=size / (usual_seconds(torch.square, arrays[-1]) - squares[-1]),
        read=size / usual_seconds(lambda: weights.get_tensor("x").sum()),
        write=size / usual_seconds(lambda: shutil.copyfile(large, without(copy))),
        hashed=size / usual_seconds(blake3, out.view(torch.uint8).numpy().data),
        gathered=side**2 / 2 / usual_seconds(lambda: [block.take(odd, axis=1) for block in blocks]),
        sorted=len(arrays[0]) / usual_seconds(lambda: arrays[0].sort(stable=True)),
        opened=1 / opening,
        listed=(len(names) - 1) / listing,
        got=1 / usual_seconds(read_moments, records, (7, "attn"), calls=100),
        added=1 / usual_seconds(Moments.__add__, moments, moments, calls=100),
        calls=1 / usual_seconds(torch.add, scalar, scalar, calls=1000),
    )


def usual_seconds(work: Callable[..., Any], *arguments: Any, rounds: int = 15, calls: int = 1) -> float:
    """Return the seconds of a call, the median of some rounds: a stage of many seconds has no luck either."""
    ends = [time.process_time()]
    for _ in range(rounds):
        for _ in range(calls):
            work(*arguments)
        ends.append(time.process_time())
    return median(after - before for before, after in pairwise(ends)) / calls


def without(path: Any) -> Any:
    """Remove a file, so that it is made anew, and return its path."""
    path.unlink(missing_ok=True)
    return path
