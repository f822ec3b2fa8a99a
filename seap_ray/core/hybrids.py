"""Hybrids: which parts each layer of a model has, and what of it weighs that stays whole.

A mixer mixes tokens by a state or a short convolution, in place of attention or beside it: linear attention, Mamba 2, a
gated convolution. It stays whole. Config keys and tensors are those of the families' own code in transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from seap_ray.core import gemma4
from seap_ray.core.families import Family
from seap_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer is made of."""

    attention: bool = False
    mixer: bool = False
    mlp: bool = False


PARTS = {
    "full_attention": Parts(attention=True, mlp=True),
    "linear_attention": Parts(mixer=True, mlp=True),
    "conv": Parts(mixer=True, mlp=True),
    "hybrid": Parts(attention=True, mixer=True, mlp=True),
}
"""Parts of a layer by its kind."""
SINGLE_PARTS = {
    "full_attention": Parts(attention=True),
    "linear_attention": Parts(mixer=True),
    "mlp": Parts(mlp=True),
}
"""The same where every layer is one part alone."""
LEGACY_KINDS = {"attention": "full_attention", "mamba": "linear_attention"}
"""Kinds of layers by the names that older configs have for them."""
PATTERN_KINDS = {"*": "full_attention", "M": "linear_attention", "-": "mlp", "E": "moe"}
"""Kinds of layers by their signs in Nemotron-H's ``hybrid_override_pattern``."""


def parts_of(config: Mapping[str, Any], family: Family, n_layers: int) -> list[Parts]:
    """Return the parts of every layer.

    Raises ConfigError where the config has no kinds, kinds for another number of layers, or one that is not supported.
    """
    if family.whole_attention:
        return [Parts(mixer=True, mlp=True)] * n_layers
    if not family.mixer:
        return [Parts(attention=True, mlp=True)] * n_layers

    kinds = _kinds(config, family, n_layers)
    if len(kinds) != n_layers:
        raise ConfigError(f"config.json has kinds for {len(kinds)} layers, and num_hidden_layers is {n_layers}")
    parts = SINGLE_PARTS if family.has_single_parts else PARTS
    unknown = sorted({*kinds} - parts.keys())
    if unknown:
        raise ConfigError(
            f"config.json: layers of kind {unknown[0]} are not supported; supported are {', '.join(parts)}"
        )
    return [parts[kind] for kind in kinds]


def _kinds(config: Mapping[str, Any], family: Family, n_layers: int) -> list[str]:
    """Return the kind of every layer, by the names of transformers."""
    if listed := config.get("layer_types") or config.get("layers_block_type"):
        return [LEGACY_KINDS.get(kind, kind) for kind in listed]
    if pattern := config.get("hybrid_override_pattern"):
        return [PATTERN_KINDS.get(sign, sign) for sign in pattern]
    if family.has_both:
        return ["hybrid"] * n_layers
    if (with_attention := config.get("full_attn_idxs")) is not None:
        return ["full_attention" if layer in with_attention else "conv" for layer in range(n_layers)]
    period = config.get("full_attention_interval") or family.attention_period
    if not period:
        raise ConfigError("config.json has no layer_types, which say what layers are made of")
    return ["linear_attention" if (layer + 1) % period else "full_attention" for layer in range(n_layers)]


# --- what a mixer weighs ---------------------------------------------------------------------------------------------


def _gated_delta(config: Mapping[str, Any]) -> int:
    """Return the weights of a gated delta net (Qwen)."""
    hidden = config["hidden_size"]
    value_heads = config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = value_heads * config["linear_value_head_dim"]
    convolved = 2 * keys + values

    projections = hidden * (convolved + values + 2 * value_heads) + values * hidden
    # Two numbers of each value head, and the norm of its output.
    return (
        projections + convolved * config["linear_conv_kernel_dim"] + 2 * value_heads + config["linear_value_head_dim"]
    )


def _short_convolution(config: Mapping[str, Any]) -> int:
    """Return the weights of a gated short convolution (LFM2)."""
    hidden = config["hidden_size"]
    # Two gates and what is convolved, the way out, the convolution.
    return hidden * (4 * hidden + config["conv_L_cache"] + 5 * bool(config["conv_bias"]))


def _mamba2(
    config: Mapping[str, Any],
    *,
    width: int,
    heads: int,
    groups: int,
    state: int,
    kernel: int,
    has_conv_bias: bool,
    biases: tuple[bool, bool],
    has_norm: bool = True,
) -> int:
    """Return the weights of a Mamba 2; ``biases`` are those of the way in and of the way out."""
    hidden = config["hidden_size"]
    convolved = width + 2 * groups * state
    into = width + convolved + heads
    projections = into * (hidden + biases[0]) + hidden * (width + biases[1])
    # Three numbers of each head.
    return projections + convolved * (kernel + has_conv_bias) + 3 * heads + width * has_norm


def _mamba2_of_granite(config: Mapping[str, Any]) -> int:
    """Return the weights of the Mamba 2 of Granite and Bamba."""
    return _mamba2(
        config,
        width=config["mamba_expand"] * config["hidden_size"],
        heads=config["mamba_n_heads"],
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        kernel=config["mamba_d_conv"],
        has_conv_bias=bool(config["mamba_conv_bias"]),
        biases=(bool(config["mamba_proj_bias"]),) * 2,
    )


def _mamba2_of_falcon(config: Mapping[str, Any]) -> int:
    """Return the weights of the Mamba 2 of Falcon-H1."""
    return _mamba2(
        config,
        width=config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"],
        heads=config["mamba_n_heads"],
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        kernel=config["mamba_d_conv"],
        has_conv_bias=bool(config["mamba_conv_bias"]),
        biases=(bool(config["mamba_proj_bias"]), bool(config["projectors_bias"])),
        has_norm=bool(config["mamba_rms_norm"]),
    )


def _mamba2_of_nemotron(config: Mapping[str, Any]) -> int:
    """Return the weights of the Mamba 2 of Nemotron-H."""
    return _mamba2(
        config,
        width=config["mamba_num_heads"] * config["mamba_head_dim"],
        heads=config["mamba_num_heads"],
        groups=config["n_groups"],
        state=config["ssm_state_size"],
        kernel=config["conv_kernel"],
        has_conv_bias=bool(config["use_conv_bias"]),
        biases=(bool(config["use_bias"]),) * 2,
    )


MIXERS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "gated delta net": _gated_delta,
    "short convolution": _short_convolution,
    "mamba 2 of granite": _mamba2_of_granite,
    "mamba 2 of falcon": _mamba2_of_falcon,
    "mamba 2 of nemotron": _mamba2_of_nemotron,
}
"""What a layer's mixer weighs, with its norms and biases, by ``Family.mixer``."""


def kept_whole(config: Mapping[str, Any], family: Family, layer: int) -> int:
    """Return the weights of a layer's mixer, or of attention that is not looked at; 0 where the family has neither.

    Args:
        config: What holds for the layer: of a model whose layers differ, with the layer's own values.
        family: The model's family.
        layer: Number of the layer.

    Raises:
        ConfigError: A key is missing.
    """
    try:
        if family.whole_attention:
            return gemma4.attention_weights(config, layer)
        if not family.mixer:
            return 0
        return MIXERS[family.mixer](config)
    except KeyError as error:
        raise ConfigError(f"config.json has no {error.args[0]}") from None


def own_values(config: Mapping[str, Any], family: Family, n_layers: int) -> list[dict[str, Any]]:
    """Return the config keys in which each layer differs from the top level.

    Those of ``per_layer_config``; of a Gemma 4 also what older and published configs say by other keys.
    """
    # transformers fills numbers of layers up with zeros: 03.
    listed = {int(layer): own for layer, own in (config.get("per_layer_config") or {}).items()}
    own_L = [dict(listed.get(layer, {})) for layer in range(n_layers)]
    return gemma4.own_values(config, own_L) if family.whole_attention else own_L


def shrunk_channels(config: Mapping[str, Any], channels: int) -> int:
    """Return the width of LFM2's MLP, which its config may give before it is multiplied and rounded up."""
    if not config.get("block_auto_adjust_ff_dim"):
        return channels
    channels = 2 * config.get("block_ff_dim", channels) // 3
    factor = config.get("block_ffn_dim_multiplier")
    channels = channels if factor is None else int(factor * channels)
    multiple = config.get("block_multiple_of", 256)
    return -(-channels // multiple) * multiple
