"""The benchmark of the draw: its file holds distinct rows, and is not begun on a disk without room."""

import json
from collections import namedtuple

import pytest

from benchmarks import rows
from seap_ray.errors import DataError


def test_the_file_has_distinct_rows_of_about_the_size_that_is_asked_for(tmp_path):
    file = tmp_path / "rows.jsonl"
    n_rows = rows.write_rows(file, 3_000_000)
    questions = {json.loads(line)["question"] for line in file.read_text("utf-8").splitlines()}
    assert len(questions) == n_rows == rows.count_lines(file)
    # It is written by so many rows at a time.
    assert 3e6 <= file.stat().st_size < 3e6 + 2000 * rows.WRITE_ROWS


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1_000_000))
    with pytest.raises(DataError, match="has no room for 5.0 GB"):
        rows.write_rows(tmp_path / "rows.jsonl", 5_000_000_000)
    assert not [*tmp_path.iterdir()]


def test_memory_is_watched_for_this_process_without_what_is_shared():
    with rows.watched() as peaks:
        ballast = bytearray(200_000_000)
        ballast[::4096] = b"x" * len(ballast[::4096])
        rows.time.sleep(4 * rows.POLL_S)
    assert 0.2 < peaks["most of a process GB"]["driver"] == peaks["readers together GB"]
