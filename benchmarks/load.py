"""Load: requests that an engine of vLLM is given at once."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one length that come at once, and how much of them is measured: their prompts or their replies."""

    requests: int
    prompt: int
    """Tokens of a prompt."""
    reply: int
    """Tokens of a reply."""

    @property
    def name(self) -> str:
        """What the load is, in words."""
        if self.is_prefill:
            return f"prefill of {self.requests} x {self.prompt} tokens"
        return f"{self.requests} x {self.reply} tokens at {self.prompt}"

    @property
    def is_prefill(self) -> bool:
        """Whether prompts are what is measured: a reply of one token needs no step of decoding."""
        return self.reply == 1

    @property
    def tokens(self) -> int:
        """Tokens that are measured."""
        return self.requests * (self.prompt if self.is_prefill else self.reply)


def answer(llm: Any, load: Load, vocabulary: int) -> None:
    """Have an engine answer prompts of random tokens by greedy replies of the load's length."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    # The first ids are special tokens in most vocabularies.
    ids = torch.randint(3, vocabulary, (load.requests, load.prompt), generator=generator)
    # The length is fixed: no end of text, and no text at all.
    sampling = SamplingParams(max_tokens=load.reply, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": prompt} for prompt in ids.tolist()], sampling, use_tqdm=False)
