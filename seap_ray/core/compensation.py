"""Compensation: what the output modules of a cut layer are given for the columns that they lose.

Each way is a small class: which tensors of a module it makes anew, which statistics it needs, and how much memory.
The configuration, plans on disk and manifests name a way by its string, a key of ``COMPENSATIONS``.

Letters: O output features, D input columns of ``o_proj`` or ``down_proj`` (by whatever name of the family), S kept and
P cut columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from seap_ray.core.moments import BLOCK, Covariance, Moments, Site
from seap_ray.core.reconstruction import least_squares, least_squares_without_bias

Required = Literal["moments", "covariance"]
"""Statistics that a way of compensation may need."""


class SiteMoments(Protocol):
    """Moments by (layer, site)."""

    def __getitem__(self, key: tuple[int, Site], /) -> Moments:
        """Return the moments of one (layer, site)."""
        ...


@runtime_checkable
class SiteCovariances(Protocol):
    """Covariances by (layer, site), each with the ridge that it needs."""

    def __getitem__(self, key: tuple[int, Site], /) -> Covariance:
        """Return the covariance of one (layer, site)."""
        ...

    def ridge_of(self, key: tuple[int, Site]) -> float:
        """Return the relative ridge for one (layer, site)."""
        ...


@dataclass(frozen=True, slots=True)
class OutputModule:
    """An ``o_proj`` or ``down_proj`` that loses input columns."""

    weight_OD: Tensor
    """The unpruned weight."""
    bias_O: Tensor | None
    """The module's own bias, if it has one."""
    kept_S: Tensor
    """Indices of the columns that stay, int64, ascending."""
    key: tuple[int, Site]
    """Layer and site of the module's input, by which its statistics are found."""
    may_have_bias: bool = True
    """Whether the module can be given a bias; an MoE expert's cannot, since the router weighs what it gives."""


class Compensation(Protocol):
    """A way to compensate the output modules of a cut layer."""

    name: ClassVar[str]
    """What the configuration and files on disk call it."""
    adds_biases: ClassVar[bool]
    """Whether cut layers get output biases."""
    replaces: ClassVar[tuple[str, ...]]
    """Tensors of a module, ``weight`` and ``bias``, that ``repaired`` makes, where the module may have them; the others
    are sliced."""
    required: ClassVar[Required | None]
    """Statistics that ``repaired`` reads."""
    memory_factor: ClassVar[int]
    """Memory of a task that writes such a checkpoint, in units of what one layer's covariances need."""

    def repaired(self, module: OutputModule, statistics: SiteMoments | SiteCovariances | None) -> dict[str, Tensor]:
        """Return the tensors that it ``replaces``, by kind, in the weight's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class NoCompensation:
    """What is cut counts as zero."""

    name: ClassVar[str] = "none"
    adds_biases: ClassVar[bool] = False
    replaces: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[Required | None] = None
    memory_factor: ClassVar[int] = 0

    def repaired(self, module: OutputModule, statistics: SiteMoments | SiteCovariances | None) -> dict[str, Tensor]:
        """Return nothing: weight and bias are sliced."""
        return {}


@dataclass(frozen=True, slots=True)
class MeanCompensation:
    """What is cut counts as its mean over the calibration tokens, which goes into the bias (``mean_bias``)."""

    name: ClassVar[str] = "mean"
    adds_biases: ClassVar[bool] = True
    replaces: ClassVar[tuple[str, ...]] = ("bias",)
    required: ClassVar[Required | None] = "moments"
    memory_factor: ClassVar[int] = 0

    def repaired(self, module: OutputModule, statistics: SiteMoments | SiteCovariances | None) -> dict[str, Tensor]:
        """Return the bias; ``statistics`` are moments.

        Raises:
            ValueError: There are no statistics.
        """
        if statistics is None:
            raise ValueError("compensation by the mean needs moments")
        mean_D = statistics[module.key].mean_D
        return {"bias": mean_bias(module.weight_OD, mean_D, module.kept_S, module.bias_O)}


@dataclass(frozen=True, slots=True)
class LeastSquares:
    """What is cut is predicted from what is kept, in the weight and the bias (``reconstruction.least_squares``)."""

    name: ClassVar[str] = "least_squares"
    adds_biases: ClassVar[bool] = True
    replaces: ClassVar[tuple[str, ...]] = ("weight", "bias")
    required: ClassVar[Required | None] = "covariance"
    memory_factor: ClassVar[int] = 1

    def repaired(self, module: OutputModule, statistics: SiteMoments | SiteCovariances | None) -> dict[str, Tensor]:
        """Return weight and bias; ``statistics`` are covariances with their ridges.

        Of a module that may have no bias the weight alone, as ``LeastSquaresWithoutBias``.

        Raises:
            ValueError: The statistics are no covariances.
        """
        if not module.may_have_bias:
            return LeastSquaresWithoutBias().repaired(module, statistics)

        covariance, ridge = _covariance(module, statistics)
        weight_OS, added_O = least_squares(covariance, module.weight_OD, module.kept_S, ridge=ridge)
        bias_O = added_O if module.bias_O is None else added_O + module.bias_O.double()
        # All is float64 up to here, and rounded once.
        dtype = module.weight_OD.dtype
        return {"weight": weight_OS.to(dtype), "bias": bias_O.to(dtype)}


@dataclass(frozen=True, slots=True)
class LeastSquaresWithoutBias:
    """What is cut is predicted from what is kept, in the weight alone (``least_squares_without_bias``).

    A module's own bias stays as it is.
    """

    name: ClassVar[str] = "least_squares_without_bias"
    adds_biases: ClassVar[bool] = False
    replaces: ClassVar[tuple[str, ...]] = ("weight",)
    required: ClassVar[Required | None] = "covariance"
    memory_factor: ClassVar[int] = 1

    def repaired(self, module: OutputModule, statistics: SiteMoments | SiteCovariances | None) -> dict[str, Tensor]:
        """Return the weight; ``statistics`` are covariances with their ridges.

        Raises:
            ValueError: The statistics are no covariances.
        """
        covariance, ridge = _covariance(module, statistics)
        weight_OS = least_squares_without_bias(covariance, module.weight_OD, module.kept_S, ridge=ridge)
        return {"weight": weight_OS.to(module.weight_OD.dtype)}


COMPENSATIONS: Mapping[str, Compensation] = {
    way.name: way for way in (NoCompensation(), MeanCompensation(), LeastSquares(), LeastSquaresWithoutBias())
}
"""Every way of compensation, by the string that plans and manifests have for it."""


def compensation_of(name: str, *, has_bias: bool) -> Compensation:
    """Return the way of compensation that the configuration names.

    Args:
        name: ``pruning.compensation``, nothing left open.
        has_bias: Whether a compensation may add biases (``pruning.bias``).

    Raises:
        ValueError: The compensation is nothing but a bias, and there may be none.
    """
    if has_bias or name == "none":
        return COMPENSATIONS[name]
    if name == "mean":
        raise ValueError("compensation by the mean is a bias")
    return COMPENSATIONS[f"{name}_without_bias"]


def _covariance(module: OutputModule, statistics: SiteMoments | SiteCovariances | None) -> tuple[Covariance, float]:
    """Return a module's covariance and ridge. Raises ValueError where the statistics are no covariances."""
    # A protocol that is checked at run time: only covariances come with ridges.
    if not isinstance(statistics, SiteCovariances):
        raise ValueError("compensation by least squares needs covariances")
    return statistics[module.key], statistics.ridge_of(module.key)


def mean_bias(weight_OD: Tensor, mean_D: Tensor, kept_S: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return the bias that stands for the cut columns: W_P mu_P, added to the module's own bias.

    This is the optimal constant repair of what is cut (FLAP, arXiv 2312.11983).

    Args:
        weight_OD: The unpruned weight, (O, D).
        mean_D: Mean of every input column over the calibration tokens, (D,), float64.
        kept_S: Indices of the columns that stay, int64.
        bias_O: The module's own bias, (O,), if it has one.

    Returns:
        The bias, (O,), computed in float64 and given in the weight's dtype.
    """
    is_cut_D = torch.ones(weight_OD.shape[1], dtype=torch.bool).index_fill(0, kept_S, False)
    cut_P = is_cut_D.nonzero().squeeze(1)  # indices: picking by a mask takes several times as long

    # Some rows at a time, so that no float64 copy of the whole weight is made.
    row_blocks = weight_OD.split(max(1, BLOCK["cpu"] // weight_OD.shape[1]))
    bias = torch.cat([rows_OD.index_select(1, cut_P).double() @ mean_D[cut_P].double() for rows_OD in row_blocks])

    if bias_O is not None:
        bias = bias + bias_O.double()
    return bias.to(weight_OD.dtype)
