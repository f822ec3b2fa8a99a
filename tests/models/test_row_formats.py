"""Row formats: layouts that people have are told by their columns, and every form of a conversation is messages."""

import json

import pytest
from jinja2 import Environment

from seap_ray.errors import DataError
from seap_ray.models.row_formats import ROLES, as_messages, recognise
from seap_ray.tasks import Task

ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]
SHAREGPT = [{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}]
MESSAGES = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]


@pytest.mark.parametrize(
    "rows, name, line",
    [
        (ALPACA, "alpaca", "tasks.chat: Alpaca rows (instruction, input, output)"),
        (SHAREGPT, "sharegpt", "tasks.chat: ShareGPT conversations (from, value) in the column conversations"),
        (MESSAGES, "messages", "tasks.chat: OpenAI messages (role, content) in the column messages"),
        (
            [{"conversations": MESSAGES[0]["messages"]}],
            "messages",
            "tasks.chat: OpenAI messages (role, content) in the column conversations",
        ),
        (
            [{**SHAREGPT[0], "system": "Be brief."}],
            "sharegpt",
            "tasks.chat: ShareGPT conversations (from, value) in the column conversations, their system message in the "
            "column system",
        ),
        # A null among the first rows hides no layout.
        (
            [{"messages": None}, *MESSAGES],
            "messages",
            "tasks.chat: OpenAI messages (role, content) in the column messages",
        ),
    ],
)
def test_a_layout_is_told_by_its_columns_and_gives_a_task_its_templates(rows, name, line):
    recognised = recognise(rows, task="chat")
    assert recognised is not None and recognised.name == name and recognised.line("chat") == line
    assert recognise(rows, name, task="chat") == recognised
    assert Task(name="chat", path="rows.jsonl", **recognised.templates).has_prompt


@pytest.mark.parametrize(("rows", "column"), [(MESSAGES, "messages"), (SHAREGPT, "conversations")])
def test_a_conversation_may_be_json_text_as_tables_of_text_have_it(rows, column):
    conversation = rows[0][column]
    texts = [{column: f" {json.dumps(conversation, indent=1)}\n"}, {column: ""}, {column: "[]"}]
    assert recognise(texts) == recognise(rows)
    assert as_messages(texts[0][column]) == as_messages(conversation)
    assert as_messages("[]") == []
    # As Python prints a list.
    with pytest.raises(ValueError, match="a conversation is a list of messages, not a text"):
        as_messages(repr(conversation))


def test_an_input_stands_behind_its_instruction_and_none_leaves_no_trace():
    recognised = recognise(ALPACA)
    assert recognised is not None
    template = Environment().from_string(recognised.templates["question"])
    assert [template.render(row) for row in ALPACA] == ["Add.\n1 and 2", "Say hi."]
    assert recognised.templates["answer"] == "{{ output }}"


def test_the_columns_that_an_alpaca_file_lacks_are_in_no_template():
    recognised = recognise([{"instruction": "Say hi.", "output": "hi"}])
    assert recognised is not None and recognised.templates == {
        "question": "{{ instruction }}",
        "answer": "{{ output }}",
    }


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"text": "words"}],
        [{"instruction": "Say hi."}],
        [{"messages": "hi"}],
        [{"messages": []}],
        [{"messages": ["hi", "yes"]}],
        [*MESSAGES, {"messages": "hi"}],
        [{"conversations": [{"speaker": "a", "text": "b"}]}],
    ],
)
def test_rows_of_another_layout_are_not_recognised(rows):
    assert recognise(rows) is None


@pytest.mark.parametrize(
    "name, needs", [("alpaca", "instruction, output"), ("sharegpt", "from and value"), ("messages", "role and content")]
)
def test_a_format_that_the_rows_are_not_of_is_refused_with_their_columns(name, needs):
    with pytest.raises(DataError, match=rf"tasks\.mine\.format: {name} needs .*{needs}.*; the columns are text, label"):
        recognise([{"text": "words", "label": 1}], name, task="mine")


def test_earlier_turns_of_an_alpaca_file_are_not_dropped_in_silence():
    with pytest.raises(DataError, match=r"tasks\.mine\.format: alpaca: earlier turns in the column history"):
        recognise([{**ALPACA[0], "history": [["a", "b"]]}], task="mine")
    assert recognise([{**ALPACA[0], "history": []}], task="mine") is not None


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, role", ROLES.items())
def test_every_name_of_a_role_is_one_of_four(name, role):
    assert role in ("system", "user", "assistant", "tool")
    for turn in ({"from": name, "value": "x"}, {"role": name, "content": "x"}):
        assert as_messages([turn]) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    "content, text",
    [
        ("hi", "hi"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "hi"}], "hi"),
        (
            [
                {"type": "text", "text": "hi"},
                "you",
                {"type": "text", "text": None},
                {"type": "input_text", "text": "there"},
            ],
            "hi\nyou\nthere",
        ),
    ],
)
def test_a_content_is_text_null_or_parts_that_are_text(content, text):
    turn = {"role": "user", "content": content, "tool_calls": None}
    assert as_messages((turn,)) == [{"role": "user", "content": text}]
    assert as_messages([{"role": "assistant"}]) == [{"role": "assistant", "content": ""}]


@pytest.mark.parametrize(
    "conversation, reason",
    [
        ("hi", "a conversation is a list of messages, not a text"),
        (None, "a conversation is a list of messages, not null"),
        ({"role": "user"}, "a conversation is a list of messages, not a mapping"),
        (["hi"], "message 1: a message is a mapping with role and content, not a text"),
        ([{"speaker": "a"}], "message 1: neither role nor from is among its keys: speaker"),
        (
            [*MESSAGES[0]["messages"], {"role": "developer", "content": "x"}],
            "message 3: the role 'developer' is none of system,",
        ),
        ([{"role": None, "content": "x"}], "message 1: the role None is none of"),
        ([{"role": "user", "content": 5}], "message 1: its content is neither a text nor a list of parts but 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "message 1: a part of type 'image_url'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            "message 1: the text of a part of its content is 5",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            "message 1: its tool calls are no part of its content",
        ),
    ],
)
def test_what_is_no_message_is_refused_with_its_place(conversation, reason):
    with pytest.raises(ValueError) as refusal:
        as_messages(conversation)
    assert str(refusal.value).startswith(reason) and "\n" not in str(refusal.value)
