"""Checkpoint: a folder of safetensors. Open one, fingerprint it, read it tensor by tensor."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seap_ray.core.architecture import Architecture
from seap_ray.errors import ConfigError
from seap_ray.models.model_sources import ModelSource, parse_model_source
from seap_ray.storage.files import read_json

INDEX = "model.safetensors.index.json"
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Ends of names of tensors that old checkpoints, and NeoX's, hold and no model reads: they are no weights."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that can be cut, by the names that safetensors has for them."""
HASHED_WHOLE_BYTES = 1 << 26
"""Weight files up to this size are hashed whole, larger ones by their header and ``SAMPLED_BLOCKS``."""
SAMPLED_BLOCKS = 64
"""Blocks of a large file that are hashed."""
BLOCK_BYTES = 1 << 16
"""Size of such a block."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, and its safetensors dtype name and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, dense or cut already, opened without reading a weight."""

    folder: Path
    """This node's folder with the model's files."""
    config: dict[str, Any]
    """Content of config.json."""
    tensors: dict[str, TensorInfo]
    """Every weight by its name."""
    source: ModelSource

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> "Checkpoint":
        """Open a model that is to be pruned.

        Args:
            source: ``demo``, a local folder, a folder in a bucket (``s3://``, ``gs://``), or a hub id (``owner/name``).
            revision: Branch, tag or commit of a model of the hub.

        Returns:
            The checkpoint; a model of a bucket or the hub has been copied to this node.

        Raises:
            ConfigError: The model cannot be had or pruned; one line, which says why.
        """
        checkpoint = cls._fetch(parse_model_source(source, revision))
        checkpoint._check()
        return checkpoint

    @classmethod
    def _fetch(cls, source: ModelSource) -> "Checkpoint":
        return cls.at(source.fetch(), source)

    def __reduce__(self) -> tuple[Any, ...]:
        # It travels as its source, and the node that it comes to reads its own copy.
        return Checkpoint._fetch, (self.source.pinned(self.folder),)

    @classmethod
    def at(cls, folder: Path, source: ModelSource | None = None) -> "Checkpoint":
        """Open what is in a folder, whatever family it is of.

        Args:
            folder: A folder on a disk.
            source: Where the folder's content comes from; by default the folder itself.

        Raises:
            ConfigError: The folder holds no model in safetensors, or a damaged one.
        """
        source = source or parse_model_source(str(folder.absolute()))
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ConfigError(f"model.source: {folder} has no config.json")

        # Headers alone are read, which say where every tensor lies.
        tensors: dict[str, TensorInfo] = {}
        try:
            for file in _weight_files(folder, source):
                tensors |= _read_header(file)
        except SafetensorError as error:
            raise ConfigError(f"model.source: {folder}: weights cannot be read ({error})") from None

        weights = {name: info for name, info in tensors.items() if not name.endswith(BUFFERS)}
        return cls(folder, _read_json_object(config_path), weights, source)

    def _check(self) -> None:
        """Raise ConfigError where a module that is cut has no weight, or one of an unknown type."""
        for name in self._pruned_tensors():
            if name not in self.tensors:
                raise ConfigError(f"model.source: {self.folder} has no tensor {name}")
            if self.tensors[name].dtype not in DTYPES:
                raise ConfigError(f"model.source: {name} is {self.tensors[name].dtype}, not one of {', '.join(DTYPES)}")

    def _pruned_tensors(self) -> Iterator[str]:
        architecture = self.architecture
        for layer in range(architecture.n_layers):
            for module in architecture.modules.values():
                yield architecture.tensor(layer, module)

    @cached_property
    def architecture(self) -> Architecture:
        """What the model is made of. Raises ConfigError for a family that is not supported."""
        return Architecture.of(self.config)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(info.shape) for info in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(prod(info.shape) * DTYPES[info.dtype].itemsize for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the configuration and the weight files (a sample of each large one)."""
        # The same model has the same fingerprint in any folder, so paths are left out.
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        # Every file once, and in one order.
        for file in sorted({info.file for info in self.tensors.values()}):
            digest.update(_file_hash(file))

        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the type and shape that it is stored in."""
        with safe_open(self.tensors[name].file, "pt") as file:
            return file.get_tensor(name)

    def read_bias(self, layer: int, module: str) -> Tensor | None:
        """Read the bias of a layer's module, None where it has none."""
        name = self.architecture.tensor(layer, module, "bias")
        return self.read(name) if name in self.tensors else None


def _read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"model.source: {path} is truncated, or not a JSON object")
    return content


def _weight_files(folder: Path, source: ModelSource) -> list[Path]:
    """Return the files that the index names, or the one file of a small model. Raises ConfigError if one is missing."""
    index = folder / INDEX
    if index.is_file():
        # The index maps every tensor to its file, so that files come many times.
        names = set(_read_json_object(index).get("weight_map", {}).values())
        files = sorted(folder / name for name in names)
        if not files:
            raise ConfigError(f"model.source: {index} names no weight files")
    else:
        files = [folder / "model.safetensors"]

    for file in files:
        if not file.is_file():
            raise _missing_weights(file, source, has_index=index.is_file())
    return files


def _missing_weights(file: Path, source: ModelSource, *, has_index: bool) -> ConfigError:
    if list(file.parent.glob("pytorch_model*.bin")):
        return ConfigError(f"model.source: {source.name} holds pickled weights only; {source.convert_hint}")
    if source.is_copied and not has_index:  # pickled weights are not copied, so that they cannot be seen here
        return ConfigError(f"model.source: {source.name} has no model.safetensors; {source.convert_hint}")
    return ConfigError(f"model.source: {file} is missing")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            # A slice knows type and shape, and reads no data.
            stored = tensors.get_slice(name)
            infos[name] = TensorInfo(file, stored.get_dtype(), tuple(stored.get_shape()))
    return infos


def _file_hash(path: Path) -> bytes:
    """Hash a weight file whole if it is small, else its size, header and blocks evenly spread over it."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        if n_bytes <= HASHED_WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()

        digest = hashlib.sha256(str(n_bytes).encode())
        # A safetensors file begins with the length of its header, 8 bytes.
        header_length = struct.unpack("<Q", file.read(8))[0]
        digest.update(file.read(header_length))

        # The first block begins the file, the last one ends it.
        for i in range(SAMPLED_BLOCKS):
            file.seek((n_bytes - BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))

    return digest.digest()


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that a checkpoint or a record was made with."""
    return {name: version(name) for name in ("seap-ray", "torch", "transformers", "ray", "safetensors")}
