#!/usr/bin/env bash
# lm-eval 0.4.13: the line break that ends a chat template's generation prompt can decide acc_norm.
#
# White space at the end of a prompt is moved to the front of the choice before it is scored. That is meant for the
# blank between words, but the generation prompt of many chat templates (ChatML's among them) ends in a line break. So
# its log probability counts in the score of each choice, and acc_norm divides the sum by the length of the choice
# alone: the longer a choice, the less the line break costs it. acc is not touched, as every choice pays the same.
#
# Seen, for a model that gives each token the same probability, the choices "Paris" and "the city of Lyon":
#   the prompt ends in <|assistant|>               1 and 4 tokens scored, acc 1.0, acc_norm 1.0
#   ... in <|assistant|> and a line break          2 and 5 tokens scored, acc 1.0, acc_norm 0.0
# So the acc_norm of two templates, or of a template and the plain prompt, can differ by more than what the model thinks
# of the answers, the more so where a model (a pruned one, say) has become less sure of the line break.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0" \
    "lm-eval==0.4.13" "datasets==5.2.0" "accelerate==1.15.0"
cd "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import json
import logging
import math
from pathlib import Path

import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
transformers.logging.disable_progress_bar()
QUESTION = "Where is the Louvre ?"
CHOICES = ["Paris", "the city of Lyon"]
TURN = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
TEMPLATES = {
    "no line break": TURN + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "line break": TURN + "{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}",
}

words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
special = ["<|end|>", "<|user|>", "<|assistant|>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
words.train_from_iterator([QUESTION, *CHOICES] * 9, trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>")

shape = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
uniform = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1)).eval()
torch.nn.init.zeros_(uniform.lm_head.weight)

Path("rows.jsonl").write_text(json.dumps({"question": QUESTION, "choices": CHOICES, "gold": 0}))
TASK = {
    "task": "places",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
# What a token costs in nats, each being as likely as any other.
COST = math.log(len(tokenizer))


def judged(name: str) -> tuple[list[int], float, float]:
    """Return the judged tokens of each choice, acc and acc_norm."""
    tokenizer.chat_template = TEMPLATES[name]
    judge = HFLM(pretrained=uniform, tokenizer=tokenizer)
    report = simple_evaluate(model=judge, tasks=[TASK], apply_chat_template=True, bootstrap_iters=0)
    sample = report["samples"]["places"][0]
    context = sample["arguments"][0][0]
    # How many tokens of a choice are judged follows from its log likelihood.
    counts = [round(-response[0] / COST) for response in sample["filtered_resps"]]
    scores = report["results"]["places"]
    acc, acc_norm = scores["acc,none"], scores["acc_norm,none"]
    print(f"{name:13} prompt {context!r}: tokens judged {counts}, acc {acc}, acc_norm {acc_norm}")
    return counts, acc, acc_norm


assert judged("no line break") == ([1, 4], 1.0, 1.0)
assert judged("line break") == ([2, 5], 1.0, 0.0), "the template's line break is no longer judged with the choices"
PYTHON
