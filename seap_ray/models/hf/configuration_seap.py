"""Configurations of compacted models: a family's own, with ``per_layer_config`` for widths that differ by layer.

``num_attention_heads``, ``num_key_value_heads``, the MLP's width, ``o_proj_bias`` and ``down_proj_bias`` (output biases
that the family does not have itself, by whatever name it calls the modules) may stand in ``per_layer_config``; the top
level holds the values of the dense model.

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


@strict
class SeapLlamaConfig(LlamaConfig):
    model_type = "seap_llama"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Llama asks for head counts that divide the hidden size; cut layers need not have them."""


@strict
class SeapMistralConfig(MistralConfig):
    model_type = "seap_mistral"

    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapQwen2Config(Qwen2Config):
    model_type = "seap_qwen2"

    qkv_bias = True  # vLLM's Llama layer asks; not a field, since a Qwen2 always has them

    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapQwen3Config(Qwen3Config):
    model_type = "seap_qwen3"

    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapGemma2Config(Gemma2Config):
    model_type = "seap_gemma2"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """As for Llama."""


@strict
class SeapGemma3Config(Gemma3TextConfig):
    model_type = "seap_gemma3_text"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """As for Llama."""


@strict
class SeapPhi3Config(Phi3Config):
    model_type = "seap_phi3"

    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    @property
    def allow_global_per_layer_attribute_access(self):
        """Return False whatever config.json says: that key is there for loaders that do not know this class."""
        return False

    @allow_global_per_layer_attribute_access.setter
    def allow_global_per_layer_attribute_access(self, value):
        self.__dict__["allow_global_per_layer_attribute_access"] = value

    def validate_rope(self):
        """Check nothing: the check needs the number of heads, which layers do not share; the dense model passed it."""

    def validate_architecture(self):
        """As for Llama."""


@strict
class SeapMixtralConfig(MixtralConfig):
    model_type = "seap_mixtral"

    o_proj_bias: bool = False


@strict
class SeapQwen3MoeConfig(Qwen3MoeConfig):
    model_type = "seap_qwen3_moe"

    head_dim: int | None = None
    o_proj_bias: bool = False


@strict
class SeapOPTConfig(OPTConfig):
    model_type = "seap_opt"

    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapGPTNeoXConfig(GPTNeoXConfig):
    model_type = "seap_gpt_neox"

    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """As for Llama."""
