"""Tasks without templates: their rows' columns say what they mean, in one line, and a config is complete afterwards."""

import json

import pytest

from seap_ray.config import load_config
from seap_ray.errors import DataError
from seap_ray.models.corpus import Renderer
from seap_ray.pipeline.preflight import with_recognised_tasks

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
ROWS = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": TURNS},
    "alpaca": {"instruction": "say", "input": "hi", "output": "hi"},
}


@pytest.fixture
def config_of(tmp_path):
    """Return a config with one task on a file of two equal rows."""

    def make(row, *keys):
        file = tmp_path / "rows.jsonl"
        file.write_text(f"{json.dumps(row)}\n" * 2)
        empty = tmp_path / "empty.yaml"
        empty.write_text("")
        return load_config([f"config={empty}", f"tasks=[{{name: mine, path: {file}{''.join(keys)}}}]"])

    return make


@pytest.mark.parametrize("name", ROWS)
def test_a_known_layout_needs_no_templates_and_is_named_in_one_line(config_of, capsys, name):
    (task,) = with_recognised_tasks(config_of(ROWS[name])).tasks
    assert task.has_templates and task.has_prompt and task.metric == "perplexity"

    (line,) = capsys.readouterr().out.splitlines()
    assert "tasks.mine: " in line and all(column in line for column in ROWS[name])


def test_a_layout_is_recognised_again_from_the_completed_config_and_says_nothing(config_of, capsys):
    completed = with_recognised_tasks(config_of(ROWS["alpaca"]))
    capsys.readouterr()
    assert with_recognised_tasks(completed) == completed
    assert capsys.readouterr().out == ""


def test_what_the_task_says_itself_stays(config_of):
    (task,) = with_recognised_tasks(config_of(ROWS["messages"], ", metric: exact_match, weight: 3, chat: never")).tasks
    assert (task.metric, task.weight, task.chat) == ("exact_match", 3, "never")


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_the_task_s_system_message_is_for_rows_that_have_none_in_their_column(config_of, name):
    row = {**ROWS[name], "system": "Be kind."}
    (task,) = with_recognised_tasks(config_of(row, ", system: Be brief.")).tasks
    for own, expected in (("Be kind.", "Be kind."), (None, "Be brief."), ("", "Be brief.")):
        item = Renderer(task).item({**row, "system": own})
        assert item.messages[0] == {"role": "system", "content": expected}


def test_columns_of_no_known_layout_are_named_with_what_would_be_right(config_of):
    with pytest.raises(
        DataError, match=r"tasks\.mine: the columns q, a are of no known layout .* question and answer, answer alone"
    ):
        with_recognised_tasks(config_of({"q": "hi", "a": "hello"}))


def test_rows_of_another_layout_than_the_one_that_is_named_are_refused(config_of):
    with pytest.raises(DataError, match=r"tasks\.mine\.format: alpaca needs .* instruction"):
        with_recognised_tasks(config_of(ROWS["sharegpt"], ", format: alpaca"))
