"""Shapes: the tensors that a configuration declares, compared with those that a checkpoint holds.

vLLM cuts a tensor that is too large to the size it wants, and drops a bias that it does not know, both silently.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from seap_ray.core.families import family_of
from seap_ray.core.fused_experts import single_shapes
from seap_ray.errors import ConfigError
from seap_ray.models.configurations import check_values, made_config
from seap_ray.models.multimodal import language_config, multimodal_of, plain_name
from seap_ray.storage.files import read_json

Shape = tuple[int, ...]


def declared(config: PreTrainedConfig) -> dict[str, Shape]:
    """Return the name and shape of every tensor that a checkpoint of this configuration holds."""
    with torch.device("meta"):
        # On meta, where tensors have shapes and no memory.
        model = AutoModelForCausalLM.from_config(config)

    # A family's names in checkpoints may be others than in its classes.
    stored = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        # The head, in GPT-NeoX under another name, is the embedding, which is stored once.
        for name in ("lm_head.weight", "embed_out.weight"):
            shapes.pop(name, None)
    return shapes


def compared(
    stored: Iterable[tuple[str, Shape]],
    config: PreTrainedConfig,
    expected: Mapping[str, Shape],
    *,
    is_quantized: bool = False,
    are_all: bool = True,
) -> Iterator[str]:
    """Yield the names of a checkpoint's tensors, each compared first with what its configuration declares.

    Args:
        stored: Name and shape of the tensors.
        config: The checkpoint's configuration.
        expected: What it declares, by ``declared``.
        is_quantized: Compare biases alone: a quantizer renames and packs weights.
        are_all: Whether ``stored`` are all tensors, so that none may be missing at the end.

    Yields:
        The names, in order.

    Raises:
        ValueError: At the first difference.
    """
    if is_quantized:
        expected = {name: shape for name, shape in expected.items() if name.endswith(".bias")}

    # Experts may be stored one by one or all together, whatever transformers would write.
    family = family_of(config.model_type)
    expected = single_shapes(family, expected)
    missing = set(expected)
    for name, shape in stored:
        for part, part_shape in single_shapes(family, {name: shape}).items():
            if not (_is_ignored(part, config) or is_quantized and not part.endswith(".bias")):
                _compare(part, part_shape, expected)
            missing.discard(part)
        yield name

    if missing and are_all:
        raise ValueError(f"the checkpoint lacks {min(missing)}, which config.json declares")


def _is_ignored(name: str, config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint may hold the tensor, though the model makes no use of it."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _compare(name: str, shape: Shape, expected: Mapping[str, Shape]) -> None:
    """Raise ValueError where a tensor is not as declared."""
    if name not in expected:
        raise ValueError(f"the checkpoint holds {name}, which config.json does not declare")
    if shape != expected[name]:
        raise ValueError(f"{name} is {list(shape)} in the checkpoint, and {list(expected[name])} by config.json")


def check_folder(folder: Path) -> None:
    """Check that a checkpoint holds what its config.json declares. Headers alone are read.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ConfigError: Something cannot be read, or is not as declared.
    """
    try:
        check_values(read_json(folder / "config.json") or {})
        config = AutoConfig.from_pretrained(folder)
        is_quantized = getattr(config, "quantization_config", None) is not None
        headers = _headers(folder)
        content = config.to_dict()
        if multimodal_of(content):
            # What is carried beside the language model is the base's own.
            config = made_config(language_config(content))
            headers = ((plain, shape) for name, shape in headers if (plain := plain_name(name)))
        # Names are compared as they are taken.
        for _ in compared(headers, config, declared(config), is_quantized=is_quantized):
            pass
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise ConfigError(f"{folder}: {str(error).strip().splitlines()[0]}") from None


def _headers(folder: Path) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor in a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                yield name, tuple(tensors.get_slice(name).get_shape())
