"""GGUF files of dense and cut models: llama.cpp itself loads them and computes what transformers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import seap_ray.models.hf  # noqa: F401
from seap_ray.core.architecture import Shape
from seap_ray.core.families import FAMILIES
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint, completed_config
from seap_ray.models.export import CheckpointExport
from seap_ray.models.gguf import layouts
from seap_ray.models.gguf.__main__ import main
from seap_ray.models.gguf.layouts import check_gguf, choose_layout, needs_equal_widths, why_no_biases
from seap_ray.models.gguf.vocabulary import Vocabulary, read_vocabulary
from seap_ray.models.gguf.writer import GgufExport
from seap_ray.storage.paths import storage_path
from tests.support.builders import prompts, random_plan, random_statistics, uniform_plan, write_compacted
from tests.support.llama_cpp import LlamaCpp, greedy, logprobs_after

PROMPTS = prompts([7, 1, 12, 3, 9, 16, 2, 5, 8, 4, 6, 11, 13, 10, 14, 15, 3, 7, 9, 5], seed=3)
"""Twenty prompts."""
NEW_TOKENS = 8
GELU_TABLE = ("gemma2", "gemma3", "gpt_neox")
"""Models whose activation llama.cpp looks up in a table of half precision."""
CONTEXT = 32
"""Tokens of the longest sequence here; a long rope is extended beyond."""


def changed(folder: Path, target: Path, **settings: object) -> Path:
    """Return a copy of a model with other values in its config, without a head where that is the embedding."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps(config))
    if settings.get("tie_word_embeddings"):
        tensors = load_file(target / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


Base = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(dense, tmp_path_factory) -> Base:
    """``base(name)``: a tiny model; those that tests/support has with windows, here also without."""
    variants = {
        "mistral without window": ("mistral", {"sliding_window": None}),
        "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
        "llama linear": ("llama_gqa", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        "qwen2 yarn": (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
    }
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in variants:
            return dense(name)
        if name not in made:
            source, settings = variants[name]
            made[name] = changed(dense(source), tmp_path_factory.mktemp("base") / "model", **settings)
        return made[name]

    return folder


UNEVEN = {
    "llama_mha": "deci",
    "llama_gqa": "deci",
    "llama_biased": "deci",
    "llama_tied": "deci",
    "llama linear": "deci",
    "mistral without window": "deci",
    "qwen2": "deci",
    "qwen2 yarn": "deci",
    "phi3": "deci",
    "qwen3 tied": "openelm",
}
"""Models whose layers may differ, and llama.cpp's architecture for them then."""
EVEN = {
    "llama_gqa": ("llama", Shape(2, 3, 64), "mean"),
    "qwen2": ("qwen2", Shape(4, 2, 64), "none"),
    "qwen3": ("qwen3", Shape(2, 2, 64), "none"),
    "gemma2": ("gemma2", Shape(2, 2, 64), "none"),
    "gemma3": ("gemma3", Shape(2, 2, 64), "none"),
    "mixtral": ("llama", Shape(2, 2, 64), "mean"),
    "qwen3_moe": ("qwen3moe", Shape(2, 2, 64), "none"),
    "gpt_neox": ("gptneox", Shape(3, 1, 64), "mean"),
}
"""Models with equal widths in all layers: llama.cpp's architecture, widths, and what compensates the cut."""


def gguf_of(folder: Path, target: Path, type_: str = "F32") -> Path:
    """Write the GGUF file of a checkpoint's folder."""
    file = target / "model.gguf"
    GgufExport.of(folder, type_, "tiny").write(storage_path(file))
    return file


def assert_llama_cpp_answers_alike(folder: Path, file: Path, name: str) -> None:
    """Compare greedy tokens, and log probabilities of the likeliest ones, over twenty prompts."""
    # Gemma's soft cap needs the eager attention.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    llama_cpp = LlamaCpp(file, CONTEXT)
    tolerance = 3e-3 if name in GELU_TABLE else 1e-4
    for prompt in PROMPTS:
        expected = greedy(model, prompt, NEW_TOKENS)
        answer = llama_cpp.greedy(prompt, NEW_TOKENS)
        assert answer.tokens == expected.tokens
        for here, there in zip(answer.likeliest, logprobs_after(model, prompt, answer), strict=True):
            # What has no chance in single precision is not compared.
            likely = {token: logprob for token, logprob in here.items() if logprob > -20}
            assert likely == pytest.approx({token: there[token] for token in likely}, abs=tolerance, rel=tolerance / 3)


@pytest.fixture
def characters(dense, monkeypatch) -> None:
    """Give every model the tokenizer of a token a character: transformers makes another one for some families."""

    def read(_folder: Path, n_tokens: int) -> Vocabulary:
        return read_vocabulary(dense("llama_gqa"), n_tokens)

    monkeypatch.setattr("seap_ray.models.gguf.writer.read_vocabulary", read)


@pytest.mark.parametrize("name", UNEVEN)
def test_llama_cpp_answers_as_transformers_where_layers_differ(base, characters, tmp_path, name):
    checkpoint = Checkpoint.open(str(base(name)))
    compensation = "none" if UNEVEN[name] == "openelm" else "mean"
    plan = random_plan(checkpoint.architecture, 5, compensation)
    statistics = random_statistics(checkpoint.architecture, 6)
    folder = write_compacted(CheckpointExport(checkpoint, plan, statistics), tmp_path / "expert")

    cut = Checkpoint.at(folder)
    assert choose_layout(completed_config(cut.config), cut.architecture).name == UNEVEN[name]
    assert_llama_cpp_answers_alike(folder, gguf_of(folder, tmp_path), name)


@pytest.mark.parametrize("name", EVEN)
def test_llama_cpp_answers_as_transformers_where_layers_are_alike(base, characters, tmp_path, name):
    layout, shape, compensation = EVEN[name]
    checkpoint = Checkpoint.open(str(base(name)))
    plan = uniform_plan(checkpoint.architecture, shape, compensation)
    statistics = random_statistics(checkpoint.architecture, 6)
    folder = write_compacted(CheckpointExport(checkpoint, plan, statistics), tmp_path / "expert")

    cut = Checkpoint.at(folder)
    found = choose_layout(completed_config(cut.config), cut.architecture).name
    assert found == layout
    assert_llama_cpp_answers_alike(folder, gguf_of(folder, tmp_path), name)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3 tied", "phi3", "gemma2"])
def test_llama_cpp_answers_as_transformers_for_a_dense_model(base, characters, tmp_path, name):
    assert_llama_cpp_answers_alike(base(name), gguf_of(base(name), tmp_path), name)


# --- types -----------------------------------------------------------------------------------------------------------

ERRORS = {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q5_1": 0.1, "Q5_0": 0.2, "Q4_1": 0.2, "Q4_0": 0.2}
"""By type, how far a weight may be off, as a share of the largest one of its matrix."""


@pytest.mark.parametrize("type_", ERRORS)
def test_every_type_holds_the_weights_and_loads(tmp_path, type_):
    checkpoint = Checkpoint.open("demo")
    plan = random_plan(checkpoint.architecture, 5, "mean")
    statistics = random_statistics(checkpoint.architecture, 6)
    folder = write_compacted(CheckpointExport(checkpoint, plan, statistics), tmp_path / "expert")
    file = gguf_of(folder, tmp_path, type_)

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    cut = Checkpoint.at(folder)
    for module, name in {"mlp.up_proj": "ffn_up", "self_attn.v_proj": "attn_v"}.items():
        weight = cut.read(cut.architecture.tensor(2, module)).float().numpy()
        stored = tensors[f"blk.2.{name}.weight"]
        assert stored.tensor_type.name == type_
        read = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(weight.shape)
        assert abs(read - weight).max() < ERRORS[type_] * abs(weight).max()

    assert tensors["token_embd.weight"].tensor_type.name == ("Q8_0" if type_[:2] in ("Q4", "Q5") else type_)
    assert {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) == 1} == {"F32"}
    # Rows that are no whole blocks have another type, as in llama-quantize.
    widths = {tensor.name: int(tensor.shape[0]) for tensor in tensors.values() if "ffn_down.weight" in tensor.name}
    for name, width in widths.items():
        assert tensors[name].tensor_type.name == ("F16" if type_[0] == "Q" and width % 32 else type_)
    assert len(LlamaCpp(file).greedy([1, 5, 6, 7], 4).tokens) in range(1, 5)


def test_an_uneven_expert_of_the_demo_answers_alike(tmp_path):
    checkpoint = Checkpoint.open("demo")
    plan = random_plan(checkpoint.architecture, 3, "mean")
    statistics = random_statistics(checkpoint.architecture, 4)
    folder = write_compacted(CheckpointExport(checkpoint, plan, statistics), tmp_path / "expert")
    assert_llama_cpp_answers_alike(folder, gguf_of(folder, tmp_path), "demo")


def test_a_file_is_written_in_pieces_and_hashed(tmp_path, monkeypatch):
    folder = Checkpoint.open("demo").folder
    whole = tmp_path / "whole.gguf"
    digest = GgufExport.of(folder, "Q8_0", "demo").write(storage_path(whole))
    assert digest == f"blake3:{blake3(whole.read_bytes()).hexdigest()}"

    monkeypatch.setattr("seap_ray.core.slicing.PIECE_BYTES", 1000)
    pieces = tmp_path / "pieces.gguf"
    largest = max(len(memoryview(piece)) for t in GgufExport.of(folder, "F32", "").tensors for piece in t.pieces())
    assert largest < 1000
    assert GgufExport.of(folder, "Q8_0", "demo").write(storage_path(pieces)) == digest


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(folder: Path, *, adds_biases: bool = False) -> str:
    """Return the line with which a base is refused before there is a plan."""
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(ConfigError) as refused:
        check_gguf(completed_config(checkpoint.config), checkpoint.architecture, adds_biases=adds_biases)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_family_has_a_layout_or_is_refused():
    assert layouts.FAMILIES.keys() <= FAMILIES.keys()


def test_what_llama_cpp_does_not_have_is_refused_in_one_line(base, tmp_path):
    assert refusal(base("opt")).startswith("export.format: gguf is not for opt, which llama.cpp does not have; use")
    assert "(llama, deci: no sliding window, in this model one of 16 tokens)" in refusal(base("mistral"))
    assert "(llama: no sliding window" in refusal(changed(base("mixtral"), tmp_path / "window", sliding_window=16))
    biases = "no biases on self_attn.o_proj and mlp.down_proj"
    assert refusal(base("gemma2"), adds_biases=True) == (
        f"export.format: llama.cpp does not hold this gemma2 as gguf (gemma2: {biases}); use pruning.bias=false, or "
        "export.format=seap"
    )
    assert biases in refusal(base("qwen3 tied"), adds_biases=True)

    half = changed(base("llama_gqa"), tmp_path / "half", hidden_act="gelu")
    assert "an MLP by silu, in this model by gelu" in refusal(half)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "no rotary embedding of the kind dynamic" in refusal(
        changed(base("llama_gqa"), tmp_path / "dynamic", rope_parameters=rope)
    )
    scaled = changed(base("gemma3"), tmp_path / "scaled", query_pre_attn_scalar=12)
    assert "attention scores divided by 8, in this model by 12" in refusal(scaled)
    mixed = changed(base("gemma3"), tmp_path / "mixed", layer_types=["full_attention"] * 4)
    assert "windows in all layers but each 6th, in this model in others" in refusal(mixed)


@pytest.mark.parametrize(
    ("name", "adds_biases", "equal"),
    [
        ("llama_gqa", True, False),
        ("qwen2", True, False),
        ("phi3", True, False),
        ("qwen3", False, True),
        ("qwen3 tied", False, False),
        ("gemma2", False, True),
        ("gpt_neox", True, True),
        ("mixtral", True, True),
    ],
)
def test_plans_have_equal_widths_where_llama_cpp_wants_them(base, name, adds_biases, equal):
    architecture = Checkpoint.open(str(base(name))).architecture
    assert needs_equal_widths(architecture, adds_biases=adds_biases) == equal


def test_biases_are_left_out_where_llama_cpp_has_none(base):
    reasons = {name: why_no_biases(Checkpoint.open(str(base(name))).architecture) for name in ("llama_gqa", "qwen3")}
    assert reasons["llama_gqa"] is None
    assert reasons["qwen3"] == "llama.cpp has no qwen3 with biases on self_attn.o_proj and mlp.down_proj"


def test_uneven_layers_of_a_family_for_equal_ones_are_refused(base, tmp_path):
    checkpoint = Checkpoint.open(str(base("gemma3")))
    plan = random_plan(checkpoint.architecture, 5)
    folder = write_compacted(CheckpointExport(checkpoint, plan), tmp_path / "expert")
    with pytest.raises(
        ConfigError, match="gemma3: equal widths in all layers alone.; use pruning.allocation.kind=uniform"
    ):
        _ = GgufExport.of(folder, "F32", "").layout


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json"):
        GgufExport.of(tmp_path, "F32", "")


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setattr("seap_ray.models.gguf.writer.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"gguf needs the package gguf: pip install 'seap-ray\[formats\]'"):
        GgufExport.of(Checkpoint.open("demo").folder, "F32", "")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_as_a_file(tmp_path, capsys):
    file = tmp_path / "demo.gguf"
    assert main([str(Checkpoint.open("demo").folder), str(file), "--type", "Q4_0"]) == 0
    assert f"{file}: llama, 75 tensors, {file.stat().st_size:,} bytes" in capsys.readouterr().out

    assert main([str(tmp_path), str(file)]) == 2
    assert capsys.readouterr().err.endswith("has no config.json\n")
