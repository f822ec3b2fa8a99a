"""Records: moments on disk. Written whole, the same bytes for the same moments, damage known by a hash."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from seap_ray.architecture import Architecture
from seap_ray.moments import RECORDED, Moments, Site, Statistics
from seap_ray.run import publishing


def save_moments(path: Path, statistics: Statistics, **about: Any) -> None:
    """Write moments, float64, with a hash of their bytes; the same moments give the same file."""
    tensors = {}
    for (layer, site), moments in sorted(statistics.items()):
        tensors[f"layers.{layer}.{site}.mean"] = moments.mean_D.contiguous()
        tensors[f"layers.{layer}.{site}.m2"] = moments.m2_D.contiguous()
        tensors[f"layers.{layer}.{site}.count"] = torch.tensor(moments.count)
    # One metadata key: the library writes several in an order that differs from process to process.
    text = json.dumps({**about, "sha256": _hash(tensors)}, sort_keys=True)
    with publishing(path) as temporary:
        save_file(tensors, temporary, metadata={"about": text})


def about_moments(path: Path) -> dict[str, Any]:
    """What ``save_moments`` was told, and the sha256 of the tensors' bytes."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def is_whole(path: Path, **expected: Any) -> bool:
    """Whether a moments file is there, carries ``expected`` in its metadata, and its bytes hash to what it says."""
    try:
        about = about_moments(path)
        if any(about.get(key) != value for key, value in expected.items()):
            return False
        with safe_open(path, "pt") as file:
            return about["sha256"] == _hash({name: file.get_tensor(name) for name in file.keys()})
    except (OSError, SafetensorError, KeyError, ValueError):
        return False


def read_moments(file: Any, key: tuple[int, Site]) -> Moments:
    """Moments of one (layer, site) from an open safetensors file; nothing else is read."""
    layer, site = key
    mean, m2, count = (file.get_tensor(f"layers.{layer}.{site}.{part}") for part in ("mean", "m2", "count"))
    return Moments(int(count), mean, m2)


def load_statistics(path: Path, architecture: Architecture, *, sites: Sequence[Site] = RECORDED) -> Statistics:
    """Moments of a file, float64; those of ``weight_norms`` have the sites of scores alone."""
    with safe_open(path, "pt") as file:
        return {key: read_moments(file, key) for key in sites_of(architecture, sites)}


def sites_of(architecture: Architecture, sites: Sequence[Site] = RECORDED) -> Iterator[tuple[int, Site]]:
    """Every (layer, site) of a model."""
    return ((layer, site) for layer in range(architecture.n_layers) for site in sites)
