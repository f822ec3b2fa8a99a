"""Checkpoint: a folder of safetensors. Open one, check it, fingerprint it, read it tensor by tensor.

What is opened to be pruned is checked whole: every tensor that transformers would load is there, in the shape that
config.json declares. Whatever cannot be so is one line; nothing is filled up with random numbers.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seap_ray.core.architecture import Architecture
from seap_ray.core.families import FAMILIES
from seap_ray.core.fused_experts import Place, single_experts, single_shapes
from seap_ray.errors import ConfigError
from seap_ray.models.configurations import CONFIG_ERRORS, made_config, refused_config
from seap_ray.models.conversion.form import is_converted
from seap_ray.models.conversion.recognise import standard_folder
from seap_ray.models.model_sources import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    INDEX,
    WEIGHTS,
    ModelSource,
    indexed_files,
    parse_model_source,
    refuse_pointers,
)
from seap_ray.models.multimodal import KEY_MAPPING, language_config, multimodal_of, plain_name
from seap_ray.storage.files import read_json

BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Ends of names of tensors that old checkpoints, and NeoX's, hold and no model reads: they are no weights."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that can be cut, by the names that safetensors has for them."""
HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of a head, which may be the embedding."""
OTHER_WEIGHTS = {
    ".onnx": "an ONNX graph",
    ".h5": "weights of TensorFlow",
    ".msgpack": "weights of Flax",
    ".pth": "weights in the format of their makers",
    ".pt": "weights in the format of their makers",
    ".bin": "weights under another name",
    ".safetensors": "weights under another name",
    ".gguf": "GGUF files",
    ".npz": "weights of MLX",
}
"""What weights are that transformers does not load from a folder, by the end of their names."""
SAVE_HINT = "save the model that it was made from by transformers' save_pretrained"
"""What to do about weights that cannot be read."""
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
    stored_as: str
    """Its name in the file."""
    place: Place | None = None
    """Where it lies in that tensor, of which it is a part: one MoE expert's of all."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, dense or cut already, opened without reading a weight."""

    folder: Path
    """This node's folder with the model's files."""
    config: dict[str, Any]
    """Content of config.json; of a multimodal checkpoint its language model's, as ``language_config`` returns it."""
    tensors: dict[str, TensorInfo]
    """Every weight by its name; of a multimodal checkpoint its language model's by ``plain_name``. A tensor of all MoE
    experts of a layer is seen as those of each."""
    source: ModelSource
    files: tuple[Path, ...] = ()
    """The weight files, those that transformers loads."""
    surplus: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of tensors in the files that the model does not have; they are left out of ``tensors``."""
    whole_config: dict[str, Any] | None = None
    """Content of config.json where a language model is nested in it; None elsewhere."""

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> "Checkpoint":
        """Open a model that is to be pruned.

        Args:
            source: ``demo``, a local folder, a folder in a bucket (``s3://``, ``gs://``), a hub id (``owner/name``), or
                a GGUF file. Pickled weights, LoRA adapters and GGUF files are converted first.
            revision: Branch, tag or commit of a model of the hub.

        Returns:
            The checkpoint; a model of a bucket or the hub has been copied to this node.

        Raises:
            ConfigError: The model cannot be had or pruned; one line, which says why.
        """
        return cls._fetch(parse_model_source(source, revision))._checked()

    @classmethod
    def _fetch(cls, source: ModelSource, surplus: frozenset[str] = frozenset()) -> "Checkpoint":
        return cls.at(standard_folder(source), source)._without(surplus)

    def __reduce__(self) -> tuple[Any, ...]:
        # It travels as its source, and the node that it comes to reads its own copy.
        fetched = self.source.fetch() if is_converted(self.folder) else self.folder
        return Checkpoint._fetch, (self.source.pinned(fetched), self.surplus)

    def _without(self, surplus: frozenset[str]) -> "Checkpoint":
        tensors = {name: info for name, info in self.tensors.items() if name not in surplus}
        return replace(self, tensors=tensors, surplus=surplus)

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
        config_path = folder / CONFIG_FILE
        if not config_path.is_file():
            raise ConfigError(f"model.source: {folder} has no config.json")

        refuse_pointers(folder)
        files = _weight_files(folder, source)
        # Headers alone are read, which say where every tensor lies. Of two files with the same tensor the later one
        # counts, as in transformers.
        tensors: dict[str, TensorInfo] = {}
        try:
            for file in files:
                tensors |= _read_header(file)
        except SafetensorError as error:
            raise ConfigError(f"model.source: {folder}: weights cannot be read ({error})") from None

        weights = {name: info for name, info in tensors.items() if not name.endswith(BUFFERS)}
        config = _read_json_object(config_path)
        if multimodal_of(config) is None:
            return cls(folder, config, _taken_apart(config, weights), source, tuple(files))
        named = {plain_name(stored) or stored: info for stored, info in weights.items()}
        language = language_config(config)
        # Where nothing says it, transformers makes a head the embedding unless another one is stored.
        if config.get("tie_word_embeddings") is None and HEADS[0] in named:
            language["tie_word_embeddings"] = False
        return cls(folder, language, _taken_apart(language, named), source, tuple(files), whole_config=config)

    # --- what is checked ---------------------------------------------------------------------------------------------

    def _checked(self) -> "Checkpoint":
        """Return the checkpoint with the tensors alone that the model has.

        Raises ConfigError, one line, where transformers would load something else than what is pruned, or nothing: a
        tensor is missing, or has another shape than config.json declares, or a type that cannot be cut.
        """
        self._refuse_ambiguous()
        # The architecture is read first: a family that is not supported is no matter of its tensors.
        architecture = self.architecture
        _ = self.dtype
        declared = self._declared_shapes()

        carried = {name: info.shape for name, info in self.tensors.items() if self._is_carried(name)}
        for name, shape in (declared | carried).items():
            if name not in self.tensors:
                raise ConfigError(f"model.source: {self.folder} has no tensor {name}{self._reason_of_absence(name)}")
            if self.tensors[name].dtype not in DTYPES:
                raise ConfigError(f"model.source: {name} is {self.tensors[name].dtype}, not one of {', '.join(DTYPES)}")
            if self.tensors[name].shape != shape:
                raise self._wrong_shape(name, shape)

        unread = self.tensors.keys() - declared.keys() - carried.keys()
        if self._config_value("tie_word_embeddings"):
            # A head that is the embedding may be stored a second time.
            for head in unread & set(HEADS):
                self._refuse_untied_head(head, architecture.family.embedding)
            unread -= set(HEADS)
        return self._without(frozenset(unread))

    def _is_carried(self, name: str) -> bool:
        """Return whether a tensor is no part of the language model of a multimodal checkpoint."""
        return self.whole_config is not None and plain_name(self.tensors[name].stored_as) is None

    def _refuse_ambiguous(self) -> None:
        """Raise ConfigError where it depends on the program, or on what is installed, which weights are loaded."""
        if (self.folder / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"model.source: {self.folder} holds a model and an adapter beside it ({ADAPTER_CONFIG}), which "
                "transformers adds where peft is installed and leaves out elsewhere; keep them in two folders"
            )
        if self.config.get("transformers_weights"):
            raise ConfigError(
                f"model.source: {self.folder}: config.json names its weights itself (transformers_weights), which vLLM "
                f"does not read; call the file {WEIGHTS} and delete the key"
            )

    def _declared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that config.json declares, by their names in a checkpoint.

        Of a multimodal checkpoint those of its language model: what else it needs is transformers' to say.
        """
        # It also registers the classes of compacted models.
        from seap_ray.models.hf.shapes import declared

        nested = self.nested_settings.get("config")
        try:
            shapes = declared(nested) if nested else _declared_in(self.folder, json.dumps(self.config))
        except CONFIG_ERRORS as error:
            raise refused_config(error) from None
        return single_shapes(self.architecture.family, shapes)

    def _reason_of_absence(self, name: str) -> str:
        """Return what config.json has to do with a tensor that is missing."""
        if name not in HEADS:
            return f", which config.json declares ({self.config.get('model_type')})"

        classes = self.config.get("architectures") or []
        if classes and not str(classes[0]).endswith(("CausalLM", "LMHeadModel")):
            return f": {classes[0]} has no head that predicts tokens"
        return (
            ": config.json says tie_word_embeddings is false; where the head is the embedding, as in merges of tied "
            "models, set it to true"
        )

    def _wrong_shape(self, name: str, shape: tuple[int, ...]) -> ConfigError:
        """Return the error of a tensor whose shape is not as config.json declares."""
        stored = self.tensors[name].shape
        if name in (self.architecture.family.embedding, *HEADS) and stored[1:] == shape[1:]:
            reason = f"if the vocabulary was resized, set vocab_size to {stored[0]}"
        elif self.architecture.split(name)[0] is not None:
            reason = "it was pruned by another tool, perhaps, which keeps its widths elsewhere"
        else:
            reason = "config.json is another model's, perhaps"
        return ConfigError(
            f"model.source: {self.folder}: {name} is {list(stored)}, and {list(shape)} by config.json; {reason}"
        )

    def _refuse_untied_head(self, head: str, embedding: str) -> None:
        """Raise ConfigError where a stored head differs from the embedding that config.json says it is."""
        if self.tensors[head].dtype != self.tensors[embedding].dtype or not torch.equal(
            self.read(head), self.read(embedding)
        ):
            raise ConfigError(
                f"model.source: {self.folder}: {head} differs from {embedding}, and config.json says "
                "tie_word_embeddings, so that programs differ in what they load; set it to false"
            )

    @property
    def warnings(self) -> list[str]:
        """Lines on what is in the folder and not read, or read and of no use."""
        lines = []
        if self.surplus:
            lines.append(f"{len(self.surplus)} tensors that the model does not have are ignored ({min(self.surplus)})")

        unread = {file.name for file in self.folder.glob("*.safetensors")} - {file.name for file in self.files}
        if unread:
            lines.append(f"{len(unread)} weight files are ignored, as transformers does ({min(unread)})")

        for key in ("bos_token_id", "eos_token_id"):
            value = self.config.get(key)
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, int) and not 0 <= token < self.vocabulary_size:
                    lines.append(f"config.json: {key} {token} is none of the {self.vocabulary_size} tokens")
        return lines

    @property
    def is_copied(self) -> bool:
        """Whether every node has a copy of its own: of the hub or a bucket, or a conversion."""
        return self.source.is_copied or is_converted(self.folder)

    @property
    def nested_settings(self) -> dict[str, Any]:
        """Arguments with which ``from_pretrained`` loads the language model of the folder alone; none where it is all.

        Raises ConfigError for a config that transformers refuses.
        """
        if self.whole_config is None:
            return {}
        return {"config": made_config(self.config), "key_mapping": KEY_MAPPING}

    # --- what it is --------------------------------------------------------------------------------------------------

    @cached_property
    def architecture(self) -> Architecture:
        """What the model is made of. Raises ConfigError for a family that is not supported."""
        return Architecture.of(completed_config(self.config))

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the weights, which transformers loads them in: config.json's, or else that of the first weight.

        Raises ConfigError for a value that is no name of a type of weights.
        """
        # Older configs have the second name.
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        if name is None:
            stored = next(iter(self.tensors.values()), None)
            return DTYPES.get(stored.dtype, torch.float32) if stored else torch.float32

        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
            return dtype
        raise ConfigError(
            f"model.source: {self.folder}: config.json says dtype {name!r}, which transformers does not read as a "
            "type of weights; write bfloat16, float16 or float32"
        )

    @property
    def vocabulary_size(self) -> int:
        """Rows of the input embedding; a token id is smaller. The tokenizer may know more tokens, or fewer."""
        return self.tensors[self.architecture.family.embedding].shape[0]

    def _config_value(self, key: str) -> Any:
        """Return a value of config.json, or transformers' default where it does not have the key."""
        return completed_config(self.config).get(key)

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
        digest = hashlib.sha256(json.dumps(self.whole_config or self.config, sort_keys=True).encode())
        for file in sorted(self.files):
            digest.update(_file_hash(file))

        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the type and shape that it is stored in."""
        info = self.tensors[name]
        with safe_open(info.file, "pt") as file:
            if info.place:
                # One MoE expert's data alone.
                return info.place.take(file.get_slice(info.stored_as)[info.place.expert]).contiguous()
            return file.get_tensor(info.stored_as)

    def stored_name(self, name: str) -> str:
        """Return the name under which the checkpoint stores a tensor, or would store it."""
        if name in self.tensors:
            return self.tensors[name].stored_as
        # As it stores another one of the decoder layers.
        layers = self.architecture.family.layers
        other = next(plain for plain, info in self.tensors.items() if plain.startswith(layers) and not info.place)
        return self.tensors[other].stored_as.removesuffix(other.removeprefix(layers)) + name.removeprefix(layers)

    @cached_property
    def has_fused_experts(self) -> bool:
        """Whether it stores tensors that hold all MoE experts of a layer."""
        return any(info.place for info in self.tensors.values())

    def read_bias(self, layer: int, module: str) -> Tensor | None:
        """Read the bias of a layer's module, None where it has none."""
        name = self.architecture.tensor(layer, module, "bias")
        return self.read(name) if name in self.tensors else None


def _read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"model.source: {path} is truncated, or not a JSON object")
    return content


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with transformers' own defaults for keys that are missing or null.

    Raises ConfigError for a value that transformers refuses; a family that is not supported is returned as it is.
    """
    model_type = str(config.get("model_type"))
    if model_type.removeprefix("seap_") not in FAMILIES:
        return dict(config)

    # The type of the weights is looked at elsewhere. An infinity is in a form that transformers decodes in files alone,
    # and is no size of anything.
    skipped = {"dtype", "torch_dtype", *(key for key, value in config.items() if "__float__" in str(value))}
    defaults = made_config({key: value for key, value in config.items() if key not in skipped}).to_dict()
    return {**defaults, **{key: value for key, value in config.items() if value is not None}}


@cache
def _declared_in(folder: Path, config: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a folder's config.json, which has this content, declares.

    A job opens its model many times, and each time the model would be built from its classes.
    """
    from transformers import AutoConfig

    from seap_ray.models.hf.shapes import declared

    return declared(AutoConfig.from_pretrained(folder))


def _weight_files(folder: Path, source: ModelSource) -> list[Path]:
    """Return the files that transformers loads, in its order: the one file, or else those that the index names.

    Raises ConfigError if one is missing.
    """
    whole = folder / WEIGHTS
    index = folder / INDEX
    if whole.is_file() or not index.is_file():
        files = [whole]
    else:
        files = indexed_files(index)

    for file in files:
        if not file.is_file():
            raise _missing_weights(file, source, has_index=len(files) > 1 or file != whole)
    return files


def _missing_weights(file: Path, source: ModelSource, *, has_index: bool) -> ConfigError:
    if has_index:
        return ConfigError(f"model.source: {file} is missing, which {INDEX} names; copy it there")
    # What lies there instead tells what was taken for a model.
    others = sorted(other.name for other in file.parent.iterdir() if other.suffix in OTHER_WEIGHTS)
    if others:
        return ConfigError(
            f"model.source: {source.name} holds {OTHER_WEIGHTS[Path(others[0]).suffix]} ({others[0]}) and no "
            f"{WEIGHTS}; {SAVE_HINT}"
        )
    return ConfigError(f"model.source: {file} is missing")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            # A slice knows type and shape, and reads no data.
            stored = tensors.get_slice(name)
            infos[name] = TensorInfo(file, stored.get_dtype(), tuple(stored.get_shape()), name)
    return infos


def _taken_apart(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors with those of single MoE experts in place of one that holds all of a layer."""
    family = FAMILIES.get(str(config.get("model_type")).removeprefix("seap_"))
    if family is None:
        return dict(infos)

    apart: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        single = single_experts(family, name, info.shape)
        for part, (shape, place) in single.items():
            apart[part] = replace(info, shape=shape, place=place)
        if not single:
            apart[name] = info
    return apart


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
