"""lm-eval's judgement of local files: against lm-eval's command line, its prompts word for word, and hand counts."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from seap_ray.errors import ConfigError, DataError
from seap_ray.judges import lm_eval
from seap_ray.judges.lm_eval_rows import RowSplit, hellaswag_parts
from seap_ray.judges.scoring import score
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Renderer, held_out_rows
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
PIQA = {"goal": "Boil water", "sol1": "Heat it", "sol2": "Cool it", "label": 0}
WINOGRANDE = {"sentence": "Ann met Eve as _ left.", "option1": "Ann", "option2": "Eve", "answer": "1"}
HELLASWAG = {"activity_label": "a", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["eats.", "flies."], "label": 0}
ARGUMENTS = {"samples": None, "seed": 0, "num_fewshot": 0, "batch_tokens": 2048}


def local(name: str, path: Path | None = None, split: str | None = None, **changes) -> Task:
    where, usual = SOURCES[name]
    changes |= {"path": str(path or DATA / "tasks" / where), "evaluation_split": split or usual}
    return BUILT_IN[name].model_copy(update=changes)


def load_task(task: Task, *arguments):
    with lm_eval._nulls_are_empty():
        return lm_eval._load_task(task, *arguments).lm_task


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
@pytest.mark.parametrize("is_chat", [False, True], ids=["plain", "chat"])
def test_figures_are_those_of_the_command_line_on_the_same_rows(is_chat, stories, tmp_path):
    model_folder = tmp_path / "model"
    shutil.copytree(STORIES, model_folder)
    # lm-eval counts white space at the prompt's end to the answer, so this template has none there.
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant:"
    tokenizer = AutoTokenizer.from_pretrained(STORIES, chat_template=template)
    tokenizer.save_pretrained(model_folder)
    judges = (stories[0], Encoding(tokenizer, is_chat))

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
    figures = command_line(model_folder, by_hand, [f"{name}_by_hand" for name in cases], is_chat=is_chat)
    for name, (*_, examples, shots) in cases.items():
        task = local(name, path=ours / f"{name}.parquet")
        if examples:
            task = task.model_copy(
                update={"path": str(by_hand / f"{name}_examples.parquet"), "evaluation_path": task.path}
            )
        judged = lm_eval.judge(*judges, task, **ARGUMENTS | {"num_fewshot": shots})
        theirs = figures[f"{name}_by_hand"]
        keys = (f"{METRICS[name]},none", f"{METRICS[name]}_stderr,none")
        assert (judged.value, judged.stderr) == tuple(theirs[key] for key in keys), name
        assert 0 < judged.value < 1, "chance, from which a wrong label or prompt would move it"


def llama_cpp(row: dict) -> dict:
    return {"ind": row["ind"], "query": f"{row['activity_label']}: {row['ctx']}"} | {
        key: row[key] for key in ("endings", "label")
    }


def command_line(model: Path, folder: Path, tasks: list[str], *, is_chat: bool) -> dict[str, dict[str, float]]:
    arguments = ["--model", "hf", "--model_args", f"pretrained={model}", "--device", "cpu", "--batch_size", "8"]
    arguments += ["--apply_chat_template"] if is_chat else []
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
    lm_task = load_task(local(name), 0)
    doc = lm_task.eval_docs[0]
    choices = lm_task.doc_to_choice(doc) if lm_task.config.doc_to_choice else None

    assert (lm_task.doc_to_text(doc), choices, lm_task.doc_to_target(doc)) == FIRST[name](row)
    assert lm_task.fewshot_context(doc, 0) == FIRST[name](row)[0]


def test_winogrande_is_scored_on_what_follows_either_name():
    lm_task = load_task(local("winogrande"), 0)
    doc = lm_task.eval_docs[0]
    assert doc["sentence"] == "Sarah was a much better surgeon than Maria so _ always got the easier cases."

    requests = lm_task.construct_requests(doc=doc, ctx=lm_task.fewshot_context(doc, 0))
    assert [request.args for request in requests] == [
        (f"Sarah was a much better surgeon than Maria so {who}", " always got the easier cases.")
        for who in ("Sarah", "Maria")
    ]
    assert lm_task.doc_to_text(doc) == 1


def test_hellaswag_of_llama_cpp_is_prepared_as_lm_eval_prepares_its_own():
    lm_task = load_task(local("hellaswag"), 0)
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
        lm_task = load_task(task, 2)
        for row in rows:
            doc = next(doc for doc in lm_task.eval_docs if doc["question"] == row["question"])
            *examples, last = lm_task.fewshot_context(doc, 2).split("Question: ")[1:]
            shown = {text.partition("\nAnswer: ")[0] for text in examples}
            assert last == f"{row['question']}\nAnswer:"
            assert len(shown) == 2 and shown <= pool - {row["question"]}


def test_the_number_of_examples_is_lm_evals_unless_it_is_given():
    shots = [load_task(local("gsm8k"), n).config.num_fewshot for n in (None, 0, 3)]
    assert shots == [5, 0, 3] and load_task(local("piqa"), None).config.num_fewshot == 0


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


def test_likelihoods_are_those_of_lm_evals_own_loop_and_go_to_its_cache(stories):
    from lm_eval.models.huggingface import HFLM

    model, encoding = stories
    random_ = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [random_.randrange(3, 500) for _ in range(n)]

    requests = []
    for n in (1, 7, 40, 200):
        context = tokens(n)
        choices = [tokens(5), tokens(1), tokens(3), tokens(1)]
        choices += [choices[0][:1], [*choices[0], 9], choices[0]]
        for choice in choices:
            requests.append(((f"question {n}", f"answer {len(requests)}"), context, choice))
    # What lm-eval asks for where it scores a text as a whole has no texts.
    requests.append((None, tokens(3), tokens(50)))

    lm = lm_eval.wrap(model, encoding, 256)
    cached = []
    lm.cache_hook = SimpleNamespace(add_partial=lambda _kind, texts, answer: cached.append((texts, answer)))
    answers = lm._loglikelihood_tokens(requests)
    own = HFLM(model, tokenizer=copy.deepcopy(encoding.tokenizer), batch_size=4)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    for (value, is_greedy), (own_value, own_is_greedy) in zip(answers, own, strict=True):
        assert value == pytest.approx(own_value, abs=1e-4, rel=1e-6) and is_greedy == own_is_greedy
    assert cached == [(request[0], answer) for request, answer in zip(requests, answers, strict=True)][:-1]

    for end in ([], tokens(model.config.max_position_embeddings + 1)):
        with pytest.raises(DataError, match=rf"^an answer has {len(end)} tokens, and the model 512 positions"):
            lm._loglikelihood_tokens([(None, [1], end)])


def test_the_likelihood_of_a_whole_text_is_that_of_lm_evals_own_loop(stories):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, encoding = stories
    text = " ".join(f"word{i}" for i in range(200))
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    own = HFLM(model, tokenizer=copy.deepcopy(encoding.tokenizer), batch_size=2)
    # The ids of both are those of the project.
    own.tok_encode = encoding.ids
    expected = own.loglikelihood_rolling([request], disable_tqdm=True)

    assert len(encoding.ids(text)) > model.config.max_position_embeddings
    lm = lm_eval.wrap(model, encoding, 2048)
    assert lm.loglikelihood_rolling([request], disable_tqdm=True) == [pytest.approx(expected[0], rel=1e-5)]


def test_answers_are_generated_in_batches_that_the_longest_prompt_allows(stories, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    model, encoding = stories
    monkeypatch.setattr(HFLM, "generate_until", lambda _, requests: ["" for _ in requests])
    # lm-eval's 256 new tokens are half of this context.
    assert model.config.max_position_embeddings == 512

    for text, batch_tokens, batch_size in (("a", 2048, 7), ("word " * 600, 2048, 4), ("a", 8, 1)):
        lm = lm_eval.wrap(model, encoding, batch_tokens)
        assert lm.max_gen_toks == 256
        assert lm.generate_until([SimpleNamespace(args=("a", {})), SimpleNamespace(args=(text, {}))]) == ["", ""]
        assert lm.batch_size_per_gpu == batch_size


def test_lm_eval_is_imported_by_what_needs_it_alone():
    code = "import sys, seap_ray.judges.lm_eval; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- token ids -------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {"without a beginning token": CHATML, "with a beginning token": "{{ bos_token }}" + CHATML}
BOS, EOS = 1, 2
ADDED = {
    "none": ("$A", []),
    "bos": ("<s> $A", [BOS]),
    "eos": ("$A </s>", []),
    "both": ("<s> $A </s>", [BOS]),
}
QUESTION = "Question: {{ goal }}\nAnswer:"


def tokenizer_that_adds(single: str, template: str | None = None) -> PreTrainedTokenizerFast:
    raw = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **named)


@pytest.fixture
def scored(monkeypatch):
    """Token ids that lm-eval gives to the model: of a choice prompt and answer, of a generated answer the prompt."""
    from lm_eval.models.huggingface import HFLM

    from seap_ray.judges import lm_eval_model

    texts, pairs, prompts = [], [], []

    wrap = lm_eval.wrap

    def recording_wrap(*arguments):
        lm = wrap(*arguments)
        score_requests = lm._loglikelihood_tokens

        def recorded_requests(requests, **settings):
            texts.extend(request[0] for request in requests)
            return score_requests(requests, **settings)

        lm._loglikelihood_tokens = recorded_requests
        return lm

    def recorded_score(model, continuations, **settings):
        for ids, start in continuations:
            pairs.append((texts.pop(0), ids[:start], ids[start:]))
        return score(model, continuations, **settings)

    def recorded_generate(lm, context, attention_mask, **_):
        prompts.extend(ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True))
        return torch.cat([context, torch.full((len(context), 1), EOS)], 1)

    monkeypatch.setattr(lm_eval, "wrap", recording_wrap)
    monkeypatch.setattr(lm_eval_model, "score", recorded_score)
    monkeypatch.setattr(HFLM, "_model_generate", recorded_generate)
    return pairs, prompts


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_in_a_chat_a_question_has_the_ids_that_it_has_everywhere(added, template, system, stories, scored, tmp_path):
    model, _ = stories
    encoding = Encoding(tokenizer_that_adds(ADDED[added][0], template), is_chat=True)
    pairs, prompts = scored
    rows = [PIQA, PIQA | {"goal": "Dry a coat", "sol2": "In the sun. It is a longer answer"}]
    task = local("piqa", write(tmp_path / "test.parquet", rows), question=QUESTION, system=system)
    lm_eval.judge(model, encoding, task, **ARGUMENTS)

    items = [Renderer(task).item(row) for row in rows]
    given = {texts: (context, end) for texts, context, end in pairs}
    for item in items:
        for choice in item.choices:
            context, end = given.pop((encoding.prompt_text(item), choice))
            assert context == encoding.prompt(item) and (context + end, len(context)) == encoding.continuation(
                item, choice
            )
            assert (context + end).count(BOS) == template.startswith("{{ bos")
    assert not given

    question = {"question": PIQA["goal"], "answer": "So many. #### 42"}
    asked = local("gsm8k", write(tmp_path / "gsm8k.parquet", [question]), system=system)
    asked = asked.model_copy(update={"question": "Question: {{ question }}\nAnswer:"})
    lm_eval.judge(model, encoding, asked, **ARGUMENTS)
    assert prompts == [encoding.prompt(Renderer(asked).item(question))]
    assert prompts == [encoding.prompt(items[0])]


def test_in_a_chat_examples_are_turns(stories, scored, tmp_path):
    model, _ = stories
    encoding = Encoding(tokenizer_that_adds("<s> $A", CHATML), is_chat=True)
    rows = [PIQA | {"goal": f"Boil {n}"} for n in ("milk", "oil", "tea")]
    task = local("piqa", write(tmp_path / "test.parquet", rows))
    lm_eval.judge(model, encoding, task, **ARGUMENTS | {"num_fewshot": 2})

    pairs, _ = scored
    # Tokens of these templates are not merged over the ends of turns.
    text = pairs[0][0][0]
    assert text.count("<|user|>\nQuestion: Boil") == 3 and text.count("<|assistant|>\nHeat it</s>") == 2
    assert text.endswith("Answer:</s>\n<|assistant|>\n")
    assert {tuple(context) for (text, _), context, _ in pairs} == {
        tuple(encoding.tokenizer(text, add_special_tokens=False).input_ids) for (text, _), _, _ in pairs
    }


@pytest.mark.parametrize("added", ADDED)
def test_outside_a_chat_there_is_one_beginning_token_at_most_and_no_end_token(added, stories, scored, tmp_path):
    model, _ = stories
    single, beginning = ADDED[added]
    encoding = Encoding(tokenizer_that_adds(single, CHATML))
    pairs, prompts = scored
    piqa = local("piqa", write(tmp_path / "test.parquet", [PIQA, PIQA | {"goal": "<s>Boil"}]), system="Be brief.")
    lm_eval.judge(model, encoding, piqa, **ARGUMENTS)
    gsm8k = local("gsm8k", write(tmp_path / "gsm8k.parquet", [{"question": "How many?", "answer": "#### 42"}] * 2))
    lm_eval.judge(model, encoding, gsm8k, **ARGUMENTS)

    for (context_text, end_text), context, end in pairs:
        bare = encoding.tokenizer(context_text + end_text, add_special_tokens=False).input_ids
        assert context + end == beginning + bare and end and EOS not in context + end
    assert prompts == [encoding.ids("Question: How many?\nAnswer:")] * 2
    assert prompts[0][: len(beginning)] == beginning and EOS not in prompts[0]


def test_what_a_tokenizer_appends_does_not_change_a_figure(stories, tmp_path):
    model, _ = stories
    task = local("arc_easy", write(tmp_path / "test.parquet", rows_of("ai2_arc_easy", "test", 12)))
    plain, ended = (Encoding(tokenizer_that_adds(ADDED[name][0])) for name in ("bos", "both"))
    assert lm_eval.judge(model, ended, task, **ARGUMENTS) == lm_eval.judge(model, plain, task, **ARGUMENTS)


def test_a_prompt_that_is_too_long_loses_its_beginning_but_for_the_beginning_token(stories, scored, tmp_path):
    model, encoding = stories
    pairs, prompts = scored
    long = " ".join(f"word{i}" for i in range(400))
    lm_eval.judge(model, encoding, local("piqa", write(tmp_path / "a.parquet", [PIQA | {"goal": long}])), **ARGUMENTS)
    gsm8k = write(tmp_path / "b.parquet", [{"question": long, "answer": "#### 42"}])
    lm_eval.judge(model, encoding, local("gsm8k", gsm8k), **ARGUMENTS)

    whole = encoding.ids(f"Question: {long}\nAnswer:")
    for context in (pairs[0][1], prompts[0]):
        assert context[0] == BOS and BOS not in context[1:] and len(context) < len(whole)
        assert context[-50:] == whole[-50:]
    assert len(pairs[0][1] + pairs[0][2]) == model.config.max_position_embeddings + 1


def test_a_prompt_of_mere_space_is_the_beginning_token(stories):
    model, encoding = stories
    lm = lm_eval.wrap(model, encoding, 2048)
    context, end = lm._encode_pair("\n", "Paris")
    assert context == [BOS] and lm.tok_decode(end) in ("\nParis", "Paris") and lm.prefix_token_id == BOS


def test_a_system_message_reaches_nothing_but_texts():
    with pytest.raises(
        ConfigError, match=r"^tasks\.piqa\.system: access to attribute '__class__' of 'str' object is unsafe"
    ):
        lm_eval.check(local("piqa", system="{{ ''.__class__ }}"))


def test_a_system_message_that_depends_on_the_row_is_refused():
    with pytest.raises(
        ConfigError, match=r"^tasks\.piqa\.system: lm-eval has one system message for all rows, and"
    ) as no:
        lm_eval.check(local("piqa", system="You know {{ topic }}."))
    assert "topic" in str(no.value) and "lm_eval: null" in str(no.value)

    fixed = local("piqa", system="Be {{ 'brief' }}.")
    lm_eval.check(fixed)
    assert lm_eval.fingerprint_of(fixed) != lm_eval.fingerprint_of(local("piqa"))


# --- values ----------------------------------------------------------------------------------------------------------


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def docs_of(task: Task) -> tuple[list[dict], object]:
    lm_task = load_task(task, 0)
    return list(lm_task.eval_docs), lm_task


def test_rows_have_the_values_of_their_file_whatever_their_neighbours(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(
        '{"goal": "Add", "sol1": "02108", "sol2": 5, "label": 0, "score": 2.50, "seen": true}\n'
        '{"goal": 1984, "sol1": 2.5, "sol2": null, "label": "1", "score": 123456789012345678901, "seen": 1}\n'
        '{"goal": null, "sol1": "a", "sol2": "b", "label": "b", "day": "2024-01-05"}\n'
    )
    docs, lm_task = docs_of(local("piqa", file))

    assert [doc["seen"] for doc in docs] == [True, 1, None] and docs[0]["seen"] is True
    assert [str(doc["score"]) for doc in docs] == ["2.50", "123456789012345678901", "None"]
    assert docs[0]["day"] is None and docs[2]["day"] == "2024-01-05"
    with lm_eval._nulls_are_empty():
        assert [lm_task.doc_to_text(doc) for doc in docs] == [
            "Question: Add\nAnswer:",
            "Question: 1984\nAnswer:",
            "Question: \nAnswer:",
        ]
        assert [lm_task.doc_to_choice(doc) for doc in docs] == [["02108", "5"], ["2.5", ""], ["a", "b"]]
    assert [lm_task.doc_to_target(doc) for doc in docs] == [0, 1, "b"]


def test_cells_of_a_csv_file_are_texts_and_an_index_among_them_is_one(stories, tmp_path):
    piqa, winogrande = tmp_path / "piqa.csv", tmp_path / "winogrande.csv"
    piqa.write_text('goal,sol1,sol2,label\nBoil water,Heat it,Cool it,0\nDry,"In the sun,\nor wind",At night,1\n')
    winogrande.write_text("sentence,option1,option2,answer\nAnn met Eve as _ left.,Ann,Eve,2\n")
    boolq = tmp_path / "boolq.csv"
    boolq.write_text(
        "passage,question,answer\nSnow is white.,is snow white,True\nIt is.,is it not,false\nIt is.,is it,\n"
    )

    targets = {"piqa": [0, 1], "winogrande": [1], "boolq": [1, 0, None]}
    for file in (piqa, winogrande, boolq):
        task = local(file.stem, file)
        lm_eval.check(task)
        docs, lm_task = docs_of(task)
        target = lm_task.doc_to_text if lm_task.multiple_input else lm_task.doc_to_target
        assert [target(doc) for doc in docs] == targets[file.stem]
        answered = [target for target in targets[file.stem] if target is not None]
        assert len(lm_eval.judge(*stories, task, **ARGUMENTS).values) == len(answered)


def test_a_row_that_a_task_changes_is_read_unchanged_the_next_time():
    split = RowSplit([{"a": [1], "b": 2}, {"a": [3]}])
    changed = split.map(lambda row: row["a"].append(9) or {"b": row["a"]})

    assert list(changed) == [{"a": [1], "b": [1, 9]}, {"a": [3], "b": [3, 9]}]
    assert list(split) == [{"a": [1], "b": 2}, {"a": [3], "b": None}] and list(split.features) == ["a", "b"]


def test_a_split_has_what_tasks_ask_of_a_data_set():
    rows = [{"a": n, "b": str(n)} for n in range(4)]
    split, dataset = RowSplit(rows), Dataset.from_list(rows)
    for ask in (
        lambda rows: rows.map(lambda row: {"c": row["a"] + 1}, remove_columns=["b"]),
        lambda rows: rows.map(lambda row, i: {"c": i}, with_indices=True),
        lambda rows: rows.map(lambda row: None),
        lambda rows: rows.filter(lambda row: row["a"] > 1),
        lambda rows: rows.filter(lambda row, i: i > 1, with_indices=True),
        lambda rows: rows.map(lambda rows: {"c": rows["a"]}, batched=True),
        lambda rows: rows.select([2, 0]),
        lambda rows: rows.rename_column("a", "c"),
    ):
        assert list(ask(split)) == list(ask(dataset)) and list(ask(split).features) == list(ask(dataset).features)
    assert split["b"] == dataset["b"][:] and split[1:3] == dataset[1:3] and split[-1] == dataset[-1]
    assert split.column_names == dataset.column_names


# --- rows that are not judged ----------------------------------------------------------------------------------------


def test_rows_that_may_not_be_judged_are_left_out_and_counted(stories, tmp_path):
    rows = rows_of("ai2_arc_easy", "test", 20)
    file = write(tmp_path / "test.parquet", rows)
    whole = lm_eval.judge(*stories, local("arc_easy", file), **ARGUMENTS)
    even = {row["question"] for row in rows[::2]}

    def is_held_out(row: dict) -> bool:
        return row["question"] in even

    # Calibrated from other files, so that none is split off.
    task = local("arc_easy").model_copy(update={"evaluation_path": str(file)})
    judged = lm_eval.judge(*stories, task, **ARGUMENTS, is_held_out=is_held_out)
    assert judged.values == whole.values[::2]
    assert lm_eval.count_rows(task, is_held_out) == lm_eval.RowCounts(20, {"calibrated": 10})
    assert lm_eval.count_rows(task) == lm_eval.RowCounts(20, {})

    with pytest.raises(DataError, match=r"^tasks\.arc_easy: no row is left to judge"):
        lm_eval.judge(*stories, task, **ARGUMENTS, is_held_out=lambda row: False)


def test_rows_of_the_corpus_are_judged_only_where_they_are_held_out(stories, tmp_path):
    rows = rows_of("ai2_arc_easy", "test", 60)
    file = write_lines(tmp_path / "rows.jsonl", rows + rows[:5])
    task = BUILT_IN["arc_easy"].model_copy(update={"path": str(file)})
    is_held_out = held_out_rows(task, seed=0)
    held_out = [row for row in rows + rows[:5] if is_held_out(row)]
    assert 0 < len(held_out) < 30

    judged = lm_eval.judge(*stories, task, **ARGUMENTS, is_held_out=is_held_out)
    assert len(judged.values) == len(held_out)
    assert lm_eval.count_rows(task, is_held_out) == lm_eval.RowCounts(65, {"left": 65 - len(held_out)})

    # Examples are rows that were calibrated on.
    lm_task = load_task(task, 2, is_held_out)
    assert {doc["question"] for doc in lm_task.sampler.df}.isdisjoint(row["question"] for row in held_out)

    recall = task.model_copy(update={"held_out": False})
    assert held_out_rows(recall, seed=0) is None
    assert len(lm_eval.judge(*stories, recall, **ARGUMENTS).values) == 65


def test_examples_are_none_of_the_judged_rows_even_where_these_lie_in_both_files(tmp_path):
    rows = rows_of("ai2_arc_easy", "test", 6)
    train, test = write(tmp_path / "train.parquet", rows), write(tmp_path / "test.parquet", rows[:3])
    task = local("arc_easy", train).model_copy(update={"evaluation_path": str(test)})
    lm_task = load_task(task, 2)
    assert {doc["question"] for doc in lm_task.sampler.df} == {row["question"] for row in rows[3:]}


def test_rows_without_a_right_answer_are_left_out_and_counted_wherever_they_are(stories, tmp_path):
    good = [PIQA, PIQA | {"goal": "Dry a coat"}, PIQA | {"goal": "Cut bread", "label": 1}]
    bad = [PIQA | {"label": -1}, PIQA | {"label": None}, PIQA | {"label": 2}, PIQA | {"sol2": ""}]
    task = local("piqa", write_lines(tmp_path / "test.jsonl", [*bad[:2], *good[:2], *bad[2:], good[2]]))
    lm_eval.check(task)
    judged = lm_eval.judge(*stories, task, **ARGUMENTS)
    alone = lm_eval.judge(*stories, local("piqa", write_lines(tmp_path / "good.jsonl", good)), **ARGUMENTS)

    assert judged == alone and len(judged.values) == 3
    assert lm_eval.count_rows(task) == lm_eval.RowCounts(7, {"wrong_answer": 4})
    # Examples have right answers, too.
    shown = load_task(task, 1).sampler.df
    assert [doc["goal"] for doc in shown] == [row["goal"] for row in good]


@pytest.mark.parametrize(
    ("name", "good", "odd"),
    [
        ("winogrande", WINOGRANDE, {"answer": ""}),
        ("winogrande", WINOGRANDE, {"sentence": None}),
        ("hellaswag", HELLASWAG, {"label": ""}),
    ],
)
def test_an_odd_row_costs_no_other_its_judgement(name, good, odd, stories, tmp_path):
    for rows in ([good | odd, good, good], [good, good | odd, good]):
        task = local(name, write_lines(tmp_path / "test.jsonl", rows))
        lm_eval.check(task)
        assert len(lm_eval.judge(*stories, task, **ARGUMENTS).values) == 2
        assert lm_eval.count_rows(task) == lm_eval.RowCounts(3, {"wrong_answer": 1})


def test_generated_answers_are_not_compared_with_an_empty_one(stories, tmp_path):
    rows = [{"question": "How many?", "answer": answer} for answer in ("#### 42", "", None)]
    task = local("gsm8k", write_lines(tmp_path / "test.jsonl", rows))
    assert len(lm_eval.judge(*stories, task, **ARGUMENTS).values) == 1
    assert lm_eval.count_rows(task) == lm_eval.RowCounts(3, {"no_answer": 2})


def test_piqa_is_right_on_the_same_rows_by_either_judge():
    """113 of its rows have spaces around choices that the answers have lost."""
    task = local("piqa", question=QUESTION)
    file = DATA / "tasks" / SOURCES["piqa"][0]
    items = [Renderer(task).item(row) for row in pq.read_table(file).to_pylist()]
    docs, lm_task = docs_of(task)
    golds = [lm_task.doc_to_target(doc) for doc in docs]

    spaced = [item for item in items if item.answer not in item.choices]
    assert len(spaced) == 113
    # Of two choices with one text the first is the right one to us.
    assert all(item.is_right(gold) for item, gold in zip(items, golds, strict=True))
    assert sum(item.gold != gold for item, gold in zip(items, golds, strict=True)) <= 2
    assert lm_eval.count_rows(task).counts == {}


# --- what cannot be judged -------------------------------------------------------------------------------------------


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
    lm_task = load_task(local("gsm8k", lm_eval="gsm8k_cot"), None)
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
