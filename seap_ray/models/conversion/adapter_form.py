"""Adapter form: a LoRA adapter and the base that it names in; what peft merges of them out."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seap_ray.errors import ConfigError
from seap_ray.models.conversion.form import Form, refusing
from seap_ray.models.model_sources import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    COMPANION_FILES,
    ModelSource,
    parse_model_source,
)
from seap_ray.storage.files import read_json, writable


@dataclass(frozen=True)
class AdapterForm(Form):
    """A LoRA adapter, merged into its base by peft."""

    base: Path
    """Folder of the base, as transformers saves it."""

    packages = ("transformers", "peft", "torch", "safetensors")
    extra_package = "peft"

    @property
    def description(self) -> str:
        """What it is."""
        return f"a LoRA adapter of the base in {self.base}"

    def inputs(self) -> list[Path]:
        """Return the files of the adapter and of its base."""
        adapter_files = [file for file in self.path.iterdir() if file.is_file()]
        base_files = [file for file in self.base.iterdir() if file.is_file()]
        return sorted(adapter_files) + sorted(base_files)

    def convert(self, target: Path) -> None:
        """Write what peft merges: the base's weights plus those of the adapter, in the base's type."""
        from peft import PeftModel
        from peft.utils import load_peft_weights, set_peft_model_state_dict
        from transformers import AutoModelForCausalLM

        import seap_ray.models.hf  # noqa: F401  the base may be cut already

        with refusing(self, "peft cannot merge it"), warnings.catch_warnings():
            # It warns of weights that the adapter lacks, and fills them with random numbers.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            # Merged into an embedding that is the head as well, an adapter would change what it never did.
            warnings.filterwarnings("error", message=".*a tied layer is part of the adapter")
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype="auto", device_map={"": "cpu"})
            model = PeftModel.from_pretrained(base, str(self.path), torch_device="cpu")
            # It is silent about those for which the base has no place.
            outcome: Any = set_peft_model_state_dict(model, load_peft_weights(str(self.path), "cpu"))
            if outcome.unexpected_keys:
                unused = min(outcome.unexpected_keys)
                raise ConfigError(f"model.source: {self.name}: the base has no place for the adapter's {unused}")
            merged = model.merge_and_unload()

        with writable(target):
            merged.save_pretrained(target)
            # A tokenizer that was trained along goes before the base's.
            has_tokenizer = any(
                (self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
            )
            for pattern in COMPANION_FILES:
                for file in (self.path if has_tokenizer else self.base).glob(pattern):
                    shutil.copyfile(file, target / file.name)
            for file in self.base.glob("generation_config.json"):
                shutil.copyfile(file, target / file.name)


def adapter_form(path: Path, source: ModelSource) -> Form:
    """Return the form of an adapter. Raises ConfigError for one that cannot be merged, or whose base cannot be had."""
    config = read_json(path / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise ConfigError(f"model.source: {path / ADAPTER_CONFIG} is truncated, or not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"model.source: {source.name} is an adapter of the kind {kind}; only LORA is merged here: merge it with "
            "peft, and name the folder of the result"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"model.source: {source.name} is an adapter for {config['task_type']}, not for a model that predicts tokens"
        )
    if not any((path / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ConfigError(f"model.source: {source.name} is an adapter without weights ({', '.join(ADAPTER_WEIGHTS)})")

    name = config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"model.source: {path / ADAPTER_CONFIG} names no base (base_model_name_or_path)")
    try:
        base = _base_folder(str(name), config.get("revision"))
    except ConfigError as error:
        reason = str(error).removeprefix("model.source: ")
        raise ConfigError(f"model.source: {source.name} is an adapter of the base {name}: {reason}") from None
    return AdapterForm(source.name, path, base)


def _base_folder(name: str, revision: str | None) -> Path:
    """Return the folder of an adapter's base, checked whole: transformers fills what is missing with random numbers."""
    # A checkpoint is opened by way of this module.
    from seap_ray.models.checkpoint import Checkpoint

    if (parse_model_source(name, revision).fetch() / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"model.source: {name} is an adapter itself; merge them one after the other with peft")
    base = Checkpoint.open(name, revision)
    if base.whole_config:
        raise ConfigError(
            f"model.source: {name} reads pictures, too, and adapters of such models are not merged here: merge it with "
            "peft, and name the folder of the result"
        )
    return base.folder
