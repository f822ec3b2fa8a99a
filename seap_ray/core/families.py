"""Families: what sets a model family apart, as data. A new family is a row of ``FAMILIES``.

``architecture`` reads the dimensions of one model by the row of its family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
GATED_ATTENTION = SPLIT_ATTENTION | {"self_attn.q_proj": Rows(("heads",), times=2)}
"""The same with a gate on the attention's output: a head's query and its gate lie together."""
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
ROUTER = ("mlp.gate.weight",)
"""The router of most mixtures."""
BLOCK_SPARSE_ROUTER = ("block_sparse_moe.gate.weight",)
"""The router of Mixtral and its like."""
BIASED_ROUTER = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
"""A router with a number for each MoE expert, by which it chooses, beside its weights."""
Bias = bool | tuple[str, bool]
"""A family's bias: always there (True), never (False), or the config key that says it and what holds where the key is
missing: ``("attention_bias", False)``."""


TRANSFORMERS_BACKEND = "SeapTransformersForCausalLM"
"""Class in ``seap_ray.vllm_plugin.model`` that serves a family by transformers' own layers."""


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """What a tensor is that holds those of all MoE experts of a layer, one expert after another."""

    modules: tuple[str, ...]
    """Modules of an MoE expert that lie in it together, ``{e}`` for the expert's number: gate and way up."""
    kind: str = "weight"
    """Kind of the modules' tensors, ``weight`` or ``bias``."""
    is_transposed: bool = False
    """Whether rows of the modules are its columns."""
    alternates: bool = False
    """Whether a row of each module follows one of the other; if not, all rows of one module come first."""


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
    published_class: str = ""
    """Class that its checkpoints name where that is not transformers' name, and vLLM goes by it."""
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
    mixture: str = "mlp"
    """Module in transformers that holds a layer's router and MoE experts, whatever checkpoints call it."""
    weighs_inputs: bool = False
    """Whether the router weighs what MoE experts read, and not what they give: True for Llama 4."""
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
    router: tuple[str, ...] = ROUTER
    """Tensors of a mixture's layer with a row, or a number, for each MoE expert: the router's weights, and where it has
    such the numbers beside them."""
    expert_groups: tuple[int, int] = (1, 1)
    """Groups of MoE experts, and how many of them are chosen from for a token, where the config does not say it
    (``n_group`` and ``topk_group``): (8, 4) for DeepSeek V3."""
    has_transposed_experts: bool = False
    """Whether tensors that hold all MoE experts of a layer have an expert's rows as columns: True for gpt-oss."""
    has_alternating_experts: bool = False
    """Whether rows of gate and way up alternate in such tensors, beside all of the gate coming first: True for
    gpt-oss."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names of modules in transformers that checkpoints have other names for, such as
    ``{"mlp.gate.moe_statics": "mlp.moe_statics"}``; what lies before ``.experts`` need not be here."""
    sinks: str | None = None
    """Tensor with a number for each query head, to which tokens may attend in place of others:
    ``self_attn.sinks``."""
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
    has_windows_by_place: bool = False
    """Whether vLLM gives windows to the layers of an ordinary checkpoint by their numbers, whatever the config lists:
    True for gpt-oss."""
    behind_mlp: str | None = None
    """What comes between ``down_proj`` and the residual stream: ``a norm`` in Gemma 2 and 3."""
    whole_attention: str | None = None
    """Why attention of every layer stays whole, and is not looked at, where its heads are not those of this table:
    Gemma 4. ``hybrids.kept_whole`` counts it."""
    mixer: str | None = None
    """What mixes tokens by a state in place of attention or beside it, a row of ``hybrids.MIXERS``. It stays whole."""
    attention_period: int | None = None
    """Layers from one with attention to the next, where the config does not list them: 4 for Qwen3-Next."""
    has_both: bool = False
    """Whether each layer has both attention and a mixer: True for Falcon-H1."""
    has_single_parts: bool = False
    """Whether each layer is attention, a mixer or an MLP alone: True for Nemotron-H."""
    returns_tuples: bool = False
    """Whether layers in transformers return a tuple, of which the decoder takes the first: True for Falcon-H1."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that a cut checkpoint has with this value, or with None has not, since a cut settles what they say:
    ``{"block_auto_adjust_ff_dim": False}`` in LFM2, whose config may give a width before it is rounded."""
    supports_packing: bool = True
    """Whether transformers keeps sequences that share a row apart, by their positions: False for OPT and gpt-oss."""
    needs_bos: bool = False
    """Whether models lose most of their quality where a text has no beginning token: True for Gemma."""
    ties_embeddings: bool = False
    """Whether the head is the input embedding, where the config does not say it: True for Gemma."""
    logits_times: str | None = None
    """Config key of a number that logits are multiplied by: ``logit_scale`` in Command R."""
    logits_over: str | None = None
    """Config key of a number that logits are divided by: ``logits_scaling`` in Granite."""
    listed_by_layer: str | None = None
    """Config key of a list with an entry for each layer, which transformers makes by the layers' numbers where it is
    missing: ``no_rope_layers`` in SmolLM3. Beside it ``layer_types`` is one in every family."""
    layer_keys: tuple[str, ...] = ()
    """Config keys of attention that differ by layer in ``per_layer_config`` of the family's own models:
    ``("head_dim", "num_key_value_heads")`` in Gemma 4."""
    refused: Mapping[str, bool] = field(default_factory=dict)
    """Config keys with which models of the family are laid out in another way, and are refused if one has this value:
    ``{"qk_layernorm": True}``."""

    @property
    def experts(self) -> str:
        """Module in transformers that holds all MoE experts of a layer."""
        return f"{self.mixture}.experts"

    @property
    def has_router_bias(self) -> bool:
        """Whether the router has a number for each MoE expert beside its weights."""
        return len(self.router) > 1

    @property
    def fused_experts(self) -> dict[str, FusedExperts]:
        """Tensors that hold those of all MoE experts of a layer, by their names: transformers' own modules have such.

        So do some checkpoints.
        """
        if not self.is_moe:
            return {}
        # The rows of a family come gate first, as transformers has them in one matrix.
        before = tuple(module for module in self.rows if "{e}" in module)
        gate_up = FusedExperts(before, "weight", self.has_transposed_experts, self.has_alternating_experts)
        down = FusedExperts((self.down_proj,), "weight", self.has_transposed_experts)
        fused = {f"{self.experts}.gate_up_proj": gate_up, f"{self.experts}.down_proj": down}
        biases = {f"{name}_bias": replace(tensor, kind="bias") for name, tensor in fused.items()}
        return fused | (biases if self.mlp_bias else {})

    @property
    def config_class(self) -> str:
        """Class in ``seap_ray.models.hf.configuration_seap`` that holds a compacted checkpoint's configuration."""
        return f"{self.classes}Config"

    @property
    def model_class(self) -> str:
        """Class in ``seap_ray.models.hf.modeling_seap`` that loads a compacted checkpoint."""
        return f"{self.classes}ForCausalLM"

    @property
    def stock_class(self) -> str:
        """Class that a stock checkpoint names."""
        return self.published_class or self.model_class.removeprefix("Seap")

    @property
    def shares_rows(self) -> bool:
        """Whether several sequences may share a row: a mixer's state would pass from one to the next."""
        return self.supports_packing and not self.mixer

    @property
    def query_times(self) -> int:
        """Rows that a query head has, in head sizes: 2 where a gate on the attention's output lies beside it."""
        return self.rows["self_attn.q_proj"].times if "self_attn.q_proj" in self.rows else 1

    @property
    def columns(self) -> dict[str, Unit]:
        """Modules whose columns are cut, and the unit that they are made of; attention first."""
        columns: dict[str, Unit] = {} if self.whole_attention else {self.o_proj: "heads"}
        columns[self.down_proj] = "channels"
        return columns | ({self.dense_mlp.down_proj: "channels"} if self.dense_mlp else {})

    @property
    def has_other_parts(self) -> bool:
        """Whether layers mix tokens by something that stays whole and that neither engines nor targets know here."""
        return bool(self.mixer or self.whole_attention)

    @property
    def cut_rows(self) -> Mapping[str, Rows]:
        """Modules whose rows are cut in any layer, with experts or without, and what their rows are."""
        return {**self.rows, **(self.dense_mlp.rows if self.dense_mlp else {})}


MIXTURE = Family(
    classes="",
    rows=SPLIT_ATTENTION | MOE_EXPERTS,
    down_proj="mlp.experts.{e}.down_proj",
    channels_key="moe_intermediate_size",
    is_moe=True,
    dense_mlp=DenseMlp(),
)
"""What most mixtures of experts have in common, which is no family itself."""
DEEPSEEK_MIXTURE = replace(
    MIXTURE,
    n_experts_key="n_routed_experts",
    shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
    router=BIASED_ROUTER,
)
"""The same of those whose experts are chosen and shared as DeepSeek V3's."""
GATED_DELTA_MIXTURE = replace(
    MIXTURE,
    vllm_class=TRANSFORMERS_BACKEND,
    rows=GATED_ATTENTION | MOE_EXPERTS,
    qkv_bias=("attention_bias", False),
    o_bias=("attention_bias", False),
    norms=(2, 2),
    shared_width_keys=("shared_expert_intermediate_size",),
    has_shared_gate=True,
    mixer="gated delta net",
    attention_period=4,
    listed_by_layer="layer_types",
)
"""The same of those with linear attention, and full attention in every fourth layer."""

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
    "gemma4_text": Family(
        classes="SeapGemma4",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=GATED_MLP,
        norms=(4, 0),
        behind_mlp="a norm",
        mixes_windows=True,
        whole_attention="its heads are of two sizes, and layers share keys and values",
        layer_keys=("head_dim", "num_key_value_heads"),
        needs_bos=True,
        ties_embeddings=True,
        refused={"enable_moe_block": True},
        settled={"use_double_wide_mlp": False},
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
        logits_over="logits_scaling",
    ),
    "granite_swa": Family(
        classes="SeapGraniteSWA",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        sinks="self_attn.sinks",
        mixes_windows=True,
        behind_mlp="a multiplier",
        ties_embeddings=True,
        logits_over="logits_scaling",
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
        logits_times="logit_scale",
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
        logits_times="logit_scale",
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
        logits_times="logits_scaling",
    ),
    "mixtral": Family(
        classes="SeapMixtral",
        vllm_class="SeapMixtralForCausalLM",
        rows=SPLIT_ATTENTION | BLOCK_SPARSE_EXPERTS,
        down_proj="block_sparse_moe.experts.{e}.w2",
        router=BLOCK_SPARSE_ROUTER,
        is_moe=True,
    ),
    "qwen3_moe": replace(
        MIXTURE,
        classes="SeapQwen3Moe",
        vllm_class="SeapQwen3MoeForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
    ),
    "qwen2_moe": replace(
        MIXTURE,
        classes="SeapQwen2Moe",
        vllm_class="SeapQwen2MoeForCausalLM",
        qkv_bias=("qkv_bias", True),
        shared_width_keys=("shared_expert_intermediate_size",),
        has_shared_gate=True,
        has_head_dim=False,
    ),
    "olmoe": replace(
        MIXTURE,
        classes="SeapOlmoe",
        vllm_class="SeapOlmoeForCausalLM",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms_all_heads=True,
        has_head_dim=False,
        channels_key="intermediate_size",
        dense_mlp=None,
    ),
    "glm4_moe": replace(
        DEEPSEEK_MIXTURE,
        classes="SeapGlm4Moe",
        vllm_class="SeapGlm4MoeForCausalLM",
        qkv_bias=("attention_bias", False),
        norms=(2, 2),
        head_norms_key="use_qk_norm",
    ),
    "ernie4_5_moe": replace(
        MIXTURE,
        classes="SeapErnie4_5_Moe",
        vllm_class="SeapErnie4_5_MoeForCausalLM",
        n_experts_key="moe_num_experts",
        n_chosen_key="moe_k",
        shared_width_keys=("moe_intermediate_size", "moe_num_shared_experts"),
        router=(*ROUTER, "mlp.moe_statics.e_score_correction_bias"),
        renamed={"mlp.gate.moe_statics": "mlp.moe_statics"},
        refused={"use_bias": True},
        ties_embeddings=True,
    ),
    "deepseek_v3": replace(
        DEEPSEEK_MIXTURE,
        classes="SeapDeepseekV3",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=MOE_EXPERTS,
        o_bias=("attention_bias", False),
        is_latent=True,
        expert_groups=(8, 4),
        has_head_dim=False,
    ),
    "deepseek_v2": replace(
        MIXTURE,
        classes="SeapDeepseekV2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=MOE_EXPERTS,
        o_bias=("attention_bias", False),
        is_latent=True,
        n_experts_key="n_routed_experts",
        shared_width_keys=("moe_intermediate_size", "n_shared_experts"),
        has_head_dim=False,
        refused={"mlp_bias": True},
    ),
    "glm4_moe_lite": replace(
        DEEPSEEK_MIXTURE,
        classes="SeapGlm4MoeLite",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=MOE_EXPERTS,
        o_bias=("attention_bias", False),
        is_latent=True,
        has_head_dim=False,
        listed_by_layer="mlp_layer_types",
    ),
    "dots1": replace(
        DEEPSEEK_MIXTURE,
        classes="SeapDots1",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
    ),
    "solar_open": replace(
        DEEPSEEK_MIXTURE,
        classes="SeapSolarOpen",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        dense_mlp=None,
    ),
    "exaone_moe": replace(
        MIXTURE,
        classes="SeapExaoneMoe",
        vllm_class=TRANSFORMERS_BACKEND,
        norms=(2, 2),
        shared_width_keys=("moe_intermediate_size", "num_shared_experts"),
        router=(*ROUTER, "mlp.e_score_correction_bias"),
        renamed={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"},
        mixes_windows=True,
        window_period=4,
        listed_by_layer="mlp_layer_types",
    ),
    "mellum": replace(
        MIXTURE,
        classes="SeapMellum",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
        listed_by_layer="mlp_layer_types",
    ),
    "flex_olmo": replace(
        MIXTURE,
        classes="SeapFlexOlmo",
        vllm_class=TRANSFORMERS_BACKEND,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms_all_heads=True,
        behind_mlp="a norm",
        channels_key="intermediate_size",
        dense_mlp=None,
    ),
    "minimax_m2": Family(
        classes="SeapMiniMaxM2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | BLOCK_SPARSE_EXPERTS,
        down_proj="block_sparse_moe.experts.{e}.w2",
        norms_all_heads=True,
        is_moe=True,
        router=(*BLOCK_SPARSE_ROUTER, "block_sparse_moe.e_score_correction_bias"),
    ),
    "phimoe": Family(
        classes="SeapPhimoe",
        vllm_class=TRANSFORMERS_BACKEND,
        published_class="PhiMoEForCausalLM",
        rows=SPLIT_ATTENTION | BLOCK_SPARSE_EXPERTS,
        down_proj="block_sparse_moe.experts.{e}.w2",
        router=BLOCK_SPARSE_ROUTER,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(4, 0),
        is_moe=True,
        renamed={".router.": ".gate."},
    ),
    "gpt_oss": replace(
        MIXTURE,
        classes="SeapGptOss",
        vllm_class="SeapGptOssForCausalLM",
        qkv_bias=("attention_bias", True),
        o_bias=("attention_bias", True),
        mlp_bias=True,
        has_transposed_experts=True,
        has_alternating_experts=True,
        router=("mlp.router.weight", "mlp.router.bias"),
        sinks="self_attn.sinks",
        mixes_windows=True,
        window_period=2,
        has_windows_by_place=True,
        supports_packing=False,
        channels_key="intermediate_size",
        dense_mlp=None,
    ),
    "llama4_text": Family(
        classes="SeapLlama4",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION
        | {
            "feed_forward.experts.{e}.gate_proj": Rows(("channels",)),
            "feed_forward.experts.{e}.up_proj": Rows(("channels",)),
        },
        down_proj="feed_forward.experts.{e}.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        is_moe=True,
        mixture="feed_forward",
        weighs_inputs=True,
        dense_mlp=DenseMlp(
            rows={
                "feed_forward.gate_proj": Rows(("channels",)),
                "feed_forward.up_proj": Rows(("channels",)),
            },
            down_proj="feed_forward.down_proj",
            channels_key="intermediate_size_mlp",
        ),
        shared_width_keys=("intermediate_size",),
        router=("feed_forward.router.weight",),
        has_transposed_experts=True,
        supports_packing=False,
        listed_by_layer="no_rope_layers",
    ),
    "qwen3_5_text": Family(
        classes="SeapQwen3_5",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=GATED_ATTENTION | GATED_MLP,
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        norms=(2, 2),
        mixer="gated delta net",
        attention_period=4,
        listed_by_layer="layer_types",
    ),
    "qwen3_next": replace(GATED_DELTA_MIXTURE, classes="SeapQwen3Next"),
    "qwen3_5_moe_text": replace(GATED_DELTA_MIXTURE, classes="SeapQwen3_5Moe", dense_mlp=None),
    "lfm2": Family(
        classes="SeapLfm2",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | {"feed_forward.w1": Rows(("channels",)), "feed_forward.w3": Rows(("channels",))},
        o_proj="self_attn.out_proj",
        down_proj="feed_forward.w2",
        norms=(2, 2),
        ties_embeddings=True,
        mixer="short convolution",
        listed_by_layer="layer_types",
        settled={"block_auto_adjust_ff_dim": False, "block_ff_dim": None},
    ),
    "granitemoehybrid": Family(
        classes="SeapGraniteMoeHybrid",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION | {"shared_mlp.input_linear": Rows(("channels", "channels"))},
        down_proj="shared_mlp.output_linear",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        channels_key="shared_intermediate_size",
        behind_mlp="a multiplier",
        mixer="mamba 2 of granite",
        listed_by_layer="layer_types",
        refused={"num_local_experts": True},
        logits_over="logits_scaling",
    ),
    "falcon_h1": Family(
        classes="SeapFalconH1",
        vllm_class=TRANSFORMERS_BACKEND,
        rows=SPLIT_ATTENTION
        | {"feed_forward.gate_proj": Rows(("channels",)), "feed_forward.up_proj": Rows(("channels",))},
        down_proj="feed_forward.down_proj",
        qkv_bias=("attention_bias", False),
        o_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        behind_mlp="a multiplier",
        mixer="mamba 2 of falcon",
        has_both=True,
        returns_tuples=True,
        logits_times="lm_head_multiplier",
    ),
    "nemotron_h": Family(
        classes="SeapNemotronH",
        vllm_class=TRANSFORMERS_BACKEND,
        layers="backbone.layers.",
        embedding="backbone.embeddings.weight",
        rows={
            "mixer.q_proj": Rows(("heads",)),
            "mixer.k_proj": Rows(("groups",)),
            "mixer.v_proj": Rows(("groups",)),
            "mixer.up_proj": Rows(("channels",)),
        },
        o_proj="mixer.o_proj",
        down_proj="mixer.down_proj",
        mlp_bias=("mlp_bias", False),
        norms=(1, 0),
        mixer="mamba 2 of nemotron",
        has_single_parts=True,
        listed_by_layer="layers_block_type",
        settled={"hybrid_override_pattern": None},
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


def family_of(model_type: str) -> Family:
    """Return the row of ``FAMILIES`` for the ``model_type`` of a dense or a compacted model."""
    return FAMILIES[model_type.removeprefix("seap_")]


@dataclass(frozen=True)
class Multimodal:
    """A kind of checkpoint that holds a language model and what reads pictures for it.

    The language model is cut as one of its family; all else is carried as it is.
    """

    classes: str
    """Beginning of the names of its classes in ``seap_ray.models.hf``, as in ``Family``."""
    texts: Mapping[str, str]
    """The language model's key of ``FAMILIES``, by the ``model_type`` of ``text_config``; the first where that has
    none."""

    @property
    def config_class(self) -> str:
        """Class in ``seap_ray.models.hf.configuration_seap`` that holds a compacted checkpoint's configuration."""
        return f"{self.classes}MultimodalConfig"

    @property
    def model_class(self) -> str:
        """Class in ``seap_ray.models.hf.modeling_seap`` that loads a compacted checkpoint."""
        return f"{self.classes}ForConditionalGeneration"


MULTIMODAL: dict[str, Multimodal] = {
    "gemma3": Multimodal("SeapGemma3", {"gemma3_text": "gemma3_text"}),
    "gemma4": Multimodal("SeapGemma4", {"gemma4_text": "gemma4_text"}),
    "llama4": Multimodal("SeapLlama4", {"llama4_text": "llama4_text"}),
    "mistral3": Multimodal("SeapMistral3", {"mistral": "mistral", "ministral3": "ministral3"}),
    # Behind pictures alone Qwen 3 VL has other positions than Qwen 3, three for a token.
    "qwen3_vl": Multimodal("SeapQwen3VL", {"qwen3_vl_text": "qwen3"}),
    "qwen3_5": Multimodal("SeapQwen3_5", {"qwen3_5_text": "qwen3_5_text"}),
    "qwen3_5_moe": Multimodal("SeapQwen3_5Moe", {"qwen3_5_moe_text": "qwen3_5_moe_text"}),
}
"""Rows by the ``model_type`` of config.json, whose ``text_config`` holds the language model's."""
