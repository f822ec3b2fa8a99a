"""Targets: never above what a model may take, and near to it; judged against sums by hand and all choices there are."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from seap_ray.config import PruningSection
from seap_ray.core.allocation import check_target, choose_dropped, choose_shapes, even_ratio
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.sensitivity import Ladder, Rise, Sensitivities
from seap_ray.core.targets import (
    StoredSizes,
    WidthTable,
    WidthTime,
    dimensions_of,
    head_cache,
    least_cut,
    make_target,
)
from seap_ray.core.widths import WidthConstraints
from seap_ray.errors import ConfigError

often = settings(max_examples=40, deadline=None)

SMALL = Architecture.of(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
    }
)
TINY = replace(SMALL, layers=SMALL.layers[:3])
OUTSIDE = 5000
KINDS = ("uniform", "logistic", "global", "standardised", "measured")
NUMBER_TARGETS = ("parameters", "weights", "memory")


def stored(architecture, item_bytes=2):
    parameters = architecture.decoder_parameters + OUTSIDE
    return StoredSizes(parameters, item_bytes * parameters, item_bytes)


def pruning_of(target, kind="uniform", **keys):
    allocation = {"kind": kind, **keys.pop("allocation", {})}
    keys = {"attention_unit": "group", **keys}
    return PruningSection.model_validate({"target": target, "allocation": allocation, **keys})


def table_of(architecture, seed=0):
    """Times that fall with the widths but for noise."""
    rng = random.Random(seed)
    whole = architecture.dense
    times = [WidthTime(whole, 2e-3, 5e-4)]
    for channels in (64, 128, 192):
        part = channels / whole.channels
        noise = rng.uniform(0.95, 1.05)
        narrow = Shape(whole.groups, whole.heads_per_group, channels)
        times.append(WidthTime(narrow, noise * (1e-3 + 1e-3 * part), noise * (2e-4 + 3e-4 * part)))
    for groups in range(1, whole.groups):
        narrow = Shape(groups, whole.heads_per_group, whole.channels)
        times.append(WidthTime(narrow, 1.5e-3 + 5e-4 * groups / whole.groups, 4e-4 + 1e-4 * groups / whole.groups))
    return WidthTable(dimensions_of(architecture), 1, 128, 1e-3, 1e-4, tuple(times))


def target_of(architecture, what, share, **keys):
    """Return the settings and the target that leave a share of what the model takes before the cut."""
    table = table_of(architecture)
    sizes = stored(architecture)
    if what == "latency":
        # A target that is met whatever happens tells what the whole model takes.
        easy = pruning_of({"latency": {"tokens_per_second": 1e-3}}).target
        whole = make_target(easy, architecture, sizes, table)
        section = {"latency": {"tokens_per_second": whole.tokens_per_second(whole.dense) / share}}
    elif what == "memory":
        about = {"tokens": 96, "sequences": 3, "workspace": 1000}
        easy = pruning_of({"memory": {"total": 10**12, **about}}).target
        section = {"memory": {"total": int(share * make_target(easy, architecture, sizes).dense), **about}}
    else:
        section = {what: int(share * (sizes.parameters if what == "parameters" else sizes.n_bytes))}
    pruning = pruning_of(section, **keys)
    return pruning, make_target(pruning.target, architecture, sizes, table)


def scores(architecture, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = architecture.dense
    return [
        (
            torch.randn(shape.heads, generator=generator, dtype=torch.float64) ** 2,
            torch.randn(shape.channels, generator=generator, dtype=torch.float64) ** 2,
        )
        for _ in range(architecture.n_layers)
    ]


def sensitivities(architecture, pruning, seed):
    rng = random.Random(seed)
    ladders = []
    for constraints in WidthConstraints.of(architecture, pruning, adds_biases=True):
        for site in ("attn", "mlp"):
            if shapes := constraints.narrower(site):
                steps = sorted(rng.uniform(0, 1) for _ in shapes)
                rises = tuple(Rise(step**2, 0.001) for step in steps)
                ladders.append(Ladder(constraints.layer, site, tuple(shapes), rises))
    return Sensitivities(tuple(ladders))


def choose(pruning, target, seed=0, **keys):
    architecture = target.architecture
    measured = sensitivities(architecture, pruning, seed) if pruning.allocation.kind == "measured" else None
    keys = {"adds_biases": True, "scores_L": scores(architecture, seed), **keys}
    return choose_shapes(architecture, pruning, ratio=0.5, target=target, sensitivities=measured, **keys)


def one_tile(architecture, pruning, target):
    """Return what the dearest tile of channels takes."""
    dearest = 0
    for constraints in WidthConstraints.of(architecture, pruning, adds_biases=True):
        costs = []
        for channels in constraints.channel_options:
            layer = replace(architecture.layers[0], shape=replace(constraints.original, channels=channels))
            costs.append(target.layer_cost(constraints.layer, layer))
        dearest = max(dearest, *(wide - narrow for wide, narrow in itertools.pairwise(costs)))
    return dearest


# --- what layers take ------------------------------------------------------------------------------------------------


def test_parameters_and_weights_are_those_of_the_dense_model_and_of_the_cut_layers():
    for kind, times in (("parameters", 1), ("weights", 2)):
        _, target = target_of(SMALL, kind, 0.8)
        assert target.dense == times * (SMALL.decoder_parameters + OUTSIDE)
        shapes = [Shape(3, 2, 128)] * 6
        # Without biases: norms stay, q, k, v, o and the MLP's three matrices are cut.
        layer = 64 * 8 * 6 * 2 + 2 * 64 * 8 * 3 + 3 * 64 * 128 + 2 * 64
        assert target.cost_of(shapes, adds_biases=False) == times * (6 * layer + OUTSIDE)
        assert target.cost_of(shapes, adds_biases=True) == times * (6 * (layer + 2 * 64) + OUTSIDE)


def test_weights_of_other_types_in_the_layers_count_as_they_are():
    sizes = StoredSizes(SMALL.decoder_parameters, 2 * SMALL.decoder_parameters + 700, 2)
    target = make_target(pruning_of({"weights": 10**5}).target, SMALL, sizes)
    assert target.dense == sizes.n_bytes


def test_memory_is_weights_cache_and_workspace_and_windows_hold_no_more_than_themselves():
    config = Gemma3TextConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    architecture = Architecture.of(config.to_dict())
    assert architecture.windows == (16, None) * 3
    about = {"total": 10**6, "tokens": 50, "sequences": 7, "workspace": 1234}
    target = make_target(pruning_of({"memory": about}).target, architecture, stored(architecture))

    shapes = [Shape(groups, 2, 64) for groups in (4, 4, 3, 3, 2, 1)]
    by_hand = 1234 + 2 * OUTSIDE
    for shape, held in zip(shapes, (16, 50) * 3, strict=True):
        by_hand += 2 * architecture.layer_parameters(replace(architecture.layers[0], shape=shape))
        by_hand += 7 * held * shape.groups * 8 * 2 * 2  # sequences, tokens, heads, head size, key and value, bytes
    assert target.cost_of(shapes, adds_biases=False) == by_hand
    layers = [(i, replace(architecture.layers[i], shape=shape)) for i, shape in enumerate(shapes)]
    n_parameters = OUTSIDE + sum(architecture.layer_parameters(layer) for _, layer in layers)
    assert target.met(layers, parameters=n_parameters, n_bytes=2 * n_parameters) == by_hand


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LlamaConfig(num_hidden_layers=3), (None,) * 3),
        (MistralConfig(num_hidden_layers=3, sliding_window=9), (9,) * 3),
        (MistralConfig(num_hidden_layers=3, sliding_window=None), (None,) * 3),
        (Gemma2Config(num_hidden_layers=4, sliding_window=9), (9, None, 9, None)),
        (Gemma3TextConfig(num_hidden_layers=7, sliding_window=9), (9, 9, 9, 9, 9, None, 9)),
        (
            Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=9, max_window_layers=3),
            (None, None, None, 9),
        ),
        (Qwen2Config(num_hidden_layers=4, use_sliding_window=False, sliding_window=9), (None,) * 4),
    ],
)
def test_windows_are_those_that_transformers_gives_the_layers(config, windows):
    values = config.to_dict()
    assert Architecture.of(values).windows == windows
    # Older files of the same model do not list what each layer attends to.
    values.pop("layer_types", None)
    assert Architecture.of(values).windows == windows
    assert head_cache(Architecture.of(values), tokens=20, sequences=1, item_bytes=1)[0] > 0


def test_a_request_takes_its_prompt_once_and_a_step_for_each_further_token():
    pruning, target = target_of(SMALL, "latency", 0.9)
    seconds = 1e-3 + 31 * 1e-4 + 6 * (2e-3 + 31 * 5e-4)
    assert target.dense == pytest.approx(1e9 * seconds, abs=10)
    assert target.tokens_per_second(target.dense) == pytest.approx(32 / seconds)
    assert target.limit == pytest.approx(0.9e9 * seconds, rel=1e-6)

    # What attention and MLP save adds up; between widths times are linear.
    table = table_of(SMALL)
    by_shape = {time.shape: 1e9 * (time.prefill + 31 * time.decode) for time in table.times}
    whole = by_shape[Shape(4, 2, 256)]
    middle = (by_shape[Shape(4, 2, 64)] + by_shape[Shape(4, 2, 128)]) / 2
    expected = 6 * (middle + by_shape[Shape(2, 2, 256)] - whole) + 1e9 * (1e-3 + 31e-4)
    assert target.cost_of([Shape(2, 2, 96)] * 6, adds_biases=False) == pytest.approx(expected, abs=10)
    assert target.cost_of([Shape(2, 2, 8)] * 6, adds_biases=False) == target.cost_of(
        [Shape(2, 2, 64)] * 6, adds_biases=False
    ), "nothing is known below the narrowest width"


def test_noise_makes_no_narrower_layer_slower():
    whole = SMALL.dense
    narrow = [replace(whole, channels=channels) for channels in (64, 128, 192)]
    times = [WidthTime(whole, 4e-3, 0.0), *map(WidthTime, narrow, (1e-3, 3e-3, 2e-3), (0.0,) * 3)]
    table = WidthTable(dimensions_of(SMALL), 1, 128, 0.0, 0.0, tuple(times))
    target = make_target(pruning_of({"latency": {"tokens_per_second": 1}}).target, SMALL, stored(SMALL), table)
    costs = [target.layer_cost(0, replace(SMALL.layers[0], shape=shape)) for shape in (*narrow, whole)]
    assert costs == [10**6, 2_500_000, 2_500_000, 4 * 10**6]


# --- allocations -----------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(KINDS),
    what=st.sampled_from((*NUMBER_TARGETS, "latency")),
    share=st.floats(0.5, 0.99),
    unit=st.sampled_from(("none", "group", "head")),
    biased=st.booleans(),
    seed=st.integers(0, 5),
)
@often
def test_no_plan_takes_more_than_it_may_nor_a_tile_less_where_there_is_room(kind, what, share, unit, biased, seed):
    # Times of narrower heads were not measured.
    assume(not (what == "latency" and unit == "head"))
    pruning, target = target_of(SMALL, what, share, kind=kind, attention_unit=unit)
    try:
        check_target(SMALL, pruning, target, adds_biases=biased)
        shapes = choose(pruning, target, seed, adds_biases=biased)
    except ConfigError as error:
        assert "is out of reach; the " in str(error)
        return

    cost = target.cost_of(shapes, adds_biases=biased)
    assert cost <= target.limit
    may_grow = [shape.channels < 256 and shape != SMALL.layers[i].shape for i, shape in enumerate(shapes)]
    if any(may_grow) and kind != "measured":
        assert cost > target.limit - one_tile(SMALL, pruning, target) - 1


@given(what=st.sampled_from(NUMBER_TARGETS), kind=st.sampled_from(KINDS), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_lower_target_leaves_no_more(what, kind, seed):
    costs = []
    for share in (0.95, 0.85, 0.75, 0.65):
        pruning, target = target_of(SMALL, what, share, kind=kind, attention_unit="none")
        costs.append(target.cost_of(choose(pruning, target, seed), adds_biases=True))
    assert costs == sorted(costs, reverse=True) and len({*costs}) == 4


@given(what=st.sampled_from((*NUMBER_TARGETS, "latency")), share=st.floats(0.6, 0.95), seed=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_measured_is_the_best_of_all_choices_within_a_tile(what, share, seed):
    pruning, target = target_of(TINY, what, share, kind="measured", align=64)
    table = sensitivities(TINY, pruning, seed)
    constraints_L = WidthConstraints.of(TINY, pruning, adds_biases=False)
    every_L = []
    for constraints in constraints_L:
        shapes = [
            Shape(*option, c) for option, c in itertools.product(constraints.options, constraints.channel_options)
        ]
        shapes = [shape for shape in shapes if constraints.removed(shape) <= 0.9 * constraints.size]
        rises = [table.rises(TINY, constraints.layer, site, shapes) for site in ("attn", "mlp")]
        every_L.append(list(zip(shapes, map(sum, zip(*rises, strict=True)), strict=True)))

    first = replace(TINY.dense, channels=192)
    tile = target.layer_cost(0, TINY.layers[0]) - target.layer_cost(0, replace(TINY.layers[0], shape=first))
    best = math.inf
    for choice in itertools.product(*every_L):
        cost = target.cost_of([shape for shape, _ in choice], adds_biases=False)
        if target.limit - tile <= cost <= target.limit:
            best = min(best, math.fsum(rise for _, rise in choice))
    assume(best < math.inf)

    shapes = choose_shapes(TINY, pruning, ratio=0.5, adds_biases=False, scores_L=(), target=target, sensitivities=table)
    assert target.is_met(shapes, adds_biases=False)
    assert math.fsum(sum(predicted.values()) for predicted in table.predicted(TINY, shapes)) == pytest.approx(
        best, abs=1e-9
    )


def test_layers_that_go_as_a_whole_are_no_more_than_the_target_asks():
    for share, n_dropped in ((0.99, 1), (0.8, 2), (0.5, 4)):
        pruning, target = target_of(SMALL, "weights", share, kind="depth")
        check_target(SMALL, pruning, target, adds_biases=False)
        influence_L = [0.5, 0.1, 0.2, 0.3, 0.4, 0.6]
        dropped = choose_dropped(SMALL, pruning, ratio=0.1, influence_L=influence_L, target=target)
        assert dropped == tuple(range(1, 1 + n_dropped))
        layer = target.layer_cost(0, SMALL.layers[0])
        assert target.dense - n_dropped * layer <= target.limit < target.dense - (n_dropped - 1) * layer


def test_stock_checkpoints_meet_targets_with_equal_layers():
    for kind in ("uniform", "measured"):
        pruning, target = target_of(SMALL, "weights", 0.8, kind=kind, attention_unit="none")
        (shape,) = {*choose(pruning, target, stock=True, adds_biases=False)}
        assert target.is_met([shape] * 6, adds_biases=False)
        wider = replace(shape, channels=shape.channels + 16)
        assert not target.is_met([wider] * 6, adds_biases=False)


def test_attention_that_saves_more_than_asked_gives_channels_back():
    pruning, target = target_of(SMALL, "memory", 0.72, kind="uniform")
    shapes = choose(pruning, target)
    assert target.is_met(shapes, adds_biases=True)
    wider = replace(shapes[-1], channels=min(shapes[-1].channels + 16, 256))
    assert shapes[-1].channels == 256 or not target.is_met([*shapes[:-1], wider], adds_biases=True)


# --- the ratio that stands for a target, and what is refused ---------------------------------------------------------


@pytest.mark.parametrize("what", [*NUMBER_TARGETS, "latency"])
def test_the_ratio_of_a_target_is_the_smallest_that_even_layers_meet_it_at(what):
    pruning, target = target_of(SMALL, what, 0.8, kind="measured", attention_unit="auto")
    ratio = even_ratio(SMALL, pruning, target, adds_biases=False)
    assert round(ratio, 4) == ratio

    def even(at):
        section = pruning_of({}, attention_unit="none")
        return choose_shapes(SMALL, section, ratio=at, adds_biases=False, scores_L=())

    assert target.is_met(even(ratio), adds_biases=False)
    assert not target.is_met(even(ratio - 1e-4), adds_biases=False)


def test_a_ratio_cuts_attention_where_the_mlp_alone_does_not_meet_the_target():
    pruning, target = target_of(SMALL, "weights", 0.3, kind="measured", attention_unit="auto")
    assert even_ratio(SMALL, pruning, target, adds_biases=False) > 0.7


def test_targets_that_need_no_cut_or_are_out_of_reach_are_refused_with_what_is_within():
    pruning, target = target_of(SMALL, "weights", 1.0)
    with pytest.raises(ConfigError, match=r"weights: 748.9KB is met without a cut: the model has 748.9KB"):
        check_target(SMALL, pruning, target, adds_biases=False)

    for kind in (*KINDS, "auto", "depth"):
        for what in (*NUMBER_TARGETS, "latency"):
            pruning, target = target_of(SMALL, what, 0.01, kind=kind)
            with pytest.raises(ConfigError, match="is out of reach; the (smallest|largest) within reach is") as error:
                check_target(SMALL, pruning, target, adds_biases=False)
            if what == "latency" or kind in ("auto", "depth"):
                continue
            # What it names can be asked for.
            named = str(error.value).rpartition(" ")[2]
            section = {"memory": {**target.settings, "total": named}} if what == "memory" else {what: named}
            asked = pruning_of(section, kind=kind)
            again = make_target(asked.target, SMALL, stored(SMALL), table_of(SMALL))
            check_target(SMALL, asked, again, adds_biases=False)
            assert again.is_met(choose(asked, again, adds_biases=False), adds_biases=False)


def test_a_bisection_leaves_out_ratios_that_cannot_be_met():
    def cut_at(ratio):
        if 0.3 < ratio < 0.4 or ratio > 0.85:
            raise ConfigError("cannot be met")
        return ratio

    assert least_cut(cut_at, lambda cut: cut >= 0.5, 0.9) == pytest.approx(0.5, abs=1e-5)
    assert least_cut(cut_at, lambda cut: cut >= 0.35, 0.9) == pytest.approx(0.4, abs=1e-5)
    assert least_cut(cut_at, lambda cut: cut > 0.9, 0.9) is None


def test_a_table_of_another_model_or_batch_is_refused():
    table = table_of(SMALL)
    section = pruning_of({"latency": {"tokens_per_second": 40}}).target
    with pytest.raises(ConfigError, match="measured with hidden_size 64, not 128"):
        make_target(section, replace(SMALL, hidden_size=128), stored(SMALL), table)
    with pytest.raises(ConfigError, match="measured with batch 1, not 2"):
        section = pruning_of({"latency": {"tokens_per_second": 40, "batch": 2}}).target
        make_target(section, SMALL, stored(SMALL), table)
    with pytest.raises(ConfigError, match="no times of layers with fewer heads"):
        pruning, target = target_of(SMALL, "latency", 0.8, attention_unit="head")
        target.cost_of([Shape(4, 1, 256)] * 6, adds_biases=False)
    with pytest.raises(ConfigError, match=r"rows\.json is no table of times"):
        WidthTable.from_json({"rows": []}, "rows.json")


def test_a_table_is_read_as_it_was_written():
    table = table_of(SMALL)
    content = {
        "model": table.dimensions,
        "batch": 1,
        "prompt_tokens": 128,
        "fixed": {"prefill": 1e-3, "decode": 1e-4},
        "widths": [time.to_json() for time in table.times],
    }
    assert WidthTable.from_json(json.loads(json.dumps(content)), "table") == table


def test_costs_are_shown_so_that_they_can_be_asked_for():
    _, weights = target_of(SMALL, "weights", 0.8)
    assert weights.shown(1_234_567) == "1.235MB" and weights.shown(12 * 10**9) == "12GB"
    _, parameters = target_of(SMALL, "parameters", 0.8)
    assert parameters.shown(6_500_000_001) == "6.501B" and parameters.shown(900) == "900"
    _, latency = target_of(SMALL, "latency", 0.8)
    assert latency.shown(32 * 10**9 // 41) == "41 tokens/s" and latency.bound == "at least"
