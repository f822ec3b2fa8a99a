"""MXFP4 form: gpt-oss as it is published, its MoE experts in four bits; the same numbers in bfloat16 out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from seap_ray.core.families import FAMILIES
from seap_ray.errors import ConfigError
from seap_ray.models.conversion.rewritten_form import RewrittenForm
from seap_ray.models.model_sources import CONFIG_FILE
from seap_ray.storage.files import read_json, write_json

BLOCKS = "_blocks"
"""End of the name of a tensor with two 4-bit numbers in a byte, 32 numbers in a block."""
SCALES = "_scales"
"""End of the name of a tensor with the exponent of each block."""


def is_mxfp4(config: Any) -> bool:
    """Return whether the content of a config.json is that of a supported model with MoE experts in MXFP4."""
    if not isinstance(config, Mapping) or config.get("model_type") not in FAMILIES:
        return False
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def dequantised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json as the conversion of an MXFP4 model has it; of others the content itself."""
    return {key: value for key, value in config.items() if key != "quantization_config" or not is_mxfp4(config)}


@dataclass(frozen=True)
class Mxfp4Form(RewrittenForm):
    """A folder with MoE experts in MXFP4: they are dequantised, and all else is copied."""

    packages = ("transformers", "torch", "safetensors")

    @property
    def description(self) -> str:
        """What it is."""
        return "a model with experts in MXFP4, to be dequantised to bfloat16 of four times their size,"

    def convert(self, target: Path) -> None:
        """Write the tensors of each file, dequantised, one file at a time."""
        super().convert(target)
        write_json(target / CONFIG_FILE, dequantised_config(read_json(self.path / CONFIG_FILE)))

    def _read(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a file, blocks with their scales as one of numbers."""
        for name, tensor in super()._read(file):
            if name.endswith(BLOCKS):
                plain = name.removesuffix(BLOCKS)
                yield plain, _dequantised(tensor, self._find(plain + SCALES))
            elif not name.endswith(SCALES):
                yield name, tensor

    def _find(self, name: str) -> Tensor:
        """Read a tensor, whichever file it is in. Raises ConfigError if it is in none."""
        for file in self.weight_files():
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():
                    return tensors.get_tensor(name)
        raise ConfigError(f"model.source: {self.name} has no tensor {name}, without which MXFP4 is no numbers")


def _dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of a tensor of all MoE experts of a layer, bfloat16, as transformers computes them.

    Each is one of 16 times a power of two, which bfloat16 holds exactly.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # One expert at a time: on the way each number takes 8 bytes.
    experts = zip(blocks.split(1), scales.split(1), strict=True)
    return torch.cat([convert_moe_packed_tensors(block, scale, dtype=torch.bfloat16) for block, scale in experts])
