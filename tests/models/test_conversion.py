"""Conversion: models in the forms that people have them in become what transformers, or peft, loads from them."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seap_ray.config import Config
from seap_ray.core.families import FAMILIES
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.conversion import form as form_module
from seap_ray.models.conversion.form import Form
from seap_ray.models.conversion.rewritten_form import plain_name
from seap_ray.pipeline.preflight import family_findings
from tests.support import ROOT
from tests.support.builders import CONFIGS, load, logits, random_ids, save_dense
from tests.support.gguf_files import save_llama, write_gguf
from tests.support.oracles import tensors_of


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache of this node."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SEAP_RAY_CACHE", str(folder))
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Convert in this process: another one takes seconds to start."""

    def convert_here(form: Form, target: Path) -> None:
        target.mkdir(parents=True)
        form.convert(target)

    monkeypatch.setattr(Form, "_convert_apart", convert_here)


def refusal(source: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(str(source))
    assert str(caught.value).startswith("model") and "\n" not in str(caught.value)
    return str(caught.value)


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(found[name].dtype == expected[name].dtype for name in found)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- MXFP4 ------------------------------------------------------------------------------------------------------------

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""Numbers of MXFP4's lower eight codes; the upper ones are the same, negative (OCP Microscaling Formats, 5.3.3)."""


def save_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Write a gpt-oss as it is published, in two files; return what its experts' tensors are, (E, columns, rows)."""
    settings = {"hidden_size": 64, "intermediate_size": 32}
    save_dense(folder, "gpt_oss", torch.bfloat16, settings=settings)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    expected: dict[str, torch.Tensor] = {}

    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, n_columns, n_rows = tensors.pop(name).shape
        codes = torch.randint(16, (n_experts, n_rows, n_columns // 32, 32), generator=generator)
        exponents = torch.randint(122, 126, (n_experts, n_rows, n_columns // 32), generator=generator)
        numbers = torch.tensor(FP4 + [-number for number in FP4])[codes] * 2.0 ** (exponents[..., None] - 127)
        expected[name] = numbers.flatten(2).mT
        # The even number of a pair is in a byte's lower half.
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)

    # What belongs together may be in two files.
    second = {name for name in tensors if name.endswith("_scales") or name == "model.norm.weight"}
    files = {name: f"model-0000{1 + (name in second)}-of-00002.safetensors" for name in tensors}
    for file in sorted({*files.values()}):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return expected


def test_experts_in_mxfp4_become_the_same_numbers_in_bfloat16(in_process, tmp_path):
    expected = save_mxfp4(tmp_path)
    opened = Checkpoint.open(str(tmp_path))
    written = tensors_of(opened.folder)
    for name, tensor in expected.items():
        assert torch.equal(written[name].float(), tensor) and written[name].dtype == torch.bfloat16
    assert not any(name.endswith(("_blocks", "_scales")) for name in written)
    assert "quantization_config" not in json.loads((opened.folder / "config.json").read_text())
    assert opened.architecture.n_experts == 4 and opened.is_copied and not opened.warnings
    assert torch.isfinite(logits(load(opened.folder), random_ids())).all()


def test_doctor_says_of_mxfp4_what_becomes_of_it(tmp_path):
    save_mxfp4(tmp_path)
    findings = family_findings(Config.model_validate({"model": {"source": str(tmp_path)}}))
    assert [finding.level for finding in findings] == ["ok", "ok"]
    assert "channels or whole experts can go" in findings[0].message
    assert "its experts are in MXFP4" in findings[1].message and "in bfloat16" in findings[1].message


def test_mxfp4_without_its_scales_is_refused(in_process, tmp_path):
    save_mxfp4(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    missing = min(tensors)
    del tensors[missing]
    save_file(tensors, file)
    assert f"has no tensor {missing}, without which MXFP4 is no numbers" in refusal(tmp_path)


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_what_transformers_loads_from_it(in_process, llama, tmp_path, kind):
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    file = write_gguf(tmp_path / f"m.{kind}.gguf", llama, kind=kind, metadata={"tokenizer.chat_template": template})
    opened = Checkpoint.open(str(file))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert_equal(stored(opened), loaded.state_dict())
    assert opened.dtype == loaded.dtype and not opened.warnings and opened.is_copied

    ids_BT = torch.arange(2, 40)[None]
    assert torch.equal(logits(load(opened.folder), ids_BT), logits(loaded, ids_BT))
    difference = (logits(load(opened.folder), ids_BT) - logits(load(llama), ids_BT)).abs().max()
    assert (difference == 0) == (kind == "F32")
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (opened.folder, llama))
    assert (
        tokenizer.chat_template == template
        and tokenizer("cabs é 日")["input_ids"] == original("cabs é 日")["input_ids"]
    )


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, [258]),
        ({"tokenizer.ggml.add_bos_token": True}, [0, 258]),
        ({"tokenizer.ggml.add_bos_token": False}, [258]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [0, 258, 1]),
    ],
)
def test_a_gguf_files_tokenizer_adds_the_tokens_that_its_metadata_say(in_process, llama, tmp_path, metadata, expected):
    """transformers reads the tokens, and not whether they are added."""
    file = write_gguf(tmp_path / "m.gguf", llama, metadata=metadata)
    tokenizer = AutoTokenizer.from_pretrained(Checkpoint.open(str(file)).folder)
    assert tokenizer("ab")["input_ids"] == expected
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_gguf_files_scaled_rotary_frequencies_are_those_of_the_llama_3_that_it_was_made_from(in_process, tmp_path):
    """llama.cpp keeps them as a tensor, which transformers leaves out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = save_llama(tmp_path / "base", rope_parameters=LLAMA_3, head_dim=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = (plain / scaled).float().numpy()
    file = write_gguf(tmp_path / "m.gguf", tmp_path / "base", kind="F32", tensors={"rope_freqs.weight": factors})
    opened = Checkpoint.open(str(file))
    assert opened.config["rope_parameters"] == LLAMA_3
    ids_BT = torch.arange(2, 100)[None]
    assert torch.equal(logits(load(opened.folder), ids_BT), logits(model, ids_BT))

    other = write_gguf(tmp_path / "o.gguf", tmp_path / "base", tensors={"rope_freqs.weight": factors[::-1].copy()})
    assert "has rotary frequencies of its own" in refusal(other)
    yarn = write_gguf(tmp_path / "y.gguf", tmp_path / "base", metadata={"llama.rope.scaling.type": "yarn"})
    assert "scales its rotary frequencies (yarn)" in refusal(yarn)


def test_a_folder_with_one_gguf_file_is_that_file_and_of_several_one_must_be_named(in_process, llama, tmp_path):
    file = write_gguf(tmp_path / "m.Q8_0.gguf", llama)
    assert Checkpoint.open(str(tmp_path)).fingerprint == Checkpoint.open(str(file)).fingerprint
    shutil.copy(file, tmp_path / "m.Q4_0.gguf")
    assert f"holds 2 GGUF files; name one of them: {tmp_path}/m.Q4_0.gguf" in refusal(tmp_path)


def test_what_is_no_whole_gguf_model_is_told(in_process, llama, tmp_path, monkeypatch):
    assert "none.gguf is not there" in refusal(tmp_path / "none.gguf")
    assert "one of 3 parts; merge them: llama-gguf-split --merge" in refusal(tmp_path / "m-00001-of-00003.gguf")

    (tmp_path / "zeros.gguf").write_bytes(b"GGUF" + bytes(64))
    assert "is a GGUF file, and transformers does not read it" in refusal(tmp_path / "zeros.gguf")
    whole = write_gguf(tmp_path / "whole.gguf", llama)
    (tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:-5000])
    assert "is a GGUF file, and transformers does not read it" in refusal(tmp_path / "short.gguf")
    other = write_gguf(tmp_path / "other.gguf", llama, architecture="falcon")
    assert "model family 'falcon' is not supported" in refusal(other)
    less = write_gguf(tmp_path / "less.gguf", llama, without=("blk.1.attn_q.weight",))
    assert "has no tensor model.layers.1.self_attn.q_proj.weight" in refusal(less)

    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5478984\n"
    (tmp_path / "pointer.gguf").write_text(pointer)
    assert "is a Git LFS pointer" in refusal(tmp_path / "pointer.gguf")

    monkeypatch.setattr(form_module, "find_spec", lambda _name: None)
    assert refusal(whole).endswith("which needs the package gguf: pip install 'seap-ray[formats]'")


# --- pickled weights -------------------------------------------------------------------------------------------------


def pickled(source: Path, folder: Path, **options: Any) -> Path:
    """Return a copy of a model with its weights in a pickled file for each file of safetensors."""
    shutil.copytree(source, folder)
    for file in sorted(folder.glob("*.safetensors")):
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / name, **options)
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    return folder


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_pickled_weights_are_read_as_they_are(in_process, dense, tmp_path, name, max_shard_size):
    source = dense(name, torch.bfloat16, max_shard_size)
    opened = Checkpoint.open(str(pickled(source, tmp_path / "pickled")))
    assert_equal(stored(opened), stored(Checkpoint.open(str(source))))
    assert len(opened.files) == len(list(source.glob("*.safetensors"))) and not opened.warnings
    loaded, expected = load(opened.folder), load(tmp_path / "pickled")
    assert torch.equal(logits(loaded, random_ids()), logits(expected, random_ids()))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (opened.folder / file).read_bytes() == (source / file).read_bytes()


def test_pickled_weights_of_an_old_torch_and_inside_of_a_trainers_checkpoint_are_read(in_process, dense, tmp_path):
    source = dense("llama_gqa")
    expected = stored(Checkpoint.open(str(source)))
    old = pickled(source, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_equal(stored(Checkpoint.open(str(old))), expected)

    trained = pickled(source, tmp_path / "trained")
    weights = {f"model.{name}": tensor for name, tensor in torch.load(trained / "pytorch_model.bin").items()}
    torch.save({"epoch": 3, "state_dict": weights}, trained / "pytorch_model.bin")
    assert_equal(stored(Checkpoint.open(str(trained))), expected)


def test_tensors_that_share_memory_are_read_as_two(in_process, dense, tmp_path):
    folder = pickled(dense("llama_tied"), tmp_path / "tied")
    weights = torch.load(folder / "pytorch_model.bin")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    whole = torch.arange(96.0 * 48).reshape(96, 48)
    weights["model.norm.weight"] = whole[3]
    torch.save(weights, folder / "pytorch_model.bin")
    opened = Checkpoint.open(str(folder))
    assert torch.equal(opened.read("lm_head.weight"), weights["model.embed_tokens.weight"])
    assert torch.equal(opened.read("model.norm.weight"), whole[3])
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(load(opened.folder), random_ids()), logits(expected, random_ids()))


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_code_in_a_pickled_file_is_not_run(dense, tmp_path, cache):
    folder = pickled(dense("llama_gqa"), tmp_path / "harmful")
    torch.save({"x": Harmful(tmp_path / "was here")}, folder / "pytorch_model.bin")
    assert "holds Python objects beside weights, and reading them would run code" in refusal(folder)
    assert not (tmp_path / "was here").exists()
    assert not list(cache.rglob("config.json")), "a failed conversion leaves nothing that looks whole"
    torch.save({"x": Harmful(tmp_path / "was here")}, folder / "pytorch_model.bin")
    pickle.loads(pickle.dumps(Harmful(tmp_path / "was here")))
    assert (tmp_path / "was here").exists(), "the trap works"


def test_a_model_of_another_family_is_refused_before_it_is_converted(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Form, "_convert_apart", lambda *_: pytest.fail("converted"))
    folder = pickled(dense("llama_gqa"), tmp_path / "pickled")
    edit_json(folder / "config.json", model_type="falcon")
    assert "model family 'falcon' is not supported" in refusal(folder).removeprefix("model.source: ")
    (folder / "config.json").unlink()
    assert refusal(folder).endswith("has no config.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04 not a pickle", "cannot be read"),
        ([1, 2], "is no dict of tensors"),
        ({"a": 1}, "a is no tensor"),
        ({"model.norm.weight": torch.ones(48), "module.model.norm.weight": torch.ones(48)}, "the same name"),
    ],
)
def test_a_pickled_file_that_is_none_of_weights_is_told(in_process, dense, tmp_path, content, said):
    folder = pickled(dense("llama_gqa"), tmp_path / "pickled")
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    assert said in refusal(folder)


def test_a_pickled_file_that_an_index_names_and_is_not_there_is_told(in_process, dense, tmp_path):
    folder = pickled(dense("llama_gqa", torch.float32, "20KB"), tmp_path / "pickled")
    lost = sorted(folder.glob("*.bin"))[1]
    lost.unlink()
    assert f"{lost.name} is missing, which pytorch_model.bin.index.json names" in refusal(folder)


def test_safetensors_go_before_pickled_weights_as_in_transformers(in_process, dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "both"))
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert Checkpoint.open(str(folder)).folder == folder


# --- names that trainers leave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_names_of_every_family_stay_as_they_are(dense, name):
    checkpoint = Checkpoint.open(str(dense(name)))
    assert all(plain_name(key, checkpoint.architecture.family) == key for key in checkpoint.tensors)


RENAMED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "adapter": lambda name: f"base_model.model.{name}",
    "doubled": lambda name: f"model.{name}",
    "layers compiled": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "checkpointed": lambda name: name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "sharded": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.2.', 'layers.2._fsdp_wrapped_module.')}",
    "without its beginning": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("kind", RENAMED)
@pytest.mark.parametrize("name", ["llama_gqa", "opt", "mixtral"])
def test_names_with_what_trainers_leave_are_the_models_own(in_process, dense, tmp_path, name, kind):
    folder = Path(shutil.copytree(dense(name), tmp_path / "renamed"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {RENAMED[kind](key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    opened = Checkpoint.open(str(folder))
    assert opened.folder != folder
    assert_equal(stored(opened), tensors)
    assert torch.equal(logits(load(opened.folder), random_ids()), logits(load(dense(name)), random_ids()))


def test_a_model_that_was_saved_without_its_head_is_what_transformers_loads(in_process, dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_tied"), tmp_path / "headless"))
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    assert not any(name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    opened = Checkpoint.open(str(folder))
    assert torch.equal(logits(load(opened.folder), random_ids()), logits(expected, random_ids()))


def test_files_of_a_sharded_model_are_renamed_one_by_one(in_process, dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa", torch.float32, "20KB"), tmp_path / "renamed"))
    for file in folder.glob("*.safetensors"):
        save_file({f"_orig_mod.{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    opened = Checkpoint.open(str(folder))
    assert_equal(stored(opened), stored(Checkpoint.open(str(dense("llama_gqa")))))
    assert len(opened.files) == len(list(folder.glob("*.safetensors"))) and not opened.warnings


def test_a_model_with_an_adapter_that_is_not_merged_is_told(in_process, dense, tmp_path):
    folder = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "unmerged"))
    model = get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"]))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    assert "holds a model with an adapter that is not merged" in refusal(folder)


# --- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter of a model whose weights are all random."""
    model = get_peft_model(load(base), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        # It is warned of embeddings that are saved, or tied.
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("llama_gqa", torch.float32, {}),
        ("llama_gqa", torch.bfloat16, {"lora_alpha": 32, "use_rslora": True}),
        ("qwen2", torch.float32, {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}),
        ("llama_biased", torch.float32, {"use_dora": True, "bias": "lora_only"}),
        ("qwen3", torch.float32, {"target_modules": ["embed_tokens", "v_proj"]}),
        ("opt", torch.float32, {"target_modules": ["q_proj", "fc1"]}),
    ],
)
def test_an_adapter_is_what_peft_merges(in_process, dense, tmp_path, name, dtype, settings):
    base = dense(name, dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    opened = Checkpoint.open(str(adapter))
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    loaded = load(opened.folder)
    assert_equal(loaded.state_dict(), merged.state_dict())
    assert torch.equal(logits(loaded, random_ids()), logits(merged, random_ids()))
    assert not torch.equal(logits(loaded, random_ids()), logits(load(base), random_ids()))
    assert opened.dtype == dtype and not opened.warnings
    assert AutoTokenizer.from_pretrained(opened.folder)("abc")["input_ids"] == [3, 4, 5]


def test_an_adapters_own_tokenizer_goes_before_the_bases(in_process, dense, tmp_path):
    adapter = save_adapter(dense("llama_gqa"), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(dense("llama_gqa"))
    tokenizer.chat_template = "{{ messages }} trained"
    tokenizer.save_pretrained(adapter)
    folder = Checkpoint.open(str(adapter)).folder
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }} trained"
    assert (folder / "generation_config.json").is_file()


def test_an_adapter_of_a_base_in_another_form_is_merged_and_made_again_when_its_base_changes(
    in_process, dense, tmp_path, monkeypatch
):
    base = pickled(dense("llama_gqa"), tmp_path / "base")
    adapter = save_adapter(dense("llama_gqa"), tmp_path / "adapter")
    expected = stored(Checkpoint.open(str(adapter)))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    first = Checkpoint.open(str(adapter))
    assert_equal(stored(first), expected)

    weights = torch.load(base / "pytorch_model.bin")
    weights["model.norm.weight"] += 1
    torch.save(weights, base / "pytorch_model.bin")
    assert Checkpoint.open(str(adapter)).fingerprint != first.fingerprint


def test_an_adapter_that_cannot_be_merged_is_told(in_process, dense, tmp_path):
    base = dense("llama_gqa")

    def spoilt(name: str, **config: Any) -> Path:
        adapter = save_adapter(base, tmp_path / name)
        edit_json(adapter / "adapter_config.json", **config)
        return adapter

    prompt = tmp_path / "prompt"
    get_peft_model(load(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(prompt)
    assert "is an adapter of the kind PROMPT_TUNING; only LORA is merged here" in refusal(prompt)
    assert "is an adapter for SEQ_CLS" in refusal(spoilt("classifier", task_type="SEQ_CLS"))
    assert "names no base" in refusal(spoilt("none", base_model_name_or_path=None))
    message = refusal(spoilt("lost", base_model_name_or_path="/none/such"))
    assert "is an adapter of the base /none/such: /none/such is not a folder with a model" in message
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.v_proj.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    message = refusal(spoilt("of a broken base", base_model_name_or_path=str(broken)))
    assert "has no tensor model.layers.1.self_attn.v_proj.weight" in message
    itself = tmp_path / "itself"
    assert "is an adapter itself" in refusal(spoilt("itself", base_model_name_or_path=str(itself)))
    assert "peft cannot merge it" in refusal(spoilt("wide", base_model_name_or_path=str(dense("llama_biased"))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tied = save_adapter(dense("llama_tied"), tmp_path / "tied", target_modules=["embed_tokens"])
    assert "a tied layer is part of the adapter" in refusal(tied)

    empty = save_adapter(base, tmp_path / "empty")
    (empty / "adapter_model.safetensors").write_bytes(b"")
    assert "is a LoRA adapter of the base in" in refusal(empty)
    (empty / "adapter_model.safetensors").unlink()
    assert "is an adapter without weights" in refusal(empty)


def test_weights_of_an_adapter_that_are_missing_or_have_no_place_are_told(in_process, dense, tmp_path):
    adapter = save_adapter(dense("llama_gqa"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert "missing adapter keys" in refusal(adapter)
    save_file({**tensors, name.replace("layers.0", "layers.9"): tensors[name].clone()}, file)
    assert "the base has no place for the adapter's " in refusal(adapter)


# --- once, whole, and the same everywhere ----------------------------------------------------------------------------

OPEN = "import sys; from seap_ray.models.checkpoint import Checkpoint; print(Checkpoint.open(sys.argv[1]).folder)"


def test_of_processes_that_want_a_model_one_converts_it_and_the_bytes_are_the_same_on_every_node(
    llama, tmp_path, cache, monkeypatch
):
    file = write_gguf(tmp_path / "m.gguf", llama, metadata={"tokenizer.ggml.add_bos_token": True})
    start = [sys.executable, "-c", OPEN, str(file)]
    with ThreadPoolExecutor(2) as pool:
        outputs = [*pool.map(lambda _: subprocess.check_output(start, cwd=ROOT, text=True), range(2))]
    assert sum("converting it, once on this node" in output for output in outputs) == 1
    (folder,) = {Path(output.splitlines()[-1]) for output in outputs}
    assert folder.is_relative_to(cache)

    monkeypatch.setenv("SEAP_RAY_CACHE", str(tmp_path / "another node"))
    there = Checkpoint.open(str(file))
    assert there.folder.is_relative_to(tmp_path / "another node")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in there.folder.iterdir())
    assert all((folder / name).read_bytes() == (there.folder / name).read_bytes() for name in names)

    monkeypatch.setattr(Form, "_convert_apart", lambda *_: pytest.fail("converted twice"))
    assert Checkpoint.open(str(file)).folder == there.folder
    parcel = pickle.dumps(there)
    assert pickle.loads(parcel).fingerprint == there.fingerprint and len(parcel) < 500


def test_a_conversion_that_is_killed_leaves_nothing_and_is_made_again(dense, tmp_path, cache):
    folder = pickled(dense("llama_gqa"), tmp_path / "pickled")
    job = subprocess.Popen([sys.executable, "-c", OPEN, str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        # Its folder is made right before the process that converts starts.
        while not list(cache.glob("models/*/.*.partial")):
            assert job.poll() is None, "ended too early"
            time.sleep(0.01)
        time.sleep(0.3)
        (child,) = (Path(f"/proc/{job.pid}/task/{job.pid}/children")).read_text().split()
        job.kill()
        job.wait(30)
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{child}") and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline, "who converts outlives who asked for it"
            time.sleep(0.05)
    finally:
        job.kill()
    assert not list(cache.glob("models/*/pickled"))
    assert_equal(stored(Checkpoint.open(str(folder))), stored(Checkpoint.open(str(dense("llama_gqa")))))


def test_a_conversion_that_memory_ends_is_told(dense, tmp_path, monkeypatch):
    folder = pickled(dense("llama_gqa"), tmp_path / "pickled")

    def ended(*_args: Any, **_named: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], -signal.SIGKILL, b"", b"")

    monkeypatch.setattr(subprocess, "run", ended)
    assert "its conversion was ended by signal 9, as where memory runs out" in refusal(folder)


def test_a_fault_of_ours_in_a_conversion_is_no_error_of_the_user(dense, tmp_path, monkeypatch):
    folder = pickled(dense("llama_gqa"), tmp_path / "pickled")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="conversion of .* failed"):
        Checkpoint.open(str(folder))


def test_families_are_told_apart_by_their_first_word():
    assert {family.layers.partition(".")[0] for family in FAMILIES.values()} == {"model", "gpt_neox", "backbone"}
