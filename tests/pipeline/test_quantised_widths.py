"""Which widths a quantisation can hold: groups that are chosen, refused in one line, and kept by plans."""

from typing import Any

import pytest

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.widths import WidthConstraints
from seap_ray.errors import ConfigError
from seap_ray.pipeline.model_specs import model_specs, pruning_section
from seap_ray.pipeline.quantization import quantization_note, with_quantization
from tests.support.builders import CONFIGS

LLAMA = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 4096}


def architecture_of(**changes: int) -> Architecture:
    return Architecture.of({**LLAMA, **changes})


def config_of(scheme: str | None = "w4a16", group: int | str = "auto", **pruning: Any) -> Config:
    return Config.model_validate(
        {
            "calibration": {"statistics": "covariance"},
            "export": {"quantization": {"scheme": scheme, "group": group}},
            "pruning": {"allocation": {"kind": "uniform"}, "attention_unit": "none", **pruning},
        }
    )


def test_nothing_changes_where_nothing_is_quantised() -> None:
    config = config_of(None)
    assert with_quantization(config, architecture_of()) == config
    assert quantization_note(config, architecture_of()) is None
    assert not config.records_inputs


@pytest.mark.parametrize(
    ("changes", "pruning", "group"),
    [
        ({}, {}, 128),
        # SmolLM2-135M.
        ({"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}, {}, 64),
        ({"intermediate_size": 4192}, {}, 32),
        # Groups are four heads of 64, one head of every group is as much.
        ({}, {"attention_unit": "group"}, 128),
        ({}, {"attention_unit": "head"}, 128),
        # Every query head has its own key-value head.
        ({"num_key_value_heads": 16}, {"attention_unit": "group"}, 64),
        ({"num_key_value_heads": 16}, {"attention_unit": "auto"}, 64),
        ({"num_key_value_heads": 16}, {"attention_unit": "group", "ratio": 0}, 128),
        ({"num_key_value_heads": 16}, {"allocation": {"kind": "depth"}, "attention_unit": "group"}, 128),
    ],
)
def test_the_group_is_the_largest_that_all_widths_are_multiples_of(
    changes: dict[str, int], pruning: dict[str, Any], group: int
) -> None:
    config = with_quantization(config_of(**pruning), architecture_of(**changes))
    assert config.export.quantization.group == group


@pytest.mark.parametrize(
    ("group", "changes", "pruning", "message"),
    [
        (128, {"hidden_size": 1088, "num_attention_heads": 17, "num_key_value_heads": 17}, {},
         r"the hidden size 1088 is no multiple of 128; use export.quantization.group=64"),
        (128, {"intermediate_size": 4160}, {}, r"4160 channels of layer 0 are no multiple of 128; use .*group=64"),
        (512, {"hidden_size": 1024, "num_attention_heads": 18, "head_dim": 64, "num_key_value_heads": 3}, {},
         r"18 heads of 64 in layer 0 are no multiple of 512; use .*group=128"),
        (128, {"num_key_value_heads": 16}, {"attention_unit": "group"},
         r"attention is cut 1 heads of 64 at a time, no multiple of 128 .*attention_unit=none.*group=64"),
        ("auto", {"hidden_size": 1000, "num_attention_heads": 10, "num_key_value_heads": 10}, {},
         r"export.quantization: the hidden size 1000 is no multiple of 32; use w8a8"),
    ],
)  # fmt: skip
def test_widths_that_a_scheme_cannot_hold_are_one_line(
    group: int | str, changes: dict[str, int], pruning: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_quantization(config_of("w4a16", group, **pruning), architecture_of(**changes))
    # One scale for each output suits all widths.
    with_quantization(config_of("w8a8", **pruning), architecture_of(**changes))


@pytest.mark.parametrize(("align", "tile"), [("auto", 128), (96, 384), (256, 256), (1, 128)])
def test_kept_channels_are_multiples_of_the_group(align: int | str, tile: int) -> None:
    architecture = architecture_of()
    config = with_quantization(config_of(align=align, tensor_parallel=2), architecture)

    (spec, *_) = model_specs(config)
    constraints = WidthConstraints.of(architecture, pruning_section(config, spec.settings), adds_biases=False)
    assert constraints[0].tile == 2 * tile
    assert all(channels % 128 == 0 for channels in constraints[0].channel_options)
    note = quantization_note(config, architecture)
    assert note == (f"quantization: w4a16 by gptq in groups of 128 columns; kept channels are multiples of {tile}")


def test_mixtures_of_experts_are_refused() -> None:
    mixtral = Architecture.of(CONFIGS["mixtral"]().to_dict())
    with pytest.raises(ConfigError, match="export.quantization: not for a mixture of experts"):
        with_quantization(config_of("w8a8"), mixtral)
    with_quantization(config_of(None), mixtral)


REFUSED = [
    ({"export": {"quantization": "w4a16"}}, "gptq rounds by covariances, which calibration.statistics=covariance"),
    (
        {"export": {"quantization": "w8a8"}, "calibration": {"statistics": "covariance", "input_covariances": False}},
        "gptq rounds by the covariances of all inputs; leave calibration.input_covariances at auto",
    ),
    ({"calibration": {"input_covariances": True}}, "input_covariances: needs calibration.statistics=covariance"),
    ({"export": {"quantization": {"scheme": "w8a8", "group": 64}}}, "w8a8 has one scale for each output"),
    ({"export": {"quantization": "w4a16", "format": "gguf"}}, "not for format gguf, whose matrices are of gguf_type"),
    (
        {
            "export": {"quantization": {"scheme": "w8a8", "rounding": "nearest"}},
            "pruning": {"target": {"weights": "1GB"}},
        },
        "pruning.target.weights: counts weights as the model has them",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_settings_that_exclude_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(values)


def test_inputs_are_recorded_where_a_quantisation_rounds_by_them() -> None:
    covariance = {"calibration": {"statistics": "covariance"}}
    assert not Config.model_validate(covariance).records_inputs
    assert Config.model_validate({**covariance, "export": {"quantization": "w4a16"}}).records_inputs
    nearest = {"export": {"quantization": {"scheme": "w4a16", "rounding": "nearest"}}}
    assert not Config.model_validate({**covariance, **nearest}).records_inputs
    assert Config.model_validate(
        {"calibration": {**covariance["calibration"], "input_covariances": True}}
    ).records_inputs
