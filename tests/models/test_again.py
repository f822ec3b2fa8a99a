"""A checkpoint that is compacted already, pruned again: it is a model like any other, with layers of unequal widths."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport, check_stock
from seap_ray.models.hf.shapes import check_folder
from seap_ray.models.loading import decoder_of
from tests.support.builders import (
    CONFIGS,
    MIXTURES,
    SHARDS,
    layerwise,
    load,
    logits,
    random_ids,
    random_kept,
    random_plan,
    random_statistics,
    recorded_by,
)
from tests.support.builders import write_compacted as write
from tests.support.oracles import assert_equal, tensors_of, with_replaced_activations, with_split_products

Once = Callable[..., Path]
GIVEN = 2
"""A layer that was cut the first time and stays as it is the second."""


@pytest.fixture(scope="module")
def once(dense, tmp_path_factory) -> Once:
    """``once(name, compensation, dtype)``: a model of ``CONFIGS`` after its first cut; layer 1 is whole in it."""
    made: dict[tuple, Path] = {}

    def folder(name: str, compensation: str = "none", dtype: torch.dtype = torch.float64) -> Path:
        key = (name, compensation, dtype)
        if key not in made:
            base = Checkpoint.open(str(dense(name, dtype)))
            plan = random_plan(base.architecture, 11, compensation)
            statistics = random_statistics(base.architecture, 11)
            made[key] = write(CheckpointExport(base, plan, statistics), tmp_path_factory.mktemp(name))
        return made[key]

    return folder


def again_of(folder: Path, compensation: str, seed: int = 12) -> CheckpointExport:
    """A second cut of every layer but one."""
    base, rng = Checkpoint.open(str(folder)), random.Random(seed)
    kept = []
    for layer, given in enumerate(base.architecture.layers):
        of = given.shape
        shape = of if layer == GIVEN else Shape(*(rng.randint(1, n) for n in (of.groups, of.heads_per_group)), 1)
        if layer != GIVEN:
            shape = Shape(shape.groups, shape.heads_per_group, rng.randint(1, max(of.channels - 1, 1)))
        if base.architecture.why_whole_attention:
            shape = Shape(of.groups, of.heads_per_group, shape.channels)
        kept.append(random_kept(of, shape, rng, given.n_experts))
    plan = Plan("again", 0.5, COMPENSATIONS[compensation], tuple(kept), {})
    return CheckpointExport(base, plan, random_statistics(base.architecture, seed))


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("first", ["none", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_cut_equals_the_given_model_with_cut_activations_replaced(
    once, tmp_path, float64_norms, name, first, compensation
):
    source, ids_BT = once(name, first), random_ids()
    export = again_of(source, compensation)
    compacted = logits(load(write(export, tmp_path)), ids_BT)
    replaced = logits(with_replaced_activations(load(source), export), ids_BT)
    assert (compacted - replaced).abs().max() < 1e-12
    assert (compacted - logits(load(source), ids_BT)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa", "llama_biased", "qwen2", "mixtral", "gpt_neox"])
def test_it_equals_it_exactly_where_sums_keep_their_order(once, tmp_path, float64_norms, ordered_sums, name):
    source, ids_BT = once(name, "mean"), random_ids(2, 8)
    export = again_of(source, "mean")
    compacted = logits(load(write(export, tmp_path)), ids_BT)
    assert torch.equal(compacted, logits(with_split_products(load(source), export), ids_BT))


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_cut_of_nothing_is_the_identity(once, tmp_path, name, compensation):
    source = once(name, "mean", torch.bfloat16)
    base = Checkpoint.open(str(source))
    kept = tuple(Kept.whole(base.architecture, layer) for layer in range(base.architecture.n_layers))
    statistics = random_statistics(base.architecture, 0)
    folder = write(
        CheckpointExport(base, Plan("again", 0.0, COMPENSATIONS[compensation], kept, {}), statistics), tmp_path
    )
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    written, given = tensors_of(folder), tensors_of(source)
    assert written.keys() == given.keys() and all(torch.equal(written[name], given[name]) for name in given)


@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_layers_that_go_as_a_whole_take_their_widths_and_biases_with_them(once, tmp_path, name):
    source, ids_BT = once(name, "mean"), random_ids()
    base = Checkpoint.open(str(source))
    plan = Plan(
        "again", 0.5, COMPENSATIONS["none"], tuple(Kept.whole(base.architecture, layer) for layer in (1, 3)), {}, (0, 2)
    )
    folder = write(CheckpointExport(base, plan), tmp_path)
    check_folder(folder)
    skipping = load(source)
    for layer in (2, 0):
        del decoder_of(skipping).layers[layer]
    assert torch.equal(logits(load(folder), ids_BT), logits(skipping, ids_BT))
    left = [base.architecture.layers[layer] for layer in (1, 3)]
    assert list(Checkpoint.open(str(folder)).architecture.layers) == left


# --- what is counted and written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_written_layers_have_the_parameters_that_the_plan_counts_on(once, tmp_path, name, compensation):
    export = again_of(once(name, "mean"), compensation)
    architecture, prefix = export.base.architecture, export.base.architecture.family.layers

    def sizes(folder: Path) -> list[int]:
        of: dict[str, int] = {}
        for key, tensor in tensors_of(folder).items():
            if key.startswith(prefix):
                layer = key.removeprefix(prefix).split(".")[0]
                of[layer] = of.get(layer, 0) + tensor.numel()
        return [of[str(layer)] for layer in range(len(of))]

    folder = write(export, tmp_path)
    before, after = sizes(export.base.folder), sizes(folder)
    assert [architecture.layer_parameters(layer) for layer in architecture.layers] == before
    again = Checkpoint.open(str(folder)).architecture
    assert [again.layer_parameters(layer) for layer in again.layers] == after
    assert export.plan.planned(architecture) == pytest.approx(1 - sum(after) / sum(before), abs=1e-12)


def test_config_keeps_the_dense_widths_and_the_biases_that_were_there(once, tmp_path):
    base = Checkpoint.open(str(once("llama_gqa", "mean")))
    export = again_of(base.folder, "none")
    config = json.loads((write(export, tmp_path) / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "per_layer_config"} == {
        k: v for k, v in base.config.items() if k != "per_layer_config"
    }
    biases = {"o_proj_bias": True, "down_proj_bias": True}
    for layer, kept in enumerate(export.plan.kept):
        widths = {
            "num_attention_heads": len(kept.heads),
            "num_key_value_heads": len(kept.groups),
            "intermediate_size": kept.n_channels,
        }
        own = {key: value for key, value in widths.items() if value != config[key]}
        assert config["per_layer_config"][str(layer)] == (own | biases if layer != 1 else own)
    with_bias = sorted(name for name in tensors_of(tmp_path) if name.endswith("o_proj.bias"))
    assert with_bias == [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in (0, 2, 3)]


def test_what_transformers_saved_is_the_same_model(once, tmp_path):
    load(once("llama_gqa", "mean")).save_pretrained(tmp_path)
    saved, written = (Checkpoint.open(str(folder)).architecture for folder in (tmp_path, once("llama_gqa", "mean")))
    assert saved == written


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_and_covariances_layer_by_layer_are_the_bytes_of_the_whole_model(once, name):
    folder = once(name, "mean", torch.float32)
    attention = "eager" if name == "gemma2" else None
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    from seap_ray.models.forward import record

    found = recorded_by(layerwise(folder), covariance=True)
    for shard, sequences in SHARDS.items():
        assert_equal(found[shard], record(whole, sequences, batch_tokens=40, covariances=range(4)))
    shapes = [layer.shape for layer in Checkpoint.open(str(folder)).architecture.layers]
    of_shard = found["sort/00000"]
    sites = "mlp.0" if name in MIXTURES else "mlp"
    assert [of_shard[layer, sites].mean_D.numel() for layer in range(4)] == [shape.channels for shape in shapes]


# --- stock exports ---------------------------------------------------------------------------------------------------


def equal_cut(base: Checkpoint, shape: Shape, compensation: str) -> CheckpointExport:
    rng, architecture = random.Random(3), base.architecture
    kept = tuple(random_kept(layer.shape, shape, rng, layer.n_experts) for layer in architecture.layers)
    plan = Plan("again", 0.5, COMPENSATIONS[compensation], kept, {})
    return CheckpointExport(base, plan, random_statistics(architecture, 3))


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("first", ["none", "mean"])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_biased", "qwen2", "opt"])
def test_a_second_cut_to_equal_widths_has_a_stock_export(dense, tmp_path, name, first, compensation):
    base, heads = Checkpoint.open(str(dense(name, torch.float64))), (6, 1) if name == "opt" else (2, 2)
    uneven = tuple(
        random_kept(base.architecture.dense, Shape(*heads, 60 + layer), random.Random(layer)) for layer in range(4)
    )
    first_plan = Plan("once", 0.3, COMPENSATIONS[first], uneven, {})
    source = write(CheckpointExport(base, first_plan, random_statistics(base.architecture, 2)), tmp_path / "once")
    cut = equal_cut(Checkpoint.open(str(source)), Shape(*heads, 50), compensation)
    check_stock(cut.plan, cut.base.architecture)
    stock = write(CheckpointExport(cut.base, cut.plan, cut.statistics, stock=True), tmp_path / "stock")
    config = json.loads((stock / "config.json").read_text())
    is_llama = name == "qwen2" and "mean" in (first, compensation) or name.startswith("llama")
    assert config["model_type"] == ("llama" if is_llama else name)
    assert not {"per_layer_config", "auto_map", "o_proj_bias"} & config.keys() and not list(stock.glob("*.py"))
    model = load(stock)
    assert type(model).__module__.startswith("transformers.models.")
    assert torch.equal(logits(model, random_ids()), logits(load(write(cut, tmp_path / "seap")), random_ids()))


def test_biases_of_an_earlier_compensation_have_no_stock_export_in_a_family_without_any(once):
    base = Checkpoint.open(str(once("qwen3", "mean")))
    smallest = Shape(1, 1, 1)
    with pytest.raises(ConfigError, match="a stock qwen3 has no biases on .*; use export.format=seap$"):
        check_stock(equal_cut(base, smallest, "none").plan, base.architecture)


def test_an_unknown_compacted_family_is_refused():
    with pytest.raises(ConfigError, match="'seap_gpt2' is not supported: its matrices are"):
        Architecture.of({"model_type": "seap_gpt2"})
