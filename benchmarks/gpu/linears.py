"""Linears: the products of a model's layers alone: what unequal layers and the tile of channels cost.

Letters: B rows.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import LlamaConfig

from benchmarks.gpu.decoding import ALLOCATIONS, RATIOS, graphed
from benchmarks.gpu.device import DEVICE, DTYPE, SIZES, Ceilings, row, seconds_of
from benchmarks.measure import Row
from benchmarks.shapes import shapes_of
from seap_ray.core.architecture import Shape


def linears_rows(of: Ceilings) -> Iterator[Row]:
    """All products of a model's layers and nothing else: what unequal layers and the tile of channels cost."""
    name, config = next(iter(SIZES.models.items()))
    cases = {"dense": products_of(config, shapes_of(config, 0, "uniform"))}
    for ratio, kind, align in itertools.product(RATIOS, ALLOCATIONS, SIZES.aligns):
        shapes = shapes_of(config, ratio, kind, align)
        cases[f"{ratio:.0%} {kind}, align {align}"] = products_of(config, shapes)
    pool = torch.empty(_taken(cases["dense"]), device=DEVICE, dtype=DTYPE).normal_()
    for B in (SIZES.decoding[0], SIZES.decoding[-1]):
        seconds = {case: seconds_of(linears(pool, sizes, B)) for case, sizes in cases.items()}
        for case, sizes in cases.items():
            yield row(
                f"linear layers of {name} at batch {B}, {case}",
                ours=1e3 * seconds[case],
                baseline=1e3 * seconds["dense"],
                unit="ms",
                ratios=[seconds["dense"] / seconds[case]],
                limit=1e3 * sum(math.prod(size) for size in sizes) * DTYPE.itemsize / of.bytes_per_s,
                limit_name="reading weights at the speed of a copy",
            )


def products_of(config: LlamaConfig, shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """Sizes of the weights of all layers, with those joined that an engine joins."""
    hidden, width = config.hidden_size, config.hidden_size // config.num_attention_heads
    return [
        size
        for shape in shapes
        for size in (
            ((shape.heads + 2 * shape.groups) * width, hidden),
            (hidden, shape.heads * width),
            (2 * shape.channels, hidden),
            (hidden, shape.channels),
        )
    ]


def linears(pool: Tensor, sizes: Sequence[tuple[int, int]], B: int) -> Callable[[], object]:
    """Products of ``B`` rows with weights one behind the other in ``pool``, each of which is read from memory."""
    weights, first = [], 0
    for size in sizes:
        weights.append(pool[first : first + math.prod(size)].view(size))
        first += _taken([size])
    inputs = {columns: torch.randn(B, columns, device=DEVICE, dtype=DTYPE) for _, columns in sizes}

    def step() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return graphed(step, weights, inputs)


def _taken(sizes: Sequence[tuple[int, int]]) -> int:
    """Numbers that weights take, each at an address of its own allocation: a multiple of 512 bytes."""
    return sum(-(-math.prod(size) // 256) * 256 for size in sizes)
