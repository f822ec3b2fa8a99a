"""Configurations: values of a config.json that no model has are refused before memory is asked for by them."""

import json

import pytest
from safetensors.torch import save_file

from seap_ray.errors import ConfigError, DataError
from seap_ray.models import configurations
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.configurations import check_values, made_config
from seap_ray.models.hf.shapes import check_folder

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 128_256, "max_position_embeddings": 10_485_760}


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth - 1):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 21},
        {"n_layer": 21},
        {"text_config": {"num_hidden_layers": 21}},
        {"num_local_experts": 21},
        {"n_routed_experts": 21},
    ],
)
def test_more_layers_or_experts_than_a_model_has_are_refused(monkeypatch, config):
    monkeypatch.setattr(configurations, "MAX_COUNT", 20)
    with pytest.raises(ConfigError, match=r"^model\.source: config\.json says \w+ 21, and 20 is the most$"):
        made_config(LLAMA | config)
    made_config(LLAMA)


def test_a_config_that_is_nested_deeper_than_any_is_refused():
    check_values(nested(25))
    with pytest.raises(ConfigError, match="config.json is nested more than 50 levels deep"):
        made_config(LLAMA | {"rope_parameters": nested(60)})


def test_a_checkpoint_with_such_values_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(configurations, "MAX_COUNT", 20)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 21}))
    with pytest.raises(ConfigError, match="num_hidden_layers 21, and 20 is the most"):
        check_folder(tmp_path)


def test_a_config_that_is_nested_deeper_than_python_reads_is_one_line(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    for read in (lambda: Checkpoint.open(str(tmp_path)), lambda: check_folder(tmp_path)):
        with pytest.raises(DataError, match=r"config\.json: JSON that is nested too deeply$"):
            read()
