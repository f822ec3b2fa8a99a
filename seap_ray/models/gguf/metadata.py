"""Metadata of a GGUF file: the widths, constants and names by which llama.cpp builds the model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from seap_ray.core.architecture import Architecture
from seap_ray.models.gguf.layouts import Layout, rope_parameters

FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q5_1": "MOSTLY_Q5_1",
    "Q5_0": "MOSTLY_Q5_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q4_0": "MOSTLY_Q4_0",
}
"""llama.cpp's name of a file whose matrices have a type."""


def add_metadata(
    writer: Any, config: Mapping[str, Any], architecture: Architecture, layout: Layout, *, name: str, type_: str
) -> None:
    """Tell a ``gguf.GGUFWriter`` what a model is made of.

    Args:
        writer: The writer.
        config: Content of the model's config.json, with transformers' defaults.
        architecture: What the model is made of.
        layout: The layout that holds it.
        name: What the file calls the model.
        type_: Type of its matrices.
    """
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type_]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.n_layers)
    _add_widths(writer, architecture, layout)

    # llama.cpp takes them from the first layer's heads where they are not said.
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    _add_rope(writer, config, architecture)
    _add_norms(writer, config)
    _add_attention(writer, config, layout)


def _add_widths(writer: Any, architecture: Architecture, layout: Layout) -> None:
    shapes = [layer.shape for layer in architecture.layers]
    writer.add_head_count(_width([shape.heads for shape in shapes], layout))
    writer.add_head_count_kv(_width([shape.groups for shape in shapes], layout))
    channels = _width([shape.channels for shape in shapes], layout)
    writer.add_feed_forward_length(channels)

    if architecture.n_experts:
        writer.add_expert_count(architecture.n_experts)
        writer.add_expert_used_count(architecture.experts_per_token)
        writer.add_expert_feed_forward_length(channels)


def _width(by_layer: Sequence[int], layout: Layout) -> int | list[int]:
    """Return the widths of all layers; of a layout for equal ones the one that they all have."""
    return list(by_layer) if layout.is_uneven else by_layer[0]


def _add_rope(writer: Any, config: Mapping[str, Any], architecture: Architecture) -> None:
    import gguf

    ropes = rope_parameters(config)
    rope = ropes["full_attention"]
    share = rope.get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(architecture.head_dim * share))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    # Layers with a window may rotate by other frequencies, as in Gemma 3.
    if local := ropes.get("sliding_attention"):
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))

    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    elif kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        longest = architecture.max_position_embeddings
        writer.add_rope_scaling_attn_factors(_longrope_scale(rope, original, longest))


def _longrope_scale(rope: Mapping[str, Any], original: int, longest: int) -> float:
    """Return what the rotary embedding is multiplied by: transformers' own rule for ``rope_type: longrope``.

    Args:
        rope: Parameters of the embedding.
        original: Longest sequence before the extension, in tokens.
        longest: Longest sequence now.
    """
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    factor = rope.get("factor") or longest / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _add_norms(writer: Any, config: Mapping[str, Any]) -> None:
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_eps"])


def _add_attention(writer: Any, config: Mapping[str, Any], layout: Layout) -> None:
    """Tell windows, soft caps and what else single families have."""
    if layout.window_period and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if cap := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    if "use_parallel_residual" in config:
        writer.add_parallel_residual(bool(config["use_parallel_residual"]))
