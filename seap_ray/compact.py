"""Compact: a tensor and what is kept of its layer in, the smaller tensor out. Pure arithmetic.

Letters: O output features, D input columns of ``o_proj`` or ``down_proj`` (by whatever name of the family).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seap_ray.architecture import Architecture, Rows, Shape, expert_of
from seap_ray.plan import Kept


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


def compact(architecture: Architecture, layer: int, module: str, kind: str, tensor: Tensor, kept: Kept) -> Tensor:
    """The kept part of a decoder layer's tensor, contiguous; tensors of other modules come back as they are."""
    family, (module, expert) = architecture.layout, expert_of(module)
    kept = kept.of(expert)
    if module in family.rows:
        rows = row_indices(family.rows[module], kept, architecture.layers[layer].shape, architecture.head_dim)
        return tensor.index_select(0, rows)
    if module in family.columns and kind == "weight":
        return tensor.index_select(1, kept_indices(kept, family.columns[module], architecture.head_dim))
    return tensor


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
    cut_D = torch.ones(weight_OD.shape[1], dtype=torch.bool)
    cut_D[kept_indices_] = False
    bias = weight_OD[:, cut_D].double() @ mean_D[cut_D].double()
    if bias_O is not None:
        bias = bias + bias_O.double()
    return bias.to(weight_OD.dtype)
