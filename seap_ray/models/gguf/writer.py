"""GGUF writer: a checkpoint's folder in, one GGUF file out, written tensor by tensor.

A model of any size takes as much memory as its largest tensor.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint, completed_config
from seap_ray.models.export import write_chunks
from seap_ray.models.gguf.layouts import Layout, choose_layout
from seap_ray.models.gguf.metadata import add_metadata
from seap_ray.models.gguf.tensors import GgufTensor, gguf_tensors
from seap_ray.models.gguf.vocabulary import Vocabulary, read_vocabulary
from seap_ray.storage.paths import StoragePath


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file before it is written."""

    checkpoint: Checkpoint
    type: str
    """Type of its matrices, such as ``Q8_0``."""
    name: str
    """What the file calls the model."""

    @classmethod
    def of(cls, folder: Path, type_: str, name: str) -> "GgufExport":
        """Open the checkpoint in a folder, dense or cut.

        Raises:
            ConfigError: The package ``gguf`` is missing, or the folder holds no checkpoint.
        """
        require_gguf()
        return cls(Checkpoint.at(folder), type_, name)

    @cached_property
    def layout(self) -> Layout:
        """llama.cpp's architecture that holds the model. Raises ConfigError where there is none."""
        return choose_layout(completed_config(self.checkpoint.config), self.checkpoint.architecture)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer. Raises ConfigError where llama.cpp has no such one."""
        return read_vocabulary(self.checkpoint.folder, self.checkpoint.vocabulary_size)

    @cached_property
    def tensors(self) -> list[GgufTensor]:
        """Every tensor of the file."""
        return gguf_tensors(self.checkpoint, self.layout, self.type)

    def write(self, path: StoragePath) -> str:
        """Write the file.

        Args:
            path: Where it gets its name when it is whole.

        Returns:
            Its digest.

        Raises:
            ConfigError: llama.cpp does not have the model's architecture or its tokenizer.
        """
        return write_chunks(self._chunks(), path)

    def _chunks(self) -> Iterator[Any]:
        """Yield the bytes of the file: header, metadata and names, then tensor by tensor.

        Raises ValueError where a tensor is not as large as the header says.
        """
        header, alignment = self._header()
        yield header
        yield bytes(-len(header) % alignment)

        for tensor in self.tensors:
            n_bytes = 0
            for piece in tensor.pieces():
                # Hashed and written as bytes, whatever its elements are.
                yield memoryview(piece).cast("B")
                n_bytes += piece.nbytes
            if n_bytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name}: made {n_bytes} bytes, planned {tensor.shape} of {tensor.type}")
            yield bytes(-n_bytes % alignment)

    def _header(self) -> tuple[bytes, int]:
        """Return all that comes before the first tensor, and of how many bytes places are a multiple."""
        import gguf
        import numpy as np

        # The package logs what it writes.
        logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
        config = completed_config(self.checkpoint.config)
        writer = gguf.GGUFWriter(None, self.layout.name)
        add_metadata(writer, config, self.checkpoint.architecture, self.layout, name=self.name, type_=self.type)
        self.vocabulary.add_to(writer)
        for tensor in self.tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            # The shape is in elements, whatever their type; only of bytes it would be taken for one in bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=kind)

        # The package writes to files alone.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "header"
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return file.read_bytes(), writer.data_alignment


def require_gguf() -> None:
    """Raise ConfigError where the package that knows the format is not installed."""
    if find_spec("gguf") is None:
        raise ConfigError("export.format: gguf needs the package gguf: pip install 'seap-ray[formats]'")
