"""seap_ray: cut a language model into smaller task experts, calibrated and written on a Ray cluster.

Every folder has one layer and imports only from layers below it (contracts in ``pyproject.toml``). From the top:

    cli           seap-ray VERB and jobs/VERB.py: help, a config, one line for an error
    studies       compare methods on one calibrated run, one file a question
    vllm_plugin   load the smaller checkpoints in vLLM: layers of unequal widths
    pipeline      the path of the data, on Ray:
                    job        a config in, a table out: runs the steps below in turn
                    preflight  compare what the machines have with what the config needs
                    shards     corpora -> immutable shards of token ids
                    calibrate  shards -> shard_records, by the actors that hold the model
                    merge      shard_records -> statistics of every task
                    planner    model_specs and statistics -> scores -> plans, kept as plan_files
                    checkpoint_writer  plans -> checkpoints
                    gguf_files checkpoints -> files that llama.cpp loads, where these are asked for
                    evaluate   models x tasks -> accuracies and perplexities, cached
                    results    models and their measurements -> a results file
    report        a run -> tables, pictures and one HTML page
    judges        a model and a task -> accuracy, perplexity or tokens per second
    routing       prompts of every task -> a router; a prompt -> its task
    models        read a model, record its activations, write the smaller checkpoint
    storage       files that are whole or absent, on a disk or in a bucket; the folder of a run
    core          arithmetic on torch alone: architecture, moments, scores, widths, allocation, plans, compensation
    config        ray_config.yaml and overrides -> one frozen Config
    demo          a small model with six skills, and the generators of its data
    tasks, methods, progress, errors    tables and types without torch

``import seap_ray`` is light: a name below is imported from its module when it is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# MKL reads it at its first product. Without it sums depend, on AMD's processors at least, on where in memory a matrix
# begins, and statistics would not be the same bytes for any number of workers.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from seap_ray.config import Config, load_config
    from seap_ray.core.allocation import choose_shapes
    from seap_ray.core.architecture import Architecture
    from seap_ray.core.moments import Moments
    from seap_ray.core.plan import Plan, keep
    from seap_ray.core.reconstruction import least_squares
    from seap_ray.models.checkpoint import Checkpoint
    from seap_ray.models.forward import record
    from seap_ray.routing.router import Router

    __version__: str

__all__ = [
    "Architecture",
    "Checkpoint",
    "Config",
    "Moments",
    "Plan",
    "Router",
    "__version__",
    "choose_shapes",
    "keep",
    "least_squares",
    "load_config",
    "record",
]

_MODULES = {
    "Architecture": "seap_ray.core.architecture",
    "Checkpoint": "seap_ray.models.checkpoint",
    "Config": "seap_ray.config",
    "Moments": "seap_ray.core.moments",
    "Plan": "seap_ray.core.plan",
    "Router": "seap_ray.routing.router",
    "choose_shapes": "seap_ray.core.allocation",
    "keep": "seap_ray.core.plan",
    "least_squares": "seap_ray.core.reconstruction",
    "load_config": "seap_ray.config",
    "record": "seap_ray.models.forward",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once: afterwards it is an ordinary attribute."""
    if name == "__version__":
        from importlib.metadata import version  # 0.1 s, which most programs can save

        return version("seap-ray")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, although they are not imported yet."""
    return sorted({*globals(), *__all__})
