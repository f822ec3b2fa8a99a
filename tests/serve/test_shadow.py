"""Requests that are judged: what is asked for them, and what two models' expectations say, with vLLM played."""

import asyncio
import math
from types import SimpleNamespace

import pytest

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]

CHAT = [{"role": "user", "content": "1 + 1 ="}]


def expected(**probabilities):
    """What vLLM says a model expects at a place: ``t5=0.5`` is token 5 with half of the probability."""
    ranked = sorted(probabilities.items(), key=lambda pair: -pair[1])
    return {int(name[1:]): SimpleNamespace(logprob=math.log(p), rank=rank) for rank, (name, p) in enumerate(ranked, 1)}


def test_agreement_gap_and_divergence_are_those_of_the_formulas():
    from serve.shadow import compare

    by_expert = [expected(t5=0.6, t6=0.3), expected(t7=0.5, t8=0.4)]
    by_reference = [expected(t5=0.8, t6=0.1), expected(t8=0.7, t7=0.2)]
    agreement = compare([5, 7], by_expert, by_reference)
    assert agreement.share == 0.5
    assert agreement.gap == pytest.approx((math.log(0.6 / 0.8) + math.log(0.5 / 0.2)) / 2)
    first = 0.8 * math.log(0.8 / 0.6) + 0.1 * math.log(0.1 / 0.3) + 0.1 * math.log(0.1 / 0.1)
    second = 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.5) + 0.1 * math.log(0.1 / 0.1)
    assert agreement.divergence == pytest.approx((first + second) / 2)


def test_equal_expectations_diverge_by_nothing_and_unshared_tokens_count_as_one():
    from serve.shadow import compare

    same = [expected(t5=0.6, t6=0.3)]
    assert compare([5], same, same).divergence == pytest.approx(0, abs=1e-12)
    other = compare([5], [expected(t5=0.6, t6=0.3)], [expected(t5=0.5, t9=0.4)])
    assert other.divergence == pytest.approx(0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4))


def body(method, **fields):
    from ray.serve.llm.openai_api_models import CompletionRequest

    from serve.messages import ChatRequest

    return ChatRequest(**fields) if method == "chat" else CompletionRequest(**fields)


@pytest.mark.parametrize(
    ("method", "fields"),
    [("chat", {"messages": CHAT}), ("completions", {"prompt": "1 + 1 ="}), ("completions", {"prompt": [5, 6]})],
)
def test_the_expert_reads_what_the_client_sent_and_writes_greedily(method, fields):
    from seap_ray.models.agreement import NEW_TOKENS
    from serve.shadow import Sample

    asked = body(method, **fields, model="auto", temperature=0.9, max_tokens=1, stream=True, seed=5, n=3)
    request = Sample.of("sums", method, asked).request
    assert all(getattr(request, name) == value for name, value in fields.items())
    assert (request.temperature, request.max_tokens, request.n) == (0, NEW_TOKENS, 1)
    assert request.return_token_ids and not request.stream


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("chat", {"messages": CHAT, "response_format": {"type": "json_object"}}),
        ("completions", {"prompt": ["a", "b"]}),
        ("completions", {"prompt": [[5], [6]]}),
        ("completions", {"prompt": "a", "echo": True}),
    ],
)
def test_requests_that_show_nothing_of_one_reply_of_its_own_are_no_samples(method, fields):
    from serve.shadow import Sample

    assert Sample.of("sums", method, body(method, **fields)) is None


@pytest.mark.parametrize("method", ["chat", "completions"])
def test_a_sample_is_answered_by_the_expert_and_its_tokens_are_scored_by_both(method):
    from serve.shadow import Sample, judge

    calls = []

    async def call(called, model, request):
        calls.append((called, model))
        if len(calls) == 1:
            where = {"prompt_token_ids": [1, 2]}
            choice = SimpleNamespace(token_ids=[5, 7], **(where if called == "completions" else {}))
            return SimpleNamespace(choices=[choice], **(where if called == "chat" else {}))
        assert request.prompt == [1, 2, 5, 7] and request.max_tokens == 1
        # vLLM has nothing to say about the first token.
        logprobs = [None, expected(t2=0.9), expected(t5=0.6, t6=0.3), expected(t8=0.5, t7=0.4)]
        return SimpleNamespace(choices=[SimpleNamespace(prompt_logprobs=logprobs)])

    fields = {"messages": CHAT} if method == "chat" else {"prompt": "1 + 1 ="}
    agreement = asyncio.run(judge(Sample("sums", method, fields), "dense", call))
    assert calls == [(method, "sums"), ("completions", "sums"), ("completions", "dense")]
    assert agreement.share == 0.5 and agreement.gap == 0


def test_an_empty_reply_is_no_evidence():
    from serve.shadow import Sample, judge

    async def call(method, model, request):
        return SimpleNamespace(choices=[SimpleNamespace(token_ids=[], prompt_token_ids=[1])])

    assert asyncio.run(judge(Sample("sums", "completions", {"prompt": "a"}), "dense", call)) is None
