"""Texts that a model writes: against a loop that takes one token after another, prompt by prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Item, Renderer, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.models.synthesis import LEAST_NEW_TOKENS, Prompt, write_texts
from seap_ray.tasks import Task
from tests.support.builders import demo_with_template, load, save_dense

QUESTIONS = Task(name="mine", path="demo:sort", question="{{ q }}", answer="{{ a }}")
TEXTS = Task(name="mine", path="demo:sort", answer="{{ a }}")
ROWS = [{"q": "abc" * n, "a": "ba" * (9 - n)} for n in range(1, 8)]
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def encoding_of(folder: Path, task: Task = QUESTIONS, **corpus: Any) -> Encoding:
    config = Config.model_validate({"model": {"source": str(folder)}, "corpus": corpus})
    return Encoding.of(config, task, load_tokenizer(folder))


def prompts_of(encoding: Encoding, task: Task = QUESTIONS, longest: int = 64) -> list[Prompt]:
    prompts = [Prompt.of(encoding, Renderer(task).item(row), longest) for row in ROWS]
    return [prompt for prompt in prompts if prompt]


@torch.no_grad()
def likeliest(model: Any, prompt: Prompt, ends: list[int]) -> list[int]:
    ids = list(prompt.ids)
    for _ in range(prompt.n_new_tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "gemma3", "phi3", "opt", "gpt_neox", "mixtral"])
def test_at_temperature_0_each_answer_is_the_likeliest_token_after_token_whatever_shares_its_batch(
    name: str, tmp_path: Path
) -> None:
    save_dense(tmp_path, name, torch.float32)
    model = load(tmp_path)
    encoding = encoding_of(tmp_path, chat="never")
    prompts = prompts_of(encoding)
    # One token that some answers come to ends a text.
    first = [likeliest(model, prompt, []) for prompt in prompts]
    model.generation_config.eos_token_id = [first[0][3]]

    items = write_texts(model, encoding, prompts, temperature=0, seed=0, batch_tokens=60)

    assert len(items) == len(ROWS)
    for prompt, item in zip(prompts, items, strict=True):
        ids = likeliest(model, prompt, [first[0][3]])
        expected = encoding.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if item is None:
            assert not expected
            continue
        assert item.answer == expected
        assert (item.question, item.messages) == (prompt.item.question, prompt.item.messages)
        assert item.text == f"{item.question} {expected}"


def test_a_question_leaves_as_much_room_as_its_own_answer_and_a_text_is_begun_by_a_quarter() -> None:
    folder = Checkpoint.open("demo").folder
    encoding = encoding_of(folder, chat="never")
    item = Renderer(QUESTIONS).item({"q": "12 + 7 =", "a": "x" * 30})
    prompt = Prompt.of(encoding, item, 512)
    assert prompt is not None
    assert [*prompt.ids] == encoding.ids("12 + 7 =")
    assert prompt.n_new_tokens == len(encoding.ids("12 + 7 = " + "x" * 30)) - len(prompt.ids)
    # A word as an answer does not bind the model to one token.
    short = Prompt.of(encoding, Renderer(QUESTIONS).item({"q": "12 + 7 =", "a": "1"}), 512)
    assert short is not None and short.n_new_tokens == LEAST_NEW_TOKENS
    # The longest sequence is never passed.
    assert (cut := Prompt.of(encoding, item, len(prompt.ids) + 3)) is not None and cut.n_new_tokens == 3
    assert Prompt.of(encoding, item, len(prompt.ids)) is None

    text = Prompt.of(encoding, Renderer(TEXTS).item({"a": "the cat sat on the mat and " * 4}), 512)
    assert text is not None
    whole = encoding.ids(text.item.text)
    assert [*text.ids] == whole[: len(whole) // 4] and text.n_new_tokens == len(whole) - len(text.ids)


def test_the_rest_of_a_text_stands_behind_its_beginning_as_it_is() -> None:
    folder = Checkpoint.open("demo").folder
    encoding = encoding_of(folder, TEXTS, chat="never")
    item = Renderer(TEXTS).item({"a": "David came from the station with a cup, and Iris came with a needle."})
    prompt = Prompt.of(encoding, item, 512)
    assert prompt is not None

    (written,) = write_texts(load(folder), encoding, [prompt], temperature=0, seed=0, batch_tokens=512)

    assert written is not None and not written.question
    beginning = encoding.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert written.text.startswith(beginning) and len(written.text) > len(beginning)
    assert encoding.whole(written)[0][: len(prompt.ids)] == [*prompt.ids]


def test_in_a_chat_the_model_answers_as_the_endpoints_does(tmp_path: Path) -> None:
    folder = demo_with_template(tmp_path / "model", CHAT)
    encoding = encoding_of(folder)
    item = Renderer(QUESTIONS).item({"q": "12 + 7 =", "a": "19"})

    prompt = Prompt.of(encoding, item, 512)

    assert prompt is not None and [*prompt.ids] == encoding.prompt(item)
    (written,) = write_texts(load(folder), encoding, [prompt], temperature=0, seed=0, batch_tokens=512)
    if written is not None:
        assert encoding.text(written) == f"u: 12 + 7 =.a: {written.answer}."


def test_draws_follow_the_predictions_and_the_temperature_and_come_back_by_their_seed(tmp_path: Path) -> None:
    save_dense(tmp_path, "llama_gqa", torch.float32)
    model = load(tmp_path)
    encoding = encoding_of(tmp_path, chat="never")
    item = Item("ab", "ab", "", [])
    ids = encoding.ids("ab")
    n = 4000

    def drawn(temperature: float, seed: int) -> list[str]:
        items = write_texts(
            model, encoding, [Prompt(item, ids, 1)] * n, temperature=temperature, seed=seed, batch_tokens=n * 8
        )
        return [written.answer if written else "" for written in items]

    with torch.no_grad():
        logits_V = model(torch.tensor([ids])).logits[0, -1].double()
    for temperature in (0.7, 1.5):
        answers = drawn(temperature, 1)
        p_V = (logits_V / temperature).softmax(-1)
        for token in p_V.topk(5).indices.tolist():
            text = encoding.tokenizer.decode([token]).strip()
            # What is blank, or a special token, is no answer.
            if text and token not in encoding.tokenizer.all_special_ids:
                share = answers.count(text) / n
                assert abs(share - float(p_V[token])) < 5 * float(p_V[token] / n) ** 0.5

    assert drawn(0.7, 1) == drawn(0.7, 1) != drawn(0.7, 2)
