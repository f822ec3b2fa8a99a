"""python -m benchmarks.gpu OUT.json [part ...]

What a GPU does: calibration beside the bare forward pass, its statistics one by one, layer by layer beside the whole
model, and dense beside compacted models. Weights are random ones, made on the GPU, since speed depends on shapes. Rows
are written as they are measured; a part that takes longer than its share of time is cut off after a row, and one that
fails leaves its traceback. Without a GPU the same code runs over tiny shapes, which says nothing of speed. ``served``
and ``starts`` need vLLM.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.gpu.calibration import calibration_rows, contrast_rows
from benchmarks.gpu.decoding import prefill_rows
from benchmarks.gpu.device import Ceilings, ceiling_rows, ceilings, emptied
from benchmarks.gpu.engine import engine_rows
from benchmarks.gpu.linears import linears_rows
from benchmarks.gpu.served import served_rows, starts_rows
from benchmarks.gpu.statistics import compiled_rows, covariance_rows, statistics_rows
from benchmarks.gpu.stream import stream_rows
from benchmarks.measure import Row, machine
from seap_ray.storage.files import write_json

PARTS: Mapping[str, tuple[Callable[[Ceilings], Iterator[Row]], float]] = {
    "ceilings": (ceiling_rows, 20),
    "calibration": (calibration_rows, 60),
    "contrast": (contrast_rows, 60),
    "statistics": (statistics_rows, 60),
    "prefill": (prefill_rows, 100),
    "stream": (stream_rows, 60),
    "covariance": (covariance_rows, 30),
    "compiled": (compiled_rows, 30),
    "engine": (engine_rows, 150),
    "linears": (linears_rows, 40),
    "served": (served_rows, 240),
    "starts": (starts_rows, 200),
}
"""Parts, and the seconds after which no further row of one is waited for."""
WITH_VLLM = {"served", "starts"}


def main(path: Path, names: Sequence[str]) -> None:
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    rows: list[Row] = []
    parts: dict[str, Any] = {}
    reached = ceilings()
    for name in names:
        started, (part, allowed) = time.perf_counter(), PARTS[name]
        parts[name] = {"seconds": 0.0, "cut off": False, "error": ""}
        try:
            for found in part(reached):
                rows.append(found)
                print(shown(found), flush=True)
                parts[name]["seconds"] = time.perf_counter() - started
                save(path, rows, parts)
                if parts[name]["seconds"] > allowed:
                    parts[name]["cut off"] = True
                    break
        except Exception:
            parts[name]["error"] = traceback.format_exc()
            print(parts[name]["error"], file=sys.stderr, flush=True)
        parts[name]["seconds"] = time.perf_counter() - started
        save(path, rows, parts)
        emptied()
        print(f"--- {name}: {parts[name]['seconds']:.0f} s", flush=True)


def save(path: Path, rows: Sequence[Row], parts: Mapping[str, Any]) -> None:
    written = {"suite": "gpu", "machine": machine(), "rows": [asdict(one) for one in rows], "parts": parts}
    write_json(path, written)


def shown(one: Row) -> str:
    compared = "" if one.ratio is None else f"  x{one.ratio:.3f}"
    limit = "" if one.limit is None else f"  limit {one.limit:.4g}"
    met = {None: "", True: "  met", False: f"  NOT {one.target}"}[one.met]
    return f"{one.name}: {one.ours:.4g} {one.unit}{compared}{limit}{met}"


def named(names: Sequence[str]) -> list[str]:
    """Parts by their names; without names all that can run here. Ends the process where there is no such part."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    return [*names] or [name for name in PARTS if name not in WITH_VLLM or find_spec("vllm")]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), named(sys.argv[2:]))
