"""Fused experts: tensors that hold those of all MoE experts of a layer, taken apart and put together. Pure arithmetic.

Everywhere else each MoE expert is seen with modules of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seap_ray.core.families import Family, FusedExperts


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tensor of an MoE expert's module lies in one that holds those of all."""

    fused: FusedExperts
    """What the other tensor is."""
    expert: int
    """Number of the MoE expert."""
    module: int
    """Number of the module among those that lie together."""

    def take(self, of_expert: Tensor) -> Tensor:
        """Return the module's tensor from all that the fused one holds of its expert."""
        rows = of_expert.mT if _is_transposed(self.fused, of_expert) else of_expert
        n_modules = len(self.fused.modules)
        return rows[self.module :: n_modules] if self.fused.alternates else rows.chunk(n_modules)[self.module]


def single_experts(family: Family, name: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], Place]]:
    """Return the tensors that another one holds of single MoE experts.

    Args:
        family: The model's family.
        name: Name of the other tensor.
        shape: Its shape, (experts, ...).

    Returns:
        Shape and place of each by its name; nothing for a tensor that holds no MoE experts, or has no such shape.
    """
    if not name.startswith(family.layers):
        return {}
    layer, _, stored = name.removeprefix(family.layers).partition(".")
    fused = family.fused_experts.get(stored)
    if fused is None or len(shape) != (3 if fused.kind == "weight" else 2):
        return {}

    n_experts, *of_expert = shape
    rows, *columns = reversed(of_expert) if fused.is_transposed else of_expert
    n_modules = len(fused.modules)
    if rows % n_modules:
        return {}

    single: dict[str, tuple[tuple[int, ...], Place]] = {}
    for expert in range(n_experts):
        for number, module in enumerate(fused.modules):
            of_module = f"{family.layers}{layer}.{module.format(e=expert)}.{fused.kind}"
            single[of_module] = ((rows // n_modules, *columns), Place(fused, expert, number))
    return single


def single_shapes(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by their names, those of single MoE experts in place of fused ones."""
    apart: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        single = single_experts(family, name, shape)
        apart |= {part: of_part for part, (of_part, _) in single.items()} if single else {name: shape}
    return apart


def joined(fused: FusedExperts, tensors: Sequence[Tensor]) -> Tensor:
    """Return what a fused tensor holds of one MoE expert, from the tensors of the expert's modules in their order."""
    rows = torch.stack(list(tensors), 1).flatten(0, 1) if fused.alternates else torch.cat(list(tensors))
    return rows.mT if _is_transposed(fused, rows) else rows


def fused_shape(fused: FusedExperts, n_experts: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a fused tensor whose modules have tensors of a shape each."""
    rows, *columns = shape
    of_expert = (rows * len(fused.modules), *columns)
    return (n_experts, *(reversed(of_expert) if fused.is_transposed else of_expert))


def _is_transposed(fused: FusedExperts, tensor: Tensor) -> bool:
    # A bias has rows alone.
    return fused.is_transposed and tensor.ndim > 1
