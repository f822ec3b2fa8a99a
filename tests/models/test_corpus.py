"""Corpora: the texts of the paper's tasks from the real files, and how files, sequences and batches are found."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.errors import DataError
from seap_ray.models.batching import chunk_stream, group_by_length, pack_sequences
from seap_ray.models.corpus import (
    Item,
    Renderer,
    check_evaluation,
    check_source,
    row_key,
)
from seap_ray.models.row_sources import HubRows, RowFiles, calibration_rows, read_first_row
from seap_ray.tasks import BUILT_IN, Task
from tests.support import DATA
from tests.support.builders import task

often = settings(max_examples=100, deadline=None)
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the tasks' own files are not there: {DATA}")


def rows_of(path, n=200):
    """``n`` rows from all over a real file."""
    path = DATA / "tasks" / path
    rows = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else list(map(json.loads, path.open()))
    return random.Random(0).sample(rows, n)


# --- texts -----------------------------------------------------------------------------------------------------------


def arc_text(row):
    """The authors know the keys A to D and 1 to 4."""
    key = row["answerKey"]
    return row["question"] + " " + row["choices"]["text"]["ABCD".index(key) if key in "ABCD" else int(key) - 1]


OFFICIAL = {
    "arc_easy": ("ai2_arc_easy/train-00000-of-00001.parquet", arc_text),
    "arc_challenge": ("ai2_arc/train-00000-of-00001.parquet", arc_text),
    "boolq": (
        "boolq/train-00000-of-00001.parquet",
        lambda row: row["passage"] + " " + row["question"].capitalize() + "? " + ("Yes" if row["answer"] else "No"),
    ),
    "gsm8k": ("gsm8k/train-00000-of-00001.parquet", lambda row: row["question"] + " " + row["answer"]),
    "hellaswag": (
        "hellaswag/hellaswag_train_3368.jsonl",
        lambda row: row["ctx"] + " " + row["endings"][int(row["label"])],
    ),
    "openbookqa": (
        "obqa/train-00000-of-00001.parquet",
        lambda row: (
            row["fact1"].capitalize()
            + ". "
            + row["question_stem"]
            + " "
            + row["choices"]["text"][ord(row["answerKey"]) - ord("A")]
        ),
    ),
    "piqa": (
        "piqa/plain_text_train_0000.parquet",
        lambda row: row["goal"] + " " + (row["sol1"] if row["label"] == 0 else row["sol2"]),
    ),
    "winogrande": (
        "winogrande/winogrande_m_train_0000.parquet",
        lambda row: row["sentence"].replace("_", row["option1"] if row["answer"] == "1" else row["option2"]),
    ),
    "wikitext2": ("wikitext2/raw_test_0000.parquet", lambda row: row["text"]),
}


@real
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_text_is_what_the_authors_feed(name):
    path, expected = OFFICIAL[name]
    renderer = Renderer(BUILT_IN[name], official=True)
    for row in rows_of(path):
        if row.get("answerKey") != "E":  # of which the authors drop the answer; ARC-Challenge has none
            assert renderer.item(row).text == expected(row)


@real
@pytest.mark.parametrize("name", OFFICIAL)
def test_clean_text_differs_from_the_official_one_in_case_and_outer_space_alone(name):
    path, expected = OFFICIAL[name]
    renderer = Renderer(BUILT_IN[name])
    for row in rows_of(path):
        if row.get("answerKey") != "E":
            item = renderer.item(row)
            assert item.text.lower() == expected(row).strip().lower()
            # In clean text the answer ends the text, after one space, which is how evaluation cuts it.
            assert item.text == (f"{item.question} {item.answer}" if item.question else item.answer)


@real
@pytest.mark.parametrize(("name", "column"), [("boolq", "question"), ("openbookqa", "fact1")])
def test_clean_text_keeps_capitals_that_the_official_one_loses(name, column):
    path, _ = OFFICIAL[name]
    clean, official = Renderer(BUILT_IN[name]), Renderer(BUILT_IN[name], official=True)
    lost = 0
    for row in rows_of(path, 500):
        value = row[column]
        assert value[:1].upper() + value[1:] in clean.item(row).text
        lost += value[1:] != value[1:].lower()
        assert value.capitalize() in official.item(row).text
    assert lost > 0 or name == "boolq", "BoolQ's questions come in small letters; or these rows show no difference"


@real
@pytest.mark.parametrize(
    ("name", "path", "right"),
    [
        ("arc_challenge", "ai2_arc/validation-00000-of-00001.parquet", None),
        ("boolq", "boolq/test-00000-of-00001.parquet", lambda row: ["No", "Yes"][row["answer"]]),
        ("hellaswag", "hellaswag/hellaswag_validation.jsonl", lambda row: row["endings"][row["label"]]),
        ("openbookqa", "obqa/validation-00000-of-00001.parquet", None),
        ("piqa", "piqa/plain_text_validation_0000.parquet", lambda row: row[f"sol{row['label'] + 1}"]),
        (
            "winogrande",
            "winogrande/winogrande_m_validation_0000.parquet",
            lambda row: row["sentence"].replace("_", row[f"option{row['answer']}"]),
        ),
    ],
)
def test_the_right_answer_is_one_of_the_choices(name, path, right):
    def by_label(row):
        return dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))[row["answerKey"]]

    renderer = Renderer(BUILT_IN[name])
    for row in rows_of(path):
        item = renderer.item(row)
        assert item.answer == (right or by_label)(row).strip()
        assert [choice.strip() for choice in item.choices].count(item.answer) >= 1
        assert len(item.choices) >= 2


@real
def test_gsm8k_keeps_the_calculators_marks():
    texts = [Renderer(BUILT_IN["gsm8k"], official=True).item(row).text for row in rows_of(OFFICIAL["gsm8k"][0])]
    assert sum("<<" in text for text in texts) > 150
    assert all("\n#### " in text for text in texts)


def test_names_keep_their_capitals_and_the_official_text_does_not():
    row = {"passage": "A river.", "question": "does the Nile reach Egypt", "answer": True}
    assert Renderer(BUILT_IN["boolq"]).item(row).text == "A river. Does the Nile reach Egypt? Yes"
    assert Renderer(BUILT_IN["boolq"], official=True).item(row).text == "A river. Does the nile reach egypt? Yes"


def test_a_row_is_data_and_never_a_template():
    item = Renderer(BUILT_IN["wikitext2"]).item({"text": "{{ 7 * 7 }} <b> & {% raw %}"})
    assert item.text == "{{ 7 * 7 }} <b> & {% raw %}"


def test_an_undefined_column_names_the_task_and_the_columns():
    with pytest.raises(DataError, match=r"tasks\.piqa: 'goal' is undefined; the columns are prompt, sol1, label"):
        Renderer(BUILT_IN["piqa"]).item({"prompt": "x", "sol1": "y", "label": 0})
    with pytest.raises(DataError, match=r"tasks\.piqa: 'sol2' is undefined"):
        Renderer(BUILT_IN["piqa"]).item({"goal": "x", "sol1": "y", "label": 0})


def test_a_row_that_does_not_fit_names_the_task():
    row = {"question": "Which?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"}
    with pytest.raises(DataError, match=r"tasks\.arc_easy"):
        Renderer(BUILT_IN["arc_easy"]).item(row)
    with pytest.raises(DataError, match=r"tasks\.mine"):
        Renderer(Task(name="mine", path="/x", answer="{{ a ")).item({"a": 1})


def test_a_template_cannot_reach_into_python():
    task = Task(name="mine", path="/x", answer="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match=r"tasks\.mine"):
        Renderer(task).item({"a": 1})


# --- the draw --------------------------------------------------------------------------------------------------------


def items(n):
    return [Item(text=f"q{i} a{i}", question=f"q{i}", answer=f"a{i}", choices=[]) for i in range(n)]


def test_a_rows_key_depends_on_content_and_seed_alone():
    keys = [row_key(0, item) for item in items(100)]
    assert keys == [row_key(0, item) for item in reversed(items(100))][::-1]
    assert len(set(keys)) == 100
    assert not set(keys) & {row_key(1, item) for item in items(100)}


def test_the_draw_is_a_random_one_over_the_whole_corpus():
    corpus = items(3000)
    drawn = sorted(range(3000), key=lambda i: row_key(7, corpus[i]))[:300]
    for third in range(3):
        assert 60 < sum(third * 1000 <= i < (third + 1) * 1000 for i in drawn) < 140


# --- files -----------------------------------------------------------------------------------------------------------


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
    ("name", "contents"), [("rows.jsonl", b'{"text": '), ("rows.parquet", b"PAR1?"), ("rows.csv", b"\xff\xfe\x81")]
)
def test_a_torn_file_names_the_task(tmp_path, name, contents):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=rf"tasks\.mine: .*{name} cannot be read"):
        check_source(task(tmp_path / name), official=False)


def test_a_template_that_does_not_fit_the_file_is_found_before_any_work(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"words": "x"}])
    with pytest.raises(DataError, match=r"tasks\.mine: 'text' is undefined; the columns are words"):
        check_source(task(file), official=False)


def test_a_task_without_an_official_text_keeps_its_own():
    row = {"prompt": "2 + 2 =", "text": "4"}
    assert Renderer(task("/x", question="{{ prompt }}"), official=True).item(row).text == "2 + 2 = 4"
    assert Renderer(task("/x", official="{{ text }}!"), official=True).item(row).text == "4!"
    assert Renderer(task("/x", official="{{ text }}!")).item(row).text == "4"


def test_paths_and_hub_ids_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    for path in ("/x/y", "./x", "../x", "~/x", "x.jsonl", "x/y.parquet", "x.jsonl.gz", "data/mine"):
        assert isinstance(calibration_rows(task(path)), RowFiles), path
    for path in ("allenai/ai2_arc", "piqa"):
        assert isinstance(calibration_rows(task(path)), HubRows), path


# --- sequences and batches -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
@often
def test_batches_cover_every_sequence_once_and_stay_within_the_limit(lengths, limit):
    grouped = group_by_length(lengths, limit)
    assert sorted(i for group in grouped for i in group) == list(range(len(lengths)))
    assert all(grouped), "no empty batch"
    for group in grouped:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit
    assert group_by_length(lengths, limit) == grouped


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
@often
def test_batches_are_no_smaller_than_they_must_be(lengths):
    limit = max(lengths)
    grouped = group_by_length(lengths, limit)
    for one, following in zip(grouped, grouped[1:], strict=False):
        assert (len(one) + 1) * lengths[following[0]] > limit


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300))
@often
def test_packed_rows_hold_every_sequence_once_and_stay_within_the_limit(lengths, limit):
    grouped = pack_sequences(lengths, limit)
    assert sorted(i for rows in grouped for row in rows for i in row) == list(range(len(lengths)))
    for rows in grouped:
        assert all(rows)
        longest = max(sum(lengths[i] for i in row) for row in rows)
        assert len(rows) * longest <= limit or len(rows) == 1 and longest <= max(lengths)
    assert pack_sequences(lengths, limit) == grouped


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.5])
def test_packing_leaves_less_than_two_percent_to_padding(spread):
    random_ = random.Random(0)
    lengths = [1 + min(2000, int(random_.lognormvariate(4.5, spread))) for _ in range(64)]
    batches = pack_sequences(lengths, 4096)
    computed = sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in batches)
    assert sum(lengths) > 0.98 * computed


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12), st.integers(1, 10))
@often
def test_pack_keeps_every_token_in_order(sequences, length):
    pieces = chunk_stream(sequences, length)
    assert [t for piece in pieces for t in piece] == [t for sequence in sequences for t in sequence]
    assert all(len(piece) == length for piece in pieces[:-1])
    assert all(1 <= len(piece) <= length for piece in pieces)
