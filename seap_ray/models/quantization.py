"""Quantisation: a cut model in, the same with the weights of its decoder layers as integers out.

Every linear module of a decoder layer is rounded by itself, as it comes from cut and repair, against the moments of
what it multiplies: nothing is run. Names, packing and ``quantization_config`` are those of compressed-tensors, which
vLLM and transformers read.

Letters: O output features, D input columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from seap_ray.config import QuantizationSection
from seap_ray.core.families import Family
from seap_ray.core.inputs import INPUTS, input_modules
from seap_ray.core.moments import Covariance, Site
from seap_ray.core.rounding import ErrorFeedback, IntegerGrid, gptq
from seap_ray.core.slicing import kept_indices
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import DTYPES
from seap_ray.models.export import CheckpointExport, OutputTensor

INTEGER_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""Types of codes, packed codes and shapes, by the names that safetensors has for them."""


class Covariances(Protocol):
    """Covariances by (layer, site)."""

    def __getitem__(self, key: tuple[int, Site], /) -> Covariance:
        """Return the covariance of one (layer, site)."""
        ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a quantised weight is made of."""

    bits: int
    """Bits of a code."""
    is_symmetric: bool = True
    """Whether there are no zero points."""
    has_groups: bool = False
    """Whether some columns of an output have a scale, and not all of them one."""
    rounds_activations: bool = False
    """Whether engines round a module's input to as many bits."""

    @property
    def is_packed(self) -> bool:
        """Whether several codes share an integer of 32 bits. Engines that multiply integers want them single."""
        return not self.rounds_activations


SCHEMES = {
    "w4a16": Scheme(4, has_groups=True),
    "w4a16_asym": Scheme(4, is_symmetric=False, has_groups=True),
    "w8a16": Scheme(8),
    "w8a8": Scheme(8, rounds_activations=True),
}
"""Schemes by their names in the configuration."""


@dataclass(frozen=True, slots=True)
class StoredTensor(OutputTensor):
    """A part of a quantised weight, or any other tensor of its checkpoint."""

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * (DTYPES | INTEGER_DTYPES)[self.dtype].itemsize


def require_compressed_tensors() -> None:
    """Raise ConfigError where the package that knows the format is not installed."""
    if find_spec("compressed_tensors") is None:
        raise ConfigError(
            "export.quantization: needs the package compressed-tensors, which comes with vLLM: pip install "
            "'seap-ray[quantization]'"
        )


@dataclass(frozen=True)
class QuantizedExport(CheckpointExport):
    """A compacted checkpoint whose decoder layers have weights of integers, before it is written."""

    settings: QuantizationSection = QuantizationSection()
    """Scheme and group, nothing left open, and how weights are rounded."""
    covariances: Covariances | None = None
    """Those of the inputs of output modules, by which GPTQ rounds; None: every weight is rounded to nearest."""
    inputs: Covariances | None = None
    """Those of the inputs of all other modules, by (layer, ``INPUTS``)."""

    @property
    def scheme(self) -> Scheme:
        """What the weights are made of."""
        return SCHEMES[self.settings.scheme or ""]

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None: all of an output."""
        return int(self.settings.group) if self.scheme.has_groups else None

    @property
    def memory_factor(self) -> int:
        """Memory of a task that writes it, in units of what one layer's covariances need."""
        return max(super().memory_factor, int(self.covariances is not None))

    def outputs(self) -> list[OutputTensor]:
        """Return every tensor of the checkpoint, in the base's order."""
        outputs: list[OutputTensor] = []
        for output in self.unquantized_outputs():
            outputs += self._parts(output) if self._is_rounded(output) else [output]
        return outputs

    def _is_rounded(self, output: OutputTensor) -> bool:
        """Return whether a tensor is a weight that is rounded: those of all linear modules of decoder layers are."""
        layer, module, kind = self.base.architecture.split(output.name)
        return layer is not None and kind == "weight" and _is_linear(self.base.architecture.family, module)

    def _parts(self, weight: OutputTensor) -> list[OutputTensor]:
        """Return what is stored of a weight, in the order of names."""
        n_outputs, n_columns = weight.shape
        n_groups = n_columns // (self.columns or n_columns)
        scale = StoredTensor(f"{weight.name}_scale", weight.dtype, (n_outputs, n_groups))
        if not self.scheme.is_packed:
            return [StoredTensor(weight.name, "I8", weight.shape), scale]

        # Codes that do not fill the last integer of a row leave it half empty.
        n_packed = -(-n_columns * self.scheme.bits // 32)
        parts: list[OutputTensor] = [
            StoredTensor(f"{weight.name}_packed", "I32", (n_outputs, n_packed)),
            scale,
            StoredTensor(f"{weight.name}_shape", "I64", (2,)),
        ]
        if not self.scheme.is_symmetric:
            n_rows = -(-n_outputs * self.scheme.bits // 32)
            parts.append(StoredTensor(f"{weight.name}_zero_point", "I32", (n_rows, n_groups)))
        return parts

    def pieces(self, output: OutputTensor) -> Iterator[Tensor]:
        """Return the data of a tensor: of a part of a quantised weight in one piece."""
        layer, module, kind = self.base.architecture.split(output.name)
        if layer is None or not _is_linear(self.base.architecture.family, module):
            return super().pieces(output)
        return iter([self.rounded(layer, module)[kind]])

    def rounded(self, layer: int, module: str) -> dict[str, Tensor]:
        """Return all that is stored of a layer's linear module, by the ends of names; its bias, too, if it has one."""
        # The parts of a module come one after another.
        if (layer, module) not in self._rounded_memo:
            rounded = self._round(layer, module)
            self._rounded_memo.clear()
            self._rounded_memo[layer, module] = rounded
        return self._rounded_memo[layer, module]

    @cached_property
    def _rounded_memo(self) -> dict[tuple[int, str], dict[str, Tensor]]:
        """Parts of the module that was rounded last."""
        # The export is frozen; what it remembers changes inside this dict.
        return {}

    def _round(self, layer: int, module: str) -> dict[str, Tensor]:
        weight_OD = self._tensor(layer, module, "weight")
        bias_O = self._tensor(layer, module, "bias") if self._has_bias(layer, module) else None
        grid = IntegerGrid.of(
            weight_OD,
            bits=self.scheme.bits,
            columns=self.columns,
            is_symmetric=self.scheme.is_symmetric,
            scale_dtype=weight_OD.dtype,
        )
        if self.covariances is None or self.inputs is None:
            codes_OD = grid.codes(weight_OD)
        else:
            feedback, mean_D = self._input(layer, module, has_bias=bias_O is not None)
            codes_OD = gptq(weight_OD, grid, feedback)
            if bias_O is not None:
                # A bias takes up what the errors are in the mean.
                error_OD = weight_OD.double() - grid.values(codes_OD, torch.float64)
                bias_O = (bias_O.double() + error_OD @ mean_D).to(bias_O)

        parts = self._stored(codes_OD, grid)
        return parts if bias_O is None else parts | {"bias": bias_O}

    def _tensor(self, layer: int, module: str, kind: str) -> Tensor:
        """Return a tensor of a module after cut and repair."""
        output = self._unquantized[self.base.architecture.tensor(layer, module, kind)]
        return torch.cat([*super().pieces(output)])

    def _has_bias(self, layer: int, module: str) -> bool:
        return self.base.architecture.tensor(layer, module, "bias") in self._unquantized

    @cached_property
    def _unquantized(self) -> dict[str, OutputTensor]:
        """Tensors of the checkpoint without quantisation, by name."""
        return {output.name: output for output in self.unquantized_outputs()}

    def _input(self, layer: int, module: str, *, has_bias: bool) -> tuple[ErrorFeedback, Tensor]:
        """Return how errors go on among the columns of a module's input, and the columns' means, (D,), float64."""
        architecture = self.base.architecture
        family = architecture.family
        old_layer = self.plan.layers[layer]
        if module in family.columns:
            site = "attn" if module == family.o_proj else "mlp"
            kept_S = kept_indices(self.plan.kept[layer], family.columns[module], architecture.head_dim)
            return _feedback(self._of_outputs[old_layer, site], kept_S, has_bias=has_bias)

        (site,) = (site for site in INPUTS if module in input_modules(family)[site])
        # The modules of an input have one feedback. Those of a layer come one after another.
        key = (old_layer, site, has_bias)
        if key not in self._feedback_memo:
            if any(other != old_layer for other, _, _ in self._feedback_memo):
                self._feedback_memo.clear()
            self._feedback_memo[key] = _feedback(self._of_inputs[old_layer, site], None, has_bias=has_bias)
        return self._feedback_memo[key]

    @property
    def _of_outputs(self) -> Covariances:
        assert self.covariances is not None
        return self.covariances

    @property
    def _of_inputs(self) -> Covariances:
        assert self.inputs is not None
        return self.inputs

    @cached_property
    def _feedback_memo(self) -> dict[tuple[int, Site, bool], tuple[ErrorFeedback, Tensor]]:
        """Feedback of the inputs of the layer that was asked for last."""
        return {}

    def _stored(self, codes_OD: Tensor, grid: IntegerGrid) -> dict[str, Tensor]:
        """Return codes, scales and zero points as compressed-tensors stores them, by the ends of names."""
        if not self.scheme.is_packed:
            return {"weight": codes_OD, "weight_scale": grid.scale_OG}

        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        parts = {
            "weight_packed": pack_to_int32(codes_OD, grid.bits),
            "weight_scale": grid.scale_OG,
            "weight_shape": torch.tensor(codes_OD.shape),
        }
        if not self.scheme.is_symmetric:
            parts["weight_zero_point"] = pack_to_int32(grid.zero_OG, grid.bits, packed_dim=0)
        return parts

    def _is_carried(self, output: OutputTensor) -> bool:
        """Return whether a tensor is the base's own. In a quantised module none is."""
        _, module, _ = self.base.architecture.split(output.name)
        return not _is_linear(self.base.architecture.family, module) and super()._is_carried(output)

    def config(self) -> dict[str, Any]:
        """Return the content of the checkpoint's ``config.json``."""
        return super().config() | {"quantization_config": self.quantization_config()}

    def quantization_config(self) -> dict[str, Any]:
        """Return what tells engines how to read the weights."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        weights = {"num_bits": self.scheme.bits, "type": "int", "symmetric": self.scheme.is_symmetric}
        strategy = {"strategy": "group", "group_size": self.columns} if self.columns else {"strategy": "channel"}
        activations = None
        if self.scheme.rounds_activations:
            # Scales are those of the token at hand, so nothing is stored.
            activations = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)

        file_format = "pack-quantized" if self.scheme.is_packed else "int-quantized"
        group = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights, **strategy),
            input_activations=activations,
            format=file_format,
        )
        config: dict[str, Any] = QuantizationConfig(
            config_groups={"group_0": group},
            format=file_format,
            quantization_status="compressed",
            ignore=self._linear_outside(),
        ).model_dump(mode="json")
        return config

    def _linear_outside(self) -> list[str]:
        """Return the linear modules outside of the decoder layers, which stay as they are."""
        architecture = self.base.architecture
        # transformers calls every family's head lm_head, whatever checkpoints call it.
        modules = dict.fromkeys(["lm_head", architecture.family.head.removesuffix(".weight")])
        for name, info in self.base.tensors.items():
            # A matrix that is no embedding, such as OPT's projections between widths.
            if architecture.split(name)[0] is None and len(info.shape) == 2 and "embed" not in name:
                modules[name.removesuffix(".weight")] = None
        return [*modules]


def _is_linear(family: Family, module: str) -> bool:
    """Return whether a module of a decoder layer is a linear one."""
    return module in family.rows or module in family.columns


def _feedback(covariance: Covariance, kept_S: Tensor | None, *, has_bias: bool) -> tuple[ErrorFeedback, Tensor]:
    """Return the feedback among some columns of an input, None for all, and their means.

    Where a bias takes up the mean of the error, its variance is what is left; without one its mean square counts.
    """
    mean_S = covariance.mean_D
    moments_SS = covariance.covariance_DD
    if kept_S is not None:
        mean_S = mean_S[kept_S]
        moments_SS = moments_SS[kept_S[:, None], kept_S]
    if not has_bias:
        moments_SS = moments_SS.addr(mean_S.to(moments_SS), mean_S.to(moments_SS))
    return ErrorFeedback.of(moments_SS), mean_S
