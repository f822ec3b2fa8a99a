"""Row files: every format is read as its file says, cut or whole; what cannot be read is one line with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tracemalloc
from datetime import date
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from seap_ray.errors import DataError
from seap_ray.models import row_files
from seap_ray.models.row_files import COMPRESSIONS, PARTS, cut_file
from seap_ray.storage.paths import LocalPath
from tests.support import ROOT
from tests.support.rows import OBJECTS, TEXTS, rows_of, same_json

SETTINGS = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def read(file, part_bytes=row_files.PART_BYTES):
    """Return the rows of all parts of a file, in their order."""
    return rows_of(cut_file("mine", LocalPath(file), part_bytes))


def refusal(file) -> str:
    """Return the one line that says why a file is not read."""
    with pytest.raises(DataError) as error:
        read(file)
    message = str(error.value)
    assert message.startswith("tasks.mine: ") and str(file) in message and "\n" not in message
    return message


# --- formats: what goes in comes out ---------------------------------------------------------------------------------

ROWS = [
    {"q": "Boston", "a": "02108", "n": 5},
    {"q": "opens", "a": "09:30", "n": None},
    {"q": "is it\n\nso?", "a": "true", "n": -7},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_csv(rows, delimiter=",") -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def zstd(content: bytes) -> bytes:
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
JSON_FILES = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "no_last_line_end.jsonl": LINES.rstrip("\n"),
    "blank_lines.jsonl": "\n" + LINES.replace("\n", "\n \t\n"),
    "windows.jsonl": LINES.replace("\n", "\r\n"),
    "marked.jsonl": "\ufeff" + LINES,
    "one_line.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "marked.json": "\ufeff\n" + json.dumps(ROWS, indent="\t"),
    "array.jsonl": json.dumps(ROWS, indent=2),
}


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_is_read_by_lines_or_as_an_array_and_of_any_compression(tmp_path, name, compression):
    content = JSON_FILES[name].encode()
    file = tmp_path / (name + compression)
    file.write_bytes(COMPRESS[compression](content) if compression else content)
    assert read(file) == ROWS


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_cell_is_the_text_that_stands_there(tmp_path, suffix, compression, mark):
    content = (mark + as_csv(ROWS, "\t" if suffix == ".tsv" else ",")).encode()
    file = tmp_path / f"rows{suffix}{compression}"
    file.write_bytes(COMPRESS[compression](content) if compression else content)
    cells = [{name: "" if value is None else str(value) for name, value in row.items()} for row in ROWS]
    assert read(file) == cells


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_line_of_plain_text_is_a_row_unless_it_is_blank(tmp_path, compression, line_end):
    content = line_end.join(["\ufefffirst", "", " \t", "  second\u2028 still", "third"]).encode()
    file = tmp_path / f"rows.txt{compression}"
    file.write_bytes(COMPRESS[compression](content) if compression else content)
    assert read(file) == [{"text": "first"}, {"text": "  second\u2028 still"}, {"text": "third"}]


NESTED = [
    {
        "messages": [{"role": "user", "content": "hi"}],
        "when": date(2024, 1, 5),
        "score": np.float32(0.1),
        "meta": {"a": [1]},
    },
    {"messages": [], "when": None, "score": None, "meta": None},
]


def test_parquet_keeps_nested_columns_dates_and_numbers(tmp_path):
    table = pa.table({name: [row[name] for row in NESTED] for name in NESTED[0]})
    assert table.schema.field("score").type == pa.float32()
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert rows == NESTED and [str(row["score"]) for row in rows] == ["0.1", "None"]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_are_read(tmp_path, new, compression):
    table = pa.table({name: [row[name] for row in NESTED] for name in NESTED[0]})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(tmp_path / "rows.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1)
    assert read(tmp_path / "rows.arrow") == NESTED


# --- cut into parts --------------------------------------------------------------------------------------------------


@SETTINGS
@given(
    st.lists(OBJECTS, max_size=8),
    st.integers(1, 80),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
    st.booleans(),
)
def test_cut_at_any_bytes_json_lines_give_every_row_once(tmp_path, rows, part_bytes, line_end, is_ended, is_marked):
    text = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows) + line_end * is_ended
    file = tmp_path / "rows.jsonl"
    file.write_bytes(("\ufeff" * is_marked + text).encode())
    assert same_json(read(file, part_bytes), rows)


@SETTINGS
@given(st.lists(TEXTS), st.integers(1, 40))
def test_cut_at_any_bytes_plain_text_gives_every_line_once(tmp_path, lines, part_bytes):
    file = tmp_path / "rows.txt"
    file.write_bytes("\n".join(lines).encode())
    # What Python splits at line feeds alone.
    expected = [line.removesuffix("\r") for line in "\n".join(lines).removeprefix("\ufeff").split("\n") if line.strip()]
    assert [row["text"] for row in read(file, part_bytes)] == expected


@SETTINGS
@given(st.lists(OBJECTS, max_size=6), st.sampled_from([None, 1, "\t"]), st.integers(1, 7))
def test_an_array_read_in_pieces_of_any_size_is_what_json_reads(tmp_path, rows, indent, buffer_bytes):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "BUFFER_BYTES", buffer_bytes)
        assert same_json(read(file, part_bytes=1), rows)


@SETTINGS
@given(
    st.lists(st.text("ab,;\t\"'\r\n é", max_size=6), min_size=1, max_size=4, unique=True),
    st.lists(st.lists(TEXTS, min_size=4, max_size=4), max_size=5),
    st.sampled_from(["\r\n", "\n", "\r"]),
    st.sampled_from([".csv", ".tsv"]),
)
@example(["a"], [["\x00", "", "\ufeff", "\u2028"]], "\r", ".csv")
def test_what_a_csv_writer_writes_is_read_back(tmp_path, names, cells, line_end, suffix):
    cells = [row[: len(names)] for row in cells]
    file = tmp_path / f"rows{suffix}"
    with file.open("w", encoding="utf-8-sig", newline="") as target:
        # By itself the writer quotes a line break only where it is the one that ends its lines.
        quoting = csv.QUOTE_MINIMAL if line_end == "\r\n" else csv.QUOTE_ALL
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.writer(target, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
        writer.writerow(names)
        writer.writerows(cells)
    assert [list(row.items()) for row in read(file)] == [list(zip(names, row, strict=True)) for row in cells]


def test_a_large_file_is_cut_and_its_parts_are_of_about_one_size(tmp_path):
    rows = [{"i": i, "text": sha256(bytes([i % 256])).hexdigest() * (i % 9)} for i in range(1000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=25)
    table = pa.Table.from_pylist(rows)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=10)

    cut = {file.name: cut_file("mine", LocalPath(file), file.stat().st_size // 7) for file in tmp_path.iterdir()}
    # What is compressed, and an array, has no border at which it could be cut.
    assert {name: len(parts) > 5 for name, parts in cut.items()} == {
        "rows.jsonl": True,
        "rows.jsonl.gz": False,
        "rows.json": False,
        "rows.parquet": True,
        "stream.arrow": True,
        "file.arrow": True,
    }
    for parts in cut.values():
        sizes = [len(list(part.rows())) for part in parts]
        assert sum(sizes) == 1000 and max(sizes) < 4000 / len(parts)
        assert rows_of(parts) == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.txt"])
def test_memory_is_that_of_some_rows_and_not_of_the_file(tmp_path, name):
    row = {"q": "x" * 1000, "a": "y"}
    n = 40_000
    text = {
        ".json": "[\n" + ",\n".join([json.dumps(row)] * n) + "\n]",
        ".csv": "q,a\n" + f'"{row["q"]}\n",y\n' * n,
    }.get("." + name.split(".")[1], (json.dumps(row) + "\n") * n)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)
    n_bytes = len(content)
    del text, content

    tracemalloc.start()
    try:
        (part,) = cut_file("mine", LocalPath(tmp_path / name))
        assert sum(1 for _ in part.rows()) == n
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_bytes > 40e6 and peak < 8e6


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
def test_memory_for_arrow_s_formats_is_that_of_some_rows(tmp_path, name):
    table = pa.Table.from_pylist([{"a": sha256(str(i).encode()).hexdigest() * 10} for i in range(40_000)])
    file = tmp_path / name
    # One row group, or one batch, of all rows.
    match name:
        case "rows.parquet":
            pq.write_table(table, file, compression="none", use_dictionary=False)
        case "file.arrow":
            with pa.ipc.new_file(str(file), table.schema) as writer:
                writer.write_table(table)
        case _:
            with pa.ipc.new_stream(str(file), table.schema) as writer:
                writer.write_table(table)

    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        (part,) = cut_file("mine", LocalPath(file))
        assert sum(1 for _ in part.rows()) == 40_000
    finally:
        pa.set_memory_pool(usual)
    assert table.nbytes > 25e6 and pool.max_memory() < 10e6


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow"])
def test_a_row_of_many_megabytes_is_read(tmp_path, name):
    long = "a line of words\n" * (1 << 20)
    rows = [{"a": long, "b": str(i)} for i in range(2)]
    file = tmp_path / name
    table = pa.Table.from_pylist(rows)
    match file.suffix:
        case ".parquet":
            pq.write_table(table, file)
        case ".arrow":
            with pa.ipc.new_stream(str(file), table.schema) as writer:
                writer.write_table(table)
        case ".csv":
            file.write_bytes(as_csv(rows).encode())
        case ".json":
            file.write_text(json.dumps(rows, indent=1))
        case _:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(file) == rows


# --- what cannot be read is one line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [20, 1 << 20])
def test_a_line_that_is_cut_off_is_named_by_its_number(tmp_path, part_bytes):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": f"{i} + 1 =", "a": str(i + 1)}) + "\n\n" for i in range(5)) + '{"q": "5 +')
    with pytest.raises(DataError, match=rf"tasks\.mine: {file}, line 11: not JSON \(Unterminated string"):
        read(file, part_bytes)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("rows.jsonl", b'{"a": 1}\n[2]\n', ", line 2: not a JSON object but an array"),
        ("rows.jsonl", b'{"a": 1}\n\n{"a": "\xe9"}\n', ", line 3: not UTF-8 (byte 0xe9)"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "\\ud83d"}\n', ", line 2: half of a surrogate pair"),
        ("rows.jsonl", '{"a": 1}\n'.encode("utf-16"), " cannot be read (it is UTF-16; save it as UTF-8)"),
        ("rows.json", b'{\n  "data": [{"a": 1}]\n}', ", line 1: one object over several lines; write an array"),
        ("rows.json", b'[{"a": 1},\n{"a": 2}', ", row 2: the file ends before the array does"),
        ("rows.json", b'[{"a": 1},\n{"a": ', ", row 2: not JSON (Expecting value); the file may be cut off"),
        ("rows.json", b'[{"a": 1}, 2]', ", row 2: not a JSON object but a number"),
        ("rows.json", b'[{"a": 1} {"a": 2}]', ", row 1: not JSON (, or ] is expected, not {)"),
        ("rows.json", b'[{"a": 1}] []', ", row 2: text behind the end of the array"),
        ("rows.json", b'[{"a": 1}, {"a": "\xff"}]', ", row 1 or a later one: not UTF-8 (byte 0xff)"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, and the header has 2 columns"),
        ("rows.csv", b'a,b\n1,2\n"1,2\n3,4\n', ", line 3: unexpected end of data"),
        ("rows.csv", b"a,b\n1,2\n3\r4,5\n", ", line 3: a carriage return in a cell without quotes"),
        ("rows.csv", b"a,b,a\n1,2,3\n", ", line 1: the header has the column 'a' twice"),
        ("rows.csv", b'a,b\n"1\n",2\n\xe9,2\n', ", line 4: not UTF-8 (byte 0xe9)"),
        ("rows.txt", b"first\n\xe9\n", ", line 2: not UTF-8 (byte 0xe9)"),
        ("rows.txt", "first".encode("utf-16"), " cannot be read (it is UTF-16; save it as UTF-8)"),
        ("rows.parquet", b"", " cannot be read ("),
        ("rows.parquet", b"PAR1?", " cannot be read ("),
        ("rows.arrow", b"", " cannot be read ("),
        ("rows.arrow", b"ARROW1??", " cannot be read ("),
        ("rows.arrow", b"no Arrow at all", " cannot be read ("),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], " cannot be read (Compressed file ended"),
        ("rows.jsonl.gz", LINES.encode(), " cannot be read (Not a gzipped file"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd", " cannot be read (Truncated compressed stream)"),
        ("rows.jsonl.zst", zstd(LINES.encode())[:-3], " cannot be read (Truncated compressed stream)"),
        ("rows.jsonl.zst", LINES.encode(), " cannot be read (ZSTD"),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())[:-3], " cannot be read (Compressed file ended"),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())[:-3], " cannot be read (Compressed file ended"),
        ("rows.jsonl.xz", LINES.encode(), " cannot be read (Input format not supported"),
    ],
)
def test_a_damaged_file_is_one_line_with_the_place(tmp_path, name, content, reason):
    file = tmp_path / name
    file.write_bytes(content)
    assert refusal(file).startswith(f"tasks.mine: {file}{reason}")


@pytest.mark.parametrize("name", [*(f"rows{suffix}" for suffix in PARTS), "rows.jsonl.gz", "rows.csv.zst"])
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_fetches_it(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5478984\n")
    assert refusal(tmp_path / name).endswith(" cannot be read (it is a Git LFS pointer: git lfs pull)")


@pytest.mark.parametrize(
    "name", ["rows.xlsx", "rows", "rows.parquet.gz", "rows.arrow.zst", "rows.gz", "rows.jsonl.zip"]
)
def test_an_unknown_format_is_refused_with_those_that_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    assert "is none of .parquet, .jsonl, .json, .csv, .tsv, .txt, .arrow, nor text compressed" in refusal(
        tmp_path / name
    )


def test_a_file_that_is_gone_is_one_line(tmp_path):
    assert refusal(tmp_path / "rows.csv").endswith("cannot be read (No such file or directory)")


def test_a_short_row_of_a_table_lacks_its_last_cells(tmp_path):
    (tmp_path / "rows.csv").write_text("a b,c\n1\n\n1,2\n")
    assert read(tmp_path / "rows.csv") == [{"a b": "1", "c": None}, {"a b": "1", "c": "2"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.json"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_a_text_file_without_a_row_gives_none(tmp_path, name, content):
    (tmp_path / name).write_text(content, "utf-8")
    assert read(tmp_path / name) == []


def test_every_cell_of_the_table_of_formats_is_held_by_tests_that_exist():
    document = (ROOT / "docs" / "corpora.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests" / "models").glob("test_row_*.py"))
    named = set(re.findall(r"`(test_\w+)`", document))
    assert len(named) > 20 and not [name for name in named if f"def {name}(" not in tests]
    for suffix in [*PARTS, *COMPRESSIONS]:
        assert f"`{suffix}`" in document
