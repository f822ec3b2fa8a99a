"""Compacted models: a family's own classes, every decoder layer built from that layer's own configuration.

Each family has the classes that transformers has of it: the model without a head, which engines such as vLLM build, and
those that predict tokens, classify sequences and classify tokens. They are made when they are first asked for:
``SeapLlamaForCausalLM`` is transformers' ``LlamaForCausalLM`` with what stands in this file.

This file travels with every checkpoint and needs transformers alone.
"""

import copy
from functools import cache
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration_seap import class_in_transformers, config_class_named

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


def dense_twin(config: ConfigT, layer_keys: tuple[str, ...] = ()) -> ConfigT:
    """Return a configuration from which a family's own model can be built, without what a cut makes differ by layer.

    Args:
        config: The compacted model's configuration.
        layer_keys: Keys that differ by layer in the family's own models as well.
    """
    # A shallow copy: one key alone is set anew.
    twin = copy.copy(config)
    twin.per_layer_config = None
    if layer_keys:
        twin.per_layer_config = {i: _values(layer, layer_keys) for i, layer in enumerate(config.per_layer_config)}
    return twin


def _values(config: PreTrainedConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return what a layer's configuration has for some keys."""
    return {key: getattr(config, key) for key in keys}


def resize_layers(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    *,
    attention: str = "self_attn",
    o_proj: str = "self_attn.o_proj",
    down_proj: str | None = "mlp.down_proj",
    heads_of_hidden_size: bool = False,
    whole: tuple[str, ...] = (),
) -> None:
    """Replace every decoder layer of a model by one of the same class with the layer's own widths and output biases.

    Args:
        model: The family's own model, built dense.
        config: The compacted model's configuration.
        attention: Name of the attention inside a layer.
        o_proj: Name of the attention's output module inside a layer.
        down_proj: Name of the MLP's output module; None where it cannot have a bias.
        heads_of_hidden_size: The family builds attention as wide as the hidden size, so that it must be narrowed to
            the layer's heads of the dense model's size.
        whole: Names of modules that stay as the dense model has them, where a layer has them.
    """
    decoder = model.get_decoder()
    n_heads = model.config.num_attention_heads
    # The family chose it while it was built; the layers below are built with it.
    config._attn_implementation = model.config._attn_implementation
    # Until here they have the dense twin's configuration.
    for module in (model, model.base_model, decoder):
        module.config = config

    for i, layer_config in enumerate(config.per_layer_config):
        built_from = layer_config
        if heads_of_hidden_size:
            # The dense number of heads, from which the family computes the head size.
            built_from = copy.copy(layer_config)
            built_from.num_attention_heads = n_heads

        layer = type(decoder.layers[i])(built_from, i)
        if heads_of_hidden_size:
            _narrow(layer.get_submodule(attention), layer_config)
        dense_modules = dict(decoder.layers[i].named_modules())
        for path in whole:
            if path in dense_modules:
                layer.set_submodule(path, dense_modules[path])
        # set_attn_implementation works on the whole model's config. Layers of hybrids may have no attention.
        if attention in dense_modules:
            layer.get_submodule(attention).config = config

        biases = {o_proj: layer_config.o_proj_bias, down_proj: getattr(layer_config, "down_proj_bias", False)}
        for name, has_bias in biases.items():
            # The family's own class has built the module without one.
            if name and has_bias:
                linear = layer.get_submodule(name)
                layer.set_submodule(name, nn.Linear(linear.in_features, linear.out_features, bias=True))
        decoder.layers[i] = layer

    # Once more what a model does when it is built: its layers are new.
    model.post_init()


def _narrow(attention: nn.Module, layer_config: PreTrainedConfig) -> None:
    """Leave a layer's heads: rows of the projections before them, columns of the one behind."""
    heads = layer_config.num_attention_heads
    groups = getattr(layer_config, "num_key_value_heads", heads)
    head_dim = layer_config.head_dim
    rows = {"q_proj": heads, "k_proj": groups, "v_proj": groups, "query_key_value": 3 * heads}

    # A list, since setattr changes the children.
    children: list[tuple[str, Any]] = list(attention.named_children())
    for name, linear in children:
        if name in rows:
            narrowed = nn.Linear(linear.in_features, rows[name] * head_dim, bias=linear.bias is not None)
        elif name in ("o_proj", "out_proj", "dense"):
            narrowed = nn.Linear(heads * head_dim, linear.out_features, bias=linear.bias is not None)
        else:
            continue
        setattr(attention, name, narrowed)

    # Numbers that some families split the projections by.
    numbers = {"num_heads": heads, "num_key_value_heads": groups, "num_key_value_groups": heads // groups}
    for key, number in numbers.items():
        if hasattr(attention, key):
            setattr(attention, key, number)


class Compacted:
    """Mixed into a family's model: built dense, and every layer replaced by one of its own widths."""

    resizing: ClassVar[dict[str, Any]] = {}
    """Keyword arguments of ``resize_layers`` for the family."""
    layer_keys: ClassVar[tuple[str, ...]] = ()
    """Configuration keys that differ by layer in the family's own models as well."""

    def __init__(self, config: PreTrainedConfig):
        differing = config.per_layer_attributes or ()
        if config._attn_implementation == "sglang" and "num_attention_heads" in differing:
            raise ValueError(
                "SGLang gives the attention of every layer the number of heads that the whole model's configuration "
                "has, and layers of this checkpoint have others: serve it with vLLM, or write it with "
                "export.format=stock"
            )

        super().__init__(dense_twin(config, self.layer_keys))  # type: ignore[call-arg]  # the family's
        resize_layers(self, config, **self.resizing)  # type: ignore[arg-type]


class Classifier:
    """Mixed into a family's classifier, whose model without a head transformers builds from the configuration."""

    base_class: ClassVar[type[PreTrainedModel]]
    """The family's model without a head."""

    def __init__(self, config: PreTrainedConfig):
        # Every folder that is loaded brings a class of its own for its configuration.
        AutoModel.register(type(config), self.base_class, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]  # the family's


class Multimodal:
    """Mixed into a model that reads pictures, too, whose language model transformers builds from its configuration."""

    def __init__(self, config: PreTrainedConfig):
        if config._attn_implementation == "vllm":
            raise ValueError(
                "vLLM does not serve a compacted model that reads pictures: load the checkpoint with transformers, or "
                "write it with export.format=stock"
            )
        text_class: Any = type(config.text_config)
        register_classes(text_class)
        prefix = text_class.__name__.removesuffix("Config")
        # Every folder that is loaded brings a class of its own for its configuration.
        AutoModel.register(text_class, globals()[f"{prefix}Model"], exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]  # the family's


class MultimodalLlama4(Multimodal):
    """Mixed into a Llama 4 that reads pictures, whose language model transformers builds as its own class."""

    def __init__(self, config: PreTrainedConfig):
        dense = copy.copy(config)
        dense.text_config = dense_twin(config.text_config)
        super().__init__(dense)

        self.config = config
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()  # type: ignore[attr-defined]  # the family's


class LayerConfigs:
    """Mixed into a Phi-3: every attention has its own layer's configuration, whose heads say where the queries end."""

    def set_attn_implementation(self, *settings, **named_settings):
        """Set the attention implementation of the model and of every layer's own configuration."""
        super().set_attn_implementation(*settings, **named_settings)  # type: ignore[misc]  # the family's

        for layer in self.get_decoder().layers:  # type: ignore[attr-defined]
            layer.self_attn.config._attn_implementation = self.config._attn_implementation  # type: ignore[attr-defined]


class ClassifierPhi3(LayerConfigs, Classifier):
    """Mixed into a Phi-3's classifier."""


class CompactedPhi3(LayerConfigs, Compacted):
    """Mixed into a Phi-3's model: its queries, keys and values are one projection."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)

        for layer, layer_config in zip(self.get_decoder().layers, config.per_layer_config, strict=True):  # type: ignore[attr-defined]
            layer.self_attn.config = layer_config
        self.set_attn_implementation(config._attn_implementation)


class CompactedMixture(Compacted):
    """Mixed into a mixture of experts: the biases of compensation are on attention's output alone.

    The width of shared experts, which stay whole, follows in some families from that of the others.
    """

    resizing = {"down_proj": None, "whole": ("mlp.shared_experts",)}
    width_key = "moe_intermediate_size"
    """Key of the width of an MoE expert."""

    def __init__(self, config: PreTrainedConfig):
        differing = config.per_layer_attributes or ()
        # vLLM's own layers would take the narrower tensors and leave the rest of theirs as memory is.
        if config._attn_implementation == "vllm" and self.width_key in differing:
            raise ValueError(
                "without the plugin of seap_ray, vLLM builds the MoE experts of every layer as wide as the whole "
                "model's configuration says, and layers of this checkpoint have narrower ones: install seap_ray "
                "beside vLLM"
            )
        super().__init__(config)


class CompactedMixtral(CompactedMixture):
    """Mixed into the models of mixtures that have no other MLPs, as Mixtral and OLMoE."""

    width_key = "intermediate_size"


class CompactedLlama4(CompactedMixtral):
    """Mixed into a Llama 4's model, whose shared expert is as wide as the dense model's others."""

    resizing = {"down_proj": None, "whole": ("feed_forward.shared_expert",)}

    def get_decoder(self):
        """Return the model without its head, which transformers looks for under another name."""
        return self.model if hasattr(self, "model") else self


class CompactedOPT(Compacted):
    """Mixed into an OPT's model."""

    resizing = {"o_proj": "self_attn.out_proj", "down_proj": "fc2", "heads_of_hidden_size": True}


class CompactedGPTNeoX(Compacted):
    """Mixed into a GPT-NeoX's model."""

    resizing = {
        "attention": "attention",
        "o_proj": "attention.dense",
        "down_proj": "mlp.dense_4h_to_h",
        "heads_of_hidden_size": True,
    }


class CompactedStarcoder2(Compacted):
    """Mixed into a StarCoder2's model."""

    resizing = {"down_proj": "mlp.c_proj"}


class CompactedPhi(Compacted):
    """Mixed into a Phi's model."""

    resizing = {"o_proj": "self_attn.dense", "down_proj": "mlp.fc2"}


class CompactedHidden(Compacted):
    """Mixed into a model whose attention transformers builds as wide as the hidden size."""

    resizing = {"heads_of_hidden_size": True}


class CompactedGemma4(Compacted):
    """Mixed into a Gemma 4's model, whose heads are of two sizes."""

    layer_keys = ("head_dim", "num_key_value_heads")


class CompactedLfm2(Compacted):
    """Mixed into an LFM2's model."""

    resizing = {"o_proj": "self_attn.out_proj", "down_proj": "feed_forward.w2"}


class CompactedGraniteMoeHybrid(Compacted):
    """Mixed into the model of a Granite hybrid without MoE experts."""

    resizing = {"down_proj": "shared_mlp.output_linear"}


class CompactedFalconH1(Compacted):
    """Mixed into a Falcon-H1's model, which gives its mixers a buffer when they are built."""

    resizing = {"down_proj": "feed_forward.down_proj", "whole": ("mamba",)}

    def initialize_weights(self):
        """Fill what no checkpoint holds, as transformers does, and the mixers' buffers.

        The family's decoder fills these, and transformers passes it over in a class that is not its own, since it has
        no tensor itself.
        """
        super().initialize_weights()  # type: ignore[misc]  # the family's
        decoder = self.get_decoder()  # type: ignore[attr-defined]  # the family's
        decoder._init_weights(decoder)


class CompactedNemotronH(Compacted):
    """Mixed into a Nemotron-H's model, whose layers are attention, a mixer or an MLP alone."""

    resizing = {"attention": "mixer", "o_proj": "mixer.o_proj", "down_proj": "mixer.down_proj"}


MIXINS: dict[str, type] = {
    "SeapPhi3": CompactedPhi3,
    "SeapMixtral": CompactedMixtral,
    "SeapStarcoder2": CompactedStarcoder2,
    "SeapPhi": CompactedPhi,
    "SeapStableLm": CompactedHidden,
    "SeapHelium": CompactedHidden,
    "SeapOlmoe": CompactedMixtral,
    "SeapFlexOlmo": CompactedMixtral,
    "SeapMiniMaxM2": CompactedMixtral,
    "SeapPhimoe": CompactedMixtral,
    "SeapGptOss": CompactedMixtral,
    "SeapLlama4": CompactedLlama4,
    "SeapGemma4": CompactedGemma4,
    "SeapLfm2": CompactedLfm2,
    "SeapGraniteMoeHybrid": CompactedGraniteMoeHybrid,
    "SeapFalconH1": CompactedFalconH1,
    "SeapNemotronH": CompactedNemotronH,
    "SeapOPT": CompactedOPT,
    "SeapGPTNeoX": CompactedGPTNeoX,
}
"""What is mixed into the models of a family, by the beginning of their classes' names; into all others ``Compacted``,
and ``CompactedMixture`` into mixtures of experts."""
AUTO_CLASSES = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
"""Ends of the names of a family's classes, and the auto classes that build them."""
MULTIMODAL_MIXINS: dict[str, type] = {"SeapLlama4": MultimodalLlama4}
"""What is mixed into a model that reads pictures, by the beginning of its class's name; ``Multimodal`` into others."""
MULTIMODAL_CLASSES = {"ForConditionalGeneration": AutoModelForImageTextToText}
"""The same of a multimodal checkpoint, whose configuration's name ends in ``MultimodalConfig``."""


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Make the classes of a family when one of them is first asked for, as an attribute of this module."""
    for end in (*AUTO_CLASSES, *MULTIMODAL_CLASSES):
        if name.startswith("Seap") and name.endswith(end):
            kind = "Multimodal" if end in MULTIMODAL_CLASSES else ""
            config_class: Any = config_class_named(f"{name.removesuffix(end)}{kind}Config")
            register_classes(config_class)
            break
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def register_classes(config_class: Any) -> None:
    """Make the classes of a family; let the auto classes build them, and ``save_pretrained`` write this file with them.

    Args:
        config_class: The family's class of ``configuration_seap``.
    """
    config_class.register_for_auto_class()
    _copy_conversion(config_class.model_type, config_class.model_type.removeprefix("seap_"))

    is_multimodal = config_class.__name__.endswith("MultimodalConfig")
    # The model without a head comes first: classifiers are built with it.
    for end, auto_class in (MULTIMODAL_CLASSES if is_multimodal else AUTO_CLASSES).items():
        model_class = _make_class(config_class, end)
        if model_class is not None:
            globals()[model_class.__name__] = model_class
            model_class.register_for_auto_class(auto_class)
            auto_class.register(config_class, model_class, exist_ok=True)


def _make_class(config_class: type[PreTrainedConfig], end: str) -> type[PreTrainedModel] | None:
    """Make the class of a family whose name ends so; None where transformers has none: not all classify."""
    prefix = config_class.__name__.removesuffix("Config").removesuffix("Multimodal")
    name = f"{prefix}{end}"
    try:
        family_class = class_in_transformers(name)
    except AttributeError:
        return None

    is_mixture = not hasattr(config_class, "down_proj_bias")
    mixin = MIXINS.get(prefix, CompactedMixture if is_mixture else Compacted)
    content = {"__module__": __name__, "__doc__": f"A compacted {family_class.__name__}.", "config_class": config_class}
    if end in MULTIMODAL_CLASSES:
        mixin = MULTIMODAL_MIXINS.get(prefix, Multimodal)
    # What is inside of such a classifier transformers builds from the configuration.
    elif issubclass(family_class, (GenericForSequenceClassification, GenericForTokenClassification)):
        mixin = ClassifierPhi3 if issubclass(mixin, LayerConfigs) else Classifier
        content["base_class"] = globals()[f"{prefix}Model"]

    _copy_conversion(name, family_class.__name__)
    return type(name, (mixin, family_class), content)


def _copy_conversion(ours: str, theirs: str) -> None:
    """Give a class or model type of ours the conversion of weights that the family's own has.

    Checkpoints have other names and shapes than classes for a NeoX's head and a mixture's experts; ours have so, too.
    """
    if conversion := get_checkpoint_conversion_mapping(theirs):
        register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)
