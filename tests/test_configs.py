"""The recipes of configs/: read by every job, planned for the sizes of their models, and what the doctor says of them.

No weights are here: what decides sizes in each model's config.json is written down below, as the field knows it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from seap_ray.config import Config, load_config
from seap_ray.core.architecture import Architecture
from seap_ray.core.scores import Norms
from seap_ray.errors import ConfigError
from seap_ray.models.multimodal import language_config
from seap_ray.pipeline.model_specs import ModelSpec, assumed_specs
from seap_ray.pipeline.needs import ModelSize, assumed_rates, needs
from seap_ray.pipeline.planner import Planner
from seap_ray.pipeline.preflight import check_ratios
from seap_ray.storage.run import Run
from tests.support import ROOT
from tests.support.builders import random_statistics

CONFIGS = ROOT / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


class Model(NamedTuple):
    """A model of a recipe: what decides sizes in its config.json, and what is known of it."""

    config: Mapping[str, Any]
    parameters: int
    """All weights; of Gemma those of its language model."""


LLAMA_2 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA_3_1 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    "torch_dtype": "bfloat16",
}
QWEN_3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GEMMA_3 = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "intermediate_size": 10240,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14},
    "torch_dtype": "bfloat16",
}
MODELS = {
    "llama-2-7b-paper": Model(LLAMA_2, 6_738_415_616),
    "llama-3.1-8b": Model(LLAMA_3_1, 8_030_261_248),
    "qwen3-8b": Model(QWEN_3, 8_190_735_360),
    "gemma-3-4b": Model(language_config(GEMMA_3), 3_880_263_168),
}

each_recipe = pytest.mark.parametrize("name", RECIPES)


def recipe(name: str, *overrides: str) -> Config:
    return load_config([f"config={CONFIGS / name}.yaml", *overrides])


def test_every_recipe_is_tested_and_has_a_run_of_its_own():
    assert {*RECIPES} == {*MODELS}
    assert len({recipe(name).run.name for name in RECIPES}) == len(RECIPES)


@each_recipe
@pytest.mark.parametrize("job", [[], ["pruning.ratio=0.35"], ["study=table"], ["study=ratio"]], ids=" ".join)
def test_a_recipe_is_read_by_every_job(name, job):
    config = recipe(name, *job)
    assert config.calibration.num_gpus == 1 and config.model.dtype == MODELS[name].config["torch_dtype"]
    assert json.dumps(config.model_dump(mode="json"))


@each_recipe
def test_the_parameters_of_its_model_are_those_that_the_field_knows(name):
    size = ModelSize.from_config(MODELS[name].config)
    assert size.parameters == MODELS[name].parameters
    assert size.n_bytes == 2 * MODELS[name].parameters


# --- planning --------------------------------------------------------------------------------------------------------


def planner(config: Config, architecture: Architecture) -> Planner:
    """A planner with the statistics of random activations, the same ones for every task."""
    statistics = random_statistics(architecture, seed=0, n=2)
    norms = {
        key: Norms(moments.mean_D.abs(), moments.mean_D.square())
        for key, moments in statistics.items()
        if key[1] in architecture.modules(key[0])
    }
    tasks = [task.name for task in config.tasks]
    checkpoint: Any = SimpleNamespace(architecture=architecture)
    by_task = dict.fromkeys(tasks, statistics)
    return Planner(config, checkpoint, by_task, norms, dict.fromkeys(tasks, "hash"), {}, Run(Path("nowhere")), {})


@each_recipe
def test_every_ratio_of_a_recipe_is_met_by_plans_for_its_model(name):
    config = recipe(name)
    architecture = Architecture.of(MODELS[name].config)
    made = planner(config, architecture)
    kinds: dict[Any, ModelSpec] = {}
    for spec in assumed_specs(config):
        # What is left to be judged is met by the allocations that are judged.
        open_ = ("uniform", "logistic") if spec.settings.allocation == "auto" else (spec.settings.allocation,)
        for allocation in open_:
            settings = spec.settings.model_copy(update={"allocation": allocation})
            kinds[spec.kind, settings] = replace(spec, settings=settings)

    # A tile of channels in one layer is the finest step.
    tile = architecture.align(config.pruning.align) * architecture.channel_cost(architecture.layers[0])
    tile /= architecture.decoder_parameters
    for ratio in config.pruning.ratio:
        for spec in kinds.values():
            plan = made.plan(spec, ratio)
            assert plan.planned(architecture) == pytest.approx(ratio, abs=tile)


@each_recipe
def test_a_ratio_beyond_reach_is_refused_before_any_work(name):
    architecture = Architecture.of(MODELS[name].config)
    for ratio in (0.1, 0.35, 0.5):
        check_ratios(recipe(name, f"pruning.ratio={ratio}"), architecture)
    with pytest.raises(ConfigError, match=r"pruning\.ratio"):
        check_ratios(recipe(name, "pruning.ratio=0.95"), architecture)


def test_gemmas_key_value_heads_are_not_cut_since_its_layers_mix_windows():
    architecture = Architecture.of(MODELS["gemma-3-4b"].config)
    assert architecture.mixes_windows
    check_ratios(recipe("gemma-3-4b", "pruning.attention_unit=head"), architecture)
    with pytest.raises(ConfigError, match=r"pruning\.attention_unit"):
        check_ratios(recipe("gemma-3-4b", "pruning.attention_unit=group"), architecture)

    share = architecture.dense.channels * architecture.channel_cost(architecture.layers[0]) * architecture.n_layers
    assert (
        f"{share / architecture.decoder_parameters:.0%}".replace("%", " %") in (CONFIGS / "gemma-3-4b.yaml").read_text()
    )


def test_the_papers_recipe_is_the_papers_method():
    config = recipe("llama-2-7b-paper")
    study = recipe("llama-2-7b-paper", "study=paper")
    assert {task.name for task in config.tasks} == {task.name for task in study.tasks}
    assert config.pruning.ratio == study.pruning.ratio == (0.2, 0.5)

    experts = config.plan_settings(config.pruning.experts)
    general = config.plan_settings(config.pruning.general)
    for settings in (experts, general):
        assert (settings.score, settings.allocation, settings.compensation) == ("wifv", "logistic", "none")
        assert (settings.k, settings.x0, settings.budget) == (1.0, 0.3, "exact")
    assert config.pruning.general.pooling == "score_average"


# --- what the doctor says --------------------------------------------------------------------------------------------


@each_recipe
def test_a_recipe_fits_the_gpus_that_it_names_and_an_ordinary_disk(name):
    config = recipe(name)
    needed = needs(ModelSize.from_config(MODELS[name].config), config)
    weights = 2 * MODELS[name].parameters
    # The name may stand across two lines of the comment.
    (named,) = re.findall(r"GPUs of[\s#]+(\d+) GB", (CONFIGS / f"{name}.yaml").read_text())

    assert weights < needed.memory.single < int(named) * 1e9
    assert 0 < needed.memory.stream < needed.memory.single
    assert needed.memory.host == weights and needed.memory.driver < 1e9
    assert needed.disk.covariances == needed.memory.covariance_task == 0

    # An expert for every task and the general model, of which what is cut is new.
    n_models = (len(config.tasks) + 1) * len(config.pruning.ratio)
    assert 0.3 * n_models * weights < needed.disk.checkpoints < n_models * weights
    assert needed.disk.total < min(1.1 * needed.disk.checkpoints, 80e9 * len(config.pruning.ratio))


@each_recipe
def test_a_gpu_makes_the_models_of_a_recipe_within_the_hour(name):
    config = recipe(name)
    needed = needs(ModelSize.from_config(MODELS[name].config), config)
    assert needed.rates == assumed_rates(config) and "H100" in needed.rates.name
    assert 60 < needed.time.calibration < 3600 and 0 < needed.time.writing < 3600

    # Of all rows of a corpus nobody knows the number beforehand.
    assert (needed.time.judging is None) == (config.evaluation.samples is None)
    if needed.time.judging is not None:
        assert math.isfinite(needed.time.judging) and needed.time.calibration + needed.time.judging < 3600


# --- serving ---------------------------------------------------------------------------------------------------------


@each_recipe
def test_a_recipe_serves_prompts_that_its_model_can_read(name):
    config = recipe(name)
    assert 4096 <= config.serve.engine["max_model_len"] <= MODELS[name].config["max_position_embeddings"]
    assert config.serve.ratio in (None, *config.pruning.ratio)


@pytest.mark.vllm
@pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning")
@each_recipe
def test_a_recipes_engine_settings_are_vllms(name):
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    from serve.replies import ENGINE_KEYS

    engine = recipe(name).serve.engine
    assert {*engine} <= ENGINE_KEYS
    if parser := engine.get("reasoning_parser"):
        ReasoningParserManager.get_reasoning_parser(parser)
    if parser := engine.get("tool_call_parser"):
        ToolParserManager.get_tool_parser(parser)
