"""python -m benchmarks.covariance [tokens]

Time and memory of one decoder layer's covariances at the shape of Llama-2-7B, on this machine: recording beside the
bare forward (in turns, one process), writing and reading, choosing ridges, the optimal brain surgeon's order, and
weights by least squares at half the width. Random weights and tokens; every step is the code that a job runs.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from seap_ray.core.moments import SITES, Covariance, Moments, Site
from seap_ray.core.reconstruction import choose_ridge, least_squares, obs
from seap_ray.models.recorder import recording
from seap_ray.models.records import load_covariance, save_covariances, save_moments
from seap_ray.storage.paths import LocalPath, StoragePath

ROUNDS = 3
SEQUENCE = 512
HEAD_DIM = 128
VOCABULARY = 64
RIDGE = 0.01
POLL_S = 0.02
"""Seconds between two looks at the process's memory."""
SHAPE = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=VOCABULARY
)
OUTPUT_MODULES: dict[Site, str] = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def main(tokens: int) -> None:
    """Measure every step, and print seconds and gigabytes as JSON."""
    # Two threads of one core would share its units for products.
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    torch.manual_seed(0)
    model = LlamaModel(SHAPE).eval()
    report = {"threads": torch.get_num_threads(), "tokens": tokens, **_recording_times(model, tokens)}
    covariances = _record(model, tokens)

    with tempfile.TemporaryDirectory() as folder:
        path = LocalPath(folder) / "statistics.safetensors"
        moments: dict[tuple[int, Site], Moments] = {(0, site): covariances[site] for site in SITES}
        save_moments(path, moments)
        report |= _timed("write", lambda: save_covariances(path, 0, covariances))
        # Covariances lie in files beside the moments.
        report["bytes"] = sum(file.stat().st_size for file in path.with_suffix(".covariances").iterdir())
        for site, module in OUTPUT_MODULES.items():
            # As large models have them.
            weight_OD = model.layers[0].get_submodule(module).weight.detach().bfloat16()
            report |= _site_times(path, site, weight_OD)

    print(json.dumps(report, indent=2))


def _site_times(path: StoragePath, site: Site, weight_OD: Tensor) -> dict[str, Any]:
    """Return the times of what planning and export do with a site's covariance."""
    read: list[Covariance] = []
    times = _timed(f"{site} read", lambda: read.append(load_covariance(path, (0, site))))
    covariance = read[0]
    # Every second column: which ones does not matter for the time.
    kept_S = torch.arange(0, weight_OD.shape[1], 2)
    # Attention loses whole heads, an MLP single channels.
    block = HEAD_DIM if site == "attn" else 1
    times |= _timed(f"{site} least squares", lambda: least_squares(covariance, weight_OD, kept_S, ridge=RIDGE))
    times |= _timed(f"{site} ridge", lambda: choose_ridge(covariance, covariance, weight_OD))
    times |= _timed(f"{site} obs", lambda: obs(covariance, weight_OD, block=block, ridge=RIDGE))
    return times


def _random_ids(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (tokens // SEQUENCE, SEQUENCE))


@torch.inference_mode()
def _recording_times(model: LlamaModel, tokens: int) -> dict[str, Any]:
    """Return the seconds of a batch with moments and with covariances over those of the bare forward, medians."""
    ids_BT = _random_ids(tokens)
    seconds: dict[str, list[float]] = {"bare": [], "moments": [], "covariance": []}
    for _ in range(ROUNDS):
        # In turns, so that what slows the machine slows all.
        for name, layers in (("bare", None), ("moments", ()), ("covariance", (0,))):
            started = time.perf_counter()
            if layers is None:
                model(ids_BT)
            else:
                with recording(model, None, covariances=layers):
                    model(ids_BT)
            seconds[name].append(time.perf_counter() - started)

    bare = median(seconds["bare"])
    ratios = {f"{name} / bare": median(seconds[name]) / bare for name in ("moments", "covariance")}
    return {"forward s": bare, **ratios}


@torch.inference_mode()
def _record(model: LlamaModel, tokens: int) -> dict[Site, Any]:
    """Return the covariance of each site of the layer."""
    with recording(model, None, covariances=(0,)) as recorded:
        model(_random_ids(tokens))
    return {site: recorded[0, site] for site in SITES}


def _timed(name: str, work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds that a call takes, and the most memory meanwhile in GB."""
    started = time.perf_counter()
    with _peak_gb() as peak:
        work()
    return {f"{name} s": time.perf_counter() - started, f"{name} GB": peak[0]}


@contextmanager
def _peak_gb() -> Iterator[list[float]]:
    """Yield a list of one: the most memory above what was there before, in GB."""
    process = psutil.Process()
    done = threading.Event()
    before = process.memory_info().rss
    peak = [0.0]

    def watch() -> None:
        """Look again and again until the block ends."""
        while not done.wait(POLL_S):
            peak[0] = max(peak[0], (process.memory_info().rss - before) / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
