"""Multimodal checkpoints: the language model is cut as one of its family, all else is carried byte for byte."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Llama4Config,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
)

from seap_ray.config import Config, ExportSection, ModelSection
from seap_ray.core.architecture import Shape
from seap_ray.core.families import MULTIMODAL
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, check_stock
from seap_ray.models.forward import record
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import decoder_of, load_model
from seap_ray.pipeline.preflight import check_config, family_findings
from seap_ray.storage.paths import parse_path
from serve.experts import check_servable
from tests.models.test_families import cut
from tests.support.builders import (
    GATED_DELTA,
    SHARDS,
    layerwise,
    make_tokenizer,
    random_ids,
    random_statistics,
    randomise,
    recorded_by,
    uniform_plan,
    write_compacted,
)
from tests.support.elsewhere import WITHOUT_SEAP_RAY
from tests.support.oracles import assert_close, assert_equal, tensors_of, two_pass, with_replaced_activations

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 120,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
WHOLE_MROPE = {**MROPE, "partial_rotary_factor": 1.0}
GATED_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
IMAGE_TOKEN = 59
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config={**SIZES, "sliding_window": 16, "query_pre_attn_scalar": 8, "layer_types": LAYER_TYPES},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=57,
        eoi_token_index=58,
    ),
    "gemma4": lambda: Gemma4Config(
        text_config={
            **SIZES,
            "global_head_dim": 12,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 60,
        },
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        image_token_id=IMAGE_TOKEN,
        video_token_id=57,
        audio_token_id=58,
    ),
    "llama4": lambda: Llama4Config(
        text_config={
            **SIZES,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 16,
        },
        # Four patches are a token.
        vision_config={
            **VISION,
            "intermediate_size": 64,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
        image_token_index=IMAGE_TOKEN,
        boi_token_index=57,
        eoi_token_index=58,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config={"model_type": "mistral", **SIZES, "sliding_window": None},
        vision_config={"model_type": "pixtral", "head_dim": 8, **VISION},
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**SIZES, "rope_parameters": MROPE},
        vision_config=QWEN_VISION,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=True,
    ),
    "qwen3_5": lambda: Qwen3_5Config(
        text_config={**SIZES, **GATED_DELTA, "layer_types": GATED_LAYERS, "rope_parameters": WHOLE_MROPE},
        vision_config={key: value for key, value in QWEN_VISION.items() if key != "deepstack_visual_indexes"},
        image_token_id=IMAGE_TOKEN,
    ),
    "qwen3_5_moe": lambda: Qwen3_5MoeConfig(
        text_config={
            **SIZES,
            **GATED_DELTA,
            "layer_types": GATED_LAYERS,
            "rope_parameters": WHOLE_MROPE,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        vision_config={key: value for key, value in QWEN_VISION.items() if key != "deepstack_visual_indexes"},
        image_token_id=IMAGE_TOKEN,
    ),
}
MIXTURES = ("llama4", "qwen3_5_moe")
each_kind = pytest.mark.parametrize("name", CONFIGS)


def picture(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a prompt with a picture as the model takes it: token ids and pixels, by the names of its arguments."""
    generator = torch.Generator().manual_seed(7)
    n_image_tokens = 4
    ids_BT = random_ids(1, 20)
    ids_BT[0, 5 : 5 + n_image_tokens] = IMAGE_TOKEN
    inputs: dict[str, torch.Tensor] = {"input_ids": ids_BT}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids_BT == IMAGE_TOKEN).long()
    if name in ("qwen3_vl", "qwen3_5", "qwen3_5_moe"):
        # 16 patches of two pictures in time, 3 colours and 4 x 4 pixels.
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator).to(dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids_BT == IMAGE_TOKEN).long()
    elif name == "gemma4":
        # 6 x 6 patches of 3 colours and 4 x 4 pixels, of which 3 x 3 are a token.
        inputs["pixel_values"] = torch.rand(1, 36, 3 * 4 * 4, generator=generator).to(dtype)
        places = torch.arange(36)
        inputs["image_position_ids"] = torch.stack([places % 6, places // 6], 1)[None]
    else:
        inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator).to(dtype)
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]])
    return inputs


def save_dense(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """Write a random model with the files that go with it."""
    model = AutoModelForImageTextToText.from_config(CONFIGS[name](), dtype=dtype)
    randomise(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for companion in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / companion).write_text(json.dumps({"made_for": name}))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return the folder of a random model, which is written once for each type."""
    folders: dict[tuple, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float64) -> Path:
        key = (name, dtype)
        if key not in folders:
            folders[key] = save_dense(tmp_path_factory.mktemp(name) / "dense", name, dtype)
        return folders[key]

    return get


def load(folder: Path) -> PreTrainedModel:
    """Load a model by the class of transformers' own or of ours, with its weights copied (see ``builders.load``)."""
    return copied(AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval())


def load_alone(folder: Path) -> PreTrainedModel:
    """Load the language model as a job does."""
    return copied(load_model(Config(), Checkpoint.at(folder), folder))


def copied(model: PreTrainedModel) -> PreTrainedModel:
    # Grouped products of MoE experts, with which a job computes, are not in float64.
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def answers(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """Return the logits of texts, and of a prompt with a picture."""
    # Texts first: a Qwen 3 VL remembers the positions of its last picture.
    return {
        "text": model(input_ids=random_ids()).logits,
        "picture": model(**picture(name, model.dtype)).logits,
    }


# --- what is read ----------------------------------------------------------------------------------------------------


@each_kind
def test_the_language_model_alone_computes_what_it_does_in_the_whole(dense, name):
    folder = dense(name)
    checkpoint = Checkpoint.open(str(folder))
    whole = load(folder)
    parameters = sum(parameter.numel() for parameter in decoder_of(whole).parameters())
    architecture = checkpoint.architecture
    assert (
        architecture.decoder_parameters
        < parameters
        < checkpoint.parameters
        == sum(tensor.numel() for tensor in tensors_of(folder).values())
    )
    assert architecture.ties_embeddings == whole.config.tie_word_embeddings

    alone = load_alone(folder)
    assert type(alone).__name__.endswith("ForCausalLM")
    assert torch.equal(alone(input_ids=random_ids()).logits, whole(input_ids=random_ids()).logits)


@each_kind
def test_moments_are_those_of_two_passes_of_the_whole_and_layer_by_layer_the_same_bytes(dense, name, float64_norms):
    folder = dense(name)
    whole = load(folder)
    alone = load_alone(folder)
    for shard in ("sort/00000", "logic/00000"):
        assert_close(record(alone, SHARDS[shard], batch_tokens=40), two_pass(whole, SHARDS[shard]))

    # A mixture computes layer by layer as a job does, by grouped products.
    settings = ModelSection(dtype="float32" if name in MIXTURES else "auto")
    as_a_job_loads_it = load_model(Config(model=settings), Checkpoint.at(folder), folder)
    layer_by_layer = recorded_by(layerwise(folder, as_a_job_loads_it.dtype))
    for shard in ("sort/00000", "logic/00000"):
        assert_equal(layer_by_layer[shard], record(as_a_job_loads_it, SHARDS[shard], batch_tokens=40))


# --- what is written -------------------------------------------------------------------------------------------------


@each_kind
def test_a_cut_model_answers_a_picture_as_the_dense_one_with_replaced_activations(dense, tmp_path, name, float64_norms):
    base = Checkpoint.open(str(dense(name)))
    whole = load(base.folder)
    blank = picture(name, torch.float64)
    blank["pixel_values"] = torch.zeros_like(blank["pixel_values"])
    with torch.no_grad():
        assert (answers(whole, name)["picture"] - whole(**blank).logits).abs().max() > 1e-3

    for step, seed in (("once", 1), ("again", 2)):
        export = cut(base, seed)
        folder = write_compacted(export, tmp_path / step)
        check_folder(folder)
        model = load(folder)
        assert type(model).__name__ == MULTIMODAL[name].model_class

        given = answers(load(base.folder), name)
        expected = answers(with_replaced_activations(load(base.folder), export), name)
        for prompt, logits_BTV in answers(model, name).items():
            assert (logits_BTV - expected[prompt]).abs().max() < 1e-12
            assert (expected[prompt] - given[prompt]).abs().max() > 1e-3
        alone = load_alone(folder)
        assert torch.equal(alone(input_ids=random_ids()).logits, load(folder)(input_ids=random_ids()).logits)

        base = Checkpoint.open(str(folder))
        assert base.architecture.decoder_parameters == sum(
            tensor.numel() for tensor in decoder_of(model).layers.state_dict().values()
        )


@each_kind
def test_all_but_the_language_model_is_carried_byte_for_byte(dense, tmp_path, name):
    source = dense(name, torch.bfloat16)
    folder = write_compacted(cut(Checkpoint.open(str(source)), 3), tmp_path / "expert", 20_000)
    given, written = tensors_of(source), tensors_of(folder)
    carried = [key for key in given if "language_model" not in key and key != "lm_head.weight"]
    assert len(carried) > 10
    assert {key for key in written if "language_model" not in key and key != "lm_head.weight"} == {*carried}
    assert all(torch.equal(written[key], given[key]) for key in carried)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()

    for companion in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (folder / companion).read_bytes() == (source / companion).read_bytes()
    outside = {"model_type", "architectures", "auto_map", "text_config", "tie_word_embeddings"}
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    assert {key: value for key, value in before.items() if key not in outside} == {
        key: value for key, value in after.items() if key not in outside
    }

    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    given, again = answers(model, name), answers(load(tmp_path / "saved"), name)
    assert all(torch.equal(again[prompt], logits_BTV) for prompt, logits_BTV in given.items())
    assert Checkpoint.open(str(tmp_path / "saved")).architecture == Checkpoint.open(str(folder)).architecture


@each_kind
def test_cutting_nothing_is_the_identity(dense, tmp_path, name):
    base = Checkpoint.open(str(dense(name, torch.bfloat16)))
    plan = uniform_plan(base.architecture, base.architecture.dense, "mean")
    folder = write_compacted(CheckpointExport(base, plan, random_statistics(base.architecture, 0)), tmp_path)
    given, written = tensors_of(base.folder), tensors_of(folder)
    assert written.keys() == given.keys() and all(torch.equal(written[key], given[key]) for key in given)
    expected = answers(load(base.folder), name)
    assert all(torch.equal(answer, expected[prompt]) for prompt, answer in answers(load(folder), name).items())


@each_kind
def test_a_stock_export_is_a_checkpoint_of_transformers_own_class(dense, tmp_path, name):
    base = Checkpoint.open(str(dense(name)))
    whole = base.architecture.dense
    # A Llama 4's shared expert stays whole, and its config has one width for all.
    channels = whole.channels if base.architecture.is_shared_width_bound else 50
    plan = uniform_plan(base.architecture, Shape(whole.groups // 2, whole.heads_per_group, channels))
    check_stock(plan, base.architecture)
    model = load(write_compacted(CheckpointExport(base, plan, stock=True), tmp_path / "stock"))
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config.model_type == name
    seap = answers(load(write_compacted(CheckpointExport(base, plan), tmp_path / "seap")), name)
    assert all(torch.equal(answer, seap[prompt]) for prompt, answer in answers(model, name).items())


def test_a_stock_mistral_with_added_biases_is_a_llama_inside(dense, tmp_path):
    base = Checkpoint.open(str(dense("mistral3")))
    plan = uniform_plan(base.architecture, Shape(4, 2, 50), "mean")
    statistics = random_statistics(base.architecture, 0)
    check_stock(plan, base.architecture)
    model = load(write_compacted(CheckpointExport(base, plan, statistics, stock=True), tmp_path / "stock"))
    assert type(model.model.language_model).__name__ == "LlamaModel"
    seap = answers(load(write_compacted(CheckpointExport(base, plan, statistics), tmp_path / "seap")), "mistral3")
    for prompt, answer in answers(model, "mistral3").items():
        assert (answer - seap[prompt]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_both_ways_to_store_a_model_are_read_and_kept(dense, tmp_path, name):
    """transformers wrote from 4.52 to 4.57 what comes first in a name behind ``model.``."""
    folder = tmp_path / "renamed"
    shutil.copytree(dense(name), folder)
    renamed = {}
    for key, tensor in tensors_of(folder).items():
        inside = key.replace("language_model.model.", "language_model.").replace("language_model.lm_head.", "lm_head.")
        renamed[inside if inside.startswith("lm_head.") else f"model.{inside}"] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})

    base = Checkpoint.open(str(folder))
    written = write_compacted(cut(base, 1), tmp_path / "expert")
    # Biases of compensation are new.
    assert {key for key in tensors_of(written) if not key.endswith("_proj.bias")} == {
        key for key in renamed if not key.endswith("_proj.bias")
    }
    plain = write_compacted(cut(Checkpoint.open(str(dense(name))), 1), tmp_path / "plain")
    expected = answers(load(plain), name)
    assert all(torch.equal(answer, expected[prompt]) for prompt, answer in answers(load(written), name).items())


ELSEWHERE = (
    WITHOUT_SEAP_RAY
    + """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
folders, out = json.loads(sys.argv[1])
results = {}
for name, folder in folders.items():
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[name] = model(**load_file(f"{out}/{name}")).logits
assert not [name for name in sys.modules if name.split(".")[0] == "seap_ray"]
save_file(results, out + "/results")
"""
)


def test_a_process_without_seap_ray_computes_the_same_with_the_code_in_the_folder(dense, tmp_path):
    folders = {}
    for name in CONFIGS:
        base = Checkpoint.open(str(dense(name, torch.bfloat16)))
        folders[name] = write_compacted(cut(base, 3), tmp_path / f"{name}_expert")
        save_file(picture(name, torch.bfloat16), tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, json.dumps([{k: str(v) for k, v in folders.items()}, str(tmp_path)])],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results")
    for name, folder in folders.items():
        assert torch.equal(results[name], answers(load(folder), name)["picture"]), name


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["own head", "tied"])
def test_where_nothing_says_whether_the_head_is_the_embedding_a_stored_one_counts(dense, tmp_path, stored):
    folder = tmp_path / "silent"
    shutil.copytree(dense("mistral3"), folder)
    content = json.loads((folder / "config.json").read_text())
    del content["tie_word_embeddings"], content["text_config"]["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(content))
    if not stored:
        tensors = tensors_of(folder)
        del tensors["language_model.lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    base = Checkpoint.open(str(folder))
    assert base.architecture.ties_embeddings != stored
    model = load(write_compacted(cut(base, 1), tmp_path / "expert"))
    expected = answers(with_replaced_activations(load(folder), cut(base, 1)), "mistral3")
    assert (answers(model, "mistral3")["picture"] - expected["picture"]).abs().max() < 1e-5
    assert model.config.tie_word_embeddings != stored


def test_a_language_model_of_another_family_is_refused_with_the_reason(tmp_path):
    content = CONFIGS["mistral3"]().to_dict()
    content["text_config"]["model_type"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="a mistral3 is not supported whose text_config is a 'mamba': its layers mix"):
        family_findings(Config(model=ModelSection(source=str(tmp_path))))


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"format": "gguf"}, "export.format: gguf holds"),
        ({"quantization": {"scheme": "w8a8", "rounding": "nearest"}}, "export.quantization"),
    ],
    ids=["gguf", "quantised"],
)
def test_exports_without_a_place_for_pictures_are_refused_before_any_work(dense, export, message):
    config = Config(model=ModelSection(source=str(dense("gemma3"))), export=ExportSection(**export))
    with pytest.raises(ConfigError, match=message):
        check_config(config, check_evaluation_rows=False)


def test_an_expert_with_unequal_widths_is_not_deployed_and_a_stock_one_is(dense, tmp_path):
    base = Checkpoint.open(str(dense("mistral3")))
    write_compacted(cut(base, 1), tmp_path / "seap")
    with pytest.raises(ConfigError, match=r"seap reads pictures, too, .*; prune with export\.format=stock"):
        check_servable(parse_path(str(tmp_path / "seap")))
    plan = uniform_plan(base.architecture, Shape(4, 2, 50))
    write_compacted(CheckpointExport(base, plan, stock=True), tmp_path / "stock")
    check_servable(parse_path(str(tmp_path / "stock")))


@each_kind
def test_the_doctor_tells_from_a_config_alone_what_is_cut(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]().to_dict()))
    first, second = family_findings(Config(model=ModelSection(source=str(tmp_path))))
    assert first.message == f"{name}: its language model is cut, all else is carried as it is"
    units = "channels or whole experts" if name in MIXTURES else "MLP channels"
    attention = "attention stays whole" if name == "gemma4" else "query heads"
    assert second.message.startswith(f"{[*MULTIMODAL[name].texts.values()][0]}: {units} can go; {attention}")
