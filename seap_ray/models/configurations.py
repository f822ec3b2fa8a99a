"""Configurations: the content of a config.json in, transformers' configuration of it out, or why there is none."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from seap_ray.errors import ConfigError
from seap_ray.models.quick_imports import quick_imports

CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What a value that nobody expects leads to, in transformers' checks of a config.json or while the model is built."""


COUNT = re.compile(r"(layers?|experts)$")
"""End of a key that says how many parts of a kind a model has: each is an object, wherever its weights are."""
MAX_COUNT = 10_000
"""Layers, or experts of a layer, that a model may have."""
MAX_DEPTH = 50
"""Levels of a config.json; those of transformers have three or four."""


def check_values(config: Mapping[str, Any], depth: int = 1) -> None:
    """Raise ConfigError for a config.json that asks for more memory than any model, before it gets some."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"model.source: config.json is nested more than {MAX_DEPTH} levels deep")

    for key, value in config.items():
        if isinstance(value, int) and value > MAX_COUNT and COUNT.search(str(key)):
            raise ConfigError(f"model.source: config.json says {key} {value}, and {MAX_COUNT} is the most")
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            check_values(value, depth + 1)


def made_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' configuration for the content of a config.json, of a family of its own or of ours.

    Raises ConfigError for a value that transformers refuses, or that no model has.
    """
    check_values(config)
    with quick_imports():
        from transformers import CONFIG_MAPPING

        import seap_ray.models.hf  # noqa: F401  registers the model types of compacted models

    try:
        config_class = CONFIG_MAPPING[config["model_type"]]
        return config_class.from_dict({**config, **_positions(config, config_class)})
    except CONFIG_ERRORS as error:
        raise refused_config(error) from None


def _positions(config: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Return the parameters of rotary embeddings without those of positions in pictures, where a class has none."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" in (config_class.ignore_keys_at_rope_validation or ()):
        return {}
    return {"rope_parameters": {key: value for key, value in rope.items() if not key.startswith("mrope_")}}


def refused_config(error: Exception) -> ConfigError:
    """Return the error of a config.json that transformers does not read, in one line."""
    # Its own errors tell the field first and the fault after it.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ConfigError(
        f"model.source: transformers refuses config.json ({' '.join(lines[:2]) or type(error).__name__})"
    )
