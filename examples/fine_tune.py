"""Teach an expert another task with peft's LoRA, and save the merged model as a folder that loads and serves as before.

python examples/fine_tune.py [EXPERT] [FOLDER]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import seap_ray.models.hf  # noqa: F401  or trust_remote_code=True where seap_ray is not installed
from seap_ray.demo import skills

SKILL = "sort"
STEPS = 30
BATCH = 16
expert = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/experts/0.50/arithmetic"
folder = sys.argv[2] if len(sys.argv) > 2 else "runs/fine_tuned"

# An adapter on every linear module: each layer has its own widths, and peft looks at the modules alone.
tokenizer = AutoTokenizer.from_pretrained(expert)
model = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)

# Questions with their answers; only the answers are learned.
rows = skills.rows(SKILL, STEPS * BATCH, split="train", seed=0)
for step in range(STEPS):
    batch = rows[step * BATCH : (step + 1) * BATCH]
    texts = [f"{row['question']} {row['answer']}" for row in batch]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    for label, row in zip(labels, batch, strict=True):
        label[: len(tokenizer(row["question"])["input_ids"])] = -100

    loss = adapted(**encoded, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, STEPS - 1):
        print(f"step {step}: loss {loss.item():.3f}")

# Merged, the model has the expert's own tensors again. save_pretrained takes the code of its layers along.
merged = adapted.merge_and_unload()
merged.save_pretrained(folder)
tokenizer.save_pretrained(folder)

reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
question = skills.rows(SKILL, 1, split="test", seed=0)[0]["question"]
reply = reloaded.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=16, do_sample=False)
print(f"{folder}: {tokenizer.decode(reply[0], skip_special_tokens=True)}")
