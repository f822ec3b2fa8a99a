"""The Hugging Face side of a compacted checkpoint. Importing this package lets AutoConfig and AutoModelForCausalLM
load one without ``trust_remote_code``; the two files beside this one travel with every checkpoint for everybody else.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from seap_ray.hf.configuration_seap import SeapLlamaConfig, SeapQwen2Config
from seap_ray.hf.modeling_seap import SeapLlamaForCausalLM, SeapQwen2ForCausalLM

FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_seap.py", "modeling_seap.py"))

for config_class, model_class in (
    (SeapLlamaConfig, SeapLlamaForCausalLM),
    (SeapQwen2Config, SeapQwen2ForCausalLM),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
