"""Placement: where workers hold the model that they calibrate, by what the cluster's nodes have.

``single``: whole on a worker's device. ``device_map``: over the devices of a worker. ``stream``: one decoder layer at a
time. ``models.forward`` loads and runs the model as chosen here.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seap_ray.config import CalibrationSection, Config, Placement
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.loading import model_dtype
from seap_ray.progress import say, size

GPU_PROBE_TIMEOUT_S = 120.0
"""Seconds that a GPU may take to answer."""
MEMORY_FACTOR = 1.2
"""Memory of a model with a batch on its way through it, as a multiple of its weights."""


@dataclass(frozen=True, slots=True)
class PlacementChoice:
    """A placement, and the bytes that speak for it."""

    kind: Placement
    needed: int
    """Bytes of the model with a batch."""
    available: int
    """Bytes of a worker."""

    def __str__(self) -> str:
        return f"{self.kind}: the model takes {size(self.needed)} with a batch, a worker has {size(self.available)}"


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """Bytes that a worker has on the node that has the least."""

    first_device: int
    all_devices: int


def memory_with_batch(parameters: int, item_bytes: int) -> int:
    """Return the bytes of a model in memory and a batch on its way through it."""
    return int(MEMORY_FACTOR * parameters * item_bytes)


def choose_placement(config: Config, checkpoint: Checkpoint) -> PlacementChoice:
    """Choose by what the model needs and the cluster's workers have, or as ``calibration.placement`` says.

    Raises:
        ConfigError: The model is to be judged and does not fit a worker, or torch sees no GPU.
        IncompleteError: GPUs are taken by others.
    """
    settings = config.calibration
    needed = memory_with_batch(checkpoint.parameters, model_dtype(config.model, checkpoint).itemsize)
    memory = _worker_memory(config)

    kind = settings.placement
    if kind == "auto":
        kind = _first_that_fits(needed, memory)

    # Only the whole model can be evaluated.
    if kind == "stream" and needed > memory.all_devices and config.evaluation.samples != 0:
        raise ConfigError(
            f"evaluation.samples: a worker's {size(memory.all_devices)} are too little to evaluate the model "
            f"({size(needed)}), though enough to calibrate it layer by layer; choose evaluation.samples=0, or more "
            "num_gpus or num_cpus"
        )
    return PlacementChoice(kind, needed, memory.first_device if kind == "single" else memory.all_devices)


def _first_that_fits(needed: int, memory: WorkerMemory) -> Placement:
    # The fastest comes first.
    if needed <= memory.first_device:
        return "single"
    if needed <= memory.all_devices:
        return "device_map"
    return "stream"


def with_placement(config: Config, checkpoint: Checkpoint) -> Config:
    """Return the config with its placement chosen; what ``auto`` chose, and why, is printed.

    Raises as ``choose_placement`` does.
    """
    choice = choose_placement(config, checkpoint)
    settings = config.calibration
    if settings.placement == "auto":
        say(f"placement {choice}")

    # Only a model that is spread over devices has use for several.
    num_gpus = settings.num_gpus if choice.kind == "device_map" else min(settings.num_gpus, 1)
    calibration = settings.model_copy(update={"placement": choice.kind, "num_gpus": num_gpus})
    return config.model_copy(update={"calibration": calibration})


# --- what the nodes have ---------------------------------------------------------------------------------------------


def workers_that_fit(resources: Mapping[str, float], settings: CalibrationSection) -> int:
    """Return how many workers a node with these resources holds."""
    # A share of a GPU is a number below 1, so these are divisions of floats.
    n_workers = int(resources.get("CPU", 0) // settings.num_cpus)
    if settings.num_gpus:
        n_workers = min(n_workers, int(resources.get("GPU", 0) // settings.num_gpus))
    return n_workers


def _worker_memory(config: Config) -> WorkerMemory:
    """Return what a worker has on the node that has the least.

    Models are judged by as many processes as a node holds, whatever ``calibration.workers`` says.
    """
    settings = config.calibration
    nodes = [node for node in ray.nodes() if node["Alive"] and workers_that_fit(node["Resources"], settings)]
    if not nodes:
        return WorkerMemory(0, 0)  # n_workers, which comes first, says what is missing
    return _gpu_share(nodes, settings.num_gpus) if settings.num_gpus else _host_share(nodes, config)


def _host_share(nodes: list[dict[str, Any]], config: Config) -> WorkerMemory:
    """Return a worker's share of its node's memory for Ray tasks."""
    settings = config.calibration
    # Judges are as many as fit, so only a run without evaluation has its workers bounded by the setting.
    max_workers = sys.maxsize
    if settings.workers != "auto" and config.evaluation.samples == 0:
        max_workers = settings.workers

    # ``memory`` is what Ray gives to tasks; workers on a node have equal shares of it.
    shares: list[int] = []
    for node in nodes:
        resources = node["Resources"]
        shares.append(int(resources.get("memory", 0)) // min(max_workers, workers_that_fit(resources, settings)))

    # A worker on CPUs has one device, its node's memory.
    return WorkerMemory(min(shares), min(shares))


def _gpu_share(nodes: list[dict[str, Any]], num_gpus: float) -> WorkerMemory:
    """Return a worker's share of its GPUs' memory. Raises ConfigError where torch sees no GPU."""
    gpus_by_node = _gpus_of(nodes, num_gpus)
    if [] in gpus_by_node:
        name = nodes[gpus_by_node.index([])]["NodeManagerHostname"]
        raise ConfigError(f"calibration.num_gpus: torch sees no GPU on {name}; install its CUDA build, or set 0")

    # Below 1 several workers are on one GPU, and each has that share of it.
    share = min(num_gpus, 1)
    first_device = min(gpus[0] for gpus in gpus_by_node)
    all_devices = min(sum(gpus) for gpus in gpus_by_node)
    return WorkerMemory(int(share * first_device), int(share * all_devices))


def _gpus_of(nodes: list[dict[str, Any]], num_gpus: float) -> list[list[int]]:
    """Return the bytes of each GPU that a worker would get, node by node.

    Raises IncompleteError where GPUs are taken.
    """
    # A task that asks for a worker's GPUs on a node sees those that a worker would get there.
    probe = ray.remote(num_cpus=0, num_gpus=num_gpus)(_gpu_memory)
    probes = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probes.append(probe.options(scheduling_strategy=strategy).remote())

    # Where other jobs hold the GPUs, a probe waits for them.
    _, unanswered = ray.wait(probes, num_returns=len(probes), timeout=GPU_PROBE_TIMEOUT_S)
    if unanswered:
        name = nodes[probes.index(unanswered[0])]["NodeManagerHostname"]
        raise IncompleteError(
            f"calibration.num_gpus: {num_gpus:g} GPUs of {name} are not free; wait for the jobs that use them, or "
            "stop those"
        )

    return ray.get(probes)


def _gpu_memory() -> list[int]:
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
