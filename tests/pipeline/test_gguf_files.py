"""GGUF files of a run: how they are written, what is refused before any work, what widths plans get, what is said."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import seap_ray.models.hf  # noqa: F401
from seap_ray.config import Config, PlanSettings
from seap_ray.demo import skills
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.pipeline import preflight
from seap_ray.pipeline.checkpoint_writer import write_checkpoints
from seap_ray.pipeline.gguf_files import check_gguf_base, gguf_item_bytes, gguf_note, is_uniform, write_preset
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.needs import ModelSize, disk_needs, largest_corpora
from seap_ray.pipeline.plan_choice import PlannedModel
from seap_ray.pipeline.preflight import check_config
from seap_ray.storage.digests import digest_of_file
from seap_ray.storage.run import Run
from tests.support.builders import random_plan, random_statistics
from tests.support.llama_cpp import LlamaCpp, greedy

DEMO = Checkpoint.open("demo")
FIXED = {"allocation": {"kind": "uniform"}, "score": "wifv", "attention_unit": "group", "baselines": {}}


def config(source: Path | str = "demo", *, format_: str = "gguf", storage: str = "runs", **pruning: object) -> Config:
    """Return a config of GGUF files whose plans leave nothing open."""
    return Config(
        model={"source": str(source)},
        run={"storage": storage},
        export={"format": format_},
        pruning={**FIXED, "compensation": "none", **pruning},
    )


def planned(name: str, seed: int) -> PlannedModel:
    """Return a model with other widths in every layer."""
    plan = replace(random_plan(DEMO.architecture, seed, "mean"), name=name)
    export = CheckpointExport(DEMO, plan, random_statistics(DEMO.architecture, seed))
    return PlannedModel(ModelSpec(name, "expert", "experts", {name: 1.0}, PlanSettings()), export)


def silent(steps: Iterable[int], *_: object) -> Iterable[int]:
    """Show no progress."""
    return steps


@pytest.mark.ray
def test_experts_are_gguf_files_too_by_which_llama_cpp_answers_alike(cluster, tmp_path):
    run = Run(tmp_path)
    settings = config().export.model_copy(update={"gguf_type": "F32"})
    models = [planned("arithmetic", 1), planned("logic", 2)]
    checkpoints = write_checkpoints(models, settings, run, silent)

    folder = run.expert(0.5, "arithmetic")
    file = folder / "model-F32.gguf"
    manifest = json.loads((folder / "seap.json").read_text())
    assert manifest["gguf"] == {"file": file.name, "architecture": "deci", "type": "F32"}
    assert manifest["files"][file.name] == {"digest": digest_of_file(file), "bytes": file.stat().st_size}
    assert (folder / "Modelfile").read_text().startswith("FROM ./model-F32.gguf\nPARAMETER num_ctx 256\n")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    preset = (tmp_path / "experts" / "llama-server.ini").read_text()
    assert "[0.50/logic]\nmodel = 0.50/logic/model-F32.gguf\n" in preset
    assert all(checkpoint.artifact.is_made() for checkpoint in checkpoints)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama_cpp = LlamaCpp(file)
    for row in skills.rows("arithmetic", 20, split="test", seed=0):
        prompt = tokenizer(row["question"])["input_ids"]
        assert llama_cpp.tokenize(row["question"]) == prompt
        assert llama_cpp.greedy(prompt, 12).tokens == greedy(model, prompt, 12).tokens

    # A file that was cut short is found by its size, and whole ones stay.
    other = run.expert(0.5, "logic") / file.name
    written = other.stat().st_mtime_ns
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    write_checkpoints(models, settings, run, silent)
    assert file.read_bytes() == content and other.stat().st_mtime_ns == written

    # Another type is another file, of the same weights.
    write_checkpoints(models[:1], config().export, run, silent)
    assert not file.exists() and (folder / "model-Q8_0.gguf").is_file()


def test_a_base_that_llama_cpp_does_not_have_is_refused_before_any_work(dense):
    with pytest.raises(ConfigError, match="gguf is not for opt, which llama.cpp does not have; use export.format=seap"):
        check_config(config(dense("opt")), check_evaluation_rows=False)
    with pytest.raises(ConfigError, match="llama, deci: no sliding window"):
        check_config(config(dense("mistral")), check_evaluation_rows=False)


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_before_any_work(dense, tmp_path):
    folder = shutil.copytree(DEMO.folder, tmp_path / "model")
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ConfigError, match="llama.cpp does not have its vocabulary of whole words"):
        check_config(config(folder), check_evaluation_rows=False)
    check_config(config(folder, format_="seap"), check_evaluation_rows=False)


def test_biases_that_llama_cpp_does_not_hold_are_refused_by_their_key(dense):
    with pytest.raises(
        ConfigError, match=r"pruning.compensation: mean is a bias, and llama.cpp has no qwen3 with bias"
    ):
        check_config(config(dense("qwen3"), compensation="mean"), check_evaluation_rows=False)
    check_config(config(dense("llama_gqa"), compensation="mean"), check_evaluation_rows=False)


def test_a_file_too_large_for_a_bucket_is_refused(monkeypatch):
    monkeypatch.setattr(preflight, "MAX_S3_COPY_BYTES", DEMO.parameters)
    in_bucket = config(storage="s3://bucket/runs").model_copy(
        update={"export": Config(export={"format": "gguf", "max_shard_size": "1MB"}).export}
    )
    with pytest.raises(ConfigError, match=r"^export.format: gguf is one file, which in a bucket may have 5GB at most"):
        check_config(in_bucket, check_evaluation_rows=False)


def test_other_formats_are_not_looked_at(dense):
    check_gguf_base(config(dense("opt"), format_="seap"), Checkpoint.open(str(dense("opt"))))
    assert gguf_note(config(format_="seap"), DEMO.architecture) is None
    assert gguf_item_bytes(config(format_="stock")) == 0


def tied(folder: Path, target: Path) -> Path:
    """Return a copy of a model whose head is the embedding."""
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text()) | {"tie_word_embeddings": True}
    (target / "config.json").write_text(json.dumps(content))
    tensors = load_file(target / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_widths_are_equal_where_the_format_wants_them(dense, tmp_path):
    llama = Checkpoint.open(str(dense("llama_gqa"))).architecture
    own_head = Checkpoint.open(str(dense("qwen3"))).architecture
    tied_head = Checkpoint.open(str(tied(dense("qwen3"), tmp_path / "tied"))).architecture

    assert not is_uniform(config(), llama, adds_biases=True)
    assert is_uniform(config(), own_head, adds_biases=False)
    assert not is_uniform(config(), tied_head, adds_biases=False)
    assert is_uniform(config(format_="stock"), llama, adds_biases=False)
    assert not is_uniform(config(format_="seap"), own_head, adds_biases=False)


def test_widths_that_do_not_suit_a_type_are_said():
    wide = replace(DEMO.architecture, hidden_size=2048)
    assert gguf_note(config(align=256), wide) is None
    assert gguf_note(config(align=128), wide).startswith("gguf: for K-quants by llama-quantize set pruning.align=256;")
    assert "rows of 160 weights are no multiple of 256" in gguf_note(config(), DEMO.architecture)
    assert "rows of 48 weights are no multiple of 32" in gguf_note(config(), replace(wide, hidden_size=48))


def test_the_disk_that_a_run_needs_counts_the_files():
    model = ModelSize.from_checkpoint(DEMO)
    plain, more = (config(format_=format_) for format_ in ("seap", "gguf"))
    added = disk_needs(model, more, largest_corpora(more, model.architecture)).checkpoints
    added -= disk_needs(model, plain, largest_corpora(plain, model.architecture)).checkpoints
    # A general model and an expert for each task.
    n_models = (1 + len(plain.tasks)) * len(plain.pruning.ratio)
    assert 0.5 * n_models * model.parameters * 34 / 32 < added < n_models * model.parameters * 34 / 32


def test_a_preset_names_finished_experts_alone(tmp_path):
    run = Run(tmp_path)
    for ratio, name, about in (
        ("0.20", "logic", {"gguf": {"file": "m.gguf"}}),
        ("0.20", "old", {}),
        ("0.50", "a", None),
    ):
        folder = tmp_path / "experts" / ratio / name
        folder.mkdir(parents=True)
        if about is not None:
            (folder / "seap.json").write_text(json.dumps(about))
    hidden = tmp_path / "experts" / "0.20" / ".logic.123.partial"
    shutil.copytree(tmp_path / "experts" / "0.20" / "logic", hidden)

    write_preset(run)
    text = (tmp_path / "experts" / "llama-server.ini").read_text()
    assert "[0.20/logic]\nmodel = 0.20/logic/m.gguf\n" in text and text.count("[") == 1
