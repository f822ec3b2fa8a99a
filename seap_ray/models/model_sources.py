"""Model sources: what ``model.source`` names, and the local folder or file that it becomes on this node.

A new kind of source is a class here and a case of ``parse_model_source``. In what form the model lies there is a matter
of ``models/conversion/``.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from seap_ray.errors import ConfigError
from seap_ray.storage.files import read_json, stage
from seap_ray.storage.paths import BucketPath, LocalPath, StoragePath, inside, parse_path

COMPANION_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "generation_config.json", "*processor_config.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files of a base model, tokenizer, preprocessors of pictures and terms of use, that go with every task expert."""
MODEL_FILES = ("*.safetensors", "*.json", *COMPANION_FILES)
"""Files of a model that are copied from the hub or a bucket."""
PICKLED_FILES = ("pytorch_model*.bin", "adapter_model.bin")
"""Pickled weights, which are copied where there are no others."""
CONFIG_FILE = "config.json"
"""File with a model's dimensions."""
WEIGHTS = "model.safetensors"
"""Weights in one file."""
INDEX = "model.safetensors.index.json"
"""Which file of several each tensor is in."""
PICKLED_WEIGHTS = "pytorch_model.bin"
"""Pickled weights in one file."""
PICKLED_INDEX = "pytorch_model.bin.index.json"
"""Which pickled file of several each tensor is in."""
ADAPTER_CONFIG = "adapter_config.json"
"""File of an adapter that names its base and says what it changes."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Weights of an adapter, the first of the two that is there."""
LFS_POINTER = b"version https://git-lfs.github.com"
"""Beginning of the text that Git has for a file that Git LFS did not fetch."""
LFS_POINTER_BYTES = 1024
"""No such text is longer."""
GGUF = ".gguf"
"""End of the name of a GGUF file."""
SPLIT_GGUF = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
"""End of the name of one GGUF file of several."""
BUILT_IN = "demo"
"""Name of the model that the package contains."""


@dataclass(frozen=True)
class ModelSource(ABC):
    """Where a model comes from."""

    name: str
    """The source as a config may name it, whatever the current folder: ``demo``, a folder, a URI, or a hub id."""
    revision: str | None
    """``model.revision``, which the hub alone heeds."""

    @abstractmethod
    def fetch(self) -> Path:
        """Return this node's folder with the model's files, or its one file, copied there first where need be.

        Raises ConfigError, one line, where that cannot be.
        """

    @abstractmethod
    def read_config(self) -> dict[str, Any] | None:
        """Return the contents of config.json without fetching any weights; None where they cannot be had."""

    @property
    def is_copied(self) -> bool:
        """Return whether every node has a copy of its own, from the hub or a bucket."""
        return False

    @property
    def hub_id(self) -> str | None:
        """Return the hub's name of the model, None if the hub is not asked."""
        return None

    def pinned(self, folder: Path) -> "ModelSource":
        """Return the source of exactly the files in ``folder``, which ``fetch`` returned."""
        return self


@dataclass(frozen=True)
class BuiltInModel(ModelSource):
    """The demo's model, which the package contains."""

    def fetch(self) -> Path:
        """Return the folder in the package."""
        return Path(__file__).parents[1] / "demo" / "model"

    def read_config(self) -> dict[str, Any] | None:
        """Return the contents of the package's config.json."""
        return _json_object(self.fetch() / CONFIG_FILE)


@dataclass(frozen=True)
class LocalModel(ModelSource):
    """A folder on a disk, which every node is expected to see under the same name."""

    path: LocalPath

    def fetch(self) -> Path:
        """Return the folder itself."""
        if self.path.is_dir():
            return self.path
        raise ConfigError(
            f"model.source: {self.name} is not a folder with a model, not a hub id (owner/name) and not `{BUILT_IN}`"
        )

    def read_config(self) -> dict[str, Any] | None:
        """Return the contents of the folder's config.json."""
        return _json_object(self.path / CONFIG_FILE)


@dataclass(frozen=True)
class BucketModel(ModelSource):
    """A folder in an object store."""

    path: BucketPath

    def fetch(self) -> Path:
        """Return this node's copy of the model's files."""
        try:
            # Weights in several formats would be copied for nothing.
            if any(file.suffix == ".safetensors" for file, _ in self.path.below()):
                return stage(self.path, MODEL_FILES)
            return stage(self.path, (*MODEL_FILES, *PICKLED_FILES, f"*{GGUF}"))
        # Before OSError, which is its base class.
        except FileNotFoundError:
            raise ConfigError(f"model.source: {self.name} holds no model") from None
        except OSError as error:
            raise ConfigError(f"model.source: {self.name} cannot be copied to this node ({error})") from None

    def read_config(self) -> dict[str, Any] | None:
        """Return the contents of the bucket's config.json."""
        try:
            return _json_object(self.path / CONFIG_FILE)
        # A bucket that does not answer is reported by ``fetch``.
        except OSError:
            return None

    @property
    def is_copied(self) -> bool:
        """Return True: every node has a copy of its own."""
        return True


@dataclass(frozen=True)
class HubModel(ModelSource):
    """A model of the Hugging Face hub, ``owner/name``."""

    def fetch(self) -> Path:
        """Return the folder in the hub's cache, downloaded where it is not there yet."""
        folder = _download(self.name, self.revision)
        if any(folder.glob("*.safetensors")):
            return folder
        # Pickled weights where there are no others. At the same commit, should the branch have moved meanwhile.
        return _download(self.name, self.pinned(folder).revision, PICKLED_FILES)

    def read_config(self) -> dict[str, Any] | None:
        """Return the contents of the model's config.json, from the hub or its cache."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return _json_object(Path(hf_hub_download(self.name, CONFIG_FILE, revision=self.revision)))
        # Gated, missing or offline is reported by ``fetch``.
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            return None

    @property
    def is_copied(self) -> bool:
        """Return True: every node has a cache of its own."""
        return True

    @property
    def hub_id(self) -> str:
        """Return the hub's name of the model."""
        return self.name

    def pinned(self, folder: Path) -> "HubModel":
        """Return the source at the commit of ``folder``: the hub's cache holds a model under snapshots/<commit>."""
        return replace(self, revision=folder.name) if folder.parent.name == "snapshots" else self


@dataclass(frozen=True)
class GgufFile(ModelSource):
    """A GGUF file on a disk or in an object store."""

    path: StoragePath

    def fetch(self) -> Path:
        """Return the file, or this node's copy of it."""
        split = SPLIT_GGUF.search(self.path.name)
        if split:
            raise ConfigError(
                f"model.source: {self.name} is one of {int(split[1])} parts; merge them: llama-gguf-split --merge "
                f"{self.name} MERGED{GGUF}"
            )
        try:
            if self.path.is_file():
                return stage(self.path)
        except OSError as error:
            raise ConfigError(f"model.source: {self.name} cannot be copied to this node ({error})") from None
        raise ConfigError(f"model.source: {self.name} is not there")

    def read_config(self) -> dict[str, Any] | None:
        """Return None: what its metadata say of the model is known when it is converted."""
        return None

    @property
    def is_copied(self) -> bool:
        """Return whether it lies in a bucket."""
        return self.path.is_remote


def _json_object(path: StoragePath | Path) -> dict[str, Any] | None:
    content = read_json(path)
    return content if isinstance(content, dict) else None


def indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names, sorted; whether they are there is not looked at.

    Raises ConfigError for an index that names none, or one outside of its folder.
    """
    content = _json_object(index) or {}
    named = content.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"model.source: {index} names no weight files")

    # The index maps every tensor to its file, so that files come many times.
    return sorted({inside(index.parent, name, f"model.source: {index}") for name in named.values()})


def parse_model_source(name: str, revision: str | None = None) -> ModelSource:
    """Parse ``model.source``. Nothing is fetched: ``fetch`` says what is not there.

    Raises ConfigError for a URI of an unknown kind.
    """
    if name == BUILT_IN:
        return BuiltInModel(name, revision)

    path = parse_path(name)
    # A bucket is not asked here.
    if name.endswith(GGUF) and (path.is_remote or not path.is_dir()):
        return GgufFile(str(path.absolute()), revision, path.absolute())
    if path.is_remote:
        return BucketModel(name, revision, path)

    if path.is_dir():
        # By its whole path: another process may have another current folder.
        return LocalModel(str(path.absolute()), revision, path.absolute())
    # A name of the hub has one slash; whatever else is not there is a path, whose absence ``fetch`` reports.
    looks_like_path = name.startswith((".", "/", "~")) or path.exists()
    if looks_like_path or name.count("/") != 1:
        return LocalModel(name, revision, path)
    return HubModel(name, revision)


def refuse_pointers(path: Path) -> None:
    """Raise ConfigError where Git left the text that stands for a large file instead of the file.

    Args:
        path: A model's folder, or its one file.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_size < LFS_POINTER_BYTES and file.read_bytes().startswith(LFS_POINTER):
            raise ConfigError(
                f"model.source: {file} is a Git LFS pointer and not the file itself; run git lfs pull in {file.parent}"
            )


@cache  # the hub is asked once by each process
def _download(hub_id: str, revision: str | None, more: tuple[str, ...] = ()) -> Path:
    """Download a model's files and those that match ``more``; return the folder in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*MODEL_FILES, *more]))
    # Before HfHubHTTPError, which is its base class.
    except RepositoryNotFoundError:
        raise ConfigError(f"model.source: the hub has no model {hub_id} that your token may read") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.source: {hub_id} is not a local folder, and the hub did not give it ({reason})"
        ) from None
