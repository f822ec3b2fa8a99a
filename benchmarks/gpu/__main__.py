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
from benchmarks.gpu.device import Ceilings, ceiling_rows, free_memory, measure_ceilings
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
    """Measure some parts, and write the rows of all after each."""
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    rows: list[Row] = []
    parts: dict[str, dict[str, Any]] = {}
    ceilings = measure_ceilings()

    for name in names:
        measure_rows, allowed_s = PARTS[name]
        started = time.perf_counter()
        status: dict[str, Any] = {"seconds": 0.0, "cut off": False, "error": ""}
        parts[name] = status
        try:
            for row in measure_rows(ceilings):
                rows.append(row)
                print(describe(row), flush=True)
                status["seconds"] = time.perf_counter() - started
                # After every row: what is measured stays, whatever ends this process.
                save(path, rows, parts)
                if status["seconds"] > allowed_s:
                    status["cut off"] = True
                    break
        except Exception:  # the other parts go on
            status["error"] = traceback.format_exc()
            print(status["error"], file=sys.stderr, flush=True)

        status["seconds"] = time.perf_counter() - started
        save(path, rows, parts)
        # The next part begins with an empty device.
        free_memory()
        print(f"--- {name}: {status['seconds']:.0f} s", flush=True)


def save(path: Path, rows: Sequence[Row], parts: Mapping[str, Any]) -> None:
    """Write rows as a suite of ``docs/benchmarks`` has them, and what became of the parts."""
    content = {"suite": "gpu", "machine": machine(), "rows": [asdict(row) for row in rows], "parts": parts}
    write_json(path, content)


def describe(row: Row) -> str:
    """Return a row as a line of output."""
    ratio = "" if row.ratio is None else f"  x{row.ratio:.3f}"
    limit = "" if row.limit is None else f"  limit {row.limit:.4g}"
    met = {None: "", True: "  met", False: f"  NOT {row.target}"}[row.met]
    return f"{row.name}: {row.ours:.4g} {row.unit}{ratio}{limit}{met}"


def choose_parts(names: Sequence[str]) -> list[str]:
    """Return the parts of these names; without names all that can run here.

    Ends the process where there is no such part.
    """
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    return list(names) or [name for name in PARTS if name not in WITH_VLLM or find_spec("vllm")]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), choose_parts(sys.argv[2:]))
