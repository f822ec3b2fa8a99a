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

from benchmarks.gpu.decoding import ALLOCATIONS, RATIOS, as_graph
from benchmarks.gpu.device import DEVICE, DTYPE, SIZES, Ceilings, gpu_row, median_seconds
from benchmarks.measure import Row
from benchmarks.shapes import shapes_of
from seap_ray.core.architecture import Shape

ALIGNMENT = 256
"""Numbers that memory is given out in: 512 bytes of bfloat16."""
Size = tuple[int, int]
"""Rows and columns of a weight."""


def linears_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield all products of a model's layers and nothing else, dense and cut by every ratio, allocation and tile."""
    name, config = next(iter(SIZES.models.items()))
    cases = {"dense": weight_sizes(config, shapes_of(config, 0, "uniform"))}
    for ratio, kind, align in itertools.product(RATIOS, ALLOCATIONS, SIZES.aligns):
        shapes = shapes_of(config, ratio, kind, align)
        cases[f"{ratio:.0%} {kind}, align {align}"] = weight_sizes(config, shapes)

    # The dense model's weights are the largest, so that all cases fit.
    pool = torch.empty(_pool_size(cases["dense"]), device=DEVICE, dtype=DTYPE).normal_()
    for B in (SIZES.decoding[0], SIZES.decoding[-1]):
        seconds = {case: median_seconds(products_step(pool, sizes, B)) for case, sizes in cases.items()}
        for case, sizes in cases.items():
            n_bytes = sum(math.prod(size) for size in sizes) * DTYPE.itemsize
            yield gpu_row(
                f"linear layers of {name} at batch {B}, {case}",
                ours=1e3 * seconds[case],
                baseline=1e3 * seconds["dense"],
                unit="ms",
                ratios=[seconds["dense"] / seconds[case]],
                limit=1e3 * n_bytes / ceilings.bytes_per_s,
                limit_name="reading weights at the speed of a copy",
            )


def weight_sizes(config: LlamaConfig, shapes: Sequence[Shape]) -> list[Size]:
    """Return the sizes of the weights of all layers, with those joined that an engine joins."""
    hidden = config.hidden_size
    head_dim = config.hidden_size // config.num_attention_heads
    sizes: list[Size] = []

    for shape in shapes:
        # Queries, keys and values; output; gate and up; down.
        sizes += [
            ((shape.heads + 2 * shape.groups) * head_dim, hidden),
            (hidden, shape.heads * head_dim),
            (2 * shape.channels, hidden),
            (hidden, shape.channels),
        ]

    return sizes


def products_step(pool: Tensor, sizes: Sequence[Size], B: int) -> Callable[[], object]:
    """Return a step of products of ``B`` rows with weights that lie one behind the other in ``pool``.

    So each weight is read from memory: none is in a cache from the product before.
    """
    weights: list[Tensor] = []
    first = 0
    for size in sizes:
        weights.append(pool[first : first + math.prod(size)].view(size))
        first += _pool_size([size])

    inputs = {columns: torch.randn(B, columns, device=DEVICE, dtype=DTYPE) for _, columns in sizes}

    def step() -> None:
        """Multiply with every weight."""
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return as_graph(step, weights, inputs)


def _pool_size(sizes: Sequence[Size]) -> int:
    """Return the numbers that weights take, each at an address as an allocation of its own has it."""
    return sum(-(-math.prod(size) // ALIGNMENT) * ALIGNMENT for size in sizes)
