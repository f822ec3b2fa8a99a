"""Row sources: which files a path and a split name, what is refused before any work, kinds of sources."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seap_ray.errors import DataError
from seap_ray.models.corpus import check_evaluation, check_source
from seap_ray.models.row_sources import (
    DemoRows,
    HubRows,
    RowFiles,
    calibration_rows,
    evaluation_rows,
    read_first_row,
)
from tests.support.builders import task


def write_rows(path, rows=({"text": "some words"},)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        lines = [json.dumps(row) for row in rows] if ".jsonl" in path.suffixes else [row["text"] for row in rows]
        text = "\n".join([*["text"][: ".csv" in path.suffixes], *lines, ""])
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_folder_is_read_by_split(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"):
        write_rows(tmp_path / name)
    (tmp_path / "README.md").write_text("no data")
    found = RowFiles("mine", str(tmp_path), "train").files()
    assert [file.name for file in found] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    (held_out,) = RowFiles("mine", str(tmp_path), "validation").files()
    assert held_out.name == "validation-00000-of-00001.parquet"


def test_a_folder_of_one_unnamed_file_is_its_training_split(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl")
    assert RowFiles("mine", str(tmp_path), "train").files() == [file]
    with pytest.raises(DataError, match=r"tasks\.mine: no file of split 'validation'"):
        RowFiles("mine", str(tmp_path), "validation").files()


def test_a_folder_may_hold_compressed_files(tmp_path):
    file = write_rows(tmp_path / "train.jsonl.gz")
    assert RowFiles("mine", str(tmp_path), "train").files() == [file]


def test_a_glob_and_a_single_file_are_taken_as_they_are(tmp_path):
    b, a = write_rows(tmp_path / "b.jsonl"), write_rows(tmp_path / "a.jsonl")
    write_rows(tmp_path / "c.csv")
    assert RowFiles("mine", f"{tmp_path}/*.jsonl", "train").files() == [a, b]
    assert RowFiles("mine", f"{tmp_path}/b.jsonl", "whatever").files() == [b]


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_rows(tmp_path / "data" / "train.jsonl")
    assert RowFiles("mine", "~/data", "train").files() == [file]


@pytest.mark.parametrize("path", ["nowhere.jsonl", "nowhere/", "no/where.parquet", "*.parquet"])
def test_a_missing_file_names_the_task(tmp_path, path):
    with pytest.raises(DataError, match=r"tasks\.mine: no file"):
        RowFiles("mine", f"{tmp_path}/{path}", "train").files()


def test_files_of_several_formats_name_the_task(tmp_path):
    write_rows(tmp_path / "train" / "a.jsonl")
    write_rows(tmp_path / "train" / "b.csv")
    for path in (tmp_path, tmp_path / "train" / "*"):
        with pytest.raises(DataError, match=r"tasks\.mine: .* several formats"):
            RowFiles("mine", str(path), "train").files()


def test_a_file_of_an_unknown_format_names_the_task(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"tasks\.mine: .*rows\.xlsx is none of \.parquet"):
        RowFiles("mine", f"{tmp_path}/rows.xlsx", "train").files()


@pytest.mark.parametrize(
    "name", ["rows.parquet", "rows.jsonl", "rows.csv", "rows.txt", "rows.jsonl.gz", "rows.csv.gz", "rows.txt.gz"]
)
def test_the_first_row_of_every_format_is_read(tmp_path, name):
    file = write_rows(tmp_path / name, [{"text": "first"}, {"text": "second"}])
    row = read_first_row("mine", file)
    assert row is not None and row["text"].strip() == "first"
    check_source(task(file), official=False)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({}, "metric acc needs choices; without any, set metric: exact_match"),
        ({"choices": "['a', 'b']"}, "the answer 'some words' of the first row is none of its choices, 'a', 'b'"),
        ({"choices": "['a', text]"}, None),
        ({"metric": "exact_match"}, None),
    ],
)
def test_a_task_whose_answer_cannot_be_chosen_is_refused_before_any_work(tmp_path, keys, said):
    write_rows(tmp_path / "rows.jsonl")
    judged = task(tmp_path / "rows.jsonl", **keys)
    if said is None:
        check_evaluation(judged)
        return
    with pytest.raises(DataError, match=f"tasks.mine: {said}"):
        check_evaluation(judged)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv", "rows.txt"])
def test_an_empty_file_names_the_task(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"tasks\.mine: .*{name}"):
        check_source(task(tmp_path / name), official=False)


def test_a_file_without_rows_names_the_task(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("text\n")
    for file in tmp_path.iterdir():
        with pytest.raises(DataError, match=r"tasks\.mine: .* has no rows"):
            check_source(task(file), official=False)


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("rows.jsonl", b'{"text": ', ", line 1: not JSON"),
        ("rows.parquet", b"PAR1?", " cannot be read"),
        ("rows.csv", b"\xff\xfe\x81", " cannot be read"),
    ],
)
def test_a_torn_file_names_the_task(tmp_path, name, contents, reason):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=rf"tasks\.mine: .*{name}{reason}"):
        check_source(task(tmp_path / name), official=False)


def test_a_template_that_does_not_fit_the_file_is_found_before_any_work(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"words": "x"}])
    with pytest.raises(DataError, match=r"tasks\.mine: 'text' is undefined; the columns are words"):
        check_source(task(file), official=False)


def test_paths_and_hub_ids_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    for path in ("/x/y", "./x", "../x", "~/x", "x.jsonl", "x/y.parquet", "x.jsonl.gz", "data/mine"):
        assert isinstance(calibration_rows(task(path)), RowFiles), path
    for path in ("allenai/ai2_arc", "piqa"):
        assert isinstance(calibration_rows(task(path)), HubRows), path


def test_a_source_of_files_has_a_state_that_changes_with_them_and_others_have_none(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl")
    source = calibration_rows(task(file))
    ((name, size, time_ns),) = source.state()
    assert (name, size, time_ns) == (str(file), file.stat().st_size, file.stat().st_mtime_ns)
    write_rows(file, [{"text": "other words"}])
    assert source.state() != [(name, size, time_ns)]
    for path in ("demo:sort", "allenai/ai2_arc"):
        other = calibration_rows(task(path))
        assert (other.state(), other.first_row(), [*other.files()]) == ([], None, [])


def test_the_hub_is_asked_for_its_own_data_sets_alone(tmp_path):
    for path, hub_id in (("demo:sort", None), (str(tmp_path), None), ("allenai/ai2_arc", "allenai/ai2_arc")):
        assert calibration_rows(task(path)).hub_id == hub_id


def test_the_demos_rows_for_calibration_and_evaluation_are_disjoint():
    calibration, evaluation = (rows(task("demo:sort")) for rows in (calibration_rows, evaluation_rows))
    assert isinstance(calibration, DemoRows) and isinstance(evaluation, DemoRows)
    questions, held_out = ({row["question"] for row in source.generate(50, 0)} for source in (calibration, evaluation))
    assert questions and held_out and not questions & held_out
    assert calibration.public_example(0) in held_out


def test_rows_that_are_not_the_demos_are_shown_to_nobody(tmp_path):
    for path in (str(tmp_path), "allenai/ai2_arc"):
        assert calibration_rows(task(path)).public_example(0) is None


def test_an_unknown_skill_of_the_demo_is_refused_with_those_that_there_are():
    for fields in ({"path": "demo:nothing"}, {"path": "demo:sort", "evaluation_path": "demo:nothing"}):
        path = fields.pop("path")
        with pytest.raises(DataError, match="tasks.mine: no demo:nothing; there are demo:arithmetic, demo:"):
            check_source(task(path, **fields), official=False)


def test_rows_to_judge_on_may_lie_elsewhere(tmp_path):
    mine = task("demo:sort", evaluation_path=str(write_rows(tmp_path / "rows.jsonl")))
    assert isinstance(calibration_rows(mine), DemoRows) and isinstance(evaluation_rows(mine), RowFiles)
