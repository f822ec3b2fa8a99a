"""Opening a model: every tensor is there and as config.json declares, and what is read is what transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from seap_ray.config import load_config
from seap_ray.core.architecture import Architecture
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint, completed_config
from seap_ray.models.export import CheckpointExport
from seap_ray.models.loading import model_dtype
from tests.support.builders import CONFIGS, load, random_plan, random_statistics, write_compacted


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def base(dense, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(dense("llama_gqa"), tmp_path / "base"))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of ``...`` removes the key."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replace tensors by their names; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def kinds_of_tensors(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of what lies outside of the layers, and of the tensors of one layer, the last."""
    return [name for name in tensors if "layers." not in name or "layers.3." in name]


# --- every tensor that the family needs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_tensor_is_missing_or_of_another_shape_or_in_eight_bits_is_refused_by_its_name(dense, tmp_path, name):
    folder = Path(shutil.copytree(dense(name), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    assert len(kinds_of_tensors(tensors)) > 8
    for key in kinds_of_tensors(tensors):
        edit_tensors(folder, **{key: None})
        assert f"has no tensor {key}" in refusal(folder)

        more = torch.cat([tensors[key], tensors[key][:1]])
        edit_tensors(folder, **{**tensors, key: more})
        assert f"{key} is {list(more.shape)}, and {list(tensors[key].shape)} by config.json; " in refusal(folder)

        edit_tensors(folder, **{**tensors, key: tensors[key].to(torch.float8_e4m3fn)})
        assert f"{key} is F8_E4M3, not one of F64, F32, F16, BF16" in refusal(folder)
        edit_tensors(folder, **tensors)
    Checkpoint.open(str(folder))


@pytest.mark.parametrize("name", ["llama_biased", "qwen2", "gemma3", "mixtral", "opt", "gpt_neox"])
def test_what_a_compacted_checkpoint_declares_is_checked_too(dense, tmp_path, name):
    dense_base = Checkpoint.open(str(dense(name)))
    plan = random_plan(dense_base.architecture, 3, "mean")
    export = CheckpointExport(dense_base, plan, random_statistics(dense_base.architecture, 3))
    folder = write_compacted(export, tmp_path / "expert")
    opened = Checkpoint.open(str(folder))
    assert not opened.surplus and not opened.warnings
    (file,) = sorted({info.file for key, info in opened.tensors.items() if "layers.3" in key and "down" in key})[
        :1
    ] or [opened.tensors[opened.architecture.tensor(3, opened.architecture.modules(3)["attn"])].file]
    tensors = load_file(file)
    key = next(key for key in tensors if "layers.3." in key and tensors[key].ndim == 2)
    save_file({**tensors, key: tensors[key][1:].clone()}, file, metadata={"format": "pt"})
    assert f"{key} is " in refusal(folder)


def test_a_head_that_is_not_there_is_refused_with_what_may_have_happened(dense, base, tmp_path):
    edit_tensors(base, **{"lm_head.weight": None})
    assert "where the head is the embedding, as in merges of tied models, set it to true" in refusal(base)
    edit_config(base, tie_word_embeddings=True)
    Checkpoint.open(str(base))
    edit_config(base, tie_word_embeddings=False, architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification has no head that predicts tokens" in refusal(base)

    # Without the key it is a matter of the family: a Gemma's head is its embedding.
    gemma = Path(shutil.copytree(dense("gemma2"), tmp_path / "gemma"))
    edit_config(gemma, tie_word_embeddings=...)
    assert "lm_head.weight" not in Checkpoint.open(str(gemma)).tensors


def test_a_resized_vocabulary_and_widths_of_another_tool_are_refused_with_both_sizes(base):
    tensors = load_file(base / "model.safetensors")
    wider = {n: torch.cat([tensors[n], tensors[n][:4]]) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    edit_tensors(base, **wider)
    rows = len(tensors["lm_head.weight"])
    message = refusal(base)
    assert f"is [{rows + 4}, 48], and [{rows}, 48] by config.json" in message
    assert message.endswith(f"if the vocabulary was resized, set vocab_size to {rows + 4}")
    edit_config(base, vocab_size=rows + 4)
    assert Checkpoint.open(str(base)).vocabulary_size == rows + 4

    narrow = {
        f"model.layers.2.mlp.{m}_proj.weight": tensors[f"model.layers.2.mlp.{m}_proj.weight"] for m in ("gate", "up")
    }
    edit_tensors(base, **{name: tensor[:60].clone() for name, tensor in narrow.items()})
    assert "model.layers.2.mlp.gate_proj.weight is [60, 48], and [80, 48] by config.json; it was pruned" in refusal(
        base
    )


def test_a_stored_head_that_should_be_the_embedding_must_be_it(dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_tied"), tmp_path / "tied"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, **{"lm_head.weight": embedding.clone()})
    opened = Checkpoint.open(str(folder))
    assert "lm_head.weight" in opened.tensors and not opened.warnings
    edit_tensors(folder, **{"lm_head.weight": embedding + 1})
    assert "lm_head.weight differs from model.embed_tokens.weight, and config.json says tie_word" in refusal(folder)


def test_tensors_that_no_model_reads_are_left_out_and_told(base, tmp_path):
    before = Checkpoint.open(str(base))
    extra = {
        "score.weight": torch.ones(2, 48),
        "model.layers.4.mlp.up_proj.weight": torch.ones(80, 48, dtype=torch.int8),
    }
    edit_tensors(base, **extra, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    opened = Checkpoint.open(str(base))
    assert opened.tensors.keys() == before.tensors.keys() and opened.parameters == before.parameters
    assert opened.warnings == ["2 tensors that the model does not have are ignored (model.layers.4.mlp.up_proj.weight)"]
    plan = random_plan(opened.architecture, 1)
    load(write_compacted(CheckpointExport(opened, plan), tmp_path / "expert"))


def test_a_config_from_which_no_model_can_be_built_is_one_line(base):
    edit_config(base, hidden_act="none_such")
    assert "transformers refuses config.json" in refusal(base)


# --- the file that transformers loads --------------------------------------------------------------------------------


def test_of_a_file_and_an_index_the_file_is_read_as_transformers_does(dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa", torch.float32, "20KB"), tmp_path / "both"))
    shutil.copy(dense("llama_mha") / "model.safetensors", folder / "other.safetensors")
    whole = load_file(dense("llama_gqa") / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in whole.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    opened = Checkpoint.open(str(folder))
    assert [file.name for file in opened.files] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(opened.read(name), loaded[name]) for name in opened.tensors)
    (warning,) = opened.warnings
    assert "weight files are ignored, as transformers does (model-00001-of-" in warning


def test_files_that_an_index_does_not_name_are_ignored_and_told(dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa", torch.float32, "20KB"), tmp_path / "parts"))
    before = Checkpoint.open(str(folder))
    assert not before.warnings
    shutil.copy(dense("llama_gqa") / "model.safetensors", folder / "consolidated.safetensors")
    opened = Checkpoint.open(str(folder))
    assert opened.files == before.files and opened.fingerprint == before.fingerprint
    assert opened.warnings == ["1 weight files are ignored, as transformers does (consolidated.safetensors)"]


def test_of_a_tensor_in_two_files_the_one_counts_that_transformers_loads(dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa", torch.float32, "20KB"), tmp_path / "parts"))
    files = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(files[0])))
    save_file({**load_file(files[-1]), name: load_file(files[0])[name] + 1}, files[-1], metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(Checkpoint.open(str(folder)).read(name), loaded[name])


def test_an_adapter_beside_a_model_and_weights_that_config_names_are_refused(base):
    (base / "adapter_config.json").write_text("{}")
    assert "holds a model and an adapter beside it" in refusal(base)
    (base / "adapter_config.json").unlink()
    edit_config(base, transformers_weights="model.safetensors")
    assert "names its weights itself" in refusal(base)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_git_lfs_did_not_fetch_is_told(base, name):
    (base / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5478984\n")
    assert f"{name} is a Git LFS pointer and not the file itself; run git lfs pull in {base}" in refusal(base)


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.onnx", "an ONNX graph"), ("tf_model.h5", "TensorFlow"), ("model.fp16.safetensors", "under another name")],
)
def test_other_weights_are_called_by_their_name(base, name, said):
    (base / "model.safetensors").rename(base / name)
    message = refusal(base)
    assert said in message and name in message and "save_pretrained" in message


# --- config.json's odd values ----------------------------------------------------------------------------------------

REMOVED = [
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "use_sliding_window",
    "vocab_size",
    "num_hidden_layers",
    "intermediate_size",
    "ffn_dim",
    "num_experts_per_tok",
]


def outcome(folder: Path) -> tuple[str, Any]:
    """Return what opening a folder gives: an architecture, or nothing."""
    try:
        return "opened", Checkpoint.open(str(folder)).architecture
    except ConfigError as error:
        assert "\n" not in str(error)
        return "refused", None


def read_by_transformers(folder: Path) -> tuple[str, Any]:
    """Return the architecture by what transformers reads, or nothing where it cannot load the model."""
    try:
        config = AutoConfig.from_pretrained(folder)
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        # It fills what is missing with random numbers.
        assert not info["missing_keys"]
    except Exception:  # whatever it raises
        return "refused", None
    return "opened", Architecture.of({**config.to_dict(), "dtype": None})


@pytest.mark.parametrize("value", [..., None], ids=["missing", "null"])
@pytest.mark.parametrize(
    "name", ["llama_mha", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "opt"]
)
def test_a_key_that_is_missing_or_null_is_read_as_transformers_reads_it(dense, tmp_path, name, value):
    source = dense(name)
    keys = json.loads((source / "config.json").read_text()).keys() & {*REMOVED}
    for key in sorted(keys):
        folder = Path(shutil.copytree(source, tmp_path / key))
        edit_config(folder, **{key: value})
        kind, architecture = outcome(folder)
        expected_kind, expected = read_by_transformers(folder)
        assert (kind, architecture) == (expected_kind, expected), key


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "half", "bfloat16", None, "auto", "torch.float16", "fp16", "int8", 5])
def test_the_type_in_config_is_the_one_that_transformers_reads_or_refused(base, key, value):
    edit_config(base, dtype=..., torch_dtype=...)
    edit_config(base, **{key: value})
    if value in ("auto", "torch.float16", "fp16", "int8", 5):
        assert f"config.json says dtype {value!r}, which transformers does not read" in refusal(base)
    else:
        opened = Checkpoint.open(str(base))
        assert opened.dtype == AutoModelForCausalLM.from_pretrained(base).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_config_without_a_type_leaves_it_to_the_weights(dense, tmp_path, dtype):
    folder = Path(shutil.copytree(dense("llama_gqa", dtype), tmp_path / "base"))
    edit_config(folder, dtype=None)
    opened = Checkpoint.open(str(folder))
    section = load_config(["model.dtype=auto"]).model
    assert model_dtype(section, opened) == dtype == AutoModelForCausalLM.from_pretrained(folder).dtype
    assert model_dtype(section.model_copy(update={"dtype": "float64"}), opened) == torch.float64


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 4.0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("hidden_size", "48"),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 5),
        ("num_attention_heads", 7),
        ("head_dim", 0),
        ("intermediate_size", True),
        ("tie_word_embeddings", "false"),
        ("rms_norm_eps", None),
        ("pad_token_id", 10**6),
        ("eos_token_id", "2"),
        ("rope_parameters", {"rope_type": "none_such"}),
        ("quantization", {"bits": 4}),
    ],
)
def test_a_value_that_makes_no_model_is_one_line(base, key, value):
    edit_config(base, **{key: value})
    refusal(base)


def test_end_tokens_beyond_the_embedding_are_told(base):
    edit_config(base, eos_token_id=[2, 10**6], bos_token_id=-1)
    rows = Checkpoint.open(str(base)).vocabulary_size
    assert Checkpoint.open(str(base)).warnings == [
        f"config.json: bos_token_id -1 is none of the {rows} tokens",
        f"config.json: eos_token_id 1000000 is none of the {rows} tokens",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_complete_config_is_read_the_same_with_transformers_defaults(name):
    full = json.loads(CONFIGS[name]().to_json_string())
    short = json.loads(CONFIGS[name]().to_json_string(use_diff=True))
    assert Architecture.of(completed_config(full)) == Architecture.of(full)
    assert Architecture.of(completed_config(short)) == Architecture.of(full)
