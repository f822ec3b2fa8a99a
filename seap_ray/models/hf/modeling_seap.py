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
    """The same configuration without what differs by layer, which a family's own model can be built from."""
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
    """Replace every decoder layer by one of the same class with the widths and output biases of its own.

    ``heads_of_hidden_size``: the family's attention is as wide as the hidden size, so that it must be narrowed.
    """
    decoder, n_heads = model.get_decoder(), model.config.num_attention_heads
    config._attn_implementation = model.config._attn_implementation
    for module in (model, model.base_model, decoder):
        module.config = config
    for i, own in enumerate(config.per_layer_config):
        built_from = own
        if heads_of_hidden_size:
            built_from = copy.copy(own)
            built_from.num_attention_heads = n_heads
        layer = type(decoder.layers[i])(built_from, i)
        if heads_of_hidden_size:
            _narrow(layer.get_submodule(attention), own.num_attention_heads / n_heads)
            layer.get_submodule(attention).num_heads = own.num_attention_heads
        layer.get_submodule(attention).config = config  # set_attn_implementation works on the whole model's config
        for name, has_bias in ((o_proj, own.o_proj_bias), (down_proj, getattr(own, "down_proj_bias", False))):
            if name and has_bias:
                linear = layer.get_submodule(name)
                layer.set_submodule(name, nn.Linear(linear.in_features, linear.out_features, bias=True))
        decoder.layers[i] = layer
    model.post_init()


def _narrow(attention: nn.Module, share: float) -> None:
    """Leave a share of the heads: rows of the projections before them, columns of the one behind."""
    for name, linear in list(attention.named_children()):
        if not isinstance(linear, nn.Linear):
            continue
        inside, outside = linear.in_features, linear.out_features
        if name in ("out_proj", "dense"):
            inside = round(inside * share)
        else:
            outside = round(outside * share)
        setattr(attention, name, nn.Linear(inside, outside, bias=linear.bias is not None))


class Compacted:
    """Mixed into a family's model: built dense, and every layer replaced by one of its own widths."""

    resizing: ClassVar[dict[str, Any]] = {}
    """What ``resize_layers`` is told of the family."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(dense_twin(config))  # type: ignore[call-arg]  # the family's
        resize_layers(self, config, **self.resizing)  # type: ignore[arg-type]


class SeapLlamaForCausalLM(Compacted, LlamaForCausalLM):
    config_class = SeapLlamaConfig
    config: SeapLlamaConfig


class SeapMistralForCausalLM(Compacted, MistralForCausalLM):
    config_class = SeapMistralConfig
    config: SeapMistralConfig


class SeapQwen2ForCausalLM(Compacted, Qwen2ForCausalLM):
    config_class = SeapQwen2Config
    config: SeapQwen2Config


class SeapQwen3ForCausalLM(Compacted, Qwen3ForCausalLM):
    config_class = SeapQwen3Config
    config: SeapQwen3Config


class SeapGemma2ForCausalLM(Compacted, Gemma2ForCausalLM):
    config_class = SeapGemma2Config
    config: SeapGemma2Config


class SeapGemma3ForCausalLM(Compacted, Gemma3ForCausalLM):
    config_class = SeapGemma3Config
    config: SeapGemma3Config


class SeapPhi3ForCausalLM(Compacted, Phi3ForCausalLM):
    config_class = SeapPhi3Config
    config: SeapPhi3Config

    def __init__(self, config: SeapPhi3Config):
        super().__init__(config)
        for layer, own in zip(self.model.layers, config.per_layer_config, strict=True):
            layer.self_attn.config = own  # which tells where the queries end in the fused projection
        self.set_attn_implementation(config._attn_implementation)

    def set_attn_implementation(self, attn_implementation, *more, **named):
        super().set_attn_implementation(attn_implementation, *more, **named)
        for layer in self.model.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation


class SeapMixtralForCausalLM(Compacted, MixtralForCausalLM):
    config_class = SeapMixtralConfig
    config: SeapMixtralConfig
    resizing = {"down_proj": None}


class SeapQwen3MoeForCausalLM(Compacted, Qwen3MoeForCausalLM):
    config_class = SeapQwen3MoeConfig
    config: SeapQwen3MoeConfig
    resizing = {"down_proj": None}


class SeapOPTForCausalLM(Compacted, OPTForCausalLM):
    config_class = SeapOPTConfig
    config: SeapOPTConfig
    resizing = {"o_proj": "self_attn.out_proj", "down_proj": "fc2", "heads_of_hidden_size": True}


class SeapGPTNeoXForCausalLM(Compacted, GPTNeoXForCausalLM):
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
