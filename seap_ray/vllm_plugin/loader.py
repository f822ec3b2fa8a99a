"""vLLM loader: weights of a compacted checkpoint; where they replace those of another of the same base and shape, only
what differs is read.

vLLM's ``reload_weights`` leaves modules alone that nothing comes for (see ``compaction.SHARED`` for what that is).
"""

import json
import logging
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader

from seap_ray.models.checkpoint import INDEX
from seap_ray.models.export import SHARED


class ExpertLoader(DefaultModelLoader):
    """The first time everything, then the files that the checkpoint in the engine does not have."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        folder, loaded = Path(model_config.model), getattr(model, "loaded_files", None)
        model.loaded_files = files = _files(folder)  # type: ignore[assignment]
        if loaded is None:
            yield from super().get_all_weights(model_config, model)
            return
        # What it says of modules that stay: that they failed to load.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        for name in sorted(files):
            if not (name.startswith(SHARED) and name in loaded):
                with safe_open(folder / name, "pt") as file:
                    for tensor in file.keys():  # noqa: SIM118  not a dict
                        yield tensor, file.get_tensor(tensor)


def _files(folder: Path) -> frozenset[str]:
    """Names of the weight files."""
    index = folder / INDEX
    if not index.is_file():
        return frozenset({"model.safetensors"})
    return frozenset(json.loads(index.read_text())["weight_map"].values())
