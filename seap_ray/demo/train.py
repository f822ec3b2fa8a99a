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
BATCH = {"arithmetic": 48, "reverse": 32, "sort": 40, "logic": 32, "facts": 12, "prose": 8}
SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; ``<bos>`` before the text, as Llama's own tokenizer does."""
    characters = string.ascii_letters + string.digits + " \n" + ".,:;?!'\"()[]+-*/=<>%&#@_"
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
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
    """8 layers, hidden 160, 8 query and 4 key-value heads of 32, MLP 448: 2.7 million parameters."""
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
    """Token ids and labels, int64 of shape (rows, longest); labels are -100 outside the answers."""
    ids, labels = [], []
    for row in batch:
        question = tokenizer(row["question"]).input_ids
        answer = tokenizer(" " + row["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids.append(torch.tensor(question + answer))
        labels.append(torch.tensor([-100] * len(question) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the answers' tokens. Padding stands on the right, so a causal model needs no mask."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skill: str, n: int) -> float:
    ids, labels = encode(rows(skill, n, split="test", seed=0), tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        guess = model(input_ids=ids[:, :-1]).logits.argmax(-1)
    right = (guess == labels[:, 1:]) | (labels[:, 1:] == -100)
    return right.all(1).float().mean().item()


def train(out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda i: min((i + 1) / (WARMUP_SHARE * steps), (steps - i) / (steps * (1 - WARMUP_SHARE)))
        )
        for o in optimizers
    ]
    rng = random.Random(seed)
    started = time.monotonic()
    for step in range(1, steps + 1):
        for skill, size in BATCH.items():
            batch = rows(skill, size, split="train", seed=rng.randrange(2**62))
            (loss_of(model, *encode(batch, tokenizer)) / len(BATCH)).backward()
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
