"""python -m benchmarks.rows [GB]

The draw of a corpus from one large jsonl file, 5 GB by default: its time beside that of ``wc -l``, and the most memory
of every process meanwhile, beside Ray's object store. The file is written anew, with distinct rows of about 1 KB, into
a temporary folder, and read once before anything is timed.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from seap_ray.errors import DataError
from seap_ray.pipeline.cluster import connect, connect_driver
from seap_ray.pipeline.draw import Draw, draw_corpus
from seap_ray.tasks import Task

SAMPLES = 1000
"""Rows that are drawn."""
N_BODIES = 997
"""Different texts; what is around them differs from row to row."""
WRITE_ROWS = 10_000
POLL_S = 0.05
"""Seconds between two looks at the processes."""


def main(gigabytes: float) -> None:
    """Draw from a file of so many gigabytes, and print times and memory as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        n_rows = write_rows(file, int(gigabytes * 1e9))

        count_lines(file)
        counted_s = timed(lambda: count_lines(file))
        drawn_s, memory = draw_watched(file, n_rows)

    times = {"wc -l s": round(counted_s, 2), "draw s": round(drawn_s, 2), "ratio": round(drawn_s / counted_s, 1)}
    print(json.dumps({"GB": gigabytes, "rows": n_rows, **times, **memory}, indent=2))


def write_rows(file: Path, n_bytes: int) -> int:
    """Write a jsonl file of about so many bytes; return the number of its rows. Raises DataError without the room."""
    if shutil.disk_usage(file.parent).free < 1.2 * n_bytes:
        raise DataError(f"{file.parent} has no room for {n_bytes / 1e9:.1f} GB")

    rng = random.Random(0)
    bodies = [" ".join(rng.choices(("some", "words", "über", "prices", "9.50"), k=150)) for _ in range(N_BODIES)]
    n_rows = 0
    with file.open("w", encoding="utf-8") as target:
        while target.tell() < n_bytes:
            # Joined, since a call of write for each row would take most of the time.
            target.write("".join(_line(i, bodies[i % N_BODIES]) for i in range(n_rows, n_rows + WRITE_ROWS)))
            n_rows += WRITE_ROWS
    return n_rows


def _line(number: int, body: str) -> str:
    return f'{{"id": {number}, "question": "{number}: {body}", "answer": "{number % 7}", "score": {number / 8}}}\n'


def count_lines(file: Path) -> int:
    """Count the lines of a file as ``wc`` does."""
    done = subprocess.run(["wc", "-l", str(file)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def timed(work: Any) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def draw_watched(file: Path, n_rows: int) -> tuple[float, dict[str, Any]]:
    """Draw rows on a Ray of its own; return the seconds, and the memory of its processes in GB."""
    task = Task(name="rows", path=str(file), question="{{ question }}", answer="{{ answer }}", metric="exact_match")
    connect("local")
    connect_driver()
    # Workers start, and import what they need, before the time counts.
    draw_corpus(Task(name="warm", path="demo:sort", answer="{{ answer }}"), n=10, seed=0)

    draws: list[Draw] = []
    with watched() as peaks:
        seconds = timed(lambda: draws.append(draw_corpus(task, n=SAMPLES, seed=0)))
    ray.shutdown()

    assert len(draws[0].items) == SAMPLES and draws[0].n_rows == n_rows
    return seconds, peaks


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Watch this process and all that it started inside the block.

    Yields:
        A mapping that is filled at the block's end: the most resident memory in GB, shared memory left out, of each
        kind of process, and of those that read (this one and the workers of Ray Data) together.
    """
    done = threading.Event()
    peaks: dict[str, float] = {}
    together = [0.0]

    def watch() -> None:
        """Look again and again until the block ends."""
        while not done.wait(POLL_S):
            sizes = _resident_gb()
            for name, size in sizes:
                peaks[name] = max(peaks.get(name, 0.0), size)
            together[0] = max(together[0], sum(size for name, size in sizes if _is_reader(name)))

    result: dict[str, Any] = {}
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield result
    finally:
        done.set()
        watcher.join()
        result["most of a process GB"] = {name: round(size, 3) for name, size in sorted(peaks.items())}
        result["readers together GB"] = round(together[0], 3)


def _is_reader(name: str) -> bool:
    return name == "driver" or name.startswith("ray::MapBatches")


def _resident_gb() -> list[tuple[str, float]]:
    """Return name and resident memory, without that of Ray's object store, of this process and those below it."""
    me = psutil.Process()
    sizes = []
    for process in (me, *me.children(recursive=True)):
        # It may have ended since it was listed.
        with suppress(psutil.Error, OSError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = _status_bytes(status, "VmRSS") - _status_bytes(status, "RssShmem")
            name = "driver" if process.pid == me.pid else _short_name(process)
            sizes.append((name, resident / 1e9))
    return sizes


def _status_bytes(status: str, key: str) -> int:
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def _short_name(process: psutil.Process) -> str:
    # Ray names its workers by what they do.
    command = process.cmdline()[0]
    return command.split("(")[0] if command.startswith("ray::") else process.name()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
