"""Progress: what a job says while it runs, and how it writes numbers and sizes."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

Progress = Callable[[Iterable[int], int, str, str], Iterable[int]]
"""A function like ``progress``: steps, their total, a label and a unit in, the steps out."""
LINE_EVERY_S = 10.0
"""Seconds between two progress lines where there is no terminal."""


def say(text: str) -> None:
    """Print a line at once, also where output goes to a file."""
    print(text, flush=True)


def progress(steps: Iterable[int], total: int, label: str, unit: str = "") -> Iterator[int]:
    """Pass ``steps`` through, each worth that many of ``total``: a bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        with tqdm(total=total, desc=label, unit=unit, unit_scale=True, file=sys.stdout) as bar:
            for step in steps:
                bar.update(step)
                yield step
        return

    started = time.monotonic()
    last_line = started
    first: tuple[float, int] | None = None
    done = 0

    for step in steps:
        done += step
        now = time.monotonic()
        first = first or (now, done)
        yield step
        # The last step has the line below, which says how long all took.
        if now - last_line > LINE_EVERY_S and done < total:
            last_line = now
            share = f"{count(done)}/{count(total)}{unit} ({done / total:.0%})"
            say(f"{label} {share}{_rate(first, now, done, total, unit)}")

    say(f"{label} {count(done)}{unit} in {time.monotonic() - started:.1f} s")


def _rate(first: tuple[float, int], now: float, done: int, total: int, unit: str) -> str:
    """Return rate and remaining time, counted from the first step: loading models before it says nothing of either."""
    if done == first[1]:  # one step is no interval
        return ""

    rate = (done - first[1]) / (now - first[0])
    return f", {count(rate)}{unit}/s, {(total - done) / rate:.0f} s left"


def count(number: float) -> str:
    """Return a number in three digits: 2.74M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.3g}"


def size(n_bytes: float) -> str:
    """Return bytes in three digits with their unit: 168 GB, 13.1 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        # What would be rounded to 1000 of the smaller unit is 1 of this one.
        if n_bytes >= 0.9995 * scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"
