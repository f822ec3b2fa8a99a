"""Planners without a model and without Ray: random statistics and norms of two tasks."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.scores import Norms
from seap_ray.pipeline.divergences import HeldOutShard
from seap_ray.pipeline.model_specs import ModelSpec, model_specs
from seap_ray.pipeline.planner import Planner
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.paths import storage_path
from seap_ray.storage.run import Run
from tests.support.builders import random_statistics

TASKS = ("sort", "facts")


def architecture_of(**sizes: int) -> Architecture:
    return Architecture.of({"model_type": "llama", **sizes})


SMALL = architecture_of(
    hidden_size=24,
    num_hidden_layers=5,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=4,
    intermediate_size=40,
)


def planner_of(architecture: Architecture, checkpoint: Any = None, **config: Any) -> Planner:
    """Random statistics of two tasks; the layers' scores lie far apart. Nothing is left to be judged."""
    pruning = config.pop("pruning", {})
    allocation = {"kind": "logistic", **pruning.pop("allocation", {})}
    pruning = {"score": "wifv", "compensation": "mean", "attention_unit": "group", **pruning, "allocation": allocation}
    whole = Config.model_validate({"tasks": list(TASKS), "pruning": pruning, **config})

    # Each layer's norms lie about twice as high as those of the layer before.
    generator = torch.Generator().manual_seed(9)
    norms: dict[tuple[int, str], Norms] = {}
    for layer, given in enumerate(architecture.layers):
        for site in architecture.modules(layer):
            n = given.shape.heads * architecture.head_dim if site == "attn" else given.shape.channels
            norms[layer, site] = Norms(*torch.rand(2, n, generator=generator, dtype=torch.float64) * 2.0**layer)

    statistics = {task: random_statistics(architecture, seed, n=6) for seed, task in enumerate(TASKS)}
    hashes = dict.fromkeys(TASKS, "hash")
    checkpoint = checkpoint or SimpleNamespace(architecture=architecture, fingerprint="base")
    return Planner(whole, checkpoint, statistics, norms, hashes, {}, Run(Path("nowhere")), {})  # type: ignore[arg-type]


def open_planner_of(architecture: Architecture, checkpoint: Any = None, **config: Any) -> Planner:
    """The same with everything left to be judged, each task with a held-out shard."""
    pruning = config.pop("pruning", {})
    allocation = {"kind": "auto", **pruning.pop("allocation", {})}
    pruning = {"score": "auto", "compensation": "auto", "attention_unit": "auto", **pruning, "allocation": allocation}
    planner = planner_of(architecture, checkpoint, pruning=pruning, **config)

    files = {task: storage_path(Path("nowhere") / f"{task}.safetensors") for task in TASKS}
    held_out = {
        task: HeldOutShard(Shard(task, "00001", 4, 40, f"digest of {task}"), file.with_suffix(".record"))
        for task, file in files.items()
    }
    return replace(planner, statistics_files=files, held_out=held_out)


def spec_of(planner: Planner, name: str) -> ModelSpec:
    """Return the spec of this name."""
    return next(spec for spec in model_specs(planner.config) if spec.name == name)
