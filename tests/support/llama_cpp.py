"""llama.cpp itself, by the wheel ``xllamacpp``: a GGUF file in, tokens and their log probabilities out."""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answer:
    """Greedily chosen tokens, and at each place the log probabilities of the likeliest ones."""

    tokens: list[int]
    likeliest: list[dict[int, float]]


class LlamaCpp:
    """A server of llama.cpp in this process, with an exact cache."""

    def __init__(self, file: Path, context: int = 64, threads: int = 1) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention multiplies in half precision.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = False
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt: Sequence[int], n_tokens: int, n_likeliest: int = 5) -> Answer:
        """Continue a prompt by the likeliest tokens, up to an end token."""
        answer = self.server.handle_completions(
            {
                "prompt": list(prompt),
                "n_predict": n_tokens,
                "temperature": 0,
                "n_probs": n_likeliest,
                "cache_prompt": False,
            }
        )
        places = answer["choices"][0]["logprobs"]["content"]
        likeliest = []
        for place in places:
            likeliest.append({token["id"]: token["logprob"] for token in place["top_logprobs"]})
        return Answer([place["id"] for place in places], likeliest)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text, with the tokens that go around it."""
        return self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt that the chat template makes of a conversation."""
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        url = f"{self.server.listening_address}{path}"
        request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], n_tokens: int, n_likeliest: int = 5) -> Answer:
    """Continue a prompt in transformers, without a cache, up to an end token."""
    ids = list(prompt)
    end = model.config.eos_token_id
    likeliest = []
    for _ in range(n_tokens):
        logprobs_V = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        top = logprobs_V.topk(n_likeliest)
        likeliest.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        ids.append(int(top.indices[0]))
        if ids[-1] == end:
            break
    return Answer(ids[len(prompt) :], likeliest)


@torch.no_grad()
def logprobs_after(model: PreTrainedModel, prompt: Sequence[int], answer: Answer) -> list[dict[int, float]]:
    """Return transformers' log probabilities of the tokens that llama.cpp found likeliest at each place."""
    ids = torch.tensor([[*prompt, *answer.tokens]])  # (1, T)
    logprobs_TV = model(ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
    found = []
    for place, logprobs_V in zip(answer.likeliest, logprobs_TV, strict=True):
        found.append({token: float(logprobs_V[token]) for token in place})
    return found
