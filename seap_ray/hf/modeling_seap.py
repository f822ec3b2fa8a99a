"""Compacted models: a family's own classes, every decoder layer built from that layer's own configuration.

This file travels with every checkpoint and needs transformers alone.
"""

import copy

from torch import nn
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2ForCausalLM

from .configuration_seap import SeapLlamaConfig, SeapQwen2Config


def dense_twin(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration without what differs by layer, which a family's own model can be built from."""
    twin = copy.copy(config)
    twin.per_layer_config = None
    return twin


def resize_layers(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Replace every decoder layer by one of the same class with the widths and output biases of its own."""
    config._attn_implementation = model.config._attn_implementation
    model.config = model.model.config = config
    layers = model.model.layers
    for i, own in enumerate(config.per_layer_config):
        layer = type(layers[i])(own, i)
        layer.self_attn.config = config  # set_attn_implementation works on the whole model's config
        if own.o_proj_bias:
            layer.self_attn.o_proj = _with_bias(layer.self_attn.o_proj)
        if own.down_proj_bias:
            layer.mlp.down_proj = _with_bias(layer.mlp.down_proj)
        layers[i] = layer
    model.post_init()


def _with_bias(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias=True)


class SeapLlamaForCausalLM(LlamaForCausalLM):
    config_class = SeapLlamaConfig
    config: SeapLlamaConfig

    def __init__(self, config: SeapLlamaConfig):
        super().__init__(dense_twin(config))
        resize_layers(self, config)


class SeapQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = SeapQwen2Config
    config: SeapQwen2Config

    def __init__(self, config: SeapQwen2Config):
        super().__init__(dense_twin(config))
        resize_layers(self, config)
