"""Export: a base checkpoint and a plan in, the compacted checkpoint out, on a disk or in a bucket.

Nothing here holds more than one tensor and what is made of it at a time, whatever the model's size.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seap_ray.core.architecture import Architecture, Shape, keys_of_dense_layers, split_moe_expert
from seap_ray.core.compensation import OutputModule
from seap_ray.core.families import FusedExperts
from seap_ray.core.fused_experts import fused_shape, joined
from seap_ray.core.moments import Statistics
from seap_ray.core.plan import Plan
from seap_ray.core.slicing import in_pieces, kept_indices, slice_tensor, sliced_shape
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import DTYPES, Checkpoint
from seap_ray.models.gguf import layouts
from seap_ray.models.model_sources import COMPANION_FILES, INDEX
from seap_ray.models.multimodal import nested_config
from seap_ray.models.records import PooledCovariance
from seap_ray.storage.digests import digest_of, new_hasher
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
"""Config keys that a stock checkpoint must not carry over from a compacted one; some it has by its family."""
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
"""Names of classes that all mean a tokenizer as ``tokenizer.json`` has it."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a compacted checkpoint, before it is made."""

    name: str
    dtype: str
    """As a safetensors file names it."""
    shape: tuple[int, ...]
    parts: tuple["OutputTensor", ...] = ()
    """Tensors of single MoE experts that it holds, one expert after another; none of most tensors."""

    @property
    def n_bytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


Corrections = Mapping[int, Mapping[str, Tensor]]
"""What is added to ``down_proj`` of a layer of the base, by the layer and the kind of tensor, float32: to the
``weight`` of the kept columns, (O, S), and to the ``bias``, (O,). It makes up for errors of the layers before."""


@dataclass(frozen=True)
class CheckpointExport:
    """A compacted checkpoint before it is written: the base, the plan, and the statistics that compensate the cut."""

    base: Checkpoint
    plan: Plan
    statistics: Statistics | PooledCovariance | None = None
    """What the plan's compensation requires: moments or covariances."""
    stock: bool = False
    """Write a checkpoint of an ordinary family, which has biases in all layers or in none."""
    corrections: Corrections | None = None
    """What compensation adds for the errors of earlier layers; None: nothing."""

    @property
    def memory_factor(self) -> int:
        """Memory of a task that writes it, in units of what one layer's covariances need."""
        return self.plan.compensation.memory_factor

    def outputs(self) -> list[OutputTensor]:
        """Return every tensor of the checkpoint, in the base's order."""
        return self.unquantized_outputs()

    def unquantized_outputs(self) -> list[OutputTensor]:
        """Return every tensor of the checkpoint with weights as numbers, in the base's order."""
        architecture = self.base.architecture
        # Layers of the base that stay, and their numbers in the checkpoint.
        new_layer = {old: layer for layer, old in enumerate(self.plan.layers)}
        outputs: list[OutputTensor] = []

        for name, info in self.base.tensors.items():
            layer, module, kind = architecture.split(name)
            if layer is None:
                outputs.append(OutputTensor(name, info.dtype, info.shape))
            # The tensors of a dropped layer, or MoE expert, go with it.
            elif layer in new_layer and (kept_module := self._module_after(new_layer[layer], module)) is not None:
                outputs.append(self._sliced(new_layer[layer], kept_module, kind))

        outputs = self._with_fused_experts(outputs + self._new_biases())
        return sorted(outputs, key=lambda output: _natural_order(architecture, output.name))

    def _with_fused_experts(self, outputs: Iterable[OutputTensor]) -> list[OutputTensor]:
        """Put tensors of MoE experts together that lie in one tensor in the base."""
        architecture = self.base.architecture
        others: list[OutputTensor] = []
        parts_by_name: dict[str, dict[tuple[int, int], OutputTensor]] = {}

        for output in outputs:
            layer, module, kind = architecture.split(output.name)
            template, expert = split_moe_expert(module)
            if layer is None or expert is None or not self.base.has_fused_experts:
                others.append(output)
                continue
            stored, number = self._fused_places[template, kind]
            name = f"{architecture.family.layers}{layer}.{stored}"
            parts_by_name.setdefault(name, {})[expert, number] = output

        return others + [self._fused(name, parts) for name, parts in parts_by_name.items()]

    def _fused(self, name: str, parts: Mapping[tuple[int, int], OutputTensor]) -> OutputTensor:
        """Return a tensor of all MoE experts of a layer; ``parts`` are by the expert and the module's number in it."""
        fused = self._fused_row(name)
        first = next(iter(parts.values()))
        shape = fused_shape(fused, len(parts) // len(fused.modules), first.shape)
        return OutputTensor(name, first.dtype, shape, tuple(parts[place] for place in sorted(parts)))

    def _fused_row(self, name: str) -> FusedExperts:
        """Return what a tensor of all MoE experts of a layer is, by its name."""
        _, module, kind = self.base.architecture.split(name)
        return self.base.architecture.family.fused_experts[f"{module}.{kind}"]

    @cached_property
    def _fused_places(self) -> dict[tuple[str, str], tuple[str, int]]:
        """Names of fused tensors, and the number of a module in them, by the module and the kind of its tensor."""
        places: dict[tuple[str, str], tuple[str, int]] = {}
        for name, fused in self.base.architecture.family.fused_experts.items():
            for number, module in enumerate(fused.modules):
                places[module, fused.kind] = (name, number)
        return places

    def _sliced(self, layer: int, module: str, kind: str) -> OutputTensor:
        """Return a tensor of a layer of the checkpoint that the base has, too."""
        architecture = self.base.architecture
        info = self.base.tensors[self._source(layer, module, kind)]
        shape = sliced_shape(architecture, self._module_before(layer, module), kind, info.shape, self.plan.kept[layer])
        return OutputTensor(architecture.tensor(layer, module, kind), info.dtype, shape)

    def _source(self, layer: int, module: str, kind: str = "weight") -> str:
        """Return the base's name of a tensor: where whole layers or MoE experts go, later ones are renumbered."""
        return self.base.architecture.tensor(self.plan.layers[layer], self._module_before(layer, module), kind)

    def _module_before(self, layer: int, module: str) -> str:
        """Return the base's name of a module of a layer of the checkpoint."""
        template, expert = split_moe_expert(module)
        experts = self.plan.kept[layer].experts
        return module if expert is None or not experts else template.format(e=experts[expert])

    def _module_after(self, layer: int, module: str) -> str | None:
        """Return the name of a module of the base in a layer of the checkpoint; None for an MoE expert that goes."""
        template, expert = split_moe_expert(module)
        experts = self.plan.kept[layer].experts
        if expert is None or not experts:
            return module
        return template.format(e=experts.index(expert)) if expert in experts else None

    def _new_biases(self) -> list[OutputTensor]:
        """Return biases that the base does not have: of compensated layers, and zero ones that a stock family wants."""
        architecture = self.base.architecture

        new: list[OutputTensor] = []
        adds_biases = self.plan.compensation.adds_biases
        for layer in range(len(self.plan.kept)):
            modules: list[str] = []
            if adds_biases and self.compensates(layer):
                own = architecture.modules(self.plan.layers[layer]).values()
                modules = [module for module in architecture.compensable_modules if module in own]
            # A stock Llama's biases are all there or none; other families have their own.
            if self.stock and architecture.family.like_llama and _has_biases(self.plan, architecture):
                modules = [*architecture.family.cut_rows, *architecture.family.columns]
            for module in modules:
                weight = self._sliced(layer, module, "weight")
                # A bias that the base has is among its tensors already.
                if self._source(layer, module, "bias") not in self.base.tensors:
                    bias = architecture.tensor(layer, module, "bias")
                    new.append(OutputTensor(bias, weight.dtype, weight.shape[:1]))
        return new

    def compensates(self, layer: int) -> bool:
        """Return whether a layer of the checkpoint is cut and compensated."""
        return bool(self.plan.compensation.replaces) and self.plan.cuts(layer, self.base.architecture)

    def pieces(self, output: OutputTensor) -> Iterator[Tensor]:
        """Return the data of a tensor in the base's dtype, some rows at a time.

        Args:
            output: One of ``outputs``.

        Returns:
            Blocks of rows, in order.
        """
        if output.parts:
            return self._fused_pieces(output)

        architecture = self.base.architecture
        layer, module, kind = architecture.split(output.name)
        if layer is None:
            return in_pieces(self.base.read(output.name))

        compensated = self.compensated(layer, module) if kind in self.plan.compensation.replaces else {}
        if kind in compensated:
            return iter([compensated[kind]])

        # A bias that the stock family wants and nothing needs is zero.
        source = self._source(layer, module, kind)
        if source not in self.base.tensors:
            return iter([torch.zeros(output.shape, dtype=DTYPES[output.dtype])])

        original_layer = self.plan.layers[layer]
        kept = self.plan.kept[layer]
        module = self._module_before(layer, module)
        return slice_tensor(architecture, original_layer, module, kind, self.base.read(source), kept)

    def _fused_pieces(self, output: OutputTensor) -> Iterator[Tensor]:
        """Yield the data of a tensor of all MoE experts of a layer, one expert after another."""
        fused = self._fused_row(output.name)
        n_modules = len(fused.modules)
        for first in range(0, len(output.parts), n_modules):
            parts = output.parts[first : first + n_modules]
            yield joined(fused, [torch.cat([*self.pieces(part)]) for part in parts])

    def compensated(self, layer: int, module: str) -> dict[str, Tensor]:
        """Return the tensors of a layer's module that compensation makes, by kind; none of most modules."""
        architecture = self.base.architecture
        # Where a module may have no bias, a compensation that makes nothing else leaves it as it is sliced.
        makes_weights = "weight" in self.plan.compensation.replaces
        modules = architecture.modules(self.plan.layers[layer]).values()
        compensable = modules if makes_weights else architecture.compensable_modules
        if module not in compensable or not self.compensates(layer):
            return {}

        repaired = self.repaired(layer, module)
        if self.corrections is None or module != architecture.family.down_proj:
            return repaired
        added = self.corrections[self.plan.layers[layer]]
        # Float64 for the sum alone: it is rounded once more.
        return {kind: (tensor.double() + added[kind]).to(tensor) for kind, tensor in repaired.items()}

    def repaired(self, layer: int, module: str) -> dict[str, Tensor]:
        """Return the tensors that compensation makes of an output module of a cut layer, without corrections."""
        # Tensors are in the order of their names, so a bias comes right before its weight: one pair
        # is remembered.
        if (layer, module) not in self._repair_memo:
            repaired = self.plan.compensation.repaired(self._output_module(layer, module), self.statistics)
            self._repair_memo.clear()
            self._repair_memo[layer, module] = repaired
        return self._repair_memo[layer, module]

    def _output_module(self, layer: int, module: str) -> OutputModule:
        """Read an output module from the base."""
        architecture = self.base.architecture
        original_layer = self.plan.layers[layer]
        (site,) = (site for site, name in architecture.modules(original_layer).items() if name == module)
        template, expert = split_moe_expert(module)
        unit = architecture.family.columns[template]
        kept = self.plan.kept[layer].of_moe_expert(expert)
        return OutputModule(
            weight_OD=self.base.read(self._source(layer, module)),
            bias_O=self.base.read_bias(original_layer, module),
            kept_S=kept_indices(kept, unit, architecture.head_dim),
            key=(original_layer, site),
            may_have_bias=module in architecture.compensable_modules,
        )

    @cached_property
    def _repair_memo(self) -> dict[tuple[int, str], dict[str, Tensor]]:
        """Tensors that compensation made last, by layer and module."""
        # The export is frozen; what it remembers changes inside this dict.
        return {}

    def files(self, max_bytes: int) -> dict[str, list[OutputTensor]]:
        """Distribute the tensors, in order, over files.

        What stays as it is in the base has files apart, whose names tell what is in them: files of one name are equal,
        so task experts of one base keep them once.

        Args:
            max_bytes: Size of a file's data at most; a larger tensor has a file of its own.

        Returns:
            Tensors of every file, by its name.
        """
        carried: list[OutputTensor] = []
        changed: list[OutputTensor] = []
        for output in self.outputs():
            (carried if self._is_carried(output) else changed).append(output)
        if not carried:
            return _fill_files("model", changed, max_bytes)

        # The name tells the base, and which of its layers each tensor is from: equal names, equal bytes.
        sources = [(output.name, self.base.architecture.split(output.name)[0]) for output in carried]
        content = json.dumps([self.base.fingerprint, self.plan.layers, sources])
        name = SHARED + hashlib.sha256(content.encode()).hexdigest()[:12]

        changed_files = _fill_files("model", changed, max_bytes, numbered=True) if changed else {}
        return _fill_files(name, carried, max_bytes) | changed_files

    def _is_carried(self, output: OutputTensor) -> bool:
        """Return whether a tensor is the base's own. In a cut module none is: engines reload modules as a whole."""
        if output.parts:
            return all(map(self._is_carried, output.parts))

        architecture = self.base.architecture
        layer, module, kind = architecture.split(output.name)
        if layer is None or not (self.stock or self.plan.cuts(layer, architecture)):
            return True
        family = architecture.family
        if f"{module}.{kind}" == family.sinks:
            return False
        if self.plan.kept[layer].experts and f"{module}.{kind}" in family.router:
            return False
        module, _ = split_moe_expert(module)
        return not (module in family.cut_rows or module in family.columns)

    def config(self) -> dict[str, Any]:
        """Return the content of the checkpoint's ``config.json``."""
        config = self._stock_config() if self.stock else self._seap_config()
        return nested_config(self.base.whole_config, config) if self.base.whole_config else config

    def _dense_config(self) -> dict[str, Any]:
        """Return the base's config without the layers that go as a whole."""
        architecture = self.base.architecture
        config = self.base.config
        layers = self.plan.layers
        if (self.plan.dropped or architecture.family.mixer) and (missing := self._lists_by_place()):
            from transformers import AutoConfig

            import seap_ray.models.hf  # noqa: F401  the base may be compacted itself

            # What layers are by their old places, which the new config would not tell.
            by_place = AutoConfig.from_pretrained(self.base.folder)
            config = {**config, **{key: getattr(by_place, key) for key in missing}}

        # A list as long as the model, like Qwen2's ``layer_types``, has an entry for each layer.
        shortened: dict[str, Any] = {}
        for key, value in config.items():
            is_by_layer = isinstance(value, list) and len(value) == architecture.n_layers
            # A list of end tokens may happen to be as long.
            if is_by_layer and not key.endswith("_token_id"):
                shortened[key] = [value[layer] for layer in layers]

        changed = {**config, **shortened, **self._layers_with_experts(), "num_hidden_layers": len(layers)}
        changed |= self._numbers_of_experts(changed)
        settled = architecture.family.settled
        kept = {key: value for key, value in changed.items() if key not in settled}
        return kept | {key: value for key, value in settled.items() if value is not None}

    def _numbers_of_experts(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Return the config keys of the number of MoE experts, where some go as a whole: equally many in all layers.

        Raises ConfigError where layers keep different numbers.
        """
        numbers = {len(kept.experts) for kept in self.plan.kept if kept.experts}
        if not numbers:
            return {}
        mixed = [layer for _, layer in self.plan.layers_after(self.base.architecture) if layer.n_experts]
        if len({layer.n_experts for layer in mixed}) > 1:
            raise ConfigError(f"{self.plan.name}: layers keep different numbers of MoE experts, which no config says")
        # transformers' own configs and those of the families may name it differently, and some both.
        key = self.base.architecture.family.n_experts_key
        return dict.fromkeys({key, "num_local_experts"} & {*config} or {key}, numbers.pop())

    def _layers_with_experts(self) -> dict[str, Any]:
        """Return the config keys that say which layers have MoE experts, where whole layers go of a mixture."""
        architecture = self.base.architecture
        is_listed = architecture.family.listed_by_layer == "mlp_layer_types"
        if not self.plan.dropped or not architecture.has_dense_layers or is_listed:
            return {}
        n_experts = [architecture.layers[layer].n_experts for layer in self.plan.layers]
        return keys_of_dense_layers(self.base.config, [not n for n in n_experts])

    def _lists_by_place(self) -> list[str]:
        """Return config keys that the base leaves to transformers, which lists the layers there by their places."""
        architecture = self.base.architecture
        keys = ["layer_types"] if architecture.mixes_windows else []
        keys += [key for key in [architecture.family.listed_by_layer] if key]
        return [key for key in keys if not self.base.config.get(key)]

    def _seap_config(self) -> dict[str, Any]:
        """Return the config of one of our model types, with what differs by layer."""
        from seap_ray.models import hf

        architecture = self.base.architecture
        family = architecture.family
        per_layer: dict[str, dict[str, Any]] = {}
        for layer in range(len(self.plan.kept)):
            overrides = self._layer_overrides(layer)
            if overrides:
                per_layer[str(layer)] = overrides

        return {
            **self._dense_config(),
            "architectures": [family.model_class],
            "model_type": f"seap_{architecture.family_name}",
            "auto_map": {
                "AutoConfig": f"configuration_seap.{family.config_class}",
                **{auto_class: f"modeling_seap.{name}" for auto_class, name in hf.model_classes(family).items()},
            },
            # The head size of a latent attention follows from keys that no cut changes.
            **({} if family.is_latent else {"head_dim": architecture.head_dim}),
            # Generic loaders of the configuration want every key of ``per_layer_config`` at the top level, too.
            **dict.fromkeys(architecture.bias_keys, False),
            # Tools that read a width of the whole model get the dense model's, instead of an error.
            "allow_global_per_layer_attribute_access": True,
            **self._widths(architecture.dense, family.channels_key),
            "per_layer_config": per_layer,
        }

    def _widths(self, shape: Shape, channels_key: str) -> dict[str, int]:
        """Return the family's config keys for the widths of a layer."""
        family = self.base.architecture.family
        # A layer without attention, or without an MLP, has no such width.
        heads = {"num_attention_heads": shape.heads} if shape.heads else {}
        groups = {family.groups_key: shape.groups} if shape.groups and family.groups_key else {}
        channels = {channels_key: shape.channels} if shape.channels else {}
        return heads | groups | channels

    def _layer_overrides(self, layer: int) -> dict[str, Any]:
        """Return the config keys in which a layer of the checkpoint differs from the top level."""
        architecture = self.base.architecture
        after = self.plan.layer_after(layer, architecture)
        channels_key = architecture.channels_key(after)
        top_level = self._widths(replace(architecture.dense, channels=architecture.whole_channels(after)), channels_key)
        widths = self._widths(after.shape, channels_key)
        different = {key: width for key, width in widths.items() if width != top_level[key]}
        return dict(after.settings) | different | dict.fromkeys(after.biases, True)

    def _stock_config(self) -> dict[str, Any]:
        """Return the config of an ordinary family's model type."""
        architecture = self.base.architecture
        family = architecture.family
        config = {key: value for key, value in self._dense_config().items() if key not in NOT_STOCK}

        config |= {"model_type": architecture.family_name, "architectures": [family.stock_class]}
        # All layers, or all with MoE experts and all without, are equally wide: ``check_stock`` has refused others.
        for _, layer in self.plan.layers_after(architecture):
            config |= self._widths(layer.shape, architecture.channels_key(layer))

        if family.has_head_dim:
            config["head_dim"] = architecture.head_dim
        if family.layer_keys:
            layers = [layer for _, layer in self.plan.layers_after(architecture)]
            own = {str(i): dict(layer.settings) for i, layer in enumerate(layers) if layer.settings}
            config["per_layer_config"] = own
        # With biases in all modules, Mistral and Qwen2 are a Llama that computes the same.
        if _has_biases(self.plan, architecture) and family.like_llama:
            config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            config |= {"attention_bias": True, "mlp_bias": True}
        return config


def _fill_files(
    name: str, outputs: Iterable[OutputTensor], max_bytes: int, *, numbered: bool = False
) -> dict[str, list[OutputTensor]]:
    """Distribute tensors over one file, or over several ones, which are ``numbered`` as Hugging Face does it."""
    parts: list[list[OutputTensor]] = [[]]
    room = max_bytes
    # Files are filled in order; an empty one takes a tensor of any size.
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
    """Check that an ordinary checkpoint of the family can hold what a plan leaves.

    Args:
        plan: The plan.
        architecture: The base that it is a plan for.

    Raises:
        ConfigError: Widths differ between layers (the message names the first), heads or the hidden size do not suit
            the family, or it has no biases to compensate with.
    """
    # A model whose attention is not looked at has none.
    first = next((shape for shape in plan.shapes if shape.heads), architecture.dense)
    # The first layer with attention, with MoE experts, and with an MLP of its own, by the config key of the widths.
    first_with: dict[str, tuple[int, tuple[int, ...]]] = {}
    for number, (_, layer) in enumerate(plan.layers_after(architecture)):
        shape = layer.shape
        parts = {"heads": (shape.groups, shape.heads_per_group), architecture.channels_key(layer): (shape.channels,)}
        for part, width in parts.items():
            other, expected = first_with.setdefault(part, (number, width)) if any(width) else (number, width)
            if width != expected:
                raise ConfigError(
                    f"export.format: stock needs equal widths, but layer {number} of {plan.name} has {shape} and "
                    f"layer {other} {plan.shapes[other]}; use pruning.allocation.kind=uniform, or export.format=seap"
                )
        is_cut = layer.shape.channels != architecture.whole_channels(layer)
        if layer.n_experts and is_cut and architecture.is_shared_width_bound:
            raise ConfigError(
                f"export.format: a stock {architecture.family_name} has shared experts whose width follows from that "
                "of the others, and they stay whole here; use export.format=seap"
            )

    family = architecture.family
    windows = tuple(architecture.windows[layer] for layer in plan.layers)
    if family.has_windows_by_place and windows != architecture.windows[: len(windows)]:
        raise ConfigError(
            f"export.format: vLLM gives layers of a stock {architecture.family_name} their windows by their numbers, "
            f"which dropped layers change ({plan.name}); drop no layers, or use export.format=seap"
        )

    biased = _has_biases(plan, architecture)
    # Without a head size in its config, the family divides the hidden size by the number of heads.
    if first.heads != architecture.dense.heads and not (family.has_head_dim and architecture.n_heads_may_change):
        raise ConfigError(
            f"export.format: a stock {architecture.family_name} has heads of one size, hidden size / heads, so none "
            "can go; use pruning.attention_unit=none, or export.format=seap"
        )

    reason = why_no_biases("stock", architecture)
    if biased and reason:
        remedy = "" if architecture.has_added_biases else "pruning.bias=false, or "
        raise ConfigError(f"export.format: {reason}; use {remedy}export.format=seap")

    if architecture.hidden_size % first.heads:
        raise ConfigError(
            f"export.format: stock needs heads that divide the hidden size {architecture.hidden_size}, not "
            f"{first.heads} as in layer 0 of {plan.name}; use pruning.attention_unit=none, or export.format=seap"
        )


def _natural_order(architecture: Architecture, name: str) -> tuple[int, int, str]:
    """Return a key that sorts tensors: embeddings, then layer by layer, then what follows the layers."""
    layer, _, _ = architecture.split(name)
    if layer is not None:
        return 0, layer, name
    return -1 if "embed" in name else 1, 0, name


def _has_biases(plan: Plan, architecture: Architecture) -> bool:
    """Return whether there are, or may be, output biases that the family does not have."""
    return plan.compensation.adds_biases or architecture.has_added_biases


def why_no_biases(file_format: str, architecture: Architecture) -> str | None:
    """Return why checkpoints cannot hold the biases that compensation adds to output modules; None where they can.

    Args:
        file_format: ``export.format``.
        architecture: The base.
    """
    if file_format == "gguf":
        return layouts.why_no_biases(architecture)
    if file_format != "stock" or not architecture.bias_keys:
        return None
    family = architecture.family
    # Llama alone can have biases everywhere, but no window.
    if family.like_llama and not architecture.has_windows:
        return None
    # In a mixture of experts compensation never adds any to the MLP.
    modules = " and ".join(architecture.compensable_modules)
    return f"a stock {architecture.family_name} has no biases on {modules}"


def write_tensors(export: CheckpointExport, outputs: list[OutputTensor], path: StoragePath) -> str:
    """Write one safetensors file piece by piece; the library writes whole dicts only.

    Args:
        export: The checkpoint.
        outputs: Tensors of the file, in order.
        path: Where the file gets its name when it is whole.

    Returns:
        The file's digest.
    """
    return write_chunks(_chunks(export, outputs), path)


def write_chunks(chunks: Iterable[Any], path: StoragePath) -> str:
    """Write a file piece by piece.

    Args:
        chunks: Its bytes, in order.
        path: Where the file gets its name when it is whole.

    Returns:
        The file's digest.
    """
    hasher = new_hasher()
    with atomic_write(path) as temporary, temporary.open("wb") as file, ThreadPoolExecutor(1) as pool:
        # A thread hashes a piece while it is written and the next one is made.
        hashed = pool.submit(hasher.update, b"")
        for chunk in chunks:
            # One piece at a time, in order; an error in the thread is raised here.
            hashed.result()
            hashed = pool.submit(hasher.update, chunk)
            file.write(chunk)

    # Leaving the block has waited for the last piece.
    return digest_of(hasher)


def _chunks(export: CheckpointExport, outputs: list[OutputTensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file: the header, then tensor by tensor.

    Raises ValueError where a tensor is not as large as the header says.
    """
    yield _header({export.base.stored_name(output.name): output for output in outputs})
    for output in outputs:
        n_bytes = 0
        for piece in export.pieces(output):
            # Seen as bytes, since NumPy knows no bfloat16.
            yield piece.contiguous().flatten().view(torch.uint8).numpy().data
            n_bytes += piece.nbytes
        if n_bytes != output.n_bytes:
            raise ValueError(f"{output.name}: made {n_bytes} bytes, planned {output.shape}")


def _header(outputs: Mapping[str, OutputTensor]) -> bytes:
    """Return length and JSON of a safetensors file, padded so that the data start at a multiple of 64 bytes.

    Args:
        outputs: Its tensors, in order, by the names that they are stored under.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, output in outputs.items():
        entries[name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [start, start + output.n_bytes],
        }
        start += output.n_bytes

    # The format allows blanks behind the JSON.
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def finish(
    export: CheckpointExport, folder: StoragePath, files: dict[str, list[OutputTensor]], manifest: dict[str, Any]
) -> None:
    """Write all that is not a weight, ``seap.json`` last.

    Args:
        export: The checkpoint.
        folder: Its folder, where the weights are already.
        files: Tensors of every weight file, by its name.
        manifest: Content of ``seap.json``.
    """
    write_companions(export, folder, files)
    # Last: with it the checkpoint is whole.
    write_json(folder / "seap.json", manifest)


def write_companions(export: CheckpointExport, folder: StoragePath, files: dict[str, list[OutputTensor]]) -> None:
    """Write what a program needs to load the weights: index, config, code, the base's tokenizer.

    Args:
        export: The checkpoint.
        folder: Its folder, where the weights are already.
        files: Tensors of every weight file, by its name.
    """
    from seap_ray.models import hf

    # A single file needs no index.
    if [*files] != ["model.safetensors"]:
        total = sum(output.n_bytes for outputs in files.values() for output in outputs)
        names = {export.base.stored_name(output.name): file for file, outputs in files.items() for output in outputs}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    write_json(folder / "config.json", export.config())

    # A set, since a file may match two patterns, as tokenizer.model does.
    companions: set[Path] = set()
    for pattern in COMPANION_FILES:
        companions |= {file for file in export.base.folder.glob(pattern) if file.is_file()}
    # transformers has the classes of a stock checkpoint itself.
    code = [] if export.stock else list(hf.FILES)

    for file in [*sorted(companions), *code]:
        with atomic_write(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)

    tokenizer_config = _tokenizer_config(export)
    if tokenizer_config:
        write_json(folder / TOKENIZER_CONFIG, tokenizer_config)


def _tokenizer_config(export: CheckpointExport) -> dict[str, Any] | None:
    """Return the ``tokenizer_config.json`` of the checkpoint; None where a copy of the base's says the same.

    transformers chooses a tokenizer's class by the model type and by the class that this file names. For some families
    (Qwen2, Phi-3) the model type wins. It does not know a compacted checkpoint's model type, so that the file decides
    alone and must name the class that the base's tokenizer really has.
    """
    base = export.base
    if export.config()["model_type"] == (base.whole_config or base.config)["model_type"]:
        return None

    file = base.folder / TOKENIZER_CONFIG
    stored: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    # transformers asks tokenizer_config.json first, then config.json; without either the tokenizer is a generic one.
    named = stored.get("tokenizer_class") or base.config.get("tokenizer_class") or GENERIC_TOKENIZERS[0]

    actual = _tokenizer_class(base.folder)
    are_generic = named in GENERIC_TOKENIZERS and actual in GENERIC_TOKENIZERS
    if actual is None or are_generic or named.removesuffix("Fast") == actual.removesuffix("Fast"):
        return None

    return {**stored, "tokenizer_class": actual}


@cache
def _tokenizer_class(folder: Path) -> str | None:
    """Return the name of the class of a checkpoint's tokenizer; None where it has none, or one by code of its own."""
    from transformers import AutoTokenizer

    try:
        return type(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)).__name__
    # What transformers raises for no tokenizer, a library that is missing, or code that is not
    # trusted.
    except (ImportError, OSError, ValueError):
        return None


def parse_size(text: str) -> int:
    """Return bytes as Hugging Face counts them: ``5GB`` -> 5,000,000,000."""
    number = text[:-2]
    unit = text[-2:]
    return int(float(number) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit])
