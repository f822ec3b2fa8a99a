"""Corpora: the texts of the paper's tasks from the real files, and the draw of rows."""

import json
import random

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from seap_ray.errors import DataError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import (
    Item,
    Renderer,
    Split,
    check_evaluation,
    check_source,
    choice_defect,
    content_key,
    defect,
    held_out_rows,
    judged_rows,
    load_tokenizer,
    row_key,
    rows_lines,
    split_of,
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
            # In clean text the answer ends the text, which is how evaluation cuts it.
            assert item.text == f"{item.prompt}{item.separator}{item.answer}"
            assert item.separator == (" " if item.question else "")


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


OPEN_ROWS = {
    "boolq": {"passage": "A river.", "question": "is it", "answer": True},
    "hellaswag": {"ctx": "She", "endings": ["runs", "sings"], "label": 1},
    "piqa": {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1},
    "winogrande": {"sentence": "The _ is big.", "option1": "cat", "option2": "dog", "answer": "2"},
}


@pytest.mark.parametrize("name", OPEN_ROWS)
def test_a_row_whose_answer_is_kept_secret_has_none_and_not_the_last_choice(name):
    row = OPEN_ROWS[name]
    renderer = Renderer(BUILT_IN[name])
    assert defect(renderer.item(row)) is None
    column = "label" if "label" in row else "answer"
    # Splits without answers have one of these; what a file says as text is what it says as a value.
    for secret in (None, "", -1, "-1"):
        assert defect(renderer.item(row | {column: secret})) in ("no_answer", "blank")
    lacking = {key: value for key, value in row.items() if key != column}
    assert defect(renderer.item(lacking)) in ("no_answer", "blank") and renderer.undefined
    assert renderer.item(row | {column: str(row[column])}) == renderer.item(row)


def test_names_keep_their_capitals_and_the_official_text_does_not():
    row = {"passage": "A river.", "question": "does the Nile reach Egypt", "answer": True}
    assert Renderer(BUILT_IN["boolq"]).item(row).text == "A river. Does the Nile reach Egypt? Yes"
    assert Renderer(BUILT_IN["boolq"], official=True).item(row).text == "A river. Does the nile reach egypt? Yes"


def test_a_row_is_data_and_never_a_template():
    item = Renderer(BUILT_IN["wikitext2"]).item({"text": "{{ 7 * 7 }} <b> & {% raw %}"})
    assert item.text == "{{ 7 * 7 }} <b> & {% raw %}"


def write_rows(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_column_that_no_row_has_names_the_task_and_the_columns(tmp_path):
    def check(**row):
        check_source(BUILT_IN["piqa"].model_copy(update={"path": write_rows(tmp_path, row, row)}), official=False)

    with pytest.raises(DataError, match=r"tasks\.piqa: 'goal' is undefined; the columns are prompt, sol1, label"):
        check(prompt="x", sol1="y", label=0)
    with pytest.raises(DataError, match=r"tasks\.piqa: 'sol2' is undefined"):
        check(goal="x", sol1="y", label=0)


def test_a_column_that_some_row_has_is_empty_in_the_others(tmp_path):
    path = write_rows(tmp_path, {"q": "a", "a": "b"}, {"q": "a", "a": "b", "context": "c"})
    check_source(task(path, question="{{ q }} {{ context }}", answer="{{ a }}"), official=False)
    assert Renderer(task(path, question="{{ q }} {{ context }}")).item({"q": "a", "text": "b"}).text == "a b"


def test_a_row_that_does_not_fit_names_the_task():
    row = {"question": "Which?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"}
    with pytest.raises(DataError, match=r"tasks\.arc_easy"):
        Renderer(BUILT_IN["arc_easy"]).item(row)
    with pytest.raises(DataError, match=r"tasks\.mine"):
        Renderer(Task(name="mine", path="/x", answer="{{ a ")).item({"a": 1})


def test_what_is_not_jinja_names_the_task_and_the_field():
    with pytest.raises(DataError, match=r"tasks\.mine\.answer: not valid Jinja"):
        Renderer(Task(name="mine", path="/x", answer="{{ a ")).item({"a": 1})
    with pytest.raises(DataError, match=r"tasks\.mine\.messages: not valid Jinja"):
        Renderer(Task(name="mine", path="/x", messages="{{ a }} {{ b }}")).item({"a": 1})


def test_a_conversation_that_is_printed_whole_is_refused_with_what_to_write():
    with pytest.raises(DataError, match=r'tasks\.mine\.answer: prints a whole list; .* messages: "{{ messages }}"'):
        Renderer(Task(name="mine", path="/x", answer="{{ messages }}")).item({"messages": [{"role": "user"}]})


def test_a_template_cannot_reach_into_python():
    task = Task(name="mine", path="/x", answer="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match=r"tasks\.mine"):
        Renderer(task).item({"a": 1})


def test_a_task_without_an_official_text_keeps_its_own():
    row = {"prompt": "2 + 2 =", "text": "4"}
    assert Renderer(task("/x", question="{{ prompt }}"), official=True).item(row).text == "2 + 2 = 4"
    assert Renderer(task("/x", official="{{ text }}!"), official=True).item(row).text == "4!"
    assert Renderer(task("/x", official="{{ text }}!")).item(row).text == "4"


# --- question and answer ---------------------------------------------------------------------------------------------


def item_of(row, **fields):
    return Renderer(task("/x", **{"question": "{{ q }}", "answer": "{{ a }}", **fields})).item(row)


@pytest.mark.parametrize(
    ("question", "prompt", "separator"),
    [
        ("{{ q }}", "2 + 2 =", " "),
        (" {{ q }}  ", "2 + 2 =", " "),
        ("{{ q }}\n", "2 + 2 =\n", ""),
        ("{{ q }}\n\n", "2 + 2 =\n\n", ""),
        ("{{ q }} \n  ", "2 + 2 = \n  ", ""),
        ("{{ none }} \n", "", ""),
        ("", "", ""),
    ],
)
def test_a_question_that_ends_in_a_line_break_keeps_it_and_any_other_has_one_space_behind(question, prompt, separator):
    item = item_of({"q": "2 + 2 =", "a": " 4\n"}, question=question)
    assert (item.prompt, item.separator, item.answer) == (prompt, separator, "4")
    assert item.text == prompt + separator + "4"
    # In a chat the answer is a message of its own.
    assert item.messages == ([{"role": "user", "content": "2 + 2 ="}] if prompt else [])


@often
@given(st.text("ab \n\t"), st.text("ab \n\t"), st.lists(st.text("ab \n"), max_size=4))
def test_a_text_is_always_its_prompt_its_separator_and_its_answer(question, answer, contents):
    item = item_of({"q": question, "a": answer})
    assert item.text == item.prompt + item.separator + item.answer
    assert item.text.split() == (question + " " + answer).split() or item.separator == ""

    item = conversation(turns(*contents))
    assert item.text == item.prompt + item.separator + item.answer
    assert [message["content"] for message in item.messages] + [item.answer] == contents or item.answer == ""


def test_a_question_begins_with_the_tasks_system_message_in_a_chat_alone():
    item = item_of({"q": "2 + 2 =", "a": "4", "s": "Be brief."}, system="{{ s }}")
    assert item.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2 ="},
    ]
    assert item.text == "2 + 2 = 4"
    assert item_of({"q": "2 + 2 =", "a": "4", "s": None}, system="{{ s }}").messages == item.messages[1:]


def test_choices_are_texts_and_null_is_an_empty_one():
    item = item_of({"q": "?", "a": 2, "c": [1, 2, None, True]}, choices="c")
    assert (item.choices, item.gold) == (["1", "2", "", "True"], 1)
    with pytest.raises(DataError, match=r"tasks\.mine\.choices: .*a text, not a list"):
        item_of({"q": "?", "a": "b", "c": "['a', 'b']"}, choices="c")
    with pytest.raises(DataError, match=r"tasks\.mine\.choices: .*a mapping, not a list; its values are"):
        item_of({"q": "?", "a": "b", "c": {"A": "a", "B": "b"}}, choices="c")
    with pytest.raises(DataError, match=r"tasks\.mine\.choices: .*a choice is a list or a mapping, not a text"):
        item_of({"q": "?", "a": "b", "c": ["a", {"text": "b"}]}, choices="c")
    assert item_of({"q": "?", "a": "b", "c": {"A": "a", "B": "b"}}, choices="c.values() | list").gold == 1
    assert item_of({"q": "?", "a": "b", "c": None}, choices="c").choices == []


def test_the_right_choice_is_known_by_its_place_whatever_the_space_around_it():
    item = item_of({"q": "?", "s": ["b ", " a ", "a"], "a": "a "}, choices="s", metric="acc")
    assert (item.answer, item.choices, item.gold) == ("a", ["b ", " a ", "a"], 1)
    assert [item.is_right(choice) for choice in range(3)] == [False, True, True]
    # The same text comes before the same text but for space.
    assert item_of({"q": "?", "s": ["a ", "a"], "a": "a"}, choices="s").gold == 1
    assert item_of({"q": "?", "s": ["b", "c"], "a": "a"}, choices="s").gold is None


@real
def test_every_row_of_piqa_has_a_right_choice():
    rows = pq.read_table(DATA / "tasks/piqa/plain_text_validation_0000.parquet").to_pylist()
    renderer = Renderer(BUILT_IN["piqa"])
    items = [renderer.item(row) for row in rows]
    assert [item.gold for item in items] == [row["label"] for row in rows]
    assert sum(item.answer not in item.choices for item in items) == 113


# --- conversations ---------------------------------------------------------------------------------------------------


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def conversation(messages, **fields):
    row = {"messages": messages, "s": "Be kind.", "a": "mine"}
    return Renderer(Task(name="mine", path="/x", messages="{{ messages }}", **fields)).item(row)


def test_the_last_message_of_the_assistant_is_the_answer():
    item = conversation(turns("hi", "hello", "2 + 2?", "4"))
    assert (item.messages, item.answer, item.question) == (turns("hi", "hello", "2 + 2?"), "4", "hi")
    assert item.text == "hi\n\nhello\n\n2 + 2?\n\n4" == item.prompt + item.separator + item.answer
    assert defect(item) is None


@pytest.mark.parametrize("messages", [turns("hi"), turns("hi", "hello", "bye"), turns("hi", ""), turns("hi", None)])
def test_a_conversation_that_the_assistant_does_not_end_has_no_answer(messages):
    item = conversation(messages)
    assert (item.answer, defect(item)) == ("", "no_answer")


@pytest.mark.parametrize("messages", [None, [], turns("", "")])
def test_a_conversation_without_a_word_is_blank(messages):
    assert defect(conversation(messages)) == "blank"


def test_an_answer_of_its_own_follows_the_whole_conversation():
    item = conversation(turns("hi", "hello", "2 + 2?"), answer="{{ a }}")
    assert (item.messages, item.answer) == (turns("hi", "hello", "2 + 2?"), "mine")
    assert item.text == item.prompt + item.separator + "mine"


def test_a_rows_own_system_message_wins_over_the_tasks():
    system = {"role": "system", "content": "Be kind."}
    assert conversation(turns("hi", "yo"), system="{{ s }}").messages == [system, *turns("hi")]
    own = {"role": "system", "content": "Be rude."}
    assert conversation([own, *turns("hi", "yo")], system="{{ s }}").messages == [own, *turns("hi")]


TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    "message, why", [(TOOL_CALL, "tool calls"), (PICTURE, "image_url"), ({"role": "developer", "content": ""}, "role")]
)
def test_a_row_whose_messages_are_more_than_text_is_left_out_by_its_reason(message, why):
    chat = task("/x", question="", answer="", messages="{{ messages }}")
    item = Renderer(chat).item({"messages": [{"role": "user", "content": "hi"}, message]})
    assert defect(item) == "unreadable" and why in item.unreadable and item.unreadable.startswith("message 2: ")


def test_where_the_first_rows_are_all_more_than_text_the_corpus_is_refused(tmp_path):
    calls = {"messages": [{"role": "user", "content": "hi"}, TOOL_CALL]}
    texts = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    file = tmp_path / "chat.jsonl"
    chat = task(str(file), question="", answer="", messages="{{ messages }}")

    file.write_text(f"{json.dumps(calls)}\n" * 3)
    with pytest.raises(
        DataError, match=r"^tasks\.mine\.messages: the first row cannot be read: message 2: .*tool calls"
    ):
        check_source(chat, official=False)
    file.write_text(f"{json.dumps(calls)}\n{json.dumps(texts)}\n")
    check_source(chat, official=False)


def test_conversations_that_open_alike_are_held_out_by_what_follows():
    chat = task("/x", question="", answer="", messages="{{ messages }}")
    greeting = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "How can I help?"}]
    conversations = []
    for i in range(50):
        asked = [*greeting, {"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"{i}"}]
        conversations.append(Renderer(chat).item({"messages": asked}))

    split = split_of(chat, 0, conversations)
    assert sum(map(split.holds_out, conversations)) == 10


def test_what_is_no_conversation_names_the_field_and_the_row():
    with pytest.raises(DataError, match=r"tasks\.mine\.messages: does not fit the row .*a list of messages"):
        conversation("hi")
    with pytest.raises(DataError, match=r"tasks\.mine\.messages: .*message 1: "):
        conversation([{"speaker": "pope", "content": "hi"}])


def test_the_text_that_the_authors_wrote_is_calibrated_and_prompt_and_answer_are_judged():
    mine = task("/x", question="{{ q }}", answer="{{ a }}", official="{{ q | lower }}: {{ a }}")
    official = Renderer(mine, official=True).item({"q": "Q", "a": " A "})
    assert (official.text, official.prompt, official.answer) == ("q:  A ", "Q", "A")
    # Whether rows are the same, or held out, does not depend on the format.
    clean = Renderer(mine).item({"q": "Q", "a": " A "})
    assert content_key(official) == content_key(clean)
    assert Split(3).key(official) == Split(3).key(clean)


# --- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "?", "a": "x"}, None),
        ({"q": "?", "a": " "}, "no_answer"),
        ({"q": "?", "a": None}, "no_answer"),
        ({"q": "?"}, "no_answer"),
        ({"q": " \n", "a": ""}, "blank"),
        ({}, "blank"),
        ({"q": None, "a": "x"}, None),
    ],
)
def test_rows_without_an_answer_or_any_text_have_a_defect(row, reason):
    assert defect(item_of(row)) == reason


@pytest.mark.parametrize(
    ("choices", "reason"),
    [(["x", "y"], None), (["y", "z"], "wrong_answer"), ([], "wrong_answer"), (["x", "x "], "same_choices")],
)
def test_choices_that_are_odd_have_a_reason_where_they_are_judged(choices, reason):
    fields = {"question": "{{ q }}", "answer": "{{ a }}", "choices": "c"}
    for metric, expected in (("acc", reason), ("acc_norm", reason), ("exact_match", None)):
        mine = task("/x", metric=metric, **fields)
        assert choice_defect(mine, Renderer(mine).item({"q": "?", "a": "x", "c": choices})) == expected


def test_counts_are_told_in_words():
    counts = {"held_out": 12, "no_answer": 1, "wrong_answer": 2000, "left": 3}
    assert rows_lines("sums", 6000, counts) == [
        "tasks.sums: 12 of 6,000 rows held out for evaluation",
        "tasks.sums: of 6,000 rows for calibration 1 without an answer, 2,000 whose answer is none of their choices",
    ]
    assert rows_lines("sums", 60, {}) == []


@pytest.mark.parametrize("first_is_wrong", [True, False])
def test_some_rows_with_a_wrong_answer_do_not_stop_a_task_and_all_of_them_do(tmp_path, first_is_wrong):
    right = {"q": "?", "a": "x", "c": ["x", "y"]}
    wrong = {"q": "?", "a": "z", "c": ["x", "y"]}
    fields = {"question": "{{ q }}", "answer": "{{ a }}", "choices": "c", "metric": "acc"}
    check_evaluation(task(write_rows(tmp_path, *([wrong, right] if first_is_wrong else [right, wrong])), **fields))
    with pytest.raises(DataError, match=r"tasks\.mine: the answer 'z' of the first row is none of its choices"):
        check_evaluation(task(write_rows(tmp_path, wrong, wrong), **fields))


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


texts = st.text("ab \n", max_size=4)


@often
@given(st.lists(st.tuples(texts, texts), min_size=2, max_size=40), st.integers(0, 5))
def test_a_question_with_all_its_answers_is_on_one_side_of_the_split_and_no_side_is_empty(pairs, seed):
    mine = task("/x", question="{{ q }}", answer="{{ a }}")
    rows = [Renderer(mine).item({"q": question, "a": answer}) for question, answer in pairs]
    usable = [item for item in rows if defect(item) is None]
    questions = {item.question.strip() or item.answer for item in usable}
    if len(questions) < 2:
        with pytest.raises(DataError, match=r"tasks\.mine: (all rows have the same question|no row has an answer)"):
            split_of(mine, seed, rows)
        return

    split = split_of(mine, seed, rows)
    held_out = {item.question.strip() or item.answer for item in usable if split.holds_out(item)}
    left = {item.question.strip() or item.answer for item in usable if not split.holds_out(item)}
    assert held_out and left and not held_out & left


def test_a_fifth_of_many_questions_is_held_out_whatever_their_order():
    mine = task("/x")
    split = split_of(mine, 0, items(3000))
    assert split == Split(0) == split_of(mine, 0, items(3000)[::-1])
    assert 500 < sum(map(split.holds_out, items(3000))) < 700
    assert 50 < sum(split.holds_out(item) and Split(1).holds_out(item) for item in items(3000)) < 200


@pytest.mark.parametrize(("n", "n_held_out"), [(2, 1), (3, 1), (12, 2), (60, 12), (1000, 200)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_few_questions_exactly_a_fifth_is_held_out(n, n_held_out, seed):
    split = split_of(task("/x"), seed, items(n) * 2)
    assert sum(map(split.holds_out, items(n))) == n_held_out


def test_what_is_held_out_does_not_say_what_is_drawn():
    split = Split(0)
    by_key = sorted(items(3000), key=lambda item: row_key(0, item))
    assert 60 < sum(map(split.holds_out, by_key[:600])) < 180


# --- rows to judge on ------------------------------------------------------------------------------------------------


def folder_of(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "is_split_off"),
    [
        ({"path": "{}/train.jsonl"}, True),
        ({"path": "{}/train.jsonl", "evaluation_split": "train"}, True),
        ({"path": "{}/train.jsonl", "evaluation_path": "{}/*.jsonl"}, True),
        ({"path": "{}/train.jsonl", "evaluation_path": "{}/../{name}/train.jsonl"}, True),
        ({"path": "{}/train.jsonl", "evaluation_path": "{}/link.jsonl"}, True),
        ({"path": "{}/*.jsonl"}, True),
        ({"path": "{}", "evaluation_split": "train"}, True),
        ({"path": "{}", "evaluation_split": "test"}, False),
        ({"path": "{}/train.jsonl", "evaluation_path": "{}/test.jsonl"}, False),
        ({"path": "{}/train.jsonl", "held_out": False}, False),
        ({"path": "demo:sort", "evaluation_split": "test"}, False),
    ],
)
def test_rows_of_the_corpus_are_split_off_where_the_same_files_are_judged(tmp_path, fields, is_split_off):
    folder_of(tmp_path, train=["a", "b"], test=["c"])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "train.jsonl")
    named = {
        name: value.format(tmp_path, name=tmp_path.name) if isinstance(value, str) else value
        for name, value in fields.items()
    }
    assert judged_rows(task(**named)).is_split_off == is_split_off


def test_a_folder_without_validation_rows_is_judged_on_held_out_rows_and_one_with_them_on_these(tmp_path):
    folder_of(tmp_path, train=["a", "b"])
    judged = judged_rows(task(str(tmp_path)))
    assert judged.is_split_off and [file.name for file in judged.source.files()] == ["train.jsonl"]

    folder_of(tmp_path, validation=["c"])
    judged = judged_rows(task(str(tmp_path)))
    assert not judged.is_split_off and [file.name for file in judged.source.files()] == ["validation.jsonl"]


def test_a_row_may_be_judged_where_it_is_held_out_and_was_not_calibrated_on(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(50)]
    path = write_rows(tmp_path, *rows)
    mine = task(path)
    renderer = Renderer(mine)
    split = split_of(mine, 0, map(renderer.item, rows))

    is_held_out = held_out_rows(mine, seed=0)
    assert [is_held_out(row) for row in rows] == [split.holds_out(renderer.item(row)) for row in rows]

    judged = [row for row in rows if is_held_out(row)]
    is_held_out = held_out_rows(mine, seed=0, calibrated=frozenset([content_key(renderer.item(judged[0]))]))
    assert [row for row in rows if is_held_out(row)] == judged[1:]

    assert held_out_rows(mine.model_copy(update={"held_out": False}), seed=0) is None


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
