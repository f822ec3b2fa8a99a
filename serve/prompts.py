"""Prompts: the prompts of a text completion, in OpenAI's forms, and what prompts of token ids lack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seap_ray.models.encoding import Encoding, prompt_frame
from serve.choice import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts_of(prompt: Any) -> list[Prompt]:
    """Return the prompts of a completion as a list. OpenAI allows text or token ids, alone or in a list."""
    if not isinstance(prompt, list):
        return [prompt or ""]

    # A list of numbers is one prompt, a list of such lists several.
    is_token_ids = bool(prompt) and isinstance(prompt[0], int)
    return [prompt] if is_token_ids else prompt


@dataclass(frozen=True, slots=True)
class PromptBeginning:
    """How token ids begin that a model's tokenizer has made of a text or, with the chat template, of a chat."""

    ids: tuple[int, ...] = ()
    """Special tokens that the tokenizer puts before a text by itself, such as that of the beginning; often none."""
    chat_id: int | None = None
    """First token of what the chat template writes; None where it writes nothing before the user's words."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "PromptBeginning":
        """Read it from a tokenizer."""
        before, _ = Encoding(tokenizer).added
        head, _ = prompt_frame(tokenizer) or ("", "")
        head_ids = tokenizer(head, add_special_tokens=False)["input_ids"] if head else []
        return cls(tuple(before), next(iter(head_ids), None))

    def warning(self, prompts: Sequence[Prompt]) -> str | None:
        """Return a warning, in ASCII, where prompts are token ids that lack the model's beginning token; else None.

        vLLM adds the token to texts alone, so ids have to come with it.
        """
        n_missing = sum(not isinstance(prompt, str) and self._is_missing_in(prompt) for prompt in prompts)
        if not n_missing:
            return None

        # The token's name may hold letters that no header takes, so its number stands for it.
        token = " ".join(map(str, self.ids))
        return (
            f"the beginning token ({token}) is missing in {n_missing} of {len(prompts)} prompts of token ids; the "
            "model was trained with it, and the tokenizer adds it to texts alone (lm-eval: add_bos_token=True)"
        )

    def _is_missing_in(self, ids: Sequence[int]) -> bool:
        """Return whether ids begin neither as a text nor as a chat does."""
        # Some templates write chats without the token that texts have, and so the model was trained.
        is_chat = self.chat_id is not None and list(ids[:1]) == [self.chat_id]
        return not is_chat and tuple(ids[: len(self.ids)]) != self.ids
