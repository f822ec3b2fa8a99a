"""Progress: what a job says while it runs."""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

PLAIN_EVERY = 10.0
"""Seconds between two progress lines where there is no terminal."""


def say(text: str) -> None:
    print(text, flush=True)


def progress(steps: Iterable[int], total: int, label: str, unit: str = "") -> Iterator[int]:
    """Pass ``steps`` through, each worth that many of ``total``: a bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        with tqdm(total=total, desc=label, unit=unit, unit_scale=True, file=sys.stdout) as bar:
            for step in steps:
                bar.update(step)
                yield step
        return
    started = said = time.monotonic()
    first: tuple[float, int] | None = None
    done = 0
    for step in steps:
        done += step
        now = time.monotonic()
        first = first or (now, done)
        yield step
        if now - said > PLAIN_EVERY and done < total:
            said = now
            share = f"{count(done)}/{count(total)}{unit} ({done / total:.0%})"
            say(f"{label} {share}{_rate(first, now, done, total, unit)}")
    say(f"{label} {count(done)}{unit} in {time.monotonic() - started:.1f} s")


def _rate(first: tuple[float, int], now: float, done: int, total: int, unit: str) -> str:
    """Rate and remaining time, counted from the first step: before it models were loaded, which says nothing."""
    if done == first[1]:
        return ""
    rate = (done - first[1]) / (now - first[0])
    return f", {count(rate)}{unit}/s, {(total - done) / rate:.0f} s left"


def count(n: float) -> str:
    """A number in three digits: 2.74M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def size(n_bytes: float) -> str:
    """Three digits: 168 GB, 13.1 MB."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= 0.9995 * of:
            return f"{n_bytes / of:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"
