"""Compact: a dense tensor and what is kept of its layer in, the smaller tensor out. Pure arithmetic.

Letters: O output features, D input columns of ``o_proj`` or ``down_proj``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seap_ray.plan import Kept

ROWS = {
    "self_attn.q_proj": "heads",
    "self_attn.k_proj": "groups",
    "self_attn.v_proj": "groups",
    "mlp.gate_proj": "channels",
    "mlp.up_proj": "channels",
}
"""Modules whose rows (and biases) are cut, and the unit that they are made of."""
COLUMNS = {"self_attn.o_proj": "heads", "mlp.down_proj": "channels"}
"""Modules whose weight's columns are cut; their own bias stays whole."""


def kept_indices(kept: Kept, unit: str, head_dim: int) -> Tensor:
    """Row or column indices, int64, of the kept units."""
    units = torch.tensor(getattr(kept, unit), dtype=torch.int64)
    if unit == "channels":
        return units
    return (units[:, None] * head_dim + torch.arange(head_dim)).flatten()


def compact(module: str, kind: str, tensor: Tensor, kept: Kept, head_dim: int) -> Tensor:
    """The kept part of a decoder layer's tensor, contiguous; tensors of other modules come back as they are."""
    if module in ROWS:
        return tensor.index_select(0, kept_indices(kept, ROWS[module], head_dim))
    if module in COLUMNS and kind == "weight":
        return tensor.index_select(1, kept_indices(kept, COLUMNS[module], head_dim))
    return tensor


def compact_size(module: str, kind: str, shape: Sequence[int], kept: Kept, head_dim: int) -> tuple[int, ...]:
    """Shape of what ``compact`` returns, without a tensor."""
    if module in ROWS:
        return (_n(kept, ROWS[module], head_dim), *shape[1:])
    if module in COLUMNS and kind == "weight":
        return (shape[0], _n(kept, COLUMNS[module], head_dim))
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
