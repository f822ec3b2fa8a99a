"""Compaction: a base checkpoint and a plan in, the smaller checkpoint out, on a disk or in a bucket.

Nothing here holds more than one tensor and what is made of it at a time, whatever the model's size.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from seap_ray.core.architecture import Architecture, Shape, expert_of
from seap_ray.core.moments import Site, Statistics
from seap_ray.core.plan import Plan
from seap_ray.core.reconstruction import least_squares
from seap_ray.core.slicing import compact, compact_size, in_pieces, kept_indices, mean_bias
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import CARRIED, DTYPES, INDEX, Checkpoint
from seap_ray.models.records import PooledCovariance
from seap_ray.storage.files import atomic_write, write_json
from seap_ray.storage.paths import StoragePath

SHARED = "model-base-"
"""Beginning of the names of files that hold the base's own tensors; a hash of what is in them follows."""
NOT_STOCK = {
    "auto_map",
    "head_dim",
    "per_layer_config",
    "o_proj_bias",
    "down_proj_bias",
    "allow_global_per_layer_attribute_access",
}
"""Config keys of a compacted checkpoint that a stock one has not, or has by its family alone."""
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
"""Names of classes that all mean a tokenizer as ``tokenizer.json`` has it."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a compacted checkpoint, before it is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Compaction:
    """One expert's checkpoint to be: the base, the plan, and the statistics that compensate the cut."""

    base: Checkpoint
    plan: Plan
    statistics: Statistics | PooledCovariance | None = None
    """For ``mean`` moments, for ``least_squares`` covariances."""
    stock: bool = False
    """Write a checkpoint of an ordinary family, which has biases in all layers or in none."""

    def outputs(self) -> list[OutputTensor]:
        """Every tensor of the checkpoint, in the base's order."""
        new, outputs = {old: layer for layer, old in enumerate(self.plan.layers)}, []
        for name, info in self.base.tensors.items():
            layer, module, kind = self.base.architecture.split(name)
            if layer is None:
                outputs.append(OutputTensor(name, info.dtype, info.shape))
            elif layer in new:
                outputs.append(self._cut(new[layer], module, kind))
        return sorted(outputs + self._new_biases(), key=lambda output: _natural(self.base.architecture, output.name))

    def _cut(self, layer: int, module: str, kind: str) -> OutputTensor:
        architecture, info = self.base.architecture, self.base.tensors[self._source(layer, module, kind)]
        size = compact_size(architecture, module, kind, info.shape, self.plan.kept[layer])
        return OutputTensor(architecture.tensor(layer, module, kind), info.dtype, size)

    def _source(self, layer: int, module: str, kind: str = "weight") -> str:
        """The base's name of a tensor of the checkpoint: layers behind one that goes as a whole move up."""
        return self.base.architecture.tensor(self.plan.layers[layer], module, kind)

    def _new_biases(self) -> list[OutputTensor]:
        """Biases that the base does not have: of compensated layers, and all zero ones that a stock family asks for."""
        architecture, new = self.base.architecture, []
        for layer in range(len(self.plan.kept)):
            modules = [module for module in architecture.compensated if self.compensates(layer)]
            if self.stock and _has_biases(self.plan, architecture):
                modules = [*architecture.layout.rows, *architecture.layout.columns]
            for module in modules:
                weight = self._cut(layer, module, "weight")
                if self._source(layer, module, "bias") not in self.base.tensors:
                    bias = architecture.tensor(layer, module, "bias")
                    new.append(OutputTensor(bias, weight.dtype, weight.shape[:1]))
        return new

    def compensates(self, layer: int) -> bool:
        return self.plan.compensation != "none" and self.plan.cuts(layer, self.base.architecture)

    def pieces(self, output: OutputTensor) -> Iterator[Tensor]:
        """The tensor itself in the base's dtype, in pieces of some rows."""
        layer, module, kind = self.base.architecture.split(output.name)
        if layer is None:
            return in_pieces(self.base.read(output.name))
        if module in self.base.architecture.compensated and self.compensates(layer):
            if self.plan.compensation == "least_squares":
                return iter([self._repaired(layer, module)[kind]])
            if kind == "bias":
                return iter([self._mean_bias(layer, module)])
        source = self._source(layer, module, kind)
        if source not in self.base.tensors:
            return iter([torch.zeros(output.shape, dtype=DTYPES[output.dtype])])
        architecture, kept = self.base.architecture, self.plan.kept[layer]
        return compact(architecture, self.plan.layers[layer], module, kind, self.base.read(source), kept)

    def _site(self, module: str) -> Site:
        return "attn" if module == self.base.architecture.layout.o_proj else "mlp"

    def _kept_columns(self, layer: int, module: str) -> Tensor:
        unit = self.base.architecture.layout.columns[module]
        return kept_indices(self.plan.kept[layer], unit, self.base.architecture.head_dim)

    def _mean_bias(self, layer: int, module: str) -> Tensor:
        assert self.statistics is not None
        old = self.plan.layers[layer]
        return mean_bias(
            self.base.read(self._source(layer, module)),
            self.statistics[old, self._site(module)].mean_D,
            self._kept_columns(layer, module),
            self.base.read_bias(old, module),
        )

    def _repaired(self, layer: int, module: str) -> dict[str, Tensor]:
        """Weight and bias by least squares. A bias is asked for right before its weight, so the last pair is kept."""
        assert isinstance(self.statistics, PooledCovariance)
        if (layer, module) not in self._last:
            old = self.plan.layers[layer]
            covariance, kept_S = self.statistics[old, self._site(module)], self._kept_columns(layer, module)
            dense_OD, bias_O = self.base.read(self._source(layer, module)), self.base.read_bias(old, module)
            ridge = self.statistics.ridge_of((old, self._site(module)))
            weight_OS, added_O = least_squares(covariance, dense_OD, kept_S, ridge=ridge)
            bias_O = added_O if bias_O is None else added_O + bias_O.double()
            self._last.clear()
            self._last[layer, module] = {"weight": weight_OS.to(dense_OD.dtype), "bias": bias_O.to(dense_OD.dtype)}
        return self._last[layer, module]

    @cached_property
    def _last(self) -> dict[tuple[int, str], dict[str, Tensor]]:
        return {}

    def files(self, max_bytes: int) -> dict[str, list[OutputTensor]]:
        """Distribute the tensors, in order, over files of at most ``max_bytes`` (a larger tensor has its own).

        What stays as it is in the base has files apart, whose names tell what is in them: files of one name are equal,
        so experts of one base keep them once.
        """
        carried: list[OutputTensor] = []
        own: list[OutputTensor] = []
        for output in self.outputs():
            (carried if self._is_carried(output) else own).append(output)
        if not carried:
            return _filled("model", own, max_bytes)
        sources = [(output.name, self.base.architecture.split(output.name)[0]) for output in carried]
        about = json.dumps([self.base.fingerprint, self.plan.layers, sources])
        name = SHARED + hashlib.sha256(about.encode()).hexdigest()[:12]
        own_files = _filled("model", own, max_bytes, numbered=True) if own else {}
        return _filled(name, carried, max_bytes) | own_files

    def _is_carried(self, output: OutputTensor) -> bool:
        """Whether a tensor is the base's. Of a module that is cut none is: engines reload modules as a whole."""
        architecture = self.base.architecture
        layer, module, _ = architecture.split(output.name)
        if layer is None or not (self.stock or self.plan.cuts(layer, architecture)):
            return True
        family, (module, _) = architecture.layout, expert_of(module)
        return not (module in family.rows or module in family.columns)

    def config(self) -> dict[str, Any]:
        """``config.json`` of the checkpoint."""
        return self._stock_config() if self.stock else self._seap_config()

    def _dense_config(self) -> dict[str, Any]:
        """The base's, without the layers that go as a whole; Qwen2's ``layer_types``, say, has an entry for each."""
        config, layers = self.base.config, self.plan.layers
        if self.plan.dropped and self.base.architecture.mixes_windows and not config.get("layer_types"):
            import seap_ray.models.hf  # noqa: F401  the base may be compacted itself

            # By their old places, which the new config would not tell.
            config = {**config, "layer_types": AutoConfig.from_pretrained(self.base.folder).layer_types}
        by_layer = {
            key: [value[layer] for layer in layers]
            for key, value in config.items()
            if isinstance(value, list) and len(value) == config["num_hidden_layers"] and not key.endswith("_token_id")
        }
        return {**config, **by_layer, "num_hidden_layers": len(layers)}

    def _seap_config(self) -> dict[str, Any]:
        architecture = self.base.architecture
        family = architecture.layout
        # A generic PreTrainedConfig checks a long rope by the number of heads, which layers do not share.
        access = {} if architecture.has_free_heads else {"allow_global_per_layer_attribute_access": True}
        return {
            **self._dense_config(),
            "architectures": [family.model_class],
            "model_type": f"seap_{architecture.family}",
            "auto_map": {
                "AutoConfig": f"configuration_seap.{family.config_class}",
                "AutoModelForCausalLM": f"modeling_seap.{family.model_class}",
            },
            "head_dim": architecture.head_dim,
            # Generic loaders of the configuration want every key of ``per_layer_config`` at the top level, too.
            **dict.fromkeys(architecture.bias_keys, False),
            **access,
            **self._widths(architecture.dense),
            "per_layer_config": {str(i): own for i in range(len(self.plan.kept)) if (own := self._own(i))},
        }

    def _widths(self, shape: Shape) -> dict[str, int]:
        """Config keys of the family, with the widths of a layer."""
        family = self.base.architecture.layout
        groups = {family.groups_key: shape.groups} if family.groups_key else {}
        return {"num_attention_heads": shape.heads, **groups, family.channels_key: shape.channels}

    def _own(self, layer: int) -> dict[str, Any]:
        cut, usual = self.plan.cut(layer, self.base.architecture), self._widths(self.base.architecture.dense)
        own = self._widths(cut.shape)
        return {key: value for key, value in own.items() if value != usual[key]} | dict.fromkeys(cut.biases, True)

    def _stock_config(self) -> dict[str, Any]:
        architecture, family = self.base.architecture, self.base.architecture.layout
        config = {key: value for key, value in self._dense_config().items() if key not in NOT_STOCK}
        config |= {"model_type": architecture.family, "architectures": [family.model_class.removeprefix("Seap")]}
        config |= self._widths(self.plan.shapes[0])
        if family.has_head_dim:
            config["head_dim"] = architecture.head_dim
        if _has_biases(self.plan, architecture) and family.like_llama:
            config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            config |= {"attention_bias": True, "mlp_bias": True}
        return config


def _filled(
    name: str, outputs: Iterable[OutputTensor], max_bytes: int, *, numbered: bool = False
) -> dict[str, list[OutputTensor]]:
    """One file, or several ones that are ``numbered`` as Hugging Face does it."""
    parts: list[list[OutputTensor]] = [[]]
    room = max_bytes
    for output in outputs:
        if parts[-1] and output.n_bytes > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(output)
        room -= output.n_bytes
    if len(parts) == 1 and not numbered:
        return {f"{name}.safetensors": parts[0]}
    return {f"{name}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def check_stock(plan: Plan, architecture: Architecture) -> None:
    """Raises ConfigError, naming the layer, when a plan has widths that no stock checkpoint can hold."""
    first = plan.shapes[0]
    for layer, shape in enumerate(plan.shapes):
        if shape != first:
            raise ConfigError(
                f"export.format: stock needs equal widths, but layer {layer} of {plan.name} has {shape} and layer 0 "
                f"{first}; use pruning.allocation.kind=uniform, or export.format=seap"
            )
    family, biased = architecture.layout, _has_biases(plan, architecture)
    if first.heads != architecture.dense.heads and not (family.has_head_dim and architecture.has_free_heads):
        raise ConfigError(
            f"export.format: a stock {architecture.family} has heads of one size, hidden size / heads, so none can go; "
            "use pruning.attention_unit=none, or export.format=seap"
        )
    if biased and architecture.bias_keys and not _may_have_biases(architecture):
        remedy = "" if architecture.is_compensated else "pruning.compensation=none, or "
        raise ConfigError(
            f"export.format: a stock {architecture.family} has no biases on {family.o_proj} and {family.down_proj}; "
            f"use {remedy}export.format=seap"
        )
    if architecture.hidden_size % first.heads:
        raise ConfigError(
            f"export.format: stock needs heads that divide the hidden size {architecture.hidden_size}, not "
            f"{first.heads} as in layer 0 of {plan.name}; use pruning.attention_unit=none, or export.format=seap"
        )


def _natural(architecture: Architecture, name: str) -> tuple[int, int, str]:
    layer, _, _ = architecture.split(name)
    return (0, layer, name) if layer is not None else (-1 if "embed" in name else 1, 0, name)


def _has_biases(plan: Plan, architecture: Architecture) -> bool:
    """Whether there are, or may be, output biases that the family has not."""
    return plan.compensation != "none" or architecture.is_compensated


def _may_have_biases(architecture: Architecture) -> bool:
    """Of the stock families Llama alone has them everywhere, but no window."""
    return architecture.layout.like_llama and not architecture.has_windows


def write_tensors(compaction: Compaction, outputs: list[OutputTensor], path: StoragePath) -> str:
    """Write one safetensors file piece by piece and return its sha256. (The library writes whole dicts only.)

    A thread hashes a piece while it is written and the next one is made.
    """
    digest = hashlib.sha256()
    with atomic_write(path) as temporary, temporary.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        hashed = hasher.submit(digest.update, b"")
        for chunk in _chunks(compaction, outputs):
            hashed.result()
            hashed = hasher.submit(digest.update, chunk)
            file.write(chunk)
    return digest.hexdigest()


def _chunks(compaction: Compaction, outputs: list[OutputTensor]) -> Iterator[Any]:
    yield _header(outputs)
    for output in outputs:
        n_bytes = 0
        for piece in compaction.pieces(output):
            yield piece.contiguous().flatten().view(torch.uint8).numpy().data
            n_bytes += piece.nbytes
        if n_bytes != output.n_bytes:
            raise ValueError(f"{output.name}: made {n_bytes} bytes, planned {output.shape}")


def _header(outputs: Iterable[OutputTensor]) -> bytes:
    """Length and JSON of a safetensors file, padded so that the data start at a multiple of 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [start, start + output.n_bytes],
        }
        start += output.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def finish(
    compaction: Compaction, folder: StoragePath, files: dict[str, list[OutputTensor]], manifest: dict[str, Any]
) -> None:
    """Write all that is not a weight: index, config, code, the base's tokenizer; ``seap.json`` last."""
    from seap_ray.models import hf

    if [*files] != ["model.safetensors"]:
        total = sum(output.n_bytes for outputs in files.values() for output in outputs)
        names = {output.name: file for file, outputs in files.items() for output in outputs}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    write_json(folder / "config.json", compaction.config())
    carried = {file for pattern in CARRIED for file in compaction.base.folder.glob(pattern) if file.is_file()}
    for file in sorted(carried) + ([] if compaction.stock else list(hf.FILES)):
        with atomic_write(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    renamed = _tokenizer_config(compaction)
    if renamed:
        write_json(folder / TOKENIZER_CONFIG, renamed)
    write_json(folder / "seap.json", manifest)


def _tokenizer_config(compaction: Compaction) -> dict[str, Any] | None:
    """Return the ``tokenizer_config.json`` of the checkpoint; None where a copy of the base's says the same.

    transformers chooses a tokenizer's class by the model type and by the class that this file names. For some families
    (Qwen2, Phi-3) the model type wins. It does not know a compacted checkpoint's model type, so that the file decides
    alone and must name the class that the base's tokenizer really has.
    """
    base = compaction.base
    if compaction.config()["model_type"] == base.config["model_type"]:
        return None
    file = base.folder / TOKENIZER_CONFIG
    stored: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    named = stored.get("tokenizer_class") or base.config.get("tokenizer_class") or GENERIC_TOKENIZERS[0]
    actual = _tokenizer_class(base.folder)
    are_generic = named in GENERIC_TOKENIZERS and actual in GENERIC_TOKENIZERS
    if actual is None or are_generic or named.removesuffix("Fast") == actual.removesuffix("Fast"):
        return None
    return {**stored, "tokenizer_class": actual}


@cache
def _tokenizer_class(folder: Path) -> str | None:
    """Return the name of the class of a checkpoint's tokenizer; None where it has none, or one by code of its own."""
    try:
        return type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).__name__
    except (ImportError, OSError, ValueError):
        return None


def parse_size(text: str) -> int:
    """``5GB`` -> 5,000,000,000, as Hugging Face counts."""
    number, unit = text[:-2], text[-2:]
    return int(float(number) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit])
