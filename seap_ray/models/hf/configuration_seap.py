"""Configurations of compacted models: a family's own, with ``per_layer_config`` for what differs by layer.

These keys may stand in ``per_layer_config``; at the top level they have the values of the dense model:
``num_attention_heads``, ``num_key_value_heads``, the MLP's width, and ``o_proj_bias`` and ``down_proj_bias``, output
biases that the family does not have itself, whatever it calls the modules. ``config.per_layer_config[i]`` has what
layer i has; who reads such a key of the whole configuration gets the dense model's value, with a warning.

Every family of transformers has a class here, made when it is first asked for: ``SeapLlamaConfig`` is transformers'
``LlamaConfig`` with what stands in this file.

This file travels with every checkpoint and needs transformers alone.
"""

from functools import cache
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

TRANSFORMERS_NAMES = {
    "SeapGemma3Config": "Gemma3TextConfig",
    "SeapGemma3Model": "Gemma3TextModel",
    "SeapGemma3ForSequenceClassification": "Gemma3TextForSequenceClassification",
    "SeapGemma4Config": "Gemma4TextConfig",
    "SeapGemma4Model": "Gemma4TextModel",
    "SeapQwen3_5Config": "Qwen3_5TextConfig",
    "SeapQwen3_5Model": "Qwen3_5TextModel",
    "SeapQwen3_5ForSequenceClassification": "Qwen3_5TextForSequenceClassification",
    "SeapQwen3_5MoeConfig": "Qwen3_5MoeTextConfig",
    "SeapQwen3_5MoeModel": "Qwen3_5MoeTextModel",
    "SeapLlama4Config": "Llama4TextConfig",
    "SeapLlama4Model": "Llama4TextModel",
}
"""Classes of transformers by the names of ours, where these are not the same with ``Seap`` before them."""
ATTRIBUTES: dict[str, dict[str, Any]] = {
    # vLLM's Llama layer reads it. It is no field, since a Qwen2 always has these biases.
    "SeapQwen2Config": {"qkv_bias": True},
    # Up to transformers 5.17 layers of custom code are given newer names, and LFM2 knows its convolutions by the older.
    "SeapLfm2Config": {"is_custom_code": classmethod(lambda cls: False)},
}
"""Class attributes that a family's configuration has beside those of all."""
TEXT_CONFIGS = {
    "seap_gemma3_text": "SeapGemma3Config",
    "seap_gemma4_text": "SeapGemma4Config",
    "seap_mistral": "SeapMistralConfig",
    "seap_ministral3": "SeapMinistral3Config",
    "seap_qwen3_vl_text": "SeapQwen3VLTextConfig",
    "seap_qwen3_5_text": "SeapQwen3_5Config",
    "seap_qwen3_5_moe_text": "SeapQwen3_5MoeConfig",
    "seap_llama4_text": "SeapLlama4Config",
}
"""Classes of the language models of multimodal checkpoints, by their ``model_type``."""
EXPERT_COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
"""Fields of which a mixture of experts has one."""
DENSE = ("SeapGraniteMoeHybridConfig", "SeapNemotronHConfig", "SeapGemma4Config")
"""Configurations that have such a field, and are supported without experts alone."""


class SeapConfiguration:
    """Mixed into a family's configuration: transformers learns of its models when one is made."""

    @staticmethod
    def register_models(config_class: Any) -> None:
        """Prepare for models of a configuration that is being made; seap_ray puts another function in its place.

        That lets transformers' auto classes build the family's models without code from the checkpoint's folder.
        """

    def __post_init__(self, **kwargs: Any):
        """Finish a configuration as its family does."""
        self.register_models(type(self))
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the family's

    def __setstate__(self, state: dict[str, Any]):
        """Take a configuration's values from another process, as vLLM's engines get them: none is made anew there."""
        self.register_models(type(self))
        self.__dict__.update(state)


class MultimodalConfiguration(SeapConfiguration):
    """Mixed into the configuration of a multimodal checkpoint: its language model is a compacted one."""

    text_config: Any

    def __post_init__(self, **kwargs: Any):
        """Make the language model's configuration by its own class."""
        if isinstance(self.text_config, dict):
            text_class: Any = config_class_named(TEXT_CONFIGS[self.text_config["model_type"]])
            self.text_config = text_class(**self.text_config)
        super().__post_init__(**kwargs)


class LayerWidths(SeapConfiguration):
    """Mixed into a family's configuration: who walks over all keys meets those alone that layers share."""

    def __iter__(self):
        """Yield the keys that have one value for all layers; of the others transformers warns who reads them."""
        differing = self.per_layer_attributes or ()  # type: ignore[attr-defined]  # the family's
        return (key for key in self.__dict__ if key not in differing)

    def validate_architecture(self):
        """Accept any number of heads; most families' own wants one that divides the hidden size."""

    def validate_rope(self):
        """Check nothing: the check needs the number of heads, which layers do not share; the dense model passed it."""


def class_in_transformers(name: str) -> type[Any]:
    """Return transformers' own class behind one of ours: ``LlamaConfig`` behind ``SeapLlamaConfig``.

    Raises AttributeError where this transformers has none.
    """
    return getattr(transformers, TRANSFORMERS_NAMES.get(name, name.removeprefix("Seap").replace("Multimodal", "")))


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """Make a family's configuration class when it is first asked for, as an attribute of this module."""
    if not (name.startswith("Seap") and name.endswith("Config")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class_named(name)


@cache
def config_class_named(name: str) -> type[PreTrainedConfig]:
    """Make a family's configuration class, such as ``SeapLlamaConfig``.

    Raises AttributeError where this transformers does not have the family.
    """
    family_config = class_in_transformers(name)
    if name.endswith("MultimodalConfig"):
        return _named(name, MultimodalConfiguration, family_config, {})

    fields = family_config.__dataclass_fields__
    annotations: dict[str, Any] = {"o_proj_bias": bool}
    defaults: dict[str, Any] = {"o_proj_bias": False}

    # Compensation gives MoE experts no biases.
    if name in DENSE or not EXPERT_COUNTS & fields.keys():
        annotations["down_proj_bias"] = bool
        defaults["down_proj_bias"] = False
    # Some families divide the hidden size by the number of heads, which layers do not share.
    if "head_dim" not in {*fields, *family_config.attribute_map}:
        annotations["head_dim"] = int | None
        defaults["head_dim"] = None

    content = {"__annotations__": annotations, **defaults, **ATTRIBUTES.get(name, {})}
    return _named(name, LayerWidths, family_config, content)


def _named(name: str, mixin: type, family_config: Any, content: dict[str, Any]) -> type[PreTrainedConfig]:
    """Make a configuration class and have it found under its name, also by pickle."""
    about = {
        "__module__": __name__,
        "__doc__": f"The configuration of a compacted {family_config.__name__.removesuffix('Config')}.",
        "model_type": f"seap_{family_config.model_type}",
    }
    config_class: Any = strict(type(name, (mixin, family_config), about | content))
    globals()[name] = config_class
    return config_class
