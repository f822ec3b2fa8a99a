"""Configurations of compacted models: a family's own, with ``per_layer_config`` for what differs by layer.

These keys may stand in ``per_layer_config``; at the top level they have the values of the dense model:
``num_attention_heads``, ``num_key_value_heads``, the MLP's width, and ``o_proj_bias`` and ``down_proj_bias``, output
biases that the family does not have itself, whatever it calls the modules.

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
    """The configuration of a compacted Llama."""

    model_type = "seap_llama"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapMistralConfig(MistralConfig):
    """The configuration of a compacted Mistral."""

    model_type = "seap_mistral"

    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapQwen2Config(Qwen2Config):
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
class SeapQwen3Config(Qwen3Config):
    """The configuration of a compacted Qwen3."""

    model_type = "seap_qwen3"

    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapGemma2Config(Gemma2Config):
    """The configuration of a compacted Gemma 2."""

    model_type = "seap_gemma2"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapGemma3Config(Gemma3TextConfig):
    """The configuration of a compacted Gemma 3."""

    model_type = "seap_gemma3_text"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapPhi3Config(Phi3Config):
    """The configuration of a compacted Phi-3."""

    model_type = "seap_phi3"

    # A Phi-3 has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    @property
    def allow_global_per_layer_attribute_access(self):
        """Return False whatever config.json says: that key is there for loaders that do not know this class."""
        return False

    @allow_global_per_layer_attribute_access.setter
    def allow_global_per_layer_attribute_access(self, value):
        """Keep the value for copies of the checkpoint."""
        self.__dict__["allow_global_per_layer_attribute_access"] = value

    def validate_rope(self):
        """Check nothing: the check needs the number of heads, which layers do not share; the dense model passed it."""

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""


@strict
class SeapMixtralConfig(MixtralConfig):
    """The configuration of a compacted Mixtral."""

    model_type = "seap_mixtral"

    o_proj_bias: bool = False


@strict
class SeapQwen3MoeConfig(Qwen3MoeConfig):
    """The configuration of a compacted Qwen3 MoE."""

    model_type = "seap_qwen3_moe"

    # A Qwen3 MoE has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False


@strict
class SeapOPTConfig(OPTConfig):
    """The configuration of a compacted OPT."""

    model_type = "seap_opt"

    # An OPT has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class SeapGPTNeoXConfig(GPTNeoXConfig):
    """The configuration of a compacted GPT-NeoX."""

    model_type = "seap_gpt_neox"

    # A GPT-NeoX has no such field either.
    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Accept any number of heads; the family's own wants one that divides the hidden size."""
