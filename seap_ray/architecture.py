"""Architecture: the dimensions and weight names of a model family, as data. A new family is a row of ``FAMILIES``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seap_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family apart. Each bias is always there (True), never (False), or as a config key says."""

    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    config_class: str
    """Names of the classes in ``seap_ray.hf`` that load a compacted checkpoint."""
    model_class: str


FAMILIES: dict[str, Family] = {
    "llama": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        config_class="SeapLlamaConfig",
        model_class="SeapLlamaForCausalLM",
    ),
    "qwen2": Family(
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        config_class="SeapQwen2Config",
        model_class="SeapQwen2ForCausalLM",
    ),
}

LAYER_PREFIX = "model.layers."
O_PROJ, DOWN_PROJ = "self_attn.o_proj", "mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of one decoder layer."""

    groups: int
    """Key-value heads."""
    heads_per_group: int
    """Query heads of each key-value head."""
    channels: int
    """MLP width."""

    @property
    def heads(self) -> int:
        return self.groups * self.heads_per_group


@dataclass(frozen=True, slots=True)
class Architecture:
    """Dimensions of a dense model. Sizes are in numbers of weights."""

    family: str
    n_layers: int
    hidden_size: int
    head_dim: int
    dense: Shape
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_position_embeddings: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Architecture":
        """Read the dimensions from a Hugging Face ``config.json``.

        Raises ConfigError for a family that is not supported, or a layout of it that is not.
        """
        name = config.get("model_type")
        if name not in FAMILIES:
            raise ConfigError(f"model family {name!r} is not supported; supported are {', '.join(FAMILIES)}")
        if config.get("quantization_config"):
            raise ConfigError("model is quantised; prune the unquantised checkpoint, then quantise the result")
        if config.get("use_sliding_window"):
            raise ConfigError("model.use_sliding_window is set; only full attention is supported")
        family, heads = FAMILIES[name], config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads

        def flag(value: bool | str) -> bool:
            return bool(config.get(value, False)) if isinstance(value, str) else value

        return cls(
            family=name,
            n_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            dense=Shape(groups, heads // groups, config["intermediate_size"]),
            qkv_bias=flag(family.qkv_bias),
            o_bias=flag(family.o_bias),
            mlp_bias=flag(family.mlp_bias),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of ``o_proj`` and ``down_proj``."""
        return self.dense.heads * self.head_dim, self.dense.channels

    @property
    def head_cost(self) -> int:
        """Weights of one query head: its rows of q_proj and columns of o_proj."""
        return self.head_dim * (2 * self.hidden_size + self.qkv_bias)

    @property
    def kv_cost(self) -> int:
        """Weights of one key-value head: its rows of k_proj and v_proj."""
        return 2 * self.head_dim * (self.hidden_size + self.qkv_bias)

    @property
    def channel_cost(self) -> int:
        """Weights of one MLP channel: a row of gate_proj and up_proj, a column of down_proj."""
        return 3 * self.hidden_size + 2 * self.mlp_bias

    def attention_parameters(self, shape: Shape) -> int:
        """Weights of a layer's attention that its shape decides."""
        return shape.heads * self.head_cost + shape.groups * self.kv_cost

    def layer_parameters(self, shape: Shape) -> int:
        """All weights of a decoder layer of this shape: attention, MLP, biases and the two norms."""
        fixed = self.hidden_size * (2 + self.o_bias + self.mlp_bias)
        return self.attention_parameters(shape) + shape.channels * self.channel_cost + fixed

    @property
    def decoder_parameters(self) -> int:
        """All weights of the dense decoder layers: what a ratio is a share of."""
        return self.n_layers * self.layer_parameters(self.dense)

    @property
    def compensation_parameters(self) -> int:
        """Weights that compensation adds to a cut layer: the biases that it does not have yet."""
        return self.hidden_size * ((not self.o_bias) + (not self.mlp_bias))

    def align(self, setting: int | str) -> int:
        """Tile of channels; ``auto`` is 128, or for a small MLP the power of two that leaves 16 tiles or more."""
        if isinstance(setting, int):
            return setting
        return min(128, 2 ** max(0, int(math.log2(self.dense.channels / 16))))

    def tensor(self, layer: int, module: str, kind: str = "weight") -> str:
        """Checkpoint name of a decoder layer's tensor."""
        return f"{LAYER_PREFIX}{layer}.{module}.{kind}"
