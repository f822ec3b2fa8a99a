"""GGUF form: a GGUF file in; what transformers reads of it, and what it leaves out, as an ordinary checkpoint out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seap_ray.errors import ConfigError
from seap_ray.models.conversion.form import Form, refuse_other_family, refusing
from seap_ray.models.conversion.gguf_header import check_header
from seap_ray.storage.files import writable


@dataclass(frozen=True)
class GgufForm(Form):
    """A GGUF file: weights are dequantised, tokenizer and config are made from its metadata, by transformers."""

    packages = ("transformers", "gguf", "torch", "safetensors")
    extra_package = "gguf"

    @property
    def description(self) -> str:
        """What it is."""
        return "a GGUF file"

    def inputs(self) -> list[Path]:
        """Return the file."""
        return [self.path]

    def convert(self, target: Path) -> None:
        """Write what transformers loads from the file."""
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        check_header(self.path)
        folder = str(self.path.parent)
        file = self.path.name
        # By default weights stay packed where there are kernels for that.
        has_config = hasattr(transformers, "GgufConfig")
        unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_config else {}

        with refusing(self, "transformers does not read it"):
            refuse_other_family(AutoConfig.from_pretrained(folder, gguf_file=file).to_dict())
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype="auto", output_loading_info=True, **unpacked
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)

        if info["missing_keys"]:
            raise ConfigError(
                f"model.source: {self.name} has no tensor {min(info['missing_keys'])}, which its metadata declares"
            )
        _set_rope(model.config, self)
        _set_query_scale(model.config)
        _set_special_tokens(tokenizer, self)

        # What is saved is an ordinary model.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with writable(target):
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)

    @cached_property
    def _reader(self) -> Any:
        # Once: it goes through every token of the vocabulary.
        from gguf import GGUFReader

        return GGUFReader(self.path)

    def metadata(self, key: str, default: Any = None) -> Any:
        """Return a value of the file's metadata, ``default`` where it is not there."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def tensor(self, name: str) -> Tensor | None:
        """Return an unquantised tensor of the file, None where it is not there."""
        for tensor in self._reader.tensors:
            if tensor.name == name:
                return torch.tensor(tensor.data, dtype=torch.float32)
        return None


# --- what transformers leaves out ------------------------------------------------------------------------------------


def _set_rope(config: Any, form: GgufForm) -> None:
    """Set the scaling of rotary frequencies, which transformers leaves out where llama.cpp keeps it in a tensor.

    Raises ConfigError for frequencies that are not those of a Llama 3.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = form.metadata(f"{form.metadata('general.architecture')}.rope.scaling.type", "none")
    factors = form.tensor("rope_freqs.weight")
    if scaling != "none" or form.tensor("rope_factors_long.weight") is not None:
        raise ConfigError(
            f"model.source: {form.name} scales its rotary frequencies ({scaling}), which transformers does not read "
            "from a GGUF file; take the checkpoint that it was made from"
        )
    if factors is None or rope.get("rope_type", "default") != "default":
        return

    # Llama 3.1, 3.2 and 3.3 differ in the factor alone, which is that of the lowest frequency.
    scaled = {
        "rope_type": "llama3",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not torch.allclose(factors, llama3_factors(scaled, len(factors)), rtol=1e-3):
        raise ConfigError(
            f"model.source: {form.name} has rotary frequencies of its own (rope_freqs.weight), which transformers does "
            "not read from a GGUF file; take the checkpoint that it was made from"
        )
    config.rope_parameters = scaled


def llama3_factors(rope: Mapping[str, Any], n: int) -> Tensor:
    """Return by what a Llama 3's rotary frequencies are divided: transformers' own rule for ``rope_type: llama3``."""
    wavelengths = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(n) / n)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # Between the two bounds frequencies, not factors, are interpolated.
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _set_query_scale(config: Any) -> None:
    """Set the scale of queries in the largest Gemmas, which no metadata tell: llama.cpp knows it by the layers, too."""
    if (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62)):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _set_special_tokens(tokenizer: Any, form: GgufForm) -> None:
    """Have the tokenizer put the tokens around a text that llama.cpp puts there, which transformers leaves out."""
    # Where the file does not say it, a SentencePiece vocabulary has a beginning token, and no other has one.
    is_sentencepiece = form.metadata("tokenizer.ggml.model") == "llama"
    defaults = {"add_bos_token": is_sentencepiece, "add_eos_token": False}

    for key, default in defaults.items():
        wanted = bool(form.metadata(f"tokenizer.ggml.{key}", default))
        if getattr(tokenizer, key.removeprefix("add_")) and bool(getattr(tokenizer, key, False)) != wanted:
            setattr(tokenizer, key, wanted)
