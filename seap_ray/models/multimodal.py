"""Multimodal: a checkpoint whose config.json and tensors hold a language model among other things.

Everywhere else the language model is seen as a checkpoint of its own: by a config and by names of tensors that its
family has. What else is in the checkpoint has the names that it is stored under, and is carried as it is.
"""

import re
from collections.abc import Mapping
from typing import Any

from seap_ray.core.families import MULTIMODAL, Multimodal
from seap_ray.core.refused_families import WHY_REFUSED
from seap_ray.errors import ConfigError
from seap_ray.models.configurations import made_config

STORED_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Beginnings of the names of a language model's tensors, and what its family has in their place.

transformers writes the first form for Qwen 3 VL, and did for Gemma 3 from 4.52 to 4.57; the others before and since.
"""
KEY_MAPPING = {f"^{re.escape(stored)}": plain for stored, plain in STORED_PREFIXES.items()}
"""The same for ``from_pretrained``."""
FROM_OUTSIDE = ("dtype", "torch_dtype", "quantization_config", "quantization", "transformers_weights")
"""Config keys beside ``text_config`` that hold for the language model as well."""


def multimodal_of(config: Mapping[str, Any]) -> Multimodal | None:
    """Return the row of ``MULTIMODAL`` for the content of a config.json; None for other checkpoints."""
    return MULTIMODAL.get(str(config.get("model_type")).removeprefix("seap_"))


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a checkpoint's language model, as a checkpoint of it alone would have it.

    Args:
        config: Content of a config.json, of any family.

    Returns:
        The config, with transformers' defaults for missing keys; the content itself where nothing is nested in it.

    Raises:
        ConfigError: The language model is of a family that is not supported, or transformers refuses the config.
    """
    kind = multimodal_of(config)
    if kind is None:
        return dict(config)

    text = dict(config.get("text_config") or {})
    model_type = str(text.get("model_type") or next(iter(kind.texts)))
    plain_type = model_type.removeprefix("seap_")
    if plain_type not in kind.texts:
        reason = f": {WHY_REFUSED[plain_type]}" if plain_type in WHY_REFUSED else ""
        raise ConfigError(
            f"config.json: a {config['model_type']} is not supported whose text_config is a {model_type!r}{reason}; "
            f"supported are {', '.join(kind.texts)}"
        )

    family = kind.texts[plain_type]
    if model_type == plain_type:
        # Published ones leave most keys out, and the defaults of the family may be others.
        text = made_config({**text, "model_type": model_type}).to_dict()
    outside = {key: config[key] for key in FROM_OUTSIDE if config.get(key) is not None}
    return {
        **text,
        **outside,
        "model_type": model_type.replace(plain_type, family),
        "tie_word_embeddings": _ties_embeddings(config),
    }


def _ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether the head is the embedding, as transformers reads it: beside ``text_config``, not in it."""
    stated = config.get("tie_word_embeddings")
    if stated is None:
        stated = made_config({"model_type": str(config["model_type"]).removeprefix("seap_")}).tie_word_embeddings
    return bool(stated)


def nested_config(whole: Mapping[str, Any], language: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with another language model.

    Args:
        whole: The content before.
        language: The language model's config, as ``language_config`` returns it; its ``model_type`` says whether it is
            a stock or a compacted one.
    """
    kind = multimodal_of(whole)
    assert kind is not None
    is_compacted = language["model_type"].startswith("seap_")
    family = language["model_type"].removeprefix("seap_")
    # A stock language model with added biases is a Llama, which has no other name there.
    plain_type = next((name for name, key in kind.texts.items() if key == family), family)
    start = "seap_" if is_compacted else ""
    text = {key: value for key, value in language.items() if key not in ("auto_map", *FROM_OUTSIDE)}

    content = {key: value for key, value in whole.items() if key != "auto_map"}
    name = str(whole["model_type"]).removeprefix("seap_")
    if is_compacted:
        content["auto_map"] = {
            "AutoConfig": f"configuration_seap.{kind.config_class}",
            "AutoModelForImageTextToText": f"modeling_seap.{kind.model_class}",
        }
    return {
        **content,
        "model_type": f"{start}{name}",
        "architectures": [kind.model_class if is_compacted else kind.model_class.removeprefix("Seap")],
        "tie_word_embeddings": language["tie_word_embeddings"],
        "text_config": {**text, "model_type": f"{start}{plain_type}"},
    }


def plain_name(stored: str) -> str | None:
    """Return the name that a language model's tensor has in its family; None for a tensor that is no part of it."""
    for beginning, plain in STORED_PREFIXES.items():
        if stored.startswith(beginning):
            return plain + stored.removeprefix(beginning)
    # Where transformers has written the first form, the head lies beside the language model.
    return stored if stored.startswith("lm_head.") else None
