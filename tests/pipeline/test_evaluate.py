"""Tasks to evaluate: the names of results stand for all that the figures depend on, and rows are counted."""

import json
import shutil
from pathlib import Path

import pytest

from seap_ray.config import Config
from seap_ray.pipeline.evaluate import EvalTask, eval_task
from seap_ray.storage.run import Run
from seap_ray.tasks import Task
from tests.support import DATA

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
    file = model.parent / "rows.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # The same file at the same time is the same rows.
    if not file.exists() or file.read_text() != lines:
        file.write_text(lines)

    templates = {"question": "{{ goal }}", "answer": "{{ [sol1, sol2][label | int] }}", "choices": "[sol1, sol2]"}
    fields = {"name": "piqa", "path": str(file), "lm_eval": "piqa", "held_out": False, **templates, **changes}
    settings = {"model": {"source": str(model)}, "corpus": {"chat": chat}, "tasks": [Task(**fields)]}
    config = Config.model_validate(settings)
    return eval_task(config, Run(model.parent / "run"), config.tasks[0], by_lm_eval=True)


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
