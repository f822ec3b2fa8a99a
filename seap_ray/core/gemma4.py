"""Gemma 4: what its layers have of their own, and what of them weighs beside the MLP.

Its heads are of two sizes, some layers take keys and values from earlier ones, and MLPs may be twice as wide there.
Config keys are those of transformers' ``modeling_gemma4.py`` and of the published checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from seap_ray.errors import ConfigError


def own_values(config: Mapping[str, Any], own_L: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each layer's own config keys what older and published configs say by other keys.

    Raises ConfigError where the config does not list the layers' kinds.
    """
    kinds = config.get("layer_types")
    if not kinds or len(kinds) != len(own_L):
        raise ConfigError("config.json has no layer_types, with a kind for each layer")

    is_older = config.get("per_layer_config") is None
    groups = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    added_L = []
    for layer, (kind, own) in enumerate(zip(kinds, own_L, strict=True)):
        added = dict(own)
        if is_older and kind == "full_attention":
            added["head_dim"] = config.get("global_head_dim", 512)
            if groups is not None:
                added["num_key_value_heads"] = groups
        if config.get("use_double_wide_mlp") and _shares_keys(config, layer):
            added["intermediate_size"] = 2 * own.get("intermediate_size", config["intermediate_size"])
        added_L.append(added)
    return added_L


def _shares_keys(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer of a Gemma 4 takes keys and values from an earlier one."""
    return layer >= config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)


def attention_weights(config: Mapping[str, Any], layer: int) -> int:
    """Return the weights of a layer beside its MLP and the four norms around its parts."""
    hidden = config["hidden_size"]
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    has_bias = bool(config.get("attention_bias"))

    # Queries with their norm, and the way out.
    weights = queries * (2 * hidden + has_bias) + hidden * has_bias + head_dim
    if not _shares_keys(config, layer):
        # Layers that attend to everything may make values of the keys' matrix.
        is_one = config.get("attention_k_eq_v") and config["layer_types"][layer] == "full_attention"
        weights += (1 if is_one else 2) * config["num_key_value_heads"] * head_dim * (hidden + has_bias) + head_dim

    # Inputs of the layer's own: a gate, the way to the residual stream, a norm. A number scales what the layer gives.
    inputs = config.get("hidden_size_per_layer_input") or 0
    return weights + (2 * inputs + 1) * hidden * bool(inputs) + 1
