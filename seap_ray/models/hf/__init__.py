"""The Hugging Face side of a compacted checkpoint. Importing this package lets transformers' auto classes load one
without ``trust_remote_code``; the two files beside this one travel with every checkpoint for everybody else.
"""

from pathlib import Path

from transformers import AutoConfig

from seap_ray.core.families import FAMILIES, MULTIMODAL, Family
from seap_ray.models.hf import configuration_seap, modeling_seap

FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_seap.py", "modeling_seap.py"))
"""Code that is written beside the weights of a compacted checkpoint."""

# Classes of models are made, and register themselves, with the first configuration of their family.
configuration_seap.SeapConfiguration.register_models = staticmethod(modeling_seap.register_classes)  # type: ignore[method-assign]
names = [family.config_class for family in FAMILIES.values()] + [kind.config_class for kind in MULTIMODAL.values()]
for name in names:
    config_class = getattr(configuration_seap, name)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def model_classes(family: Family) -> dict[str, str]:
    """Return the names of a family's classes in ``modeling_seap`` by the names of the auto classes that build them."""
    prefix = family.model_class.removesuffix("ForCausalLM")
    names = {auto_class.__name__: f"{prefix}{end}" for end, auto_class in modeling_seap.AUTO_CLASSES.items()}
    # transformers has no class that classifies for every family.
    return {auto_class: name for auto_class, name in names.items() if hasattr(modeling_seap, name)}
