"""Compact: a tensor and what is kept of its layer in, the smaller tensor out. Pure arithmetic.

Letters: O output features, D input columns of ``o_proj`` or ``down_proj`` (by whatever name of the family).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seap_ray.core.architecture import Architecture, Rows, Shape, expert_of
from seap_ray.core.moments import BLOCK
from seap_ray.core.plan import Kept


def kept_indices(kept: Kept, unit: str, head_dim: int) -> Tensor:
    """Row or column indices, int64, of the kept units."""
    units = torch.tensor(getattr(kept, unit), dtype=torch.int64)
    if unit == "channels":
        return units
    return (units[:, None] * head_dim + torch.arange(head_dim)).flatten()


def row_indices(rows: Rows, kept: Kept, given: Shape, head_dim: int) -> Tensor:
    """Indices, int64, of the kept rows of a module."""
    blocks, start = [], 0
    for unit in rows.units:
        width = rows.times * (1 if unit == "channels" else head_dim)
        units = torch.tensor(getattr(kept, unit), dtype=torch.int64)
        blocks.append(start + (units[:, None] * width + torch.arange(width)).flatten())
        start += getattr(given, unit) * width
    return torch.cat(blocks)


PIECE = 1 << 20
"""Bytes of a piece of a tensor: it is in a cache until it is written, and malloc has the same memory for the next."""


def compact(
    architecture: Architecture, layer: int, module: str, kind: str, tensor: Tensor, kept: Kept
) -> Iterator[Tensor]:
    """The kept part of a decoder layer's tensor in pieces of some rows; of other modules, all of it.

    Rows that go are never read. One after another the pieces are the tensor.
    """
    match _cut(architecture, layer, module, kind, kept):
        case None:
            yield from in_pieces(tensor)
        case 0, rows:
            yield from (tensor.index_select(0, some) for some in rows.split(_rows_of_a_piece(tensor)))
        case 1, columns:
            yield from (_take(some, columns) for some in in_pieces(tensor))


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, some rows at a time."""
    yield from tensor.split(_rows_of_a_piece(tensor))


def _rows_of_a_piece(tensor: Tensor) -> int:
    return max(1, PIECE * len(tensor) // max(1, tensor.nbytes))


def _take(tensor_OD: Tensor, columns: Tensor) -> Tensor:
    """Some columns. NumPy picks them in half of torch's time, but knows no bfloat16: its bits are as good."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor_OD.itemsize]
    taken = tensor_OD.view(bits).numpy().take(columns.numpy(), axis=1)
    return torch.from_numpy(taken).view(tensor_OD.dtype)


def _cut(architecture: Architecture, layer: int, module: str, kind: str, kept: Kept) -> tuple[int, Tensor] | None:
    """Dimension and indices of what stays of a decoder layer's tensor; None for all."""
    family, (module, expert) = architecture.layout, expert_of(module)
    kept = kept.of(expert)
    if module in family.rows:
        return 0, row_indices(family.rows[module], kept, architecture.layers[layer].shape, architecture.head_dim)
    if module in family.columns and kind == "weight":
        return 1, kept_indices(kept, family.columns[module], architecture.head_dim)
    return None


def compact_size(
    architecture: Architecture, module: str, kind: str, shape: Sequence[int], kept: Kept
) -> tuple[int, ...]:
    """Shape of what ``compact`` returns, without a tensor."""
    family, head_dim, (module, expert) = architecture.layout, architecture.head_dim, expert_of(module)
    kept = kept.of(expert)
    if module in family.rows:
        rows = family.rows[module]
        return (rows.times * sum(_n(kept, unit, head_dim) for unit in rows.units), *shape[1:])
    if module in family.columns and kind == "weight":
        return (shape[0], _n(kept, family.columns[module], head_dim))
    return tuple(shape)


def _n(kept: Kept, unit: str, head_dim: int) -> int:
    return len(getattr(kept, unit)) * (1 if unit == "channels" else head_dim)


def mean_bias(weight_OD: Tensor, mean_D: Tensor, kept_indices_: Tensor, bias_O: Tensor | None) -> Tensor:
    """Bias that stands for the cut columns: W_P mu_P, added to the module's own bias, in the weight's dtype.

    Computed in float64 from the unpruned weight: the optimal constant repair of what is cut.
    """
    is_cut_D = torch.ones(weight_OD.shape[1], dtype=torch.bool).index_fill(0, kept_indices_, False)
    cut_P = is_cut_D.nonzero().squeeze(1)  # indices: picking by a mask takes several times as long
    some_rows = weight_OD.split(max(1, BLOCK["cpu"] // weight_OD.shape[1]))
    bias = torch.cat([rows_OD.index_select(1, cut_P).double() @ mean_D[cut_P].double() for rows_OD in some_rows])
    if bias_O is not None:
        bias = bias + bias_O.double()
    return bias.to(weight_OD.dtype)
