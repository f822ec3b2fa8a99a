"""Compact: an expert and a general model of a large shape, written by the job's Ray tasks; beside copying their files.

The base is a sparse file of zeros. Both are measured until the kernel has the bytes, and until the disk has them.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
from transformers import LlamaConfig

from benchmarks.measure import Rounds, Row, alternate
from benchmarks.merge import private_bytes
from benchmarks.plan import large_run, planner_of
from benchmarks.shapes import SHAPES, sparse_checkpoint
from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.pipeline.checkpoint_writer import write_checkpoints
from seap_ray.pipeline.cluster import connect
from seap_ray.pipeline.plan_choice import PlanChooser

SUITE = "compact"
LAYERS = 4
POLL_S = 0.05
"""Seconds between two looks at the processes' memory."""


def rows(config: Config) -> Iterator[Row]:
    """Yield the suite's rows: rates of writing, and the memory of a process meanwhile."""
    settings = config.benchmarks
    connect()
    with tempfile.TemporaryDirectory() as folder:
        # A few layers of full width: files of some gigabytes.
        shape = LlamaConfig.from_dict({**SHAPES[settings.shape].to_dict(), "num_hidden_layers": LAYERS})
        source = sparse_checkpoint(Path(folder) / "base", shape)
        pruning, checkpoint, run = large_run(source, Path(folder), export={"max_shard_size": "300MB"})
        planner = planner_of(pruning, checkpoint, run)
        experts = run.experts(0.5)
        kept = Path(folder) / "kept"
        copies = Path(folder) / "copies"

        def write(is_synced: bool = False) -> None:
            """Write both checkpoints by the job's own tasks."""
            models = PlanChooser(planner, _without_lines).plan_all()
            write_checkpoints(models, pruning.export, run, _without_lines)
            if is_synced:
                _sync(Path(str(experts)))

        def copy(is_synced: bool = False) -> None:
            """Copy the files of both, as many at a time."""
            _copy_files(kept, copies)
            if is_synced:
                _sync(copies)

        # The first writing is watched and not timed; its files are those that are copied.
        with _peak_of_processes() as peak:
            write()
        Path(str(experts)).rename(kept)
        n_bytes = sum(file.stat().st_size for file in kept.rglob("*.safetensors"))

        def clear() -> None:
            """Remove what a turn has written."""
            experts.remove()
            shutil.rmtree(copies, ignore_errors=True)
            os.sync()  # what a turn has left to the kernel is not the next one's

        # Each to the page cache and to the disk.
        contestants: dict[str, Callable[[], object]] = {
            "copy": copy,
            "write": write,
            "copy to disk": partial(copy, True),
            "write to disk": partial(write, True),
        }
        timings = alternate(contestants, settings.rounds, warm_up=False, before=clear)

    name = f"two models of {settings.shape.upper()} shape, {LAYERS} layers, at 0.5, {n_bytes / 1e9:.1f} GB"
    yield from _rate_rows(name, timings, n_bytes)
    yield _memory_row(peak, checkpoint.architecture)


def _without_lines(steps: Iterable[int], *_: object) -> Iterable[int]:
    """Go through steps without a word of their progress."""
    return steps


def _rate_rows(name: str, timings: Rounds, n_bytes: int) -> Iterator[Row]:
    for where, until in (("", "to the page cache"), (" to disk", "to the disk")):
        copied = n_bytes / timings.median(f"copy{where}") / 1e6
        yield Row.of(
            SUITE,
            f"{name}, {until}",
            baseline=copied,
            ours=n_bytes / timings.median(f"write{where}") / 1e6,
            unit="MB/s",
            ratios=timings.speedups(f"write{where}", f"copy{where}"),
            limit=copied,
            limit_name="copy of the same files, as many at a time",
            target="ratio >= 0.6",
            why="a copy computes nothing: here are biases from means, rows and columns that are picked, and a digest "
            "of every byte; more cores than the disk needs would close it",
        )


def _memory_row(peak: Mapping[int, int], architecture: Architecture) -> Row:
    # Two bytes a parameter, two layers.
    two_layers = 4 * architecture.layer_parameters(architecture.layers[0])
    return Row.of(
        SUITE,
        "memory of a process meanwhile",
        baseline=two_layers / 1e9,
        ours=max(peak.values()) / 1e9,
        unit="GB",
        ratios=[max(peak.values()) / two_layers],
        limit=two_layers / 1e9,
        limit_name="two decoder layers",
        target=f"ours <= {two_layers / 1e9 + 1:.2f}",
        why="the driver holds the statistics and the plans of all models",
    )


def _copy_files(source: Path, target: Path) -> None:
    """Copy all weight files below a folder into another one, each under a name that has its folder's."""
    files = [(str(file), str(target / "-".join(file.parts[-2:]))) for file in source.rglob("*.safetensors")]
    target.mkdir()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # the kernel copies; threads suffice
        list(pool.map(lambda names: shutil.copyfile(*names), files))  # a list, so that errors are raised here


def _sync(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _peak_of_processes() -> Iterator[dict[int, int]]:
    """Yield the most private bytes of this process and of each of Ray's workers, by process id."""
    done = threading.Event()
    me = psutil.Process()
    peak: dict[int, int] = {}

    def watch() -> None:
        """Look again and again until the block ends."""
        while not done.wait(POLL_S):
            for process in (me, *me.children(recursive=True)):
                # It may have ended since it was listed.
                with suppress(psutil.Error, OSError, IndexError):
                    peak[process.pid] = max(peak.get(process.pid, 0), private_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
