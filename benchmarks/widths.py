"""Widths: what a layer's time is at every width of its attention and its MLP, in vLLM on this device.

The models have the dimensions of model.source, layers that are all alike, and dummy weights: time depends on shapes,
not on values. Two depths tell a layer's time from what is no layer's. Besides the suite's rows it writes the table that
``pruning.target.latency`` reads.
"""

import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.load import Load, answer
from benchmarks.measure import Row, alternate, machine
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan
from seap_ray.core.targets import WidthTime, dimensions_of
from seap_ray.core.widths import WidthConstraints
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from seap_ray.progress import say
from seap_ray.storage.files import write_json
from seap_ray.storage.paths import parse_path

SUITE = "widths"
WHOLE = "whole layers"
"""The model of whole layers."""
SHALLOW = "whole layers, fewer of them"
"""The one that tells what is no layer's time."""
MLP_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Shares of the MLP that are cut."""
ATTENTION_SHARES = (0.25, 0.5, 0.75)
"""Shares of the attention that are cut."""
LARGE = 10**9
"""Parameters from which a few layers stand for all."""
LARGE_DEPTH = 6
"""Layers of such models."""
FLOAT32_BYTES = 4
KV_CACHE_BYTES = 1 << 28
"""Bytes of an engine's keys and values, at the least."""
MEDIAN_STDERR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, of normal values."""
MILLISECONDS = 1e3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks in seconds, by their names in the configuration."""


@dataclass(frozen=True, slots=True)
class UniformModel:
    """A model whose layers all have one shape."""

    name: str
    shape: Shape
    depth: int


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows, and write the table of times.

    Engines live in a process of their own: vLLM changes its process's environment and torch's threads for good.
    """
    checkpoint = Checkpoint.open(config.model.source, config.model.revision)
    models = uniform_models(config, checkpoint.architecture)
    configs = {model.name: model_config(checkpoint, model) for model in models}

    settings = config.benchmarks
    prompts = Load(settings.batch, settings.prompt_tokens, 1)
    whole = Load(settings.batch, settings.prompt_tokens, settings.new_tokens)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds = pool.submit(measure_models, configs, (prompts, whole), config).result()

    times = Times.of(models, seconds, new_tokens=settings.new_tokens)
    path = parse_path(settings.table)
    write_json(path, {**_about(config, checkpoint), **times.to_json()})
    say(f"times of {len(times.times)} widths for pruning.target.latency.table: {path}")
    yield from times.rows(checkpoint.architecture)


def uniform_models(config: Config, architecture: Architecture) -> list[UniformModel]:
    """Return the models to measure: whole layers at two depths, then layers with one site cut to several widths.

    Raises ConfigError for a model whose layers differ, and for one of a single layer.
    """
    if len({layer.shape for layer in architecture.layers}) > 1:
        raise ConfigError("model.source: its layers differ, as those of a compacted model; measure the dense model")
    if architecture.n_layers == 1:
        raise ConfigError("model.source: has one layer, which cannot be told from what is no layer's")

    depth = architecture.n_layers
    if architecture.decoder_parameters > LARGE:
        depth = min(depth, LARGE_DEPTH)
    whole = architecture.layers[0].shape
    models = [UniformModel(WHOLE, whole, depth), UniformModel(SHALLOW, whole, max(depth // 3, 1))]

    constraints = WidthConstraints.of(architecture, config.pruning, adds_biases=False)[0]
    for shape in constraints.ladder("mlp", MLP_SHARES):
        models.append(UniformModel(f"{shape.channels} channels", shape, depth))
    for shape in constraints.ladder("attn", ATTENTION_SHARES):
        models.append(UniformModel(f"{shape.groups} x {shape.heads_per_group} heads", shape, depth))
    return models


def model_config(checkpoint: Checkpoint, model: UniformModel) -> dict[str, Any]:
    """Return the config.json of a model of the checkpoint's dimensions."""
    architecture = checkpoint.architecture
    shape = model.shape
    channels = (tuple(range(shape.channels)),) * len(architecture.sites(0, "mlp"))
    kept = Kept(tuple(range(shape.groups)), tuple(range(shape.heads)), channels)
    dropped = tuple(range(model.depth, architecture.n_layers))
    plan = Plan(model.name, 0.0, COMPENSATIONS["none"], (kept,) * model.depth, {}, dropped)
    return CheckpointExport(checkpoint, plan).config()


def measure_models(
    configs: Mapping[str, dict[str, Any]], loads: tuple[Load, Load], config: Config
) -> dict[str, tuple[list[float], list[float]]]:
    """Start an engine for every model and time two loads in turns, the prompts alone and the whole requests.

    Args:
        configs: Contents of config.json, by name.
        loads: The prompts alone, then the whole requests.
        config: The job's settings: how often each is timed and by which clock, and the engines' arguments.

    Returns:
        Seconds of both loads in every round, by name.
    """
    prepare_process(config)
    contestants = {}
    for name, content in configs.items():
        engine = _start_dummy(content, loads[1], config)
        for load in loads:
            contestants[name, load] = partial(answer, engine, load, content["vocab_size"])

    runs = {f"{name} {load.reply}": run for (name, load), run in contestants.items()}
    timed = alternate(runs, config.benchmarks.rounds, now=CLOCKS[config.benchmarks.clock])
    prompts, whole = loads
    seconds = timed.seconds
    return {name: ([*seconds[f"{name} {prompts.reply}"]], [*seconds[f"{name} {whole.reply}"]]) for name in configs}


def prepare_process(config: Config) -> None:
    """Set what vLLM reads of this process's environment; on a CPU as many threads as a served engine has."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        threads = math.ceil(config.serve.num_cpus)
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        # torch was imported before, with threads of its own choice.
        torch.set_num_threads(threads)


def start_engine(folder: str, architecture: Architecture, load: Load, config: Config, **arguments: Any) -> Any:
    """Start vLLM in this process with the model in a folder, with room for a load."""
    from vllm import LLM

    tokens = load.prompt + load.reply
    per_token = sum(2 * FLOAT32_BYTES * layer.shape.groups * architecture.head_dim for layer in architecture.layers)
    defaults = {
        "skip_tokenizer_init": True,
        # A CPU has no graphs to record.
        "enforce_eager": not torch.cuda.is_available(),
        "enable_prefix_caching": False,
        "max_model_len": tokens,
        # Twice as many tokens as there are, since blocks of tokens are handed out whole.
        "kv_cache_memory_bytes": max(KV_CACHE_BYTES, 2 * load.requests * tokens * per_token),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    return LLM(folder, **{**defaults, **config.serve.engine, **arguments})


def _start_dummy(content: Mapping[str, Any], load: Load, config: Config) -> Any:
    """Start an engine with dummy weights for a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", dict(content))
        return start_engine(folder, Architecture.of(content), load, config, load_format="dummy")


# --- times of layers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of layers by their widths, and of what is no layer's; of every round, so that errors are known."""

    fixed: tuple[list[float], list[float]]
    """Prefill and decoding of a token, in every round."""
    layers: Mapping[str, tuple[list[float], list[float]]]
    """The same of a layer, by the model's name."""
    shapes: Mapping[str, Shape]

    @classmethod
    def of(
        cls,
        models: Sequence[UniformModel],
        seconds: Mapping[str, tuple[list[float], list[float]]],
        *,
        new_tokens: int,
    ) -> "Times":
        """Return times of single layers from those of whole models.

        Args:
            models: Models of whole layers at two depths, then those with one site cut.
            seconds: Seconds of the prompts, and of whole requests, in every round.
            new_tokens: Tokens after each prompt; the prompt's own pass gives the first of them.
        """
        # Against the whole model of the same round: what slows the machine for some seconds slows both.
        steady = {name: tuple(map(_steady, seconds[name], seconds[WHOLE])) for name in seconds}
        passes: dict[str, tuple[list[float], list[float]]] = {}
        for name, (prompts, requests) in steady.items():
            decode = [(request - prompt) / (new_tokens - 1) for prompt, request in zip(prompts, requests, strict=True)]
            passes[name] = (prompts, decode)

        depths = {model.name: model.depth for model in models}
        deep = depths[WHOLE]
        shallow = depths[SHALLOW]
        fixed: list[list[float]] = []
        for whole, fewer in zip(passes[WHOLE], passes[SHALLOW], strict=True):
            # A line through both depths; noise may take it below nothing.
            line = zip(whole, fewer, strict=True)
            fixed.append([max(b - shallow * (a - b) / (deep - shallow), 0.0) for a, b in line])

        layers: dict[str, tuple[list[float], list[float]]] = {}
        for name, both in passes.items():
            if name != SHALLOW:
                prefill, decode = map(partial(_a_layer, depth=depths[name]), both, fixed)
                layers[name] = (prefill, decode)
        shapes = {model.name: model.shape for model in models if model.name != SHALLOW}
        return cls((fixed[0], fixed[1]), layers, shapes)

    @property
    def times(self) -> list[WidthTime]:
        """Medians over rounds, with their standard errors."""
        times: list[WidthTime] = []
        for name, shape in self.shapes.items():
            prefill, decode = self.layers[name]
            times.append(
                WidthTime(shape, median(prefill), median(decode), stderr_of_median(prefill), stderr_of_median(decode))
            )
        return times

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the table's file."""
        prefill, decode = self.fixed
        return {
            "fixed": {
                "prefill": median(prefill),
                "decode": median(decode),
                "prefill_stderr": stderr_of_median(prefill),
                "decode_stderr": stderr_of_median(decode),
            },
            "widths": [time.to_json() for time in self.times],
        }

    def rows(self, architecture: Architecture) -> Iterator[Row]:
        """Yield a row for the prefill and one for the decoding of each width, in milliseconds of a layer."""
        whole_size = architecture.layer_parameters(architecture.layers[0])
        for i, what in enumerate(("prefill", "decoding of a token")):
            yield Row.of(SUITE, f"{what}, outside layers", ours=MILLISECONDS * median(self.fixed[i]), unit="ms")
            whole = self.layers[WHOLE][i]
            for name, shape in self.shapes.items():
                seconds = self.layers[name][i]
                left = architecture.layer_parameters(architecture.resized(0, shape, adds_biases=False)) / whole_size
                yield Row.of(
                    SUITE,
                    f"{what}, {name}",
                    baseline=MILLISECONDS * median(whole),
                    ours=MILLISECONDS * median(seconds),
                    unit="ms a layer",
                    ratios=[a / b for a, b in zip(seconds, whole, strict=True)],
                    limit=MILLISECONDS * median(whole) * left,
                    limit_name="whole, by the weights that are left",
                )


def _a_layer(passes: Sequence[float], fixed: Sequence[float], *, depth: int) -> list[float]:
    """Return the seconds of one of ``depth`` layers in every round, without what is no layer's."""
    return [(seconds - rest) / depth for seconds, rest in zip(passes, fixed, strict=True)]


def _steady(seconds: Sequence[float], whole: Sequence[float]) -> list[float]:
    """Return the seconds of every round as if the whole model had taken its median in each."""
    usual = median(whole)
    return [usual * a / b for a, b in zip(seconds, whole, strict=True)]


def stderr_of_median(values: Sequence[float]) -> float:
    """Return the standard error of the median of rounds; 0 for a single round, which tells none."""
    return MEDIAN_STDERR * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _about(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the times belong to."""
    settings = config.benchmarks
    about = machine()
    engine = next((f"{name} {about[name]}" for name in ("vllm", "vllm-cpu") if name in about), "vllm")
    return {
        "device": about["gpu"] or f"{about['cores']} cores of {about['cpu']}",
        "host": platform.machine(),
        "engine": engine,
        "model": dimensions_of(checkpoint.architecture),
        "threads": None if about["gpu"] else math.ceil(config.serve.num_cpus),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "batch": settings.batch,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "rounds": settings.rounds,
        "clock": settings.clock,
    }
