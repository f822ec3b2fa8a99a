"""Agreement of one model's replies with another: against a loop that takes one token after another."""

import pytest
import torch

from seap_ray.config import Config
from seap_ray.models.agreement import NEW_TOKENS, Reply, agreements, write_replies
from seap_ray.models.corpus import Renderer, load_tokenizer
from seap_ray.models.encoding import Encoding
from seap_ray.tasks import Task
from tests.support.builders import load, save_dense

QUESTIONS = Task(name="mine", path="demo:sort", question="{{ q }}", answer="{{ a }}")
ROWS = [{"q": "abc" * n, "a": "ba" * (9 - n)} for n in range(1, 8)]


@torch.no_grad()
def next_token(model, ids):
    """The likeliest token after some ids."""
    return int(model(torch.tensor([ids])).logits[0, -1].argmax())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of other weights, and an encoding of their tokens."""
    folder = tmp_path_factory.mktemp("model")
    save_dense(folder, "llama_gqa", torch.float32)
    config = Config.model_validate({"model": {"source": str(folder)}, "corpus": {"chat": "never"}})
    expert = load(folder)
    reference = load(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = reference.model.layers[0].mlp.down_proj.weight
        weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 2)
    return expert, reference, Encoding.of(config, QUESTIONS, load_tokenizer(folder))


def written(models, **settings):
    expert, _, encoding = models
    items = [Renderer(QUESTIONS).item(row) for row in ROWS]
    return write_replies(expert, encoding, items, **{"longest": 200, "batch_tokens": 256, **settings})


def test_replies_are_greedy_of_one_length_and_end_with_the_mark_that_ends_them(models):
    expert, _, _ = models
    replies = written(models)
    assert len(replies) == len(ROWS)
    expert.generation_config.eos_token_id = [replies[0].ids[3]]
    try:
        for before, reply in zip(replies, written(models), strict=True):
            ids = list(reply.prompt_ids)
            while len(ids) < len(reply.prompt_ids) + NEW_TOKENS:
                ids.append(next_token(expert, ids))
                if ids[-1] == replies[0].ids[3]:
                    break
            assert reply.ids == tuple(ids[len(reply.prompt_ids) :]) and before.prompt_ids == reply.prompt_ids
    finally:
        expert.generation_config.eos_token_id = None


def test_agreement_is_the_share_of_tokens_that_the_reference_would_have_chosen(models):
    expert, reference, _ = models
    replies = written(models)
    assert agreements(expert, replies) == [1.0] * len(replies)
    shares = agreements(reference, replies)
    for reply, share in zip(replies, shares, strict=True):
        chosen = []
        for at in range(len(reply.ids)):
            chosen.append(next_token(reference, [*reply.prompt_ids, *reply.ids[:at]]) == reply.ids[at])
        assert share == pytest.approx(sum(chosen) / len(chosen))
    assert 0 < sum(shares) < len(shares)


def test_a_row_without_room_for_a_reply_is_left_out(models):
    _, _, encoding = models
    items = [Renderer(QUESTIONS).item(row) for row in ROWS]
    lengths = sorted(len(encoding.prompt(item)) for item in items)
    longest = lengths[3] + 2
    replies = written(models, longest=longest)
    assert 4 <= len(replies) < len(ROWS)
    assert max(len(reply.prompt_ids) + len(reply.ids) for reply in replies) <= longest


def test_one_token_is_a_reply(models):
    expert, _, _ = models
    token = next_token(expert, [5, 6])
    assert agreements(expert, [Reply((5, 6), (token,)), Reply((5, 6), (token + 1,))]) == [1.0, 0.0]
