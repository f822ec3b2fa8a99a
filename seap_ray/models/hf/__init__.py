"""The Hugging Face side of a compacted checkpoint. Importing this package lets AutoConfig and AutoModelForCausalLM
load one without ``trust_remote_code``; the two files beside this one travel with every checkpoint for everybody else.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from seap_ray.core.architecture import FAMILIES
from seap_ray.models.hf import configuration_seap, modeling_seap

FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_seap.py", "modeling_seap.py"))
"""Code that is written beside the weights of a compacted checkpoint."""

for family in FAMILIES.values():
    config_class = getattr(configuration_seap, family.config_class)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, getattr(modeling_seap, family.model_class), exist_ok=True)
