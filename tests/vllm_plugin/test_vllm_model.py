"""The vLLM plugin against Hugging Face: same checkpoint, same greedy tokens, in float32; and what it must refuse."""

import gc
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteSWAConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HyperCLOVAXConfig,
    Jais2Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    VaultGemmaConfig,
)

import seap_ray.models.hf  # noqa: F401
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.errors import ConfigError
from seap_ray.models import template_limits
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import attention_of
from seap_ray.models.template_limits import TemplateLimitError
from seap_ray.vllm_plugin.plugin import ARCHITECTURES, END_WITH_PARENT, check_registered
from tests.support.builders import (
    CONFIGS,
    DEEPSEEK_EXPERTS,
    GPT_OSS_ROPE,
    LLAMA_3_ROPE,
    MINISTRAL_3_ROPE,
    MIXTURES,
    MULTIPLIERS,
    random_kept,
    random_plan,
    random_statistics,
    save_dense,
    write_compacted,
)
from tests.support.elsewhere import WITHOUT_SEAP_RAY

# What vLLM's and torch's own code warns of while vLLM is imported and runs.
pytestmark = pytest.mark.filterwarnings(
    r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning:vllm\.", r"ignore::DeprecationWarning:torch\."
)

SERVABLE = {
    "vocab_size": 3 + 43,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "head_dim": 32,  # vLLM's CPU attention knows 32 and larger ones
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT_SERVABLE = {key: value for key, value in SERVABLE.items() if key not in ("intermediate_size", "head_dim")}
OPT_SERVABLE |= {"ffn_dim": 160}
MODELS = {
    "llama": lambda: LlamaConfig(**SERVABLE, num_attention_heads=12, num_key_value_heads=4),
    "llama_tied": lambda: LlamaConfig(
        **SERVABLE,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_parameters=LLAMA_3_ROPE,
    ),
    "llama_biased": lambda: LlamaConfig(
        **SERVABLE, num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    ),
    "qwen2": lambda: Qwen2Config(**SERVABLE, num_attention_heads=8, num_key_value_heads=4),
    "mistral": lambda: MistralConfig(**SERVABLE, num_attention_heads=8, num_key_value_heads=4, sliding_window=None),
    "mistral_windows": lambda: MistralConfig(
        **SERVABLE, num_attention_heads=8, num_key_value_heads=4, sliding_window=32
    ),
    "qwen3": lambda: Qwen3Config(**SERVABLE, num_attention_heads=8, num_key_value_heads=4),
    "gemma2": lambda: Gemma2Config(
        **SERVABLE, num_attention_heads=12, num_key_value_heads=4, sliding_window=32, query_pre_attn_scalar=32
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SERVABLE, num_attention_heads=12, num_key_value_heads=4, sliding_window=32, query_pre_attn_scalar=32
    ),
    "phi3": lambda: Phi3Config(**SERVABLE, num_attention_heads=8, num_key_value_heads=4),
    "mixtral": lambda: MixtralConfig(
        **SERVABLE, num_attention_heads=8, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SERVABLE,
        num_attention_heads=8,
        num_key_value_heads=4,
        moe_intermediate_size=160,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "opt": lambda: OPTConfig(**OPT_SERVABLE, num_attention_heads=3),
}
GROUPED = {**SERVABLE, "num_attention_heads": 8, "num_key_value_heads": 4}
# Families that have no head size of their own divide the hidden size by the number of heads.
DIVIDED = {key: value for key, value in SERVABLE.items() if key != "head_dim"}
DIVIDED |= {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = {
    **GROUPED,
    "sliding_window": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    # vLLM's rotary embedding ends where the factor ends: at 512.
    "rope_parameters": GPT_OSS_ROPE | {"original_max_position_embeddings": 128},
}
MORE_MODELS = {
    "gemma": lambda: GemmaConfig(**GROUPED),
    "smollm3": lambda: SmolLM3Config(**DIVIDED),
    "granite": lambda: GraniteConfig(**DIVIDED, **MULTIPLIERS),
    "granite_swa": lambda: GraniteSWAConfig(
        **DIVIDED, **MULTIPLIERS, sliding_window=32, layer_rope_theta=[10000.0, 0, 500.0, 10000.0]
    ),
    "olmo": lambda: OlmoConfig(**DIVIDED),
    "olmo2": lambda: Olmo2Config(**DIVIDED),
    "olmo3": lambda: Olmo3Config(**DIVIDED, sliding_window=32),
    "glm": lambda: GlmConfig(**GROUPED),
    "glm4": lambda: Glm4Config(**GROUPED),
    "seed_oss": lambda: SeedOssConfig(**GROUPED),
    "exaone4": lambda: Exaone4Config(**DIVIDED, sliding_window=32),
    "arcee": lambda: ArceeConfig(**DIVIDED),
    "nemotron": lambda: NemotronConfig(**GROUPED),
    "apertus": lambda: ApertusConfig(**DIVIDED, rope_parameters=dict(LLAMA_3_ROPE)),
    "starcoder2": lambda: Starcoder2Config(**DIVIDED),
    "stablelm": lambda: StableLmConfig(**DIVIDED),
    "phi": lambda: PhiConfig(**DIVIDED),
    "cohere": lambda: CohereConfig(**DIVIDED, logit_scale=0.5),
    "cohere2": lambda: Cohere2Config(**DIVIDED, sliding_window=32, logit_scale=0.5),
    "ernie4_5": lambda: Ernie4_5Config(**GROUPED),
    "hunyuan_v1_dense": lambda: HunYuanDenseV1Config(**GROUPED),
    "helium": lambda: HeliumConfig(**DIVIDED, head_dim=32),
    "ministral": lambda: MinistralConfig(
        **GROUPED, sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "ministral3": lambda: Ministral3Config(**GROUPED, rope_parameters=dict(MINISTRAL_3_ROPE)),
    "cwm": lambda: CwmConfig(**GROUPED, sliding_window=32, rope_parameters=LLAMA_3_ROPE),
    "vaultgemma": lambda: VaultGemmaConfig(**GROUPED, sliding_window=32, query_pre_attn_scalar=32),
    "jais2": lambda: Jais2Config(**DIVIDED),
    "hyperclovax": lambda: HyperCLOVAXConfig(**DIVIDED, **MULTIPLIERS),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=64,
        **FEW_EXPERTS,
        mlp_only_layers=[2],
    ),
    "olmoe": lambda: OlmoeConfig(**SERVABLE, num_attention_heads=3, num_key_value_heads=3, **FEW_EXPERTS),
    "glm4_moe": lambda: Glm4MoeConfig(**GROUPED, **DEEPSEEK_EXPERTS, use_qk_norm=True),
    "gpt_oss": lambda: GptOssConfig(**GPT_OSS),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **GROUPED, moe_intermediate_size=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=2
    ),
}
"""Families that are built of what those above are, which SEAP_RAY_ALL_FAMILIES=1 has vLLM serve: some minutes."""
NEOX_SERVABLE = {key: value for key, value in SERVABLE.items() if key != "head_dim"}
MODELS_OF_OTHERS = {"gpt_neox": lambda: GPTNeoXConfig(**NEOX_SERVABLE, num_attention_heads=3)}
"""A model that vLLM has no class of its own for: its Transformers backend serves it, with the plugin as well."""


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """``expert(name)``: a compacted random model, other widths in every layer and an output bias where it was cut."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            dense, made[name] = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}_expert")
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(CONFIGS, name, (MODELS | MORE_MODELS | MODELS_OF_OTHERS)[name])
                save_dense(dense, name, torch.float32)
            if name == "ernie4_5_moe":
                without_router_bias(dense / "model.safetensors")
            made[name] = compact(dense, made[name])
        return made[name]

    return folder


def without_router_bias(path: Path) -> None:
    """Set the router's bias to zero, which vLLM leaves out on a CPU where experts are chosen by a softmax."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()
    save_file(tensors, path, {"format": "pt"})


def compact(dense: Path, folder: Path, shapes: list[Shape] | None = None) -> Path:
    checkpoint = Checkpoint.open(str(dense))
    architecture = checkpoint.architecture
    plan = random_plan(architecture, seed=3, compensation="mean")
    if not shapes and architecture.mixes_windows and not architecture.why_whole_attention:
        # Key-value heads stay, and queries go from each of them. On a CPU vLLM wants multiples of 32 in gpt-oss.
        groups, per_group = architecture.dense.groups, architecture.dense.heads_per_group
        shapes = [Shape(groups, 1 + i % per_group, 32 + 32 * i) for i in range(architecture.n_layers)]
    if shapes:
        rng = random.Random(3)
        pairs = zip(architecture.layers, shapes, strict=True)
        kept = tuple(random_kept(given.shape, shape, rng, given.n_experts) for given, shape in pairs)
        plan = replace(plan, kept=kept)
    statistics = random_statistics(checkpoint.architecture, seed=4)
    return write_compacted(CheckpointExport(checkpoint, plan, statistics), folder)


class Engine:
    """A vLLM engine in this process; only one may live at a time."""

    def __init__(self, folder: Path, **kwargs: object):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.model_executor.models import registry

        if not torch.cuda.is_available():  # lest CUDA begin here, another process looks at each class of models
            registry._run_in_subprocess = lambda look: look()
        gc.freeze()  # vLLM collects garbage several times an engine, seconds each among all that it imports
        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}
        if torch.cuda.is_available():  # which several processes of tests may share
            settings["gpu_memory_utilization"] = 0.2
        self.llm = LLM(
            str(folder), **{**settings, "kv_cache_memory_bytes": 1 << 26, "disable_log_stats": True, **kwargs}
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        del self.llm

    def greedy(self, prompts: list[list[int]], n: int, **kwargs: object) -> list[list[int]]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True),
            use_tqdm=False,
            **kwargs,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def by_transformers(model, prompts: list[list[int]], n: int) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]


def load_float32(folder: Path):
    # Grouped products of experts are for widths of 16 bytes, and the usual attention has no soft cap.
    config = json.loads((folder / "config.json").read_text())
    settings = {"dtype": torch.float32, "experts_implementation": "eager", "attn_implementation": attention_of(config)}
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, SERVABLE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", [*MODELS, *MORE_MODELS, *MODELS_OF_OTHERS])
@pytest.mark.vllm
@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(expert, name):
    if name in MORE_MODELS and "SEAP_RAY_ALL_FAMILIES" not in os.environ:
        pytest.skip("SEAP_RAY_ALL_FAMILIES=1 has vLLM serve every family: some minutes")
    folder = expert(name)
    layers = AutoModelForCausalLM.from_pretrained(folder).config.per_layer_config
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "ffn_dim")
    assert len({tuple(getattr(layer, key, None) for key in keys) for layer in layers}) == 4
    if name not in (
        "opt",
        "llama_biased",
        "gpt_neox",
        "starcoder2",
        "phi",
        "jais2",
        "gpt_oss",
    ):  # which have biases everywhere
        assert any(layer.o_proj_bias for layer in layers)
    prompts = random_prompts([1, 9, 40])
    with Engine(folder) as engine:
        assert engine.greedy(prompts, 24) == by_transformers(load_float32(folder), prompts, 24)


@pytest.mark.vllm
def test_a_gpt_oss_that_vllm_would_compute_otherwise_is_refused():
    from seap_ray.vllm_plugin.model import SeapGptOssForCausalLM

    config = GptOssConfig(swiglu_limit=5.0)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    with pytest.raises(ValueError, match="vLLM computes every gpt-oss with swiglu_limit 7.0, and this one has 5.0"):
        SeapGptOssForCausalLM(vllm_config=vllm_config)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "seap"])
@pytest.mark.vllm
@pytest.mark.slow
def test_greedy_tokens_of_a_mixture_with_fewer_experts_are_those_of_transformers(tmp_path, monkeypatch, stock):
    if not stock and "SEAP_RAY_ALL_FAMILIES" not in os.environ:
        pytest.skip("SEAP_RAY_ALL_FAMILIES=1 has vLLM serve our own format, too: our class is the family's there")
    monkeypatch.setitem(CONFIGS, "qwen3_moe", MODELS["qwen3_moe"])
    save_dense(tmp_path / "dense", "qwen3_moe", torch.float32)
    base = Checkpoint.open(str(tmp_path / "dense"))
    kept = tuple(Kept.whole(base.architecture, layer).with_experts((0, 2, 3, 5)) for layer in range(4))
    plan = Plan("expert", 0.3, COMPENSATIONS["none"], kept, {})
    folder = write_compacted(CheckpointExport(base, plan, stock=stock), tmp_path / "expert")
    prompts = random_prompts([1, 9, 40])
    with Engine(folder) as engine:
        assert engine.greedy(prompts, 24) == by_transformers(load_float32(folder), prompts, 24)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_process_that_has_served_a_model_still_loads_it_with_transformers(expert):
    folder = expert("gpt_neox")  # which vLLM has of transformers, and compiles by changing the class
    with Engine(folder):
        pass
    AutoModel.from_pretrained(folder)


# --- vLLM without the plugin, on a machine without seap_ray -----------------------------------------------------------

WITHOUT = (
    WITHOUT_SEAP_RAY
    + """
import os
from vllm import LLM, SamplingParams

folders, prompts, out = json.loads(sys.argv[1])
sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}
settings |= {"kv_cache_memory_bytes": 1 << 26, "disable_log_stats": True, "trust_remote_code": True}
results = {}
for name, folder in folders.items():
    try:
        llm = LLM(folder, **settings)
    except ValueError as error:
        results[name] = str(error)
        continue
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    results[name] = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
assert not [name for name in sys.modules if name.split(".")[0] == "seap_ray"]
open(out, "w").write(json.dumps(results))
"""
)
ONE_OF_A_KIND = ("llama", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "mixtral", "qwen3_moe")
"""Models that vLLM's Transformers backend takes apart differently; SEAP_RAY_ALL_FAMILIES=1 adds the others."""


@pytest.fixture(scope="module")
def without_plugin(expert, tmp_path_factory):
    """Prompts, and by model what a process that knows no seap_ray says with plain vLLM: greedy tokens, or an error."""
    names = [*MODELS, *MORE_MODELS, *MODELS_OF_OTHERS] if "SEAP_RAY_ALL_FAMILIES" in os.environ else ONE_OF_A_KIND
    root = tmp_path_factory.mktemp("without")
    prompts = random_prompts([1, 9, 40])
    settings = [{name: str(expert(name)) for name in names}, prompts, str(root / "out.json")]
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT, json.dumps(settings)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return prompts, json.loads((root / "out.json").read_text())


@pytest.mark.parametrize("name", [*MODELS, *MORE_MODELS, *MODELS_OF_OTHERS])
@pytest.mark.vllm
@pytest.mark.slow
def test_plain_vllm_without_the_plugin_gives_the_same_greedy_tokens(expert, without_plugin, name):
    prompts, results = without_plugin
    if name not in results:
        pytest.skip("SEAP_RAY_ALL_FAMILIES=1 has plain vLLM serve every family")
    if name in MIXTURES:
        assert "builds the MoE experts of every layer as wide as" in results[name]
        assert results[name].endswith("install seap_ray beside vLLM")
    else:
        assert results[name] == by_transformers(load_float32(expert(name)), prompts, 24)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@pytest.mark.vllm
@pytest.mark.slow
def test_greedy_tokens_of_a_model_that_was_pruned_again_are_those_of_transformers(expert, tmp_path, name):
    layers = [layer.shape for layer in Checkpoint.open(str(expert(name))).architecture.layers]
    # Layer 1, whole so far, is cut, and layer 2 stays as it is. Grouped products of experts are for rows of 16 bytes.
    shapes = [Shape(1, of.heads_per_group, max(of.channels // 8 * 4, 4)) for of in layers]
    shapes[2] = layers[2]
    folder = compact(expert(name), tmp_path / "again", shapes)
    check_folder(folder)
    prompts = random_prompts([1, 9, 40])
    with Engine(folder) as engine:
        assert engine.greedy(prompts, 24) == by_transformers(load_float32(folder), prompts, 24)


@pytest.mark.vllm
@pytest.mark.slow
def test_chunked_prefill_and_a_cached_prefix_change_no_token(expert):
    folder = expert("llama")
    prefix = random_prompts([130])[0]
    prompts = [prefix + more for more in random_prompts([5, 60], seed=1)]
    expected = by_transformers(load_float32(folder), prompts, 16)
    with Engine(folder, max_num_batched_tokens=64, max_num_seqs=4, disable_log_stats=False) as engine:
        assert engine.greedy(prompts, 16) == expected
        assert engine.greedy(prompts, 16) == expected
        hits = [m.value for m in engine.llm.get_metrics() if m.name == "vllm:prefix_cache_hits"]
        assert sum(hits) >= 128, "the second time the prefix comes from the cache"


@pytest.mark.vllm
@pytest.mark.slow
def test_a_demo_expert_answers_as_in_transformers(tmp_path):
    folder = compact(Checkpoint.open("demo").folder, tmp_path / "expert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer(["12 + 7 =", "sort: 3 1 2 =", "The capital of"])["input_ids"]
    with Engine(folder) as engine:
        assert engine.greedy(prompts, 32) == by_transformers(load_float32(folder), prompts, 32)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's LoRA kernels for GPUs take 16-bit adapters alone")
def test_lora_adapters_fit_the_cut_layers(expert, tmp_path):
    from vllm.lora.request import LoRARequest

    folder = expert("llama")
    model = load_float32(folder)
    prompts = random_prompts([7, 30], seed=2)
    base = by_transformers(model, prompts, 16)
    adapter = merge_random_adapter(model, tmp_path / "adapter")
    with Engine(folder, enable_lora=True, max_lora_rank=8) as engine:
        assert engine.greedy(prompts, 16) == base
        request = LoRARequest("adapter", 1, str(adapter))
        adapted = engine.greedy(prompts, 16, lora_request=request)
    assert adapted == by_transformers(model, prompts, 16)
    assert adapted != base

    # The model with the adapter merged, saved as a whole, serves as the expert does.
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    with Engine(tmp_path / "merged") as engine:
        assert engine.greedy(prompts, 16) == adapted


WHOLE_IN_HALVES = {
    "opt": lambda: OPTConfig(**OPT_SERVABLE | {"hidden_size": 128}, num_attention_heads=4),
    "olmoe": lambda: OlmoeConfig(
        **SERVABLE | {"hidden_size": 128}, num_attention_heads=4, num_key_value_heads=4, **FEW_EXPERTS
    ),
    "gpt_oss": lambda: GptOssConfig(**GPT_OSS | {"intermediate_size": 320}),
}
"""Models that two ranks can share, in place of those with three heads or with experts too narrow for vLLM on a CPU."""


def in_halves(architecture: Architecture) -> list[Shape]:
    """Return widths of every layer that two ranks can share; the one key-value head of the last is repeated."""
    # On a CPU a rank's experts of gpt-oss are a multiple of 32 wide.
    step = 64 if architecture.family_name == "gpt_oss" else 32
    whole = architecture.dense
    given = [layer.shape.channels for layer in architecture.layers]
    channels = [min(width, most) for width, most in zip((5 * step, 3 * step, 2 * step, step), given, strict=True)]
    if architecture.why_whole_attention:
        return [replace(whole, channels=width) for width in channels]
    few = min(2, whole.heads_per_group)
    per_group = [whole.heads_per_group, few, 1, few]
    # One head alone cannot be shared.
    groups = [whole.groups] * 4 if architecture.mixes_windows else [whole.groups, 2, 2, 1 if few > 1 else whole.groups]
    return [Shape(*widths) for widths in zip(groups, per_group, channels, strict=True)]


# transformers' attention of StableLM is written for all heads, and vLLM serves it by that.
@pytest.mark.parametrize("name", [name for name in [*MODELS, *MORE_MODELS] if name != "stablelm"])
@pytest.mark.vllm
@pytest.mark.slow
def test_two_ranks_share_every_layer(tmp_path, monkeypatch, name):
    if name != "llama" and "SEAP_RAY_ALL_FAMILIES" not in os.environ:
        pytest.skip("SEAP_RAY_ALL_FAMILIES=1 has two ranks share the layers of every family: some minutes")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    monkeypatch.setitem(CONFIGS, name, WHOLE_IN_HALVES.get(name) or (MODELS | MORE_MODELS)[name])
    save_dense(tmp_path / "dense", name, torch.float32)
    if name == "ernie4_5_moe":
        without_router_bias(tmp_path / "dense" / "model.safetensors")
    shapes = in_halves(Checkpoint.open(str(tmp_path / "dense")).architecture)
    folder = compact(tmp_path / "dense", tmp_path / "expert", shapes)
    prompts = random_prompts([1, 30])
    with Engine(folder, tensor_parallel_size=2) as engine:
        assert engine.greedy(prompts, 12) == by_transformers(load_float32(folder), prompts, 12)


@torch.no_grad()
def merge_random_adapter(model, folder: Path, rank: int = 4) -> Path:
    """Write a LoRA adapter for every projection, as peft would, and add it to the weights of ``model``."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            rows, columns = module.weight.shape
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, rank, generator=generator)
            module.weight += up @ down
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": projections, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


# --- what is refused -------------------------------------------------------------------------------------------------

LAYER = "model.layers.2"


def one_row_more(tensors):
    name = f"{LAYER}.mlp.gate_proj.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def one_row_less(tensors):
    name = f"{LAYER}.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()


def an_undeclared_bias(tensors):
    tensors["model.layers.1.mlp.down_proj.bias"] = torch.ones(SERVABLE["hidden_size"])  # layer 1 is whole


def a_missing_tensor(tensors):
    del tensors[f"{LAYER}.self_attn.k_proj.weight"]


def a_missing_bias(tensors):
    del tensors[f"{LAYER}.self_attn.o_proj.bias"]


WRONG = {
    one_row_more: r"layers\.2\.mlp\.gate_proj\.weight is \[\d+, 96\] in the checkpoint, and \[\d+, 96\] by",
    one_row_less: r"layers\.2\.self_attn\.q_proj\.weight is \[\d+, 96\] in the checkpoint",
    an_undeclared_bias: r"layers\.1\.mlp\.down_proj\.bias, which config\.json does not declare",
    a_missing_tensor: r"lacks model\.layers\.2\.self_attn\.k_proj\.weight",
    a_missing_bias: r"lacks model\.layers\.2\.self_attn\.o_proj\.bias",
}


@pytest.fixture
def wrong(expert, tmp_path):
    def folder(change) -> Path:
        made = tmp_path / "wrong"
        shutil.copytree(expert("llama"), made)
        file = made / "model-00001-of-00001.safetensors"  # of what is cut
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return made

    return folder


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_refuses_a_checkpoint_that_is_not_what_it_declares(wrong, change):
    with pytest.raises(ValueError, match=WRONG[change]):
        Engine(wrong(change))


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_its_headers_alone_tell(wrong, change):
    with pytest.raises(ConfigError, match=WRONG[change]):
        check_folder(wrong(change))


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_checkpoint_passes(expert, name):
    check_folder(expert(name))


def test_what_does_not_divide_over_the_ranks_is_named():
    from seap_ray.vllm_plugin.model import _check_divisible

    layer = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, intermediate_size=64)
    _check_divisible(layer, 1, "model.layers.5")
    with pytest.raises(ValueError, match=r"model\.layers\.5 has 6 heads, 3 .* prune with pruning\.tensor_parallel=2"):
        _check_divisible(layer, 2, "model.layers.5")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_layer_of_a_mixture_of_experts_is_given_a_bias_on_its_attention_alone(name):
    from seap_ray.models.hf.configuration_seap import SeapMixtralConfig, SeapQwen3MoeConfig
    from seap_ray.vllm_plugin.model import _add_biases

    config = {"mixtral": SeapMixtralConfig, "qwen3_moe": SeapQwen3MoeConfig}[name](head_dim=32)
    layer = torch.nn.Module()
    _add_biases(layer, config, None, "model.layers.0")
    assert not list(layer.named_modules())[1:]


# --- the entry point -------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_the_plugin_is_installed_and_its_architectures_are_known():
    from vllm import ModelRegistry

    check_registered()
    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.vllm
def test_an_engine_renders_chat_templates_within_the_limits(monkeypatch):
    from transformers.utils.chat_template_utils import render_jinja_template

    check_registered()
    monkeypatch.setattr(template_limits, "MAX_CHARACTERS", 100)
    chat = [{"role": "user", "content": "abc"}]
    with pytest.raises(TemplateLimitError, match="makes more than 100 characters"):
        render_jinja_template([chat], chat_template="{{ messages[0]['content'] * 200 }}")


def test_a_missing_installation_is_named(monkeypatch):
    monkeypatch.setattr("seap_ray.vllm_plugin.plugin.entry_points", lambda group: [])
    with pytest.raises(ConfigError, match="not installed in this environment"):
        check_registered()


def test_an_allow_list_that_leaves_the_plugin_out_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other, another")
    with pytest.raises(ConfigError, match="VLLM_PLUGINS=other, another keeps vLLM from loading seap_ray"):
        check_registered()


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_ends_with_the_server_that_started_it_however_that_went(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from seap_ray.vllm_plugin.plugin import register\n"
        "def engine():\n"
        "    register()\n"
        "    print('engine', os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('spawn').Process(target=engine).start()\n"
        "    time.sleep(600)\n"
    )
    environment = {**os.environ, END_WITH_PARENT: "1"}
    server = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = next(line for line in server.stdout if line.startswith("engine "))
        engine = psutil.Process(int(line.split()[1]))
        server.kill()
        engine.wait(30)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
