"""Conversion: a model in a form that people have it in, into the folder of safetensors that everything else reads.

A form is recognised by what lies in a folder. Its conversion is made once on each node, in the node's cache, by a
process of its own: pickled weights are read there, with ``weights_only``, and the memory goes back when it ends. The
bytes are the same on every node. A new form is a class here, and a case of ``_form_of``.
"""

import ctypes
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seap_ray.core.architecture import FAMILIES, Architecture, Family
from seap_ray.errors import ConfigError, DataError, IncompleteError, SeapError
from seap_ray.models.model_sources import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    COMPANION_FILES,
    CONFIG_FILE,
    GGUF,
    INDEX,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    WEIGHTS,
    ModelSource,
    parse_model_source,
    refuse_pointers,
)
from seap_ray.progress import say, size
from seap_ray.storage.files import read_json, writable, write_json
from seap_ray.storage.paths import LocalPath, cache_folder, make_once

FORMAT = 1
"""Version of what is written; a change of it has every model converted again."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that torch.compile, FSDP and activation checkpointing put anywhere into names of tensors."""
PREFIXES = ("module.", "base_model.model.")
"""Beginnings of names that DataParallel, and a merged adapter, leave."""
NESTED_KEYS = ("state_dict", "model_state_dict", "module", "model")
"""Keys under which trainers keep the weights beside other things."""
SAMPLED_BLOCKS = 64
"""Blocks of a file that name its conversion, beside its name, size and time of change."""
BLOCK_BYTES = 1 << 16
"""Size of such a block."""
PR_SET_PDEATHSIG = 1
"""Linux's number for the signal that a process is sent when the one that started it ends."""
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    pickle.UnpicklingError,
    RuntimeError,
    SafetensorError,
    TypeError,
    UserWarning,
    ValueError,
)
"""What libraries raise for a file that is damaged, or that they cannot read."""


def standard_folder(source: ModelSource) -> Path:
    """Return this node's folder with a model as transformers saves it, converted first where it has another form.

    Args:
        source: Where the model comes from.

    Returns:
        The folder that the source has, or that of the conversion in this node's cache.

    Raises:
        ConfigError: The model cannot be had or converted; one line, which says why and what to do.
        IncompleteError: The cache cannot be written.
    """
    fetched = source.fetch()
    refuse_pointers(fetched)
    form = _form_of(fetched, source)
    return form.converted() if form else fetched


def is_converted(folder: Path) -> bool:
    """Return whether a folder is a conversion in this node's cache."""
    return _conversions() in folder.parents


def _conversions() -> LocalPath:
    return cache_folder() / "models"


def _form_of(path: Path, source: ModelSource) -> "Form | None":
    """Recognise the form of what was fetched; None for a folder as transformers saves it, and for one with no model."""
    if path.is_file():
        return GgufForm(source.name, path)

    has_weights = (path / WEIGHTS).is_file() or (path / INDEX).is_file()
    if (path / ADAPTER_CONFIG).is_file() and not has_weights:
        return _adapter_form(path, source)

    if has_weights:
        return _renamed_form(path, source)
    # transformers reads a pickled file where there is no other.
    is_pickled = (path / PICKLED_WEIGHTS).is_file() or (path / PICKLED_INDEX).is_file()
    if is_pickled and (path / CONFIG_FILE).is_file():
        _refuse_other_family(read_json(path / CONFIG_FILE))
        return RewrittenForm(source.name, path, is_pickled=True)
    return _gguf_folder(path, source)


# --- forms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form(ABC):
    """A form of model that is converted before it is used."""

    name: str
    """The source, as errors name it."""
    path: Path
    """Its file, or its folder."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "safetensors")
    """Packages whose versions may change the result."""
    extra_package: ClassVar[str | None] = None
    """Package that the form needs and that seap_ray installs with the extra ``formats`` only."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, for one line."""

    @abstractmethod
    def inputs(self) -> list[Path]:
        """Return all files that the result is made from."""

    @abstractmethod
    def convert(self, target: Path) -> None:
        """Write the converted model into a folder that is there and empty. It runs in a process of its own.

        Raises ConfigError where that cannot be.
        """

    def converted(self) -> Path:
        """Return the folder of the conversion, which is made unless it is there."""
        if self.extra_package and find_spec(self.extra_package) is None:
            raise ConfigError(
                f"model.source: {self.name} is {self.description}, which needs the package {self.extra_package}: "
                "pip install 'seap-ray[formats]'"
            )
        folder = _conversions() / self._key / self.path.name.removesuffix(GGUF)
        with writable(folder):
            return make_once(folder, self._convert_apart)

    @property
    def _key(self) -> str:
        """Name of the result: it tells the files that it was made from, and with what."""
        files = []
        for file in self.inputs():
            status = file.stat()
            files.append([file.name, status.st_size, status.st_mtime_ns, _sampled_hash(file)])
        versions = {package: version(package) for package in self.packages}
        content = json.dumps([FORMAT, type(self).__name__, str(self.path), files, versions])
        return hashlib.sha256(content.encode()).hexdigest()[:20]

    def _convert_apart(self, target: LocalPath) -> None:
        """Convert in a process of its own. Raises SeapError for what a user can correct."""
        n_bytes = sum(file.stat().st_size for file in self.inputs())
        say(f"{self.name} is {self.description} of {size(n_bytes)}: converting it, once on this node")
        target.mkdir(parents=True)

        # On the CPU, whose results are the same everywhere; and with this very package, however it was found.
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "seap_ray.models.conversion"]
        done = subprocess.run(command, input=pickle.dumps((self, target)), capture_output=True, env=environment)

        if done.returncode in ERRORS_BY_CODE:
            raise ERRORS_BY_CODE[done.returncode](done.stdout.decode().strip())
        if done.returncode < 0:
            raise ConfigError(
                f"model.source: {self.name}: its conversion was ended by signal {-done.returncode}, as where memory "
                f"runs out; it takes several times {size(n_bytes)}"
            )
        if done.returncode:
            raise RuntimeError(f"conversion of {self.name} failed:\n{done.stderr.decode()}")


ERRORS_BY_CODE: dict[int, type[SeapError]] = {
    error.exit_code: error for error in (ConfigError, DataError, IncompleteError)
}
"""Errors of ours by the exit code of the process that met them."""


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

        folder = str(self.path.parent)
        file = self.path.name
        # By default weights stay packed where there are kernels for that.
        has_config = hasattr(transformers, "GgufConfig")
        unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_config else {}

        with _refusing(self, "transformers does not read it"):
            _refuse_other_family(AutoConfig.from_pretrained(folder, gguf_file=file).to_dict())
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


@dataclass(frozen=True)
class RewrittenForm(Form):
    """A folder whose weights are pickled, or have trainers' prefixes: the same tensors are written anew."""

    is_pickled: bool = False
    """Whether weights are read from pickled files."""

    @property
    def description(self) -> str:
        """What it is."""
        return "a model in pickled files" if self.is_pickled else "a model whose tensors have other names"

    def weight_files(self) -> list[Path]:
        """Return the weight files that transformers loads. Raises ConfigError if one is missing."""
        whole = self.path / (PICKLED_WEIGHTS if self.is_pickled else WEIGHTS)
        index = self.path / (PICKLED_INDEX if self.is_pickled else INDEX)
        if whole.is_file():
            return [whole]

        content = read_json(index)
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not named:
            raise ConfigError(f"model.source: {index} names no weight files")
        # The index maps every tensor to its file, so that files come many times.
        files = sorted(self.path / name for name in set(named.values()))
        for file in files:
            if not file.is_file():
                raise ConfigError(f"model.source: {file} is missing, which {index.name} names; copy it there")
        return files

    def inputs(self) -> list[Path]:
        """Return the weight files and all that goes with them."""
        return [*self.weight_files(), *self._companions()]

    def _companions(self) -> list[Path]:
        """Return the files beside the weights that belong to the model."""
        found: set[Path] = set()
        for pattern in (CONFIG_FILE, *COMPANION_FILES):
            found |= {file for file in self.path.glob(pattern) if file.is_file()}
        return sorted(found)

    def convert(self, target: Path) -> None:
        """Write the tensors of each file under their plain names, one file at a time."""
        config = read_json(self.path / CONFIG_FILE)
        family = _family_of(config)
        files = self.weight_files()
        names: dict[str, str] = {}

        for i, file in enumerate(files, 1):
            output = WEIGHTS if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
            with _refusing(self, f"{file.name} cannot be read"):
                stored = dict(self._read(file))

            tensors = {plain_name(name, family): tensor for name, tensor in stored.items()}
            if len(tensors) < len(stored) or names.keys() & tensors.keys():
                raise ConfigError(f"model.source: {self.name}: two tensors have the same name but for a prefix")
            names |= dict.fromkeys(tensors, output)
            with writable(target):
                save_file(_separate(tensors), target / output, metadata={"format": "pt"})

        if len(files) > 1:
            write_json(target / INDEX, {"metadata": {}, "weight_map": names})
        for file in self._companions():
            with writable(target):
                shutil.copyfile(file, target / file.name)

    def _read(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a file. Raises ConfigError for one that holds something else."""
        if not self.is_pickled:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
            return

        content = _unpickled(file)
        for key in NESTED_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
        for name, value in content.items():
            if not isinstance(value, Tensor):
                raise ConfigError(f"model.source: {file}: {name} is no tensor; save the model's state_dict alone")
            yield name, value


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

        with _refusing(self, "peft cannot merge it"), warnings.catch_warnings():
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


# --- recognising -----------------------------------------------------------------------------------------------------


def _renamed_form(path: Path, source: ModelSource) -> Form | None:
    """Return the form of a folder of safetensors: None where its tensors have their plain names."""
    family = _family_of(read_json(path / CONFIG_FILE))
    if family is None:
        return None

    form = RewrittenForm(source.name, path)
    try:
        names = _stored_names(form)
    except (SafetensorError, ConfigError, OSError):
        # Opening the checkpoint says what is wrong with it.
        return None
    unmerged = next((name for name in sorted(names) if ".lora_A." in name), None)
    if unmerged:
        raise ConfigError(
            f"model.source: {source.name} holds a model with an adapter that is not merged ({unmerged}); save what "
            "merge_and_unload() of peft returns"
        )
    return form if any(plain_name(name, family) != name for name in names) else None


def _stored_names(form: RewrittenForm) -> set[str]:
    names: set[str] = set()
    for file in form.weight_files():
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def plain_name(name: str, family: Family | None) -> str:
    """Return the name of a tensor without what trainers put before it or into it.

    Args:
        name: As it is stored: ``_orig_mod.model.layers.0.mlp.up_proj.weight``, ``model.model.norm.weight``.
        family: The model's family; of an unknown one only words that no model has are taken away.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    plain = ".".join(parts)
    while plain.startswith(PREFIXES):
        plain = plain.removeprefix("module.").removeprefix("base_model.model.")

    if family is None:
        return plain
    # A model inside of another module of the same name has it twice.
    outer = family.layers.partition(".")[0] + "."
    while plain.startswith((outer + outer, f"{outer}lm_head.", f"{outer}embed_out.")):
        plain = plain.removeprefix(outer)

    # A decoder that was saved without its head has names without their beginning, as OPT's first checkpoints.
    inner = family.layers.removeprefix(outer)
    embedding = family.embedding.removeprefix(outer)
    inside = (inner, inner.removesuffix("layers."), embedding, "norm.", "final_layer_norm.")
    beginnings = tuple(beginning for beginning in inside if beginning)
    return outer + plain if plain.startswith(beginnings) else plain


def _family_of(config: Any) -> Family | None:
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return FAMILIES.get(str(model_type).removeprefix("seap_"))


def _refuse_other_family(config: Any) -> None:
    """Raise ConfigError for a model of a family that is not supported, before it is converted for nothing."""
    if isinstance(config, dict) and _family_of(config) is None:
        # It says which families there are.
        Architecture.of(config)


def _adapter_form(path: Path, source: ModelSource) -> Form:
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
    return Checkpoint.open(name, revision).folder


def _gguf_folder(path: Path, source: ModelSource) -> Form | None:
    """Return the form of a folder with one GGUF file; None where it has none."""
    files = sorted(path.glob("*.gguf"))
    if not files:
        return None
    if len(files) > 1:
        raise ConfigError(
            f"model.source: {source.name} holds {len(files)} GGUF files; name one of them: {path / files[0].name}"
        )
    return GgufForm(source.name, files[0])


# --- a GGUF's metadata -----------------------------------------------------------------------------------------------


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
    if not torch.allclose(factors, _llama3_factors(scaled, len(factors)), rtol=1e-3):
        raise ConfigError(
            f"model.source: {form.name} has rotary frequencies of its own (rope_freqs.weight), which transformers does "
            "not read from a GGUF file; take the checkpoint that it was made from"
        )
    config.rope_parameters = scaled


def _llama3_factors(rope: Mapping[str, Any], n: int) -> Tensor:
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


# --- helpers ---------------------------------------------------------------------------------------------------------


def _unpickled(file: Path) -> Mapping[str, Any]:
    """Read a pickled file, weights and plain values alone. Raises ConfigError where it would have to run code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # The format of before torch 1.6 cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"model.source: {file} holds Python objects beside weights, and reading them would run code; save the "
            "model's state_dict alone, or the model by save_pretrained"
        ) from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"model.source: {file} is no dict of tensors; save the model's state_dict")
    return content


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        separate[name] = (
            tensor if is_whole and place not in seen else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(place)
    return separate


def _sampled_hash(file: Path) -> str:
    """Hash blocks that are spread evenly over a file, all of a small one."""
    n_bytes = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for i in range(SAMPLED_BLOCKS):
            # The first block begins the file, the last one ends it; in a small file they overlap.
            content.seek(max(0, n_bytes - BLOCK_BYTES) * i // (SAMPLED_BLOCKS - 1))
            digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest()


@contextmanager
def _refusing(form: Form, what: str) -> Iterator[None]:
    """Turn errors of libraries inside the block into ConfigError, one line."""
    try:
        yield
    except SeapError:
        raise
    except LIBRARY_ERRORS as error:
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"model.source: {form.name} is {form.description}, and {what} ({type(error).__name__}: {lines[0]})"
        ) from error


def _main() -> int:
    """Convert what the parent process sends; return the exit code, with one line on stdout for an error."""
    # If the parent ends, so does this, which nobody would take the result of.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)  # sums, and so bytes, depend on it
    answer = sys.stdout
    with redirect_stdout(sys.stderr):
        form, target = pickle.load(sys.stdin.buffer)
        try:
            form.convert(target)
        except SeapError as error:
            print(str(error), file=answer)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
