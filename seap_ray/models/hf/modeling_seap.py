"""Compacted models: a family's own classes, every decoder layer built from that layer's own configuration.

Each family has the classes that transformers has of it: the model without a head, which engines such as vLLM build, and
those that predict tokens, classify sequences and classify tokens.

This file travels with every checkpoint and needs transformers alone.
"""

import copy
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
    OPTForCausalLM,
    OPTForSequenceClassification,
    OPTModel,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .configuration_seap import (
    SeapGemma2Config,
    SeapGemma3Config,
    SeapGPTNeoXConfig,
    SeapLlamaConfig,
    SeapMistralConfig,
    SeapMixtralConfig,
    SeapOPTConfig,
    SeapPhi3Config,
    SeapQwen2Config,
    SeapQwen3Config,
    SeapQwen3MoeConfig,
)

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)


def dense_twin(config: ConfigT) -> ConfigT:
    """Return a configuration without what differs by layer, from which a family's own model can be built."""
    # A shallow copy: one key alone is set anew.
    twin = copy.copy(config)
    twin.per_layer_config = None
    return twin


def resize_layers(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    *,
    attention: str = "self_attn",
    o_proj: str = "self_attn.o_proj",
    down_proj: str | None = "mlp.down_proj",
    heads_of_hidden_size: bool = False,
) -> None:
    """Replace every decoder layer of a model by one of the same class with the layer's own widths and output biases.

    Args:
        model: The family's own model, built dense.
        config: The compacted model's configuration.
        attention: Name of the attention inside a layer.
        o_proj: Name of the attention's output module inside a layer.
        down_proj: Name of the MLP's output module; None where it cannot have a bias.
        heads_of_hidden_size: The family builds attention as wide as the hidden size, so that it must be narrowed.
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
            _narrow(layer.get_submodule(attention), layer_config.num_attention_heads / n_heads)
            layer.get_submodule(attention).num_heads = layer_config.num_attention_heads
        # set_attn_implementation works on the whole model's config.
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


def _narrow(attention: nn.Module, share: float) -> None:
    """Leave a share of the heads: rows of the projections before them, columns of the one behind."""
    # A list, since setattr changes the children.
    for name, linear in list(attention.named_children()):
        if not isinstance(linear, nn.Linear):
            continue
        inside = linear.in_features
        outside = linear.out_features

        if name in ("out_proj", "dense"):
            # Behind the heads: its columns are theirs. All others stand before them.
            inside = round(inside * share)
        else:
            outside = round(outside * share)

        setattr(attention, name, nn.Linear(inside, outside, bias=linear.bias is not None))


class Compacted:
    """Mixed into a family's model: built dense, and every layer replaced by one of its own widths."""

    resizing: ClassVar[dict[str, Any]] = {}
    """Keyword arguments of ``resize_layers`` for the family."""

    def __init__(self, config: PreTrainedConfig):
        differing = config.per_layer_attributes or ()
        if config._attn_implementation == "sglang" and "num_attention_heads" in differing:
            raise ValueError(
                "SGLang gives the attention of every layer the number of heads that the whole model's configuration "
                "has, and layers of this checkpoint have others: serve it with vLLM, or write it with "
                "export.format=stock"
            )

        super().__init__(dense_twin(config))  # type: ignore[call-arg]  # the family's
        resize_layers(self, config, **self.resizing)  # type: ignore[arg-type]


class Classifier:
    """Mixed into a family's classifier, whose model without a head transformers builds from the configuration."""

    base_class: ClassVar[type[PreTrainedModel]]
    """The family's model without a head."""

    def __init__(self, config: PreTrainedConfig):
        # Every folder that is loaded brings a class of its own for its configuration.
        AutoModel.register(type(config), self.base_class, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]  # the family's


class LayerConfigs:
    """Mixed into a Phi-3: every attention has its own layer's configuration, whose heads say where the queries end."""

    def set_attn_implementation(self, *settings, **named_settings):
        """Set the attention implementation of the model and of every layer's own configuration."""
        super().set_attn_implementation(*settings, **named_settings)  # type: ignore[misc]  # the family's

        for layer in self.get_decoder().layers:  # type: ignore[attr-defined]
            layer.self_attn.config._attn_implementation = self.config._attn_implementation  # type: ignore[attr-defined]


class CompactedPhi3(LayerConfigs, Compacted):
    """Mixed into a Phi-3's model: its queries, keys and values are one projection."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)

        for layer, layer_config in zip(self.get_decoder().layers, config.per_layer_config, strict=True):  # type: ignore[attr-defined]
            layer.self_attn.config = layer_config
        self.set_attn_implementation(config._attn_implementation)


class CompactedMixture(Compacted):
    """Mixed into a mixture of experts: the biases of compensation are on attention's output alone."""

    resizing = {"down_proj": None}
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


OPT_LAYERS = {"o_proj": "self_attn.out_proj", "down_proj": "fc2", "heads_of_hidden_size": True}
"""How the layers of an OPT are resized."""
NEOX_LAYERS = {
    "attention": "attention",
    "o_proj": "attention.dense",
    "down_proj": "mlp.dense_4h_to_h",
    "heads_of_hidden_size": True,
}
"""How the layers of a GPT-NeoX are resized."""


class SeapLlamaModel(Compacted, LlamaModel):
    """A compacted Llama without a head."""

    config_class = SeapLlamaConfig


class SeapLlamaForCausalLM(Compacted, LlamaForCausalLM):
    """A compacted Llama."""

    config_class = SeapLlamaConfig


class SeapLlamaForSequenceClassification(Classifier, LlamaForSequenceClassification):
    """A compacted Llama that classifies sequences."""

    config_class = SeapLlamaConfig
    base_class = SeapLlamaModel


class SeapLlamaForTokenClassification(Classifier, LlamaForTokenClassification):
    """A compacted Llama that classifies tokens."""

    config_class = SeapLlamaConfig
    base_class = SeapLlamaModel


class SeapMistralModel(Compacted, MistralModel):
    """A compacted Mistral without a head."""

    config_class = SeapMistralConfig


class SeapMistralForCausalLM(Compacted, MistralForCausalLM):
    """A compacted Mistral."""

    config_class = SeapMistralConfig


class SeapMistralForSequenceClassification(Classifier, MistralForSequenceClassification):
    """A compacted Mistral that classifies sequences."""

    config_class = SeapMistralConfig
    base_class = SeapMistralModel


class SeapMistralForTokenClassification(Classifier, MistralForTokenClassification):
    """A compacted Mistral that classifies tokens."""

    config_class = SeapMistralConfig
    base_class = SeapMistralModel


class SeapQwen2Model(Compacted, Qwen2Model):
    """A compacted Qwen2 without a head."""

    config_class = SeapQwen2Config


class SeapQwen2ForCausalLM(Compacted, Qwen2ForCausalLM):
    """A compacted Qwen2."""

    config_class = SeapQwen2Config


class SeapQwen2ForSequenceClassification(Classifier, Qwen2ForSequenceClassification):
    """A compacted Qwen2 that classifies sequences."""

    config_class = SeapQwen2Config
    base_class = SeapQwen2Model


class SeapQwen2ForTokenClassification(Classifier, Qwen2ForTokenClassification):
    """A compacted Qwen2 that classifies tokens."""

    config_class = SeapQwen2Config
    base_class = SeapQwen2Model


class SeapQwen3Model(Compacted, Qwen3Model):
    """A compacted Qwen3 without a head."""

    config_class = SeapQwen3Config


class SeapQwen3ForCausalLM(Compacted, Qwen3ForCausalLM):
    """A compacted Qwen3."""

    config_class = SeapQwen3Config


class SeapQwen3ForSequenceClassification(Classifier, Qwen3ForSequenceClassification):
    """A compacted Qwen3 that classifies sequences."""

    config_class = SeapQwen3Config
    base_class = SeapQwen3Model


class SeapQwen3ForTokenClassification(Classifier, Qwen3ForTokenClassification):
    """A compacted Qwen3 that classifies tokens."""

    config_class = SeapQwen3Config
    base_class = SeapQwen3Model


class SeapGemma2Model(Compacted, Gemma2Model):
    """A compacted Gemma 2 without a head."""

    config_class = SeapGemma2Config


class SeapGemma2ForCausalLM(Compacted, Gemma2ForCausalLM):
    """A compacted Gemma 2."""

    config_class = SeapGemma2Config


class SeapGemma2ForSequenceClassification(Classifier, Gemma2ForSequenceClassification):
    """A compacted Gemma 2 that classifies sequences."""

    config_class = SeapGemma2Config
    base_class = SeapGemma2Model


class SeapGemma2ForTokenClassification(Classifier, Gemma2ForTokenClassification):
    """A compacted Gemma 2 that classifies tokens."""

    config_class = SeapGemma2Config
    base_class = SeapGemma2Model


class SeapGemma3Model(Compacted, Gemma3TextModel):
    """A compacted Gemma 3 without a head."""

    config_class = SeapGemma3Config


class SeapGemma3ForCausalLM(Compacted, Gemma3ForCausalLM):
    """A compacted Gemma 3."""

    config_class = SeapGemma3Config


class SeapGemma3ForSequenceClassification(Classifier, Gemma3TextForSequenceClassification):
    """A compacted Gemma 3 that classifies sequences."""

    config_class = SeapGemma3Config
    base_class = SeapGemma3Model


class SeapPhi3Model(CompactedPhi3, Phi3Model):
    """A compacted Phi-3 without a head."""

    config_class = SeapPhi3Config


class SeapPhi3ForCausalLM(CompactedPhi3, Phi3ForCausalLM):
    """A compacted Phi-3."""

    config_class = SeapPhi3Config


class SeapPhi3ForSequenceClassification(LayerConfigs, Classifier, Phi3ForSequenceClassification):
    """A compacted Phi-3 that classifies sequences."""

    config_class = SeapPhi3Config
    base_class = SeapPhi3Model


class SeapPhi3ForTokenClassification(LayerConfigs, Classifier, Phi3ForTokenClassification):
    """A compacted Phi-3 that classifies tokens."""

    config_class = SeapPhi3Config
    base_class = SeapPhi3Model


class SeapMixtralModel(CompactedMixture, MixtralModel):
    """A compacted Mixtral without a head."""

    config_class = SeapMixtralConfig
    width_key = "intermediate_size"


class SeapMixtralForCausalLM(CompactedMixture, MixtralForCausalLM):
    """A compacted Mixtral."""

    config_class = SeapMixtralConfig
    width_key = "intermediate_size"


class SeapMixtralForSequenceClassification(Classifier, MixtralForSequenceClassification):
    """A compacted Mixtral that classifies sequences."""

    config_class = SeapMixtralConfig
    base_class = SeapMixtralModel


class SeapMixtralForTokenClassification(Classifier, MixtralForTokenClassification):
    """A compacted Mixtral that classifies tokens."""

    config_class = SeapMixtralConfig
    base_class = SeapMixtralModel


class SeapQwen3MoeModel(CompactedMixture, Qwen3MoeModel):
    """A compacted Qwen3 MoE without a head."""

    config_class = SeapQwen3MoeConfig


class SeapQwen3MoeForCausalLM(CompactedMixture, Qwen3MoeForCausalLM):
    """A compacted Qwen3 MoE."""

    config_class = SeapQwen3MoeConfig


class SeapQwen3MoeForSequenceClassification(Classifier, Qwen3MoeForSequenceClassification):
    """A compacted Qwen3 MoE that classifies sequences."""

    config_class = SeapQwen3MoeConfig
    base_class = SeapQwen3MoeModel


class SeapQwen3MoeForTokenClassification(Classifier, Qwen3MoeForTokenClassification):
    """A compacted Qwen3 MoE that classifies tokens."""

    config_class = SeapQwen3MoeConfig
    base_class = SeapQwen3MoeModel


class SeapOPTModel(Compacted, OPTModel):
    """A compacted OPT without a head."""

    config_class = SeapOPTConfig
    resizing = OPT_LAYERS


class SeapOPTForCausalLM(Compacted, OPTForCausalLM):
    """A compacted OPT."""

    config_class = SeapOPTConfig
    resizing = OPT_LAYERS


class SeapOPTForSequenceClassification(Compacted, OPTForSequenceClassification):
    """A compacted OPT that classifies sequences."""

    config_class = SeapOPTConfig
    resizing = OPT_LAYERS


class SeapGPTNeoXModel(Compacted, GPTNeoXModel):
    """A compacted GPT-NeoX without a head."""

    config_class = SeapGPTNeoXConfig
    resizing = NEOX_LAYERS


class SeapGPTNeoXForCausalLM(Compacted, GPTNeoXForCausalLM):
    """A compacted GPT-NeoX."""

    config_class = SeapGPTNeoXConfig
    resizing = NEOX_LAYERS


class SeapGPTNeoXForSequenceClassification(Compacted, GPTNeoXForSequenceClassification):
    """A compacted GPT-NeoX that classifies sequences."""

    config_class = SeapGPTNeoXConfig
    resizing = NEOX_LAYERS


class SeapGPTNeoXForTokenClassification(Compacted, GPTNeoXForTokenClassification):
    """A compacted GPT-NeoX that classifies tokens."""

    config_class = SeapGPTNeoXConfig
    resizing = NEOX_LAYERS


AUTO_CLASSES = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
"""Ends of the names of the classes above, and the auto classes that build them."""


def register_classes() -> None:
    """Let the auto classes build the classes above, and ``save_pretrained`` write this file beside the weights."""
    for name, model_class in list(globals().items()):
        for end, auto_class in AUTO_CLASSES.items():
            if name.startswith("Seap") and name.endswith(end):
                auto_class.register(model_class.config_class, model_class, exist_ok=True)
                model_class.register_for_auto_class(auto_class)
                model_class.config_class.register_for_auto_class()


register_classes()

# Of a NeoX's head and a mixture's experts checkpoints have other names and shapes than the classes; ours have so, too.
for ours, theirs in (
    (SeapGPTNeoXForCausalLM.__name__, GPTNeoXForCausalLM.__name__),
    (SeapMixtralConfig.model_type, "mixtral"),
    (SeapQwen3MoeConfig.model_type, "qwen3_moe"),
):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
