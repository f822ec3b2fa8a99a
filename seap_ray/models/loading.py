"""Loading: a checkpoint's model in memory, on one device or over several, and the type that it computes in."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers.utils import logging as transformers_logging

from seap_ray.config import CalibrationSection, Config, ModelSection
from seap_ray.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_dtype(model: ModelSection, checkpoint: Checkpoint) -> torch.dtype:
    """Return the type to compute in; ``auto`` is the checkpoint's own, as transformers takes it."""
    return checkpoint.dtype if model.dtype == "auto" else getattr(torch, model.dtype)


def attention_of(config: Mapping[str, Any]) -> str | None:
    """Return the attention implementation that a model's config.json calls for, None for transformers' choice.

    Where attention has a soft cap, as in Gemma 2, transformers' own choice leaves it out.
    """
    return "eager" if config.get("attn_logit_softcapping") else None


def load_model(config: Config, base: Checkpoint, folder: Path) -> "PreTrainedModel":
    """Load a model in evaluation mode on this worker's device or devices, by ``calibration.placement``.

    Args:
        config: The job's settings.
        base: The dense checkpoint, which says what type and attention to compute with.
        folder: The folder of the base itself, or of a checkpoint cut from it.
    """
    from transformers import AutoModelForCausalLM

    import seap_ray.models.hf  # noqa: F401  lets AutoModelForCausalLM load what was cut

    prepare_process(config.calibration)
    # accelerate places a spread model itself; a whole one is loaded on the CPU first.
    is_spread = config.calibration.placement == "device_map"
    device_map: Any = None
    if is_spread:
        # The empty name stands for the whole model.
        device_map = "auto" if config.calibration.num_gpus else {"": "cpu"}

    nested_settings = Checkpoint.at(folder).nested_settings
    with _without_load_report(is_wanted=not nested_settings):
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model_dtype(config.model, base),
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            device_map=device_map,
            attn_implementation=attention_of(base.config),
            **nested_settings,
        )

    # Integers become numbers at the first pass through the whole model. Here parts of it are run alone, too.
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)

    if not is_spread:
        model = model.to(first_device(config.calibration))
    return model.eval()


def decoder_of(model: Any) -> Any:
    """Return a causal language model without its head; that of a model without a head is the model itself."""
    decoder = model.get_decoder()
    # transformers looks for a Llama 4's under another name, and then returns the whole model.
    return decoder if hasattr(decoder, "layers") else decoder.model


@contextmanager
def _without_load_report(*, is_wanted: bool) -> Iterator[None]:
    """Keep transformers from listing, unless wanted, all tensors that are no part of the language model."""
    level = transformers_logging.get_verbosity()
    if not is_wanted:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def prepare_process(settings: CalibrationSection) -> None:
    """Set the number of threads, on which sums, and so bytes, depend; silence transformers' progress bars."""
    torch.set_num_threads(settings.num_cpus)
    transformers_logging.disable_progress_bar()


def first_device(settings: CalibrationSection) -> torch.device:
    """Return a worker's device, the first where it has several."""
    return torch.device("cuda" if settings.num_gpus else "cpu")


def free_memory(device: torch.device, num_gpus: float) -> int:
    """Return the bytes that a worker may take on its device now; of a GPU that it has a share of, that share."""
    if device.type == "cuda":
        # Other workers take the rest of the GPU.
        return int(torch.cuda.mem_get_info(device)[0] * min(num_gpus, 1))
    # As if there were a worker on every core.
    return psutil.virtual_memory().available // (os.cpu_count() or 1)
