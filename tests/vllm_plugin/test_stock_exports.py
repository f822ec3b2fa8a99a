"""Stock exports of families that the plugin refuses: vLLM's own classes give transformers' greedy tokens."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dots1Config,
    ExaoneMoeConfig,
    FalconH1Config,
    FlexOlmoConfig,
    Gemma4TextConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Llama4TextConfig,
    MellumConfig,
    Mistral3Config,
    NemotronHConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SolarOpenConfig,
)

from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, check_stock
from tests.support.builders import (
    CONFIGS,
    DEEPSEEK_EXPERTS,
    GATED_DELTA,
    MULTIPLIERS,
    randomise,
    save_dense,
    uniform_plan,
    write_compacted,
)
from tests.vllm_plugin.test_vllm_model import (
    DIVIDED,
    FEW_EXPERTS,
    GROUPED,
    SERVABLE,
    Engine,
    by_transformers,
    load_float32,
    random_prompts,
)

# What vLLM's and torch's own code warns of while vLLM is imported and runs.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning:vllm\.", r"ignore::DeprecationWarning:torch\."
    ),
]

MOE = {"moe_intermediate_size": 64, **FEW_EXPERTS}
LAYERS_BY_TURNS = ["sliding_attention", "full_attention"] * 2
DELTA = GATED_DELTA | {"head_dim": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
"""vLLM's kernel for CPUs knows these sizes."""
STATES = {"mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 256}
MODELS = {
    "llama4_text": lambda: Llama4TextConfig(
        **GROUPED,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=32,
    ),
    "gemma4_text": lambda: Gemma4TextConfig(
        **GROUPED,
        global_head_dim=64,
        sliding_window=32,
        layer_types=LAYERS_BY_TURNS,
        vocab_size_per_layer_input=SERVABLE["vocab_size"],
        hidden_size_per_layer_input=0,
    ),
    "dots1": lambda: Dots1Config(**GROUPED, **DEEPSEEK_EXPERTS, sliding_window=None),
    "solar_open": lambda: SolarOpenConfig(**GROUPED, **DEEPSEEK_EXPERTS),
    "exaone_moe": lambda: ExaoneMoeConfig(**GROUPED, **MOE, sliding_window=32, num_shared_experts=2),
    "mellum": lambda: MellumConfig(
        **GROUPED, **MOE, sliding_window=32, layer_types=LAYERS_BY_TURNS, mlp_layer_types=["sparse"] * 4
    ),
    "flex_olmo": lambda: FlexOlmoConfig(
        **SERVABLE | {"hidden_size": 128}, num_attention_heads=4, num_key_value_heads=4, **FEW_EXPERTS
    ),
    "phimoe": lambda: PhimoeConfig(
        **DIVIDED, num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **DIVIDED,
        **STATES,
        **MULTIPLIERS,
        mamba_n_heads=8,
        mamba_d_head=64,
        num_local_experts=0,
        shared_intermediate_size=160,
        layer_types=["mamba", "attention"] * 2,
        position_embedding_type="rope",
    ),
    "falcon_h1": lambda: FalconH1Config(
        **GROUPED | {"hidden_size": 128}, **STATES, mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **GROUPED | {"hidden_size": 128},
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=1,
        ssm_state_size=16,
        chunk_size=256,
    ),
    # vLLM reads keys of the published checkpoints that transformers does not need.
    "lfm2": lambda: Lfm2Config(
        **DIVIDED,
        layer_types=["conv", "full_attention"] * 2,
        conv_dim=256,
        conv_dim_out=256,
        block_dim=256,
        block_ff_dim=160,
        block_multiple_of=16,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
    ),
}
IN_BFLOAT16 = {
    "qwen3_next": lambda: Qwen3NextConfig(**GROUPED | DELTA, **MOE, shared_expert_intermediate_size=32),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**GROUPED | DELTA),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeTextConfig(**GROUPED | DELTA, **MOE, shared_expert_intermediate_size=32),
}
"""Models whose linear attention vLLM computes in bfloat16 alone, on a CPU."""
DIVIDES_BY_HEADS = ("granitemoehybrid", "lfm2")
"""Families whose head size vLLM takes to be hidden size / heads, so that all heads stay."""


def stock_export(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write a stock checkpoint of a random model without half of its query heads and some of its channels."""
    save_dense(folder / "dense", name, dtype)
    if name == "phimoe":
        without_output_bias(folder / "dense")
    base = Checkpoint.open(str(folder / "dense"))
    architecture = base.architecture
    shape = replace(architecture.dense, channels=32)
    if architecture.is_shared_width_bound:
        shape = replace(shape, channels=architecture.dense.channels)
    if architecture.family.has_head_dim and not architecture.why_whole_attention and name not in DIVIDES_BY_HEADS:
        shape = replace(shape, heads_per_group=1)
    assert shape != architecture.dense
    plan = uniform_plan(architecture, shape)
    check_stock(plan, architecture)
    return write_compacted(CheckpointExport(base, plan, stock=True), folder / "stock")


def without_output_bias(folder: Path) -> None:
    """Set the bias of the output layer to zero, which vLLM leaves out of Phi-3.5 MoE."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(autouse=True)
def _when_asked():
    if "SEAP_RAY_ALL_FAMILIES" not in os.environ:
        pytest.skip("SEAP_RAY_ALL_FAMILIES=1 has vLLM serve every family: some minutes")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_a_stock_export_are_those_of_transformers(tmp_path, monkeypatch, name):
    monkeypatch.setitem(CONFIGS, name, MODELS[name])
    folder = stock_export(name, tmp_path, torch.float32)
    prompts = random_prompts([3, 9, 40])
    # Before an engine whose Transformers backend changes transformers' own class (findings/).
    expected = by_transformers(load_float32(folder), prompts, 16)
    # With the prefix cache vLLM 0.32 splits prompts of Mamba 2 where its code for CPUs knows one part alone.
    with Engine(folder, enable_prefix_caching=False) as engine:
        assert engine.greedy(prompts, 16) == expected


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_tokens_of_a_stock_export_in_bfloat16_are_the_likeliest_by_transformers(tmp_path, monkeypatch, name):
    if name != "qwen3_next":
        pytest.importorskip("torchvision", reason="vLLM's class reads pictures, too")
    monkeypatch.setitem(CONFIGS, name, IN_BFLOAT16[name])
    folder = stock_export(name, tmp_path, torch.bfloat16)
    prompts = random_prompts([3, 9, 40])
    with Engine(folder, dtype="bfloat16", enable_prefix_caching=False) as engine:
        replies = engine.greedy(prompts, 16)
    model = load_float32(folder)
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        short_of_best_T = logits_TV.max(-1).values - logits_TV[range(len(reply)), reply]
        # Another token may be as likely in bfloat16; a wrong computation is short by several deviations.
        assert (short_of_best_T < 0.2 * logits_TV.std(-1)).all()


# --- with a picture --------------------------------------------------------------------------------------------------

TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TOKENS += ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|im_start|>", "<|im_end|>"]
WORDS = [f"w{i}" for i in range(50)]
TEXT = {**GROUPED, "hidden_size": 128, "vocab_size": len(TOKENS + WORDS)}
VISION = {"hidden_size": 64, "intermediate_size": 64, "patch_size": 4}
QWEN_VISION = {
    **VISION,
    "depth": 2,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
WITH_PICTURES = {
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config=QWEN_VISION,
        tie_word_embeddings=False,
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={**PIXTRAL, "image_size": 32},
        image_token_index=8,
        tie_word_embeddings=False,
        spatial_merge_size=2,
    ),
}


def make_processor(name: str):
    """Return what makes a prompt of a text and a picture."""
    import transformers as hf

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, additional_special_tokens=TOKENS[4:])
    if name == "mistral3":
        pixels = hf.PixtralImageProcessor(patch_size={"height": 4, "width": 4}, size={"longest_edge": 32})
        return hf.PixtralProcessor(image_processor=pixels, tokenizer=fast, patch_size=4, spatial_merge_size=2)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    images, videos = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen3VLVideoProcessor(**sizes)
    return hf.Qwen3VLProcessor(image_processor=images, tokenizer=fast, video_processor=videos)


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_greedy_tokens_of_a_stock_export_are_those_of_transformers_for_a_prompt_with_a_picture(tmp_path, name):
    pytest.importorskip("torchvision", reason="the processors need it")
    from vllm import SamplingParams

    dense = tmp_path / "dense"
    model = AutoModelForImageTextToText.from_config(WITH_PICTURES[name](), dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(dense)
    make_processor(name).save_pretrained(dense)
    base = Checkpoint.open(str(dense))
    plan = uniform_plan(base.architecture, replace(base.architecture.dense, heads_per_group=1, channels=64))
    folder = write_compacted(CheckpointExport(base, plan, stock=True), tmp_path / "stock")

    shown = "[IMG]" if name == "mistral3" else "<|vision_start|> <|image_pad|> <|vision_end|>"
    text = f"w3 w9 {shown} w7 w1 w44"
    image = Image.frombytes("RGB", (16, 24), torch.randint(0, 255, (16 * 24 * 3,), dtype=torch.uint8).numpy().tobytes())
    inputs = AutoProcessor.from_pretrained(folder)(text=[text], images=[image], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def answer(**changed: torch.Tensor) -> list[int]:
        reply = model.generate(**{**inputs, **changed}, max_new_tokens=16, do_sample=False)
        return reply[0, inputs["input_ids"].shape[1] :].tolist()

    assert answer() != answer(pixel_values=torch.zeros_like(inputs["pixel_values"]))
    with Engine(folder, limit_mm_per_prompt={"image": 1}) as engine:
        prompt = {"prompt": text, "multi_modal_data": {"image": image}}
        outputs = engine.llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    assert list(outputs[0].outputs[0].token_ids) == answer()
