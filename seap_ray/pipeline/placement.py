"""Placement: where a worker has the model it calibrates. Whole on its device, over several, or one layer at a time."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from seap_ray.config import CalibrationSection, Config, ModelSection, Placement
from seap_ray.errors import ConfigError, IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.layerwise import LayerwiseModel, attention_of
from seap_ray.models.recorder import Recorded, Sequences, record, telling
from seap_ray.models.records import covariance_bytes
from seap_ray.progress import say, size

PATIENCE_S = 120.0
"""Seconds that a GPU may take to answer."""
ROOM = 1.2
"""A model in memory and a batch on its way through it, as a multiple of its weights."""
Parts = Callable[[Mapping[str, Sequences]], Iterator[tuple[str, Recorded]]]
"""Shards' names and sequences in; a shard's name and what was recorded in it of some layers out, until all is."""


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A placement, and what speaks for it, in bytes."""

    kind: Placement
    needs: int
    """Of the model with a batch."""
    has: int
    """Of a worker."""

    def __str__(self) -> str:
        return f"{self.kind}: the model takes {size(self.needs)} with a batch, a worker has {size(self.has)}"


def choose(config: Config, checkpoint: Checkpoint) -> Choice:
    """``calibration.placement``, or by what the model needs and the cluster's workers have.

    Raises ConfigError for a model that is to be judged and does not fit a worker.
    """
    settings = config.calibration
    needs = int(ROOM * checkpoint.parameters * model_dtype(config.model, checkpoint).itemsize)
    one, all_ = _worker_memory(config)
    kind = settings.placement
    if kind == "auto":
        kind = "single" if needs <= one else "device_map" if needs <= all_ else "stream"
    if kind == "stream" and needs > all_ and config.evaluation.samples != 0:
        raise ConfigError(
            f"evaluation.samples: the model takes {size(needs)} and a worker has {size(all_)}, which calibrates "
            "it layer by layer, but cannot judge it; choose evaluation.samples=0, or more num_gpus or num_cpus"
        )
    return Choice(kind, needs, one if kind == "single" else all_)


def placed(config: Config, checkpoint: Checkpoint) -> Config:
    """The config with its placement chosen; what ``auto`` chose, and why, is said. Raises as ``choose`` does."""
    choice, settings = choose(config, checkpoint), config.calibration
    if settings.placement == "auto":
        say(f"placement {choice}")
    num_gpus = settings.num_gpus if choice.kind == "device_map" else min(settings.num_gpus, 1)
    own = settings.model_copy(update={"placement": choice.kind, "num_gpus": num_gpus})
    return config.model_copy(update={"calibration": own})


def _worker_memory(config: Config) -> tuple[int, int]:
    """Bytes of a worker's first device, and of all its devices, on the node that has the least.

    Models are judged by as many processes as a node holds, whatever ``calibration.workers`` says.
    """
    settings = config.calibration
    nodes = [node for node in ray.nodes() if node["Alive"] and worker_room(node["Resources"], settings)]
    if not nodes:
        return 0, 0  # n_workers, which comes first, says what is missing
    if not settings.num_gpus:
        most = settings.workers if settings.workers != "auto" and config.evaluation.samples == 0 else sys.maxsize
        resources = [node["Resources"] for node in nodes]
        least = min(int(has.get("memory", 0)) // min(most, worker_room(has, settings)) for has in resources)
        return least, least
    found = _gpus_of(nodes, settings.num_gpus)
    if [] in found:
        name = nodes[found.index([])]["NodeManagerHostname"]
        raise ConfigError(f"calibration.num_gpus: torch sees no GPU on {name}; install its CUDA build, or set 0")
    share = min(settings.num_gpus, 1)
    return int(share * min(of[0] for of in found)), int(share * min(sum(of) for of in found))


def worker_room(resources: Mapping[str, float], settings: CalibrationSection) -> int:
    """Workers that a node with these resources holds."""
    holds = int(resources.get("CPU", 0) // settings.num_cpus)
    if settings.num_gpus:
        holds = min(holds, int(resources.get("GPU", 0) // settings.num_gpus))
    return holds


def _gpus_of(nodes: list[dict[str, Any]], num_gpus: float) -> list[list[int]]:
    """Bytes of each GPU that a worker would get, node by node. Raises IncompleteError where GPUs are taken."""
    probe = ray.remote(num_cpus=0, num_gpus=num_gpus)(_gpu_memory)
    at = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [probe.options(scheduling_strategy=where).remote() for where in at]
    _, silent = ray.wait(asked, num_returns=len(asked), timeout=PATIENCE_S)
    if silent:
        name = nodes[asked.index(silent[0])]["NodeManagerHostname"]
        raise IncompleteError(
            f"calibration.num_gpus: {num_gpus:g} GPUs of {name} are not free; wait for what works there, or stop it"
        )
    return ray.get(asked)


def _gpu_memory() -> list[int]:
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


# --- the model -------------------------------------------------------------------------------------------------------


def model_dtype(model: ModelSection, checkpoint: Checkpoint) -> torch.dtype:
    """The type to compute in; ``auto`` is the one in the model's config."""
    name = model.dtype
    if name == "auto":
        name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    return getattr(torch, name)


def load_model(config: Config, base: Checkpoint, folder: Any) -> PreTrainedModel:
    """The model in ``folder``, the base or one cut from it, in evaluation mode on this worker's device or devices."""
    import seap_ray.models.hf  # noqa: F401  lets AutoModelForCausalLM load what is compacted

    _prepare(config)
    spread = config.calibration.placement == "device_map"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=model_dtype(config.model, base),
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
        device_map=("auto" if config.calibration.num_gpus else {"": "cpu"}) if spread else None,
        attn_implementation=attention_of(base.config),
    )
    return (loaded if spread else loaded.to(_device(config))).eval()


def _prepare(config: Config) -> None:
    torch.set_num_threads(config.calibration.num_cpus)  # sums, and so bytes, depend on the number of threads
    transformers_logging.disable_progress_bar()


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if config.calibration.num_gpus else "cpu")


def free_memory(device: torch.device, num_gpus: float) -> int:
    """Bytes that a worker may take on its device, now; of a GPU that it has a part of, that part."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * min(num_gpus, 1))
    return psutil.virtual_memory().available // (os.cpu_count() or 1)


def recording_parts(config: Config, checkpoint: Checkpoint) -> Parts:
    """Load what the placement keeps in memory; the function that runs the model over shards."""
    return _layerwise(config, checkpoint) if config.calibration.placement == "stream" else _whole(config, checkpoint)


def _layerwise(config: Config, checkpoint: Checkpoint) -> Parts:
    _prepare(config)
    settings, device = config.calibration, _device(config)
    dtype, trust = model_dtype(config.model, checkpoint), config.model.trust_remote_code
    free, is_covariance = free_memory(device, settings.num_gpus), settings.statistics == "covariance"
    room = free // 2 - 3 * covariance_bytes(checkpoint.architecture) * is_covariance  # as in _passes
    model = LayerwiseModel(checkpoint, dtype, device, room, trust)

    def parts(shards: Mapping[str, Sequences]) -> Iterator[tuple[str, Recorded]]:
        return model.record(
            shards,
            batch_tokens=settings.batch_tokens,
            skip_first_token=settings.skip_first_token,
            covariance=is_covariance,
        )

    return parts


def _whole(config: Config, checkpoint: Checkpoint) -> Parts:
    settings, model = config.calibration, load_model(config, checkpoint, checkpoint.folder)

    def parts(shards: Mapping[str, Sequences]) -> Iterator[tuple[str, Recorded]]:
        for shard, sequences in shards.items():
            for layers in _passes(settings, checkpoint, model.device):
                with telling(f"shard {shard}"):
                    recorded = record(
                        model,
                        sequences,
                        batch_tokens=settings.batch_tokens,
                        skip_first_token=settings.skip_first_token,
                        covariances=layers,
                    )
                yield shard, recorded

    return parts


def _passes(settings: CalibrationSection, checkpoint: Checkpoint, device: torch.device) -> list[range]:
    """Layers whose covariances are recorded in each pass of the model over a shard; without any: one pass."""
    if settings.statistics != "covariance":
        return [range(0)]
    n_layers, asked = checkpoint.architecture.n_layers, settings.covariance_layers
    # Of every layer the sum so far, a batch's part and their sum are there at once.
    fitting = int(free_memory(device, settings.num_gpus) * 0.8 // (3 * covariance_bytes(checkpoint.architecture)))
    at_a_time = max(1, fitting) if asked == "auto" else asked
    return [range(n_layers)[first : first + at_a_time] for first in range(0, n_layers, at_a_time)]
