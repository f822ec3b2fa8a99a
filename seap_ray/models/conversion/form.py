"""Form: what every form of model has in common that is converted before it is used, and how that is done.

A conversion is made once on each node, in the node's cache, by a process of its own: pickled weights are read there,
with ``weights_only``, and the memory goes back when it ends. The bytes are the same on every node.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError

from seap_ray.core.architecture import Architecture
from seap_ray.core.families import FAMILIES, Family
from seap_ray.errors import ConfigError, DataError, IncompleteError, SeapError
from seap_ray.models.model_sources import GGUF
from seap_ray.models.multimodal import multimodal_of
from seap_ray.progress import say, size
from seap_ray.storage.files import writable
from seap_ray.storage.paths import LocalPath, cache_folder, make_once

FORMAT = 1
"""Version of what is written; a change of it has every model converted again."""
SAMPLED_BLOCKS = 64
"""Blocks of a file that name its conversion, beside its name, size and time of change."""
BLOCK_BYTES = 1 << 16
"""Size of such a block."""
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
        folder = conversions() / self._key / self.path.name.removesuffix(GGUF)
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
        root = str(Path(__file__).parents[3])
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


def is_converted(folder: Path) -> bool:
    """Return whether a folder is a conversion in this node's cache."""
    return conversions() in folder.parents


def conversions() -> LocalPath:
    return cache_folder() / "models"


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
def refusing(form: Form, what: str) -> Iterator[None]:
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


def family_of(config: Any) -> Family | None:
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return FAMILIES.get(str(model_type).removeprefix("seap_"))


def refuse_other_family(config: Any) -> None:
    """Raise ConfigError for a model of a family that is not supported, before it is converted for nothing."""
    if isinstance(config, dict) and multimodal_of(config):
        raise ConfigError(
            f"model.source: a {config['model_type']} is read from safetensors alone; save it by transformers' "
            "save_pretrained"
        )
    if isinstance(config, dict) and family_of(config) is None:
        # It says which families there are.
        Architecture.of(config)
