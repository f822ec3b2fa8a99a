"""The suite ``widths``: its models, and single layers' times from those of whole models."""

import json

import pytest

from benchmarks import widths
from benchmarks.widths import SHALLOW, WHOLE, Times, model_config, uniform_models
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture, Layer, Shape
from seap_ray.core.targets import WidthTable, dimensions_of
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint

DEMO = Checkpoint.open("demo")
WHOLE_SHAPE = Shape(4, 2, 448)


def config(tmp_path, **pruning):
    benchmarks = {"rounds": 3, "table": str(tmp_path / "table.json"), "new_tokens": 5}
    return Config.model_validate({"benchmarks": benchmarks, "pruning": {"attention_unit": "group", **pruning}})


def layer_seconds(shape):
    """Return seconds of a layer: of its prefill and of a token."""
    width = shape.channels + 50 * shape.groups
    return 1e-5 * width, 1e-6 * width


def test_every_model_has_layers_of_one_width_and_one_site_cut(tmp_path):
    models = uniform_models(config(tmp_path), DEMO.architecture)
    assert [(model.name, model.depth) for model in models[:2]] == [(WHOLE, 8), (SHALLOW, 2)]
    assert [model.shape for model in models[2:]] == [
        *(Shape(4, 2, channels) for channels in (400, 336, 288, 224, 112)),
        *(Shape(groups, 2, 448) for groups in (3, 2, 1)),
    ]
    for model in models:
        architecture = Architecture.of(model_config(DEMO, model))
        assert architecture.layers == (Layer(model.shape),) * model.depth
        assert dimensions_of(architecture) == dimensions_of(DEMO.architecture)

    whole_attention = uniform_models(config(tmp_path, attention_unit="none"), DEMO.architecture)
    assert whole_attention == models[:-3]


def test_of_a_large_model_a_few_layers_stand_for_all(monkeypatch, tmp_path):
    monkeypatch.setattr(widths, "LARGE", 10**6)
    assert {model.depth for model in uniform_models(config(tmp_path), DEMO.architecture)} == {6, 2}


def test_a_model_of_unequal_layers_is_refused(tmp_path):
    unequal = Architecture.of({**DEMO.config, "per_layer_config": {"0": {"intermediate_size": 64}}})
    with pytest.raises(ConfigError, match="its layers differ"):
        uniform_models(config(tmp_path), unequal)


def test_the_table_and_the_rows_have_the_times_of_single_layers_whatever_slows_a_round(monkeypatch, tmp_path, capsys):
    settings = config(tmp_path)
    models = uniform_models(settings, DEMO.architecture)

    def measure_models(configs, loads, given):
        assert given is settings and [load.reply for load in loads] == [1, 5] and len(configs) == len(models)
        seconds = {}
        for model in models:
            prefill, decode = layer_seconds(model.shape)
            prompts = 0.02 + model.depth * prefill
            whole = prompts + 4 * (0.003 + model.depth * decode)
            # The middle round is the usual one.
            seconds[model.name] = ([prompts, 3 * prompts, prompts / 2], [whole, 3 * whole, whole / 2])
        return seconds

    class Pool:
        def __init__(self, *_args, **_settings): ...
        def __enter__(self):
            return self

        def __exit__(self, *_args): ...
        def submit(self, _task, *arguments):
            return type("Task", (), {"result": lambda _self: measure_models(*arguments)})()

    monkeypatch.setattr(widths, "ProcessPoolExecutor", Pool)
    rows = {row.name: row for row in widths.rows(settings)}
    assert f"times of 9 widths for pruning.target.latency.table: {tmp_path / 'table.json'}" in capsys.readouterr().out

    content = json.loads((tmp_path / "table.json").read_text())
    assert content["fixed"] == pytest.approx(
        {"prefill": 0.02, "decode": 0.003, "prefill_stderr": 0, "decode_stderr": 0}, abs=1e-12
    )
    assert content["new_tokens"] == 5 and content["rounds"] == 3 and content["clock"] == "wall"
    table = WidthTable.from_json(content, "table.json")
    table.check(DEMO.architecture, batch=1, prompt_tokens=128)
    for time in table.times:
        assert (time.prefill, time.decode) == pytest.approx(layer_seconds(time.shape), rel=1e-9)

    narrow = rows["prefill, 224 channels"]
    assert narrow.baseline == pytest.approx(6.48) and narrow.ours == pytest.approx(4.24)
    assert narrow.ratio == pytest.approx(4.24 / 6.48) and narrow.limit < narrow.baseline
    assert rows["decoding of a token, outside layers"].ours == pytest.approx(3)


def test_times_without_noise_have_no_errors_and_those_with_it_have():
    models = uniform_models(Config.model_validate({"pruning": {"attention_unit": "none"}}), DEMO.architecture)
    steady = {model.name: ([1.0 * model.depth] * 4, [2.0 * model.depth] * 4) for model in models}
    assert {time.decode_stderr for time in Times.of(models, steady, new_tokens=2).times} == {0.0}
    noisy = steady | {models[2].name: ([8.0, 8.0, 8.0, 8.0], [15.0, 16.0, 17.0, 16.0])}
    times = {time.shape: time for time in Times.of(models, noisy, new_tokens=2).times}
    assert times[models[2].shape].decode_stderr > 0 and times[models[2].shape].prefill_stderr == 0


@pytest.mark.vllm
def test_an_engine_of_dummy_weights_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(widths, "MLP_SHARES", (0.5,))
    settings = config(tmp_path, attention_unit="none")
    settings = settings.model_copy(update={"benchmarks": settings.benchmarks.model_copy(update={"rounds": 2})})
    rows = list(widths.rows(settings))
    assert len(rows) == 6 and rows[1].name == "prefill, whole layers" and rows[1].ours > 0
    content = json.loads((tmp_path / "table.json").read_text())
    assert "vllm" in content["engine"] and [time["channels"] for time in content["widths"]] == [448, 224]
