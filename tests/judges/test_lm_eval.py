"""lm-eval's judgement of local files: against lm-eval's command line, its prompts word for word, and hand counts."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from statistics import mean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from seap_ray.errors import ConfigError, DataError
from seap_ray.judges import lm_eval
from seap_ray.judges.lm_eval_rows import hellaswag_parts
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.encoding import Encoding
from seap_ray.models.export import CheckpointExport
from seap_ray.tasks import BUILT_IN, Task
from tests.support import DATA
from tests.support.builders import load, random_ids, random_plan, write_compacted

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.skipif(not (DATA / "tasks").exists(), reason="needs the data sets of ../shared/data")
STORIES = DATA / "models" / "stories260k"

# Where each task's rows lie, and the split of a folder.
SOURCES = {
    "arc_easy": ("ai2_arc_easy", "test"),
    "arc_challenge": ("ai2_arc", "test"),
    "boolq": ("boolq", "test"),
    "gsm8k": ("gsm8k", "test"),
    "hellaswag": ("hellaswag/hellaswag_validation.jsonl", "validation"),
    "openbookqa": ("obqa", "test"),
    "piqa": ("piqa/plain_text_validation_0000.parquet", "validation"),
    "winogrande": ("winogrande/winogrande_m_validation_0000.parquet", "validation"),
}
METRICS = dict.fromkeys(SOURCES, "acc_norm") | dict.fromkeys(("arc_easy", "boolq", "winogrande"), "acc")
METRICS["gsm8k"] = "exact_match"
ARGUMENTS = {"samples": None, "seed": 0, "num_fewshot": 0, "batch_tokens": 2048}


def local(name: str, path: Path | None = None, split: str | None = None, **changes) -> Task:
    where, usual = SOURCES[name]
    changes |= {"path": str(path or DATA / "tasks" / where), "evaluation_split": split or usual}
    return BUILT_IN[name].model_copy(update=changes)


def rows_of(folder: str, split: str, n: int) -> list[dict]:
    (file,) = (DATA / "tasks" / folder).glob(f"*{split}*.parquet")
    return pq.read_table(file).slice(0, n).to_pylist()


def write(file: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture(scope="module")
def stories():
    """A model whose tokenizer lacks a padding token, which lm-eval then chooses."""
    return load(STORIES), Encoding(AutoTokenizer.from_pretrained(STORIES, pad_token=None))


@pytest.mark.parametrize("name", SOURCES)
def test_every_task_is_judged_on_local_files_in_silence_and_the_model_stays_as_it_was(name, stories, capfd, caplog):
    model, encoding = stories
    tokenizer = encoding.tokenizer
    ids = random_ids()
    before, padding = model(ids).logits, tokenizer.pad_token
    task = local(name)
    lm_eval.check(task)
    judged = lm_eval.judge(model, encoding, task, samples=6, seed=1, num_fewshot=None, batch_tokens=2048)

    assert (judged.metric, len(judged.values)) == (METRICS[name], 6)
    assert set(judged.values) <= {0.0, 1.0} and judged.value == mean(judged.values)
    assert torch.equal(model(ids).logits, before) and tokenizer.pad_token == padding
    assert capfd.readouterr() == ("", "") and not caplog.records


# --- lm-eval's own figures -------------------------------------------------------------------------------------------

N = 40


@pytest.mark.slow
def test_figures_are_those_of_the_command_line_on_the_same_rows(stories, tmp_path):
    by_hand, ours = tmp_path / "by_hand", tmp_path / "ours"
    by_hand.mkdir(), ours.mkdir()
    hellaswag = [json.loads(line) for line in (DATA / "tasks/hellaswag/hellaswag_train_3368.jsonl").open()][:N]
    examples = rows_of("ai2_arc_easy", "train", 50)
    cases = {
        # task: lm-eval's file, its rows, ours where they have another layout, examples, their number
        "arc_easy": ("arc/arc_easy", rows_of("ai2_arc_easy", "test", N), None, [], 0),
        "arc_challenge": ("arc/arc_challenge", rows_of("ai2_arc", "test", N), None, examples, 2),
        "piqa": ("piqa/piqa", rows_of("piqa", "validation", N), None, [], 0),
        "openbookqa": ("openbookqa/openbookqa", rows_of("obqa", "test", N), None, [], 0),
        "winogrande": ("winogrande/default", rows_of("winogrande", "validation", N), None, [], 0),
        "boolq": (
            "super_glue/boolq/default",
            [row | {"label": int(row["answer"])} for row in rows_of("boolq", "test", N)],
            rows_of("boolq", "test", N),
            [],
            0,
        ),
        "hellaswag": ("hellaswag/hellaswag", hellaswag, [llama_cpp(row) for row in hellaswag], [], 0),
    }
    for name, (file, rows, other, examples, shots) in cases.items():
        split = write(by_hand / f"{name}.parquet", rows)
        first = write(by_hand / f"{name}_examples.parquet", examples) if examples else split
        write(ours / f"{name}.parquet", other or rows)
        definition = {
            "include": str(Path(metadata.distribution("lm_eval").locate_file(f"lm_eval/tasks/{file}.yaml"))),
            "task": f"{name}_by_hand",
            "tag": [],
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": dict.fromkeys(("validation", "test"), str(split)) | {"train": str(first)}},
            "num_fewshot": shots,
        }
        (by_hand / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    figures = command_line(by_hand, [f"{name}_by_hand" for name in cases])
    for name, (*_, examples, shots) in cases.items():
        task = local(name, path=ours / f"{name}.parquet")
        if examples:
            task = task.model_copy(
                update={"path": str(by_hand / f"{name}_examples.parquet"), "evaluation_path": task.path}
            )
        judged = lm_eval.judge(*stories, task, **ARGUMENTS | {"num_fewshot": shots})
        theirs = figures[f"{name}_by_hand"]
        keys = (f"{METRICS[name]},none", f"{METRICS[name]}_stderr,none")
        assert (judged.value, judged.stderr) == tuple(theirs[key] for key in keys), name
        assert 0 < judged.value < 1, "chance, from which a wrong label or prompt would move it"


def llama_cpp(row: dict) -> dict:
    return {"ind": row["ind"], "query": f"{row['activity_label']}: {row['ctx']}"} | {
        key: row[key] for key in ("endings", "label")
    }


def command_line(folder: Path, tasks: list[str]) -> dict[str, dict[str, float]]:
    arguments = ["--model", "hf", "--model_args", f"pretrained={STORIES}", "--device", "cpu", "--batch_size", "8"]
    arguments += ["--tasks", *tasks, "--include_path", str(folder), "--output_path", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results*.json")
    return json.loads(results.read_text())["results"]


FIRST = {
    "arc_easy": lambda r: (f"Question: {r['question']}\nAnswer:", r["choices"]["text"], "ABCD".index(r["answerKey"])),
    "boolq": lambda r: (f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ["no", "yes"], int(r["answer"])),
    "openbookqa": lambda r: (r["question_stem"], r["choices"]["text"], "ABCD".index(r["answerKey"])),
    "piqa": lambda r: (f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]),
    "gsm8k": lambda r: (f"Question: {r['question']}\nAnswer:", None, r["answer"]),
}
FIRST["arc_challenge"] = FIRST["arc_easy"]


@pytest.mark.parametrize("name", FIRST)
def test_prompts_choices_and_answers_are_lm_evals(name):
    where, split = SOURCES[name]
    (row,) = rows_of(where.partition("/")[0], split, 1)
    lm_task = lm_eval._load_task(local(name), 0).lm_task
    doc = lm_task.eval_docs[0]
    choices = lm_task.doc_to_choice(doc) if lm_task.config.doc_to_choice else None

    assert (lm_task.doc_to_text(doc), choices, lm_task.doc_to_target(doc)) == FIRST[name](row)
    assert lm_task.fewshot_context(doc, 0) == FIRST[name](row)[0]


def test_winogrande_is_scored_on_what_follows_either_name():
    lm_task = lm_eval._load_task(local("winogrande"), 0).lm_task
    doc = lm_task.eval_docs[0]
    assert doc["sentence"] == "Sarah was a much better surgeon than Maria so _ always got the easier cases."

    requests = lm_task.construct_requests(doc=doc, ctx=lm_task.fewshot_context(doc, 0))
    assert [request.args for request in requests] == [
        (f"Sarah was a much better surgeon than Maria so {who}", " always got the easier cases.")
        for who in ("Sarah", "Maria")
    ]
    assert lm_task.doc_to_text(doc) == 1


def test_hellaswag_of_llama_cpp_is_prepared_as_lm_eval_prepares_its_own():
    lm_task = lm_eval._load_task(local("hellaswag"), 0).lm_task
    doc = lm_task.eval_docs[0]
    assert lm_task.doc_to_text(doc) == "Roof shingle removal: A man is sitting on a roof. He"
    assert lm_task.doc_to_choice(doc)[3] == "starts pulling up roofing on a roof." and lm_task.doc_to_target(doc) == 3

    for line in (DATA / "tasks/hellaswag/hellaswag_train_3368.jsonl").open():
        row = json.loads(line)
        parts = {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b")}
        assert hellaswag_parts(llama_cpp(row)) == parts


def test_a_generated_number_is_judged_by_the_strict_filter(stories, tmp_path, monkeypatch):
    model, encoding = stories
    written = encoding.tokenizer("#### 42 or 7", add_special_tokens=False, return_tensors="pt").input_ids
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, written.expand(len(input_ids), -1)], 1)
    )
    rows = [{"question": "How many?", "answer": f"So many. #### {number}"} for number in ("42", "7", "42")]
    task = local("gsm8k", write(tmp_path / "test.parquet", rows))
    judged = lm_eval.judge(*stories, task, **ARGUMENTS)

    assert (judged.metric, judged.values, judged.value) == ("exact_match", (1.0, 0.0, 1.0), pytest.approx(2 / 3))
    assert judged.stderr == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)


# --- rows and examples -----------------------------------------------------------------------------------------------


def test_samples_are_drawn_from_all_rows_by_the_seed_and_keep_their_order(stories, tmp_path):
    task = local("arc_easy", write(tmp_path / "test.parquet", rows_of("ai2_arc_easy", "test", 40)))
    whole = lm_eval.judge(*stories, task, **ARGUMENTS)
    drawn = {seed: lm_eval._draw(list(range(40)), 10, seed) for seed in range(5)}

    assert len({tuple(rows) for rows in drawn.values()}) == 5 and max(map(max, drawn.values())) >= 35
    for seed in (0, 1):
        judged = lm_eval.judge(*stories, task, **ARGUMENTS | {"samples": 10, "seed": seed})
        assert judged.values == tuple(whole.values[row] for row in drawn[seed])

    assert lm_eval.judge(*stories, task, **ARGUMENTS | {"samples": 40}) == whole
    assert lm_eval.judge(*stories, task, **ARGUMENTS | {"batch_tokens": 1}) == whole


def test_examples_come_from_the_calibration_split_and_else_from_other_rows(tmp_path):
    rows = rows_of("ai2_arc_easy", "test", 4)
    alone = local("arc_easy", write(tmp_path / "test.parquet", rows))
    with_train = local("arc_easy")
    train = {row["question"] for row in rows_of("ai2_arc_easy", "train", 10**6)}
    for task, pool in ((alone, {row["question"] for row in rows}), (with_train, train)):
        lm_task = lm_eval._load_task(task, 2).lm_task
        for row in rows:
            doc = next(doc for doc in lm_task.eval_docs if doc["question"] == row["question"])
            *examples, last = lm_task.fewshot_context(doc, 2).split("Question: ")[1:]
            shown = {text.partition("\nAnswer: ")[0] for text in examples}
            assert last == f"{row['question']}\nAnswer:"
            assert len(shown) == 2 and shown <= pool - {row["question"]}


def test_the_number_of_examples_is_lm_evals_unless_it_is_given():
    shots = [lm_eval._load_task(local("gsm8k"), n).lm_task.config.num_fewshot for n in (None, 0, 3)]
    assert shots == [5, 0, 3] and lm_eval._load_task(local("piqa"), None).lm_task.config.num_fewshot == 0


def test_a_fingerprint_tells_other_files_and_metrics_apart(tmp_path):
    rows = rows_of("ai2_arc_easy", "test", 4)
    task = local("arc_easy", write(tmp_path / "test.parquet", rows))
    before = lm_eval.fingerprint_of(task)

    assert json.loads(json.dumps(before)) == before == lm_eval.fingerprint_of(task)
    assert before != lm_eval.fingerprint_of(task.model_copy(update={"metric": "acc_norm"}))

    write(tmp_path / "test.parquet", rows[:3])
    assert before != lm_eval.fingerprint_of(task)


def test_a_compacted_model_is_judged_and_writes_answers(dense, tmp_path):
    import seap_ray.models.hf  # noqa: F401

    checkpoint = Checkpoint.open(str(dense("llama_gqa")))
    plan = random_plan(checkpoint.architecture, seed=1)
    folder = write_compacted(CheckpointExport(checkpoint, plan, {}), tmp_path / "expert")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, eos_token="<unk>")
    before = model(random_ids()).logits

    assert model.config.model_type == "seap_llama"
    for name in ("gsm8k", "arc_easy"):
        judged = lm_eval.judge(model, Encoding(tokenizer), local(name), **ARGUMENTS | {"samples": 5})
        assert 0 <= judged.value <= 1 and len(judged.values) == 5

    assert torch.equal(model(random_ids()).logits, before)


# --- what cannot be judged -------------------------------------------------------------------------------------------

PIQA = {"goal": "Boil water", "sol1": "Heat it", "sol2": "Cool it", "label": 0}
WINOGRANDE = {"sentence": "Ann met Eve as _ left.", "option1": "Ann", "option2": "Eve", "answer": "1"}


def without(row: dict, *columns: str) -> dict:
    return {key: value for key, value in row.items() if key not in columns}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", without(PIQA, "label", "sol2"), "FILE has no column(s) label, sol2, which lm-eval's task piqa needs"),
        ("piqa", PIQA | {"label": -1}, "FILE has no row with a right answer among its first 1,000"),
        ("arc_easy", {"question": "q", "label": 1}, "FILE has no column(s) answerKey, choices, which"),
        ("openbookqa", {"question": "q"}, "FILE has no column(s) answerKey, choices, question_stem, which"),
        ("boolq", {"passage": "p", "question": "q"}, "FILE has no column(s) label, which lm-eval's task boolq needs"),
        ("winogrande", without(WINOGRANDE, "answer"), "FILE has no column(s) answer, which"),
        ("winogrande", WINOGRANDE | {"answer": ""}, "the first row of FILE does not fit lm-eval's task winogrande"),
        ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": 0}, "FILE has no column(s) ctx_a, which"),
        ("hellaswag", {"query": "a: b", "endings": ["a", "b"], "label": ""}, "does not fit lm-eval's task hellaswag"),
        ("arc_easy", None, "FILE has no rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_a_line(name, row, message, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(row) if row else "")
    with pytest.raises(DataError) as refused:
        lm_eval.check(local(name, file))
    text = str(refused.value)
    assert text.startswith(f"tasks.{name}: ") and message.replace("FILE", str(file)) in text and "\n" not in text


def test_rows_that_fit_are_not_refused(tmp_path):
    for name, row in (("piqa", PIQA), ("winogrande", WINOGRANDE)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row))
        lm_eval.check(local(name, file))
    lm_eval.check(local("gsm8k", lm_eval="gsm8k_cot"))  # its template goes without a column that it names


def test_another_task_of_lm_evals_on_local_files_keeps_its_own_examples():
    lm_task = lm_eval._load_task(local("gsm8k", lm_eval="gsm8k_cot"), None).lm_task
    context = lm_task.fewshot_context(lm_task.eval_docs[0], lm_task.config.num_fewshot)
    assert context.startswith("Q: There are 15 trees in the grove.") and context.count("Q: ") == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_eval": "arc_esy"}, r"tasks\.piqa\.lm_eval: lm-eval has no task 'arc_esy'; near it are .*arc_easy"),
        ({"lm_eval": "ai2_arc"}, r"lm-eval has no task 'ai2_arc'"),
        ({"lm_eval": "qqqqqqqqqqqqqqq"}, r"`lm-eval ls tasks` lists them"),
        ({"metric": "exact_match"}, r"tasks\.piqa\.metric: lm-eval's task piqa has no exact_match, but acc, acc_norm"),
    ],
)
def test_what_lm_eval_does_not_have_is_refused_in_a_line(changes, message):
    with pytest.raises(ConfigError, match=message) as refused:
        lm_eval.check(local("piqa").model_copy(update=changes))
    assert "\n" not in str(refused.value)


def test_without_lm_eval_a_line_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    for call in (lm_eval.version, lambda: lm_eval.check(local("piqa")), lambda: lm_eval.fingerprint_of(local("piqa"))):
        with pytest.raises(
            ConfigError, match=r"^lm-eval is not installed: python3 -m seap_ray\.install --extras eval$"
        ):
            call()


def test_the_hub_is_asked_only_to_judge_and_where_it_fails_a_line_names_the_way_out(stories, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    task = BUILT_IN["piqa"]
    lm_eval.check(task)

    assert lm_eval.fingerprint_of(task)[-1] == []
    with pytest.raises(DataError) as failed:
        lm_eval.judge(*stories, task, **ARGUMENTS)
    assert str(failed.value) == (
        "tasks.piqa: the hub did not give the rows of lm-eval's task piqa (no hub); "
        "a local copy works: tasks=[{name: piqa, evaluation_path: FOLDER}]"
    )
