"""Memory, disk and time by formulas, beside files that are written and numbers worked out by hand."""

import pytest
import torch

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import Covariance
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.records import save_covariances, save_moments
from seap_ray.pipeline.needs import (
    CorpusSize,
    ModelSize,
    Rates,
    checkpoint_bytes,
    covariance_files_bytes,
    disk_needs,
    largest_corpora,
    memory_needs,
    record_bytes,
    time_needs,
    token_flops,
)
from tests.support.builders import random_statistics

DEMO = Checkpoint.open("demo")
DEMO_SIZE = ModelSize.from_checkpoint(DEMO)
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    "torch_dtype": "bfloat16",
}
"""What decides sizes in the config.json of meta-llama/Llama-3.1-8B."""


def config_of(**sections) -> Config:
    return Config.model_validate({"tasks": ["sort", "logic"], **sections})


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_size_of_a_model_follows_from_its_config():
    assert ModelSize.from_config(LLAMA_8B).parameters == 8_030_261_248, "as the hub says of it"
    assert ModelSize.from_config(DEMO.config) == DEMO_SIZE
    assert (DEMO_SIZE.parameters, DEMO_SIZE.n_bytes) == (DEMO.parameters, DEMO.n_bytes)
    tied = ModelSize.from_config({**LLAMA_8B, "tie_word_embeddings": True})
    assert ModelSize.from_config(LLAMA_8B).parameters - tied.parameters == 128256 * 4096


@pytest.mark.parametrize("name", ["float8_e4m3fn", "auto"])
def test_a_type_that_is_not_known_counts_as_float32(name):
    model = ModelSize.from_config({**LLAMA_8B, "torch_dtype": name})
    assert model == ModelSize.from_config({**LLAMA_8B, "torch_dtype": "float32"})


MIXTURE = Architecture.of(
    {
        "model_type": "mixtral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 224,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
)


# --- disk ------------------------------------------------------------------------------------------------------------


def test_a_record_takes_what_the_formula_says(tmp_path):
    path = tmp_path / "record.safetensors"
    statistics = random_statistics(DEMO.architecture, seed=0)
    save_moments(path, statistics, task="sort", shard="00000", fingerprint="0" * 64)
    assert record_bytes(DEMO.architecture) == pytest.approx(path.stat().st_size, rel=0.01)


@pytest.mark.parametrize("architecture", [DEMO.architecture, MIXTURE], ids=["dense", "mixture"])
def test_covariances_take_what_the_formula_says(tmp_path, architecture):
    path = tmp_path / "record.safetensors"
    attn, mlp = architecture.widths
    found = {site: Covariance.of(torch.randn(4, attn if site == "attn" else mlp)) for site in architecture.modules(0)}
    save_covariances(path, 0, found, fingerprint="0" * 64)
    (file,) = tmp_path.glob("*/*.safetensors")
    assert covariance_files_bytes(architecture) / architecture.n_layers == pytest.approx(file.stat().st_size, rel=0.01)


def test_records_and_statistics_are_counted_by_shards_and_tasks():
    config = config_of(corpus={"samples": 100, "shard_sequences": 30})
    corpora = largest_corpora(config, DEMO.architecture)
    assert set(corpora.values()) == {CorpusSize(100, 100 * 256, 4)}

    disk = disk_needs(DEMO_SIZE, config, corpora)
    assert disk.records == 2 * 4 * record_bytes(DEMO.architecture)
    assert disk.statistics == 3 * record_bytes(DEMO.architecture), "and the weights' norms"
    assert disk.covariances == 0
    assert disk.total == disk.shards + disk.records + disk.statistics + disk.checkpoints

    with_pairs = config_of(corpus={"samples": 100, "shard_sequences": 30}, calibration={"statistics": "covariance"})
    disk = disk_needs(DEMO_SIZE, with_pairs, corpora)
    assert disk.covariances == 2 * (4 + 1) * covariance_files_bytes(DEMO.architecture)


@pytest.mark.parametrize(("samples", "shards"), [(1, 1), (2, 2), (30, 2), (31, 2), (61, 3)])
def test_a_task_has_two_shards_where_it_has_rows_for_them(samples, shards):
    corpora = largest_corpora(config_of(corpus={"samples": samples, "shard_sequences": 30}), DEMO.architecture)
    assert {size.shards for size in corpora.values()} == {shards}


def test_a_token_budget_bounds_the_tokens():
    corpora = largest_corpora(config_of(corpus={"samples": 1000, "max_tokens": 5000}), DEMO.architecture)
    assert corpora["sort"].tokens == 5000 + 256, "the row that reaches the budget is whole"


def test_what_is_the_bases_counts_once_on_a_disk_and_in_every_checkpoint_of_a_bucket():
    uniform = {
        "allocation": {"kind": "uniform"},
        "compensation": "none",
        "ratio": 0.5,
        "general": {"compensation": "none"},
    }
    on_disk = checkpoint_bytes(DEMO_SIZE, config_of(pruning=uniform))
    in_bucket = checkpoint_bytes(DEMO_SIZE, config_of(pruning=uniform, run={"storage": "s3://bucket/runs"}))
    norms = 2 * 8 * DEMO.architecture.hidden_size
    carried = 2 * (DEMO_SIZE.outer_parameters + norms)

    assert in_bucket - on_disk == 2 * carried, "three models"
    decoder = 2 * DEMO.architecture.decoder_parameters
    assert in_bucket == pytest.approx(3 * (0.5 * decoder + 2 * DEMO_SIZE.outer_parameters), rel=0.01)


def test_an_allocation_by_scores_is_estimated_by_the_ratio_alone():
    pruning = {"allocation": {"kind": "global"}, "ratio": 0.2}
    expected = 3 * 0.8 * 2 * DEMO.architecture.decoder_parameters + 2 * DEMO_SIZE.outer_parameters
    assert checkpoint_bytes(DEMO_SIZE, config_of(pruning=pruning)) == pytest.approx(expected)


# --- memory and time -------------------------------------------------------------------------------------------------


def test_memory_is_of_the_type_that_is_computed_in():
    config = config_of(model={"dtype": "float32"})
    corpora = largest_corpora(config, DEMO.architecture)
    memory = memory_needs(DEMO_SIZE, config, corpora)

    assert memory.single == int(1.2 * 4 * DEMO.parameters) and memory.host == 4 * DEMO.parameters
    assert memory_needs(DEMO_SIZE, config_of(), corpora).host == 2 * DEMO.parameters, "its config says float16"

    on_four = config_of(calibration={"num_gpus": 4, "placement": "device_map"})
    assert memory_needs(DEMO_SIZE, on_four, corpora).device_map == pytest.approx(1.2 * 2 * DEMO.parameters / 4, abs=1)
    assert memory.covariance_task == 0

    with_pairs = memory_needs(DEMO_SIZE, config_of(calibration={"statistics": "covariance"}), corpora)
    assert with_pairs.covariance_task > 0 and with_pairs.stream > memory_needs(DEMO_SIZE, config_of(), corpora).stream


def test_a_streamed_70b_needs_two_layers():
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
    model = ModelSize.from_config({**LLAMA_8B, **wide})
    config = config_of(calibration={"stream_tokens": 4096})
    memory = memory_needs(model, config, largest_corpora(config, model.architecture))
    assert memory.stream == pytest.approx(4.1e9, rel=0.05), "3.95 GB were measured (docs/scale.md)"
    assert memory.single == pytest.approx(1.2 * 141e9, rel=0.01)


def test_time_is_products_over_rates():
    config = config_of(evaluation={"samples": 10}, pruning={"ratio": 0.2})
    corpora = {task.name: CorpusSize(10, 500, 1) for task in config.tasks}
    rates = Rates("made up", flop_per_s=1e9, read_bytes_per_s=1e6, write_bytes_per_s=1e6)
    time = time_needs(DEMO_SIZE, config, corpora, rates)
    flops = token_flops(DEMO.architecture, 256).total
    reading = DEMO.n_bytes / 1e6

    assert flops == 2 * DEMO.architecture.decoder_parameters + 2 * 8 * 256 * 256
    assert time.calibration == pytest.approx(1000 * flops / 1e9 + reading)
    # Repairs of three models, the general one and two experts, on two tasks or one; then the general one's allocation:
    # four cut models by site, five passes each, and eight plans, on 500 tokens of each task.
    passes = 4 * 1000 + 2 * 4 * 500 + (4 * 5 + 8) * 1000
    assert time.choice == pytest.approx(passes * flops / 1e9)
    assert time.judging == pytest.approx(4 * (2 * 10 * 50 * flops / 1e9 + reading)), "dense, general, two experts"
    assert time.writing == pytest.approx(checkpoint_bytes(DEMO_SIZE, config) / 1e6 + reading)
    assert time_needs(DEMO_SIZE, config_of(evaluation={"samples": None}), corpora, rates).judging is None
    assert time_needs(DEMO_SIZE, config_of(evaluation={"samples": 0}), corpora, rates).judging == 0
