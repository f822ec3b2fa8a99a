"""Rewritten form: weights that are pickled or have trainers' names in; the same tensors as safetensors out."""

import pickle
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seap_ray.core.families import Family
from seap_ray.errors import ConfigError
from seap_ray.models.conversion.form import Form, family_of, refusing
from seap_ray.models.model_sources import (
    COMPANION_FILES,
    CONFIG_FILE,
    INDEX,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    WEIGHTS,
    indexed_files,
)
from seap_ray.storage.files import read_json, writable, write_json

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that torch.compile, FSDP and activation checkpointing put anywhere into names of tensors."""
PREFIXES = ("module.", "base_model.model.")
"""Beginnings of names that DataParallel, and a merged adapter, leave."""
NESTED_KEYS = ("state_dict", "model_state_dict", "module", "model")
"""Keys under which trainers keep the weights beside other things."""


@dataclass(frozen=True)
class RewrittenForm(Form):
    """A folder whose weights are pickled, or have trainers' prefixes: the same tensors are written anew."""

    is_pickled: bool = False
    """Whether weights are read from pickled files."""

    @property
    def description(self) -> str:
        """What it is."""
        return "a model in pickled files" if self.is_pickled else "a model whose tensors have other names"

    def weight_files(self) -> list[Path]:
        """Return the weight files that transformers loads. Raises ConfigError if one is missing."""
        whole = self.path / (PICKLED_WEIGHTS if self.is_pickled else WEIGHTS)
        index = self.path / (PICKLED_INDEX if self.is_pickled else INDEX)
        if whole.is_file():
            return [whole]

        files = indexed_files(index)
        for file in files:
            if not file.is_file():
                raise ConfigError(f"model.source: {file} is missing, which {index.name} names; copy it there")
        return files

    def inputs(self) -> list[Path]:
        """Return the weight files and all that goes with them."""
        return [*self.weight_files(), *self._companions()]

    def _companions(self) -> list[Path]:
        """Return the files beside the weights that belong to the model."""
        companions: set[Path] = set()
        for pattern in (CONFIG_FILE, *COMPANION_FILES):
            companions |= {file for file in self.path.glob(pattern) if file.is_file()}
        return sorted(companions)

    def convert(self, target: Path) -> None:
        """Write the tensors of each file under their plain names, one file at a time."""
        config = read_json(self.path / CONFIG_FILE)
        family = family_of(config)
        files = self.weight_files()
        names: dict[str, str] = {}

        for i, file in enumerate(files, 1):
            output = WEIGHTS if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
            with refusing(self, f"{file.name} cannot be read"):
                stored = dict(self._read(file))

            tensors = {plain_name(name, family): tensor for name, tensor in stored.items()}
            if len(tensors) < len(stored) or names.keys() & tensors.keys():
                raise ConfigError(f"model.source: {self.name}: two tensors have the same name but for a prefix")
            names |= dict.fromkeys(tensors, output)
            with writable(target):
                save_file(_separate(tensors), target / output, metadata={"format": "pt"})

        if len(files) > 1:
            write_json(target / INDEX, {"metadata": {}, "weight_map": names})
        for file in self._companions():
            with writable(target):
                shutil.copyfile(file, target / file.name)

    def _read(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a file. Raises ConfigError for one that holds something else."""
        if not self.is_pickled:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
            return

        content = _unpickled(file)
        for key in NESTED_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
        for name, value in content.items():
            if not isinstance(value, Tensor):
                raise ConfigError(f"model.source: {file}: {name} is no tensor; save the model's state_dict alone")
            yield name, value


def plain_name(name: str, family: Family | None) -> str:
    """Return the name of a tensor without what trainers put before it or into it.

    Args:
        name: As it is stored: ``_orig_mod.model.layers.0.mlp.up_proj.weight``, ``model.model.norm.weight``.
        family: The model's family; of an unknown one only words that no model has are taken away.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    plain = ".".join(parts)
    while plain.startswith(PREFIXES):
        plain = plain.removeprefix("module.").removeprefix("base_model.model.")

    if family is None:
        return plain
    # A model inside of another module of the same name has it twice.
    outer = family.layers.partition(".")[0] + "."
    while plain.startswith((outer + outer, f"{outer}lm_head.", f"{outer}embed_out.")):
        plain = plain.removeprefix(outer)

    # A decoder that was saved without its head has names without their beginning, as OPT's first checkpoints.
    inner = family.layers.removeprefix(outer)
    embedding = family.embedding.removeprefix(outer)
    inside = (inner, inner.removesuffix("layers."), embedding, "norm.", "final_layer_norm.")
    beginnings = tuple(beginning for beginning in inside if beginning)
    return outer + plain if plain.startswith(beginnings) else plain


def _unpickled(file: Path) -> Mapping[str, Any]:
    """Read a pickled file, weights and plain values alone. Raises ConfigError where it would have to run code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # The format of before torch 1.6 cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"model.source: {file} holds Python objects beside weights, and reading them would run code; save the "
            "model's state_dict alone, or the model by save_pretrained"
        ) from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"model.source: {file} is no dict of tensors; save the model's state_dict")
    return content


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        separate[name] = (
            tensor if is_whole and place not in seen else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(place)
    return separate
