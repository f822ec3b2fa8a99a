"""Row sources: which files a path and a split name, what is refused before any work, kinds of sources."""

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seap_ray.errors import DataError
from seap_ray.models import row_sources
from seap_ray.models.corpus import check_evaluation, check_source
from seap_ray.models.row_sources import (
    DemoRows,
    HubRows,
    RowFiles,
    _hub_splits,
    calibration_rows,
    evaluation_rows,
)
from tests.support.builders import task
from tests.support.rows import rows_of


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


def test_a_path_that_is_not_there_is_told_from_a_folder_without_the_split(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    for name, end in (("nope.jsonl", r"nope\.jsonl, which is not there"), ("", "0"), ("*.csv", r"\*\.csv")):
        with pytest.raises(DataError, match=rf"^tasks\.mine: no file of split 'test' under \S*{end}$"):
            RowFiles("mine", str(tmp_path / name), "test").files()


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
    assert RowFiles("mine", str(file), "train").first_rows(1) == [{"text": "first"}]
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
        assert (other.state(), other.first_rows(1), [*other.files()]) == ([], [], [])


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


# --- parts and first rows --------------------------------------------------------------------------------------------

SUMS = [{"q": f"{k} + 1 =", "a": str(k + 1)} for k in range(20)]


def save(folder, data):
    import datasets

    datasets.disable_progress_bars()
    data.save_to_disk(folder)
    return folder


def test_parts_are_those_of_all_files_in_their_order_and_small(tmp_path):
    for name, rows in (("b.jsonl", SUMS[10:]), ("a.jsonl.gz", SUMS[:10])):
        write_rows(tmp_path / name, rows)
    source = RowFiles("mine", f"{tmp_path}/*.jsonl*", "train")
    parts = source.parts()
    assert rows_of(parts) == SUMS and len(parts) == 2
    copies = [pickle.loads(pickle.dumps(part)) for part in parts]
    assert copies == parts and all(len(pickle.dumps(part)) < 1000 for part in parts)


def test_the_first_rows_go_on_in_the_next_file_and_no_further_than_asked(tmp_path):
    write_rows(tmp_path / "a.jsonl", SUMS[:2])
    write_rows(tmp_path / "b.jsonl", SUMS[2:4])
    (tmp_path / "c.jsonl").write_text("broken")
    source = RowFiles("mine", f"{tmp_path}/*.jsonl", "train")
    assert source.first_rows(3) == SUMS[:3] and source.first_rows(0) == []
    with pytest.raises(DataError, match="c.jsonl, line 1: not JSON"):
        source.first_rows(5)


def test_files_without_rows_are_passed_over_unless_there_are_no_others(tmp_path):
    (tmp_path / "a.jsonl").touch()
    source = RowFiles("mine", f"{tmp_path}/*.jsonl", "train")
    with pytest.raises(DataError, match=r"tasks\.mine: .*\*\.jsonl has no rows"):
        source.first_rows(1)
    write_rows(tmp_path / "b.jsonl", SUMS)
    assert source.first_rows(1) == SUMS[:1] and rows_of(source.parts()) == SUMS


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_save_to_disk_is_read_whatever_the_split(tmp_path, shards):
    import datasets

    data = datasets.Dataset.from_list([SUMS[-1], *SUMS]).select(range(1, 21))
    data.save_to_disk(tmp_path / "saved", num_shards=shards)
    for split in ("train", "validation"):
        source = RowFiles("mine", str(tmp_path / "saved"), split)
        assert rows_of(source.parts()) == SUMS and not source.has_split(split)
        assert len(source.files()) == len(source.state()) == shards


def test_the_split_chooses_among_those_of_a_saved_dictionary(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(SUMS)
    save(tmp_path / "saved", datasets.DatasetDict({"train": data, "validation": data.select(range(5))}))
    for split, rows in (("train", SUMS), ("validation", SUMS[:5])):
        source = RowFiles("mine", str(tmp_path / "saved"), split)
        assert rows_of(source.parts()) == rows and source.has_split("train") and source.has_split("validation")
    assert rows_of(RowFiles("mine", str(tmp_path / "saved" / "validation"), "train").parts()) == SUMS[:5]
    assert not source.has_split("test")
    with pytest.raises(DataError, match=r"tasks\.mine: no file of split 'test' under .*saved"):
        RowFiles("mine", str(tmp_path / "saved"), "test").files()


def test_the_state_of_a_saved_data_set_changes_with_its_rows(tmp_path):
    import datasets

    source = RowFiles("mine", str(tmp_path / "saved"), "train")
    states = []
    for rows in (SUMS, SUMS[:-1]):
        save(tmp_path / "saved", datasets.Dataset.from_list(rows))
        states.append(source.state())
    assert states[0] != states[1] == source.state()


@pytest.mark.parametrize("state", ["{}", "no JSON", '{"_data_files": [{}]}'])
def test_a_saved_data_set_without_a_list_of_its_files_is_one_line(tmp_path, state):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"tasks\.mine: .*state\.json does not name the files"):
        RowFiles("mine", str(tmp_path), "train").files()


def test_a_saved_data_set_whose_rows_are_of_mixed_types_has_each_row_s_own(tmp_path):
    import datasets

    rows = [{"a": [{"b": 0}, {"c": "x"}]}, {"a": [{"b": 1.5}]}]
    save(tmp_path / "saved", datasets.Dataset.from_list(rows, on_mixed_types="use_json"))
    assert rows_of(RowFiles("mine", str(tmp_path / "saved"), "train").parts()) == rows


@pytest.mark.parametrize("cell, value", [('{"b": 2.50}', {"b": 2.5}), ("02108", "02108"), ("two words", "two words")])
def test_a_cell_of_stored_json_that_is_none_is_the_text_that_stands_there(tmp_path, cell, value):
    table = pa.table({"a": pa.ExtensionArray.from_storage(pa.json_(), pa.array([cell]))})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(calibration_rows(task(tmp_path / "rows.parquet")).parts()) == [{"a": value}]


@pytest.mark.parametrize("names, has", [(["train.jsonl", "validation.jsonl"], True), (["rows.jsonl"], False)])
def test_a_folder_has_the_splits_that_its_names_say(tmp_path, names, has):
    for name in names:
        write_rows(tmp_path / name)
    assert calibration_rows(task(tmp_path)).has_split("validation") == has
    assert not calibration_rows(task(tmp_path / names[0])).has_split("train")


def test_without_a_split_of_its_own_a_task_is_judged_on_validation_or_else_on_the_corpus(tmp_path, monkeypatch):
    write_rows(tmp_path / "train.jsonl")
    corpus = calibration_rows(task(tmp_path))
    assert evaluation_rows(task(tmp_path)) == corpus
    write_rows(tmp_path / "test.jsonl")
    assert evaluation_rows(task(tmp_path)) == corpus
    assert evaluation_rows(task(tmp_path, evaluation_path=str(tmp_path))).split == "test"
    write_rows(tmp_path / "validation.jsonl")
    assert evaluation_rows(task(tmp_path)).split == "validation"
    assert evaluation_rows(task(tmp_path, evaluation_split="test")).split == "test"


@pytest.mark.parametrize(
    "splits, split", [(["train"], "train"), (["train", "validation"], "validation"), (None, "validation")]
)
def test_the_hub_tells_which_splits_a_data_set_has(monkeypatch, splits, split):
    asked = []

    def split_names(path, subset):
        asked.append(path)
        if splits is None:
            raise ConnectionError("offline")
        return splits

    monkeypatch.setattr("datasets.get_dataset_split_names", split_names)
    _hub_splits.cache_clear()
    for _ in range(2):
        assert evaluation_rows(task("owner/corpus")).split == split
    assert asked == ["owner/corpus"]
    # What is built in need not be asked for.
    assert evaluation_rows(task("google/boolq")).split == "validation" and asked == ["owner/corpus"]


def on_the_hub(monkeypatch, data):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return data

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("part_bytes", [1, 64 << 20])
def test_a_data_set_of_the_hub_is_loaded_once_and_read_in_parts(tmp_path, monkeypatch, part_bytes):
    import datasets

    data = datasets.load_from_disk(save(tmp_path / "cache", datasets.Dataset.from_list(SUMS)))
    asked = on_the_hub(monkeypatch, data)
    monkeypatch.setattr(row_sources, "HUB_PART_BYTES", part_bytes)

    parts = HubRows("mine", "owner/corpus", "train", "main").parts()
    assert len(parts) == (20 if part_bytes == 1 else 1)
    parts = [pickle.loads(pickle.dumps(part)) for part in parts]
    assert rows_of(parts) == SUMS and asked == [("owner/corpus", "main", "train")]

    # Another machine has another cache.
    (tmp_path / "cache").rename(tmp_path / "gone")
    on_the_hub(monkeypatch, datasets.load_from_disk(tmp_path / "gone"))
    assert rows_of(parts) == SUMS


def test_a_part_of_a_hub_data_set_names_the_rows_and_does_not_carry_them(tmp_path, monkeypatch):
    import datasets

    data = datasets.load_from_disk(save(tmp_path / "cache", datasets.Dataset.from_list(SUMS * 1000)))
    on_the_hub(monkeypatch, data)
    (part,) = HubRows("mine", "owner/corpus", "train", None).parts()
    assert len(pickle.dumps(part)) < 10_000 and rows_of([part]) == SUMS * 1000


def test_the_demos_rows_are_one_part_that_follows_the_seed():
    source = calibration_rows(task("demo:sort"))
    (part,) = source.parts(seed=1, n=1500)
    rows = rows_of([pickle.loads(pickle.dumps(part))])
    assert len(rows) == 1500 and rows == source.generate(1500, 1) != rows_of(source.parts(seed=2, n=1500))
    assert source.has_split("test") and not source.has_split("validation")
