"""Parameter arithmetic and names, against the models that Hugging Face builds (on the meta device, without memory)."""

import copy
from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.core_model_loading import revert_weight_conversion

from seap_ray.config import PruningSection
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.families import FAMILIES
from seap_ray.core.refused_families import WHY_REFUSED
from seap_ray.core.widths import WidthConstraints, widest_unit
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.models.loading import decoder_of
from tests.support.builders import CONFIGS, MIXTURES, output_modules, random_plan, random_statistics, write_compacted

LARGE = {
    "llama-2-7b": lambda: LlamaConfig(),
    "llama-3-8b": lambda: LlamaConfig(vocab_size=128256, num_key_value_heads=8, intermediate_size=14336),
    "qwen2.5-7b": lambda: Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
}
ALL = {**CONFIGS, **LARGE}
WITH_HEAD_DIM = [name for name in ALL if name not in ("opt", "gpt_neox")]
"""Families that transformers itself can build with fewer heads."""


def meta_model(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def size(module: nn.Module) -> int:
    # What is stored: some routers have a buffer beside their weights.
    return sum(tensor.numel() for tensor in module.state_dict().values())


def narrowed(config: PreTrainedConfig, **widths: int) -> int:
    """Parameters of one decoder layer of Hugging Face's with other widths and the same head dimension."""
    config = copy.deepcopy(config)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, value in widths.items():
        setattr(config, key, value)
    config.num_hidden_layers = 1
    return size(decoder_of(meta_model(config)).layers[0])


@pytest.mark.parametrize("name", ALL)
def test_layer_and_decoder_parameters_are_what_the_model_has(name):
    config = ALL[name]()
    architecture, model = Architecture.of(config.to_dict()), meta_model(config)
    layers = decoder_of(model).layers
    assert architecture.n_layers == len(layers)
    assert [architecture.layer_parameters(layer) for layer in architecture.layers] == [size(layer) for layer in layers]
    assert architecture.decoder_parameters == size(layers)
    attention = layers[0].attention if name == "gpt_neox" else layers[0].self_attn
    assert architecture.head_dim == (attention.head_size if name == "gpt_neox" else attention.head_dim)
    modules = {name for name, _ in model.named_parameters()}
    stored = revert_weight_conversion(model, model.state_dict()).keys() if name in MIXTURES else modules
    for layer in range(architecture.n_layers):
        assert {architecture.tensor(layer, module) for module in output_modules(model, layer).values()} <= modules
        assert {architecture.tensor(layer, module) for module in architecture.modules(layer).values()} <= stored
    assert architecture.family.embedding in modules


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_476_267_520), ("llama-3-8b", 6_979_584_000), ("qwen2.5-7b", 6_525_618_176)],
)
def test_decoder_parameters_of_well_known_models(name, parameters):
    """Published totals (6,738,415,616; 8,030,261,248; 7,615,616,512) less embeddings, head and last norm."""
    config = LARGE[name]()
    published = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "qwen2.5-7b": 7_615_616_512}[name]
    assert published - (2 * config.vocab_size + 1) * config.hidden_size == parameters
    assert Architecture.of(config.to_dict()).decoder_parameters == parameters


@pytest.mark.parametrize("name", WITH_HEAD_DIM)
def test_costs_are_what_a_layer_loses_when_it_shrinks(name):
    config = ALL[name]()
    architecture = Architecture.of(config.to_dict())
    heads, groups, channels = config.num_attention_heads, architecture.dense.groups, config.intermediate_size
    whole = narrowed(config)
    key = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    assert whole - narrowed(config, **{key: channels - 1}) == architecture.channel_cost(architecture.layers[0])
    fewer = max(heads // 2, 1)
    lost = whole - narrowed(config, num_attention_heads=fewer, num_key_value_heads=groups)
    assert lost == (heads - fewer) * architecture.head_cost
    lost = whole - narrowed(config, num_attention_heads=heads // 2, num_key_value_heads=groups // 2)
    assert lost == heads // 2 * architecture.head_cost + (groups - groups // 2) * architecture.kv_cost


@pytest.mark.parametrize("name, key", [("opt", "ffn_dim"), ("gpt_neox", "intermediate_size")])
def test_a_channel_costs_what_a_layer_without_a_gate_loses(name, key):
    config = ALL[name]()
    architecture = Architecture.of(config.to_dict())
    cost = architecture.channel_cost(architecture.layers[0])
    assert narrowed(config) - narrowed(config, **{key: 79}) == cost == 2 * 48 + 1


@pytest.mark.parametrize("name", WITH_HEAD_DIM)
def test_layer_parameters_of_a_smaller_shape_are_what_such_a_layer_has(name):
    config = ALL[name]()
    architecture = Architecture.of(config.to_dict())
    shape = Shape(architecture.dense.groups // 2, architecture.dense.heads_per_group, 33)
    widths = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.groups}
    widths["moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"] = 33
    narrower = architecture.resized(0, shape, adds_biases=False)
    assert architecture.layer_parameters(narrower) == narrowed(config, **widths)


@pytest.mark.parametrize("name", CONFIGS)
def test_written_layers_have_the_parameters_that_the_plan_counts_on(dense, tmp_path, name):
    checkpoint = Checkpoint.open(str(dense(name)))
    architecture = checkpoint.architecture
    plan = random_plan(architecture, 5, "mean")
    statistics = random_statistics(architecture, 5)
    folder = write_compacted(CheckpointExport(checkpoint, plan, statistics), tmp_path)
    sizes = {key: prod(info.shape) for key, info in Checkpoint.at(folder).tensors.items()}
    for layer in range(architecture.n_layers):
        real = sum(n for key, n in sizes.items() if f".layers.{layer}." in key)
        assert real == architecture.layer_parameters(plan.layer_after(layer, architecture))
    after = sum(n for key, n in sizes.items() if ".layers." in key)
    assert plan.planned(architecture) == pytest.approx(1 - after / architecture.decoder_parameters, abs=1e-12)


def test_compensation_adds_only_the_biases_that_are_missing():
    def added(config):
        architecture = Architecture.of(config.to_dict())
        narrower = Shape(architecture.dense.groups, architecture.dense.heads_per_group, 8)
        with_and_without = (architecture.resized(0, narrower, adds_biases=c) for c in (True, False))
        both = [architecture.layer_parameters(layer) for layer in with_and_without]
        assert architecture.resized(0, architecture.dense, adds_biases=True) == architecture.layers[0]
        return both[0] - both[1]

    hidden = 48
    expected = {"llama_mha": 2 * hidden, "llama_gqa": 2 * hidden, "llama_biased": 0, "qwen2": 2 * hidden}
    assert {name: added(CONFIGS[name]()) for name in expected} == expected
    assert added(LlamaConfig(attention_bias=True)) == 4096


def test_query_heads_count_as_key_value_heads_where_a_config_names_none():
    config = {**LlamaConfig(num_attention_heads=8, hidden_size=64).to_dict(), "num_key_value_heads": None}
    assert Architecture.of(config).dense == Shape(8, 1, 11008)
    del config["num_key_value_heads"], config["head_dim"]
    assert Architecture.of(config).dense == Shape(8, 1, 11008)
    assert Architecture.of(config).head_dim == 8


@pytest.mark.parametrize("name", ["bert2", "seap_bert2", None])
def test_an_unknown_family_is_refused_with_the_list_of_known_ones(name):
    with pytest.raises(ConfigError, match=f"{name!r} is not supported; supported are {', '.join(FAMILIES)}"):
        Architecture.of({"model_type": name})


@pytest.mark.parametrize("name", ["gpt2", "t5", "mamba", "gemma4_unified_text"])
def test_a_family_that_is_known_to_be_another_kind_of_model_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"{name!r} is not supported: it.*; supported are llama, mistral, ") as error:
        Architecture.of({"model_type": name})
    assert WHY_REFUSED[name] in str(error.value)


def test_a_quantised_model_is_refused():
    config = Qwen2Config(num_hidden_layers=2).to_dict()
    with pytest.raises(ConfigError, match="quantised"):
        Architecture.of({**config, "quantization_config": {"quant_method": "gptq"}})


@pytest.mark.parametrize(
    "config, has, mixes",
    [
        (Qwen2Config(), False, False),
        (Qwen2Config(use_sliding_window=True, max_window_layers=2), True, True),
        (MistralConfig(), True, False),
        (MistralConfig(sliding_window=None), False, False),
        (Gemma2Config(), True, True),
        (Gemma3TextConfig(), True, True),
        (LlamaConfig(), False, False),
        (Phi3Config(), False, False),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else str(value),
)
def test_windows_are_told_with_and_without_the_kinds_of_the_layers(config, has, mixes):
    content = config.to_dict()
    for each in (content, {key: value for key, value in content.items() if key != "layer_types"}):
        architecture = Architecture.of(each)
        assert (architecture.has_windows, architecture.mixes_windows) == (has, mixes)


def test_key_value_heads_of_layers_beside_windows_stay_equal_or_the_ratio_is_refused():
    architecture = Architecture.of(Gemma2Config(num_hidden_layers=4).to_dict())
    for unit in ("head", "none"):
        pruning = PruningSection(attention_unit=unit)
        for rules in WidthConstraints.of(architecture, pruning, adds_biases=False):
            assert {groups for groups, _ in rules.options} == {4}
    with pytest.raises(ConfigError, match="attention_unit: group leaves layers with unequal .* choose head or none"):
        WidthConstraints.of(architecture, PruningSection(attention_unit="group"), adds_biases=False)


def test_the_unit_by_which_most_goes_is_the_first_that_engines_serve():
    families = {
        "group": LlamaConfig(num_attention_heads=32, num_key_value_heads=8),
        "head": Gemma2Config(),
        "none": Gemma2Config(num_attention_heads=4, num_key_value_heads=4),
    }
    for unit, config in families.items():
        assert widest_unit(Architecture.of(config.to_dict())) == unit
    single = LlamaConfig(num_attention_heads=32, num_key_value_heads=1)
    assert widest_unit(Architecture.of(single.to_dict())) == "head", "there is no group that could go"


def test_a_tile_of_channels_leaves_a_small_model_16_of_them():
    tiles = {100: 4, 256: 16, 448: 16, 2048: 128, 11008: 128, 8: 1}
    for channels, tile in tiles.items():
        architecture = Architecture.of(LlamaConfig(intermediate_size=channels).to_dict())
        assert architecture.align("auto") == tile
        assert architecture.align(24) == 24
