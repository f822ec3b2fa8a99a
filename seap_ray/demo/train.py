"""Train the demo model: ``python -m seap_ray.demo.train OUT`` (one CPU core, about fifty minutes).

One Llama with grouped-query attention learns all skills at once, characters as tokens. The loss counts the answers
only: the questions are random, and learning them by heart would waste the model. Matrices are trained with Muon
(https://kellerjordan.github.io/posts/muon/), which here needs about half of AdamW's steps; the rest with AdamW.
"""

import argparse
import random
import string
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seap_ray.demo.skills import SKILLS, Row, rows

STEPS = 1800
PEAK_LR = 4e-3
WARMUP_SHARE = 0.03
"""Share of the steps in which the learning rate rises to its peak; then it falls to 0."""
BATCH = {"arithmetic": 48, "reverse": 32, "sort": 40, "logic": 32, "facts": 12, "prose": 8}
"""Rows of each skill in a step: more of those that are hard to learn."""
SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character, and ``<bos>`` before the text as in Llama's own."""
    # Every character that a skill's rows have, and some more for what a user may type.
    characters = string.ascii_letters + string.digits + " \n" + ".,:;?!'\"()[]+-*/=<>%&#@_"
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # joins characters without the spaces that others put between tokens
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a new Llama of 2.7 million parameters.

    It has 8 layers, hidden size 160, 8 query and 4 key-value heads of 32, and MLP size 448.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # with bfloat16 on a CPU twice as fast as sdpa, measured
    return LlamaForCausalLM(config)


def encode(batch: list[Row], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both int64 of shape (rows, longest); labels are -100 outside the answers."""
    ids = []
    labels = []
    for row in batch:
        # The space belongs to the answer: it is what the model writes first. The end is learned with the answer.
        question = tokenizer(row["question"]).input_ids
        answer = tokenizer(" " + row["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids.append(torch.tensor(question + answer))
        labels.append(torch.tensor([-100] * len(question) + answer))

    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens, a scalar.

    Padding stands on the right, so a causal model needs no mask.
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits

    # A position predicts the token after it, so labels are shifted by one. The loss is computed in float32.
    return cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: str, n: int) -> float:
    """Return the share of ``n`` held-out questions of a skill of which every token of the answer is right."""
    ids, labels = encode(rows(skill, n, split="test", seed=0), tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        guess = model(input_ids=ids[:, :-1]).logits.argmax(-1)

    # Each token is predicted after the right ones before it, which is the same as writing the answer token by token: at
    # the first wrong one either way ends.
    right = (guess == labels[:, 1:]) | (labels[:, 1:] == -100)
    return right.all(1).float().mean().item()


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, and AdamW for embeddings, head and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "layers" in name
        (matrices if is_matrix else others).append(parameter)

    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(out: Path, steps: int, seed: int) -> None:
    """Train the demo model and write it to ``out``, every 100 steps and at the end."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizers = make_optimizers(model)

    def lr_factor(step: int) -> float:
        # Two straight lines, of which the lower one counts: up to the peak, then down towards 0.
        warmup = (step + 1) / (WARMUP_SHARE * steps)
        decay = (steps - step) / (steps * (1 - WARMUP_SHARE))
        return min(warmup, decay)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor) for optimizer in optimizers]
    rng = random.Random(seed)
    started = time.monotonic()

    for step in range(1, steps + 1):
        # Gradients of the skills add up, each skill with the same weight whatever the number of its rows.
        for skill, size in BATCH.items():
            batch = rows(skill, size, split="train", seed=rng.randrange(2**62))
            (answer_loss(model, *encode(batch, tokenizer)) / len(BATCH)).backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

        if step % 100 == 0 or step == steps:
            scores = {skill: round(exact_match(model, tokenizer, skill, 100), 2) for skill in SKILLS}
            print(f"step {step}/{steps}  {time.monotonic() - started:.0f} s  {scores}", flush=True)
            save(out, model, tokenizer)


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write float16 weights: half the size, and finer than bfloat16 at these magnitudes."""
    # A copy, since the training goes on in float32.
    half = make_model(tokenizer).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that the checkpoint is written to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.out, arguments.steps, arguments.seed)
