"""Architecture: a config.json in; the dimensions and weight names of that model, layer by layer, out."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from seap_ray.core.families import FAMILIES, Bias, DenseMlp, Family, Unit
from seap_ray.core.hybrids import Parts, kept_whole, own_values, parts_of, shrunk_channels
from seap_ray.core.moments import RECORDED, Site
from seap_ray.core.refused_families import WHY_REFUSED
from seap_ray.errors import ConfigError

MOE_EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")
"""An MoE expert's number in the name of a module."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of one decoder layer."""

    groups: int
    """Key-value heads; 0 of a layer without attention."""
    heads_per_group: int
    """Query heads of each key-value head; 0 of a layer without attention."""
    channels: int
    """MLP width; 0 of a layer without an MLP."""

    @property
    def heads(self) -> int:
        """Query heads of all groups."""
        return self.groups * self.heads_per_group

    def count(self, unit: Unit) -> int:
        """Return the number of units of one kind."""
        return {"heads": self.heads, "groups": self.groups, "channels": self.channels}[unit]


def cut_unit(site: Site, original: Shape, shape: Shape) -> str | None:
    """Return which units of a site a width has fewer of than the whole layer, None where it is whole.

    Raises ValueError for a width that the layer cannot have.
    """
    pairs = {"channels": (shape.channels, original.channels)}
    if site == "attn":
        pairs = {
            "groups": (shape.groups, original.groups),
            "heads": (shape.heads_per_group, original.heads_per_group),
        }

    cut = [unit for unit, (kept, whole) in pairs.items() if kept != whole]
    if len(cut) > 1 or any(kept > whole for kept, whole in pairs.values()):
        raise ValueError(f"{shape} is no cut of groups, of heads or of channels of {original}")
    return cut[0] if cut else None


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer. In a dense model all are alike."""

    shape: Shape
    """Widths of its attention and MLP."""
    biases: tuple[str, ...] = ()
    """Config keys of output biases that its family does not have: an earlier compensation put them there."""
    n_experts: int = 0
    """MoE experts of its MLP, whose channels are then the width of each. 0: the MLP is no mixture."""
    weights_kept_whole: int = 0
    """Weights of its mixer, or of attention that is not looked at, which stay whole; 0: it has neither."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Config keys, with values, in which the family's own layer differs from the top level: ``Family.layer_keys``."""

    @property
    def has_mixer(self) -> bool:
        """Whether it has a mixer, or attention that is not looked at."""
        return self.weights_kept_whole > 0

    @property
    def has_attention(self) -> bool:
        """Whether it has attention."""
        return self.shape.groups > 0

    @property
    def has_mlp(self) -> bool:
        """Whether it has an MLP."""
        return self.shape.channels > 0


@dataclass(frozen=True, slots=True)
class Architecture:
    """Dimensions of a model, dense or compacted already. Sizes are in numbers of weights."""

    family_name: str
    """Key of ``FAMILIES``."""
    layers: tuple[Layer, ...]
    """Every decoder layer, in order."""
    hidden_size: int
    """Width of the residual stream."""
    head_dim: int
    """Width of an attention head."""
    dense: Shape
    """Widths by the config's top level: of a dense model those of all layers."""
    qkv_bias: bool
    """Whether queries, keys and values have biases."""
    o_bias: bool
    """Whether ``o_proj`` has a bias of its family's own."""
    mlp_bias: bool
    """Whether the MLP's modules have biases of their family's own."""
    max_position_embeddings: int
    """Longest sequence, in tokens."""
    has_windows: bool = False
    """Whether layers attend to a sliding window."""
    mixes_windows: bool = False
    """Whether some layers do, and others attend to everything."""
    windows: tuple[int | None, ...] = ()
    """Tokens of every layer's sliding window; None for a layer that attends to everything."""
    has_norm_weights: bool = True
    """Whether the norms have weights."""
    n_heads_may_change: bool = True
    """Whether the family's own config may have another number of heads. False for a Phi-3 with long RoPE: transformers
    checks the length of its factors by the number of heads in the config; and for Helium."""
    n_experts: int = 0
    """MoE experts of every layer that has any, by the config's top level. 0: no mixture of experts."""
    experts_per_token: int = 0
    """MoE experts that the router chooses for a token."""
    expert_groups: tuple[int, int] = (1, 1)
    """Groups, equally large and one after another, of a layer's MoE experts, and how many of them the router chooses
    from for a token."""
    dense_channels: int = 0
    """Width by the config's top level of the MLP of layers without experts, in a mixture that has such layers."""
    shared_channels: int = 0
    """Width of the experts that every token passes in layers with MoE experts, which stay whole."""
    ties_embeddings: bool = False
    """Whether the head that predicts tokens is the embedding."""
    n_head_norms: int = 0
    """Weights of a layer's norms, in head sizes, beside those in hidden sizes."""
    latent_weights: int = 0
    """Weights of a layer's latent attention, which stays whole; 0: attention is no such."""
    latent_cache: int = 0
    """Numbers that a layer with latent attention caches for a token."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Architecture":
        """Read the dimensions from a Hugging Face ``config.json``.

        Args:
            config: The file's content, of a dense or a compacted model.

        Returns:
            The architecture.

        Raises:
            ConfigError: The family, or the layout that the config says, is not supported, the model is quantised, or
                a size is missing or none.
        """
        model_type = config.get("model_type")
        name = str(model_type).removeprefix("seap_")
        if name not in FAMILIES:
            reason = f": {WHY_REFUSED[name]}" if name in WHY_REFUSED else ""
            raise ConfigError(
                f"model family {model_type!r} is not supported{reason}; supported are {', '.join(FAMILIES)}"
            )

        family = FAMILIES[name]
        # MLX's own key for a quantised model has no ending.
        if config.get("quantization_config") or config.get("quantization"):
            raise ConfigError("model is quantised; prune the unquantised checkpoint, then quantise the result")
        for key, value in family.refused.items():
            if key in config and bool(config[key]) == value:
                raise ConfigError(f"config.json: a {name} is not supported whose {key} is {config[key]}, others are")

        def flag(value: Bias) -> bool:
            """Return whether there is a bias: the family's constant, or what the config says."""
            return bool(config.get(*value)) if isinstance(value, tuple) else value

        # A Nemotron-H's config may have the layers' kinds alone.
        n_layers = _size(config, "num_hidden_layers", len(config.get("layers_block_type") or ()) or None)
        has_experts_L = _has_experts(config, family, n_layers)
        parts_L = parts_of(config, family, n_layers)
        # A compacted model's layers differ from its top level.
        own_L = own_values(config, family, n_layers)
        layers: list[Layer] = []
        for number, (has_experts, parts, own) in enumerate(zip(has_experts_L, parts_L, own_L, strict=True)):
            of_layer = {**config, **own}
            layer = _layer(of_layer, family, parts, has_experts=has_experts)
            whole = kept_whole(of_layer, family, number) if parts.mixer else 0
            settings = tuple(
                (key, own[key]) for key in family.layer_keys if own.get(key, config.get(key)) != config.get(key)
            )
            layers.append(replace(layer, weights_kept_whole=whole, settings=settings))

        # Older configs name the parameters of RoPE rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}

        return cls(
            family_name=name,
            layers=tuple(layers),
            hidden_size=_size(config, "hidden_size"),
            head_dim=_head_dim(config, family),
            dense=_layer(config, family, Parts(attention=True, mlp=True), has_experts=family.is_moe).shape,
            qkv_bias=flag(family.qkv_bias),
            o_bias=flag(family.o_bias),
            mlp_bias=flag(family.mlp_bias),
            # transformers' own default of Llama, OPT and GPT-NeoX.
            max_position_embeddings=_size(config, "max_position_embeddings", 2048),
            has_windows=_has_windows(config, family),
            mixes_windows=_mixes_windows(config, family),
            windows=_windows(config, family, len(layers)),
            # A key of OPT alone; without it norms have weights.
            has_norm_weights=config.get("layer_norm_elementwise_affine") is not False,
            # Long RoPE has factors for short sequences and for long ones.
            n_heads_may_change="short_factor" not in rope and not family.heads_fill_hidden,
            n_experts=_n_experts(config, family) if family.is_moe else 0,
            experts_per_token=_size(config, family.n_chosen_key) if family.is_moe else 0,
            expert_groups=_expert_groups(config, family),
            dense_channels=0 if all(has_experts_L) or not family.dense_mlp else _dense_channels(config, family),
            shared_channels=_shared_channels(config, family),
            n_head_norms=family.norms[1] if config.get(family.head_norms_key or "", True) else 0,
            latent_weights=_latent_weights(config) if family.is_latent else 0,
            latent_cache=config["kv_lora_rank"] + config["qk_rope_head_dim"] if family.is_latent else 0,
            ties_embeddings=bool(config.get("tie_word_embeddings", family.ties_embeddings)),
        )

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def family(self) -> Family:
        """The family's row of ``FAMILIES``."""
        return FAMILIES[self.family_name]

    @property
    def why_whole_attention(self) -> str | None:
        """Why no head can go; None where heads can."""
        if self.family.norms_all_heads:
            return "its queries and keys pass a norm over all heads together, which a cut would change"
        if self.family.whole_attention:
            return self.family.whole_attention
        if self.family.is_latent:
            return "its keys and values are made of one latent vector for all heads, and this attention stays whole"
        return None

    @property
    def needs_equal_groups(self) -> bool:
        """Whether all attention must have equally many key-value heads: engines pool its cache with others.

        Those are of layers with another window, or the states of mixers.
        """
        return self.mixes_windows or self.family.mixer is not None

    @property
    def has_unlike_layers(self) -> bool:
        """Whether some layers have parts that others have not."""
        parts = {(layer.has_attention, layer.has_mlp, layer.has_mixer) for layer in self.layers}
        return self.has_dense_layers or len(parts) > 1

    def modules(self, layer: int) -> dict[Site, str]:
        """Return the module whose input each site of a layer is; attention first, then its MLP or every MoE expert.

        A site that the layer does not have is left out.
        """
        own = self.layers[layer]
        dense_mlp = self.family.dense_mlp
        modules: dict[Site, str] = {"attn": self.family.o_proj} if own.has_attention else {}
        if own.n_experts:
            modules |= {f"mlp.{e}": self.family.down_proj.format(e=e) for e in range(own.n_experts)}
        elif own.has_mlp:
            modules["mlp"] = dense_mlp.down_proj if dense_mlp else self.family.down_proj
        return modules

    @property
    def first_output(self) -> str:
        """Name of the first output module's weight, whose type stands for that of all that can be cut."""
        return next(self.tensor(i, module) for i in range(self.n_layers) for module in self.modules(i).values())

    def sites(self, layer: int, site: Site) -> list[Site]:
        """Return a site of a layer itself, or for ``mlp`` of a layer with MoE experts the sites of all of them.

        The list is empty where the layer has no such site, as one without MoE experts has no ``experts``.
        """
        own = self.layers[layer]
        if site == "mlp" and own.n_experts:
            return [f"mlp.{e}" for e in range(own.n_experts)]
        has_site = {"attn": own.has_attention, "mlp": own.has_mlp, "experts": own.n_experts > 0}
        return [site] if has_site.get(site, True) else []

    @property
    def recorded(self) -> tuple[Site, ...]:
        """Kinds of sites that calibration records of this model."""
        return (*RECORDED, "experts") if self.n_experts else RECORDED

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layers have no MoE experts, beside layers that have them."""
        return bool(self.dense_channels)

    @property
    def is_shared_width_bound(self) -> bool:
        """Whether a config says the width of the shared experts by that of the others, which a cut changes."""
        return bool(self.shared_channels) and self.family.channels_key in self.family.shared_width_keys

    def channels_key(self, layer: Layer) -> str:
        """Return the config key of the width of a layer's MLP, or of its MoE experts."""
        dense_mlp = self.family.dense_mlp
        return dense_mlp.channels_key if dense_mlp and not layer.n_experts else self.family.channels_key

    def whole_channels(self, layer: Layer) -> int:
        """Return the width of a layer's MLP, or of its MoE experts, by the config's top level."""
        return self.dense_channels if self.has_dense_layers and not layer.n_experts else self.dense.channels

    @property
    def compensable_modules(self) -> tuple[str, ...]:
        """Modules that compensation may give biases; an MoE expert's is none, since the router weighs what it gives.

        In a mixture attention's alone, also in layers without MoE experts.
        """
        return (self.family.o_proj,) if self.n_experts else tuple(self.family.columns)

    @property
    def bias_keys(self) -> tuple[str, ...]:
        """Config keys of the biases that compensation adds to layers of this family."""
        missing = {"o_proj_bias": not self.o_bias, "down_proj_bias": not self.mlp_bias and not self.n_experts}
        return tuple(key for key, is_missing in missing.items() if is_missing)

    def bias_keys_of(self, layer: Layer) -> tuple[str, ...]:
        """Return the config keys of the biases that compensation adds to one layer."""
        has_module = {"o_proj_bias": layer.has_attention, "down_proj_bias": layer.has_mlp}
        return tuple(key for key in self.bias_keys if has_module[key])

    @property
    def has_added_biases(self) -> bool:
        """Whether layers have output biases already that their family does not have."""
        return any(layer.biases for layer in self.layers)

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of ``o_proj`` and ``down_proj``, by whatever name, at the widest."""
        shapes = [layer.shape for layer in self.layers]
        return max(shape.heads for shape in shapes) * self.head_dim, max(shape.channels for shape in shapes)

    @property
    def head_cost(self) -> int:
        """Weights of one query head: its rows of q_proj and columns of o_proj, and its sink."""
        # The bias of o_proj is as long as the hidden size, so no head has a part of it.
        times = self.family.query_times
        return self.head_dim * ((times + 1) * self.hidden_size + times * self.qkv_bias) + bool(self.family.sinks)

    @property
    def kv_cost(self) -> int:
        """Weights of one key-value head: its rows of k_proj and v_proj."""
        return 2 * self.head_dim * (self.hidden_size + self.qkv_bias)

    def channel_cost(self, layer: Layer) -> int:
        """Return the weights of one MLP channel: a row of gate_proj (if any) and up_proj, a column of down_proj.

        In a layer with MoE experts one channel of each of them, since all of a layer are equally wide.
        """
        dense_mlp = self.family.dense_mlp
        mlp_rows = dense_mlp.rows if dense_mlp and not layer.n_experts else self.family.rows
        # Matrices that have a row for each channel (of an MoE expert).
        n_matrices = sum(rows.units.count("channels") for rows in mlp_rows.values())
        # The bias of down_proj is as long as the hidden size, so no channel has a part of it.
        per_mlp = n_matrices * (self.hidden_size + self.mlp_bias) + self.hidden_size
        return per_mlp * max(layer.n_experts, 1)

    def attention_parameters(self, shape: Shape) -> int:
        """Return the weights of a layer's attention that its shape decides; of a latent attention they never change."""
        if self.latent_weights:
            return self.latent_weights
        return shape.heads * self.head_cost + shape.groups * self.kv_cost

    def layer_parameters(self, layer: Layer) -> int:
        """Return all weights of a decoder layer: attention, MLP, biases, norms, router and shared experts."""
        # Vectors as long as the hidden size, and as a head: norms, output biases, and rows of the router.
        n_hidden, n_head = (self.family.norms[0], self.n_head_norms) if self.has_norm_weights else (0, 0)
        n_hidden += self.o_bias * layer.has_attention + self.mlp_bias * layer.has_mlp * max(layer.n_experts, 1)
        n_hidden += len(layer.biases) + layer.n_experts
        n_head *= layer.has_attention
        # Such norms have a weight for each column of queries and keys.
        n_head += (layer.shape.heads + layer.shape.groups) * self.family.norms_all_heads
        if layer.n_experts:
            # Gate, way up and way down of the shared experts.
            n_hidden += 3 * self.shared_channels + self.family.has_shared_gate
        fixed = self.hidden_size * n_hidden + self.head_dim * n_head + self.family.activation_weights
        fixed += layer.n_experts * self.family.has_router_bias + layer.weights_kept_whole
        return self.attention_parameters(layer.shape) + layer.shape.channels * self.channel_cost(layer) + fixed

    @property
    def decoder_parameters(self) -> int:
        """All weights of the decoder layers: what a ratio is a share of."""
        return sum(map(self.layer_parameters, self.layers))

    def resized(self, layer: int, shape: Shape, *, adds_biases: bool, n_experts: int | None = None) -> Layer:
        """Return a layer with other widths.

        Args:
            layer: Number of the layer.
            shape: Its new widths.
            adds_biases: Whether it gets output biases if its widths change; otherwise it has those that it had.
            n_experts: Its new number of MoE experts; None: as many as it has.

        Returns:
            The layer after the cut.
        """
        original = self.layers[layer]
        gets_biases = adds_biases and shape != original.shape
        biases = self.bias_keys_of(original) if gets_biases else original.biases
        return replace(
            original, shape=shape, biases=biases, n_experts=original.n_experts if n_experts is None else n_experts
        )

    def align(self, setting: int | str) -> int:
        """Return the tile that kept channels are a multiple of.

        ``auto`` is 128, or for a small MLP the power of two that leaves 16 tiles or more, for a mixture of experts 8 at
        least: torch's grouped products want rows of 16 bytes.
        """
        if isinstance(setting, int):
            return setting
        least = 3 if self.n_experts else 0  # exponent of two
        return min(128, 2 ** max(least, int(math.log2(self.dense.channels / 16))))

    def tensor(self, layer: int, module: str, kind: str = "weight") -> str:
        """Return the checkpoint's name of a decoder layer's tensor; one of no module is the layer's own."""
        return f"{self.family.layers}{layer}.{module}{'.' if module else ''}{kind}"

    def split(self, name: str) -> tuple[int | None, str, str]:
        """Split a tensor's name: ``model.layers.3.mlp.up_proj.weight`` -> (3, ``mlp.up_proj``, ``weight``).

        A tensor of no layer gives (None, its name, "").
        """
        if not name.startswith(self.family.layers):
            return None, name, ""
        # The module's own name has dots: the layer ends at the first one, the kind begins at the last.
        layer, _, rest = name.removeprefix(self.family.layers).partition(".")
        module, _, kind = rest.rpartition(".")
        return int(layer), module, kind


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a whole number above zero; ``default`` where the key is missing or null.

    Raises ConfigError for any other value, and for none without a default.
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ConfigError(f"config.json has no {key}")
    # Python's True is an int, too.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} is {value!r}, not a whole number above 0")
    return value


def _head_dim(config: Mapping[str, Any], family: Family) -> int:
    """Return the columns of ``o_proj`` that a head has."""
    # The config's own head size is that of the part of a latent attention's queries that is rotated.
    if family.is_latent:
        return _size(config, "v_head_dim")
    # Configs without a head size leave it to this division.
    return _size(config, "head_dim", _size(config, "hidden_size") // _size(config, "num_attention_heads"))


def _latent_weights(config: Mapping[str, Any]) -> int:
    """Return the weights of a latent attention with its norms and biases, without the bias of ``o_proj``."""
    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    latent = _size(config, "kv_lora_rank")
    rotated = _size(config, "qk_rope_head_dim")
    query = _size(config, "qk_nope_head_dim") + rotated
    value = _size(config, "v_head_dim")
    has_bias = bool(config.get("attention_bias"))

    # Queries are made of a latent vector of their own, or of the hidden state.
    query_rank = config.get("q_lora_rank")
    queries = hidden * heads * query
    if query_rank:
        queries = (hidden + has_bias + 1 + heads * query) * query_rank

    keys_and_values = (hidden + has_bias) * (latent + rotated) + latent
    keys_and_values += latent * heads * (query - rotated + value)
    return queries + keys_and_values + heads * value * hidden


def _n_experts(config: Mapping[str, Any], family: Family) -> int:
    """Return the number of MoE experts of a layer that has any."""
    # Qwen's own configs say num_experts, those that transformers writes num_local_experts.
    return _size(config, "num_local_experts", config.get(family.n_experts_key))


def _expert_groups(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """Return the groups that a layer's MoE experts are in, and how many of them are chosen from for a token."""
    n_groups, n_chosen = family.expert_groups
    return _size(config, "n_group", n_groups), _size(config, "topk_group", n_chosen)


def _dense_channels(config: Mapping[str, Any], family: Family) -> int:
    """Return the width of the MLP of a mixture's layers without experts."""
    return _size(config, (family.dense_mlp or DenseMlp()).channels_key)


def _shared_channels(config: Mapping[str, Any], family: Family) -> int:
    """Return the width of the experts that every token passes; 0 where there are none."""
    # A missing number of shared experts, or none, means that there are none.
    factors = [int(config.get(key) or 0) for key in family.shared_width_keys]
    return prod(factors) if factors else 0


def _has_experts(config: Mapping[str, Any], family: Family, n_layers: int) -> tuple[bool, ...]:
    """Return whether each layer has MoE experts, by the keys of all families.

    Raises ConfigError where no layer has any, or only each so many-th by ``moe_layer_interval``.
    """
    # Families that have experts in all layers do not read these keys.
    if not family.dense_mlp:
        return (family.is_moe,) * n_layers

    # Newer configs list what every layer has.
    kinds = config.get("mlp_layer_types") or ()
    if kinds:
        return tuple(kind == "sparse" for kind in kinds)

    # Llama 4 names every layer with experts, where a step does not.
    with_experts = config.get("moe_layers")
    if with_experts is not None:
        return _some_experts(tuple(layer in with_experts for layer in range(n_layers)))

    # DeepSeek and GLM count the first layers without; ERNIE names the first and the last layer with experts, Qwen every
    # layer without.
    first = config.get("first_k_dense_replace") or config.get("moe_layer_start_index") or 0
    last = config.get("moe_layer_end_index", -1)
    last = n_layers - 1 if last in (None, -1) else last
    step = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
    if config.get("moe_layer_interval", 1) not in (None, 1):
        raise ConfigError("config.json: moe_layer_interval is not 1, as no published model has it")
    without = config.get("mlp_only_layers") or ()
    return _some_experts(
        tuple(first <= layer <= last and (layer + 1) % step == 0 and layer not in without for layer in range(n_layers))
    )


def _some_experts(has_experts: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return what is given; raise ConfigError where no layer has MoE experts."""
    if not any(has_experts):
        raise ConfigError("config.json: no layer has experts; the model is none of its family's mixtures")
    return has_experts


def keys_of_dense_layers(config: Mapping[str, Any], is_dense: Sequence[bool]) -> dict[str, Any]:
    """Return the config keys of a mixture that say which layers have no experts.

    Args:
        config: A config of the family.
        is_dense: Whether each layer is to have none.
    """
    dense = [layer for layer, without in enumerate(is_dense) if without]
    with_experts = [layer for layer, without in enumerate(is_dense) if not without]
    if config.get("first_k_dense_replace") is not None:
        return {"first_k_dense_replace": len(dense)}
    if config.get("moe_layer_start_index") is not None:
        return {"moe_layer_start_index": with_experts[0], "moe_layer_end_index": with_experts[-1]}
    if "interleave_moe_layer_step" in config or "moe_layers" in config:
        return {"moe_layers": with_experts}
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _layer(config: Mapping[str, Any], family: Family, parts: Parts, *, has_experts: bool) -> Layer:
    """Read a layer from the config that holds for it."""
    heads = _size(config, "num_attention_heads")
    # A missing number of key-value heads, or none, means one for every query head.
    groups = _size(config, family.groups_key, heads) if family.groups_key else heads
    if heads % groups:
        raise ConfigError(f"config.json: {heads} query heads cannot share {groups} key-value heads")

    biases = tuple(key for key in ("o_proj_bias", "down_proj_bias") if config.get(key))
    if has_experts or not family.dense_mlp:
        channels = _size(config, family.channels_key)
    else:
        channels = _dense_channels(config, family)
    channels = shrunk_channels(config, channels)
    n_experts = _n_experts(config, family) if has_experts else 0
    attention = (groups, heads // groups) if parts.attention else (0, 0)
    return Layer(Shape(*attention, channels * parts.mlp), biases, n_experts)


def split_moe_expert(module: str) -> tuple[str, int | None]:
    """Split an MoE expert's number off a module's name, as the rows of ``FAMILIES`` have it.

    ``mlp.experts.5.up_proj`` -> (``mlp.experts.{e}.up_proj``, 5); a module of no MoE expert gives (its name, None).
    """
    match = MOE_EXPERT.search(module)
    if match is None:
        return module, None
    return MOE_EXPERT.sub(r"\1{e}\3", module), int(match[2])


def _has_windows(config: Mapping[str, Any], family: Family) -> bool:
    """Return whether layers attend to a sliding window."""
    if "sliding_window" in config and config["sliding_window"] is None:
        return False
    # Qwen's configs name a window that another key of theirs switches off.
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True) or family.mixes_windows


def _mixes_windows(config: Mapping[str, Any], family: Family) -> bool:
    """Return whether some layers attend to a sliding window and others to everything."""
    # There they tell which layers have attention at all.
    layer_types = None if family.mixer else config.get("layer_types")
    # Newer configs list what every layer attends to. In older ones Qwen's switch gives windows to
    # some layers only.
    if layer_types:
        return len(set(layer_types)) > 1
    return _has_windows(config, family) and (family.mixes_windows or bool(config.get("use_sliding_window")))


def _windows(config: Mapping[str, Any], family: Family, n_layers: int) -> tuple[int | None, ...]:
    """Return the tokens of every layer's sliding window; None for a layer that attends to everything."""
    if not _has_windows(config, family):
        return (None,) * n_layers
    # transformers' own default of Gemma, OLMo 3, EXAONE 4 and Command R7B.
    window = _size(config, "sliding_window", 4096)
    if layer_types := config.get("layer_types"):
        return tuple(window if "sliding" in kind else None for kind in layer_types)
    if family.mixes_windows:
        # The last layer of each period attends to everything.
        period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or family.window_period
        # EXAONE writes a period out: LLLG.
        period = len(period) if isinstance(period, str) else period
        return tuple(window if (layer + 1) % period else None for layer in range(n_layers))
    # Qwen's first layers attend to everything.
    first = config.get("max_window_layers", 0) if config.get("use_sliding_window") else 0
    return tuple(window if layer >= first else None for layer in range(n_layers))
