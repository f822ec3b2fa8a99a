"""Corpora in a bucket: the files of a folder are found, cut and read there as they are on a disk."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seap_ray.errors import DataError
from seap_ray.models.row_files import cut_file
from seap_ray.models.row_sources import RowFiles, calibration_rows, evaluation_rows
from tests.support.builders import task
from tests.support.rows import rows_of

ROWS = [{"q": f"{k} + 1 =", "a": str(k + 1)} for k in range(200)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)


def parquet_bytes() -> bytes:
    target = pa.BufferOutputStream()
    pq.write_table(TABLE, target, row_group_size=20)
    return target.getvalue().to_pybytes()


def arrow_bytes(new) -> bytes:
    target = pa.BufferOutputStream()
    with new(target, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=20)
    return target.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": lambda: LINES,
    "rows.jsonl.gz": lambda: gzip.compress(LINES),
    "rows.jsonl.zst": lambda: zstd(LINES),
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "rows.csv": lambda: b"q,a\r\n" + b"".join(f"{row['q']},{row['a']}\r\n".encode() for row in ROWS),
    "rows.parquet": parquet_bytes,
    "file.arrow": lambda: arrow_bytes(pa.ipc.new_file),
    "stream.arrow": lambda: arrow_bytes(pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_from_a_bucket(bucket, name):
    file = bucket / name
    file.write_bytes(FILES[name]())
    for part_bytes in (100, 1 << 20):
        assert rows_of(cut_file("mine", file, part_bytes)) == ROWS
    assert RowFiles("mine", str(file), "train").first_rows(3) == ROWS[:3]


def test_lines_and_row_groups_of_a_bucket_are_read_at_the_same_time(bucket):
    for name in ("rows.jsonl", "rows.parquet"):
        (bucket / name).write_bytes(FILES[name]())
        assert len(cut_file("mine", bucket / name, 500)) > 3


def test_a_data_set_that_was_saved_to_a_bucket_is_read_by_split(bucket, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "validation": data.select(range(5))}).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").rglob("*"):
        if file.is_file():
            (bucket / "saved" / file.relative_to(tmp_path / "saved")).write_bytes(file.read_bytes())

    for split, rows in (("train", ROWS), ("validation", ROWS[:5])):
        assert rows_of(RowFiles("mine", str(bucket / "saved"), split).parts()) == rows


def test_damage_in_a_bucket_is_one_line_with_its_place(bucket):
    (bucket / "rows.jsonl").write_bytes(LINES + b'{"q": ')
    with pytest.raises(DataError, match=rf"tasks\.mine: {bucket}/rows.jsonl, line 201: not JSON"):
        rows_of(cut_file("mine", bucket / "rows.jsonl", 500))


def test_a_compressed_file_is_the_bytes_that_are_written_and_read(bucket):
    for name in ("rows.jsonl.gz", "rows.jsonl.zst"):
        content = FILES[name]()
        (bucket / name).write_bytes(content)
        with (bucket / name).open("rb") as file:
            assert file.read() == (bucket / name).read_bytes() == content


def test_a_bucket_that_is_not_there_is_one_line_whoever_asks_first(environment):
    for rows in (calibration_rows, evaluation_rows):
        with pytest.raises(DataError, match=r"tasks\.mine: .*s3://none/rows"):
            rows(task("s3://none/rows")).files()
