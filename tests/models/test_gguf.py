"""GGUF files of dense and cut models: llama.cpp itself loads them and computes what transformers does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import seap_ray.models.hf  # noqa: F401
from seap_ray.core.architecture import Shape
from seap_ray.models.checkpoint import Checkpoint, completed_config
from seap_ray.models.export import CheckpointExport
from seap_ray.models.gguf.layouts import choose_layout
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
        "mixtral without window": ("mixtral", {"sliding_window": None}),
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
    "mixtral without window": ("llama", Shape(2, 2, 64), "mean"),
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


@pytest.mark.parametrize("name", [*UNEVEN, "gemma2", "gemma3", "qwen3", "gpt_neox", "mixtral without window"])
def test_llama_cpp_answers_as_transformers_for_a_dense_model(base, characters, tmp_path, name):
    assert_llama_cpp_answers_alike(base(name), gguf_of(base(name), tmp_path), name)
