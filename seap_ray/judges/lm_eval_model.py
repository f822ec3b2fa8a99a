"""lm-eval's model: a causal language model in; lm-eval's wrapper of it out, with batches and token ids of our own.

Importing this module imports lm-eval, an optional extra that takes seconds: others import it inside functions.
"""

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from seap_ray.errors import DataError
from seap_ray.judges.scoring import Continuation, score
from seap_ray.models.encoding import Encoding


class TokenBatchedLM(HFLM):
    """lm-eval's wrapper of a model, with batches bounded by tokens instead of requests, and ids as everywhere."""

    def __init__(self, model: PreTrainedModel, encoding: Encoding, batch_tokens: int) -> None:
        """Wrap ``model``; batches have at most ``batch_tokens`` tokens, padding included."""
        # lm-eval gives the tokenizer a padding token, so it has a copy.
        super().__init__(model, backend="causal", tokenizer=copy.deepcopy(encoding.tokenizer))
        self.encoding = encoding
        self.batch_tokens = batch_tokens

    @property
    def max_gen_toks(self) -> int:
        """lm-eval's 256 tokens, or half of a context that is too short for these and a prompt."""
        return min(super().max_gen_toks, self.max_length // 2)

    # --- token ids ---------------------------------------------------------------------------------------------------

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty prompt is: the one that the tokenizer begins with, or lm-eval's choice."""
        beginning, _ = self.encoding.added
        return beginning[-1] if beginning else super().prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text that is continued, or with ``add_special_tokens`` false of the text alone.

        What a chat template has written is the text alone: the template has its special tokens.
        """
        if self.encoding.is_chat or add_special_tokens is False:
            return self.encoding.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return self.encoding.ids(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self.encoding.is_chat:
            prompt, answer = super()._encode_pair(context, continuation)
            return prompt or [self.prefix_token_id], answer

        # lm-eval moves white space at a prompt's end to the answer, but in a template it is the prompt's: what is
        # served begins to answer behind it.
        prompt = self.tok_encode(context)
        ids, start = self.encoding.after_prompt(prompt, self.tok_encode(context + continuation), continuation)
        return ids[:start], ids[start:]

    def tok_batch_encode(self, strings: Sequence[str], *_: Any, left_truncate_len: int, **__: Any) -> tuple:
        """Return ids and attention masks of prompts, padded on the left, each cut to ``left_truncate_len``."""
        ids = [self._cut(self.tok_encode(string), left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """Return the end of a prompt that is too long, with the beginning token that it had."""
        if len(ids) <= length:
            return ids

        beginning, _ = self.encoding.added
        if ids[: len(beginning)] != beginning:
            beginning = []
        return beginning + ids[len(ids) - length + len(beginning) :]

    # --- batches -----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        continuations = [self._continuation(prompt, end) for _texts, prompt, end in requests]
        scored = score(self.model, continuations, batch_tokens=self.batch_tokens)
        answers = [(result.log_likelihood, result.is_greedy) for result in scored]

        for (texts, _, _), answer in zip(requests, answers, strict=True):
            # Parts of a text that is scored as a whole have no texts; lm-eval keeps the whole.
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)

        return answers

    def _continuation(self, prompt: list[int], end: list[int]) -> Continuation:
        """Return the ids of a prompt, cut to what the model can see, and its answer, and where the answer starts."""
        # lm-eval has no likelihood for such answers, either.
        if not 0 < len(end) <= self.max_length:
            raise DataError(f"an answer has {len(end)} tokens, and the model {self.max_length} positions")

        # The last token is predicted, and not read.
        longest = self.max_length + 1
        prompt = self._cut(prompt, longest - len(end))
        return prompt + end, len(prompt)

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Generate answers, in batches of one size that the longest prompt and answer allow."""
        # A prompt longer than the context is cut to it, so no batch is longer than that.
        longest = max(len(self.tok_encode(request.args[0])) for request in requests) + self.max_gen_toks
        self.batch_size_per_gpu = max(1, self.batch_tokens // min(longest, self.max_length))
        return super().generate_until(requests)
