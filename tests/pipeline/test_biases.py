"""Biases: what a format allows, what a config asks for, and one line where they exclude each other."""

import runpy
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.pipeline.biases import bias_line, with_bias
from seap_ray.pipeline.model_specs import assumed_specs, compensation_for, model_specs
from seap_ray.storage.files import read_json
from seap_ray.storage.run import Run
from tests.support import ROOT
from tests.support.builders import CONFIGS, random_covariances, random_plan
from tests.support.oracles import tensors_of
from tests.support.planners import SMALL, planner_of, spec_of

main = runpy.run_path(str(ROOT / "jobs" / "prune.py"))["main"]
COVARIANCE = {"statistics": "covariance"}
STOCK = {"format": "stock"}
WITHOUT = ("mistral", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")
"""Families whose own checkpoints have no output biases; this Mistral has windows."""


def architecture_of(name: str) -> Architecture:
    return Architecture.of(CONFIGS[name]().to_dict())


def config_of(**sections: Any) -> Config:
    return Config.model_validate({"tasks": ["sort", "facts"], **sections})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_format_without_biases_closes_what_is_open_and_says_so(name):
    architecture = architecture_of(name)
    config = config_of(export=STOCK, calibration=COVARIANCE)
    closed = with_bias(config, architecture)
    assert (closed.pruning.bias, closed is config) == ((False, False) if name in WITHOUT else ("auto", True))
    line = bias_line(config, architecture)
    if name not in WITHOUT:
        assert line is None
        return
    assert line.startswith(f"pruning.bias: false, since a stock {architecture.family_name} has no biases on self_attn.")
    assert line.endswith("; least squares is fitted without an intercept")
    assert all(spec.settings.bias is False for spec in model_specs(closed))
    assert {compensation_for(spec.settings).name for spec in assumed_specs(closed)} == {"least_squares_without_bias"}
    assert with_bias(closed, architecture) is closed and bias_line(closed, architecture) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_our_own_format_holds_biases_of_every_family(name):
    config = config_of(calibration=COVARIANCE)
    assert with_bias(config, architecture_of(name)) is config
    assert bias_line(config, architecture_of(name)) is None
    assert all(spec.settings.bias is True for spec in model_specs(config))


def test_without_covariances_nothing_is_compensated_and_the_line_says_what_would_be():
    config = config_of(export=STOCK)
    line = bias_line(config, architecture_of("qwen3"))
    assert line.endswith("; nothing is compensated, as least squares needs calibration.statistics=covariance")
    closed = with_bias(config, architecture_of("qwen3"))
    assert {spec.settings.compensation for spec in assumed_specs(closed)} == {"none"}
    bare = config_of(export=STOCK, pruning={"compensation": "none"})
    assert bias_line(bare, architecture_of("qwen3")) is None, "nothing changes"


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (
            {"bias": True},
            r"pruning.bias: true, but a stock qwen3 has no biases on .* \(general\); use pruning.bias=false",
        ),
        ({"experts": {"bias": True}}, r"pruning.bias: true, but .* \(sort\)"),
        ({"compensation": "mean"}, r"pruning.compensation: mean is a bias, and a stock qwen3 has none|no biases"),
        ({"baselines": {"flap": {}}}, r"pruning.compensation: mean is a bias, .* \(flap\); use least_squares"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_what_it_can(pruning, message):
    config = config_of(export=STOCK, calibration=COVARIANCE, pruning=pruning)
    with pytest.raises(ConfigError, match=message):
        with_bias(config, architecture_of("qwen3"))
    assert with_bias(config, architecture_of("llama_gqa")) is config


def test_biases_of_an_earlier_compensation_are_refused_before_any_work():
    dense = CONFIGS["qwen3"]().to_dict()
    again = Architecture.of({**dense, "model_type": "seap_qwen3", "per_layer_config": {"1": {"o_proj_bias": True}}})
    with pytest.raises(ConfigError, match="has no biases on .*, and this model was given some; use export.format=seap"):
        with_bias(config_of(export=STOCK), again)


@pytest.mark.parametrize("plan", ["experts", "baselines.mine"])
def test_the_mean_without_a_bias_is_refused_by_the_config(plan):
    pruning: dict[str, Any] = {"bias": False, "compensation": "mean"}
    if plan != "experts":
        pruning = {"bias": False, "compensation": "none", "baselines": {"mine": {"compensation": "mean"}}}
    with pytest.raises(
        ValueError, match=rf"pruning\.{plan}: compensation mean is a bias, and bias is false; choose least"
    ):
        config_of(pruning=pruning)


def test_a_baseline_of_other_authors_has_their_bias_in_a_run_without():
    config = config_of(pruning={"bias": False, "baselines": {"flap": {}}})
    flap = next(spec for spec in model_specs(config) if spec.name == "flap")
    assert compensation_for(flap.settings).name == "mean"


def test_a_plan_without_a_bias_says_so_and_saves_what_a_bias_would_take():
    fitted = {"compensation": "least_squares", "score": "wifv"}
    plans = {}
    for bias in (True, False):
        planner = planner_of(SMALL, pruning={**fitted, "bias": bias}, calibration=COVARIANCE)
        plans[bias] = planner.plan(spec_of(planner, "general"), 0.3)
    assert plans[False].compensation.name == "least_squares_without_bias"
    assert plans[False].provenance == {**plans[True].provenance, "bias": False}
    assert "bias" not in plans[True].provenance
    assert all(not layer.biases for _, layer in plans[False].layers_after(SMALL))
    for plan in plans.values():
        assert plan.planned(SMALL) == pytest.approx(0.3, abs=0.02)


def test_only_scores_that_know_of_a_bias_are_computed_again_without_one():
    keys = {}
    for score in ("obs", "block_wifv"):
        for bias in (True, False):
            pruning = {"compensation": "least_squares", "score": score, "bias": bias}
            planner = planner_of(SMALL, pruning=pruning, calibration=COVARIANCE)
            spec = spec_of(planner, "general")
            keys[score, bias] = planner._score_provenance(spec, planner.config.pruning)["unit_scores"]
    assert keys["obs", True] != keys["obs", False]
    assert keys["block_wifv", True] == keys["block_wifv", False]


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "mixtral"])
def test_without_biases_models_of_equal_widths_fit_one_engine_whatever_compensates_them(dense, name):
    """A shared engine holds models whose config.json is the same."""
    base = Checkpoint.open(str(dense(name)))
    configs = {}
    for way in COMPENSATIONS:
        plan = random_plan(base.architecture, 3, way)
        configs[way] = CheckpointExport(base, plan, random_covariances(base.architecture, 1)).config()
    assert configs["least_squares_without_bias"] == configs["none"] != configs["least_squares"]


@pytest.mark.ray
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_a_job_leaves_ordinary_checkpoints_with_the_repair_and_says_that_it_has_no_bias(
    cluster, dense, tmp_path, capsys, name
):
    source = dense(name)
    settings = [
        *("model.dtype=float32", f"model.source={source}", "tasks=[sort, logic]", "corpus.samples=24"),
        *("corpus.shard_sequences=8", "calibration.workers=1", "evaluation.samples=0", "pruning.ratio=0.3"),
        *("calibration.statistics=covariance", "pruning.score=wifv", "pruning.compensation=least_squares"),
        *("pruning.baselines={}", "pruning.allocation.kind=uniform", "pruning.attention_unit=none"),
    ]
    arguments = [f"config={ROOT / 'ray_config.yaml'}", f"run.storage={tmp_path}", "run.name=run", *settings]
    assert main([*arguments, "export.format=stock"]) == 0
    output = capsys.readouterr().out
    assert f"pruning.bias: false, since a stock {name} has no biases on self_attn.o_proj" in output

    run = Run(tmp_path / "run")
    for model in ("general", "sort", "logic"):
        manifest = read_json(run.expert(0.3, model) / "seap.json")
        for about in (manifest["plan"], read_json(run.plan(0.3, model))):
            assert (about["compensation"], about["bias"]) == ("least_squares_without_bias", False)
        assert AutoModelForCausalLM.from_pretrained(run.expert(0.3, model)).config.model_type == name
        assert not [tensor for tensor in tensors_of(run.expert(0.3, model)) if tensor.endswith(".bias")]
