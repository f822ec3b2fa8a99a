"""The one contract that all families pass, for those that the other files do not run: calibration, cut, reload, export.

What each test compares is what the same test of ``test_recorder``, ``test_layerwise``, ``test_checkpoint``,
``test_hf`` and ``test_again`` compares for the families of ``CONFIGS``.
"""

import json
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion

from seap_ray.config import PruningSection
from seap_ray.core.allocation import check_measurable, choose_dropped
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.core.targets import StorageCosts, head_cache
from seap_ray.core.widths import WidthConstraints, widest_unit
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, check_stock
from seap_ray.models.forward import record
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import attention_of, decoder_of
from tests.support.builders import (
    CONFIGS,
    MIXTURES,
    MORE_CONFIGS,
    SHARDS,
    layerwise,
    load,
    logits,
    mixture_in,
    output_modules,
    random_ids,
    random_kept,
    random_statistics,
    recorded_by,
    uniform_plan,
    write_compacted,
)
from tests.support.elsewhere import WITHOUT_SEAP_RAY
from tests.support.oracles import assert_close, assert_equal, tensors_of, two_pass, with_replaced_activations

NOT_STOCK = ("stablelm", "helium", "cohere2", "qwen2_moe")
"""Families whose attention is as wide as the hidden size in an ordinary checkpoint."""
NEEDS_LIST = ("granitemoehybrid", "gemma4", "gemma4_sharing")
"""Families whose config has to list the layers' kinds."""
FUSED = ("gpt_oss", "llama4")
"""Mixtures whose MoE experts are no tensors of their own in a checkpoint."""


def cut(base: Checkpoint, seed: int, compensation: str = "mean") -> CheckpointExport:
    """Cut every layer but the second, heads as well where the family's heads can go."""
    rng = random.Random(seed)
    architecture = base.architecture
    kept: list[Kept] = []
    for number, layer in enumerate(architecture.layers):
        whole = layer.shape
        # transformers writes an MoE expert of one channel without that dimension.
        fewest = 2 if layer.n_experts else 1
        channels = max(rng.randint(1, max(whole.channels - 1, 1)), fewest)
        shape = replace(whole, channels=channels if layer.has_mlp else 0)
        if layer.has_attention and not architecture.why_whole_attention:
            shape = replace(
                shape,
                groups=rng.randint(1, max(whole.groups - 1, 1)),
                heads_per_group=rng.randint(1, whole.heads_per_group),
            )
        kept.append(random_kept(whole, whole if number == 1 else shape, rng, layer.n_experts))
    plan = Plan("expert", 0.5, COMPENSATIONS[compensation], tuple(kept), {})
    return CheckpointExport(base, plan, random_statistics(architecture, seed))


def attention_in(layer: Any) -> Any:
    """Return the attention of a decoder layer; None where it has none."""
    attention = getattr(layer, "self_attn", None) or getattr(layer, "mixer", None)
    return attention if hasattr(attention, "q_proj") or hasattr(attention, "kv_a_proj_with_mqa") else None


def sizes_of(folder: Path, prefix: str) -> list[int]:
    """Return the numbers of weights of every decoder layer that a folder holds."""
    sizes: dict[int, int] = {}
    for name, tensor in tensors_of(folder).items():
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).split(".")[0])
            sizes[layer] = sizes.get(layer, 0) + prod(tensor.shape)
    return [sizes[layer] for layer in sorted(sizes)]


# --- what a model is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_the_architecture_is_what_transformers_builds(name):
    config = MORE_CONFIGS[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = decoder_of(model).layers
    left_out = ["tie_word_embeddings"]
    # A Granite hybrid and a Gemma 4 are nothing without the list.
    left_out += ["layer_types"] if name not in NEEDS_LIST else []
    bare = {key: value for key, value in config.to_dict().items() if key not in left_out}
    for content in (config.to_dict(), bare):
        architecture = Architecture.of(content)
        assert architecture.n_layers == len(layers)
        attention = next(attention for layer in layers if (attention := attention_in(layer)) is not None)
        assert architecture.head_dim == (attention.v_head_dim if architecture.latent_cache else attention.head_dim)
        sizes = [sum(tensor.numel() for tensor in layer.state_dict().values()) for layer in layers]
        assert [architecture.layer_parameters(layer) for layer in architecture.layers] == sizes
        assert architecture.ties_embeddings == config.tie_word_embeddings or content is not bare

    stored = revert_weight_conversion(model, model.state_dict()).keys()
    # The last layer of a mixture has experts, of which each has modules of its own.
    named = [(3, module) for module in architecture.modules(3).values()]
    for module, rows in architecture.family.rows.items():
        # The last layer with that part: Nemotron-H's have one each.
        site = "mlp" if "channels" in rows.units else "attn"
        named.append((max(i for i in range(4) if architecture.sites(i, site)), module.format(e=3)))
    if name in FUSED:
        named = [(layer, module) for layer, module in named if ".experts." not in module]
    assert {architecture.tensor(layer, module) for layer, module in named} <= stored
    for layer in range(4):
        outputs = [module for module in architecture.modules(layer).values() if ".experts." not in module]
        assert outputs == [*output_modules(model, layer).values()]
    assert {architecture.family.embedding, architecture.family.head} <= stored


DENSE_LAYERS = {
    "qwen2_moe": ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [0, 0, 0, 4]),
    "qwen3_moe": ({"mlp_only_layers": [0, 2]}, [0, 6, 0, 6]),
    "glm4_moe": ({"first_k_dense_replace": 3}, [0, 0, 0, 4]),
    "deepseek_v3": ({"first_k_dense_replace": 0}, [4, 4, 4, 4]),
    "ernie4_5_moe": ({"moe_layer_start_index": 2, "moe_layer_end_index": 2}, [0, 0, 4, 0]),
    "llama4": ({"moe_layers": [0, 3]}, [4, 0, 0, 4]),
}
"""Config keys that say which layers have no experts, and the experts of every layer."""


@pytest.mark.parametrize("name", DENSE_LAYERS)
def test_layers_without_experts_are_those_that_transformers_builds_without(name):
    keys, expected = DENSE_LAYERS[name]
    config = (CONFIGS | MORE_CONFIGS)[name]()
    for key, value in keys.items():
        setattr(config, key, value)
    architecture = Architecture.of(config.to_dict())
    with torch.device("meta"):
        layers = decoder_of(AutoModelForCausalLM.from_config(config)).layers
    built = [mixture.experts.num_experts if (mixture := mixture_in(layer)) else 0 for layer in layers]
    assert [layer.n_experts for layer in architecture.layers] == built == expected
    sizes = [sum(tensor.numel() for tensor in layer.state_dict().values()) for layer in layers]
    assert [architecture.layer_parameters(layer) for layer in architecture.layers] == sizes
    for layer in range(4):
        sites = ["attn", *architecture.sites(layer, "mlp")]
        assert list(architecture.modules(layer)) == sites and len(sites) == 1 + max(built[layer], 1)


def test_widths_of_layers_are_read_as_transformers_writes_their_numbers_in_deep_models():
    config = {**CONFIGS["llama_gqa"]().to_dict(), "model_type": "seap_llama", "num_hidden_layers": 12}
    architecture = Architecture.of({**config, "per_layer_config": {"03": {"intermediate_size": 7}}})
    assert [layer.shape.channels for layer in architecture.layers] == [80] * 3 + [7] + [80] * 8


@pytest.mark.parametrize("listed", [True, False])
def test_heads_of_a_gemma4_are_read_from_older_configs_as_well(listed):
    content = MORE_CONFIGS["gemma4"]().to_dict()
    full = {"head_dim": 12, "num_key_value_heads": 2}
    assert content["per_layer_config"]["1"] == full
    if not listed:
        del content["per_layer_config"]
        content |= {"global_head_dim": 12, "num_global_key_value_heads": 2}
    architecture = Architecture.of(content)
    assert [dict(layer.settings) for layer in architecture.layers] == [{}, full, {}, full]


def test_what_a_gemma4_cannot_have_is_refused_with_the_reason():
    content = MORE_CONFIGS["gemma4"]().to_dict()
    with pytest.raises(ConfigError, match="enable_moe_block is True"):
        Architecture.of(content | {"enable_moe_block": True})
    architecture = Architecture.of(content)
    with pytest.raises(ConfigError, match="heads are of two sizes, and layers share keys and values; choose none"):
        WidthConstraints.of(architecture, PruningSection(attention_unit="head"), adds_biases=False)
    with pytest.raises(ConfigError, match="depth is not for a gemma4_text"):
        choose_dropped(architecture, PruningSection(), ratio=0.25, influence_L=[1.0] * 4)
    with pytest.raises(ConfigError, match="measured is not for a gemma4_text"):
        check_measurable(architecture)


def test_a_mixture_without_any_experts_is_refused():
    content = MORE_CONFIGS["glm4_moe"]().to_dict() | {"first_k_dense_replace": 4}
    with pytest.raises(ConfigError, match="no layer has experts"):
        Architecture.of(content)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("qwen2_moe", (0,)),
        ("glm4_moe", (0, 3)),
        ("ernie4_5_moe", (1, 2)),
        ("glm4_moe_lite", (2, 3)),
        # Kinds of its layers are looked up by their places, which this leaves right in the dense model, too.
        ("llama4", (1, 2)),
    ],
    ids=str,
)
def test_dropped_layers_of_a_mixture_leave_the_others_with_their_experts(dense, tmp_path, name, dropped):
    base = Checkpoint.open(str(dense(name, torch.bfloat16)))
    kept = tuple(Kept.whole(base.architecture, layer) for layer in range(4) if layer not in dropped)
    plan = Plan("depth", 0.25, COMPENSATIONS["none"], kept, {}, dropped)
    skipping = load(base.folder)
    for layer in reversed(dropped):
        del decoder_of(skipping).layers[layer]
    for stock in (False, True):
        folder = write_compacted(CheckpointExport(base, plan, stock=stock), tmp_path / str(stock))
        check_folder(folder)
        assert torch.equal(logits(load(folder), random_ids()), logits(skipping, random_ids()))


@pytest.mark.parametrize("name", [name for name in MORE_CONFIGS if MORE_CONFIGS[name]().to_dict().get("layer_types")])
def test_windows_are_those_that_transformers_lists(name):
    content = MORE_CONFIGS[name]().to_dict()
    listed = tuple(16 if kind == "sliding_attention" else None for kind in content["layer_types"])
    assert Architecture.of(content).windows == listed
    # The own configs of these list them always.
    if name not in ("ministral", "cwm", "mellum", "granite_swa", *NEEDS_LIST):
        assert Architecture.of({**content, "layer_types": None}).windows == listed


def test_a_period_of_windows_may_be_written_out():
    content = MORE_CONFIGS["exaone4"]().to_dict() | {"layer_types": None, "sliding_window_pattern": "LG"}
    assert Architecture.of(content).windows == (16, None, 16, None)


def test_a_feature_that_no_supported_model_of_the_family_has_is_refused():
    content = MORE_CONFIGS["stablelm"]().to_dict() | {"use_parallel_residual": True}
    with pytest.raises(ConfigError, match="a stablelm is not supported whose use_parallel_residual is True"):
        Architecture.of(content)


def test_no_head_goes_of_a_latent_attention_whose_cache_is_one_vector():
    architecture = Architecture.of(MORE_CONFIGS["deepseek_v3"]().to_dict())
    assert widest_unit(architecture) == "none"
    with pytest.raises(
        ConfigError, match="one latent vector for all heads, and this attention stays whole; choose none"
    ):
        WidthConstraints.of(architecture, PruningSection(attention_unit="head"), adds_biases=False)
    cache_L = head_cache(architecture, tokens=10, sequences=3, item_bytes=2)
    costs = StorageCosts(architecture, 2, cache_L)
    assert costs.cache_bytes(0, architecture.layers[0]) == 10 * 3 * 2 * (16 + 4)


def test_no_head_goes_below_a_norm_over_all_heads():
    architecture = Architecture.of(MORE_CONFIGS["olmo2"]().to_dict())
    assert widest_unit(architecture) == "none"
    for unit in ("group", "head"):
        with pytest.raises(ConfigError, match="a norm over all heads together, which a cut would change; choose none"):
            WidthConstraints.of(architecture, PruningSection(attention_unit=unit), adds_biases=False)


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_moments_are_those_of_two_passes_and_layer_by_layer_the_same_bytes(dense, float64_norms, name):
    folder = dense(name, torch.float64)
    model = load(folder)
    attention = attention_of(Checkpoint.open(str(folder)).config)
    # Grouped products of MoE experts, with which a job computes, are not in float64.
    dtype = torch.float32 if model.config.model_type in MIXTURES else torch.float64
    as_a_job_loads_it = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    layer_by_layer = recorded_by(layerwise(folder, dtype))
    for shard in ("sort/00000", "logic/00000"):
        assert_close(record(model, SHARDS[shard], batch_tokens=40), two_pass(model, SHARDS[shard]))
        assert_equal(layer_by_layer[shard], record(as_a_job_loads_it, SHARDS[shard], batch_tokens=40))


# --- cut and reload --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_a_cut_model_equals_the_dense_one_with_replaced_activations_and_so_does_a_second_cut(
    dense, tmp_path, float64_norms, name
):
    base = Checkpoint.open(str(dense(name, torch.float64)))
    ids_BT = random_ids()
    for step, seed in (("once", 1), ("again", 2)):
        export = cut(base, seed)
        folder = write_compacted(export, tmp_path / step)
        check_folder(folder)
        model = load(folder)
        assert type(model).__name__ == export.base.architecture.family.model_class

        expected = logits(with_replaced_activations(load(base.folder), export), ids_BT)
        assert (logits(model, ids_BT) - expected).abs().max() < 1e-12
        assert (expected - logits(load(base.folder), ids_BT)).abs().max() > 1e-3

        after = Checkpoint.open(str(folder))
        counted = [after.architecture.layer_parameters(layer) for layer in after.architecture.layers]
        assert sizes_of(folder, after.architecture.family.layers) == counted
        before = base.architecture.decoder_parameters
        assert export.plan.planned(base.architecture) == pytest.approx(1 - sum(counted) / before, abs=1e-12)
        base = after


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_a_reload_has_the_written_bits_in_every_class_and_saved_again(dense, tmp_path, name):
    base = Checkpoint.open(str(dense(name, torch.bfloat16)))
    folder = write_compacted(cut(base, 3), tmp_path / "expert", 20_000)
    written = tensors_of(folder)
    model = load(folder)
    # In a mixture a tensor of the model is made of several, and some are kept in float32.
    reloaded = revert_weight_conversion(model, model.state_dict())
    for key, tensor in written.items():
        assert torch.equal(reloaded[key].to(tensor.dtype), tensor), key
        assert reloaded[key].dtype == torch.bfloat16 or "gate" in key or "e_score_correction_bias" in key

    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), random_ids()), logits(model, random_ids()))
    assert Checkpoint.open(str(tmp_path / "saved")).architecture == Checkpoint.open(str(folder)).architecture

    with torch.no_grad():
        hidden_BTH = decoder_of(model)(random_ids()).last_hidden_state
        # Grouped products of experts would differ in their last bits.
        settings = {"dtype": "auto", "experts_implementation": "eager"}
        headless = AutoModel.from_pretrained(folder, **settings).eval()
        assert torch.equal(headless(random_ids()).last_hidden_state, hidden_BTH)
        if "AutoModelForSequenceClassification" in model.config.auto_map:
            classifier = AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()
            assert torch.equal(classifier.base_model(random_ids()).last_hidden_state, hidden_BTH)


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_cutting_nothing_is_the_identity(dense, tmp_path, name):
    source = dense(name, torch.bfloat16)
    base = Checkpoint.open(str(source))
    plan = uniform_plan(base.architecture, base.architecture.dense, "mean")
    folder = write_compacted(CheckpointExport(base, plan, random_statistics(base.architecture, 0)), tmp_path)
    written, given = tensors_of(folder), tensors_of(source)
    assert written.keys() == given.keys() and all(torch.equal(written[key], given[key]) for key in given)
    assert torch.equal(logits(load(folder), random_ids()), logits(load(source), random_ids()))


@pytest.mark.parametrize("name", MORE_CONFIGS)
def test_a_stock_export_computes_what_the_seap_export_computes(dense, tmp_path, name):
    base = Checkpoint.open(str(dense(name, torch.float64)))
    whole = base.architecture.dense
    shape = replace(whole, channels=50)
    if name not in NOT_STOCK and not base.architecture.why_whole_attention:
        shape = Shape(whole.groups // 2, whole.heads_per_group, 50)
    # A family with biases of its own on its outputs can hold those of compensation.
    compensation = "none" if base.architecture.bias_keys else "mean"
    plan = uniform_plan(base.architecture, shape, compensation)
    if base.architecture.is_shared_width_bound:
        with pytest.raises(ConfigError, match="has shared experts whose width follows from .*; use export.format=seap"):
            check_stock(plan, base.architecture)
        plan = uniform_plan(base.architecture, replace(shape, channels=whole.channels))
    if name == "gemma4_sharing":
        with pytest.raises(ConfigError, match="stock needs equal widths, but layer 2"):
            check_stock(plan, base.architecture)
        return
    check_stock(plan, base.architecture)

    statistics = random_statistics(base.architecture, 0)
    stock = write_compacted(CheckpointExport(base, plan, statistics, stock=True), tmp_path / "stock")
    model = load(stock)
    assert type(model).__module__.startswith("transformers.models.")
    seap = load(write_compacted(CheckpointExport(base, plan, statistics), tmp_path / "seap"))
    assert torch.equal(logits(model, random_ids()), logits(seap, random_ids()))


@pytest.mark.parametrize(("dropped", "is_refused"), [((0, 1), False), ((1,), True)])
def test_a_stock_gpt_oss_keeps_every_other_window_by_which_vllm_counts(dropped, is_refused):
    architecture = Architecture.of(MORE_CONFIGS["gpt_oss"]().to_dict())
    kept = tuple(Kept.whole(architecture, layer) for layer in range(4) if layer not in dropped)
    plan = Plan("depth", 0.25, COMPENSATIONS["none"], kept, {}, dropped)
    with pytest.raises(ConfigError, match="windows by their numbers") if is_refused else nullcontext():
        check_stock(plan, architecture)


def test_layers_without_rope_go_with_their_places(dense, tmp_path):
    base = Checkpoint.open(str(dense("smollm3")))
    config = {key: value for key, value in base.config.items() if key != "no_rope_layers"}
    kept = (Kept.whole(base.architecture, 0),) * 3
    plan = Plan("depth", 0.25, COMPENSATIONS["none"], kept, {}, dropped=(1,))
    without_list = CheckpointExport(replace(base, config=config), plan).config()
    assert without_list["no_rope_layers"] == [1, 1, 0]
    folder = write_compacted(CheckpointExport(base, plan), tmp_path)
    skipping = load(base.folder)
    del decoder_of(skipping).layers[1]
    assert torch.equal(logits(load(folder), random_ids()), logits(skipping, random_ids()))


# --- elsewhere -------------------------------------------------------------------------------------------------------

ELSEWHERE = (
    WITHOUT_SEAP_RAY
    + """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folders, out = json.loads(sys.argv[1])
ids_BT, results = load_file(out + "/ids")["ids"], {}
for name, folder in folders.items():
    settings = {"dtype": "auto", "trust_remote_code": True, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[name] = model(ids_BT).logits
assert not [name for name in sys.modules if name.split(".")[0] == "seap_ray"]
save_file(results, out + "/results")
"""
)


def test_a_process_without_seap_ray_computes_the_same_with_the_code_in_the_folder(dense, tmp_path):
    folders = {
        name: write_compacted(cut(Checkpoint.open(str(dense(name, torch.bfloat16))), 3), tmp_path / name)
        for name in MORE_CONFIGS
    }
    save_file({"ids": random_ids()}, tmp_path / "ids")
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
        assert torch.equal(results[name], logits(load(folder), random_ids())), name
