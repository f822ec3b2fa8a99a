"""Loader: reads a compacted checkpoint into vLLM, and on a swap between checkpoints only the files that differ.

Checkpoints of one base and one shape share the files whose names begin with ``SHARED``. vLLM's ``reload_weights``
leaves a module alone when no tensor of it arrives, so these files need not be read again.
"""

import logging
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader

from seap_ray.models.export import SHARED
from seap_ray.models.model_sources import INDEX, indexed_files


class ExpertLoader(DefaultModelLoader):
    """Reads every file the first time, and afterwards those that the checkpoint in the engine does not have."""

    def __init__(self, load_config: LoadConfig):
        # vLLM's own reader knows no format of our name.
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        """Yield the name and value of every tensor that the engine lacks."""
        folder = Path(model_config.model)
        files = _weight_files(folder)

        # The engine's model remembers which files it holds: this object lives for one load only.
        loaded_files = getattr(model, "loaded_files", None)
        model.loaded_files = files  # type: ignore[assignment]
        if loaded_files is None:
            yield from super().get_all_weights(model_config, model)
            return

        # On a reload vLLM warns that modules which receive no tensor failed to load. They are meant to stay.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        for file_name in sorted(files):
            # Other files have the same names in every checkpoint, and other contents.
            is_in_engine = file_name.startswith(SHARED) and file_name in loaded_files
            if not is_in_engine:
                yield from _tensors(folder / file_name)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor in a safetensors file."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            yield name, file.get_tensor(name)


def _weight_files(folder: Path) -> frozenset[str]:
    """Return the names of a checkpoint's weight files."""
    # A checkpoint of one file needs no index.
    index = folder / INDEX
    if not index.is_file():
        return frozenset({"model.safetensors"})
    return frozenset(str(file.relative_to(folder)) for file in indexed_files(index))
