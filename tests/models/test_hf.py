"""Experts in transformers and peft: every class that the family has, and what these libraries do with a model."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    StaticCache,
)
from transformers.utils import logging as transformers_logging

from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import decoder_of
from tests.support.builders import (
    CONFIGS,
    MIXTURES,
    load,
    logits,
    random_ids,
    random_plan,
    random_statistics,
    save_dense,
    write_compacted,
)
from tests.support.elsewhere import WITHOUT_SEAP_RAY

TAGGED = [name for name in CONFIGS if name not in ("gemma3", "opt")]
"""Models of families that transformers has a class of for classifying tokens."""


@pytest.fixture(scope="module")
def expert(dense, tmp_path_factory):
    """``expert(name)``: a compacted random model, other widths in every layer and an output bias where it was cut."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            base = Checkpoint.open(str(dense(name)))
            plan = random_plan(base.architecture, 3, "mean")
            export = CheckpointExport(base, plan, random_statistics(base.architecture, 3))
            made[name] = write_compacted(export, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def load_as(auto_class: Any, folder: Path, **settings: Any) -> Any:
    return auto_class.from_pretrained(folder, dtype="auto", experts_implementation="eager", **settings).eval()


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_model_without_a_head_gives_the_hidden_states_that_the_head_would_see(expert, name):
    model = load_as(AutoModel, expert(name))
    assert type(model).__name__.endswith("Model") and type(model).__module__ == "seap_ray.models.hf.modeling_seap"
    expected = load(expert(name), attn_implementation=model.config._attn_implementation).base_model(random_ids())
    assert torch.equal(model(random_ids()).last_hidden_state, expected.last_hidden_state)


CLASSIFIERS = [
    *((name, AutoModelForSequenceClassification) for name in CONFIGS),
    *((name, AutoModelForTokenClassification) for name in TAGGED),
]


@pytest.mark.parametrize(("name", "auto_class"), CLASSIFIERS, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_a_classifier_has_the_experts_layers_and_is_new_in_its_head_alone(expert, name, auto_class):
    settings = {"dtype": "auto", "experts_implementation": "eager", "num_labels": 3, "output_loading_info": True}
    model, loading = auto_class.from_pretrained(expert(name), **settings)
    model.eval()
    missing = {key.partition(".")[0] for key in loading["missing_keys"]}
    assert missing in ({"score"}, {"classifier"}) and not loading["mismatched_keys"]
    assert set(loading["unexpected_keys"]) <= {"lm_head.weight", "embed_out.weight"}

    layers = decoder_of(model.base_model).layers
    expected = [layer.num_attention_heads for layer in AutoConfig.from_pretrained(expert(name)).per_layer_config]
    attentions = [getattr(layer, "attention", None) or layer.self_attn for layer in layers]
    outputs = [getattr(attention, "o_proj", None) or attention.get_submodule(OUTPUTS[name]) for attention in attentions]
    assert [output.in_features // model.config.head_dim for output in outputs] == expected

    of_base = load(expert(name), attn_implementation=model.config._attn_implementation).base_model(random_ids())
    assert torch.equal(model.base_model(random_ids()).last_hidden_state, of_base.last_hidden_state)
    assert model(random_ids()).logits.shape[-1] == 3


OUTPUTS = {"opt": "out_proj", "gpt_neox": "dense"}
"""Modules behind the heads, where they are not called o_proj."""


@pytest.mark.parametrize(("name", "auto_class"), CLASSIFIERS, ids=lambda value: getattr(value, "__name__", value))
def test_config_json_names_every_class_that_there_is(expert, name, auto_class):
    auto_map = json.loads((expert(name) / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM", auto_class.__name__} <= auto_map.keys()
    assert ("AutoModelForTokenClassification" in auto_map) == (name in TAGGED)


# --- widths ----------------------------------------------------------------------------------------------------------


def test_a_width_of_the_whole_model_is_the_dense_models_and_a_layers_is_its_own(expert, dense, caplog):
    transformers_logging.enable_propagation()
    try:
        config = AutoConfig.from_pretrained(expert("llama_gqa"))
        load(expert("llama_gqa"))
        assert not caplog.records, "loading reads none of them"
        assert config.num_attention_heads == AutoConfig.from_pretrained(dense("llama_gqa")).num_attention_heads == 12
        assert "per-layer attribute `num_attention_heads`" in caplog.text, "transformers warns"
    finally:
        transformers_logging.disable_propagation()
    by_file = Checkpoint.open(str(expert("llama_gqa"))).architecture.layers
    assert [layer.num_attention_heads for layer in config.per_layer_config] == [layer.shape.heads for layer in by_file]


# --- saved again -----------------------------------------------------------------------------------------------------

ELSEWHERE = (
    WITHOUT_SEAP_RAY
    + """
import torch
import transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folders, out = json.loads(sys.argv[1])
ids_BT, results = load_file(out + "/ids")["ids"], {}
for key, (auto_class, folder) in folders.items():
    settings = {"dtype": "auto", "experts_implementation": "eager", "trust_remote_code": True}
    model = getattr(transformers, auto_class).from_pretrained(folder, **settings).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[key] = model(ids_BT)[0].clone()
assert not [name for name in sys.modules if name.split(".")[0] == "seap_ray"]
save_file(results, out + "/results")
"""
)
SAVED = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")


@pytest.fixture(scope="module")
def saved(expert, tmp_path_factory):
    """Folders of ``save_pretrained``, what their models compute here, and in a process without seap_ray, by name."""
    root = tmp_path_factory.mktemp("saved")
    save_file({"ids": random_ids()}, root / "ids")
    here: dict[str, torch.Tensor] = {}
    folders: dict[str, tuple[str, str]] = {}
    for name in CONFIGS:
        for auto_class in SAVED:
            key = f"{name}_{auto_class}"
            model = load_as(getattr(sys.modules["transformers"], auto_class), expert(name))
            model.save_pretrained(root / key)
            folders[key] = (auto_class, str(root / key))
            with torch.no_grad():
                here[key] = model(random_ids())[0]

    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, json.dumps([folders, str(root)])],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return root, here, load_file(root / "results")


@pytest.mark.parametrize("auto_class", SAVED)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_is_saved_again_loads_on_a_machine_without_seap_ray(saved, name, auto_class):
    root, here, elsewhere = saved
    key = f"{name}_{auto_class}"
    assert {"configuration_seap.py", "modeling_seap.py"} <= {file.name for file in (root / key).iterdir()}
    torch.testing.assert_close(elsewhere[key], here[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_is_saved_again_is_an_expert_that_can_be_served_and_pruned(saved, expert, name):
    folder = saved[0] / f"{name}_AutoModelForCausalLM"
    check_folder(folder)
    assert Checkpoint.open(str(folder)).architecture == Checkpoint.open(str(expert(name))).architecture


# --- what transformers does with a model -----------------------------------------------------------------------------


def generated(model: Any, **settings: Any) -> torch.Tensor:
    return model.generate(
        random_ids(1, 9), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **settings
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_changes_no_token(expert, name):
    model = load(expert(name))
    cache = StaticCache(model.config, max_cache_len=32)
    with_static = generated(model, past_key_values=cache)
    assert torch.equal(with_static, generated(model))
    heads = [layer.keys.shape[1] for layer in cache.layers]
    assert heads == [layer.shape.groups for layer in Checkpoint.open(str(expert(name))).architecture.layers]


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "phi3", "mixtral", "opt"])
def test_an_expert_drafts_for_its_dense_model(expert, dense, name):
    model = load(dense(name))
    assert torch.equal(generated(model, assistant_model=load(expert(name))), generated(model))


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "mixtral"])
def test_an_exported_program_computes_the_same(expert, name):
    # The eager loop over MoE experts depends on the data, in the dense model as well.
    implementation = {"experts_implementation": "batched_mm"} if name in MIXTURES else {}
    model = AutoModelForCausalLM.from_pretrained(expert(name), **implementation).eval()
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": random_ids(), "use_cache": False})
        result = program.module()(input_ids=random_ids(), use_cache=False).logits
    torch.testing.assert_close(result, logits(model, random_ids()), rtol=0, atol=1e-5)


def test_a_whole_model_of_more_layers_than_dynamo_recompiles_a_function_compiles_as_one_graph(tmp_path, monkeypatch):
    config = CONFIGS["llama_gqa"]()
    config.num_hidden_layers = 10
    monkeypatch.setitem(CONFIGS, "deep", lambda: config)
    save_dense(tmp_path / "dense", "deep", torch.float32)
    base = Checkpoint.open(str(tmp_path / "dense"))
    plan = random_plan(base.architecture, 3, "mean")
    export = CheckpointExport(base, plan, random_statistics(base.architecture, 3))
    model = load(write_compacted(export, tmp_path / "expert"))
    assert len(set(plan.shapes)) > torch._dynamo.config.recompile_limit

    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        result = whole(random_ids(), use_cache=False).logits
    torch.testing.assert_close(result, logits(model, random_ids()), rtol=0, atol=1e-5)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_is_trained_saved_merged_and_saved_as_a_whole(expert, tmp_path, name):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(expert(name)), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(random_ids(), labels=random_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval().save_pretrained(tmp_path / "adapter")
    trained = logits(model, random_ids())
    again = PeftModel.from_pretrained(load(expert(name)), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, random_ids()), trained)

    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    check_folder(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), random_ids()), logits(merged, random_ids()))
    torch.testing.assert_close(logits(merged, random_ids()), trained, rtol=1e-4, atol=1e-4)


def test_a_configuration_from_another_process_lets_models_be_built_there(expert):
    """vLLM hands configurations to its engines pickled, and none is made anew in these processes."""
    read = "import pickle, sys; from seap_ray.models.hf.shapes import declared; "
    count = f"{read} print(len(declared(pickle.load(sys.stdin.buffer))))"
    config = AutoConfig.from_pretrained(expert("llama_gqa"))
    found = subprocess.run([sys.executable, "-c", count], input=pickle.dumps(config), capture_output=True, check=True)
    assert int(found.stdout) > 20
