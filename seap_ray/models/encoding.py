"""Encoding: items of a task in; token ids out, with the special tokens that the model was trained with.

Corpus, judges, router and report turn text into ids here and nowhere else, so that a question has the same ids wherever
it is read. In chat mode a conversation is what the model's chat template writes, tokenised without further special
tokens, as transformers and vLLM do it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from seap_ray.models.corpus import Item, Message
from seap_ray.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seap_ray.config import Config

PROBE = "a"
"""Any text: what a tokenizer adds before and behind it."""


def uses_chat(config: "Config", task: Task, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a task's texts are in the model's chat template (``corpus.chat``, ``Task.chat``)."""
    setting = task.chat or config.corpus.chat
    if setting != "auto":
        return setting == "always"

    return task.has_prompt and bool(tokenizer.chat_template) and config.corpus.prompt_format != "official"


@dataclass(frozen=True)
class Encoding:
    """How the texts of a task become token ids of a model."""

    tokenizer: "PreTrainedTokenizerBase"
    is_chat: bool = False
    """Whether questions and conversations are in the chat template."""

    # --- plain text --------------------------------------------------------------------------------------------------

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer adds by itself before and behind a text."""
        bare = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(PROBE)["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text that is continued: one beginning token at most, and no end token behind."""
        before, _ = self._added
        bare = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # A text may begin with the token itself, as chat templates write it.
        return bare if bare[: len(before)] == before else [*before, *bare]

    # --- items -------------------------------------------------------------------------------------------------------

    def prompt_text(self, item: Item) -> str:
        """Return what a model is given for an item's question, as text."""
        if not self.is_chat:
            return item.question
        return self._render(item.messages, add_generation_prompt=True)

    def prompt(self, item: Item) -> list[int]:
        """Return the ids that a served model is given for an item's question."""
        return self._tokenise(self.prompt_text(item))

    def text(self, item: Item) -> str:
        """Return the whole text that the model is calibrated on."""
        if not self.is_chat:
            return item.text
        answer: Message = {"role": "assistant", "content": item.answer}
        return self._render([*item.messages, answer])

    def sequence(self, item: Item) -> list[int]:
        """Return the ids of the whole text that the model is calibrated on."""
        return self._tokenise(self.text(item))

    def _tokenise(self, text: str) -> list[int]:
        if self.is_chat:
            # The template has all special tokens that the model wants.
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.ids(text)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(rendered, str), "one conversation without tokenising is one text"
        return rendered
