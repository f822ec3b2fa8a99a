"""Checkpoint: a folder of safetensors. Open one, fingerprint it, read it tensor by tensor."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from seap_ray.storage.files import read_json, stage
from seap_ray.storage.paths import StoragePath, is_uri, parse_path

INDEX = "model.safetensors.index.json"
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "generation_config.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files of the base model that go with every expert."""
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Ends of the names of what old checkpoints, and NeoX's, hold and no model reads: they are no weights."""
MODEL_FILES = ("*.safetensors", "*.json", *CARRIED)
"""Files of a model that are copied from the hub or a bucket."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONVERT = (
    'convert it: python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
    "[of.from_pretrained('{0}').save_pretrained('FOLDER') for of in (AutoModelForCausalLM, AutoTokenizer)]\""
)
SAMPLED = 1 << 26
"""Weight files up to this many bytes are hashed whole, larger ones by their header and 64 blocks."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, and its safetensors dtype name and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, dense or compacted already, opened without reading a weight."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    source: str
    """As a config names it: ``demo``, a folder, a URI, or a hub id."""
    revision: str | None = None

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> "Checkpoint":
        """Open ``demo``, a local folder or a hub id. Raises ConfigError, one line, for what cannot be pruned."""
        checkpoint = cls._named(source, revision)
        checkpoint._check()
        return checkpoint

    @classmethod
    def _named(cls, source: str, revision: str | None) -> "Checkpoint":
        folder = _folder(source, revision)
        is_named = source == "demo" or is_uri(source) or not parse_path(source).is_dir()
        # Another process may have another current folder.
        return replace(cls.at(folder, source if is_named else str(folder)), revision=revision)

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels as its name, and the node that it comes to reads its own copy."""
        # The hub's cache holds a model under snapshots/<commit>: what is asked for there is the same here.
        revision = self.folder.name if self.folder.parent.name == "snapshots" else self.revision
        return Checkpoint._named, (self.source, revision)

    @classmethod
    def at(cls, folder: Path, source: str | None = None) -> "Checkpoint":
        """What is in a folder, whatever family it is of. Raises ConfigError where it holds no safetensors model."""
        source = source or str(folder.absolute())
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ConfigError(f"model.source: {folder} has no config.json")
        try:
            found = (one for file in _weight_files(folder, source) for one in _infos(file))
            tensors = {name: info for name, info in found if not name.endswith(BUFFERS)}
        except SafetensorError as error:
            raise ConfigError(f"model.source: {folder}: weights cannot be read ({error})") from None
        return cls(folder, _json_object(config_path), tensors, source)

    def _check(self) -> None:
        architecture = self.architecture
        for layer in range(architecture.n_layers):
            for module in architecture.modules.values():
                name = architecture.tensor(layer, module)
                if name not in self.tensors:
                    raise ConfigError(f"model.source: {self.folder} has no tensor {name}")
                if self.tensors[name].dtype not in DTYPES:
                    raise ConfigError(
                        f"model.source: {name} is {self.tensors[name].dtype}, not one of {', '.join(DTYPES)}"
                    )

    @property
    def is_copy(self) -> bool:
        """Whether every node has a copy of its own, from the hub or a bucket."""
        return self.source != "demo" and parse_path(self.source).absolute() != self.folder

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.of(self.config)

    @property
    def parameters(self) -> int:
        return sum(prod(info.shape) for info in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Of the weights."""
        return sum(prod(info.shape) * DTYPES[info.dtype].itemsize for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the configuration and the weight files (a sample of each large one)."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({info.file for info in self.tensors.values()}):
            digest.update(_file_hash(file))
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        with safe_open(self.tensors[name].file, "pt") as file:
            return file.get_tensor(name)

    def read_bias(self, layer: int, module: str) -> Tensor | None:
        name = self.architecture.tensor(layer, module, "bias")
        return self.read(name) if name in self.tensors else None


def _folder(source: str, revision: str | None) -> Path:
    if source == "demo":
        return Path(__file__).parents[1] / "demo" / "model"
    path = parse_path(source)
    if path.is_remote:
        return _copied(path)
    if path.is_dir():
        return path.absolute()
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"model.source: {source} is no folder with a model, no hub id (owner/name) and not `demo`")
    return _download(source, revision)


def _copied(source: StoragePath) -> Path:
    try:
        return stage(source, MODEL_FILES)
    except FileNotFoundError:
        raise ConfigError(f"model.source: {source} holds no model") from None
    except OSError as error:
        raise ConfigError(f"model.source: {source} cannot be copied to this node ({error})") from None


@cache  # the hub is asked once by each process
def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(MODEL_FILES)))
    except RepositoryNotFoundError:
        raise ConfigError(f"model.source: the hub has no model {source} that your token may read") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.source: {source} is no local folder, and the hub did not give it ({reason})"
        ) from None


def _json_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"model.source: {path} is torn, or no JSON object")
    return value


def _weight_files(folder: Path, source: str) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        files = sorted({folder / name for name in _json_object(index).get("weight_map", {}).values()})
        if not files:
            raise ConfigError(f"model.source: {index} names no weight files")
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            if list(folder.glob("pytorch_model*.bin")):
                raise ConfigError(f"model.source: {source} holds pickled weights only; {CONVERT.format(source)}")
            if not index.is_file() and parse_path(source).absolute() != folder:  # a copy has nothing that is pickled
                how = "convert a copy on a disk" if is_uri(source) else CONVERT.format(source)
                raise ConfigError(f"model.source: {source} has no model.safetensors; {how}")
            raise ConfigError(f"model.source: {file} is missing")
    return files


def _infos(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            yield name, TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))


def _file_hash(path: Path) -> bytes:
    size, block = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLED:
            return hashlib.file_digest(file, "sha256").digest()
        digest.update(file.read(struct.unpack("<Q", file.read(8))[0]))
        for i in range(64):
            file.seek((size - block) * i // 63)
            digest.update(file.read(block))
    return digest.digest()


@cache
def versions() -> dict[str, str]:
    """Versions that a checkpoint or a record was made with."""
    return {name: version(name) for name in ("seap-ray", "torch", "transformers", "ray", "safetensors")}
