"""Builders: tiny models on disk, token sequences, tasks, random plans and statistics, checkpoints cut without Ray."""

import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FalconH1Config,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    GraniteSWAConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HyperCLOVAXConfig,
    Jais2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MellumConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    SolarOpenConfig,
    StableLmConfig,
    Starcoder2Config,
    VaultGemmaConfig,
)
from transformers.utils import logging as transformers_logging

from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.moments import Covariance, Moments, Statistics
from seap_ray.core.plan import Kept, Plan
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, finish, write_tensors
from seap_ray.models.layerwise import LayerwiseModel
from seap_ray.models.loading import decoder_of
from seap_ray.models.sequences import Sequences
from seap_ray.tasks import Task

transformers_logging.disable_progress_bar()

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789.,?!+-="
SIZES: dict[str, Any] = {
    "vocab_size": 3 + len(CHARACTERS),
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT_SIZES = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 80}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PHI_3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama_mha": lambda: LlamaConfig(**SIZES, num_attention_heads=6),
    "llama_gqa": lambda: LlamaConfig(**SIZES, num_attention_heads=12, num_key_value_heads=4),
    "llama_biased": lambda: LlamaConfig(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=10,  # not hidden_size / num_attention_heads
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama_tied": lambda: LlamaConfig(  # as the small ones of Llama 3.2
        **SIZES, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True, rope_parameters=LLAMA_3_ROPE
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, num_attention_heads=8, num_key_value_heads=4),
    "mistral": lambda: MistralConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, sliding_window=16),
    "qwen3": lambda: Qwen3Config(**SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    ),
    "phi3": lambda: Phi3Config(**SIZES, num_attention_heads=8, num_key_value_heads=4, rope_parameters=dict(PHI_3_ROPE)),
    "mixtral": lambda: MixtralConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        moe_intermediate_size=80,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "opt": lambda: OPTConfig(**OPT_SIZES, num_attention_heads=6),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, num_attention_heads=3),
}
"""Every kind of model that is told apart somewhere: grouped or not, with and without biases, tied or not."""
GROUPED: dict[str, Any] = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 3.0,
}
MINISTRAL_3_ROPE = {
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
DEEPSEEK_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
GATED_DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 8}
GEMMA_4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 12,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": SIZES["vocab_size"],
}
MORE_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma4": lambda: Gemma4TextConfig(  # as the 31B
        **GROUPED,
        **GEMMA_4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        final_logit_softcapping=30.0,
    ),
    "gemma4_sharing": lambda: Gemma4TextConfig(  # as the E2B
        **GROUPED, **GEMMA_4, hidden_size_per_layer_input=6, num_kv_shared_layers=2, use_double_wide_mlp=True
    ),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=8),
    "smollm3": lambda: SmolLM3Config(**GROUPED, head_dim=6),
    "granite": lambda: GraniteConfig(**GROUPED, **MULTIPLIERS),
    "granite_swa": lambda: GraniteSWAConfig(
        **GROUPED, **MULTIPLIERS, sliding_window=16, layer_rope_theta=[10000.0, 0, 500.0, 10000.0]
    ),
    "olmo": lambda: OlmoConfig(**GROUPED, clip_qkv=1.0),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "olmo3": lambda: Olmo3Config(**GROUPED, sliding_window=16),
    "glm": lambda: GlmConfig(**GROUPED, head_dim=8),
    "glm4": lambda: Glm4Config(**GROUPED, head_dim=8),
    "seed_oss": lambda: SeedOssConfig(**GROUPED, head_dim=8),
    "exaone4": lambda: Exaone4Config(**GROUPED, sliding_window=16),
    "exaone4_whole": lambda: Exaone4Config(  # as the 1.2B
        **GROUPED, sliding_window=None, layer_types=["full_attention"] * 4
    ),
    "arcee": lambda: ArceeConfig(**GROUPED),
    "nemotron": lambda: NemotronConfig(**GROUPED, head_dim=8),
    "apertus": lambda: ApertusConfig(**GROUPED, rope_parameters=dict(LLAMA_3_ROPE)),
    "starcoder2": lambda: Starcoder2Config(**GROUPED, sliding_window=16),
    "stablelm": lambda: StableLmConfig(**GROUPED, use_qkv_bias=True),
    "phi": lambda: PhiConfig(**SIZES, num_attention_heads=6),
    "cohere": lambda: CohereConfig(**GROUPED, logit_scale=0.5),
    "cohere2": lambda: Cohere2Config(**GROUPED, sliding_window=16, logit_scale=0.5),
    "ernie4_5": lambda: Ernie4_5Config(**GROUPED, head_dim=8),
    "hunyuan_v1_dense": lambda: HunYuanDenseV1Config(**GROUPED, head_dim=8),
    "helium": lambda: HeliumConfig(**GROUPED, head_dim=6),
    "ministral": lambda: MinistralConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "cwm": lambda: CwmConfig(**GROUPED, head_dim=8, sliding_window=16, rope_parameters=dict(LLAMA_3_ROPE)),
    "vaultgemma": lambda: VaultGemmaConfig(**GROUPED, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "jais2": lambda: Jais2Config(**GROUPED),
    "hyperclovax": lambda: HyperCLOVAXConfig(**GROUPED, **MULTIPLIERS),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[2],
    ),
    "olmoe": lambda: OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": lambda: Glm4MoeConfig(**GROUPED, **DEEPSEEK_EXPERTS, head_dim=8, use_qk_norm=True),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **GROUPED, head_dim=8, moe_intermediate_size=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=2
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES,
        **DEEPSEEK_EXPERTS,
        **LATENT,
        q_lora_rank=20,
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **SIZES, **DEEPSEEK_EXPERTS, **LATENT, q_lora_rank=None, attention_bias=True, topk_method="group_limited_greedy"
    ),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(
        **SIZES,
        **{**DEEPSEEK_EXPERTS, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
        **LATENT,
        q_lora_rank=20,
    ),
    "dots1": lambda: Dots1Config(**GROUPED, **DEEPSEEK_EXPERTS, head_dim=8, sliding_window=None),
    "solar_open": lambda: SolarOpenConfig(**GROUPED, **DEEPSEEK_EXPERTS, head_dim=8),
    "exaone_moe": lambda: ExaoneMoeConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=16,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=2,
    ),
    "mellum": lambda: MellumConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["sparse", "sparse", "dense", "sparse"],
    ),
    "flex_olmo": lambda: FlexOlmoConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "minimax_m2": lambda: MiniMaxM2Config(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: PhimoeConfig(
        **GROUPED, num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True
    ),
    "gpt_oss": lambda: GptOssConfig(
        **GROUPED,
        head_dim=8,
        sliding_window=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=0.5,
        rope_parameters=dict(GPT_OSS_ROPE),
    ),
    "llama4": lambda: Llama4TextConfig(  # as Maverick, every other layer with experts
        **GROUPED,
        head_dim=8,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=16,
        floor_scale=4,
    ),
    "ministral3": lambda: Ministral3Config(**GROUPED, head_dim=8, rope_parameters=dict(MINISTRAL_3_ROPE)),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**GROUPED, **GATED_DELTA),
    "qwen3_next": lambda: Qwen3NextConfig(
        **GROUPED,
        **GATED_DELTA,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeTextConfig(
        **GROUPED,
        **GATED_DELTA,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "lfm2": lambda: Lfm2Config(**GROUPED | {"intermediate_size": 110}, block_multiple_of=8, full_attn_idxs=[1, 3]),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **GROUPED,
        **MAMBA,
        **MULTIPLIERS,
        shared_intermediate_size=80,
        num_local_experts=0,
        layer_types=["mamba", "attention"] * 2,
        attention_bias=True,
    ),
    "falcon_h1": lambda: FalconH1Config(
        **GROUPED,
        **MAMBA,
        mamba_d_ssm=40,
        mamba_rms_norm=True,
        mlp_multipliers=[0.7, 0.4],
        ssm_multipliers=[0.4, 0.5, 0.6, 0.7, 0.8],
        key_multiplier=0.8,
        attention_out_multiplier=0.6,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **{**GROUPED, "layers_block_type": ["mlp", "linear_attention", "mlp", "full_attention"]},
        head_dim=8,
        mamba_num_heads=6,
        mamba_head_dim=8,
        ssm_state_size=6,
        n_groups=2,
        chunk_size=8,
    ),
}
"""Families that go through ``tests/models/test_families.py`` alone: what they are made of is that of some above."""

# --- dense models ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw all weights of a model anew, norms around one."""
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 2:
            noise *= 1.5 if "embed" in key else 1.5 * parameter.shape[1] ** -0.5
        else:
            noise = 0.3 * noise + ("norm" in key)
        parameter.copy_(noise)


def save_dense(
    folder: Path, name: str, dtype: torch.dtype, max_shard_size: str = "5GB", settings: Mapping[str, Any] = {}
) -> None:
    """Write a random model of ``CONFIGS`` with a tokenizer, a chat template and a generation config.

    ``settings`` are keys of its config with other values.

    No weight is left as it is initialised: biases would be zero and norms one, and hide what a cut does to them.
    """
    config = (MORE_CONFIGS | CONFIGS)[name]()
    for key, value in settings.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        randomise(model, generator)
        # Some routers have a buffer that is stored.
        for key, buffer in model.named_buffers():
            if key in model.state_dict():
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a token for each of ``CHARACTERS``."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template="{{ messages[-1]['content'] }}",
    )


def demo_with_template(folder: Path, template: str) -> Path:
    """Return a copy of the demo model with another chat template."""
    shutil.copytree(Checkpoint.open("demo").folder, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model in the dtype that it was saved in.

    Its weights are copied: as loaded they are views of the mapped file, at any address, and the sums of a BLAS product,
    and so its last bits, depend on how its operands are aligned.
    """
    # Grouped products of MoE experts are for rows of 16 bytes, and not in float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager", **kwargs).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "glm4_moe",
    "ernie4_5_moe",
    "deepseek_v3",
    "deepseek_v2",
    "glm4_moe_lite",
    "dots1",
    "solar_open",
    "exaone_moe",
    "mellum",
    "flex_olmo",
    "minimax_m2",
    "phimoe",
    "gpt_oss",
    "llama4",
    "qwen3_next",
    "qwen3_5_moe_text",
)
HYBRIDS = ("qwen3_5_text", "qwen3_next", "qwen3_5_moe_text", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h")
"""Families whose layers mix tokens by a state, in place of attention or beside it."""
OUTPUTS = {
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "lfm2": ("self_attn.out_proj", "feed_forward.w2"),
    "granitemoehybrid": ("self_attn.o_proj", "shared_mlp.output_linear"),
    "falcon_h1": ("self_attn.o_proj", "feed_forward.down_proj"),
    "nemotron_h": ("mixer.o_proj", "mixer.down_proj"),
    "gemma4_text": ("none that is looked at", "mlp.down_proj"),
    "gemma4": ("none that is looked at", "mlp.down_proj"),
    "llama4_text": ("self_attn.o_proj", "feed_forward.down_proj"),
    "llama4": ("self_attn.o_proj", "feed_forward.down_proj"),
}


def mixture_in(block: Any) -> Any:
    """Return the module of a decoder layer that holds its router and MoE experts; None where it has none."""
    modules = (getattr(block, name, None) for name in ("mlp", "feed_forward"))
    return next((module for module in modules if hasattr(module, "experts")), None)


def output_modules(model: Any, layer: int = 0) -> dict[str, str]:
    """Return the modules whose inputs are a layer's sites, written out family by family; with experts attention's."""
    family = model.config.model_type.removeprefix("seap_")
    block = decoder_of(model).layers[layer]
    named = dict(zip(("attn", "mlp"), OUTPUTS.get(family, ("self_attn.o_proj", "mlp.down_proj")), strict=True))
    if mixture_in(block) is not None:
        del named["mlp"]
    # Layers of hybrids lack some.
    present = dict(block.named_modules())
    return {site: module for site, module in named.items() if module in present}


def random_ids(n: int = 3, length: int = 17, seed: int = 0) -> torch.Tensor:
    """Return random token ids (n, length)."""
    return torch.randint(3, SIZES["vocab_size"], (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Run a model without gradients."""
    return model(ids_BT).logits


# --- corpora ---------------------------------------------------------------------------------------------------------


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Return random sequences of token ids of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]


RAGGED = prompts([7, 1, 30, 3, 12, 12, 2, 25, 5, 18, 1, 9])
"""Sequences of very different lengths."""
SHARDS = {"sort/00000": RAGGED, "sort/00001": RAGGED[:1], "logic/00000": prompts([4, 4, 4], seed=1)}
"""Sequences by the names of shards."""


def task(path: Path | str, **fields: Any) -> Task:
    """Return a task named ``mine`` on the rows at ``path``."""
    return Task(**{"name": "mine", "path": str(path), "answer": "{{ text }}", **fields})


# --- models read layer by layer --------------------------------------------------------------------------------------


def layerwise(folder: Path, dtype: torch.dtype = torch.float32, memory_budget: int = 1 << 30) -> LayerwiseModel:
    """Return the model in a folder, to be run layer by layer on the CPU."""
    return LayerwiseModel(Checkpoint.open(str(folder)), dtype, torch.device("cpu"), memory_budget)


def recorded_by(model: LayerwiseModel, shards: Mapping[str, Sequences] = SHARDS, **settings: Any) -> dict[str, dict]:
    """Run all shards through a model; return the moments of each, and make sure that no site comes twice."""
    recorded: dict[str, dict] = {shard: {} for shard in shards}
    for shard, moments in model.record(shards, **{"batch_tokens": 40, **settings}):
        assert not recorded[shard].keys() & moments.keys()
        recorded[shard] |= moments
    return recorded


# --- plans and statistics --------------------------------------------------------------------------------------------


def random_kept(dense_shape: Shape, shape: Shape, rng: random.Random, n_experts: int = 0) -> Kept:
    """Choose units of a layer at random, as many as ``shape`` has."""
    groups = tuple(sorted(rng.sample(range(dense_shape.groups), shape.groups)))
    per_group = dense_shape.heads_per_group
    heads: list[int] = []
    for group in groups:
        heads += [group * per_group + head for head in sorted(rng.sample(range(per_group), shape.heads_per_group))]
    n_mlps = max(n_experts, 1)
    channels = [sorted(rng.sample(range(dense_shape.channels), shape.channels)) for _ in range(n_mlps)]
    return Kept(groups, tuple(heads), tuple(map(tuple, channels)))


def random_plan(architecture: Architecture, seed: int, compensation: str = "none") -> Plan:
    """Return a plan with other widths in every layer.

    Layer 1 stays dense, layer 0 loses attention alone, the last one channels alone.
    """
    rng = random.Random(seed)
    layers = architecture.layers
    shapes: list[Shape] = []
    while len(shapes) < architecture.n_layers:
        layer = len(shapes)
        whole = layers[layer].shape
        if architecture.family.mixer:
            # Every layer loses half of the parts that it has.
            shapes.append(Shape(whole.groups, -(-whole.heads_per_group // 2), whole.channels // 2))
            continue
        shape = Shape(
            rng.randint(1, whole.groups), rng.randint(1, whole.heads_per_group), rng.randint(1, whole.channels - 1)
        )
        if architecture.why_whole_attention:
            shape = whole if layer == 1 else replace(whole, channels=shape.channels)
        elif layer == 0:
            shape = Shape(rng.randint(1, max(1, whole.groups - 1)), shape.heads_per_group, whole.channels)
        elif layer == 1:
            shape = whole
        elif layer == architecture.n_layers - 1:
            shape = Shape(whole.groups, whole.heads_per_group, shape.channels)
        # No two layers are alike, unless layers begin with other widths.
        if layer == 1 or shape not in shapes:
            shapes.append(shape)
    kept = tuple(
        random_kept(layer.shape, shape, rng, layer.n_experts) for layer, shape in zip(layers, shapes, strict=True)
    )
    return Plan("expert", 0.5, COMPENSATIONS[compensation], kept, {})


def uniform_plan(architecture: Architecture, shape: Shape, compensation: str = "none", seed: int = 0) -> Plan:
    """Return a plan with the same widths, but other units, in every layer.

    A mixture's layers without experts keep as large a share of their channels as those with them.
    """
    rng = random.Random(seed)
    kept: list[Kept] = []
    for layer in architecture.layers:
        channels = shape.channels * layer.shape.channels // architecture.dense.channels
        groups, heads = (shape.groups, shape.heads_per_group) if layer.has_attention else (0, 0)
        kept.append(random_kept(layer.shape, Shape(groups, heads, channels), rng, layer.n_experts))
    return Plan("expert", 0.5, COMPENSATIONS[compensation], tuple(kept), {})


def random_statistics(architecture: Architecture, seed: int, n: int = 20) -> Statistics:
    """Return moments of random activations whose means are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    for layer, given in enumerate(architecture.layers):
        widths = {"attn": given.shape.heads * architecture.head_dim, "mlp": given.shape.channels, "block": 1}
        widths["experts"] = 2 * given.n_experts
        for kind in architecture.recorded:
            for site in architecture.sites(layer, kind):
                scale_D = torch.randn(widths[kind], generator=generator, dtype=torch.float64)
                shift_D = torch.randn(widths[kind], generator=generator, dtype=torch.float64)
                x_ND = torch.randn(n, widths[kind], generator=generator, dtype=torch.float64) * scale_D + shift_D
                statistics[layer, site] = Moments(n, x_ND.mean(0), (x_ND - x_ND.mean(0)).square().sum(0))
    return statistics


class RandomCovariances(dict):
    """Covariances of random activations by (layer, site), as ``PooledCovariance`` gives them."""

    def ridge_of(self, _key: tuple[int, str]) -> float:
        return 0.01


def random_covariances(architecture: Architecture, seed: int, n: int = 60) -> RandomCovariances:
    """Return covariances of random activations whose means are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    covariances = RandomCovariances()
    for layer, given in enumerate(architecture.layers):
        for site in architecture.modules(layer):
            is_attention = site == "attn"
            width = given.shape.heads * architecture.head_dim if is_attention else given.shape.channels
            shift_D = torch.randn(width, generator=generator, dtype=torch.float64)
            mix_DD = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
            x_ND = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix_DD + shift_D
            covariances[layer, site] = Covariance.of(x_ND)
    return covariances


# --- cut checkpoints -------------------------------------------------------------------------------------------------


def write_compacted(export: CheckpointExport, folder: Path, max_bytes: int = 10**9) -> Path:
    """Write a checkpoint by the steps that ``prune`` has Ray tasks do, one after the other."""
    files = export.files(max_bytes)
    hashes = {name: write_tensors(export, outputs, folder / name) for name, outputs in files.items()}
    finish(export, folder, files, {"files": hashes})
    return folder
