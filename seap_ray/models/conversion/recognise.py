"""Recognise: tells the form of a model by what lies in a folder, and has it converted.

A new form is a class in a file beside this one, and a case of ``form_of``.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from seap_ray.errors import ConfigError
from seap_ray.models.conversion.adapter_form import adapter_form
from seap_ray.models.conversion.form import Form, family_of, refuse_other_family
from seap_ray.models.conversion.gguf_form import GgufForm
from seap_ray.models.conversion.mxfp4_form import Mxfp4Form, is_mxfp4
from seap_ray.models.conversion.rewritten_form import RewrittenForm, plain_name
from seap_ray.models.model_sources import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    INDEX,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    WEIGHTS,
    ModelSource,
    refuse_pointers,
)
from seap_ray.storage.files import read_json


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
    form = form_of(fetched, source)
    return form.converted() if form else fetched


def form_of(path: Path, source: ModelSource) -> Form | None:
    """Recognise the form of what was fetched; None for a folder as transformers saves it, and for one with no model."""
    if path.is_file():
        return GgufForm(source.name, path)

    has_weights = (path / WEIGHTS).is_file() or (path / INDEX).is_file()
    if (path / ADAPTER_CONFIG).is_file() and not has_weights:
        return adapter_form(path, source)

    if has_weights:
        return Mxfp4Form(source.name, path) if is_mxfp4(read_json(path / CONFIG_FILE)) else _renamed_form(path, source)
    # transformers reads a pickled file where there is no other.
    is_pickled = (path / PICKLED_WEIGHTS).is_file() or (path / PICKLED_INDEX).is_file()
    if is_pickled and (path / CONFIG_FILE).is_file():
        refuse_other_family(read_json(path / CONFIG_FILE))
        return RewrittenForm(source.name, path, is_pickled=True)
    return _gguf_folder(path, source)


def _renamed_form(path: Path, source: ModelSource) -> Form | None:
    """Return the form of a folder of safetensors: None where its tensors have their plain names."""
    family = family_of(read_json(path / CONFIG_FILE))
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
