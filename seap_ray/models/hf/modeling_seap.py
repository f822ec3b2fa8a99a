"""Compacted models: a family's own classes, every decoder layer built from that layer's own configuration.

This file travels with every checkpoint and needs transformers alone.
"""

import copy
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    OPTForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
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
        super().__init__(dense_twin(config))  # type: ignore[call-arg]  # the family's
        resize_layers(self, config, **self.resizing)  # type: ignore[arg-type]


class SeapLlamaForCausalLM(Compacted, LlamaForCausalLM):
    """A compacted Llama."""

    config_class = SeapLlamaConfig
    config: SeapLlamaConfig


class SeapMistralForCausalLM(Compacted, MistralForCausalLM):
    """A compacted Mistral."""

    config_class = SeapMistralConfig
    config: SeapMistralConfig


class SeapQwen2ForCausalLM(Compacted, Qwen2ForCausalLM):
    """A compacted Qwen2."""

    config_class = SeapQwen2Config
    config: SeapQwen2Config


class SeapQwen3ForCausalLM(Compacted, Qwen3ForCausalLM):
    """A compacted Qwen3."""

    config_class = SeapQwen3Config
    config: SeapQwen3Config


class SeapGemma2ForCausalLM(Compacted, Gemma2ForCausalLM):
    """A compacted Gemma 2."""

    config_class = SeapGemma2Config
    config: SeapGemma2Config


class SeapGemma3ForCausalLM(Compacted, Gemma3ForCausalLM):
    """A compacted Gemma 3."""

    config_class = SeapGemma3Config
    config: SeapGemma3Config


class SeapPhi3ForCausalLM(Compacted, Phi3ForCausalLM):
    """A compacted Phi-3."""

    config_class = SeapPhi3Config
    config: SeapPhi3Config

    def __init__(self, config: SeapPhi3Config):
        super().__init__(config)

        for layer, layer_config in zip(self.model.layers, config.per_layer_config, strict=True):
            # The number of heads says where the queries end in the fused projection.
            layer.self_attn.config = layer_config
        self.set_attn_implementation(config._attn_implementation)

    def set_attn_implementation(self, attn_implementation, *more, **named):
        """Set the attention implementation of the model and of every layer's own configuration."""
        super().set_attn_implementation(attn_implementation, *more, **named)

        for layer in self.model.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation


class SeapMixtralForCausalLM(Compacted, MixtralForCausalLM):
    """A compacted Mixtral."""

    config_class = SeapMixtralConfig
    config: SeapMixtralConfig
    resizing = {"down_proj": None}


class SeapQwen3MoeForCausalLM(Compacted, Qwen3MoeForCausalLM):
    """A compacted Qwen3 MoE."""

    config_class = SeapQwen3MoeConfig
    config: SeapQwen3MoeConfig
    resizing = {"down_proj": None}


class SeapOPTForCausalLM(Compacted, OPTForCausalLM):
    """A compacted OPT."""

    config_class = SeapOPTConfig
    config: SeapOPTConfig
    resizing = {"o_proj": "self_attn.out_proj", "down_proj": "fc2", "heads_of_hidden_size": True}


class SeapGPTNeoXForCausalLM(Compacted, GPTNeoXForCausalLM):
    """A compacted GPT-NeoX."""

    config_class = SeapGPTNeoXConfig
    config: SeapGPTNeoXConfig
    resizing = {
        "attention": "attention",
        "o_proj": "attention.dense",
        "down_proj": "mlp.dense_4h_to_h",
        "heads_of_hidden_size": True,
    }


# Of a NeoX's head and a mixture's experts checkpoints have other names and shapes than the classes; ours have so, too.
for ours, theirs in (
    (SeapGPTNeoXForCausalLM.__name__, GPTNeoXForCausalLM.__name__),
    (SeapMixtralConfig.model_type, "mixtral"),
    (SeapQwen3MoeConfig.model_type, "qwen3_moe"),
):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
