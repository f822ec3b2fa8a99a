"""Records: moments and covariances on disk. Written whole, the same bytes for the same numbers, damage shown by a hash.

The covariances of ``<name>.safetensors`` lie in the folder ``<name>.covariances``, a file a layer: those of a large
model are never in memory together.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import RECORDED, Covariance, Moments, Site, Statistics, pooled_covariance
from seap_ray.errors import IncompleteError
from seap_ray.storage.files import atomic_write, stage
from seap_ray.storage.paths import StoragePath, storage_path


def save_moments(path: StoragePath, statistics: Statistics, **about: Any) -> None:
    """Write moments, float64, with a hash of their bytes; the same moments give the same file."""
    tensors = {}
    for (layer, site), moments in sorted(statistics.items()):
        tensors[f"layers.{layer}.{site}.mean"] = moments.mean_D.contiguous()
        tensors[f"layers.{layer}.{site}.m2"] = moments.m2_D.contiguous()
        tensors[f"layers.{layer}.{site}.count"] = torch.tensor(moments.count)
    save_tensors(path, tensors, **about)


def save_tensors(path: StoragePath, tensors: dict[str, Tensor], **about: Any) -> None:
    """Write tensors with a hash of their bytes and what is said about them."""
    # One metadata key: the library writes several in an order that differs from process to process.
    text = json.dumps({**about, "sha256": _hash(tensors)}, sort_keys=True)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"about": text})


def opened(path: StoragePath) -> Any:
    """A file of tensors, to be read one by one."""
    return safe_open(stage(path), "pt")


def about_moments(path: StoragePath) -> dict[str, Any]:
    """What ``save_tensors`` was told, and the sha256 of the tensors' bytes."""
    with opened(path) as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_whole(path: StoragePath, **expected: Any) -> bool:
    """Whether a file of tensors is there, carries ``expected`` in its metadata, and its bytes hash to what it says.

    Raises IncompleteError where that cannot be seen: a network that fails has damaged nothing.
    """
    try:
        about = about_moments(path)
        if any(about.get(key) != value for key, value in expected.items()):
            return False
        with opened(path) as file:
            return about["sha256"] == _hash({name: file.get_tensor(name) for name in file.keys()})
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return False
    except OSError as error:
        if not storage_path(path).is_remote:
            return False
        raise IncompleteError(f"{path}: cannot be read ({error}); mend that and run the same command again") from error


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The format of an artifact that is a file of tensors with a hash of their bytes in its metadata."""

    key_name: str | None = "fingerprint"
    """Metadata entry that holds the artifact's key; None where the file's name carries the key."""
    read: Callable[[StoragePath], Any] = about_moments
    """Reads what the file is for; by default its metadata."""

    def is_whole(self, path: StoragePath, key: str) -> bool:
        """Return whether the file is there, has the key, and its tensors hash to what its metadata says.

        Raises IncompleteError where storage does not answer.
        """
        expected = {self.key_name: key} if self.key_name else {}
        return is_whole(path, **expected)

    def load(self, path: StoragePath) -> Any:
        """Read a file that is whole."""
        return self.read(path)


def read_moments(file: Any, key: tuple[int, Site]) -> Moments:
    """Moments of one (layer, site) from an open safetensors file; nothing else is read."""
    layer, site = key
    mean, m2, count = (file.get_tensor(f"layers.{layer}.{site}.{part}") for part in ("mean", "m2", "count"))
    return Moments(int(count), mean, m2)


def load_statistics(path: StoragePath, architecture: Architecture, *, sites: Sequence[Site] = RECORDED) -> Statistics:
    """Moments of a file, float64; those of ``weight_norms`` have the sites of scores alone."""
    with opened(path) as file:
        return {key: read_moments(file, key) for key in sites_of(architecture, sites)}


def sites_of(architecture: Architecture, sites: Sequence[Site] = RECORDED) -> Iterator[tuple[int, Site]]:
    """Every (layer, site) of a model, ``mlp`` of a mixture as the sites of its experts."""
    each = [one for site in sites for one in architecture.sites(site)]
    return ((layer, site) for layer in range(architecture.n_layers) for site in each)


def load_unit_scores(path: StoragePath, layers: Iterable[int]) -> list[dict[str, Tensor]]:
    """Scores of each layer's ``heads`` and ``channels``, as ``prune`` saves them."""
    with opened(path) as file:
        return [{unit: file.get_tensor(f"{layer}.{unit}") for unit in ("heads", "channels")} for layer in layers]


# --- covariances -----------------------------------------------------------------------------------------------------


def covariance_bytes(architecture: Architecture) -> int:
    """Of the co-moments of one layer's sites, float32."""
    return 4 * sum(width**2 for width in architecture.widths)


def task_memory(architecture: Architecture) -> int:
    """Bytes that a task on one layer's covariances needs at most: ``obs``, by benchmarks/covariance.py."""
    return 13 * covariance_bytes(architecture)


def covariance_file(moments: StoragePath, layer: int) -> StoragePath:
    """Where the covariances of a layer lie whose moments are in the file ``moments``."""
    return moments.with_suffix(".covariances") / f"{layer:03d}.safetensors"


def save_covariances(moments: StoragePath, layer: int, of: Mapping[Site, Covariance], **about: Any) -> None:
    """Write the co-moments of one layer: the lower triangle of each, row by row, float32."""
    tensors: dict[str, Tensor] = {site: packed(covariance.comoment_DD) for site, covariance in of.items()}
    save_tensors(covariance_file(moments, layer), tensors, **about)


def packed(symmetric_DD: Tensor) -> Tensor:
    """Lower triangle, row by row, float32: (D, D) -> (D (D + 1) / 2,)."""
    return torch.cat([row_D[: i + 1] for i, row_D in enumerate(symmetric_DD.to(torch.float32))])


def unpacked(triangle: Tensor) -> Tensor:
    """The symmetric float64 matrix of a lower triangle: (D (D + 1) / 2,) -> (D, D)."""
    width = math.isqrt(2 * triangle.numel())
    matrix_DD = torch.zeros(width, width, dtype=torch.float64)
    for i, row in enumerate(triangle.split([*range(1, width + 1)])):
        matrix_DD[i, : i + 1] = row
    matrix_DD += matrix_DD.tril(-1).T
    return matrix_DD


def load_covariance(moments: StoragePath, key: tuple[int, Site]) -> Covariance:
    """Covariance of one (layer, site), float64; nothing else is read."""
    layer, site = key
    with opened(moments) as file:
        of = read_moments(file, key)
    with opened(covariance_file(moments, layer)) as file:
        return Covariance(of.count, of.mean_D, of.m2_D, unpacked(file.get_tensor(site)))


@dataclass(frozen=True)
class Mixture:
    """Covariances of several streams as one, each by its weight; read when they are asked for."""

    sources: tuple[StoragePath, ...]
    """Statistics files with their covariances beside them."""
    weights: tuple[float, ...]
    ridge: float | None = None
    """Relative ridge; None: the one that each source was found to need, averaged over them."""

    def __getitem__(self, key: tuple[int, Site]) -> Covariance:
        return pooled_covariance((load_covariance(source, key) for source in self.sources), self.weights)

    def ridge_of(self, key: tuple[int, Site]) -> float:
        """Geometric mean of the sources' ridges, by weight."""
        if self.ridge is not None:
            return self.ridge
        layer, site = key
        own = [about_moments(covariance_file(source, layer))["ridges"][site] for source in self.sources]
        total = sum(self.weights)
        return math.exp(sum(w * math.log(ridge) for w, ridge in zip(self.weights, own, strict=True)) / total)
