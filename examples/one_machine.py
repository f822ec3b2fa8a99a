"""Prune the demo model for one task in this process, without Ray, and generate with the result: seconds on a CPU.

python examples/one_machine.py [FOLDER]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seap_ray import Checkpoint, Config, Plan, choose_shapes, keep, record
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.scores import Norms, head_scores, wifv
from seap_ray.demo import skills
from seap_ray.models.export import CheckpointExport, finish, parse_size, write_tensors
from seap_ray.storage.paths import LocalPath

RATIO = 0.2
folder = LocalPath(sys.argv[1] if len(sys.argv) > 1 else "runs/one_machine")
folder.mkdir(parents=True, exist_ok=True)

# Calibrate: the moments of every layer's o_proj and down_proj inputs over 200 questions with their answers.
base = Checkpoint.open("demo")
architecture = base.architecture
tokenizer = AutoTokenizer.from_pretrained(base.folder)
model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
rows = skills.rows("arithmetic", 200, split="train", seed=0)
texts = [f"{row['question']} {row['answer']}" for row in rows]
statistics = record(model, tokenizer(texts)["input_ids"], batch_tokens=4096)

# Score: the variance of each column times its squared weight norm; a head sums its columns.
scores = []
for layer in range(architecture.n_layers):
    column_scores = {}
    for site, module in architecture.modules(layer).items():
        norms = Norms.of(base.read(architecture.tensor(layer, module)))
        column_scores[site] = wifv(statistics[layer, site], norms)
    scores.append((head_scores(column_scores["attn"], architecture.head_dim), column_scores["mlp"]))

# Plan: widths of every layer that meet the ratio, then the best heads and channels for these widths.
shapes = choose_shapes(architecture, Config().pruning, ratio=RATIO, adds_biases=True, scores_L=scores)
layers = zip(shapes, architecture.layers, scores, strict=True)
kept = tuple(keep(shape, layer.shape, *layer_scores) for shape, layer, layer_scores in layers)
plan = Plan("arithmetic", RATIO, COMPENSATIONS["mean"], kept, provenance={})

# Write the smaller checkpoint; the mean of what is cut becomes a bias.
export = CheckpointExport(base, plan, statistics)
files = export.files(parse_size("5GB"))
for name, tensors in files.items():
    write_tensors(export, tensors, folder / name)
finish(export, folder, files, manifest={"ratio": RATIO})

# Load it with transformers and answer a question that the calibration has not seen.
expert = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
question = skills.rows("arithmetic", 1, split="test", seed=0)[0]["question"]
reply = expert.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=4, do_sample=False)
removed = base.parameters - expert.num_parameters()
print(f"{plan.planned(architecture):.1%} of the decoder removed, {removed:,} parameters fewer")
print(tokenizer.decode(reply[0], skip_special_tokens=True))
