"""Synthesis: rows of a task in; the same rows with what the dense model itself writes in place of their answers, out.

A model that is cut for a task should keep what the dense one would say, which need not be what the corpus says. Texts
that a model writes are also there where a task has few rows.

Letters: B rows, T positions of a prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from seap_ray.models.corpus import Item
from seap_ray.models.encoding import Encoding

BEGINNING_SHARE = 4
"""A text that nobody asks for is begun by the first of so many parts of its tokens."""
LEAST_NEW_TOKENS = 8
"""Tokens that a model may write at the least, also where the row's own answer is a word."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given to go on from, and for how long."""

    item: Item
    ids: Sequence[int]
    n_new_tokens: int
    """Tokens that it may write: as many as the row has there."""

    @classmethod
    def of(cls, encoding: Encoding, item: Item, longest: int) -> "Prompt | None":
        """Return the prompt of a row: its question, or the beginning of a mere text; None where that is too long.

        Args:
            encoding: How the task's texts become ids of the model.
            item: A row of the task.
            longest: Most tokens of prompt and answer together.
        """
        if item.question:
            ids = encoding.prompt(item)
            whole, start = encoding.continuation(item, item.answer)
            n_new = max(len(whole) - start, LEAST_NEW_TOKENS)
        else:
            whole = encoding.ids(item.text)
            ids = whole[: max(1, len(whole) // BEGINNING_SHARE)]
            n_new = max(len(whole) - len(ids), LEAST_NEW_TOKENS)
        room = longest - len(ids)
        return cls(item, ids, min(n_new, room)) if room > 0 else None


@torch.inference_mode()
def write_texts(
    model: Any, encoding: Encoding, prompts: Sequence[Prompt], *, temperature: float, seed: int, batch_tokens: int
) -> list[Item | None]:
    """Let a model write an answer to every prompt.

    Args:
        model: A causal language model in evaluation mode.
        encoding: How the task's texts become ids of the model.
        prompts: What it goes on from.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest one.
        seed: Seed of the draws.
        batch_tokens: Most tokens of a batch, padding included.

    Returns:
        The rows with what was written as their answer, or as the rest of their text, in the order of the prompts; None
        where nothing was written but a mark that ends texts.
    """
    torch.manual_seed(seed)
    ends = _end_tokens(model)
    written = continued(model, prompts, temperature=temperature, batch_tokens=batch_tokens)
    items: list[Item | None] = []
    for prompt, new_ids in zip(prompts, written, strict=True):
        # The mark that ends a text is no part of it.
        text_ids = new_ids[:-1] if new_ids[-1:] and new_ids[-1] in ends else new_ids
        items.append(_with_answer(encoding, prompt, text_ids))
    return items


@torch.inference_mode()
def continued(model: Any, prompts: Sequence[Prompt], *, temperature: float, batch_tokens: int) -> list[list[int]]:
    """Return the ids that a model writes behind each prompt, in their order, up to the mark that ends a text.

    Args:
        model: A causal language model in evaluation mode.
        prompts: What it goes on from, and for how long.
        temperature: Divides the logits before a token is drawn; 0 takes the likeliest one.
        batch_tokens: Most tokens of a batch, padding included.
    """
    new_ids: list[list[int]] = [[]] * len(prompts)
    for batch in _batches(prompts, batch_tokens):
        for number, ids in zip(batch, _continue(model, [prompts[i] for i in batch], temperature), strict=True):
            new_ids[number] = ids
    return new_ids


def _batches(prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of prompts that are run together: those of like length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].n_new_tokens, len(prompts[i].ids)))
    batch: list[int] = []
    longest = 0
    for number in order:
        prompt = prompts[number]
        longest_with = max(longest, len(prompt.ids) + prompt.n_new_tokens)
        if batch and longest_with * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
            longest_with = len(prompt.ids) + prompt.n_new_tokens
        batch.append(number)
        longest = longest_with
    if batch:
        yield batch


def _continue(model: Any, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
    """Return the ids that a model writes behind each prompt of a batch, up to the mark that ends a text."""
    from transformers import GenerationConfig  # takes a second, which who writes no texts need not wait for

    width = max(len(prompt.ids) for prompt in prompts)
    # Padding stands before the prompts, so that all texts go on at one position.
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
    is_token_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        is_token_BT[row, width - len(prompt.ids) :] = 1

    ends = _end_tokens(model)
    # The model's own settings, penalties and the like, are for chats; here texts are drawn as it predicts them.
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max(prompt.n_new_tokens for prompt in prompts),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **draws,
    )
    device = model.get_input_embeddings().weight.device
    written_BT = model.generate(ids_BT.to(device), attention_mask=is_token_BT.to(device), generation_config=settings)

    new_ids: list[list[int]] = []
    for prompt, row in zip(prompts, written_BT[:, width:].tolist(), strict=True):
        until = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        new_ids.append(row[: min(until, prompt.n_new_tokens)])
    return new_ids


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]


def _with_answer(encoding: Encoding, prompt: Prompt, new_ids: Sequence[int]) -> Item | None:
    """Return a row with what was written in place of what it has; None for nothing."""
    item = prompt.item
    tokenizer = encoding.tokenizer
    if item.question:
        answer = str(tokenizer.decode(list(new_ids), skip_special_tokens=True)).strip()
        text = f"{item.prompt}{item.separator}{answer}"
        return replace(item, answer=answer, text=text) if answer else None

    # Decoded as a whole: a tokenizer may drop the space before a text.
    text = str(tokenizer.decode([*prompt.ids, *new_ids], skip_special_tokens=True))
    return replace(item, text=text, answer=text) if new_ids else None
