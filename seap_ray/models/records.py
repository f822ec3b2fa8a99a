"""Records: moments and covariances on disk. Written whole, the same bytes for the same numbers, damage shown by a hash.

The covariances of ``<name>.safetensors`` lie in the folder ``<name>.covariances``, a file a layer: those of a large
model are never in memory together.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import (
    SITES,
    Covariance,
    Moments,
    Site,
    Statistics,
    pooled_covariance,
    stream_shares,
)
from seap_ray.core.scores import PRIOR_TOKENS, Norms, WeightNorms
from seap_ray.errors import IncompleteError
from seap_ray.storage.digests import PREFIX, digest_of, new_hasher, stated_digest
from seap_ray.storage.files import atomic_write, stage
from seap_ray.storage.paths import StoragePath, storage_path

# --- files of tensors ------------------------------------------------------------------------------------------------


def save_tensors(path: StoragePath, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Write tensors with JSON-able metadata and a hash of their bytes; equal tensors and metadata give equal files."""
    # One metadata key: the library writes several in an order that differs from process to process.
    text = json.dumps({**metadata, "digest": _digest(tensors)}, sort_keys=True)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"about": text})


def open_tensors(path: StoragePath) -> Any:
    """Open a safetensors file, whose tensors are read one by one; it is a context manager."""
    return safe_open(stage(path), "pt")


def read_metadata(path: StoragePath) -> dict[str, Any]:
    """Return the metadata that ``save_tensors`` was given, and the ``digest`` of the tensors' bytes."""
    with open_tensors(path) as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def _digest(tensors: dict[str, Tensor], like: str = PREFIX) -> str:
    hasher = new_hasher(like)
    for name in sorted(tensors):  # whatever the order in the dictionary
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest_of(hasher)


def is_whole(path: StoragePath, **expected: Any) -> bool:
    """Return whether a file of tensors is there, carries ``expected`` in its metadata, and bytes that match its digest.

    Raises:
        IncompleteError: That cannot be seen: a network that fails has damaged nothing.
    """
    try:
        metadata = read_metadata(path)
        # The cheap check first: the header is small, the digest reads everything.
        if any(metadata.get(key) != value for key, value in expected.items()):
            return False
        with open_tensors(path) as file:
            digest = stated_digest(metadata)
            return digest == _digest({name: file.get_tensor(name) for name in file.keys()}, like=digest)
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return False
    except OSError as error:
        if not storage_path(path).is_remote:  # a disk that cannot be read has a damaged file
            return False
        raise IncompleteError(f"{path}: cannot be read ({error}); fix that and run the same command again") from error


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The format of an artifact that is a file of tensors with a hash of their bytes in its metadata."""

    key_name: str | None = "fingerprint"
    """Metadata entry that holds the artifact's key; None where the file's name carries the key."""
    read: Callable[[StoragePath], Any] = read_metadata
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


# --- moments and scores ----------------------------------------------------------------------------------------------


def save_moments(path: StoragePath, statistics: Statistics, **metadata: Any) -> None:
    """Write moments, float64, with metadata and a hash of their bytes; the same moments give the same file."""
    tensors = {}
    # Sorted, so that the same moments give the same file.
    for (layer, site), moments in sorted(statistics.items()):
        # safetensors writes contiguous tensors alone.
        tensors[f"layers.{layer}.{site}.mean"] = moments.mean_D.contiguous()
        tensors[f"layers.{layer}.{site}.m2"] = moments.m2_D.contiguous()
        tensors[f"layers.{layer}.{site}.count"] = torch.tensor(moments.count)

    save_tensors(path, tensors, **metadata)


def read_moments(file: Any, key: tuple[int, Site]) -> Moments:
    """Read the moments of one (layer, site) from an open safetensors file, and nothing else."""
    layer, site = key
    mean, m2, count = (file.get_tensor(f"layers.{layer}.{site}.{part}") for part in ("mean", "m2", "count"))
    return Moments(int(count), mean, m2)


def load_statistics(
    path: StoragePath, architecture: Architecture, *, sites: Sequence[Site] | None = None
) -> Statistics:
    """Read the moments of every layer.

    Args:
        path: A task's statistics, or a shard's record.
        architecture: The model that the moments are of.
        sites: Kinds of sites to read; None: all that are recorded of the model.

    Returns:
        Moments by (layer, site), means and sums of squares float64 of shape (D,), D the columns of the site. In an MoE
        model ``mlp`` stands for the sites of its experts, ``mlp.0``, ``mlp.1``, ...

    Raises:
        FileNotFoundError: There is no such file.
        SafetensorError: The file is damaged, or lacks a site.
    """
    with open_tensors(path) as file:
        return {key: read_moments(file, key) for key in sites_of(architecture, sites)}


def sites_of(architecture: Architecture, sites: Sequence[Site] | None = None) -> Iterator[tuple[int, Site]]:
    """Return every (layer, site) of a model; in an MoE model ``mlp`` stands for the sites of its experts.

    Args:
        architecture: The model.
        sites: Kinds of sites; None: all that are recorded of the model.
    """
    for layer in range(architecture.n_layers):
        for kind in architecture.recorded if sites is None else sites:
            yield from ((layer, site) for site in architecture.sites(layer, kind))


def save_norms(path: StoragePath, norms: WeightNorms, **metadata: Any) -> None:
    """Write weight norms, float64, with metadata and a hash of their bytes."""
    tensors = {}
    # Sorted, so that the same norms give the same file.
    for (layer, site), site_norms in sorted(norms.items()):
        tensors[f"layers.{layer}.{site}.l1"] = site_norms.l1_D.contiguous()
        tensors[f"layers.{layer}.{site}.l2_squared"] = site_norms.l2_squared_D.contiguous()

    save_tensors(path, tensors, **metadata)


def load_norms(path: StoragePath, architecture: Architecture) -> WeightNorms:
    """Read the weight norms of every (layer, site).

    Raises:
        FileNotFoundError: There is no such file.
        SafetensorError: The file is damaged, or lacks a site.
    """
    norms: dict[tuple[int, Site], Norms] = {}
    with open_tensors(path) as file:
        # Runs of 0.1.0 hold them under the names of moments, and their reports are made from that file.
        l1, l2_squared = ("mean", "m2") if "layers.0.attn.mean" in file.keys() else ("l1", "l2_squared")
        for layer, site in sites_of(architecture, SITES):
            l1_D = file.get_tensor(f"layers.{layer}.{site}.{l1}")
            norms[layer, site] = Norms(l1_D, file.get_tensor(f"layers.{layer}.{site}.{l2_squared}"))
    return norms


def load_unit_scores(path: StoragePath, layers: Iterable[int]) -> list[dict[str, Tensor]]:
    """Read the scores of each layer's ``heads`` and ``channels``, as the planner writes them."""
    with open_tensors(path) as file:
        return [_read_unit_scores(file, layer) for layer in layers]


def _read_unit_scores(file: Any, layer: int) -> dict[str, Tensor]:
    return {unit: file.get_tensor(f"{layer}.{unit}") for unit in ("heads", "channels")}


# --- covariances -----------------------------------------------------------------------------------------------------

TASK_MEMORY_FACTOR = 13
"""Memory of a task on one layer's covariances, as a multiple of them: score ``obs``, by benchmarks/covariance.py."""


TILE = 256
"""Rows and columns of a matrix that are transposed at a time."""


MERGED_MEMORY_FACTOR = 3
"""Memory of covariances that wait to be written, as a multiple of their float32: they are float64, then triangles."""


def covariance_widths(architecture: Architecture, layer: int) -> list[int]:
    """Return the columns of every site of a layer, those of each MoE expert included."""
    shape = architecture.layers[layer].shape
    attention = [shape.heads * architecture.head_dim] * len(architecture.sites(layer, "attn"))
    return attention + [shape.channels] * len(architecture.sites(layer, "mlp"))


def covariance_bytes(architecture: Architecture) -> int:
    """Return the bytes of the co-moments of one layer's sites as full float32 matrices, of the layer with the most."""
    n_numbers_L: list[int] = []
    for layer in range(architecture.n_layers):
        n_numbers_L.append(sum(width**2 for width in covariance_widths(architecture, layer)))
    return 4 * max(n_numbers_L)


def task_memory(architecture: Architecture) -> int:
    """Return the bytes that a task on one layer's covariances needs at most."""
    # A task works on attention and one MLP, of a mixture one MoE expert, at a time; a merge holds the others, too.
    at_work = 4 * sum(width**2 for width in architecture.widths)
    held = max(covariance_bytes(architecture) - at_work, 0)
    return TASK_MEMORY_FACTOR * at_work + MERGED_MEMORY_FACTOR * held


def covariance_file(moments: StoragePath, layer: int) -> StoragePath:
    """Return where the covariances of a layer lie whose moments are in the file ``moments``."""
    return moments.with_suffix(".covariances") / f"{layer:03d}.safetensors"


def save_covariances(moments: StoragePath, layer: int, covariances: Mapping[Site, Covariance], **metadata: Any) -> None:
    """Write the co-moments of one layer beside its moments: the lower triangle of each, row by row, float32."""
    tensors: dict[str, Tensor] = {site: to_triangle(covariances[site].comoment_DD) for site in covariances}
    save_tensors(covariance_file(moments, layer), tensors, **metadata)


def load_covariance(moments: StoragePath, key: tuple[int, Site]) -> Covariance:
    """Read the covariance of one (layer, site), float64, and nothing else."""
    layer, site = key
    with open_tensors(moments) as file:
        site_moments = read_moments(file, key)

    with open_tensors(covariance_file(moments, layer)) as file:
        comoment_DD = from_triangle(file.get_tensor(site))

    return Covariance(site_moments.count, site_moments.mean_D, site_moments.m2_D, comoment_DD)


def to_triangle(symmetric_DD: Tensor) -> Tensor:
    """Return the lower triangle of a symmetric matrix, row by row, float32: (D, D) -> (D (D + 1) / 2,)."""
    width = len(symmetric_DD)
    triangle = symmetric_DD.new_empty(width * (width + 1) // 2, dtype=torch.float32)
    for row, row_D in zip(_rows(triangle, width), symmetric_DD, strict=True):
        row.copy_(row_D[: len(row)])
    return triangle


def from_triangle(triangle: Tensor) -> Tensor:
    """Return the symmetric float64 matrix of a lower triangle: (D (D + 1) / 2,) -> (D, D)."""
    # D (D + 1) / 2 numbers: D is the whole part of the root of twice as many.
    width = math.isqrt(2 * triangle.numel())

    matrix_DD = triangle.new_empty(width, width, dtype=torch.float64)
    for row, row_D in zip(_rows(triangle, width), matrix_DD, strict=True):
        row_D[: len(row)] = row
    _mirror(matrix_DD)
    return matrix_DD


def _rows(triangle: Tensor, width: int) -> Sequence[Tensor]:
    """Return views of the rows of a lower triangle: row i has i + 1 numbers, up to the diagonal."""
    return triangle.split([*range(1, width + 1)])


def _mirror(matrix_DD: Tensor) -> None:
    """Write the lower triangle of a matrix into its upper one, tile by tile, since whole columns are far apart."""
    tiles = range(0, len(matrix_DD), TILE)
    for top in tiles:
        diagonal_TT = matrix_DD[top : top + TILE, top : top + TILE]
        diagonal_TT.copy_(diagonal_TT.tril() + diagonal_TT.tril(-1).T)
        for left in tiles[: top // TILE]:
            tile_TT = matrix_DD[top : top + TILE, left : left + TILE]
            # Both are copies that a core's cache holds, of which torch transposes one piece of memory fastest.
            matrix_DD[left : left + TILE, top : top + TILE] = tile_TT.contiguous().T.contiguous()


@dataclass(frozen=True)
class PooledCovariance:
    """Covariances of several streams as one, each with its weight; they are read when they are asked for."""

    sources: tuple[StoragePath, ...]
    """Statistics files with their covariances beside them."""
    weights: tuple[float, ...]
    ridge: float | None = None
    """Relative ridge; None: the one that each source was found to need, averaged over them."""
    held_out: tuple[StoragePath | None, ...] = ()
    """A record of each source whose tokens are left out, None for none; empty: none at all."""

    _last_layer: dict[tuple[int, Site], Covariance] = field(default_factory=dict, repr=False, compare=False)
    """Covariances of the layer that was asked for last, where tokens are held out: many cuts of it are judged then."""

    def __getitem__(self, key: tuple[int, Site]) -> Covariance:
        """Return the pooled covariance of one (layer, site), float64."""
        if not self.held_out:
            sources, weights = self._routed(key)
            return pooled_covariance((load_covariance(source, key) for source in sources), weights)
        if key not in self._last_layer:
            # No more than the sites of a layer are kept, since each is a matrix of D x D.
            if any(layer != key[0] for layer, _ in self._last_layer):
                self._last_layer.clear()
            records = dict(zip(self.sources, self.held_out, strict=True))
            sources, weights = self._routed(key)
            fitted = (_fitted(source, records[source], key) for source in sources)
            self._last_layer[key] = pooled_covariance(fitted, weights)
        return self._last_layer[key]

    def _routed(self, key: tuple[int, Site]) -> tuple[Sequence[StoragePath], Sequence[float]]:
        """Return the sources that have a part in one (layer, site), with what they count there.

        At a site of an MoE expert a stream counts by how much of it is routed there, too (``stream_shares``).
        """
        layer, site = key
        if site in SITES or len(self.sources) == 1:
            return self.sources, self.weights

        parts: list[Statistics] = []
        for source in self.sources:
            with open_tensors(source) as file:
                parts.append({each: read_moments(file, each) for each in (key, (layer, "block"))})
        shares = stream_shares(parts, self.weights, key)
        # A stream without a token there has nothing to add.
        counting = [(source, share) for source, share in zip(self.sources, shares, strict=True) if share]
        return [source for source, _ in counting], [share for _, share in counting]

    def ridge_of(self, key: tuple[int, Site]) -> float:
        """Return the ridge of one (layer, site): the geometric mean of the sources' ridges, by weight.

        An MoE expert that few of the tokens reach gets more, as ``PRIOR_TOKENS`` over their number.
        """
        layer, site = key
        if site in SITES:
            return self._chosen_ridge(key)
        n_tokens = 0
        for source in self.sources:
            with open_tensors(source) as file:
                n_tokens += read_moments(file, key).count
        return self._chosen_ridge(key) + PRIOR_TOKENS / max(n_tokens, 1)

    def _chosen_ridge(self, key: tuple[int, Site]) -> float:
        if self.ridge is not None:
            return self.ridge

        layer, site = key
        ridges = [read_metadata(covariance_file(source, layer))["ridges"][site] for source in self.sources]
        # The mean of logarithms, since ridges to choose from are powers of ten.
        weighted = sum(weight * math.log(ridge) for weight, ridge in zip(self.weights, ridges, strict=True))
        return math.exp(weighted / sum(self.weights))


def _fitted(source: StoragePath, held_out: StoragePath | None, key: tuple[int, Site]) -> Covariance:
    """Read a stream's covariance of one (layer, site), without the tokens of a record that is held out."""
    covariance = load_covariance(source, key)
    if held_out is None:
        return covariance
    part = load_covariance(held_out, key)
    # Where no other shard has a token that counts, there is nothing else to fit to.
    return covariance.without(part) if part.count < covariance.count else covariance
