"""Corpora: the texts of the paper's tasks from the real files, and the draw of rows."""

import json
import random

import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from seap_ray.errors import DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import (
    Item,
    Renderer,
    load_tokenizer,
    row_key,
    tokenizer_warning,
)
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


def test_a_task_without_an_official_text_keeps_its_own():
    row = {"prompt": "2 + 2 =", "text": "4"}
    assert Renderer(task("/x", question="{{ prompt }}"), official=True).item(row).text == "2 + 2 = 4"
    assert Renderer(task("/x", official="{{ text }}!"), official=True).item(row).text == "4!"
    assert Renderer(task("/x", official="{{ text }}!")).item(row).text == "4"


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


# --- tokenizers that transformers reads in its own way ---------------------------------------------------------------


def byte_level_tokenizer(folder, tokenizer_class):
    """A byte-level BPE without a normalizer, as a model's folder has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the year 2024"] * 9, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_a_tokenizer_whose_class_overrides_its_file_is_warned_of(tmp_path):
    as_in_file = byte_level_tokenizer(tmp_path / "plain", "PreTrainedTokenizerFast")
    assert tokenizer_warning(load_tokenizer(as_in_file), as_in_file) is None

    overridden = byte_level_tokenizer(tmp_path / "llama", "LlamaTokenizerFast")
    warning = tokenizer_warning(load_tokenizer(overridden), overridden)
    assert warning.startswith("model.source: ") and "LlamaTokenizer" in warning and "tokenizer.json" in warning
    assert "\n" not in warning


def test_the_demo_and_a_folder_without_tokenizer_json_give_no_warning(tmp_path):
    demo = Checkpoint.open("demo").folder
    tokenizer = load_tokenizer(demo)
    assert tokenizer_warning(tokenizer, demo) is None and tokenizer_warning(tokenizer, tmp_path) is None


def test_a_tokenizer_that_cannot_encode_every_text_gives_no_warning_and_no_error(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))

    loaded = load_tokenizer(tmp_path)
    assert loaded("b a")["input_ids"] == [1, 0]
    assert tokenizer_warning(loaded, tmp_path) is None
