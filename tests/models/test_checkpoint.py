"""Compacted checkpoints: what they compute, that they load everywhere, what lies in the folder, what is refused."""

import copy
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import seap_ray.models.hf  # noqa: F401  (registers the classes that load a compacted checkpoint)
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.core.refused_families import WHY_REFUSED
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.models import checkpoint as checkpoint_module
from seap_ray.models import export as export_module
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import SHARED, CheckpointExport, check_stock, finish, parse_size, write_tensors
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import decoder_of
from tests.support import ROOT
from tests.support.builders import (
    CONFIGS,
    MIXTURES,
    load,
    logits,
    random_covariances,
    random_ids,
    random_kept,
    random_plan,
    random_statistics,
    uniform_plan,
    write_compacted,
)
from tests.support.elsewhere import WITHOUT_SEAP_RAY
from tests.support.oracles import (
    columns,
    narrow_experts,
    replaced_mean,
    sites,
    tensors_of,
    with_replaced_activations,
    with_split_products,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def export_of(folder: Path, compensation: str = "none", seed: int = 0) -> CheckpointExport:
    base = Checkpoint.open(str(folder))
    plan = random_plan(base.architecture, seed, compensation)
    return CheckpointExport(base, plan, random_statistics(base.architecture, seed))


# --- oracles: the dense model, changed in place ----------------------------------------------------------------------


def inputs_of(model_type: str, kept: Kept, dense: Shape, head_dim: int) -> dict[str, dict[str, list[int]]]:
    """Kept rows of every module before ``o_proj`` and ``down_proj``, by site, written out family by family."""
    heads, groups, channels = columns(kept.heads, head_dim), columns(kept.groups, head_dim), list(kept.channels[0])
    match model_type:
        case "phi3":
            after_queries, after_keys = dense.heads * head_dim, (dense.heads + dense.groups) * head_dim
            keys, values = [after_queries + row for row in groups], [after_keys + row for row in groups]
            ups = [dense.channels + row for row in channels]
            return {
                "attn": {"self_attn.qkv_proj": heads + keys + values},
                "mlp": {"mlp.gate_up_proj": channels + ups},
            }
        case "gpt_neox":
            return {
                "attn": {"attention.query_key_value": columns(kept.heads, 3 * head_dim)},
                "mlp": {"mlp.dense_h_to_4h": channels},
            }
    attention = {"self_attn.q_proj": heads, "self_attn.k_proj": groups, "self_attn.v_proj": groups}
    if model_type == "opt":
        return {"attn": attention, "mlp": {"fc1": channels}}
    return {"attn": attention, "mlp": {"mlp.gate_proj": channels, "mlp.up_proj": channels}}


def linear_of(weight_OD: torch.Tensor, bias_O: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=bias_O is not None, dtype=weight_OD.dtype)
    linear.weight = nn.Parameter(weight_OD.clone())
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.clone())
    return linear


@torch.no_grad()
def with_smaller_layers(model: Any, export: CheckpointExport) -> Any:
    """Every Linear replaced by one of the kept rows or columns, as a pruning script without files would do it."""
    plan, architecture = export.plan, export.base.architecture
    head_dim = architecture.head_dim
    for layer, site, linear, kept, cut in list(sites(model, plan, head_dim)):
        block, of = decoder_of(model).layers[layer], plan.kept[layer]
        bias_O = linear.bias
        # In a mixture attention alone gets a bias.
        has_bias = site == "attn" or not architecture.n_experts
        if plan.compensation.name == "mean" and has_bias and of.shape != architecture.layers[layer].shape:
            bias_O = linear.weight[:, cut].double() @ replaced_mean(export, layer, site)[cut]
            bias_O = bias_O if linear.bias is None else bias_O + linear.bias.double()
            bias_O = bias_O.to(linear.weight.dtype)
        name = next(name for name, module in block.named_modules() if module is linear)
        block.set_submodule(name, linear_of(linear.weight[:, kept], bias_O))
        if site == "attn":
            attention = block.attention if hasattr(block, "attention") else block.self_attn
            attention.num_key_value_groups = len(of.heads) // len(of.groups)
            attention.num_heads = len(of.heads)
            attention.num_key_value_heads = len(of.groups)
            if hasattr(attention, "qkv_proj"):
                attention.config = copy.copy(attention.config)
                attention.config.num_attention_heads = len(of.heads)
        for name, indices in inputs_of(model.config.model_type, of, architecture.dense, head_dim)[site].items():
            old = block.get_submodule(name)
            block.set_submodule(name, linear_of(old.weight[indices], None if old.bias is None else old.bias[indices]))
    narrow_experts(model, plan)
    return model


# --- what a compacted model computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compacted_equals_the_dense_model_with_cut_activations_replaced(
    dense, tmp_path, float64_norms, name, compensation
):
    source, ids_BT = dense(name, torch.float64), random_ids()
    export = export_of(source, compensation, seed=1)
    compacted = logits(load(write_compacted(export, tmp_path)), ids_BT)
    replaced = logits(with_replaced_activations(load(source), export), ids_BT)
    assert compacted.dtype == torch.float64
    # Not exactly zero: BLAS adds in another order for another width.
    assert (compacted - replaced).abs().max() < 1e-12
    assert (compacted - logits(load(source), ids_BT)).abs().max() > 0.1


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compacted_equals_it_exactly_where_sums_keep_their_order(
    dense, tmp_path, float64_norms, ordered_sums, name, compensation
):
    # 16 positions: elementwise functions treat the rest of a SIMD vector in another way, and widths differ.
    source, ids_BT = dense(name, torch.float64), random_ids(2, 8)
    export = export_of(source, compensation, seed=2)
    compacted = logits(load(write_compacted(export, tmp_path)), ids_BT)
    difference = (compacted - logits(with_split_products(load(source), export), ids_BT)).abs().max()
    # Halves of Phi-3's fused products lie in strides of another width, which elementwise functions treat differently.
    assert difference < 1e-13 if name == "phi3" else difference == 0.0


@pytest.mark.parametrize("max_bytes", [10**9, 20_000], ids=["one-file", "files"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_reloaded_equals_pruned_in_memory_bit_for_bit(dense, tmp_path, name, dtype, max_bytes):
    source, ids_BT = dense(name, dtype), random_ids()
    export = export_of(source, "mean", seed=3)
    reloaded = load(write_compacted(export, tmp_path, max_bytes))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (max_bytes < 10**9)
    pruned = with_smaller_layers(load(source), export)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {dtype}
    expected = dict(pruned.named_parameters())
    assert dict(reloaded.named_parameters()).keys() == expected.keys()
    for key, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, expected[key]), key
    assert torch.equal(logits(reloaded, ids_BT), logits(pruned, ids_BT))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_in_several_files_gives_the_same_checkpoint(dense, tmp_path, name):
    whole = export_of(dense(name), "mean")
    parts = export_of(dense(name, torch.float32, "20KB"), "mean")
    assert len({info.file for info in parts.base.tensors.values()}) > 2
    write_compacted(whole, tmp_path / "whole")
    write_compacted(parts, tmp_path / "parts")
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole/config.json").read_bytes() == (tmp_path / "parts/config.json").read_bytes()


@pytest.mark.parametrize("name", ["llama_gqa", "llama_biased", "qwen2"])
def test_generate_works_with_both_kinds_of_cache(dense, tmp_path, name):
    source, ids_BT = dense(name, torch.float64), random_ids(2, 5)
    export = export_of(source, "mean", seed=4)
    model = load(write_compacted(export, tmp_path))
    pruned, greedy_BT = with_smaller_layers(load(source), export), ids_BT
    for _ in range(6):  # no cache at all
        greedy_BT = torch.cat([greedy_BT, logits(pruned, greedy_BT)[:, -1:].argmax(-1)], 1)
    settings = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "suppress_tokens": None}
    model.generation_config.eos_token_id = None
    for cache in ("dynamic", "static"):
        generated = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), cache_implementation=cache, **settings
        )
        assert torch.equal(generated, greedy_BT)


def test_the_attention_implementation_can_be_chosen(dense, tmp_path, float64_norms):
    folder = write_compacted(export_of(dense("llama_gqa", torch.float64), "mean", seed=4), tmp_path)
    model, ids_BT = load(folder), random_ids()
    expected = logits(model, ids_BT)
    for eager in (load(folder, attn_implementation="eager"), model):
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            out = eager(ids_BT, output_attentions=True)
        assert [a.shape[1] for a in out.attentions] == [
            own.num_attention_heads for own in model.config.per_layer_config
        ]
        assert 0 < (out.logits - expected).abs().max() < 1e-5  # eager attention has its softmax in float32


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_saved_and_loaded_again_is_the_same(dense, tmp_path, name):
    model = load(write_compacted(export_of(dense(name), "mean", seed=5), tmp_path / "first"))
    model.save_pretrained(tmp_path / "second")
    again, ids_BT = load(tmp_path / "second"), random_ids()
    assert type(again) is type(model)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_that_cuts_nothing_is_the_identity(dense, tmp_path, name):
    source = dense(name, torch.bfloat16)
    base = Checkpoint.open(str(source))
    plan = uniform_plan(base.architecture, base.architecture.dense, "mean")
    folder = write_compacted(CheckpointExport(base, plan, random_statistics(base.architecture, 0)), tmp_path)
    before, after = tensors_of(source), tensors_of(folder)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8))
    assert torch.equal(logits(load(folder), random_ids()), logits(load(source), random_ids()))


def without_layers(base: Checkpoint, dropped: tuple[int, ...]) -> Plan:
    kept = (Kept.whole(base.architecture, 0),) * (base.architecture.n_layers - len(dropped))
    return Plan("expert", 0.5, COMPENSATIONS["none"], kept, {}, dropped)


@pytest.mark.parametrize("stock", [False, True], ids=["seap", "stock"])
@pytest.mark.parametrize("dropped", [(0,), (1, 2), (0, 1, 3), ()], ids=str)
@pytest.mark.parametrize("name", ["llama_gqa", "llama_biased", "llama_tied", "qwen2"])
def test_without_some_layers_it_equals_the_dense_model_that_skips_them(dense, tmp_path, name, dropped, stock):
    source, ids_BT = dense(name, torch.bfloat16), random_ids()
    base = Checkpoint.open(str(source))
    folder = write_compacted(CheckpointExport(base, without_layers(base, dropped), stock=stock), tmp_path, 20_000)
    check_folder(folder)
    model, skipping = load(folder), load(source)
    for layer in reversed(dropped):
        del skipping.model.layers[layer]
    expected = skipping.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model, ids_BT), logits(skipping, ids_BT))
    assert torch.equal(logits(model, ids_BT), logits(load(source), ids_BT)) == (not dropped)
    model.generation_config.eos_token_id = None
    generated = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=3, do_sample=False)
    assert generated.shape == (3, 20)


@pytest.mark.parametrize("stock", [False, True], ids=["seap", "stock"])
def test_config_without_some_layers_counts_the_others_and_shortens_what_is_listed_by_layer(dense, tmp_path, stock):
    source = Path(shutil.copytree(dense("qwen2"), tmp_path / "base"))
    edit_config(source, eos_token_id=[2, 3, 4, 5], listed_by_layer=["a", "b", "c", "d"], another_list=[1, 2, 3])
    base = Checkpoint.open(str(source))
    folder = write_compacted(CheckpointExport(base, without_layers(base, (0, 2)), stock=stock), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("qwen2" if stock else "seap_qwen2")
    assert config["num_hidden_layers"] == 2
    assert config["layer_types"] == ["full_attention"] * 2
    assert config["listed_by_layer"] == ["b", "d"]
    assert (config["eos_token_id"], config["another_list"]) == ([2, 3, 4, 5], [1, 2, 3])
    assert not config.get("per_layer_config")
    widths = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[key] for key in widths] == [base.config[key] for key in widths]
    loaded = AutoConfig.from_pretrained(folder)
    assert loaded.num_hidden_layers == len(loaded.layer_types) == 2


def test_layers_may_go_and_others_be_cut_and_compensated(dense, tmp_path, float64_norms):
    """No allocation does both; the moments and biases are those of the layer's old number all the same."""
    source, ids_BT = dense("llama_biased", torch.float64), random_ids()
    cut = export_of(source, "mean", seed=8)
    kept, gone = cut.plan.kept, 2
    plan = Plan("expert", 0.5, COMPENSATIONS["mean"], kept[:gone] + kept[gone + 1 :], {}, (gone,))
    without = load(write_compacted(CheckpointExport(cut.base, plan, cut.statistics), tmp_path))
    skipping = with_smaller_layers(load(source), cut)
    del skipping.model.layers[gone]
    assert torch.equal(logits(without, ids_BT), logits(skipping, ids_BT))


# --- what lies in the folder -----------------------------------------------------------------------------------------


def test_config_has_the_dense_widths_and_what_differs_by_layer(dense, tmp_path):
    base = Checkpoint.open(str(dense("llama_gqa")))
    whole = base.architecture.dense
    assert whole == Shape(4, 3, 80)
    kept = (
        Kept((0, 2), (0, 1, 2, 6, 7, 8), (tuple(range(80)),)),
        Kept((0, 1, 2, 3), tuple(range(12)), (tuple(range(80)),)),
        Kept((0, 1, 2, 3), (0, 5, 7, 9), (tuple(range(80)),)),
        Kept((0, 1, 2, 3), tuple(range(12)), ((3, 5, 8),)),
    )
    for compensation in ("none", "mean"):
        plan = Plan("expert", 0.5, COMPENSATIONS[compensation], kept, {})
        folder = write_compacted(CheckpointExport(base, plan, random_statistics(base.architecture, 0)), tmp_path)
        config = json.loads((folder / "config.json").read_text())
        biases = {"o_proj_bias": True, "down_proj_bias": True} if compensation == "mean" else {}
        assert config["per_layer_config"] == {
            "0": {"num_attention_heads": 6, "num_key_value_heads": 2, **biases},
            "2": {"num_attention_heads": 4, **biases},
            "3": {"intermediate_size": 3, **biases},
        }
        assert config["model_type"] == "seap_llama"
        assert config["architectures"] == ["SeapLlamaForCausalLM"]
        assert config["auto_map"] == {
            "AutoConfig": "configuration_seap.SeapLlamaConfig",
            "AutoModel": "modeling_seap.SeapLlamaModel",
            "AutoModelForCausalLM": "modeling_seap.SeapLlamaForCausalLM",
            "AutoModelForSequenceClassification": "modeling_seap.SeapLlamaForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_seap.SeapLlamaForTokenClassification",
        }
        assert (config["o_proj_bias"], config["down_proj_bias"]) == (False, False)
        changed = {"model_type", "architectures", "auto_map", "per_layer_config", "o_proj_bias", "down_proj_bias"}
        changed |= {"allow_global_per_layer_attribute_access"}
        assert {k: v for k, v in config.items() if k not in changed} == {
            k: v for k, v in base.config.items() if k not in changed
        }
        loaded = AutoConfig.from_pretrained(folder)
        assert [own.num_attention_heads for own in loaded.per_layer_config] == [6, 12, 4, 12]
        assert [own.num_key_value_heads for own in loaded.per_layer_config] == [2, 4, 4, 4]
        assert [own.intermediate_size for own in loaded.per_layer_config] == [80, 80, 80, 3]


def test_config_names_what_the_base_left_to_be_derived(dense, tmp_path):
    """Head dimension and key-value heads of a dense config may follow from others, which a cut layer's do not."""
    source = shutil.copytree(dense("llama_mha"), tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]
    (source / "config.json").write_text(json.dumps(config))
    export = export_of(source)
    written = json.loads((write_compacted(export, tmp_path / "out") / "config.json").read_text())
    assert (written["head_dim"], written["num_key_value_heads"]) == (8, 6)
    reference = with_smaller_layers(load(source), export)
    assert torch.equal(logits(load(tmp_path / "out"), random_ids()), logits(reference, random_ids()))


def test_tokenizer_and_generation_config_and_licence_go_along_and_nothing_else(dense, tmp_path):
    source = shutil.copytree(dense("llama_gqa"), tmp_path / "base")
    for name in ("LICENSE.txt", "README.md", "training_args.bin", "special_tokens_map.json", "vocab.json"):
        (source / name).write_text("{}")
    (source / "original").mkdir()
    folder = write_compacted(export_of(source), tmp_path / "out")
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    carried |= {"LICENSE.txt", "special_tokens_map.json", "vocab.json"}
    for name in carried:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    made = {"config.json", "seap.json", "configuration_seap.py", "modeling_seap.py", "model.safetensors.index.json"}
    weights = {file.name for file in folder.glob("*.safetensors")}
    assert {file.name for file in folder.iterdir()} == carried | made | weights


def test_seap_json_is_written_last(dense, tmp_path, monkeypatch):
    export = export_of(dense("llama_gqa"))
    files = export.files(20_000)
    written: list[str] = []
    copy, write = shutil.copyfile, export_module.write_json
    spy = SimpleNamespace(copyfile=lambda source, target: (written.append(Path(source).name), copy(source, target)))
    monkeypatch.setattr(export_module, "shutil", spy)
    monkeypatch.setattr(
        export_module, "write_json", lambda path, value: (written.append(path.name), write(path, value))
    )
    finish(export, tmp_path, files, {"what": "a manifest"})
    assert written[-1] == "seap.json" and written.count("seap.json") == 1
    assert set(written) == {file.name for file in tmp_path.iterdir()}
    assert json.loads((tmp_path / "seap.json").read_text()) == {"what": "a manifest"}


@pytest.mark.parametrize("culprit", ["config.json", "modeling_seap.py", "tokenizer.json"])
def test_no_seap_json_is_left_when_finishing_fails_midway(dense, tmp_path, monkeypatch, culprit):
    export = export_of(dense("llama_gqa"))
    copy, write = shutil.copyfile, export_module.write_json

    def refuse(path):
        if Path(path).name == culprit:
            raise OSError("disk full")

    spy = SimpleNamespace(copyfile=lambda source, target: (refuse(source), copy(source, target)))
    monkeypatch.setattr(export_module, "shutil", spy)
    monkeypatch.setattr(export_module, "write_json", lambda path, value: (refuse(path), write(path, value)))
    with pytest.raises((OSError, IncompleteError), match="disk full"):
        finish(export, tmp_path, export.files(10**9), {})
    assert not list(tmp_path.glob("*seap.json*"))


# --- files -----------------------------------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Header and start of the data of a safetensors file, by the format's definition."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_writer_writes_what_the_safetensors_library_reads(dense, tmp_path, dtype):
    export = export_of(dense("llama_biased", dtype), "mean")
    outputs = export.outputs()
    path = tmp_path / "deep" / "model.safetensors"
    digest = write_tensors(export, outputs, path)
    assert digest == f"blake3:{blake3(path.read_bytes()).hexdigest()}"
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    header, start = header_of(path)
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == [output.name for output in outputs]
    assert start % 8 == 0
    end = 0
    for output in outputs:
        first, last = header[output.name]["data_offsets"]
        assert first == end and (start + first) % dtype.itemsize == 0
        assert last - first == output.n_bytes == math.prod(header[output.name]["shape"]) * dtype.itemsize
        end = last
    assert path.stat().st_size == start + end
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for output in outputs:
            assert torch.equal(file.get_tensor(output.name), torch.cat([*export.pieces(output)]))
            assert file.get_tensor(output.name).dtype == dtype


def test_files_keep_to_their_size_and_hold_every_tensor_once(dense, tmp_path):
    export = export_of(dense("llama_biased"), "mean")
    sizes = {output.name: output.n_bytes for output in export.outputs()}
    for max_bytes in (1, max(sizes.values()), 20_000, sum(sizes.values()) - 1):
        files = export.files(max_bytes)
        assert sorted(output.name for outputs in files.values() for output in outputs) == sorted(sizes)
        shared = {name: outputs for name, outputs in files.items() if name.startswith(SHARED)}
        for group in (shared, {name: outputs for name, outputs in files.items() if name not in shared}):
            n, known = len(group), list(sizes)
            ends = [f"-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
            assert [name[-len(end) :] for name, end in zip(group, ends, strict=True)] == ends or n == 1
            order = [known.index(output.name) for outputs in group.values() for output in outputs]
            assert order == sorted(order)
            for outputs in group.values():
                assert len(outputs) == 1 or 0 < sum(output.n_bytes for output in outputs) <= max_bytes
            neighbours = zip(list(group.values())[:-1], list(group.values())[1:], strict=True)
            assert all(sum(o.n_bytes for o in a) + b[0].n_bytes > max_bytes for a, b in neighbours)
    folder = write_compacted(export, tmp_path, 20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    real = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == real
    assert all(file.stat().st_size <= 20_000 + header_of(file)[1] for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_the_bases_lies_in_files_that_all_experts_of_a_shape_share(dense, tmp_path, name):
    """By name and by bytes; and no module is torn apart, since engines reload modules as a whole."""
    first, second = (export_of(dense(name), "mean", seed=seed) for seed in (1, 2))
    second = replace(second, plan=replace(second.plan, kept=_other_units(first.plan.kept, first.base.architecture)))
    write_compacted(first, tmp_path / "first")
    write_compacted(second, tmp_path / "second")
    shared = {file.name for file in (tmp_path / "first").glob(f"{SHARED}*")}
    assert shared == {file.name for file in (tmp_path / "second").glob(f"{SHARED}*")} and len(shared) == 1
    (file,) = shared
    assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    base, own = tensors_of(dense(name)), load_file(tmp_path / "first" / "model-00001-of-00001.safetensors")
    carried = load_file(tmp_path / "first" / file)
    assert all(torch.equal(tensor, base[key]) for key, tensor in carried.items())
    assert first.base.architecture.family.embedding in carried
    modules = [{key.rpartition(".")[0] for key in of} for of in (carried, own)]
    assert not modules[0] & modules[1]


def _other_units(kept, architecture):
    """Return equal widths, with the last channels instead of those that were kept."""
    n = architecture.dense.channels
    return tuple(
        replace(layer, channels=(tuple(range(n - layer.n_channels, n)),) * len(layer.channels)) for layer in kept
    )


def test_the_same_plan_gives_the_same_bytes(dense, tmp_path):
    for name in ("first", "second"):
        write_compacted(export_of(dense("qwen2"), "mean"), tmp_path / name)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second


def test_tensors_of_other_dtypes_stay_as_they_are_and_buffers_of_old_checkpoints_go(dense, tmp_path):
    """Old Llama checkpoints carry rotary frequencies, which nothing reads; some keep their norms in float32."""
    source = shutil.copytree(dense("llama_biased", torch.bfloat16), tmp_path / "base")
    tensors = tensors_of(source)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(5) for i in range(4)}
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    save_file({**tensors, **extra, **norms}, source / "model.safetensors", metadata={"format": "pt"})
    written = tensors_of(write_compacted(export_of(source, "mean"), tmp_path / "out"))
    assert not written.keys() & extra.keys()
    for name, tensor in norms.items():
        assert written[name].dtype == torch.float32 and torch.equal(written[name], tensor)
    assert written["model.layers.3.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_write_that_fails_leaves_no_file(dense, tmp_path, monkeypatch):
    export = export_of(dense("llama_gqa"))
    outputs, pieces = export.outputs(), CheckpointExport.pieces

    def failing(self, output):
        if output.name == outputs[5].name:
            raise ZeroDivisionError
        return pieces(self, output)

    monkeypatch.setattr(CheckpointExport, "pieces", failing)
    with pytest.raises(ZeroDivisionError):
        write_tensors(export, outputs, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


MEASURE = """
import ctypes, json, sys
from math import prod
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, write_tensors
from seap_ray.core.moments import Moments
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan

def memory(key):  # not getrusage: its peak outlives exec, and so begins with that of the parent process
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

source, out = sys.argv[1:]
base = Checkpoint.open(source)
whole, layers = base.architecture.dense, range(base.architecture.n_layers)
kept = Kept(tuple(range(0, whole.groups, 2)),
            tuple(h for h in range(whole.heads) if h // whole.heads_per_group % 2 == 0),
            (tuple(range(0, whole.channels, 2)),))
widths = {"attn": whole.heads * base.architecture.head_dim, "mlp": whole.channels}
statistics = {(layer, site): Moments(1, *torch.rand(2, n, dtype=torch.float64))
              for layer in layers for site, n in widths.items()}

def growth(work):
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, but not given back, would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    start = memory("VmRSS")
    work()
    return memory("VmHWM") - start

def write(compensation, is_written=lambda output: True):
    plan = Plan("expert", 0.5, COMPENSATIONS[compensation], (kept,) * len(layers), {})
    export = CheckpointExport(base, plan, statistics)
    outputs = [output for output in export.outputs() if is_written(output)]
    write_tensors(export, outputs, Path(out) / "model.safetensors")

def read():
    return [tensor.view(-1)[::64].float().sum() for tensor in load_file(Path(source, "model.safetensors")).values()]

write("mean", lambda output: output.n_bytes < 10**4)  # libraries are read in when they first run
grown = {"none": growth(lambda: write("none")), "mean": growth(lambda: write("mean")), "whole": growth(read)}
print(json.dumps(grown))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_of_writing_is_a_few_tensors_whatever_the_size_of_the_model(tmp_path):
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    noise = torch.randn(max(shape.numel() for shape in shapes.values()), dtype=torch.bfloat16)
    tensors = {name: noise[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}
    total, largest = (of(tensor.nbytes for tensor in tensors.values()) for of in (sum, max))
    assert total > 195e6 and largest < 9e6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del tensors
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, tmp_path / "out"],
        cwd=ROOT,
        # A fixed threshold: else glibc keeps freed tensors on its heap, more or fewer by the run.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    grown = json.loads(measured.stdout)
    print({key: value / 1e6 for key, value in grown.items()}, largest / 1e6, total / 1e6)
    few = 4e6
    assert grown["none"] < 3 * largest + few
    in_float64 = 2 * largest  # the cut half of a bfloat16 tensor, four times as wide, times its means
    assert grown["mean"] < 3 * largest + in_float64 + few
    assert grown["whole"] > 0.9 * total  # so would be seen what is not


# --- other processes -------------------------------------------------------------------------------------------------

ELSEWHERE = (
    WITHOUT_SEAP_RAY
    + """
try:
    import seap_ray
    raise SystemExit("seap_ray can be imported")
except ImportError:
    pass
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
jobs, ids, out = sys.argv[1:]
ids_BT, results, logits = load_file(ids)["ids"], {}, {}
for key, (folder, trust) in json.loads(jobs).items():
    try:
        settings = {"dtype": "auto", "experts_implementation": "eager", "trust_remote_code": trust}
        model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            logits[key] = model(ids_BT).logits
        text = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)("abc 12")["input_ids"]
        results[key] = {"module": type(model).__module__, "class": type(model).__name__, "text": text,
                        "parameters": {n: list(p.shape) for n, p in model.named_parameters()}}
    except Exception as error:
        results[key] = {"error": f"{type(error).__name__}: {error}"}
assert not [name for name in sys.modules if name.split(".")[0] == "seap_ray"]
save_file(logits, out + ".safetensors")
open(out + ".json", "w").write(json.dumps(results))
"""
)
STOCK = {
    "llama_mha": Shape(4, 1, 50),
    "llama_gqa": Shape(2, 3, 50),
    "llama_biased": Shape(2, 2, 50),
    "llama_tied": Shape(2, 2, 50),
    "qwen2": Shape(2, 2, 50),
    "mistral": Shape(2, 2, 50),
    "qwen3": Shape(2, 2, 50),
    "gemma2": Shape(2, 2, 50),
    "gemma3": Shape(2, 2, 50),
    "phi3": Shape(4, 2, 50),  # whose long rope tells the head size by the number of heads
    "mixtral": Shape(2, 2, 50),
    "qwen3_moe": Shape(2, 2, 50),
    "opt": Shape(6, 1, 50),  # whose heads, and NeoX's, cannot go
    "gpt_neox": Shape(3, 1, 50),
}
"""Widths whose heads divide the hidden size of 48."""
ORDINARY = {
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
"""Classes that a stock checkpoint of the family is of; a Llama where it is not named."""
NO_BIASES = ("mistral", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")
"""Families (this Mistral has windows) that have none in a stock checkpoint, so that nothing can be compensated."""
LINEAR = "least_squares_without_bias"
STOCK_EXPORTS = [
    (name, compensation)
    for name in CONFIGS
    for compensation in ("none", "mean", LINEAR)
    if compensation != "mean" or name not in NO_BIASES
]
CODED = dict(zip(CONFIGS, cycle(DTYPES), strict=False))


def uniform_export(source: Path, compensation: str, *, stock: bool) -> CheckpointExport:
    base = Checkpoint.open(str(source))
    shape = STOCK[next(name for name in STOCK if source.name.startswith(name))]
    plan = uniform_plan(base.architecture, shape, compensation)
    check_stock(plan, base.architecture)
    random_of = random_covariances if compensation == LINEAR else random_statistics
    return CheckpointExport(base, plan, random_of(base.architecture, 7), stock=stock)


@pytest.fixture(scope="module")
def elsewhere(dense, tmp_path_factory) -> Any:
    """All checkpoints that other processes must load, and what one without seap_ray made of them, in one go."""
    root = tmp_path_factory.mktemp("elsewhere")
    ids_BT = random_ids()
    folders: dict[str, Path] = {}
    for name, dtype in CODED.items():
        folders[name] = write_compacted(export_of(dense(name, dtype), "mean", 6), root / name, 40_000)
    for name, compensation in STOCK_EXPORTS:
        folder = root / f"stock {name} {compensation}"
        folders[folder.name] = write_compacted(uniform_export(dense(name), compensation, stock=True), folder)
    jobs = {key: (str(folder), not key.startswith("stock")) for key, folder in folders.items()}
    jobs["refused"] = (str(folders["llama_gqa"]), False)
    save_file({"ids": ids_BT}, root / "ids.safetensors")
    (root / "elsewhere.py").write_text(ELSEWHERE)
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", root / "elsewhere.py", json.dumps(jobs), root / "ids.safetensors", root / "out"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "out.json").read_text())
    return SimpleNamespace(
        folders=folders,
        ids_BT=ids_BT,
        results=results,
        logits=load_file(root / "out.safetensors"),
        errors={key: result["error"] for key, result in results.items() if "error" in result},
        said=done.stdout + done.stderr,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_process_without_seap_ray_computes_the_same_with_the_code_in_the_folder(elsewhere, name):
    assert name not in elsewhere.errors, elsewhere.errors[name]
    assert elsewhere.results[name]["module"].startswith("transformers_modules.")
    here = load(elsewhere.folders[name])
    assert type(here).__module__ == "seap_ray.models.hf.modeling_seap"
    assert elsewhere.logits[name].dtype == CODED[name]
    assert torch.equal(elsewhere.logits[name], logits(here, elsewhere.ids_BT))
    tokenizer = AutoTokenizer.from_pretrained(elsewhere.folders[name])
    assert elsewhere.results[name]["text"] == tokenizer("abc 12")["input_ids"]


def test_a_process_without_seap_ray_refuses_code_that_it_was_not_told_to_trust(elsewhere):
    assert "trust_remote_code" in elsewhere.errors["refused"]
    assert set(elsewhere.errors) == {"refused"}


def test_no_weight_is_missing_or_left_over_elsewhere(elsewhere):
    for key, folder in elsewhere.folders.items():
        stored = {
            name.replace("embed_out", "lm_head"): list(tensor.shape) for name, tensor in tensors_of(folder).items()
        }
        loaded = elsewhere.results[key]["parameters"]
        if any(".experts." in name for name in stored):  # which are one tensor in the model
            stored, loaded = (sum(map(prod, of.values())) for of in (stored, loaded))
        assert loaded == stored
    for word in ("newly initialized", "MISSING", "UNEXPECTED", "MISMATCH"):
        assert word not in elsewhere.said


@pytest.mark.parametrize("name, compensation", STOCK_EXPORTS)
def test_a_stock_export_is_an_ordinary_checkpoint_that_computes_the_same(
    dense, elsewhere, tmp_path, name, compensation
):
    key = f"stock {name} {compensation}"
    assert key not in elsewhere.errors, elsewhere.errors[key]
    # Qwen2 has no biases to hold the compensation, and is otherwise a Llama.
    of_llama = name not in ORDINARY or (name, compensation) == ("qwen2", "mean")
    assert elsewhere.results[key]["class"] == ("LlamaForCausalLM" if of_llama else ORDINARY[name])
    assert elsewhere.results[key]["module"].startswith("transformers.models.")
    config = json.loads((elsewhere.folders[key] / "config.json").read_text())
    assert not {"per_layer_config", "auto_map", "o_proj_bias"} & config.keys()
    if of_llama:
        biased = compensation == "mean" or name == "llama_biased"
        assert (config["attention_bias"], config["mlp_bias"]) == (biased, biased)
    assert not list(elsewhere.folders[key].glob("*.py"))
    seap = load(write_compacted(uniform_export(dense(name), compensation, stock=False), tmp_path))
    assert torch.equal(elsewhere.logits[key], logits(seap, elsewhere.ids_BT))
    if compensation == LINEAR:
        # The repair is in the weights, and in no tensor more than without one.
        bare = elsewhere.folders[f"stock {name} none"]
        assert not torch.equal(elsewhere.logits[key], elsewhere.logits[bare.name])
        assert tensors_of(elsewhere.folders[key]).keys() == tensors_of(bare).keys()


def test_a_stock_export_names_the_class_that_vllm_knows_and_published_checkpoints_name(dense, tmp_path):
    base = Checkpoint.open(str(dense("phimoe")))
    plan = uniform_plan(base.architecture, replace(base.architecture.dense, channels=8))
    folder = write_compacted(CheckpointExport(base, plan, stock=True), tmp_path / "stock")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["PhiMoEForCausalLM"]


# --- stock exports that cannot be ------------------------------------------------------------------------------------


def test_an_uneven_plan_has_no_stock_export(dense):
    architecture = Checkpoint.open(str(dense("llama_gqa"))).architecture
    even = uniform_plan(architecture, Shape(2, 3, 50))
    check_stock(even, architecture)
    for layer, shape in [(2, Shape(2, 3, 49)), (3, Shape(1, 3, 50)), (1, Shape(2, 2, 50))]:
        kept = list(even.kept)
        kept[layer] = random_kept(architecture.dense, shape, random.Random(0))
        with pytest.raises(ConfigError, match=rf"equal widths, but layer {layer} of expert"):
            check_stock(Plan("expert", 0.5, COMPENSATIONS["none"], tuple(kept), {}), architecture)


@pytest.mark.parametrize("name", NO_BIASES)
def test_a_compensated_stock_export_of_a_family_without_biases_is_refused(dense, name):
    # In a mixture of experts compensation adds none to the MLP.
    modules = "self_attn.o_proj" if name in MIXTURES else "self_attn.o_proj and mlp.down_proj"
    with pytest.raises(ConfigError, match=f"a stock .* has no biases on {modules}; use pruning.bias=false, or export"):
        uniform_export(dense(name), "mean", stock=True)


def test_buffers_of_old_checkpoints_are_no_weights(dense, tmp_path):
    folder = Path(shutil.copytree(dense("gpt_neox"), tmp_path / "base"))
    plain = Checkpoint.open(str(folder))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(4):
        prefix = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(str(folder))
    assert base.tensors.keys() == plain.tensors.keys() and base.parameters == plain.parameters
    export = CheckpointExport(base, random_plan(base.architecture, 1, "mean"), random_statistics(base.architecture, 1))
    assert load(write_compacted(export, tmp_path / "out")).num_parameters() < plain.parameters


def test_layers_that_go_as_a_whole_take_their_kind_of_attention_with_them(dense, tmp_path):
    folder = Path(shutil.copytree(dense("gemma2"), tmp_path / "base"))
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    edit_config(folder, layer_types=None)
    base = Checkpoint.open(str(folder))
    plan = Plan("depth", 0.25, COMPENSATIONS["none"], (Kept.whole(base.architecture, 0),) * 3, {}, dropped=(1,))
    assert CheckpointExport(base, plan).config()["layer_types"] == [kinds[layer] for layer in (0, 2, 3)]


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi3"])
def test_heads_of_a_family_without_a_head_size_of_its_own_have_no_stock_export(dense, name):
    architecture = Checkpoint.open(str(dense(name))).architecture
    with pytest.raises(ConfigError, match="heads of one size, .*, so none can go; use pruning.attention_unit=none"):
        check_stock(uniform_plan(architecture, Shape(1, 1, 50)), architecture)


def test_heads_that_do_not_divide_the_hidden_size_have_no_stock_export(dense, tmp_path):
    checkpoint = Checkpoint.open(str(dense("llama_gqa")))
    plan = uniform_plan(checkpoint.architecture, Shape(3, 3, 50))
    with pytest.raises(ConfigError, match="divide the hidden size 48, not 9 as in layer 0 of expert"):
        check_stock(plan, checkpoint.architecture)
    # What for: the family's own config does not take it, while ours does.
    stock = CheckpointExport(checkpoint, plan, stock=True).config()
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        LlamaConfig(**stock)
    load(write_compacted(CheckpointExport(checkpoint, plan), tmp_path))


# --- opening ---------------------------------------------------------------------------------------------------------


def refused(source: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(str(source))
    message = str(caught.value)
    assert message.startswith("model.source: ") or "model " in message or "model." in message
    assert "\n" not in message
    return message


@pytest.fixture
def base(dense, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(dense("llama_gqa"), tmp_path / "base"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for source in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        assert "is not a folder with a model" in refused(source)
    (tmp_path / "file").write_text("")
    assert "is not a folder with a model" in refused(tmp_path / "file")


def test_a_folder_without_config_is_refused(base):
    (base / "config.json").unlink()
    assert refused(base).endswith("has no config.json")


@pytest.mark.parametrize("text", ["{", "", "[]"])
def test_a_torn_config_is_refused(base, text):
    (base / "config.json").write_text(text)
    assert "config.json" in refused(base)


@pytest.mark.parametrize("family", ["gpt2", "t5", "mamba"])
def test_another_family_is_refused(base, family):
    edit_config(base, model_type=family)
    assert f"{family!r} is not supported: {WHY_REFUSED[family]}; supported are llama, mistral, qwen2" in refused(base)


def test_a_quantised_checkpoint_is_refused(base):
    edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refused(base)


def test_weights_in_eight_bits_are_refused(base):
    tensors = tensors_of(base)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors")
    assert f"{name} is F8_E4M3, not one of F64, F32, F16, BF16" in refused(base)


def test_a_missing_weight_file_is_refused_by_name(base, dense, tmp_path):
    (base / "model.safetensors").unlink()
    assert refused(base).endswith("model.safetensors is missing")
    parts = Path(shutil.copytree(dense("llama_gqa", torch.float32, "20KB"), tmp_path / "parts"))
    lost = sorted(parts.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"{lost.name} is missing, which model.safetensors.index.json names" in refused(parts)
    (parts / "model.safetensors.index.json").unlink()
    assert "holds weights under another name (model-0000" in refused(parts)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_torn_index_is_refused(base, text):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(base)


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors", "a/../../other.safetensors", None])
def test_an_index_that_names_a_file_outside_of_the_folder_is_refused(base, name):
    shutil.move(base / "model.safetensors", base.parent / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"model.safetensors.index.json: names the file {name!r}, which does not lie in its folder" in refused(base)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        struct.pack("<Q", 1000) + b'{"a":' + b"[" * 200 + b"]" * 200 + b"}" + b" " * 594,
        b'\x62\0\0\0\0\0\0\0{"model.norm.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    ],
    ids=["longer than the file", "longer than any file", "nested", "a tensor larger than the file"],
)
def test_a_safetensors_header_that_the_file_cannot_hold_is_refused(base, header):
    (base / "model.safetensors").write_bytes(header)
    assert "weights cannot be read" in refused(base)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_are_refused(base, length):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "weights cannot be read" in refused(base)


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_missing_tensor_is_refused_by_name(base, module):
    tensors, name = tensors_of(base), f"model.layers.3.{module}.weight"
    del tensors[name]
    save_file(tensors, base / "model.safetensors")
    assert refused(base).endswith(f"has no tensor {name}, which config.json declares (llama)")


def test_opening_reads_no_weight_and_knows_all_of_them(dense):
    folder = dense("llama_biased", torch.bfloat16, "20KB")
    opened = Checkpoint.open(str(folder))
    tensors = tensors_of(folder)
    assert {name: info.shape for name, info in opened.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {info.dtype for info in opened.tensors.values()} == {"BF16"}
    assert opened.parameters == sum(tensor.numel() for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(opened.read(name), tensor)
    bias = "model.layers.1.mlp.down_proj.bias"
    read = opened.read_bias(1, "mlp.down_proj")
    assert read is not None and torch.equal(read, tensors[bias])
    assert Checkpoint.open(str(dense("llama_gqa"))).read_bias(1, "mlp.down_proj") is None


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_fingerprint_follows_weights_and_config_but_not_the_place(dense, tmp_path, max_shard_size):
    folder = dense("llama_gqa", torch.float32, max_shard_size)
    original = Checkpoint.open(str(folder)).fingerprint
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))
    assert Checkpoint.open(str(copied)).fingerprint == original

    (copied / "README.md").write_text("hello")
    assert Checkpoint.open(str(copied)).fingerprint == original

    for file in sorted(copied.glob("*.safetensors")):
        before, tensors = file.read_bytes(), load_file(file)
        name = sorted(tensors)[-1]
        value = tensors[name].view(-1)[-1]
        tensors[name].view(-1)[-1] = torch.nextafter(value, value + 1)
        save_file(tensors, file, metadata={"format": "pt"})
        assert file.stat().st_size == len(before)
        assert Checkpoint.open(str(copied)).fingerprint != original
        file.write_bytes(before)
        assert Checkpoint.open(str(copied)).fingerprint == original

    edit_config(copied, rms_norm_eps=1e-5)
    assert Checkpoint.open(str(copied)).fingerprint != original


def test_fingerprint_of_a_large_file_sees_its_header_and_its_ends(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "HASHED_WHOLE_BYTES", 1)
    copied = Path(shutil.copytree(dense("llama_gqa"), tmp_path / "copy"))
    path = copied / "model.safetensors"
    original = path.read_bytes()
    seen = {Checkpoint.open(str(copied)).fingerprint}
    for place in (10_000, len(original) // 2, -1):
        changed = bytearray(original)
        changed[place] ^= 1
        path.write_bytes(changed)
        seen.add(Checkpoint.open(str(copied)).fingerprint)
    assert len(seen) == 4


# --- small things ----------------------------------------------------------------------------------------------------


def test_names_are_split_into_layer_module_and_kind(dense):
    split = Checkpoint.open(str(dense("llama_gqa"))).architecture.split
    assert split("model.layers.31.self_attn.q_proj.bias") == (31, "self_attn.q_proj", "bias")
    assert split("model.layers.0.input_layernorm.weight") == (0, "input_layernorm", "weight")
    assert split("model.norm.weight")[0] is None
    assert split("lm_head.weight")[0] is None


def test_tensors_lie_in_the_order_of_the_layers(dense):
    tensors = dict.fromkeys(Checkpoint.open(str(dense("llama_gqa"))).tensors)
    architecture = Architecture.of({**LlamaConfig(num_hidden_layers=12).to_dict()})
    names = sorted([*tensors, *(architecture.tensor(layer, "mlp.up_proj") for layer in (10, 11))], reverse=True)
    ordered = sorted(names, key=lambda name: export_module._natural_order(architecture, name))
    assert ordered[0] == "model.embed_tokens.weight"
    assert set(ordered[-2:]) == {"model.norm.weight", "lm_head.weight"}
    layers = [int(name.split(".")[2]) for name in ordered[1:-2]]
    assert layers == sorted(layers) and layers[-1] == 11


def test_sizes_are_read_as_hugging_face_counts_them():
    assert [parse_size(text) for text in ("5GB", "1.5 MB", "20KB")] == [5 * 10**9, 1_500_000, 20_000]
