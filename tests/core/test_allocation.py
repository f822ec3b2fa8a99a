"""Allocation: widths that meet a budget, counted by the models themselves, and layers that go as a whole."""

import itertools
import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import seap_ray
from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core.allocation import check_ratio, choose_dropped, choose_shapes
from seap_ray.core.architecture import Architecture, Layer, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan, keep
from seap_ray.core.reach import protected_layers
from seap_ray.core.sensitivity import Ladder, Rise, Sensitivities
from seap_ray.core.widths import WidthConstraints
from seap_ray.errors import ConfigError
from seap_ray.models.hf.configuration_seap import SeapLlamaConfig, SeapQwen2Config
from seap_ray.models.hf.modeling_seap import SeapLlamaForCausalLM, SeapQwen2ForCausalLM
from tests.support.oracles import ratio_of

often = settings(max_examples=60, deadline=None)

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
CONFIGS = {
    "demo": json.loads((Path(seap_ray.__file__).parent / "demo" / "model" / "config.json").read_text()),
    "llama-2-7b": {**LLAMA, "intermediate_size": 11008, "num_key_value_heads": 32},
    "llama-3-8b": {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "llama-biased": {
        **LLAMA,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "intermediate_size": 5000,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
MODELS = {name: Architecture.of(config) for name, config in CONFIGS.items()}
DEMO = MODELS["demo"]
WIDTHS_BY_RATIO = ("uniform", "logistic")
WIDTHS_BY_SCORE = ("global", "standardised")
KINDS = (*WIDTHS_BY_RATIO, *WIDTHS_BY_SCORE, "measured")


@cache
def scores(architecture, seed=0):
    """Squared normal scores; each layer has its own spread, so that layers differ under ``global``."""
    generator = torch.Generator().manual_seed(seed)

    def some(n, spread):
        return torch.randn(n, generator=generator, dtype=torch.float64).abs().pow(spread)

    dense = architecture.dense
    spreads = torch.linspace(1, 3, architecture.n_layers).tolist()
    return [(some(dense.heads, spread), some(dense.channels, spread)) for spread in spreads]


@cache
def standardised_scores(architecture, seed=0):
    """Return the scores less their mean over their standard deviation, with heads of equal columns."""

    def of(score):
        return (score - score.mean()) / score.std()

    return [(of(head_H) * architecture.head_dim, of(channel_C)) for head_H, channel_C in scores(architecture, seed)]


@cache
def measured(architecture, seed=0, shares=(0.25, 0.5, 0.8)):
    """Return random rises of every site and way to cut it, some of them below their noise."""
    draw = random.Random(seed)

    def ladder(layer, site, shapes, saved):
        """Rises along a power of what goes, by chance up to a thousand times those of another layer."""
        scale, power = 10 ** draw.uniform(-3, 0), draw.uniform(0.8, 3)
        means = [scale * share**power + draw.gauss(0, 0.003) for share in saved]
        return Ladder(layer, site, tuple(shapes), tuple(Rise(mean, draw.uniform(0, 0.01)) for mean in means))

    ladders = []
    for layer, shape in enumerate(layer.shape for layer in architecture.layers):
        groups, heads, channels = shape.groups, shape.heads_per_group, shape.channels
        by_group = [Shape(n, heads, channels) for n in range(groups - 1, 0, -1)]
        by_head = [Shape(groups, n, channels) for n in range(heads - 1, 0, -1)]
        attention = [*by_group, *by_head]
        gone = [1 - narrow.heads / shape.heads for narrow in attention]
        mlp = sorted({max(round(channels * (1 - share)), 1) for share in shares if channels > 1}, reverse=True)
        ladders.append(ladder(layer, "attn", attention, gone))
        ladders.append(ladder(layer, "mlp", [Shape(groups, heads, n) for n in mlp], [1 - n / channels for n in mlp]))
    return Sensitivities(tuple(ladders))


def scores_for(kind, architecture, seed=0):
    return {"global": scores, "standardised": standardised_scores}.get(kind, lambda *_: ())(architecture, seed)


def section(kind, **pruning):
    allocation = pruning.pop("allocation", AllocationSection()).model_copy(update={"kind": kind})
    return PruningSection(allocation=allocation, **pruning)


def chosen(architecture, ratio, kind, *, adds_biases=False, stock=False, scores_L=None, sensitivities=None, **pruning):
    if kind == "measured" and sensitivities is None:
        sensitivities = measured(architecture)
    return choose_shapes(
        architecture,
        section(kind, **pruning),
        ratio=ratio,
        adds_biases=adds_biases,
        scores_L=scores_for(kind, architecture) if scores_L is None else scores_L,
        stock=stock,
        sensitivities=sensitivities,
    )


def tile_of(architecture, tensor_parallel=1):
    """Weights of one tile of channels, of 128 but for small models."""
    channels = 16 if architecture is DEMO else 128
    biases = 2 if architecture.mlp_bias else 0
    return channels * tensor_parallel * (3 * architecture.hidden_size + biases)


def off_by(shapes, architecture, ratio, adds_biases):
    """Weights between the realised and the requested ratio."""
    return abs(ratio_of(shapes, architecture, adds_biases=adds_biases) - ratio) * architecture.decoder_parameters


def assert_widths_are_allowed(shapes, architecture, tensor_parallel=1):
    dense, tile = architecture.dense, (16 if architecture is DEMO else 128) * tensor_parallel
    assert len(shapes) == architecture.n_layers
    for shape in shapes:
        assert 1 <= shape.groups <= dense.groups and 1 <= shape.heads_per_group <= dense.heads_per_group
        assert shape.groups == dense.groups or shape.heads_per_group == dense.heads_per_group
        assert shape.channels == dense.channels or (shape.channels % tile == 0 and tile <= shape.channels)
        # What vLLM's attention and linear layers assert when they split heads and columns over ranks.
        assert shape.groups % tensor_parallel == 0 or tensor_parallel % shape.groups == 0
        assert shape.heads % tensor_parallel == 0
        assert shape.channels % tensor_parallel == 0


# --- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["group", "head"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["demo", "llama-2-7b", "llama-3-8b"])
def test_the_ratio_is_met_within_a_tile_and_no_layer_is_emptied(model, kind, unit):
    architecture = MODELS[model]
    slow = kind in WIDTHS_BY_SCORE and model != "demo"  # up to a second a plan
    # Where every group has one head, both units leave the same choice, which groups are tested with.
    slow |= kind == "measured" and unit == "head" and architecture.dense.heads_per_group == 1
    for ratio in (0.2, 0.5) if slow else (0.1, 0.2, 0.35, 0.5, 0.7):
        for adds_biases in (True,) if slow else (True, False):
            shapes = chosen(architecture, ratio, kind, adds_biases=adds_biases, attention_unit=unit)
            off = off_by(shapes, architecture, ratio, adds_biases)
            assert off <= 0.5001 * tile_of(architecture), "the nearest tile"
            assert_widths_are_allowed(shapes, architecture)
            grouped = unit == "group" or architecture.dense.heads_per_group == 1
            narrowed = [s.heads_per_group if grouped else s.groups for s in shapes]
            assert set(narrowed) == {architecture.dense.heads_per_group if grouped else architecture.dense.groups}


@given(
    ratio=st.floats(0.001, 0.73),
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from(["group", "head"]),
    adds_biases=st.booleans(),
    seed=st.integers(0, 1000),
)
@often
def test_any_ratio_within_reach_is_met(ratio, kind, unit, adds_biases, seed):
    scores_L = scores_for(kind, DEMO, seed)
    shapes = chosen(DEMO, ratio, kind, adds_biases=adds_biases, attention_unit=unit, scores_L=scores_L)
    assert off_by(shapes, DEMO, ratio, adds_biases) <= tile_of(DEMO)
    assert_widths_are_allowed(shapes, DEMO)


def test_what_the_last_layers_cannot_round_away_the_others_do():
    # Attention outweighs the MLP here, and comes in steps too coarse for the last layers' channels to make up.
    config = {**CONFIGS["demo"], "num_hidden_layers": 20, "num_key_value_heads": 8, "num_attention_heads": 32}
    architecture = Architecture.of({**config, "head_dim": 64, "intermediate_size": 200})
    shapes = chosen(architecture, 0.251, "logistic", attention_unit="head")
    assert WidthConstraints.of(architecture, PruningSection(), adds_biases=False)[0].tile == 8
    assert off_by(shapes, architecture, 0.251, False) <= 8 * 3 * architecture.hidden_size


def test_a_width_is_the_nearest_allowed_one_and_never_less_than_a_tile():
    rules, *_ = WidthConstraints.of(DEMO, PruningSection(align=100), adds_biases=False)
    wanted = {-500: 100, 0: 100, 149: 100, 151: 200, 349: 300, 420: 400, 430: 448, 448: 448, 900: 448}
    assert {n: rules.channels(n) for n in wanted} == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_attention_stays_whole_when_no_unit_of_it_may_go(kind):
    for model in ("demo", "llama-3-8b"):
        architecture = MODELS[model]
        shapes = chosen(architecture, 0.4, kind, attention_unit="none")
        assert {(s.groups, s.heads_per_group) for s in shapes} == {
            (architecture.dense.groups, architecture.dense.heads_per_group)
        }
        assert off_by(shapes, architecture, 0.4, False) <= tile_of(architecture)


@pytest.mark.parametrize("unit", ["group", "head", "none"])
@pytest.mark.parametrize("model", ["demo", "llama-2-7b", "llama-3-8b", "qwen2-7b", "llama-biased"])
def test_widths_split_over_tensor_parallel_ranks(model, unit):
    architecture = MODELS[model]
    served = 0
    for kind in KINDS:
        for ranks in (1, 2, 4, 8):
            if model == "llama-2-7b" and kind in WIDTHS_BY_SCORE and ranks < 8:
                continue
            try:
                shapes = chosen(architecture, 0.3, kind, attention_unit=unit, tensor_parallel=ranks)
            except ConfigError as error:
                assert "pruning.tensor_parallel" in str(error)
                continue
            served += 1
            assert_widths_are_allowed(shapes, architecture, ranks)
            assert off_by(shapes, architecture, 0.3, False) <= tile_of(architecture, ranks)
    assert served >= 9, "all but 8 ranks must do"


def test_a_model_whose_own_heads_do_not_split_is_refused():
    # Protected layers keep the model's 28 heads, which 8 ranks cannot share.
    for kind in KINDS:
        with pytest.raises(ConfigError, match=r"pruning\.tensor_parallel: 8 ranks"):
            chosen(MODELS["qwen2-7b"], 0.3, kind, attention_unit="head", tensor_parallel=8)
    for kind in (*KINDS, "depth"):
        with pytest.raises(ConfigError, match=r"pruning\.tensor_parallel: 8 ranks"):
            check_ratio(MODELS["qwen2-7b"], section(kind, tensor_parallel=8), ratio=0.3, adds_biases=False)


@pytest.mark.parametrize("adds_biases", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_of_zero_is_the_identity(kind, adds_biases):
    shapes = chosen(DEMO, 0.0, kind, adds_biases=adds_biases)
    assert shapes == [DEMO.dense] * DEMO.n_layers
    assert ratio_of(shapes, DEMO, adds_biases=adds_biases) == 0
    kept = keep(shapes[0], DEMO.dense, *scores(DEMO)[0])
    assert kept == Kept(tuple(range(4)), tuple(range(8)), (tuple(range(448)),))


@pytest.mark.parametrize("kind", WIDTHS_BY_RATIO)
def test_all_experts_of_a_ratio_have_equal_shapes(kind):
    for model in ("demo", "llama-3-8b"):
        architecture = MODELS[model]
        several = [chosen(architecture, 0.35, kind, scores_L=scores(architecture, seed)) for seed in range(3)]
        assert several[0] == several[1] == several[2] == chosen(architecture, 0.35, kind, scores_L=())


def test_global_gives_layers_with_few_important_units_less_room():
    spread_evenly = (torch.ones(8, dtype=torch.float64), torch.ones(448, dtype=torch.float64))
    few_matter = (torch.ones(8, dtype=torch.float64), torch.logspace(0, -6, 448, dtype=torch.float64))
    shapes = chosen(DEMO, 0.2, "global", scores_L=[spread_evenly, few_matter] * 4)
    assert max(s.channels for s in shapes[1::2]) < min(s.channels for s in shapes[::2])


def test_stock_and_uniform_give_equal_shapes_in_all_layers():
    for model in ("demo", "llama-2-7b", "llama-3-8b", "qwen2-7b"):
        architecture = MODELS[model]
        for ratio in (0.1, 0.2, 0.5, 0.7):
            for adds_biases in (True, False):
                shapes = chosen(architecture, ratio, "uniform", adds_biases=adds_biases, stock=True)
                assert len(shapes) == architecture.n_layers and len(set(shapes)) == 1
                # A stock Llama refuses heads that do not divide the hidden size.
                assert architecture.hidden_size % shapes[0].heads == 0
                assert_widths_are_allowed(shapes, architecture)
                half_a_tile_each = tile_of(architecture) * architecture.n_layers / 2
                assert off_by(shapes, architecture, ratio, adds_biases) <= half_a_tile_each


@given(ratio=st.floats(0, 0.9999), kind=st.sampled_from(WIDTHS_BY_RATIO), model=st.sampled_from(sorted(MODELS)))
@often
def test_the_official_budget_never_empties_a_layer(ratio, kind, model):
    for shape in chosen(MODELS[model], ratio, kind, budget="official"):
        assert shape.groups >= 1 and shape.heads_per_group >= 1 and shape.channels >= 1


@pytest.mark.parametrize("kind", [*WIDTHS_BY_SCORE, "measured", "depth"])
def test_the_official_budget_knows_only_allocations_by_ratio(kind):
    official = section(kind, budget="official")
    refusals = [lambda: check_ratio(DEMO, official, ratio=0.2, adds_biases=False)]
    if kind == "depth":
        refusals.append(lambda: choose_dropped(DEMO, official, ratio=0.2, influence_L=[0.5] * 8))
    else:
        refusals.append(lambda: chosen(DEMO, 0.2, kind, budget="official"))
    for refused in refusals:
        with pytest.raises(ConfigError, match=rf"^pruning\.budget: official .* not {kind}$"):
            refused()


# --- layers of unequal widths: a model that is compacted already ---------------------------------------------------


@st.composite
def compacted(draw):
    """The demo after some first cut, with biases in some of its layers."""
    own = {}
    for layer in range(8):
        groups, heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        biases = {key: draw(st.booleans()) for key in ("o_proj_bias", "down_proj_bias")}
        widths = {"num_attention_heads": groups * heads, "num_key_value_heads": groups}
        channels = draw(st.integers(1, 28)) * 16
        own[str(layer)] = {**widths, "intermediate_size": channels, **biases}
    return Architecture.of({**CONFIGS["demo"], "model_type": "seap_llama", "per_layer_config": own})


def scores_of_layers(architecture, kind):
    """Return scores like ``scores``, as many as each layer has units."""
    generator, scores_L = torch.Generator().manual_seed(3), []
    for layer in architecture.layers:
        some = [torch.rand(n, generator=generator).double() for n in (layer.shape.heads, layer.shape.channels)]
        scores_L.append(tuple(score - 0.5 if kind == "standardised" else score for score in some))
    return scores_L


@given(
    architecture=compacted(),
    ratio=st.floats(0.01, 0.6),
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from(["group", "head", "none"]),
    adds_biases=st.booleans(),
)
@often
def test_layers_of_unequal_widths_give_the_ratio_of_them_all_within_a_tile(
    architecture, ratio, kind, unit, adds_biases
):
    more = {"adds_biases": adds_biases, "attention_unit": unit, "scores_L": scores_of_layers(architecture, kind)}
    try:
        shapes = chosen(architecture, ratio, kind, **more)
    except ConfigError as error:
        largest = float(re.search(r"largest is ([0-9.]+)$", str(error)).group(1))
        assert largest < ratio
        shapes, ratio = chosen(architecture, largest, kind, **more), largest
    assert off_by(shapes, architecture, ratio, adds_biases) <= tile_of(architecture)
    before, after = 0, 0
    for layer, shape in zip(architecture.layers, shapes, strict=True):
        given_ = layer.shape
        assert shape.groups <= given_.groups and shape.heads_per_group <= given_.heads_per_group
        assert shape.groups == given_.groups or unit == "group"
        assert shape.heads_per_group == given_.heads_per_group or unit == "head"
        assert shape.channels == given_.channels or (shape.channels < given_.channels and shape.channels % 16 == 0)
        before += n_weights(given_, len(layer.biases))
        after += n_weights(shape, 2 if adds_biases and shape != given_ else len(layer.biases))
    assert ratio_of(shapes, architecture, adds_biases=adds_biases) == pytest.approx(1 - after / before, rel=1e-12)


def n_weights(shape, n_biases):
    """Count a layer's weights in the demo: queries and outputs, keys and values, gated MLP, norms, added biases."""
    hidden, head = DEMO.hidden_size, DEMO.head_dim
    return hidden * (2 * shape.heads * head + 2 * shape.groups * head + 3 * shape.channels + 2 + n_biases)


@pytest.mark.parametrize("kind", WIDTHS_BY_RATIO)
def test_a_share_is_one_of_a_layers_own_weights(kind):
    own = {str(layer): {"intermediate_size": 224} for layer in range(4)}
    architecture = Architecture.of({**CONFIGS["demo"], "model_type": "seap_llama", "per_layer_config": own})
    shapes = chosen(architecture, 0.2, kind, attention_unit="none", allocation=AllocationSection(kind=kind, k=0))
    shares = [
        1 - n_weights(shape, 0) / n_weights(layer.shape, 0)
        for shape, layer in zip(shapes, architecture.layers, strict=True)
    ]
    same = shares if kind == "uniform" else shares[1:-1]  # a curve that does not rise, between protected layers
    tile = 16 * 3 * architecture.hidden_size / n_weights(architecture.layers[0].shape, 0)
    assert max(same) - min(same) <= 1.01 * tile


def test_layers_that_cannot_give_their_share_leave_it_to_the_others():
    own = {str(layer): {"intermediate_size": 16} for layer in (2, 5)}
    architecture = Architecture.of({**CONFIGS["demo"], "model_type": "seap_llama", "per_layer_config": own})
    shapes = chosen(architecture, 0.5, "uniform", attention_unit="none")
    assert [shapes[layer] for layer in (2, 5)] == [architecture.layers[layer].shape for layer in (2, 5)]
    assert off_by(shapes, architecture, 0.5, False) <= tile_of(architecture)


def test_whole_layers_go_until_their_weights_come_nearest_to_the_ratio():
    own = {str(layer): {"intermediate_size": 16} for layer in (1, 2, 3)}
    architecture = Architecture.of({**CONFIGS["demo"], "model_type": "seap_llama", "per_layer_config": own})
    sizes = [n_weights(layer.shape, 0) for layer in architecture.layers]
    influence_L = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    for ratio in (0.0, 0.02, 0.1, 0.2, 0.4, 0.99):
        off = {n: abs(sum(sizes[1 : 1 + n]) / sum(sizes) - ratio) for n in range(8)}
        assert dropped(architecture, ratio, influence_L) == tuple(range(1, 1 + min(off, key=off.__getitem__)))
    with pytest.raises(ConfigError, match=r"beyond what 1 \+ 4 protected layers") as error:
        dropped(architecture, 0.5, influence_L, protect_first=1, protect_last=4)
    largest = float(re.search(r"largest is ([0-9.]+)$", str(error.value)).group(1))
    assert largest == pytest.approx(sum(sizes[1:4]) / sum(sizes), abs=1e-4)
    assert dropped(architecture, largest, influence_L, protect_first=1, protect_last=4) == (1, 2, 3)


def test_layers_of_unequal_widths_have_no_stock_export_and_a_rank_that_cannot_share_one_names_it():
    own = {"3": {"num_attention_heads": 6, "num_key_value_heads": 3}}
    architecture = Architecture.of({**CONFIGS["demo"], "model_type": "seap_llama", "per_layer_config": own})
    for kind in (*KINDS, "depth"):
        with pytest.raises(ConfigError, match="export.format: stock needs equal widths, but layers of this model"):
            check_ratio(architecture, section(kind), ratio=0.2, adds_biases=False, stock=True)
        with pytest.raises(ConfigError, match="2 ranks .* 6 heads, 3 key-value heads and 448 channels of layer 3"):
            check_ratio(architecture, section(kind, tensor_parallel=2), ratio=0.2, adds_biases=False)


# --- what the ratio counts -------------------------------------------------------------------------------------------


def n_decoder_parameters(config):
    model_class = {
        LlamaConfig: LlamaForCausalLM,
        Qwen2Config: Qwen2ForCausalLM,
        SeapLlamaConfig: SeapLlamaForCausalLM,
        SeapQwen2Config: SeapQwen2ForCausalLM,
    }[type(config)]
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config).model.layers.parameters())


@pytest.mark.parametrize("adds_biases", [True, False])
@pytest.mark.parametrize("unit", ["group", "head"])
@pytest.mark.parametrize("model", CONFIGS)
def test_the_ratio_is_what_the_models_own_parameters_say(model, unit, adds_biases):
    architecture, values = MODELS[model], {**CONFIGS[model], "vocab_size": 8}
    values.pop("model_type")
    dense_class, cut_class = {"llama": (LlamaConfig, SeapLlamaConfig), "qwen2": (Qwen2Config, SeapQwen2Config)}[
        architecture.family_name
    ]
    dense = n_decoder_parameters(dense_class(**values))
    assert architecture.decoder_parameters == dense

    shapes = chosen(architecture, 0.35, "logistic", adds_biases=adds_biases, attention_unit=unit)
    assert len(set(shapes)) > 2 and shapes[0] == architecture.dense
    own = {
        str(layer): {
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups,
            "intermediate_size": shape.channels,
            "o_proj_bias": adds_biases and shape != architecture.dense,
            "down_proj_bias": adds_biases and shape != architecture.dense,
        }
        for layer, shape in enumerate(shapes)
    }
    values["head_dim"] = architecture.head_dim
    cut = n_decoder_parameters(cut_class(**values, per_layer_config=own))
    assert ratio_of(shapes, architecture, adds_biases=adds_biases) == pytest.approx(1 - cut / dense, rel=1e-12)


def test_a_plan_reports_the_ratio_of_what_it_keeps():
    shapes = chosen(DEMO, 0.5, "logistic", adds_biases=True)
    kept = tuple(keep(s, DEMO.dense, *layer) for s, layer in zip(shapes, scores(DEMO), strict=True))
    plan = Plan("x", 0.5, COMPENSATIONS["mean"], kept, {})
    assert list(plan.shapes) == shapes
    assert plan.planned(DEMO) == ratio_of(shapes, DEMO, adds_biases=True)
    assert [plan.cuts(layer, DEMO) for layer in range(8)] == [False, *[True] * 6, False]


# --- protection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "n"), [("demo", 1), ("llama-3-8b", 2)])
def test_logistic_leaves_the_first_and_last_layers_whole(model, n):
    architecture = MODELS[model]
    for ratio in (0.1, 0.35, 0.5):
        shapes = chosen(architecture, ratio, "logistic")
        assert shapes[:n] == shapes[-n:] == [architecture.dense] * n
        assert architecture.dense not in shapes[n:-n]


def test_explicit_protection_holds():
    allocation = AllocationSection(protect_first=3, protect_last=0)
    shapes = chosen(DEMO, 0.3, "logistic", allocation=allocation)
    assert shapes[:3] == [DEMO.dense] * 3
    assert DEMO.dense not in shapes[3:]


@given(n_layers=st.integers(1, 48), ratio=st.floats(0.01, 0.9), cap=st.floats(0.3, 0.9))
@often
def test_auto_protection_yields_only_when_needed_and_the_last_layers_first(n_layers, ratio, cap):
    assume(ratio <= cap)
    usual = 2 if n_layers >= 24 else 1
    room = [n for n in range(2 * usual + 1) if ratio * n_layers <= (n_layers - n) * cap]
    first, last = protected_layers([1.0] * n_layers, AllocationSection(), ratio, [cap] * n_layers)
    assert first + last == max(room)
    assert last <= first <= last + 1


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.78, (2, 2)), (0.8, (2, 1)), (0.83, (1, 1)), (0.86, (1, 0)), (0.89, (0, 0))]
)
def test_auto_protection_yields_in_this_order(ratio, expected):
    # Of 32 layers that give 0.9 at most, n give 0.9 n / 32: 0.7875, 0.8156, 0.8438, 0.8719 and 0.9 for 28 to 32.
    assert protected_layers([1.0] * 32, AllocationSection(), ratio, [0.9] * 32) == expected


@given(n_layers=st.integers(4, 48), ratio=st.floats(0.01, 0.9), mine=st.integers(0, 3))
@often
def test_auto_protection_never_touches_an_explicit_one(n_layers, ratio, mine):
    relative_size_L, cap_L = [1.0] * n_layers, [0.9] * n_layers
    assert protected_layers(relative_size_L, AllocationSection(protect_first=mine), ratio, cap_L)[0] == mine
    assert protected_layers(relative_size_L, AllocationSection(protect_last=mine), ratio, cap_L)[1] == mine


def refused_with(architecture, ratio, kind, **pruning):
    with pytest.raises(ConfigError, match=r"^pruning\.ratio: ") as error:
        chosen(architecture, ratio, kind, **pruning)
    return float(re.search(r"largest is ([0-9.]+)$", str(error.value)).group(1))


@pytest.mark.parametrize("unit", ["group", "head", "none"])
@pytest.mark.parametrize("model", ["demo", "llama-3-8b", "qwen2-7b", "llama-biased"])
def test_a_refusal_names_the_largest_ratio_and_that_one_works(model, unit):
    architecture, protect = MODELS[model], AllocationSection(protect_first=2, protect_last=1)
    for adds_biases in (True, False):
        pruning = {"attention_unit": unit, "adds_biases": adds_biases}
        for kind, allocation in (
            ("logistic", protect),
            ("logistic", AllocationSection()),
            ("uniform", protect),
            ("global", protect),
            ("standardised", protect),
            ("measured", protect),
            ("measured", AllocationSection()),
        ):
            largest = refused_with(architecture, 0.95, kind, allocation=allocation, **pruning)
            shapes = chosen(architecture, largest, kind, allocation=allocation, **pruning)
            assert off_by(shapes, architecture, largest, adds_biases) <= tile_of(architecture)
            assert refused_with(architecture, largest + 2e-4, kind, allocation=allocation, **pruning) == largest
            own = section(kind, allocation=allocation, attention_unit=unit)
            check_ratio(architecture, own, ratio=largest, adds_biases=adds_biases)
            with pytest.raises(ConfigError, match=f"largest is {largest:g}$"):  # no score is needed to know
                check_ratio(architecture, own, ratio=0.95, adds_biases=adds_biases)


def test_explicit_protection_that_cannot_be_met_is_refused():
    allocation = AllocationSection(protect_first=3, protect_last=3)
    largest = refused_with(DEMO, 0.5, "logistic", allocation=allocation)
    assert 0.20 < largest < 2 / 8 * 0.9
    assert refused_with(DEMO, 0.1, "logistic", allocation=AllocationSection(protect_first=8)) == 0
    assert refused_with(DEMO, 0.1, "logistic", allocation=AllocationSection(protect_first=5, protect_last=5)) == 0


@pytest.mark.parametrize("unit", ["group", "head", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_gives_more_than_the_cap_also_where_the_ratio_is_just_in_reach(kind, unit):
    full = DEMO.layer_parameters(Layer(DEMO.dense))
    for cap in (0.3, 0.55):
        pruning = {"allocation": AllocationSection(max_sparsity=cap), "attention_unit": unit}
        assert refused_with(DEMO, cap + 0.05, kind, **pruning) == pytest.approx(cap)
        for ratio in (0.7 * cap, cap):
            shapes = chosen(DEMO, ratio, kind, **pruning)
            assert off_by(shapes, DEMO, ratio, False) <= tile_of(DEMO)
            assert max(full - DEMO.layer_parameters(Layer(s)) for s in shapes) <= cap * full + tile_of(DEMO)


# --- measured rises of the loss --------------------------------------------------------------------------------------


def rise_of(shapes, architecture, sensitivities):
    """Sum the rises of all layers and sites."""
    return sum(sum(rises.values()) for rises in sensitivities.predicted(architecture, shapes))


def ways(architecture, layer, sensitivities, *, unit, align, adds_biases, cap):
    """Return (weights saved, rise, shape) of every shape that a layer of the demo may take, spelt out."""
    dense = architecture.dense
    groups = range(1, dense.groups + 1) if unit == "group" else [dense.groups]
    heads = range(1, dense.heads_per_group + 1) if unit == "head" else [dense.heads_per_group]
    channels = [dense.channels, *range(align, dense.channels, align)]

    found = [(0, 0.0, dense)]
    for shape in itertools.starmap(Shape, itertools.product(groups, heads, channels)):
        saved = n_weights(dense, 0) - n_weights(shape, 2 * adds_biases)
        if shape != dense and 0 < saved <= cap * n_weights(dense, 0) + align * 3 * architecture.hidden_size:
            rise = sum(sensitivities.rises(architecture, layer, site, [shape])[0] for site in ("attn", "mlp"))
            found.append((saved, rise, shape))
    return found


@given(
    n_layers=st.integers(2, 4),
    ratio=st.floats(0.02, 0.6),
    unit=st.sampled_from(["group", "head", "none"]),
    adds_biases=st.booleans(),
    cap=st.sampled_from([0.5, 0.9]),
    first=st.sampled_from([0, 1, "auto"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_no_widths_within_half_a_tile_have_a_smaller_summed_rise(n_layers, ratio, unit, adds_biases, cap, first, seed):
    align = 150
    architecture = deep(n_layers)
    sensitivities = measured(architecture, seed)
    ways_L = [
        ways(architecture, layer, sensitivities, unit=unit, align=align, adds_biases=adds_biases, cap=cap)
        for layer in range(n_layers)
    ]
    if first == 1:
        ways_L[0] = ways_L[0][:1]

    target = ratio * n_layers * n_weights(DEMO.dense, 0)
    half = align * 3 * DEMO.hidden_size / 2
    best = None
    for choice in itertools.product(*ways_L):
        if abs(sum(saved for saved, _, _ in choice) - target) <= half:
            rise = sum(rise for _, rise, _ in choice)
            best = rise if best is None else min(best, rise)

    allocation = AllocationSection(max_sparsity=cap, protect_first=first)
    try:
        shapes = chosen(
            architecture,
            ratio,
            "measured",
            sensitivities=sensitivities,
            allocation=allocation,
            attention_unit=unit,
            adds_biases=adds_biases,
            align=align,
        )
    except ConfigError as error:
        # Beyond the caps, or between what coarse units of attention allow.
        largest = re.search(r"largest is ([0-9.]+)$", str(error))
        assert float(largest.group(1)) < ratio if largest else best is None
        return
    assert off_by(shapes, architecture, ratio, adds_biases) <= (half if best is not None else 2 * half)
    if first == 1:
        assert shapes[0] == DEMO.dense
    if best is not None:
        assert rise_of(shapes, architecture, sensitivities) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(
    ratios=st.lists(st.floats(0.01, 0.6), min_size=2, max_size=5), adds_biases=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_more_removed_never_has_a_smaller_summed_rise(ratios, adds_biases, seed):
    # Any choice can give back channels tile by tile until it meets a smaller ratio, too.
    sensitivities = measured(DEMO, seed)
    rises = []
    for ratio in sorted(ratios):
        shapes = chosen(
            DEMO, ratio, "measured", sensitivities=sensitivities, attention_unit="none", adds_biases=adds_biases
        )
        rises.append(rise_of(shapes, DEMO, sensitivities))
    assert all(less <= more * (1 + 1e-9) for less, more in itertools.pairwise(rises))


@given(ratio=st.floats(0.05, 0.6), unit=st.sampled_from(["group", "head"]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_no_rise_below_its_noise_decides(ratio, unit, seed):
    sensitivities = measured(DEMO, seed)
    draw = random.Random(seed)
    ladders = []
    for ladder in sensitivities.ladders:
        noisy = [rise.mean <= 2 * rise.stderr for rise in ladder.rises]
        means = [
            2 * rise.stderr - draw.expovariate(50) if is_noise else rise.mean
            for rise, is_noise in zip(ladder.rises, noisy, strict=True)
        ]
        rises = tuple(Rise(mean, rise.stderr) for mean, rise in zip(means, ladder.rises, strict=True))
        ladders.append(Ladder(ladder.layer, ladder.site, ladder.shapes, rises))
    other = Sensitivities(tuple(ladders))
    assert other != sensitivities
    assert chosen(DEMO, ratio, "measured", sensitivities=other, attention_unit=unit) == chosen(
        DEMO, ratio, "measured", sensitivities=sensitivities, attention_unit=unit
    )


def test_measured_takes_where_the_loss_rises_least():
    # The MLPs of the middle are nearly free, all else is not.
    free = range(2, 6)
    ladders = []
    for layer in range(8):
        mlp = Rise(0.001 if layer in free else 0.5, 0.0)
        ladders.append(Ladder(layer, "mlp", (Shape(4, 2, 224),), (mlp,)))
        ladders.append(Ladder(layer, "attn", (Shape(2, 2, 448),), (Rise(0.5, 0.0),)))
    shapes = chosen(DEMO, 0.15, "measured", sensitivities=Sensitivities(tuple(ladders)))
    assert [shape for layer, shape in enumerate(shapes) if layer not in free] == [DEMO.dense] * 4
    assert {(shape.groups, shape.heads_per_group) for shape in shapes} == {(4, 2)}
    assert off_by(shapes, DEMO, 0.15, False) <= tile_of(DEMO) / 2


def test_equal_rises_everywhere_still_make_a_plan():
    for mean in (0.0, 0.1):
        mlp = [Ladder(layer, "mlp", (Shape(4, 2, 224),), (Rise(mean, 0.0),)) for layer in range(8)]
        attn = [Ladder(layer, "attn", (Shape(2, 2, 448),), (Rise(mean, 0.0),)) for layer in range(8)]
        equal = Sensitivities((*mlp, *attn))
        shapes = chosen(DEMO, 0.3, "measured", sensitivities=equal)
        assert off_by(shapes, DEMO, 0.3, False) <= tile_of(DEMO) / 2
        assert shapes == chosen(DEMO, 0.3, "measured", sensitivities=equal)


def test_stock_and_measured_give_the_equal_shape_with_the_least_summed_rise():
    for model, unit in itertools.product(("demo", "llama-3-8b", "qwen2-7b"), ("group", "head", "none")):
        architecture = MODELS[model]
        sensitivities = measured(architecture)
        for ratio, adds_biases in itertools.product((0.1, 0.3), (True, False)):
            options = {"adds_biases": adds_biases, "attention_unit": unit, "sensitivities": sensitivities}
            shapes = chosen(architecture, ratio, "measured", stock=True, **options)
            assert len(shapes) == architecture.n_layers and len(set(shapes)) == 1
            assert architecture.hidden_size % shapes[0].heads == 0
            assert_widths_are_allowed(shapes, architecture)
            half_tiles = tile_of(architecture) * architecture.n_layers / 2
            assert off_by(shapes, architecture, ratio, adds_biases) <= half_tiles
            uniform = chosen(architecture, ratio, "uniform", stock=True, adds_biases=adds_biases, attention_unit=unit)
            rise = rise_of(shapes, architecture, sensitivities)
            assert rise <= rise_of(uniform, architecture, sensitivities) * (1 + 1e-9)


def test_stock_widths_beside_protected_layers_are_refused():
    own = section("measured", allocation=AllocationSection(protect_first=1))
    with pytest.raises(ConfigError, match=r"^export\.format: stock needs equal widths, but .*protect_first"):
        check_ratio(DEMO, own, ratio=0.2, adds_biases=False, stock=True)
    check_ratio(DEMO, own, ratio=0.2, adds_biases=False)
    check_ratio(DEMO, section("measured"), ratio=0.2, adds_biases=False, stock=True)


def test_measured_needs_the_rises_of_what_may_be_cut():
    with pytest.raises(ValueError, match="needs sensitivities"):
        choose_shapes(DEMO, section("measured"), ratio=0.2, adds_biases=False, scores_L=())
    only_mlp = Sensitivities(tuple(ladder for ladder in measured(DEMO).ladders if ladder.site == "mlp"))
    with pytest.raises(ValueError, match="groups of attn of layer 0 was not measured"):
        chosen(DEMO, 0.2, "measured", sensitivities=only_mlp)
    shapes = chosen(DEMO, 0.2, "measured", sensitivities=only_mlp, attention_unit="none")
    assert off_by(shapes, DEMO, 0.2, False) <= tile_of(DEMO) / 2

    # Layers that the user protects need none.
    inner = Sensitivities(tuple(ladder for ladder in measured(DEMO).ladders if 0 < ladder.layer < 7))
    ends = AllocationSection(protect_first=1, protect_last=1)
    shapes = chosen(DEMO, 0.2, "measured", sensitivities=inner, allocation=ends)
    assert shapes[0] == shapes[-1] == DEMO.dense


def test_a_model_with_windows_in_some_layers_is_cut_in_its_mlp():
    # Four query heads on one key-value head, five layers with a window to each without.
    gemma = Architecture.of(Gemma3TextConfig(num_hidden_layers=6, layer_types=None).to_dict())
    assert gemma.mixes_windows
    only_mlp = Sensitivities(tuple(ladder for ladder in measured(gemma).ladders if ladder.site == "mlp"))
    shapes = chosen(gemma, 0.2, "measured", sensitivities=only_mlp, attention_unit="none")
    assert {(shape.groups, shape.heads_per_group) for shape in shapes} == {
        (gemma.dense.groups, gemma.dense.heads_per_group)
    }
    assert off_by(shapes, gemma, 0.2, False) <= tile_of(gemma) / 2


# --- whole layers ----------------------------------------------------------------------------------------------------


def dropped(architecture, ratio, influence_L, **allocation):
    pruning = section("depth", allocation=AllocationSection(**allocation))
    return choose_dropped(architecture, pruning, ratio=ratio, influence_L=influence_L)


def deep(n_layers):
    return Architecture.of({**CONFIGS["demo"], "num_hidden_layers": n_layers})


@given(
    influence_L=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    percent=st.integers(0, 99),
    first=st.integers(0, 2),
    last=st.integers(0, 2),
)
@example(influence_L=[0] * 10, percent=75, first=1, last=2)  # 7 and 8 layers are as near, but for rounding
@often
def test_the_layers_that_change_least_go_and_the_deeper_of_two_equal_ones(influence_L, percent, first, last):
    n_layers = len(influence_L)
    ratio, may_go = percent / 100, list(range(n_layers))[first : n_layers - last]
    # All counts that leave a layer, by how far off they are in whole numbers, so that a tie is one.
    n = min(range(n_layers), key=lambda n: (abs(100 * n - percent * n_layers), n))
    if n > len(may_go):
        with pytest.raises(ConfigError, match=r"^pruning\.ratio: .* protected layers allow; the largest is"):
            dropped(deep(n_layers), ratio, influence_L, protect_first=first, protect_last=last)
        return
    expected = []
    for _ in range(n):
        least = min(influence_L[layer] for layer in may_go)
        expected.append(max(layer for layer in may_go if influence_L[layer] == least))
        may_go.remove(expected[-1])
    assert dropped(deep(n_layers), ratio, influence_L, protect_first=first, protect_last=last) == tuple(
        sorted(expected)
    )


def test_only_explicit_protection_keeps_a_layer_that_could_go_as_a_whole():
    influence_L = [0.1, 0.5, 0.4, 0.3, 0.2, 0.6, 0.7, 0.15]
    assert dropped(DEMO, 0.25, influence_L) == (0, 7)
    assert dropped(DEMO, 0.25, influence_L, protect_first=1) == (4, 7)
    assert dropped(DEMO, 0.25, influence_L, protect_last=2, max_sparsity=0.1) == (0, 4)


def test_a_refusal_of_whole_layers_names_the_largest_ratio_and_that_one_works():
    allocation = {"protect_first": 3, "protect_last": 2}
    with pytest.raises(ConfigError, match=r"beyond what 3 \+ 2 protected layers allow; the largest is 0\.375$"):
        dropped(DEMO, 0.9, [0.5] * 8, **allocation)
    with pytest.raises(ConfigError, match=r"the largest is 0\.375$"):
        own = section("depth", allocation=AllocationSection(**allocation))
        check_ratio(DEMO, own, ratio=0.9, adds_biases=False)
    assert dropped(DEMO, 0.375, [0.5] * 8, **allocation) == (3, 4, 5)


def test_at_least_one_layer_stays():
    assert dropped(DEMO, 0.99, [0.5] * 8) == (1, 2, 3, 4, 5, 6, 7)
    assert dropped(deep(1), 0.99, [0.5]) == ()


# --- units -----------------------------------------------------------------------------------------------------------


def test_widths_do_not_change_when_scores_are_scaled():
    scores_L = scores(DEMO)
    shapes = chosen(DEMO, 0.35, "global", scores_L=scores_L)
    assert chosen(DEMO, 0.35, "global", scores_L=[(64 * h, 64 * c) for h, c in scores_L]) == shapes
    # Layers are compared by their scores over their mean, so a layer's own scale says nothing either.
    apart = [(2.0**i * h, 2.0**-i * c) for i, (h, c) in enumerate(scores_L)]
    assert chosen(DEMO, 0.35, "global", scores_L=apart) == shapes


def test_a_choice_among_ties_is_a_pure_function_of_the_scores():
    coarse = [(h.round(), c.round()) for h, c in scores(MODELS["llama-3-8b"])][:2]
    dense, shape = MODELS["llama-3-8b"].dense, Shape(5, 3, 7040)
    for head_H, channel_C in coarse:
        assert channel_C.unique().numel() < 100
        once = keep(shape, dense, head_H, channel_C)
        strided = torch.stack([channel_C, -channel_C], 1)[:, 0]
        assert keep(shape, dense, head_H.clone(), strided) == once
        order = sorted(range(dense.channels), key=lambda i: (channel_C[i].item(), i))
        assert list(once.channels[0]) == sorted(order[-shape.channels :])


def test_equal_scores_everywhere_still_make_a_plan():
    equal = [(torch.ones(8), torch.ones(448))] * 8
    nothing = [(torch.zeros(8), torch.zeros(448))] * 8
    for kind in WIDTHS_BY_SCORE:
        for scores_L in (equal, nothing):
            shapes = chosen(DEMO, 0.3, kind, scores_L=scores_L)
            assert off_by(shapes, DEMO, 0.3, False) <= tile_of(DEMO)
            assert shapes == chosen(DEMO, 0.3, kind, scores_L=scores_L)


def test_the_tile_follows_the_model_and_the_ranks():
    # 128 as a rule; a small MLP still has 16 tiles.
    assert WidthConstraints.of(MODELS["llama-3-8b"], PruningSection(), adds_biases=False)[0].tile == 128
    assert WidthConstraints.of(DEMO, PruningSection(), adds_biases=False)[0].tile == 16
    assert WidthConstraints.of(DEMO, PruningSection(align=8), adds_biases=False)[0].tile == 8
    assert WidthConstraints.of(DEMO, PruningSection(align=8, tensor_parallel=4), adds_biases=False)[0].tile == 32


# --- mixtures of experts ---------------------------------------------------------------------------------------------


def test_a_channel_of_a_mixture_costs_one_of_each_expert_and_the_router_stays():
    mixture = Architecture.of(MixtralConfig(num_hidden_layers=2).to_dict())
    assert mixture.n_experts == 8 and mixture.experts_per_token == 2
    assert mixture.channel_cost(mixture.layers[0]) == 8 * 3 * 4096
    assert mixture.decoder_parameters == 2 * (46_702_792_704 - 2 * 32000 * 4096 - 4096) // 32  # Mixtral 8x7B
    flat = torch.ones(2, 8, 14336)
    heads = torch.ones(2, 32)
    shapes = choose_shapes(
        mixture,
        section("global"),
        ratio=0.3,
        adds_biases=False,
        scores_L=[(head, channel) for head, channel in zip(heads, flat, strict=True)],
    )
    assert ratio_of(shapes, mixture, adds_biases=False) == pytest.approx(0.3, abs=0.01)
