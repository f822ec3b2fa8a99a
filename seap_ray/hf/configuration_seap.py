"""Configurations of compacted models: a family's own, with ``per_layer_config`` for widths that differ by layer.

This file travels with every checkpoint and needs transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, Qwen2Config


@strict
class SeapLlamaConfig(LlamaConfig):
    """A Llama whose layers have their own head counts, MLP widths and output biases.

    ``num_attention_heads``, ``num_key_value_heads``, ``intermediate_size``, ``o_proj_bias`` and ``down_proj_bias`` may
    stand in ``per_layer_config``; the top level holds the values of the dense model.
    """

    model_type = "seap_llama"

    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self):
        """Llama asks for head counts that divide the hidden size; cut layers need not have them."""


@strict
class SeapQwen2Config(Qwen2Config):
    """A Qwen2 whose layers have their own head counts, MLP widths and output biases, as in ``SeapLlamaConfig``."""

    model_type = "seap_qwen2"

    qkv_bias = True  # vLLM's Llama layer asks; not a field, since a Qwen2 always has them

    head_dim: int | None = None
    o_proj_bias: bool = False
    down_proj_bias: bool = False
