"""Configurations of compacted models: a family's own, with ``per_layer_config`` for what differs by layer.

These keys may stand in ``per_layer_config``; at the top level they have the values of the dense model:
``num_attention_heads``, ``num_key_value_heads``, the MLP's width, and ``o_proj_bias`` and ``down_proj_bias``, output
biases that the family does not have itself, whatever it calls the modules. ``config.per_layer_config[i]`` has what
layer i has; who reads such a key of the whole configuration gets the dense model's value, with a warning.

This file travels with every checkpoint and needs transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


class LayerWidths:
    """Mixed into a family's configuration: who walks over all keys meets those alone that layers share."""

    def __iter__(self):
        """Yield the keys that have one value for all layers; of the others transformers warns who reads them."""
        differing = self.per_layer_attributes or ()  # type: ignore[attr-defined]  # the family's
        return (key for key in self.__dict__ if key not in differing)


@strict
class SeapLlamaConfig(LayerWidths, LlamaConfig):
    """The configuration of a compacted Llama."""

    model_type = "seap_llama"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapMistralConfig(LayerWidths, MistralConfig):
    """The configuration of a compacted Mistral."""

    model_type = "seap_mistral"

    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapQwen2Config(LayerWidths, Qwen2Config):
    """The configuration of a compacted Qwen2."""

    model_type = "seap_qwen2"

    # vLLM's Llama layer reads it. It is no field, since a Qwen2 always has these biases.
    qkv_bias = True

    # A Qwen2 has no such field: it divides the hidden size by the number of heads, which layers do
    # not share.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapQwen3Config(LayerWidths, Qwen3Config):
    """The configuration of a compacted Qwen3."""

    model_type = "seap_qwen3"

    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapGemma2Config(LayerWidths, Gemma2Config):
    """The configuration of a compacted Gemma 2."""

    model_type = "seap_gemma2"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapGemma3Config(LayerWidths, Gemma3TextConfig):
    """The configuration of a compacted Gemma 3."""

    model_type = "seap_gemma3_text"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapPhi3Config(LayerWidths, Phi3Config):
    """The configuration of a compacted Phi-3."""

    model_type = "seap_phi3"

    # A Phi-3 has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_rope(self):
        """Check nothing: the check needs the number of heads, which layers do not share; the dense model passed it."""

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapMixtralConfig(LayerWidths, MixtralConfig):
    """The configuration of a compacted Mixtral."""

    model_type = "seap_mixtral"

    o_proj_bias: bool = False


@strict
class SeapQwen3MoeConfig(LayerWidths, Qwen3MoeConfig):
    """The configuration of a compacted Qwen3 MoE."""

    model_type = "seap_qwen3_moe"

    # A Qwen3 MoE has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False


@strict
class SeapOPTConfig(LayerWidths, OPTConfig):
    """The configuration of a compacted OPT."""

    model_type = "seap_opt"

    # An OPT has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapGPTNeoXConfig(LayerWidths, GPTNeoXConfig):
    """The configuration of a compacted GPT-NeoX."""

    model_type = "seap_gpt_neox"

    # A GPT-NeoX has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""
