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
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaModel

from seap_ray.core.moments import SITES, Covariance, Moments, Site
from seap_ray.core.reconstruction import choose_ridge, least_squares, obs
from seap_ray.models.recorder import recording
from seap_ray.models.records import load_covariance, save_covariances, save_moments

ROUNDS, SEQUENCE, HEAD_DIM = 3, 512, 128
SHAPE = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=64
)


def main(tokens: int) -> None:
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    torch.manual_seed(0)
    model = LlamaModel(SHAPE).eval()
    found = {"threads": torch.get_num_threads(), "tokens": tokens, **_recording(model, tokens)}
    moments, covariances = _recorded(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        save_moments(path, moments)
        found |= _timed("write", lambda: save_covariances(path, 0, covariances))
        found["bytes"] = sum(file.stat().st_size for file in path.with_suffix(".covariances").iterdir())
        for site, module in {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}.items():
            weight_OD = model.layers[0].get_submodule(module).weight.detach()
            found |= _site(path, site, weight_OD)
    print(json.dumps(found, indent=2))


def _site(path: Path, site: Site, weight_OD: torch.Tensor) -> dict[str, Any]:
    read: list[Covariance] = []
    found = _timed(f"{site} read", lambda: read.append(load_covariance(path, (0, site))))
    covariance, width = read[0], weight_OD.shape[1]
    kept_S = torch.arange(0, width, 2)
    found |= _timed(f"{site} least squares", lambda: least_squares(covariance, weight_OD, kept_S, ridge=0.01))
    found |= _timed(f"{site} ridge", lambda: choose_ridge(covariance, covariance, weight_OD))
    block = HEAD_DIM if site == "attn" else 1
    return found | _timed(f"{site} obs", lambda: obs(covariance, weight_OD, block=block, ridge=0.01))


@torch.inference_mode()
def _recording(model: LlamaModel, tokens: int) -> dict[str, Any]:
    """Seconds of a batch with moments and with covariances over those of the bare forward, medians of rounds."""
    ids_BT = torch.randint(64, (tokens // SEQUENCE, SEQUENCE))
    seconds: dict[str, list[float]] = {"bare": [], "moments": [], "covariance": []}
    for _ in range(ROUNDS):
        for name, layers in (("bare", None), ("moments", ()), ("covariance", (0,))):
            started = time.perf_counter()
            if layers is None:
                model(ids_BT)
            else:
                with recording(model, None, covariances=layers):
                    model(ids_BT)
            seconds[name].append(time.perf_counter() - started)
    bare = median(seconds["bare"])
    return {"forward s": bare, **{f"{name} / bare": median(seconds[name]) / bare for name in ("moments", "covariance")}}


@torch.inference_mode()
def _recorded(model: LlamaModel, tokens: int) -> tuple[dict[tuple[int, Site], Moments], dict[Site, Covariance]]:
    ids_BT = torch.randint(64, (tokens // SEQUENCE, SEQUENCE))
    with recording(model, None, covariances=(0,)) as recorded:
        model(ids_BT)
    of: dict[Site, Any] = {site: recorded[0, site] for site in SITES}
    return {(0, site): of[site] for site in SITES}, of


def _timed(name: str, work: Callable[[], object]) -> dict[str, float]:
    started = time.perf_counter()
    with _peak() as peak:
        work()
    return {f"{name} s": time.perf_counter() - started, f"{name} GB": peak[0]}


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The most memory above what was there before, in GB."""
    process, done, peak = psutil.Process(), threading.Event(), [0.0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], (process.memory_info().rss - before) / 1e9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield peak
    done.set()
    watcher.join()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
