"""The planner: each plan's own settings, from statistics to units, against rankings of our own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from seap_ray.config import Config
from seap_ray.core.allocation import choose_shapes
from seap_ray.core.architecture import Architecture
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.moments import Moments, pooled_statistics, stream_shares
from seap_ray.core.plan import Plan
from seap_ray.core.scores import column_scores, energy
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.checkpoint_writer import (
    PendingCheckpoint,
    _write_file,
    checkpoint_sizes,
    prepare_checkpoint,
    write_temporarily,
)
from seap_ray.pipeline.model_specs import pruning_section
from seap_ray.pipeline.plan_choice import PlanChooser
from seap_ray.pipeline.plan_files import save_plan
from seap_ray.pipeline.planner import Planner
from seap_ray.progress import progress
from seap_ray.storage.files import read_json
from seap_ray.storage.paths import storage_path
from seap_ray.storage.run import Run
from tests.support.builders import CONFIGS, MORE_CONFIGS, load
from tests.support.oracles import ratio_of
from tests.support.planners import SMALL, TASKS, architecture_of, planner_of, spec_of

often = settings(max_examples=40, deadline=None)
LLAMA_3 = architecture_of(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
)


def plan_of(planner: Planner, name: str, ratio: float) -> Plan:
    return planner.plan(spec_of(planner, name), ratio)


@pytest.mark.parametrize("kind", ["uniform", "logistic", "global", "standardised"])
@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_layers_with_and_without_experts_meet_a_ratio_together(name, kind):
    architecture = Architecture.of(MORE_CONFIGS[name]().to_dict())
    assert len({layer.n_experts for layer in architecture.layers}) == 2
    allocation = {"kind": kind, "protect_first": 0, "protect_last": 0}
    planner = planner_of(architecture, pruning={"attention_unit": "auto", "allocation": allocation})
    tile = max(map(architecture.channel_cost, architecture.layers)) * architecture.align("auto")
    for model in ("general", "sort"):
        plan = plan_of(planner, model, 0.3)
        assert abs(plan.planned(architecture) - 0.3) * architecture.decoder_parameters <= tile
        assert [len(kept.channels) for kept in plan.kept] == [max(layer.n_experts, 1) for layer in architecture.layers]
        # Each expert has a ranking of its own.
        assert all(len(set(kept.channels)) > 1 for kept in plan.kept if len(kept.channels) > 1 and kept.n_channels < 64)


# --- standardised ----------------------------------------------------------------------------------------------------


def ranked(planner: Planner, unit: str) -> list[tuple[float, int, str, tuple[int, ...], int]]:
    """Every unit of all layers, the lowest score first: score, layer, kind of unit, its indices, parameters.

    Units are channels, and groups or, where heads are cut, the heads of one place in their groups' rankings, of all
    groups at once. The score is wifv over both tasks, in numpy, from the columns up.
    """
    dense = SMALL.dense
    units = []
    weights = [task.weight for task in planner.config.tasks]
    for layer in range(SMALL.n_layers):
        score_of_columns = {}
        for site in ("attn", "mlp"):
            parts = [planner.statistics[task][layer, site] for task in TASKS]  # type: ignore[index]
            means = np.array([part.mean_D.numpy() for part in parts])
            variances = np.array([part.m2_D.numpy() / part.count for part in parts])
            mean = np.average(means, axis=0, weights=weights)
            variance = np.average(variances + (means - mean) ** 2, axis=0, weights=weights)
            score = variance * planner.norms[layer, site].l2_squared_D.numpy()  # type: ignore[index]
            score_of_columns[site] = (score - score.mean()) / score.std(ddof=1)

        # A row for each group, with the scores of its heads.
        head_scores = score_of_columns["attn"].reshape(dense.heads, SMALL.head_dim).mean(1).reshape(dense.groups, -1)
        if unit == "group":
            size = (2 * dense.heads_per_group + 2) * SMALL.head_dim * SMALL.hidden_size
            units += [(value, layer, "groups", (k,), size) for k, value in enumerate(head_scores.mean(1))]
        else:
            size = 2 * dense.groups * SMALL.head_dim * SMALL.hidden_size
            worst_first = head_scores.argsort(1)
            for place in range(dense.heads_per_group):
                heads = worst_first[:, place] + np.arange(dense.groups) * dense.heads_per_group
                units.append((head_scores.flatten()[heads].mean(), layer, "heads", tuple(heads), size))

        channel_scores = enumerate(score_of_columns["mlp"])
        units += [(score, layer, "channels", (c,), 3 * SMALL.hidden_size) for c, score in channel_scores]
    return sorted(units)


@pytest.mark.parametrize("n", [1, 60, 106, 122, 150])
@pytest.mark.parametrize("unit", ["group", "head"])
def test_standardised_cuts_the_lowest_of_all_layers_as_a_ranking_by_hand_does(unit, n):
    pruning = {"attention_unit": unit, "align": 1, "compensation": "none", "score": "wifv"}
    allocation = {"kind": "standardised", "max_sparsity": 0.99}
    flap = {"baselines": {"flap": {"compensation": "none"}}}
    planner = planner_of(SMALL, pruning={**pruning, **flap, "allocation": allocation})

    # A ratio at which the n lowest units go, and no other.
    cut = ranked(planner, unit)[:n]
    plan = plan_of(planner, "flap", sum(size for *_, size in cut) / SMALL.decoder_parameters)

    for layer, kept in enumerate(plan.kept):
        for what in (f"{unit}s", "channels"):
            gone = {i for _, cut_layer, kind, indices, _ in cut if (cut_layer, kind) == (layer, what) for i in indices}
            width = getattr(SMALL.dense, what)
            left = tuple(i for i in range(width) if i not in gone)
            assert getattr(kept, what) == ((left,) if what == "channels" else left)


# --- every score and allocation --------------------------------------------------------------------------------------


@given(
    n_layers=st.integers(2, 6),
    groups=st.sampled_from([1, 2, 4]),
    heads_per_group=st.integers(1, 4),
    tiles=st.integers(20, 60),
    ratio=st.floats(0.02, 0.6),
    score=st.sampled_from(["random", "wifv", "magnitude"]),
    allocation=st.sampled_from(["uniform", "logistic", "global", "standardised"]),
    unit=st.sampled_from(["group", "head", "none"]),
    compensation=st.sampled_from(["none", "mean"]),
)
@often
def test_plans_meet_the_ratio_within_a_tile(
    n_layers, groups, heads_per_group, tiles, ratio, score, allocation, unit, compensation
):
    architecture = architecture_of(
        hidden_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=groups * heads_per_group,
        num_key_value_heads=groups,
        head_dim=4,
        intermediate_size=8 * tiles,
    )
    own = {"score": score, "allocation": allocation, "compensation": compensation}
    pruning = {"baselines": {"x": own}, "attention_unit": unit, "align": 8, "allocation": {"max_sparsity": 0.95}}
    plan = plan_of(planner_of(architecture, pruning=pruning), "x", ratio)

    tile = 8 * 3 * architecture.hidden_size
    assert abs(plan.planned(architecture) - ratio) * architecture.decoder_parameters <= tile
    assert len(plan.kept) == n_layers and all(kept.groups and kept.heads and kept.channels for kept in plan.kept)


@pytest.mark.parametrize("own", [{"score": "random"}, {"score": "wifv", "allocation": "standardised"}], ids=str)
def test_plans_of_a_large_model_meet_the_ratio_within_a_tile(own):
    planner = planner_of(LLAMA_3, pruning={"baselines": {"x": {**own, "compensation": "none"}}})
    plan = plan_of(planner, "x", 0.35)
    assert abs(plan.planned(LLAMA_3) - 0.35) * LLAMA_3.decoder_parameters <= 128 * 3 * LLAMA_3.hidden_size


def test_random_units_depend_on_the_seed_alone():
    baselines = {"a": {"tasks": ["sort"]}, "b": {}, "c": {"seed": 5}, "d": {"seed": 6}}
    baselines = {name: {"score": "random", "compensation": "none", **own} for name, own in baselines.items()}
    planner = planner_of(SMALL, pruning={"baselines": baselines}, run={"seed": 5})
    plans = {name: plan_of(planner, name, 0.4) for name in baselines}
    assert plans["a"].kept == plans["b"].kept == plans["c"].kept != plans["d"].kept
    assert [plan.provenance["seed"] for plan in plans.values()] == [5, 5, 5, 6]
    assert "seed" not in plan_of(planner, "general", 0.4).provenance


# --- a plan's own settings -------------------------------------------------------------------------------------------


def test_a_plan_keeps_to_its_own_budget_and_curve():
    baselines = {
        "steep": {"k": 8.0, "x0": 0.7},
        "official": {"budget": "official", "score": "official_wifn", "compensation": "none"},
        "same": {},
    }
    planner = planner_of(SMALL, pruning={"baselines": baselines, "allocation": {"k": 0.5}, "align": 1})
    plans = {name: plan_of(planner, name, 0.3) for name in ("sort", *baselines)}

    for name, k, x0 in (("sort", 0.5, 0.3), ("steep", 8.0, 0.7), ("same", 0.5, 0.3)):
        pruning = planner.config.pruning
        allocation = pruning.allocation.model_copy(update={"kind": "logistic", "k": k, "x0": x0})
        own = pruning.model_copy(update={"allocation": allocation})
        expected = choose_shapes(SMALL, own, ratio=0.3, adds_biases=True, scores_L=())
        assert list(plans[name].shapes) == expected
        assert plans[name].provenance["allocation"] == allocation.model_dump()
        assert plans[name].provenance["budget"] == "exact"

    assert plans["sort"].shapes == plans["same"].shapes != plans["steep"].shapes
    official = plans["official"]
    assert official.provenance["budget"] == "official" and official.provenance["score"] == "official_wifn"
    assert official.compensation.name == "none"
    assert ratio_of(official.shapes, SMALL, adds_biases=False) < 0.2 < 0.29 < plans["same"].planned(SMALL)


def test_what_a_plan_leaves_out_is_the_pruning_sections():
    config = Config.model_validate(
        {"pruning": {"score": "magnitude", "compensation": "mean", "allocation": {"kind": "uniform", "k": 3.0}}}
    )
    filled = pruning_section(config, config.plan_settings(config.pruning.experts))
    # Where nothing forbids biases, ``auto`` is true.
    assert filled == config.pruning.model_copy(update={"bias": True})
    general = pruning_section(config, config.plan_settings(config.pruning.general))
    assert (general.score, general.compensation, general.allocation) == ("energy", "none", config.pruning.allocation)


# --- whole layers ----------------------------------------------------------------------------------------------------


def with_cosines(planner: Planner, cosines: dict[str, list[float]]) -> Planner:
    for task, cosine_L in cosines.items():
        for layer, cosine in enumerate(cosine_L):
            mean_D, m2_D = torch.tensor([[cosine], [0.0]], dtype=torch.float64)
            planner.statistics[task][layer, "block"] = Moments(20, mean_D, m2_D)  # type: ignore[index]
    return planner


def test_layers_go_by_the_mean_cosine_over_the_tasks():
    pruning = {"baselines": {"depth": {}, "depth.each": {"allocation": "depth", "per_task": True}}}
    tasks = [{"name": "sort", "weight": 3.0}, {"name": "facts", "weight": 1.0}]
    planner = with_cosines(
        planner_of(SMALL, pruning=pruning, tasks=tasks),
        {"sort": [0.1, 0.9, 0.2, 0.3, 0.8], "facts": [0.9, 0.1, 0.1, 0.99, 0.2]},
    )  # by weight: 0.3, 0.7, 0.175, 0.4725, 0.65
    expected = {"depth": (1, 4), "depth.each.sort": (1, 4), "depth.each.facts": (0, 3)}
    for name, dropped in expected.items():
        plan = plan_of(planner, name, 0.4)
        assert plan.dropped == dropped
        assert plan.planned(SMALL) == pytest.approx(0.4)
        assert plan.compensation.name == "none", "also where the pruning section has it"
        assert plan.provenance["score"] is None
        assert plan.provenance["allocation"]["kind"] == "depth"


@pytest.mark.parametrize("form", ["seap", "stock"])
def test_a_checkpoint_without_some_layers_says_what_it_is(dense, tmp_path, form):
    checkpoint = Checkpoint.open(str(dense("qwen2")))
    config = {"pruning": {"baselines": {"depth": {}}}, "export": {"format": form}}
    planner = planner_of(checkpoint.architecture, checkpoint, **config)
    with_cosines(planner, dict.fromkeys(TASKS, [0.5, 0.9, 0.1, 0.5]))
    spec = spec_of(planner, "depth")
    run = Run(tmp_path)
    planned = PlanChooser(planner, progress).plan_model(spec, 0.5)
    plan = planned.export.plan
    made = prepare_checkpoint(planned, planner.config.export, run)
    folder = write_temporarily(made)

    model = load(folder)
    whole = load(dense("qwen2"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in whole.model.layers[0].parameters())
    assert parameters == sum(parameter.numel() for parameter in whole.parameters()) - 2 * layer

    expected = {
        "requested_ratio": 0.5,
        "planned_ratio": 0.5,
        "realised_ratio": 0.5,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "kv_bytes_per_token": 2 * 2 * 4 * 6 * 4,  # keys and values, layers, heads, head dimension, bytes
    }
    assert checkpoint_sizes(made) == expected

    manifest = read_json(folder / "seap.json")
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["plan"]["kept_layers"] == [0, 2]

    save_plan(plan, checkpoint.architecture, tmp_path / "depth.json")
    assert read_json(tmp_path / "depth.json") == manifest["plan"]
    kept = load_file(tmp_path / "depth.safetensors")
    assert [len(kept[f"layers.{layer}.channels"]) for layer in range(4)] == [80, 0, 80, 0]
    assert [widths["heads"] for widths in manifest["plan"]["layers"]] == [8, 0, 8, 0]

    # The same widths of other layers are another checkpoint.
    other = Plan(plan.name, 0.5, COMPENSATIONS["none"], plan.kept, plan.provenance, dropped=(1, 2))
    planned_otherwise = replace(planned, export=replace(planned.export, plan=other))
    assert prepare_checkpoint(planned_otherwise, planner.config.export, run).fingerprint != made.fingerprint


def pending(dense: Any, tmp_path: Path) -> PendingCheckpoint:
    """A checkpoint without two layers, not written yet."""
    checkpoint = Checkpoint.open(str(dense("qwen2")))
    planner = planner_of(checkpoint.architecture, checkpoint, pruning={"baselines": {"depth": {}}})
    with_cosines(planner, dict.fromkeys(TASKS, [0.5, 0.9, 0.1, 0.5]))
    spec = spec_of(planner, "depth")
    return prepare_checkpoint(
        PlanChooser(planner, progress).plan_model(spec, 0.5), planner.config.export, Run(tmp_path)
    )


def test_a_checkpoint_is_made_while_all_bytes_are_those_that_were_hashed(dense, tmp_path):
    made = pending(dense, tmp_path)
    assert not made.has_sizes() and not made.artifact.is_made()
    made.target.parent.mkdir(parents=True)
    write_temporarily(made).rename(made.target)
    assert made.has_sizes() and made.artifact.is_made()
    assert write_temporarily(made) == made.target, "it is not written again"

    weights = made.target / next(iter(made.files))
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert made.has_sizes() and not made.artifact.is_made(), "of the same size"
    weights.write_bytes(intact[:-1])
    assert not made.has_sizes() and not made.artifact.is_made()
    weights.write_bytes(intact)
    assert made.artifact.is_made() and not replace(made, fingerprint="other").artifact.is_made()


def test_a_weight_file_of_an_earlier_attempt_stays_if_it_is_whole_and_is_written_again_if_not(dense, tmp_path):
    made = pending(dense, tmp_path)
    name, tensors = next(iter(made.files.items()))
    path = made.partial / name
    digest = _write_file(made.export, tensors, path)
    intact = path.read_bytes()
    written = path.stat().st_mtime_ns
    assert _write_file(made.export, tensors, path) == digest
    assert path.stat().st_mtime_ns == written

    # Without its last bytes the file no longer has its hash.
    path.write_bytes(intact[:-9])
    assert _write_file(made.export, tensors, path) == digest and path.read_bytes() == intact


# --- experts with a share of all tasks, scores of units --------------------------------------------------------------


def test_an_expert_with_a_share_of_all_tasks_has_their_statistics_in_its_own():
    planner = planner_of(SMALL, pruning={"experts": {"mix": 0.4}})
    weights = {task.name: task.weight for task in planner.config.tasks}
    total = sum(weights.values())
    spec = spec_of(planner, "facts")
    assert spec.weights == {
        "sort": pytest.approx(0.4 * weights["sort"] / total),
        "facts": pytest.approx(0.6 + 0.4 * weights["facts"] / total),
    }
    mixed = planner.pooled_moments(spec)[1, "mlp"]
    parts = [planner.statistics[task][1, "mlp"] for task in TASKS]
    shares = [spec.weights[task] for task in TASKS]
    torch.testing.assert_close(mixed.mean_D, sum(w * p.mean_D for w, p in zip(shares, parts, strict=True)))
    assert spec_of(planner_of(SMALL), "facts").weights == {"facts": 1.0}
    everything = spec_of(planner_of(SMALL, pruning={"experts": {"mix": 1}}), "facts").weights
    assert everything == {task: pytest.approx(weight / total) for task, weight in weights.items()}


def test_scores_that_compare_as_they_are_are_not_divided_by_their_mean():
    """Two layers alike but for a factor: by their own values the lighter one gives all, by shares of a mean both."""
    pruning = Config.model_validate(
        {"pruning": {"allocation": {"kind": "global"}, "attention_unit": "none", "align": 1}}
    )
    generator = torch.Generator().manual_seed(3)
    scores = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for n in (12, 40)]
    scores_L = [(scores[0] * 10.0**layer, scores[1] * 10.0**layer) for layer in range(SMALL.n_layers)]
    options = {"ratio": 0.05, "adds_biases": False, "scores_L": scores_L}
    shared = choose_shapes(SMALL, pruning.pruning, **options)
    own = choose_shapes(SMALL, pruning.pruning, **options, comparable=True)
    assert len({shape.channels for shape in shared}) <= 2
    assert own[0].channels < own[1].channels == own[4].channels == 40


def test_a_mixture_of_tasks_counts_an_experts_tokens_by_how_much_of_a_task_is_routed_to_it():
    """Task a sends 3 of 4 tokens to an expert, task b 1 of 4: of equal weight, they are 3 to 1 of what it sees."""
    stream = {"a": Moments(4, torch.zeros(1), torch.ones(1)), "b": Moments(400, torch.zeros(1), torch.ones(1))}
    routed = {"a": Moments(3, torch.zeros(1), torch.ones(1)), "b": Moments(100, torch.ones(1), torch.ones(1))}
    parts = [{(0, "attn"): stream[t], (0, "mlp.0"): routed[t]} for t in "ab"]
    assert stream_shares(parts, [1.0, 1.0], (0, "mlp.0")) == [0.75, 0.25]
    assert stream_shares(parts, [2.0, 3.0], (0, "attn")) == [2.0, 3.0]
    none = Moments(0, torch.zeros(1), torch.zeros(1))
    assert stream_shares([{**part, (0, "mlp.0"): none} for part in parts], [2.0, 3.0], (0, "mlp.0")) == [2.0, 3.0]


# --- whole MoE experts -----------------------------------------------------------------------------------------------


MIXTURE = Architecture.of(CONFIGS["qwen3_moe"]().to_dict())


def expert_planner(**pruning: Any) -> Planner:
    """A planner of a mixture whose experts go as a whole."""
    settings = {"mlp_unit": "expert", "score": "reap", "compensation": "none", "attention_unit": "none", **pruning}
    return planner_of(MIXTURE, pruning={**settings, "allocation": {"kind": "uniform"}})


@pytest.mark.parametrize("pooling", ["pooled", "score_average"])
@pytest.mark.parametrize("score", ["reap", "energy", "random"])
def test_the_experts_that_stay_have_the_best_scores_of_the_tasks(score, pooling):
    planner = expert_planner(score=score, general={"pooling": pooling})
    spec = spec_of(planner, "general")
    plan = planner.plan(spec, 0.4)
    n_kept = {len(kept.experts) for kept in plan.kept}
    assert len(n_kept) == 1 and 2 <= n_kept.pop() < 6
    assert plan.planned(MIXTURE) == pytest.approx(0.4, abs=0.06)
    assert plan.provenance["mlp_unit"] == "expert" and plan.compensation.name == "none"
    for layer, kept in enumerate(plan.kept):
        assert kept.shape == MIXTURE.layers[layer].shape
        parts = [planner.statistics[task] for task in spec.weights]
        if pooling == "pooled":
            parts = [pooled_statistics(parts, list(spec.weights.values()))]
        weights = [1.0] if pooling == "pooled" else [*spec.weights.values()]
        score_E = [0.0] * 6
        for weight, part in zip(weights, parts, strict=True):
            gated_E, share_E = part[layer, "experts"].mean_D.chunk(2)
            columns = column_scores(energy, part, planner.norms, [(layer, f"mlp.{e}") for e in range(6)])
            for e in range(6):
                # Random statistics may have a share below zero, of which the score is no mean.
                reap = float(gated_E[e] / share_E[e]) if share_E[e] > 0 else 0.0
                score_E[e] += weight * (reap if score == "reap" else float(columns[e].sum() * share_E[e]))
        if score != "random":
            assert kept.experts == tuple(sorted(sorted(range(6), key=lambda e: score_E[e])[-len(kept.experts) :]))


def test_a_plan_of_whole_experts_is_stored_with_their_numbers_and_the_channels_of_those_that_stay(tmp_path):
    planner = expert_planner()
    plan = planner.plan(spec_of(planner, "general"), 0.4)
    save_plan(plan, MIXTURE, storage_path(tmp_path / "plan.json"))
    indices = load_file(tmp_path / "plan.safetensors")
    width = MIXTURE.layers[0].shape.channels
    for layer, kept in enumerate(plan.kept):
        assert tuple(indices[f"layers.{layer}.experts"].tolist()) == kept.experts
        of_expert = {channel // width for channel in indices[f"layers.{layer}.channels"].tolist()}
        assert of_expert == {*kept.experts}
    layers = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert [layer["experts"] for layer in layers] == [len(kept.experts) for kept in plan.kept]
