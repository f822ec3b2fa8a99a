"""Slicing: a tensor and what is kept of its layer in, the smaller tensor out. Pure arithmetic.

Letters: O output features, D input columns of ``o_proj`` or ``down_proj`` (by whatever name of the family).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seap_ray.core.architecture import Architecture, Shape, split_moe_expert
from seap_ray.core.families import Rows, Unit
from seap_ray.core.plan import Kept

PIECE_BYTES = 1 << 20
"""Bytes of a piece of a tensor: it is in a cache until it is written, and malloc has the same memory for the next."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by the bytes of an element."""


def slice_tensor(
    architecture: Architecture, layer: int, module: str, kind: str, tensor: Tensor, kept: Kept
) -> Iterator[Tensor]:
    """Yield the kept part of a decoder layer's tensor, some rows at a time; of a module that is not cut, all of it.

    Rows that go are never read.

    Args:
        architecture: The model before the cut.
        layer: The layer's number in it.
        module: The module's name inside the layer.
        kind: ``weight`` or ``bias``.
        tensor: The tensor before the cut.
        kept: What stays of the layer.

    Yields:
        Pieces of about ``PIECE_BYTES`` bytes; one below the other they are the sliced tensor.
    """
    if kept.experts and f"{module}.{kind}" in architecture.family.router:
        # Numbers beside the weights may have a dimension of one before that of the MoE experts.
        yield tensor.index_select(0 if kind == "weight" else -1, torch.tensor(kept.experts))
        return

    match _kept_of_dimension(architecture, layer, module, kind, kept):
        case None:
            yield from in_pieces(tensor)
        case 0, rows:
            yield from (tensor.index_select(0, indices) for indices in rows.split(_rows_of_a_piece(tensor)))
        case 1, columns:
            yield from (_take_columns(piece, columns) for piece in in_pieces(tensor))


def sliced_shape(
    architecture: Architecture, module: str, kind: str, shape: Sequence[int], kept: Kept
) -> tuple[int, ...]:
    """Return the shape of what ``slice_tensor`` yields in all, without a tensor.

    Args:
        architecture: The model before the cut.
        module: The module's name inside the layer.
        kind: ``weight`` or ``bias``.
        shape: Shape of the tensor before the cut.
        kept: What stays of the layer.

    Returns:
        The shape after the cut.
    """
    family = architecture.family
    if kept.experts and f"{module}.{kind}" in family.router:
        return (len(kept.experts), *shape[1:]) if kind == "weight" else (*shape[:-1], len(kept.experts))
    if f"{module}.{kind}" == family.sinks:
        return (len(kept.heads),)
    module, expert = split_moe_expert(module)
    kept = kept.of_moe_expert(expert)

    if rows := family.cut_rows.get(module):
        n_rows = rows.times * sum(_width(kept, unit, architecture.head_dim) for unit in rows.units)
        return (n_rows, *shape[1:])

    # An output module's own bias has no columns and stays whole.
    if module in family.columns and kind == "weight":
        return (shape[0], _width(kept, family.columns[module], architecture.head_dim))

    return tuple(shape)


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor some rows at a time, in pieces of about ``PIECE_BYTES`` bytes."""
    # A number by itself has no rows.
    rows = tensor if tensor.ndim else tensor.reshape(1)
    yield from rows.split(_rows_of_a_piece(rows))


def kept_indices(kept: Kept, unit: Unit, head_dim: int) -> Tensor:
    """Return the columns of the kept units, int64, ascending.

    Args:
        kept: What stays of a layer, with the channels of one MoE expert.
        unit: What the columns are made of.
        head_dim: Columns of a head or a group; a channel is one column.

    Returns:
        Indices, (kept columns,).
    """
    width = 1 if unit == "channels" else head_dim
    return _positions(kept, unit, width)


def row_indices(rows: Rows, kept: Kept, original: Shape, head_dim: int) -> Tensor:
    """Return the kept rows of a module, int64, ascending.

    Args:
        rows: What the module's rows are, block after block.
        kept: What stays of the layer, with the channels of one MoE expert.
        original: Widths of the layer before the cut.
        head_dim: Rows of a head or a group.

    Returns:
        Indices, (kept rows,).
    """
    blocks: list[Tensor] = []
    # First row of the block, in the module before the cut.
    start = 0
    for unit in rows.units:
        width = rows.times * (1 if unit == "channels" else head_dim)
        blocks.append(start + _positions(kept, unit, width))
        start += original.count(unit) * width
    return torch.cat(blocks)


def _positions(kept: Kept, unit: Unit, width: int) -> Tensor:
    """Return the positions of the kept units where each unit takes ``width`` of them."""
    units = torch.tensor(kept.units(unit), dtype=torch.int64)
    return (units[:, None] * width + torch.arange(width)).flatten()


def _width(kept: Kept, unit: Unit, head_dim: int) -> int:
    """Return how many positions the kept units take."""
    return len(kept.units(unit)) * (1 if unit == "channels" else head_dim)


def _kept_of_dimension(
    architecture: Architecture, layer: int, module: str, kind: str, kept: Kept
) -> tuple[int, Tensor] | None:
    """Return the dimension in which a layer's tensor is cut, and the indices that stay; None where it is not."""
    family = architecture.family
    if f"{module}.{kind}" == family.sinks:
        return 0, torch.tensor(kept.heads)
    module, expert = split_moe_expert(module)
    kept = kept.of_moe_expert(expert)

    if rows := family.cut_rows.get(module):
        return 0, row_indices(rows, kept, architecture.layers[layer].shape, architecture.head_dim)
    if module in family.columns and kind == "weight":
        return 1, kept_indices(kept, family.columns[module], architecture.head_dim)
    return None


def _rows_of_a_piece(tensor: Tensor) -> int:
    """Return how many rows make a piece, one at least."""
    # By the bytes of a mean row; a tensor without elements has none to divide by.
    return max(1, PIECE_BYTES * len(tensor) // max(1, tensor.nbytes))


def _take_columns(tensor_OD: Tensor, columns: Tensor) -> Tensor:
    """Return some columns. NumPy picks them in half of torch's time, but knows no bfloat16: its bits are as good."""
    bits = tensor_OD.view(BITS[tensor_OD.itemsize]).numpy()
    taken = bits.take(columns.numpy(), axis=1)
    return torch.from_numpy(taken).view(tensor_OD.dtype)
