"""Quality: log-likelihoods against a plain forward pass, metrics against hand counts, what the demo can do."""

import copy
import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from seap_ray.demo import skills
from seap_ray.errors import DataError
from seap_ray.judges.quality import Quality, _cut, _is_right, measure
from seap_ray.judges.scoring import Scored, score
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, Renderer, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.models.loading import decoder_of
from seap_ray.pipeline.results import own_task_rows
from seap_ray.progress import progress
from seap_ray.report.rows import FailedCell, ModelRow, QualityCell, Results
from seap_ray.report.table import mean_quality, table
from seap_ray.tasks import BUILT_IN, Task
from tests.support.builders import load, random_ids


@pytest.fixture(scope="module")
def demo():
    checkpoint = Checkpoint.open("demo")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    return model, load_tokenizer(checkpoint.folder)


def items(skill: str, n: int) -> list[Item]:
    renderer = Renderer(BUILT_IN[skill])
    return [renderer.item(dict(row)) for row in skills.rows(skill, n, split="test", seed=0)]


PAIRS = [("12 + 34 =", "46"), ("reverse abcd:", "dcba"), ("", "The capital of France is Paris"), ("sort cab:", "xyz")]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_a_continuation_is_scored_as_one_forward_pass_over_it_alone_would(demo, batch_tokens):
    model, tokenizer = demo
    encoding = Encoding(tokenizer)
    encoded = [encoding.continuation(Item("", context, "", []), continuation) for context, continuation in PAIRS]
    scores = score(model, encoded, batch_tokens=batch_tokens)
    for (context, continuation), scored in zip(PAIRS, scores, strict=True):
        start = len(context) + 1  # a token is a character, after <bos>
        ids = tokenizer(f"{context} {continuation}".lstrip(), return_tensors="pt").input_ids
        with torch.no_grad():
            logits = log_softmax(model(ids).logits[0].double(), -1)
        expected = sum(float(logits[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        assert scored.n_tokens == ids.shape[1] - start
        assert scored.log_likelihood == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_greedy_means_what_generate_writes(demo):
    model, tokenizer = demo
    asked = items("arithmetic", 20) + [Item("", "12 + 34 =", "47", [])]
    encoded = [Encoding(tokenizer).continuation(item, item.answer) for item in asked]
    scored = score(model, encoded, batch_tokens=4096)
    for item, result in zip(asked, scored, strict=True):
        ids = tokenizer(item.question, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=len(item.answer) + 1, do_sample=False)[0, ids.shape[1] :]
        assert result.is_greedy == (tokenizer.decode(written, skip_special_tokens=True) == f" {item.answer}")


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_the_demo_model_answers_more_than_nine_of_ten_questions(demo, skill):
    model, tokenizer = demo
    quality = measure(model, Encoding(tokenizer), BUILT_IN[skill], items(skill, 100), batch_tokens=4096)
    assert quality.value > 0.9
    assert quality.stderr == pytest.approx(math.sqrt(quality.value * (1 - quality.value) / (quality.n - 1)))


def test_perplexity_is_the_exponential_of_the_mean_loss_of_all_tokens(demo):
    model, tokenizer = demo
    task = Task(name="text", path="unused", answer="{{ text }}", metric="perplexity")
    texts = ["The capital of France is Paris", "12 + 34 = 46"]
    losses, n = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    texts = [Item(text, "", text, []) for text in texts]
    quality = measure(model, Encoding(tokenizer), task, texts, batch_tokens=4096)

    assert (quality.value, quality.n) == (pytest.approx(math.exp(losses / n), rel=1e-4), n)


def test_of_texts_longer_than_the_models_positions_the_beginning_is_left_out(demo):
    model, tokenizer = demo
    limit = model.config.max_position_embeddings
    ids = [3 + i * i % 11 for i in range(limit + 20)]
    task = Task(name="text", path="unused", answer="{{ text }}", metric="perplexity")
    text = tokenizer.decode(ids)
    ids = tokenizer(text).input_ids[-limit:]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)

    quality = measure(model, Encoding(tokenizer), task, [Item(text, "", text, [])], batch_tokens=4096)
    assert quality.weights == (limit - 1,)
    assert math.log(quality.value) == pytest.approx(expected, rel=1e-4)


def test_choices_of_one_question_that_is_too_long_lose_as_much_as_each_must(demo):
    model, _ = demo
    limit = model.config.max_position_embeddings
    context = [3 + i * i % 11 for i in range(limit)]
    encoded = [([*context, *choice], limit) for choice in ([4], [5, 6, 7], [5, 6, 8, 9])]
    scored = score(model, _cut(model, encoded), batch_tokens=4096)
    for (ids, start), result in zip(encoded, scored, strict=True):
        dropped = len(ids) - limit
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids[dropped:]])).logits[0].double().log_softmax(-1)
        expected = sum(float(logits_TV[i - dropped - 1, ids[i]]) for i in range(start, len(ids)))
        assert result.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_acc_takes_the_likeliest_choice_and_acc_norm_the_likeliest_per_byte():
    item = Item("", "q", "a long answer", ["short", "a long answer"], gold=1)
    scored = [Scored(-5.0, 5, False), Scored(-6.0, 13, False)]
    assert not _is_right(item, scored, "acc")
    assert _is_right(item, scored, "acc_norm")


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_blank_choice_is_never_the_likeliest(demo, metric):
    item = Item("", "q", "b", ["", "b", " "], gold=1)
    scored = [Scored(0.0, 0, True), Scored(-5.0, 1, False), Scored(-1.0, 1, False)]
    assert _is_right(item, scored, metric)

    model, tokenizer = demo
    task = Task(name="sums", path="unused", question="{{ q }}", answer="{{ a }}", choices="c", metric=metric)
    asked = [replace(item, choices=["", item.answer], gold=1) for item in items("arithmetic", 3)]
    assert measure(model, Encoding(tokenizer), task, asked, batch_tokens=4096).value == 1


def with_end(tokenizer):
    """Return the tokenizer as some fine-tuning tools save it: it appends an end token to every text."""
    template = processors.TemplateProcessing(
        "<bos> $A <eos>",
        special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)],
    )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("metric", ["exact_match", "acc", "acc_norm", "perplexity"])
def test_a_tokenizer_that_appends_an_end_token_changes_no_figure(demo, metric):
    model, tokenizer = demo
    appending = with_end(tokenizer)
    assert appending("12")["input_ids"] == [*tokenizer("12")["input_ids"], tokenizer.eos_token_id]
    task = Task(name="sums", path="unused", question="{{ q }}", answer="{{ a }}", metric=metric)
    asked = [replace(item, choices=[item.answer, "7"], gold=0) for item in items("arithmetic", 30)]

    expected = measure(model, Encoding(tokenizer), task, asked, batch_tokens=4096)
    assert measure(model, Encoding(appending), task, asked, batch_tokens=4096) == expected


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}{{ m['content'] }}{{ ' ' }}{% endfor %}"
)


def test_in_a_chat_template_answers_are_judged_as_the_template_writes_them(demo):
    """The template writes what the demo was trained on, so that answers are as right as without it."""
    model, tokenizer = demo
    chat = copy.copy(tokenizer)
    chat.chat_template = CHAT
    for skill in ("arithmetic", "sort"):
        asked = items(skill, 50)
        plain = measure(model, Encoding(tokenizer), BUILT_IN[skill], asked, batch_tokens=4096)
        in_chat = measure(model, Encoding(chat, is_chat=True), BUILT_IN[skill], asked, batch_tokens=4096)
        assert in_chat.value == plain.value > 0.9


def test_the_perplexity_of_a_chat_is_of_its_answers_alone(demo):
    model, tokenizer = demo
    chat = copy.copy(tokenizer)
    chat.chat_template = CHAT
    task = Task(name="sums", path="unused", question="{{ q }}", answer="{{ a }}", metric="perplexity")
    asked = items("arithmetic", 20)
    quality = measure(model, Encoding(chat, is_chat=True), task, asked, batch_tokens=4096)
    assert quality.weights == tuple(len(item.answer) for item in asked)
    assert quality.value < measure(model, Encoding(tokenizer), task, asked, batch_tokens=4096).value


def test_a_conversation_that_the_template_does_not_take_is_one_line_with_the_task(demo):
    model, tokenizer = demo
    chat = copy.copy(tokenizer)
    chat.chat_template = CHAT
    item = Item("a b", "a", "b", [], messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "a"}])
    with pytest.raises(DataError, match=r"^tasks.sort: the chat template does not take .* \(No system role\)"):
        measure(model, Encoding(chat, is_chat=True), BUILT_IN["sort"], [item], batch_tokens=4096)


def test_a_token_that_the_model_has_no_embedding_for_is_one_line_with_the_task(demo):
    model, tokenizer = demo
    wider = with_end(tokenizer)
    wider.add_tokens(["zebra"])
    with pytest.raises(DataError, match=r"^tasks.sort: the tokenizer has token 'zebra' as number \d+, but"):
        measure(model, Encoding(wider), BUILT_IN["sort"], [Item("a zebra", "a", "zebra", [])], batch_tokens=4096)


def test_a_difference_is_of_the_same_items_and_its_error_of_their_differences():
    dense = Quality.of("accuracy", [1, 1, 0, 1, 0, 1, 0, 1])
    cut = Quality.of("accuracy", [1, 0, 0, 1, 0, 1, 1, 0])
    difference, error = cut.against(dense)
    parts = [mine - others for mine, others in zip(cut.values, dense.values, strict=True)]
    assert difference == pytest.approx(mean(parts)) == pytest.approx(cut.value - dense.value)
    assert error == pytest.approx(stdev(parts) / math.sqrt(len(parts)))
    assert dense.against(dense) == (0, 0)


def test_a_difference_of_perplexities_is_their_quotient_and_what_is_hard_for_both_does_not_widen_it():
    losses, tokens = [3.0, 40.0, 8.0], [2, 10, 4]
    dense = Quality.of("perplexity", losses, tokens)
    cut = Quality.of("perplexity", [loss + 0.1 * n for loss, n in zip(losses, tokens, strict=True)], tokens)
    quotient, error = cut.against(dense)
    assert quotient == pytest.approx(cut.value / dense.value) == pytest.approx(math.exp(0.1))
    assert error == pytest.approx(0, abs=1e-9) and cut.stderr > 0.1


@pytest.mark.parametrize(
    "other",
    [
        Quality.of("perplexity", [3.0, 40.0], [2, 11]),  # another tokenizer
        Quality.of("perplexity", [3.0], [2]),
        Quality.of("accuracy", [1, 0]),
        Quality("perplexity", 2.0, 0.1, 12),  # its items are not known
    ],
)
def test_what_was_measured_over_other_items_has_no_difference(other):
    assert Quality.of("perplexity", [3.0, 40.0], [2, 10]).against(other) is None


def test_held_out_questions_are_never_training_questions():
    for skill in set(skills.SKILLS) - {"facts"}:
        train = {row["question"] for seed in range(3) for row in skills.rows(skill, 300, split="train", seed=seed)}
        test = {row["question"] for seed in range(3) for row in skills.rows(skill, 100, split="test", seed=seed)}
        assert test and not train & test


def model_row(name: str, **quality: float) -> dict:
    values = {
        task: {"metric": "perplexity" if task == "b" else "acc", "value": value, "stderr": 0.03, "n": 1}
        for task, value in quality.items()
    }
    sizes = {
        "ratio": 0.5,
        "realised_ratio": 0.5,
        "parameters": 1_380_000,
        "bytes": 2_760_000,
        "kv_bytes_per_token": 256,
    }
    return {"name": name, "method": "experts", "kind": "expert", "task": name, **sizes, "quality": values}


TASKS = {"a": {"metric": "acc", "short": "em"}, "b": {"metric": "perplexity", "short": "ppl"}}


def test_the_table_marks_own_tasks_and_leaves_perplexity_out_of_the_mean():
    models = [model_row("a", a=0.75, b=12.34), model_row("b", a=0.25, b=9.0)]
    text = table(Results.from_json({"tasks": TASKS, "models": models}))
    assert "[0.750]" in text and "12.3" in text and "[9.0]" in text and "1.38M" in text and "0.750 ±0.030" in text
    (summary,) = (row.to_json() for row in own_task_rows([ModelRow.from_json(model) for model in models]))
    assert summary["name"] == "experts, own task"
    assert {task: quality["value"] for task, quality in summary["quality"].items()} == {"a": 0.75, "b": 9.0}


def test_a_model_that_was_not_judged_on_all_tasks_has_no_mean_beside_those_that_were():
    whole, part = model_row("a", a=0.75, b=12.0), model_row("c", b=12.0)
    text = table(Results.from_json({"tasks": TASKS, "models": [whole, part]}))
    assert text.count("±") == 1 and "0.750 ±0.030" in text


def test_a_failed_cell_shows_in_the_table_with_its_reason_once():
    models = [model_row("a", b=9.0), model_row("b", b=9.0)]
    for model in models:
        model["quality"]["a"] = {"error": "no file of split 'test'"}
    text = table(Results.from_json({"tasks": TASKS, "models": models}))
    assert text.count("failed  ") + text.count("[failed]") == 2
    assert text.endswith("failed: a on a and 1 others: no file of split 'test'")


def test_the_mean_is_of_accuracies_or_else_geometric_of_perplexities():
    accuracies = [QualityCell("acc", 0.5, 0.03), QualityCell("acc_norm", 1.0, 0.04)]
    texts = [QualityCell("perplexity", 4.0, 0.1), QualityCell("perplexity", 9.0, 0.1)]
    assert mean_quality(accuracies) == (0.75, pytest.approx(0.025))
    assert mean_quality(accuracies + texts) == mean_quality(accuracies)
    assert mean_quality(texts) == (pytest.approx(6.0), pytest.approx(0.1 / math.sqrt(2)))
    assert mean_quality([]) is None and mean_quality([*texts, FailedCell("lost")]) is None


def test_progress_passes_every_step_through_and_ends_with_a_line(capsys):
    assert list(progress([1, 2, 3], 6, "working", unit=" things")) == [1, 2, 3]
    assert capsys.readouterr().out.startswith("working 6 things in ")


def test_scores_are_those_of_the_models_own_logits_with_their_soft_cap(dense):
    model, ids = load(dense("gemma2"), attn_implementation="eager"), random_ids(1, 12)[0].tolist()
    assert model.config.final_logit_softcapping

    (scored,) = score(model, [(ids, 4)], batch_tokens=4096)
    with torch.no_grad():
        own_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        hidden_TD = decoder_of(model)(torch.tensor([ids])).last_hidden_state[0]
        uncapped_TV = model.get_output_embeddings()(hidden_TD).double().log_softmax(-1)
    expected, uncapped = (sum(float(of[i - 1, ids[i]]) for i in range(4, 12)) for of in (own_TV, uncapped_TV))

    assert scored.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert abs(uncapped - expected) > 1, "the cap matters here"
