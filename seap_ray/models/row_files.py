"""Row files: a file of a corpus in; the parts that are read at the same time, and the rows of each, out.

Rows are read one after another, so that a file of any size takes little memory. A new format is a class here and a row
of ``PARTS``.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from seap_ray.errors import DataError
from seap_ray.models.row_values import JSON, Row, arrow_rows, check_object, decode_text, parse_object, slice_rows
from seap_ray.storage.paths import BucketPath, StoragePath

PART_BYTES = 64 << 20
"""Bytes of a part, about; a row that begins in one part is read to its end there."""
BUFFER_BYTES = 1 << 20
"""Bytes that are read at a time."""
REQUEST_BYTES = 8 << 20
"""Bytes that are read at a time from a bucket, where each read is a request."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of the few lines that Git LFS leaves where a file is not fetched."""
ARROW_MAGIC = b"ARROW1"
"""Beginning of an Arrow file; a stream has none."""
WHITESPACE = re.compile(r"[ \t\n\r]*")
"""What may stand between the values of JSON."""
FIRST_LINE_END = re.compile(rb'(?:"[^"]*"|[^"\r\n])*(\r\n|\r|\n)')
"""The first line of a table, and what ends it: a line break that is not in quotes."""
COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": lambda raw: pa.CompressedInputStream(raw, "zstd"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
"""Readers of compressed text files, by the ends of their names."""
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    csv.Error,
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
)
"""What the readers of damaged files raise."""


class RowError(ValueError):
    """A row that cannot be read: its place in the file, and why."""


@dataclass(frozen=True)
class RowPart:
    """A piece of a source that is read from beginning to end; it pickles small."""

    task: str
    """Name of the task, for errors."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in their order. Raises DataError naming the place of what cannot be read."""
        raise NotImplementedError


@dataclass(frozen=True)
class FilePart(RowPart):
    """A piece of a file, or all of it; each format overrides how it is cut and read."""

    file: StoragePath

    @classmethod
    def cut(cls, task: str, file: StoragePath, part_bytes: int) -> "Sequence[FilePart]":
        """Return the parts of a file."""
        return [cls(task, file)]

    def rows(self) -> Iterator[Row]:
        """Yield the rows, in their order. Raises DataError naming file and row of what cannot be read."""
        with _errors_named(self.task, self.file):
            yield from self.read()

    def read(self) -> Iterator[Row]:
        """Yield the rows; raises one of ``UNREADABLE``."""
        raise NotImplementedError


@contextmanager
def _errors_named(task: str, file: StoragePath) -> Iterator[None]:
    try:
        yield
    except RowError as error:
        raise DataError(f"tasks.{task}: {file}, {error}") from None
    except UNREADABLE as error:
        reason = "it is a Git LFS pointer: git lfs pull" if _is_pointer(file) else _first_line(error)
        raise DataError(f"tasks.{task}: {file} cannot be read ({reason})") from None


def _first_line(error: Exception) -> str:
    # Errors of the system repeat the file's name in their text.
    strerror = getattr(error, "strerror", None)
    lines = (strerror or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- opening ---------------------------------------------------------------------------------------------------------


def _is_pointer(file: StoragePath) -> bool:
    try:
        with file.open("rb") as raw:
            return raw.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


@contextmanager
def _open_text(file: StoragePath) -> Iterator[BufferedReader]:
    """Open a text file, of whatever compression, as bytes. Raises ValueError where it is not UTF-8 text."""
    with file.open("rb") as raw:
        # A file of a bucket has no lines by itself, and neither has a decompressor.
        source: Any = raw
        stream: BufferedReader = raw if isinstance(raw, BufferedReader) else BufferedReader(source, REQUEST_BYTES)
        # As text it would be three rows.
        if stream.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
            raise ValueError("it is a Git LFS pointer")

        decompress = COMPRESSIONS.get(file.suffix)
        if decompress:
            stream = BufferedReader(decompress(stream), BUFFER_BYTES)

        if stream.peek(2)[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
            raise ValueError("it is UTF-16; save it as UTF-8")
        yield stream


def _open_native(file: StoragePath, *, mapped: bool = False) -> Any:
    """Open a file for pyarrow; one on a disk may be mapped, so that what is passed over is not read."""
    if isinstance(file, BucketPath):
        return file.open("rb")
    return pa.memory_map(str(file)) if mapped else pa.OSFile(str(file))


# --- lines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinesPart(FilePart):
    """Lines of a text file: those that begin in a range of bytes. Lines end at a line feed and nowhere else."""

    start: int = 0
    stop: int | None = None
    """End of the range; None: of the file."""

    @classmethod
    def cut(cls, task: str, file: StoragePath, part_bytes: int) -> Sequence[FilePart]:
        """Return ranges of bytes of a large file that is not compressed."""
        size = file.stat().st_size
        n_parts = -(-size // part_bytes)
        if n_parts <= 1 or file.suffix in COMPRESSIONS or not cls._is_cuttable(file):
            return [cls(task, file)]

        bounds = [size * i // n_parts for i in range(n_parts + 1)]
        ranges = zip(bounds[:-1], bounds[1:], strict=True)
        return [cls(task, file, start, stop) for start, stop in ranges]

    @classmethod
    def _is_cuttable(cls, file: StoragePath) -> bool:
        """Return whether every row of the file is a line."""
        return True

    def parse(self, line: str) -> Row | None:
        """Return the row of a line, None where there is none. Raises ValueError."""
        raise NotImplementedError

    def read(self) -> Iterator[Row]:
        """Yield the rows of the file, or of the range."""
        with _open_text(self.file) as stream:
            yield from self.read_stream(stream)

    def read_stream(self, stream: BufferedReader) -> Iterator[Row]:
        """Yield the rows of the lines. Raises RowError with the number of a line that is no row."""
        for offset, line in _lines(stream, self.start, self.stop):
            try:
                row = self.parse(decode_text(line))
            except ValueError as error:
                raise RowError(f"line {_line_number(self.file, offset)}: {error}") from None

            if row is not None:
                yield row


def _lines(stream: BufferedReader, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield every line that begins in a range of bytes, and where it begins; a byte order mark is no part of any."""
    offset = start
    if start:
        # From the byte before, so that a line that begins at the border is found; the rest is the part's before.
        stream.seek(start - 1)
        offset += len(stream.readline()) - 1

    while stop is None or offset < stop:
        line = stream.readline()
        if not line:
            return

        yield offset, line if offset else line.removeprefix(BOM_UTF8)
        offset += len(line)


def _line_number(file: StoragePath, offset: int) -> int:
    """Return the number, from 1, of the line that begins at a byte: counted only where an error has to name it."""
    number = 1
    with _open_text(file) as stream:
        while offset and (chunk := stream.read(min(offset, BUFFER_BYTES))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


@dataclass(frozen=True)
class TextPart(LinesPart):
    """Plain text: every line that is not blank is a row with the column ``text``."""

    def parse(self, line: str) -> Row | None:
        """Return the row of a line, None where it is blank."""
        return {"text": line.removesuffix("\n").removesuffix("\r")} if line.strip() else None


@dataclass(frozen=True)
class JsonPart(LinesPart):
    """JSON: an object on every line that is not blank, or one array of objects."""

    @classmethod
    def _is_cuttable(cls, file: StoragePath) -> bool:
        with _open_text(file) as stream:
            return not _begins_array(stream)

    def parse(self, line: str) -> Row | None:
        """Return the row of a line, None where it is blank. Raises ValueError where it is no JSON object."""
        # As JSON is printed for people.
        if line.strip() == "{":
            raise ValueError("one object over several lines; write an array of objects, or an object on each line")
        return parse_object(line) if line.strip() else None

    def read_stream(self, stream: BufferedReader) -> Iterator[Row]:
        """Yield the rows of the lines, or those of the array. Raises RowError with the place of what is no row."""
        if self.start == 0 and _begins_array(stream):
            yield from _array_rows(stream)
        else:
            yield from super().read_stream(stream)


def _begins_array(stream: BufferedReader) -> bool:
    return stream.peek(BUFFER_BYTES).removeprefix(BOM_UTF8).lstrip()[:1] == b"["


# --- a JSON array ----------------------------------------------------------------------------------------------------


class _ArrayText:
    """The text of a JSON array, of which only what is not yet parsed is in memory."""

    def __init__(self, stream: BufferedReader):
        self.stream = stream
        self.decoder = getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        """Place in the text of what comes next."""
        self.is_whole = False
        """Whether the text goes to the end of the file."""

    def grow(self) -> None:
        """Read as much again as there is, so that a long row, parsed anew each time, takes twice the time in all."""
        rest = self.text[self.position :]

        # Characters may be cut where pieces end, which the decoder remembers.
        chunk = self.stream.read(max(BUFFER_BYTES, len(rest)))
        self.is_whole = not chunk
        self.text = rest + self.decoder.decode(chunk, final=self.is_whole)
        self.position = 0

    def next_character(self) -> str:
        """Go to the next character that is no white space and return it; an empty text at the end of the file."""
        while True:
            match = WHITESPACE.match(self.text, self.position)
            self.position = match.end() if match else self.position

            if self.position < len(self.text) or self.is_whole:
                return self.text[self.position : self.position + 1]
            self.grow()

    def take(self, *expected: str) -> str:
        """Return the next character and go behind it. Raises ValueError where it is none of those expected."""
        character = self.next_character()
        if not character:
            raise ValueError("the file ends before the array does")
        if character not in expected:
            raise ValueError(f"not JSON ({' or '.join(expected)} is expected, not {character})")

        self.position += 1
        return character

    def next_row(self) -> Row:
        """Parse the next value. Raises ValueError where it is no JSON object."""
        if not self.next_character():
            raise ValueError("the file ends before the array does")

        # Again with more text, as long as the row may go on behind what is there.
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if self.is_whole:
                    raise ValueError(f"not JSON ({error.msg}); the file may be cut off") from None
                if not self._is_cut(error):
                    raise ValueError(f"not JSON ({error.msg})") from None
                self.grow()
            except RecursionError:
                raise ValueError("JSON that is nested too deeply") from None
            else:
                text = self.text[self.position : end]
                self.position = end
                return check_object(value, text)

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether more text may heal an error: it lies at the end, or in a string that has no end yet."""
        # The longest word of JSON is -Infinity, the longest escape a pair of surrogates.
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16


def _array_rows(stream: BufferedReader) -> Iterator[Row]:
    """Yield the objects of a JSON array. Raises RowError with the number, from 1, of one that cannot be read."""
    text = _ArrayText(stream)
    number = 1
    try:
        text.take("[")
        separator = text.take("]") if text.next_character() == "]" else ","
        while separator == ",":
            yield text.next_row()
            separator = text.take(",", "]")
            number += 1

        # Such as a second array, of a file that was written twice.
        if text.next_character():
            raise ValueError("text behind the end of the array")
    except UnicodeDecodeError as error:
        raise RowError(f"row {number} or a later one: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except ValueError as error:
        raise RowError(f"row {number}: {error}") from None


# --- tables of text --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CsvPart(FilePart):
    """A table of text: every cell is the text that stands there, and the first row has the names of the columns."""

    def read(self) -> Iterator[Row]:
        """Yield the rows; cells that a short row lacks are None."""
        # A cell may be as long as memory allows; the default limit is 128 KiB.
        csv.field_size_limit(sys.maxsize)

        with _open_text(self.file) as stream:
            text = TextIOWrapper(stream, "utf-8-sig", newline=_line_end(stream))
            # Strict, since a quote that is never closed would swallow the rest of the file.
            cells = csv.reader(text, delimiter=self._delimiter(), strict=True)
            try:
                yield from _table_rows(cells)
            except UnicodeDecodeError:
                raise _undecodable_line(self.file) from None

    def _delimiter(self) -> str:
        return "\t" if file_suffix(self.file) == ".tsv" else ","


def _line_end(stream: BufferedReader) -> str:
    """Return what ends the lines of a table for ``open``: a line feed, or, as in files of old Macs, anything."""
    first = FIRST_LINE_END.match(stream.peek(BUFFER_BYTES))
    # Elsewhere a carriage return is part of a cell, and some programs, such as pandas, write it without quotes.
    return "" if first and first[1] == b"\r" else "\n"


def _undecodable_line(file: StoragePath) -> RowError:
    """Return the error that names the first line that is no UTF-8; text is decoded in blocks, which have no number."""
    with _open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                decode_text(line)
            except ValueError as error:
                return RowError(f"line {number}: {error}")
    return RowError("the end: not UTF-8")


def _table_rows(cells: Any) -> Iterator[Row]:
    """Yield the rows of a csv reader. Raises RowError with the line of one that does not fit the header."""
    names: list[str] | None = None
    # Where a row begins; it may go over several lines.
    line = 1
    try:
        for row in cells:
            # A blank line has no cell at all.
            if row and names is None:
                names = _check_header(row)
            elif row:
                yield _named_cells(names or [], row)

            line = cells.line_num + 1
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise RowError(f"line {line}: {error}") from None
    except csv.Error as error:
        # What the module says of it is about Python's ``open``.
        is_return = str(error).startswith("new-line character")
        reason = "a carriage return in a cell without quotes" if is_return else error
        raise RowError(f"line {line}: {reason}") from None


def _check_header(names: list[str]) -> list[str]:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"the header has the column {twice[0]!r} twice")
    return names


def _named_cells(names: list[str], cells: list[str]) -> Row:
    if len(cells) > len(names):
        raise ValueError(f"{len(cells)} cells, and the header has {len(names)} columns")

    missing = [None] * (len(names) - len(cells))
    return dict(zip(names, [*cells, *missing], strict=True))


# --- Arrow and parquet -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetPart(FilePart):
    """Some row groups of a parquet file, or all of them."""

    groups: tuple[int, ...] | None = None
    """Numbers of the row groups; None: all."""

    @classmethod
    def cut(cls, task: str, file: StoragePath, part_bytes: int) -> Sequence[FilePart]:
        """Return row groups that follow one another, of a large file."""
        # The footer of a small file need not be read yet.
        if file.stat().st_size <= part_bytes:
            return [cls(task, file)]

        with _open_native(file) as source:
            footer = pq.ParquetFile(source).metadata
            sizes = [_compressed_bytes(footer.row_group(i)) for i in range(footer.num_row_groups)]

        return [cls(task, file, tuple(groups)) for groups in _group_by_size(sizes, part_bytes)]

    def read(self) -> Iterator[Row]:
        """Yield the rows of the groups."""
        with _open_native(self.file) as source:
            # Pages come one after another; from a bucket the columns of a row group at once, which is fewer requests.
            parquet = pq.ParquetFile(source, pre_buffer=isinstance(self.file, BucketPath), buffer_size=BUFFER_BYTES)
            groups = range(parquet.num_row_groups) if self.groups is None else self.groups
            for group in groups:
                metadata = parquet.metadata.row_group(group)
                # One by one, since the rows of each group may be of another size.
                n_rows = slice_rows(metadata.total_byte_size, metadata.num_rows)
                for batch in parquet.iter_batches(n_rows, row_groups=[group], use_threads=False):
                    yield from arrow_rows(batch)


def _compressed_bytes(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _group_by_size(sizes: Sequence[int], part_bytes: int) -> list[list[int]]:
    """Return the numbers of pieces, in their order, in groups of about so many bytes."""
    groups: list[list[int]] = []
    # As if one were full, so that the first piece begins one.
    group_bytes = part_bytes
    for number, size in enumerate(sizes):
        if group_bytes >= part_bytes:
            groups.append([])
            group_bytes = 0

        groups[-1].append(number)
        group_bytes += size
    return groups


@dataclass(frozen=True)
class ArrowPart(FilePart):
    """Record batches of an Arrow file or stream: some that follow one another, or all of them."""

    start: int = 0
    stop: int | None = None
    """Number behind the last batch; None: all that follow."""

    @classmethod
    def cut(cls, task: str, file: StoragePath, part_bytes: int) -> Sequence[FilePart]:
        """Return ranges of batches of a large file on a disk, where passing over batches costs nothing."""
        n_parts = -(-file.stat().st_size // part_bytes)
        if n_parts <= 1 or isinstance(file, BucketPath):
            return [cls(task, file)]

        with _open_native(file, mapped=True) as source:
            n_batches = sum(1 for _ in _batches(source))

        bounds = [n_batches * i // n_parts for i in range(n_parts + 1)]
        ranges = zip(bounds[:-1], bounds[1:], strict=True)
        return [cls(task, file, start, stop) for start, stop in ranges if start < stop]

    def read(self) -> Iterator[Row]:
        """Yield the rows of the batches."""
        with _open_native(self.file, mapped=True) as source:
            for batch in islice(_batches(source), self.start, self.stop):
                yield from arrow_rows(batch)


def _batches(source: Any) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file, or of a stream, such as ``datasets`` writes."""
    is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    source.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(source)
        return

    file = pa.ipc.open_file(source)
    for i in range(file.num_record_batches):
        yield file.get_batch(i)


# --- formats ---------------------------------------------------------------------------------------------------------

PARTS: dict[str, type[FilePart]] = {
    ".parquet": ParquetPart,
    ".jsonl": JsonPart,
    ".json": JsonPart,
    ".csv": CsvPart,
    ".tsv": CsvPart,
    ".txt": TextPart,
    ".arrow": ArrowPart,
}
"""Formats by the ends of file names, of those that are text also behind that of a compression."""


def file_suffix(file: Path | StoragePath) -> str:
    """Return the end of a file's name, without that of a compressed file."""
    return file.with_suffix("").suffix if file.suffix in COMPRESSIONS else file.suffix


def is_row_file(file: Path | StoragePath) -> bool:
    """Return whether a file's name says that it holds rows."""
    part = PARTS.get(file_suffix(file))
    # Arrow and parquet compress by themselves.
    is_binary = part in (ParquetPart, ArrowPart)
    return part is not None and not (is_binary and file.suffix in COMPRESSIONS)


def part_type(task: str, file: StoragePath) -> type[FilePart]:
    """Return the format of a file by its name. Raises DataError for an unknown one."""
    if not is_row_file(file):
        known = ", ".join(PARTS)
        compressed = ", ".join(f".jsonl{suffix}" for suffix in COMPRESSIONS)

        raise DataError(f"tasks.{task}: {file} is none of {known}, nor text compressed such as {compressed}")
    return PARTS[file_suffix(file)]


def cut_file(task: str, file: StoragePath, part_bytes: int = PART_BYTES) -> Sequence[FilePart]:
    """Return the parts of a file, in the order of its rows.

    Raises DataError naming task and file where the format is unknown, or the file cannot be read.
    """
    kind = part_type(task, file)
    with _errors_named(task, file):
        return kind.cut(task, file, part_bytes)
