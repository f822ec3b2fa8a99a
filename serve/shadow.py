"""Shadow: a request that an expert has answered in; what the reference says of the expert's own words after it, out.

The expert answers again, greedily and for a while, so that neither a client's temperature nor where its reply was cut
decides, and an expert that gets no requests is judged in the same way. Nothing of it reaches a client.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.llm.openai_api_models import CompletionRequest

from seap_ray.models.agreement import NEW_TOKENS
from serve.guard import Agreement
from serve.messages import ChatRequest
from serve.model_calls import constraint_in

LIKELIEST = 20
"""Tokens whose probabilities are compared at each place: as many as vLLM gives by default."""
KEPT = ("prompt", "messages", "tools", "chat_template_kwargs", "add_special_tokens")
"""Fields of a request that say what the model reads. All others say how it writes."""
Logprobs = Sequence[Mapping[int, Any]]
"""For each place of a reply the likeliest tokens and the one that is there, each with ``logprob`` and ``rank``."""
Call = Callable[[str, str, Any], Awaitable[Any]]
"""Sends a request to a model by its name: (method, model, request) -> vLLM's whole reply."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that an expert's standing is judged by."""

    expert: str
    method: str
    """``chat`` or ``completions``."""
    fields: dict[str, Any]
    """What the model reads, as the client sent it."""

    @classmethod
    def of(cls, expert: str, method: str, body: Any) -> "Sample | None":
        """Return the sample that a request is; None for one that shows nothing of how the expert writes by itself."""
        if constraint_in(body) or getattr(body, "echo", False):
            return None
        fields = body.model_dump(include=set(KEPT), exclude_unset=True)
        # A request with several prompts has a place in the metrics for none of them.
        prompt = fields.get("prompt")
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
            return None
        return cls(expert, method, fields)

    @property
    def request(self) -> Any:
        """The request by which the expert answers again."""
        wanted = {"max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
        request = ChatRequest if self.method == "chat" else CompletionRequest
        return request.model_validate({**self.fields, **wanted})


async def judge(sample: Sample, reference: str, call: Call) -> Agreement | None:
    """Let the expert answer a sample, and compare what it and the reference make of its words.

    Returns None for an empty reply. Whatever a call raises is raised.
    """
    reply = await call(sample.method, sample.expert, sample.request)
    choice = reply.choices[0]
    # A chat's prompt is the reply's, a completion's the choice's.
    prompt_ids = reply.prompt_token_ids if sample.method == "chat" else choice.prompt_token_ids
    if not choice.token_ids:
        return None

    ids = [*prompt_ids, *choice.token_ids]
    by_expert = await _predicted(call, sample.expert, ids, len(prompt_ids))
    by_reference = await _predicted(call, reference, ids, len(prompt_ids))
    return compare(choice.token_ids, by_expert, by_reference)


async def _predicted(call: Call, model: str, ids: Sequence[int], start: int) -> Logprobs:
    """Return what a model expects at each place of some token ids from ``start`` on, given those before."""
    wanted = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": LIKELIEST}
    request = CompletionRequest.model_validate(wanted)
    reply = await call("completions", model, request)
    return reply.choices[0].prompt_logprobs[start:]


def compare(ids: Sequence[int], by_expert: Logprobs, by_reference: Logprobs) -> Agreement:
    """Compare what two models expect at the places of a reply.

    Args:
        ids: The reply's tokens, at least one.
        by_expert: What the expert expects there.
        by_reference: What the reference expects there.
    """
    n = len(ids)
    pairs = list(zip(by_expert, by_reference, strict=True))
    shared = [by_reference[at][token].rank == 1 for at, token in enumerate(ids)]
    gaps = [by_expert[at][token].logprob - by_reference[at][token].logprob for at, token in enumerate(ids)]
    divergence = sum(_divergence(expert, reference) for expert, reference in pairs)
    return Agreement(sum(shared) / n, sum(gaps) / n, divergence / n)


def _divergence(expert: Mapping[int, Any], reference: Mapping[int, Any]) -> float:
    """Return the divergence of the expert from the reference over tokens that both name and all others as one."""
    both = sorted(expert.keys() & reference.keys())
    pairs = [(math.exp(reference[token].logprob), math.exp(expert[token].logprob)) for token in both]
    # Rounding may leave a sum above 1.
    rest = tuple(max(0.0, 1 - sum(column)) for column in zip(*pairs, strict=True)) if pairs else (1.0, 1.0)
    return math.fsum(p * math.log(p / q) for p, q in [*pairs, rest] if p > 0 and q > 0)
