"""GGUF header: what a GGUF file says of itself, compared with what it can hold, before a library asks for memory."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

from seap_ray.errors import ConfigError
from seap_ray.models.configurations import MAX_COUNT

MAGIC = b"GGUF"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata that are numbers, in the letters of ``struct``."""
TEXT = 8
ARRAY = 9
COUNT = re.compile(r"\.(block|expert)_count$")
"""Keys of the metadata that say how many layers a model has, and how many experts a layer."""
MAX_DIMENSIONS = 4
"""Dimensions of a tensor in llama.cpp."""
LEAST_BITS = 1
"""Bits of an element that no type of llama.cpp has fewer of."""


class _TooMuchError(ValueError):
    """The file says that it holds more than it can."""


@dataclass
class _Reader:
    """Reads one value of the header after the other."""

    data: mmap
    order: str = "<"
    """Order of bytes, as ``struct`` has it."""
    at: int = len(MAGIC)

    def bytes(self, n: int) -> bytes:
        """Return the next bytes."""
        self.skip(n)
        return self.data[self.at - n : self.at]

    def skip(self, n: int) -> None:
        """Pass over bytes. Raises _TooMuchError where the file ends before."""
        self.at += n
        if self.at > len(self.data):
            raise _TooMuchError

    def number(self, letter: str) -> int:
        """Return the next number."""
        code = self.order + letter
        return struct.unpack(code, self.bytes(struct.calcsize(code)))[0]

    def times(self, n: int, read: Callable[[], object], least_bytes: int) -> None:
        """Read values of ``least_bytes`` or more each. Raises _TooMuchError before the first if they are too many."""
        if n * least_bytes > len(self.data) - self.at:
            raise _TooMuchError
        for _ in range(n):
            read()

    def value(self, kind: int) -> int | None:
        """Pass over a value of the metadata; return it where it is a number."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            self._array()
        else:
            raise ValueError(f"metadata of an unknown type {kind}")
        return None

    def _array(self) -> None:
        kind = self.number("I")
        n = self.number("Q")
        if kind in NUMBERS:
            self.skip(n * struct.calcsize(NUMBERS[kind]))
        elif kind == TEXT:
            self.times(n, lambda: self.skip(self.number("Q")), least_bytes=8)
        else:
            raise ValueError(f"a list of lists, or of an unknown type {kind}")


def check_header(path: Path) -> None:
    """Raise ConfigError for a GGUF file whose header says more than the file holds, or than any model has.

    A file of another format is left to who reads it.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                _check(_Reader(data))
            except _TooMuchError:
                raise ConfigError(f"model.source: {path} is truncated, or its header is damaged") from None
            except (ValueError, struct.error) as error:
                raise ConfigError(f"model.source: {path}: its header is damaged ({error})") from None


def _check(reader: _Reader) -> None:
    version = reader.number("I")
    # The upper half of a small number that was written the other way round.
    if not version & 0xFFFF:
        reader.order = ">"

    n_tensors = reader.number("Q")
    n_values = reader.number("Q")
    reader.times(n_values, lambda: _check_value(reader), least_bytes=13)
    reader.times(n_tensors, lambda: _check_tensor(reader), least_bytes=24)


def _check_value(reader: _Reader) -> None:
    name = reader.bytes(reader.number("Q")).decode(errors="replace")
    value = reader.value(reader.number("I"))
    if value is not None and value > MAX_COUNT and COUNT.search(name):
        raise ValueError(f"{name} {value}, and {MAX_COUNT} is the most")


def _check_tensor(reader: _Reader) -> None:
    name = reader.bytes(reader.number("Q")).decode(errors="replace")
    n_dimensions = reader.number("I")
    if n_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} with {n_dimensions} dimensions")

    n_elements = prod(reader.number("Q") for _ in range(n_dimensions))
    if n_elements * LEAST_BITS > 8 * len(reader.data):
        raise _TooMuchError
    # Its type, and where its data begin.
    reader.skip(4 + 8)
