"""Tasks to evaluate: the names of results stand for all that the figures depend on, and rows are counted."""

import json
import shutil
from pathlib import Path

import pytest

from seap_ray.config import Config
from seap_ray.errors import DataError
from seap_ray.judges import lm_eval
from seap_ray.models.corpus import Item, Renderer, content_key, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.pipeline.evaluate import (
    EvalTarget,
    EvalTask,
    _MissingResults,
    _say_duration,
    _taken_by_template,
    eval_task,
    judge_task,
)
from seap_ray.storage.artifact import Artifact, JsonFile
from seap_ray.storage.paths import storage_path
from seap_ray.storage.run import Run
from seap_ray.tasks import Task
from tests.support import DATA
from tests.support.builders import load

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.skipif(not (DATA / "models").exists(), reason="needs the model of ../shared/data")

CHATML = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "models" / "stories260k", folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def judged(model: Path, rows: list[dict], *, chat: str = "auto", **changes) -> EvalTask:
    config = config_of(model, rows, chat=chat, **changes)
    return eval_task(config, Run(model.parent / "run"), config.tasks[0], by_lm_eval=True)


def config_of(model: Path, rows: list[dict], *, chat: str = "auto", **changes) -> Config:
    file = model.parent / "rows.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # The same file at the same time is the same rows.
    if not file.exists() or file.read_text() != lines:
        file.write_text(lines)

    templates = {"question": "{{ goal }}", "answer": "{{ [sol1, sol2][label | int] }}", "choices": "[sol1, sol2]"}
    fields = {"name": "piqa", "path": str(file), "lm_eval": "piqa", "held_out": False, **templates, **changes}
    settings = {"model": {"source": str(model)}, "corpus": {"chat": chat}, "tasks": [Task(**fields)]}
    return Config.model_validate(settings)


ROWS = [{"goal": f"Boil {what}", "sol1": "Heat it", "sol2": "Cool it", "label": 0} for what in ("water", "tea", "oil")]


def test_results_have_the_name_of_their_chat_template(model):
    in_chat = judged(model, ROWS)
    plain = judged(model, ROWS, chat="never")
    assert in_chat.fingerprint == judged(model, ROWS, chat="always").fingerprint != plain.fingerprint
    assert judged(model, ROWS, system="Be brief.").fingerprint != in_chat.fingerprint

    (model / "chat_template.jinja").write_text("\n" + CHATML)
    assert judged(model, ROWS).fingerprint != in_chat.fingerprint
    assert judged(model, ROWS, chat="never").fingerprint == plain.fingerprint

    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert judged(model, ROWS, chat="never").fingerprint != plain.fingerprint


def test_rows_that_lm_eval_leaves_out_are_counted(model):
    task = judged(model, [*ROWS, ROWS[0] | {"label": -1}])
    assert (task.n_rows, task.counts) == (4, {"wrong_answer": 1})


def test_lm_eval_is_given_the_encoding_of_the_task_and_the_rows_that_were_calibrated_on(model, monkeypatch):
    given = []
    judge = lm_eval.judge

    def recorded(model, encoding, task, **settings):
        given.append(encoding.is_chat)
        return judge(model, encoding, task, **settings)

    monkeypatch.setattr(lm_eval, "judge", recorded)
    seen = content_key(Renderer(judged(model, ROWS).task).item(ROWS[1]))
    for chat in ("auto", "never"):
        config = config_of(model, ROWS, chat=chat, evaluation_path=str(model.parent / "rows.jsonl"), held_out=True)
        # Calibrated from another file.
        task = config.tasks[0].model_copy(update={"path": str(model.parent / "other.jsonl")})
        other = model.parent / "other.jsonl"
        other.write_text(json.dumps(ROWS[1]) + "\n")
        quality = judge_task(
            config, load(model), load_tokenizer(model), EvalTask(task, "lm-eval", "", calibrated=frozenset([seen]))
        )
        assert quality.n == 2

    assert given == [True, False]


def test_conversations_that_the_template_does_not_take_cost_no_other_its_judgement(model):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuses + CHATML)
    tokenizer = load_tokenizer(model)
    task = Task(name="chat", path="unused", messages="{{ messages }}")
    user = {"role": "user", "content": "Boil water"}
    taken = Item("", "Boil water", "Heat it", [], [user])
    odd = Item("", "Boil water", "Heat it", [], [{"role": "system", "content": "Be brief."}, user])

    assert _taken_by_template(Encoding(tokenizer, is_chat=True), task, [odd, taken, odd]) == (taken,)
    assert _taken_by_template(Encoding(tokenizer), task, [odd, taken]) == (odd, taken)
    with pytest.raises(
        DataError, match=r"^tasks.chat: .* \(No system role\); it takes none of the 2 rows to judge on$"
    ):
        _taken_by_template(Encoding(tokenizer, is_chat=True), task, [odd, odd])


def test_the_first_model_says_how_long_all_take(tmp_path, monkeypatch, capsys):
    def missing(name: str, *tasks: str) -> _MissingResults:
        files = {
            task: Artifact(storage_path(tmp_path / f"{name}-{task}.json"), "key", JsonFile(True)) for task in tasks
        }
        return _MissingResults(EvalTarget(name, name, tasks, None), files)

    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2})
    dense, expert = missing("dense", "piqa", "boolq"), missing("expert", "piqa")
    for task, seconds in (("piqa", 60), ("boolq", 240)):
        dense.files[task].path.write_text(json.dumps({"seconds": seconds}))

    # 60 + 240 + 60 seconds of judging, and for each of the two models 30 of writing and loading, by two judges.
    _say_duration(dense, [dense, expert], 330.0, Config())
    assert capsys.readouterr().out == "evaluating 2 models takes about 4 min, 2 at a time\n"
    # A model that was judged on some of the tasks says nothing of the others.
    expert.files["piqa"].path.write_text(json.dumps({"seconds": 60}))
    _say_duration(expert, [dense, expert], 90.0, Config())
    assert capsys.readouterr().out == ""
