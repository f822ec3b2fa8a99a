"""Runtimes: how many times as fast as the dense model a cut one is in vLLM and in llama.cpp, on a CPU.

    python -m benchmarks.runtimes MODEL FOLDER [FOLDER ...] [key=value ...]

``MODEL`` is the dense model's folder, each ``FOLDER`` a model of a run that was made with ``export.format=gguf``. They
take turns in each runtime: vLLM has the checkpoints, llama.cpp (``xllamacpp``) the GGUF files. ``serve.num_cpus``
threads, ``benchmarks.rounds`` and ``serve.engine`` are as in the suite ``widths``.
"""

import math
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import Load, answer
from benchmarks.measure import Rounds, alternate
from benchmarks.widths import prepare_process, start_engine, stderr_of_median
from seap_ray.config import Config, load_config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.gguf.writer import GgufExport
from seap_ray.report.table import text_table
from seap_ray.storage.paths import LocalPath

LOADS = (Load(1, 512, 1), Load(1, 16, 64))
COLUMNS = ("runtime", "model", "what", "tokens/s", "over dense")

Turns = Mapping[str, Callable[[Load], object]]
"""Functions that answer a load, by model."""


def main(arguments: Sequence[str]) -> None:
    """Measure all models in both runtimes, and print a table."""
    model, *folders = [argument for argument in arguments if "=" not in argument]
    config = load_config([argument for argument in arguments if "=" in argument])
    dense = Checkpoint.open(model)

    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        gguf_files = {folder: next(Path(folder).glob("model-*.gguf")) for folder in folders}
        gguf_type = next(iter(gguf_files.values())).stem.removeprefix("model-")
        whole = Path(temporary) / "dense.gguf"
        GgufExport.of(dense.folder, gguf_type, "dense").write(LocalPath(whole))

        in_vllm = {model: dense.folder} | {folder: Path(folder) for folder in folders}
        in_llama_cpp = {model: whole} | gguf_files
        for name, start, paths in [("vLLM", vllm, in_vllm), (f"llama.cpp, {gguf_type}", llama_cpp, in_llama_cpp)]:
            # vLLM sets threads for the whole of its process.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                for load, rounds in pool.submit(measure, start, paths, config).result():
                    rows += [[name, *cells(load, rounds, path, model)] for path in paths]
    print(text_table(COLUMNS, rows))


def measure(
    start: Callable[[Mapping[str, Path], Config], Turns], paths: Mapping[str, Path], config: Config
) -> list[tuple[Load, Rounds]]:
    """Start a runtime for every model, and time each load in turns."""
    turns = start(paths, config)
    results = []
    for load in LOADS:
        contestants = {path: partial(turn, load) for path, turn in turns.items()}
        results.append((load, alternate(contestants, config.benchmarks.rounds)))
    return results


def vllm(paths: Mapping[str, Path], config: Config) -> Turns:
    """Start an engine of vLLM for every checkpoint."""
    prepare_process(config)
    longest = Load(1, max(load.prompt for load in LOADS), max(load.reply for load in LOADS))

    def turn(folder: Path) -> Callable[[Load], object]:
        """Return what answers a load."""
        checkpoint = Checkpoint.at(folder)
        engine = start_engine(str(folder), checkpoint.architecture, longest, config)
        return lambda load: answer(engine, load, checkpoint.vocabulary_size)

    return {name: turn(folder) for name, folder in paths.items()}


def llama_cpp(paths: Mapping[str, Path], config: Config) -> Turns:
    """Start a server of llama.cpp in this process for every GGUF file."""
    import xllamacpp

    def turn(path: Path) -> Callable[[Load], object]:
        """Return what answers a load."""
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 1024
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = math.ceil(config.serve.num_cpus)
        params.verbosity = 0
        server = xllamacpp.Server(params)

        def answer_it(load: Load) -> Any:
            """Answer a prompt of random tokens."""
            drawn = random.Random(0)
            prompt = [drawn.randrange(1000, 10_000) for _ in range(load.prompt)]
            request = {"prompt": prompt, "n_predict": load.reply, "temperature": 0, "ignore_eos": True}
            return server.handle_completions({**request, "cache_prompt": False})

        return answer_it

    return {name: turn(path) for name, path in paths.items()}


def cells(load: Load, rounds: Rounds, path: str, dense: str) -> list[str]:
    """Return the cells of one model and load."""
    speedups = rounds.speedups(path, dense)
    rate = load.tokens / rounds.median(path)
    name = "dense" if path == dense else "/".join(Path(path).parts[-2:])
    return [name, load.name, f"{rate:.0f}", f"{median(speedups):.2f} +- {stderr_of_median(speedups):.2f}"]


if __name__ == "__main__":
    main(sys.argv[1:])
