#!/usr/bin/env bash
# lm-eval 0.4.13: with a tokenizer that appends an end token, choices of one token all get the same score.
#
# A choice is scored by encoding prompt + choice and cutting off as many tokens as the prompt alone has. The prompt
# alone ends in the end token, too, so the cut is one token too far: the choice's first token is neither scored nor
# shown to the model. The model reads the prompt's end token in its place, and what is scored of a choice of one token
# is the end token behind it: the same input and the same target for every choice. The first choice wins each tie.
# (Not what one would guess: that an end token is scored after each choice.)
#
# Seen, for a model that has learnt four answers by heart (A, B, C, D to one question each):
#   tokenizer adds <s>            accuracy 1.0
#   tokenizer adds <s> and </s>   accuracy 0.25; all four log likelihoods of a question are equal
# There is no warning, neither of the end token nor of ties.
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
from pathlib import Path

import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
ANSWERS = {"red": "A", "green": "B", "blue": "C", "black": "D"}
VOCABULARY = {word: number for number, word in enumerate(["<s>", "</s>", ":", *ANSWERS, *ANSWERS.values()])}


def tokenizer(template: str):
    """Return a tokenizer that puts special tokens around a text as the template says."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", 0), ("</s>", 1)]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


with_start, with_both = tokenizer("<s> $A"), tokenizer("<s> $A </s>")

shape = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, bos_token_id=0, eos_token_id=1))
examples = torch.tensor([with_both(f"{question} : {answer}").input_ids for question, answer in ANSWERS.items()])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    model(examples, labels=examples).loss.backward()
    optimizer.step()

rows = [{"question": question, "gold": number} for number, question in enumerate(ANSWERS)]
Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} :",
    "doc_to_choice": list(ANSWERS.values()),
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}


def judged(tokens) -> tuple[float, list[float]]:
    """Return the accuracy, and the log likelihoods of the four choices of the last question."""
    judge = HFLM(pretrained=model.eval(), tokenizer=tokens, batch_size=4)
    report = simple_evaluate(model=judge, tasks=[TASK], bootstrap_iters=0)
    sample = report["samples"]["colours"][-1]
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    print(judge._encode_pair("black :", " D"), [round(value, 2) for value in likelihoods])
    return report["results"]["colours"]["acc,none"], likelihoods


right, likelihoods = judged(with_start)
assert right == 1.0 and likelihoods.index(max(likelihoods)) == 3
tied, likelihoods = judged(with_both)
print(f"acc {right} with a start token, {tied} with a start and an end token")
assert len(set(likelihoods)) == 1, "the choices are told apart now"
assert tied == 0.25, "the first choice wins every tie"
PYTHON
