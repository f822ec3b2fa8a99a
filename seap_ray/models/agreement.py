"""Agreement: a cut model and a reference in; the share of the cut one's own words that the reference would say, out.

Letters: T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seap_ray.models.corpus import Item
from seap_ray.models.encoding import Encoding
from seap_ray.models.synthesis import Prompt, continued

NEW_TOKENS = 32
"""Tokens of a reply that are compared: in longer ones every error is followed by its own consequences."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model has written after a prompt, greedily."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """Its tokens, with the one that ends it where there is one."""


def write_replies(
    model: Any, encoding: Encoding, items: Sequence[Item], *, longest: int, batch_tokens: int
) -> list[Reply]:
    """Let a model answer the questions of a task's rows, or go on with the beginnings of mere texts.

    Args:
        model: A causal language model in evaluation mode.
        encoding: How the task's texts become ids of the model.
        items: Rows of the task.
        longest: Most tokens of prompt and reply together; a row that leaves no room for a reply is left out.
        batch_tokens: Most tokens of a batch, padding included.
    """
    prompts: list[Prompt] = []
    for item in items:
        prompt = Prompt.of(encoding, item, longest)
        if prompt:
            room = longest - len(prompt.ids)
            prompts.append(Prompt(item, prompt.ids, min(NEW_TOKENS, room)))

    replies = continued(model, prompts, temperature=0, batch_tokens=batch_tokens)
    pairs = zip(prompts, replies, strict=True)
    return [Reply(tuple(prompt.ids), tuple(ids)) for prompt, ids in pairs if ids]


@torch.inference_mode()
def agreements(model: Any, replies: Sequence[Reply]) -> list[float]:
    """Return the share of each reply's tokens that are a model's likeliest after what comes before them.

    Args:
        model: A causal language model in evaluation mode: the reference.
        replies: Replies of another model with the same tokens.
    """
    device = model.get_input_embeddings().weight.device
    shares: list[float] = []
    for reply in replies:
        ids_T = torch.tensor([*reply.prompt_ids, *reply.ids], device=device)
        # The last token is compared, and predicts nothing that is.
        logits_TV = model(input_ids=ids_T[None, :-1]).logits[0, len(reply.prompt_ids) - 1 :]
        is_likeliest_T = logits_TV.argmax(-1) == ids_T[len(reply.prompt_ids) :]
        shares.append(float(is_likeliest_T.double().mean()))
    return shares
