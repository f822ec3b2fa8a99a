"""Row values: JSON text or an Arrow record batch in; rows of plain Python values, as the file has them, out.

No value depends on its neighbours: nothing is inferred from a column or a block, and numbers print as they are written.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]
"""A row of a corpus: its values by the names of the columns."""
Converter = Callable[[Any], Any]
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that is no character by itself."""
SLICE_BYTES = 8 << 20
"""Bytes of a record batch that are Python values at a time."""
SLICE_ROWS = 1000


class FileNumber(float):
    """A number that prints as its file has it: 2.50 or 1e3, where Python would print 2.5 and 1000.0."""

    __slots__ = ("text",)
    text: str
    """The number as it is written."""

    def __new__(cls, text: str, value: float | None = None) -> "FileNumber":
        """Make the number from its text; ``value`` is its exact value where the text is a rounded one."""
        number = super().__new__(cls, text if value is None else value)
        number.text = text
        return number

    def __reduce__(self) -> Any:
        return FileNumber, (self.text, float(self))

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__


class Binary(bytes):
    """Bytes that are no text, such as those of an image: a column that no template may print."""

    def __str__(self) -> str:
        raise ValueError("binary data, which is not UTF-8 text")

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


# --- JSON ------------------------------------------------------------------------------------------------------------


def _parse_int(text: str) -> int | float:
    # An int would print as 0.
    return FileNumber(text) if text == "-0" else int(text)


JSON = json.JSONDecoder(parse_float=FileNumber, parse_int=_parse_int, parse_constant=FileNumber)
"""Integers are exact; other numbers, NaN and Infinity among them, print as in the file."""


def decode_text(line: bytes) -> str:
    """Decode UTF-8. Raises ValueError naming the first byte that is not."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x})") from None


def parse_object(text: str) -> Row:
    """Return the row of a JSON object. Raises ValueError where the text is something else."""
    try:
        value = JSON.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None

    return check_object(value, text)


def check_object(value: Any, text: str) -> Row:
    """Return a parsed value that is a row. Raises ValueError where it is no object, or holds what is no text."""
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {_kind(value)}")

    # Half a character, as programs leave it that cut a text of UTF-16, cannot be tokenised or written.
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"half of a surrogate pair, \\u{ord(half):04x}, which is no character") from None

    return value


def _kind(value: Any) -> str:
    match value:
        case list():
            return "an array"
        case str():
            return "a text"
        case None:
            return "null"
        case bool():
            return "a truth value"
    return "a number"


# --- Arrow -----------------------------------------------------------------------------------------------------------


def arrow_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """Yield the rows of a record batch; few of them are Python values at a time."""
    n_slice = slice_rows(batch.nbytes, batch.num_rows)
    names = batch.schema.names
    converters = [_converter(field.type) for field in batch.schema]

    for start in range(0, batch.num_rows, n_slice):
        columns = batch.slice(start, n_slice).columns
        # A column at a time, which pyarrow converts faster than a row.
        values = [_values(column, converter) for column, converter in zip(columns, converters, strict=True)]

        for row in zip(*values, strict=True):
            yield dict(zip(names, row, strict=True))


def slice_rows(n_bytes: int, n_rows: int) -> int:
    """Return how many rows of a batch are taken at a time, so that they are some megabytes at most."""
    bytes_per_row = max(1, n_bytes // max(1, n_rows))
    return min(SLICE_ROWS, max(1, SLICE_BYTES // bytes_per_row))


def _values(column: pa.Array, converter: Converter | None) -> list[Any]:
    values = column.to_pylist()
    return values if converter is None else _convert_list(values, converter)


def _parse_stored_json(text: str) -> Any:
    """Return the value of a cell of JSON; the text itself where it is none.

    ``datasets`` stores the texts of a column of mixed types as they are, beside the JSON of what is no text.
    """
    try:
        return JSON.decode(text)
    except ValueError:
        return text


def _converter(kind: pa.DataType) -> Converter | None:
    """Return what makes pyarrow's Python values of a type those of a row; None where they are right as they are."""
    types = pa.types
    # What pyarrow makes otherwise than a reader would write it.
    if types.is_float16(kind):
        return partial(_short_number, kind=np.float16)
    if types.is_float32(kind):
        return partial(_short_number, kind=np.float32)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return _decode_binary
    if types.is_fixed_size_binary(kind):
        return _decode_binary
    if isinstance(kind, pa.JsonType):
        return _parse_stored_json

    # What holds other values, at any depth.
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_struct(kind):
        return _struct_converter(kind)
    if types.is_map(kind):
        return partial(_convert_map, key=_converter(kind.key_type), item=_converter(kind.item_type))
    if _is_list(kind) and (item := _converter(kind.value_type)):
        return partial(_convert_list, converter=item)

    return None


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    is_view = types.is_list_view(kind) or types.is_large_list_view(kind)
    return is_view or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _short_number(value: float, kind: type[np.floating[Any]]) -> FileNumber:
    # The fewest digits that tell a number of 16 or 32 bits from others of its kind: 0.1, not 0.10000000149011612.
    return FileNumber(repr(float(str(kind(value)))), value)


def _decode_binary(value: bytes) -> str | Binary:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return Binary(value)


def _struct_converter(kind: pa.StructType) -> Converter | None:
    converters = {field.name: _converter(field.type) for field in kind}
    needed = {name: converter for name, converter in converters.items() if converter}
    return partial(_convert_struct, converters=needed) if needed else None


def _convert_struct(struct: Row, converters: Mapping[str, Converter]) -> Row:
    converted = {name: _convert(struct[name], converter) for name, converter in converters.items()}
    return {**struct, **converted}


def _convert_map(pairs: list[tuple[Any, Any]], key: Converter | None, item: Converter | None) -> dict[Any, Any]:
    return {_convert(name, key): _convert(value, item) for name, value in pairs}


def _convert_list(values: list[Any], converter: Converter) -> list[Any]:
    return [_convert(value, converter) for value in values]


def _convert(value: Any, converter: Converter | None) -> Any:
    return value if value is None or converter is None else converter(value)
