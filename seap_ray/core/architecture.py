"""Architecture: the dimensions and weight names of a model family, as data. A new family is a row of ``FAMILIES``."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from seap_ray.core.moments import Site
from seap_ray.core.refused_families import WHY_REFUSED
from seap_ray.errors import ConfigError

Unit = Literal["heads", "groups", "channels"]
"""What is cut: query heads, key-value heads (groups), MLP channels."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of a module are, in order: all of each kind of unit, one block after another."""

    units: tuple[Unit, ...]
    """Kind of unit of each block."""
    times: int = 1
    """Rows of a unit, in head sizes or channels: 3 where query, key and value of a head lie together."""


SPLIT_ATTENTION = {
    "self_attn.q_proj": Rows(("heads",)),
    "self_attn.k_proj": Rows(("groups",)),
    "self_attn.v_proj": Rows(("groups",)),
}
"""Rows of a Llama's queries, keys and values."""
GATED_MLP = {"mlp.gate_proj": Rows(("channels",)), "mlp.up_proj": Rows(("channels",))}
"""Rows of a Llama's MLP."""
FUSED_MLP = {"mlp.gate_up_proj": Rows(("channels", "channels"))}
"""Rows of an MLP whose gate and way up are one matrix."""
UNGATED_MLP = {"mlp.up_proj": Rows(("channels",))}
"""Rows of an MLP without a gate."""
MOE_EXPERTS = {"mlp.experts.{e}.gate_proj": Rows(("channels",)), "mlp.experts.{e}.up_proj": Rows(("channels",))}
"""Rows of the MoE experts of most families."""
BLOCK_SPARSE_EXPERTS = {
    # w1 is the gate, w3 the way up; w2 is the way down.
    "block_sparse_moe.experts.{e}.w1": Rows(("channels",)),
    "block_sparse_moe.experts.{e}.w3": Rows(("channels",)),
}
"""Rows of the MoE experts of Mixtral and its like."""
Bias = bool | tuple[str, bool]
"""A family's bias: always there (True), never (False), or the config key that says it and what holds where the key is
missing: ``("attention_bias", False)``."""


TRANSFORMERS_BACKEND = "SeapTransformersForCausalLM"
"""Class in ``seap_ray.vllm_plugin.model`` that serves a family by transformers' own layers."""


@dataclass(frozen=True)
class DenseMlp:
    """The MLP of layers without MoE experts, beside layers with them; what is left out is as in a Llama."""

    rows: Mapping[str, Rows] = field(default_factory=lambda: GATED_MLP)
    """Modules of the MLP before ``down_proj``, and what their rows are."""
    down_proj: str = "mlp.down_proj"
    """The MLP's output module."""
    channels_key: str = "intermediate_size"
    """Config key of the MLP's width."""


@dataclass(frozen=True)
class Family:
    """What sets a family apart; what is left out is as in a Llama.

    Names of tensors and modules are those of the family's checkpoints, names of modules without the layer's beginning.
    """

    classes: str
    """Beginning of the names of its classes in ``seap_ray.models.hf``, such as ``SeapLlama``: transformers' own with
    ``Seap`` before them."""
    vllm_class: str = "SeapForCausalLM"
    """Class in ``seap_ray.vllm_plugin.model`` that serves it, such as ``SeapOPTForCausalLM``; the default serves what
    vLLM computes as a Llama, and ``TRANSFORMERS_BACKEND`` what vLLM has no class of."""
    layers: str = "model.layers."
    """Beginning of the names of a decoder layer's tensors, up to the layer's number: ``gpt_neox.layers.``."""
    embedding: str = "model.embed_tokens.weight"
    """Name of the input embedding's tensor, such as ``gpt_neox.embed_in.weight``."""
    head: str = "lm_head.weight"
    """Name of the output embedding's tensor, where that is not the input embedding: ``embed_out.weight``."""
    rows: Mapping[str, Rows] = field(default_factory=lambda: SPLIT_ATTENTION | GATED_MLP)
    """Modules whose rows (and biases) are cut, and what their rows are: ``{"fc1": Rows(("channels",))}``. Those that
    make queries, keys and values, and those of the MLP before ``down_proj``."""
    o_proj: str = "self_attn.o_proj"
    """Attention's output module, such as ``self_attn.out_proj``: its weight's columns are cut, its own bias stays
    whole."""
    down_proj: str = "mlp.down_proj"
    """The MLP's output module, such as ``fc2``: its weight's columns are cut, its own bias stays whole."""
    qkv_bias: Bias = False
    """Biases of queries, keys and values: always there in Qwen2 (True), by the config in a Llama."""
    o_bias: Bias = False
    """Bias of ``o_proj``: ``("attention_bias", False)`` in a Llama."""
    mlp_bias: Bias = False
    """Biases of the MLP's modules: ``("mlp_bias", False)`` in a Llama."""
    norms: tuple[int, int] = (2, 0)
    """Weights of a layer's norms, in hidden sizes and in head sizes: (2, 2) for two norms and those of queries and
    keys, (4, 0) for two norms with biases."""
    head_norms_key: str | None = None
    """Config key that says whether queries and keys have norms, ``use_qk_norm``; None where all models are as ``norms``
    says."""
    norms_all_heads: bool = False
    """Whether queries, and keys, pass one norm over all heads together, with a weight for each of their columns: True
    for OLMoE. What such a norm divides by depends on every head, so that none can go."""
    activation_weights: int = 0
    """Numbers that a checkpoint holds of a layer's activation: 4 for Apertus."""
    is_latent: bool = False
    """Whether keys and values are made of one latent vector for all heads (MLA): True for DeepSeek V3. Attention then
    stays whole."""
    channels_key: str = "intermediate_size"
    """Config key of the MLP's width, such as ``ffn_dim``; of a mixture of experts that of an MoE expert's width."""
    is_moe: bool = False
    """Whether the MLP is a mixture of experts. ``{e}`` in names of modules then stands for an MoE expert's number:
    ``mlp.experts.{e}.up_proj``."""
    dense_mlp: DenseMlp | None = None
    """The MLP of a mixture's layers without experts; None where all layers have them."""
    n_experts_key: str = "num_experts"
    """Config key of the number of MoE experts, where transformers has not written it as ``num_local_experts``."""
    n_chosen_key: str = "num_experts_per_tok"
    """Config key of the number of MoE experts that the router chooses for a token."""
    shared_width_keys: tuple[str, ...] = ()
    """Config keys whose product is the width of the experts that every token passes, beside those that the router
    chooses: ``("moe_intermediate_size", "n_shared_experts")``. They stay whole."""
    has_shared_gate: bool = False
    """Whether a row of weights says for each token how much the shared experts count."""
    has_router_bias: bool = False
    """Whether the router has a number for each MoE expert beside its weights."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names of modules in transformers that checkpoints have other names for, such as
    ``{"mlp.gate.moe_statics": "mlp.moe_statics"}``; what lies before ``.experts`` need not be here."""
    groups_key: str | None = "num_key_value_heads"
    """Config key of the number of key-value heads; None where every query head has its own, as in OPT."""
    has_head_dim: bool = True
    """Whether the family's own config may have heads of another size than hidden size / heads: True if its class in
    transformers reads ``head_dim``, False for OPT."""
    heads_fill_hidden: bool = False
    """Whether the family's own heads are together as wide as the hidden size, though its config has a head size: True
    for Helium. In a stock checkpoint none can go."""
    like_llama: bool = False
    """Whether a Llama with biases computes the same, so that a stock checkpoint with added biases can be one: True for
    Mistral and Qwen2."""
    mixes_windows: bool = False
    """Whether some layers have a sliding window and others none, where the config does not say it: True for Gemma 2.
    A ``sliding_window`` of null says that there are none."""
    window_period: int = 1
    """Layers from one that attends to everything to the next, where the config does not say it: 2 for Gemma 2."""
    behind_mlp: str | None = None
    """What comes between ``down_proj`` and the residual stream: ``a norm`` in Gemma 2 and 3."""
    supports_packing: bool = True
    """Whether transformers keeps sequences that share a row apart, by their positions: False for OPT."""
    needs_bos: bool = False
    """Whether models lose most of their quality where a text has no beginning token: True for Gemma."""
    ties_embeddings: bool = False
    """Whether the head is the input embedding, where the config does not say it: True for Gemma."""
    listed_by_layer: str | None = None
    """Config key of a list with an entry for each layer, which transformers makes by the layers' numbers where it is
    missing: ``no_rope_layers`` in SmolLM3. Beside it ``layer_types`` is one in every family."""
    refused: Mapping[str, bool] = field(default_factory=dict)
    """Config keys with which models of the family are laid out in another way, and are refused if one has this value:
    ``{"qk_layernorm": True}``."""

    @property
    def config_class(self) -> str:
        """Class in ``seap_ray.models.hf.configuration_seap`` that holds a compacted checkpoint's configuration."""
        return f"{self.classes}Config"

    @property
    def model_class(self) -> str:
        """Class in ``seap_ray.models.hf.modeling_seap`` that loads a compacted checkpoint."""
        return f"{self.classes}ForCausalLM"

    @property
    def columns(self) -> dict[str, Unit]:
        """Modules whose columns are cut, and the unit that they are made of; attention first."""
        columns: dict[str, Unit] = {self.o_proj: "heads", self.down_proj: "channels"}
        return columns | ({self.dense_mlp.down_proj: "channels"} if self.dense_mlp else {})

    @property
    def cut_rows(self) -> Mapping[str, Rows]:
        """Modules whose rows are cut in any layer, with experts or without, and what their rows are."""
        return {**self.rows, **(self.dense_mlp.rows if self.dense_mlp else {})}


# Rows by the ``model_type`` of config.json. A new family is a row here; its classes in ``seap_ray.models.hf`` and
# ``seap_ray.vllm_plugin.model`` are made of it.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        classes="SeapLlama",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        like_llama=True,
    ),
    "mistral": Family(
        classes="SeapMistral",
        like_llama=True,
    ),
    "qwen2": Family(
        classes="SeapQwen2",
        qkv_bias=True,
        like_llama=True,
    ),
    "qwen3": Family(
        classes="SeapQwen3",
        vllm_class="SeapQwen3ForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
    ),
    "gemma2": Family(
        classes="SeapGemma2",
        vllm_class="SeapGemma2ForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(4, 0),
        behind_mlp="a norm",
        mixes_windows=True,
        window_period=2,
        needs_bos=True,
        ties_embeddings=True,
    ),
    "gemma3_text": Family(
        classes="SeapGemma3",
        vllm_class="SeapGemma3ForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(4, 2),
        behind_mlp="a norm",
        mixes_windows=True,
        window_period=6,
        needs_bos=True,
        ties_embeddings=True,
    ),
    "gemma": Family(
        classes="SeapGemma",
        vllm_class="SeapGemmaForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        needs_bos=True,
        ties_embeddings=True,
    ),
    "phi3": Family(
        classes="SeapPhi3",
        vllm_class="SeapPhi3ForCausalLM",
        rows={
            # Queries, keys and values are one matrix, gate and up another.
            "self_attn.qkv_proj": Rows(("heads", "groups", "groups")),
            "mlp.gate_up_proj": Rows(("channels", "channels")),
        },
    ),
    "smollm3": Family(
        classes="SeapSmolLM3",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        ties_embeddings=True,
        listed_by_layer="no_rope_layers",
    ),
    "granite": Family(
        classes="SeapGranite",
        vllm_class="SeapGraniteForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        behind_mlp="a multiplier",
    ),
    "olmo": Family(
        classes="SeapOlmo",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(0, 0),
    ),
    "olmo2": Family(
        classes="SeapOlmo2",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms_all_heads=True,
        behind_mlp="a norm",
    ),
    "olmo3": Family(
        classes="SeapOlmo3",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms_all_heads=True,
        mixes_windows=True,
        window_period=4,
        behind_mlp="a norm",
    ),
    "glm": Family(
        classes="SeapGlm",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | FUSED_MLP,
        qkv_bias=("attention_bias", True),
    ),
    "glm4": Family(
        classes="SeapGlm4",
        vllm_class="SeapGlm4ForCausalLM",
        rows=SPLIT_ATTENTION | FUSED_MLP,
        qkv_bias=("attention_bias", True),
        norms=(4, 0),
        behind_mlp="a norm",
    ),
    "seed_oss": Family(
        classes="SeapSeedOss",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", True),
        o_bias=("attention_out_bias", False),
        mlp_bias=("mlp_bias", False),
    ),
    "exaone4": Family(
        classes="SeapExaone4",
        vllm_class="SeapExaone4ForCausalLM",
        norms=(2, 2),
        mixes_windows=True,
        window_period=4,
        behind_mlp="a norm",
    ),
    "arcee": Family(
        classes="SeapArcee",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | UNGATED_MLP,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
    ),
    "nemotron": Family(
        classes="SeapNemotron",
        vllm_class="SeapNemotronForCausalLM",
        rows=SPLIT_ATTENTION | UNGATED_MLP,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        norms=(4, 0),
    ),
    "apertus": Family(
        classes="SeapApertus",
        vllm_class="SeapApertusForCausalLM",
        rows=SPLIT_ATTENTION | UNGATED_MLP,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
        activation_weights=4,
    ),
    "starcoder2": Family(
        classes="SeapStarcoder2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | {"mlp.c_fc": Rows(("channels",))},
        down_proj="mlp.c_proj",
        qkv_bias=("use_bias", True),
        o_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        norms=(4, 0),
        ties_embeddings=True,
    ),
    "stablelm": Family(
        classes="SeapStableLm",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("use_qkv_bias", False),
        norms=(4, 0),
        has_head_dim=False,
        refused={"qk_layernorm": True, "use_parallel_residual": True},
    ),
    "phi": Family(
        classes="SeapPhi",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | {"mlp.fc1": Rows(("channels",))},
        o_proj="self_attn.dense",
        down_proj="mlp.fc2",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        refused={"qk_layernorm": True},
    ),
    "cohere": Family(
        classes="SeapCohere",
        vllm_class="SeapCohereForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(1, 0),
        ties_embeddings=True,
        refused={"use_qk_norm": True},
    ),
    "cohere2": Family(
        classes="SeapCohere2",
        vllm_class="SeapCohere2ForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(1, 0),
        mixes_windows=True,
        window_period=4,
        has_head_dim=False,
        ties_embeddings=True,
    ),
    "ernie4_5": Family(
        classes="SeapErnie4_5",
        vllm_class="SeapErnie4_5ForCausalLM",
        qkv_bias=("use_bias", False),
        o_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
        ties_embeddings=True,
    ),
    "hunyuan_v1_dense": Family(
        classes="SeapHunYuanDenseV1",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
    ),
    "helium": Family(
        classes="SeapHelium",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        heads_fill_hidden=True,
    ),
    "ministral": Family(
        classes="SeapMinistral",
        vllm_class=TRANSFORMERS_BACKEND,
    ),
    "ministral3": Family(
        classes="SeapMinistral3",
        vllm_class=TRANSFORMERS_BACKEND,
    ),
    "cwm": Family(
        classes="SeapCwm",
        vllm_class=TRANSFORMERS_BACKEND,
        mlp_bias=("mlp_bias", False),
        mixes_windows=True,
        window_period=4,
    ),
    "vaultgemma": Family(
        classes="SeapVaultGemma",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mixes_windows=True,
        window_period=2,
        needs_bos=True,
        ties_embeddings=True,
    ),
    "jais2": Family(
        classes="SeapJais2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | UNGATED_MLP,
        qkv_bias=("attention_bias", True),
        o_bias=("attention_bias", True),
        mlp_bias=("mlp_bias", True),
        norms=(4, 0),
    ),
    "hyperclovax": Family(
        classes="SeapHyperCLOVAX",
        vllm_class="SeapHyperCLOVAXForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        norms=(4, 0),
        behind_mlp="a norm",
        refused={"use_post_norm": False},
    ),
    "mixtral": Family(
        classes="SeapMixtral",
        vllm_class="SeapMixtralForCausalLM",
        rows=SPLIT_ATTENTION | BLOCK_SPARSE_EXPERTS,
        down_proj="block_sparse_moe.experts.{e}.w2",
        is_moe=True,
    ),
    "qwen3_moe": Family(
        classes="SeapQwen3Moe",
        vllm_class="SeapQwen3MoeForCausalLM",
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
    ),
    "qwen2_moe": Family(
        classes="SeapQwen2Moe",
        vllm_class="SeapQwen2MoeForCausalLM",
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("qkv_bias", True),
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        shared_width_keys=("shared_expert_intermediate_size",),
        has_shared_gate=True,
        has_head_dim=False,
    ),
    "olmoe": Family(
        classes="SeapOlmoe",
        vllm_class="SeapOlmoeForCausalLM",
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms_all_heads=True,
        is_moe=True,
        has_head_dim=False,
    ),
    "glm4_moe": Family(
        classes="SeapGlm4Moe",
        vllm_class="SeapGlm4MoeForCausalLM",
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        norms=(2, 2),
        head_norms_key="use_qk_norm",
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_router_bias=True,
    ),
    "ernie4_5_moe": Family(
        classes="SeapErnie4_5_Moe",
        vllm_class="SeapErnie4_5_MoeForCausalLM",
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        n_experts_key="moe_num_experts",
        n_chosen_key="moe_k",
        shared_width_keys=("moe_intermediate_size", "moe_num_shared_experts"),
        has_router_bias=True,
        renamed={"mlp.gate.moe_statics": "mlp.moe_statics"},
        refused={"use_bias": True},
        ties_embeddings=True,
    ),
    "deepseek_v3": Family(
        classes="SeapDeepseekV3",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        o_bias=("attention_bias", False),
        is_latent=True,
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_router_bias=True,
        has_head_dim=False,
    ),
    "deepseek_v2": Family(
        classes="SeapDeepseekV2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        o_bias=("attention_bias", False),
        is_latent=True,
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_head_dim=False,
        refused={"mlp_bias": True},
    ),
    "glm4_moe_lite": Family(
        classes="SeapGlm4MoeLite",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        o_bias=("attention_bias", False),
        is_latent=True,
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_router_bias=True,
        has_head_dim=False,
        listed_by_layer="mlp_layer_types",
    ),
    "dots1": Family(
        classes="SeapDots1",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_router_bias=True,
    ),
    "solar_open": Family(
        classes="SeapSolarOpen",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        channels_key="moe_intermediate_size",
        is_moe=True,
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_router_bias=True,
    ),
    "exaone_moe": Family(
        classes="SeapExaoneMoe",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        norms=(2, 2),
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        shared_width_keys=("moe_intermediate_size", "num_shared_experts"),
        has_router_bias=True,
        renamed={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
        mixes_windows=True,
        window_period=4,
        listed_by_layer="mlp_layer_types",
    ),
    "mellum": Family(
        classes="SeapMellum",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
        channels_key="moe_intermediate_size",
        is_moe=True,
        dense_mlp=DenseMlp(),
        listed_by_layer="mlp_layer_types",
    ),
    "flex_olmo": Family(
        classes="SeapFlexOlmo",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | MOE_EXPERTS,
        down_proj="mlp.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms_all_heads=True,
        is_moe=True,
        behind_mlp="a norm",
    ),
    "minimax_m2": Family(
        classes="SeapMiniMaxM2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | BLOCK_SPARSE_EXPERTS,
        down_proj="block_sparse_moe.experts.{e}.w2",
        norms_all_heads=True,
        is_moe=True,
        has_router_bias=True,
    ),
    "phimoe": Family(
        classes="SeapPhimoe",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | BLOCK_SPARSE_EXPERTS,
        down_proj="block_sparse_moe.experts.{e}.w2",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(4, 0),
        is_moe=True,
        renamed={".router.": ".gate."},
    ),
    "opt": Family(
        classes="SeapOPT",
        vllm_class="SeapOPTForCausalLM",
        layers="model.decoder.layers.",
        embedding="model.decoder.embed_tokens.weight",
        rows=SPLIT_ATTENTION | {"fc1": Rows(("channels",))},
        o_proj="self_attn.out_proj",
        down_proj="fc2",
        qkv_bias=("enable_bias", True),
        o_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True),
        norms=(4, 0),
        channels_key="ffn_dim",
        groups_key=None,
        has_head_dim=False,
        supports_packing=False,
    ),
    "gpt_neox": Family(
        classes="SeapGPTNeoX",
        vllm_class=TRANSFORMERS_BACKEND,
        layers="gpt_neox.layers.",
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        # A head's query, key and value lie together, head after head.
        rows={"attention.query_key_value": Rows(("heads",), times=3), "mlp.dense_h_to_4h": Rows(("channels",))},
        o_proj="attention.dense",
        down_proj="mlp.dense_4h_to_h",
        qkv_bias=("attention_bias", True),
        o_bias=("attention_bias", True),
        mlp_bias=True,
        norms=(4, 0),
        groups_key=None,
        has_head_dim=False,
    ),
}


MOE_EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")
"""An MoE expert's number in the name of a module."""


def family_of(model_type: str) -> Family:
    """Return the row of ``FAMILIES`` for the ``model_type`` of a dense or a compacted model."""
    return FAMILIES[model_type.removeprefix("seap_")]


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

        # A compacted model's layers differ from its top level.
        overrides = config.get("per_layer_config") or {}
        n_layers = _size(config, "num_hidden_layers")
        has_experts_L = _has_experts(config, family, n_layers)
        layers: list[Layer] = []
        for layer, has_experts in enumerate(has_experts_L):
            layers.append(_layer({**config, **overrides.get(str(layer), {})}, family, has_experts=has_experts))

        # Older configs name the parameters of RoPE rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}

        return cls(
            family_name=name,
            layers=tuple(layers),
            hidden_size=_size(config, "hidden_size"),
            head_dim=_head_dim(config, family),
            dense=_layer(config, family, has_experts=family.is_moe).shape,
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
        if self.family.is_latent:
            return "its keys and values are made of one latent vector for all heads, and this attention stays whole"
        return None

    def modules(self, layer: int) -> dict[Site, str]:
        """Return the module whose input each site of a layer is; attention first, then its MLP or every MoE expert."""
        n_experts = self.layers[layer].n_experts
        if not n_experts:
            dense_mlp = self.family.dense_mlp
            return {"attn": self.family.o_proj, "mlp": dense_mlp.down_proj if dense_mlp else self.family.down_proj}
        down_proj = self.family.down_proj
        return {"attn": self.family.o_proj} | {f"mlp.{e}": down_proj.format(e=e) for e in range(n_experts)}

    def sites(self, layer: int, site: Site) -> list[Site]:
        """Return a site of a layer itself, or for ``mlp`` of a layer with MoE experts the sites of all of them."""
        n_experts = self.layers[layer].n_experts
        return [f"mlp.{e}" for e in range(n_experts)] if site == "mlp" and n_experts else [site]

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
        """Weights of one query head: its rows of q_proj and columns of o_proj."""
        # The bias of o_proj is as long as the hidden size, so no head has a part of it.
        return self.head_dim * (2 * self.hidden_size + self.qkv_bias)

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
        n_hidden += self.o_bias + self.mlp_bias + len(layer.biases) + layer.n_experts
        # Such norms have a weight for each column of queries and keys.
        n_head += (layer.shape.heads + layer.shape.groups) * self.family.norms_all_heads
        if layer.n_experts:
            # Gate, way up and way down of the shared experts.
            n_hidden += 3 * self.shared_channels + self.family.has_shared_gate
        fixed = self.hidden_size * n_hidden + self.head_dim * n_head + self.family.activation_weights
        fixed += layer.n_experts * self.family.has_router_bias
        return self.attention_parameters(layer.shape) + layer.shape.channels * self.channel_cost(layer) + fixed

    @property
    def decoder_parameters(self) -> int:
        """All weights of the decoder layers: what a ratio is a share of."""
        return sum(map(self.layer_parameters, self.layers))

    def resized(self, layer: int, shape: Shape, *, adds_biases: bool) -> Layer:
        """Return a layer with other widths.

        Args:
            layer: Number of the layer.
            shape: Its new widths.
            adds_biases: Whether it gets output biases if its widths change; otherwise it has those that it had.

        Returns:
            The layer after the cut.
        """
        original = self.layers[layer]
        gets_biases = adds_biases and shape != original.shape
        return replace(original, shape=shape, biases=self.bias_keys if gets_biases else original.biases)

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
        """Return the checkpoint's name of a decoder layer's tensor."""
        return f"{self.family.layers}{layer}.{module}.{kind}"

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

    # DeepSeek and GLM count the first layers without; ERNIE names the first and the last layer with experts, Qwen every
    # layer without.
    first = config.get("first_k_dense_replace") or config.get("moe_layer_start_index") or 0
    last = config.get("moe_layer_end_index", -1)
    last = n_layers - 1 if last in (None, -1) else last
    step = config.get("decoder_sparse_step") or 1
    if config.get("moe_layer_interval", 1) not in (None, 1):
        raise ConfigError("config.json: moe_layer_interval is not 1, as no published model has it")
    without = config.get("mlp_only_layers") or ()
    has_experts = tuple(
        first <= layer <= last and (layer + 1) % step == 0 and layer not in without for layer in range(n_layers)
    )
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
    if config.get("first_k_dense_replace") is not None:
        return {"first_k_dense_replace": len(dense)}
    if config.get("moe_layer_start_index") is not None:
        with_experts = [layer for layer, without in enumerate(is_dense) if not without]
        return {"moe_layer_start_index": with_experts[0], "moe_layer_end_index": with_experts[-1]}
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _layer(config: Mapping[str, Any], family: Family, *, has_experts: bool) -> Layer:
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
    n_experts = _n_experts(config, family) if has_experts else 0
    return Layer(Shape(groups, heads // groups, channels), biases, n_experts)


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
    layer_types = config.get("layer_types")
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
