"""Quantise an expert by llm-compressor, calibrated on the texts that its task was pruned with.

python examples/llm_compressor.py [SCHEME] [EXPERT] [FOLDER]

llm-compressor pins other versions than seap_ray, so this runs in an environment of its own, without seap_ray:
pip install llmcompressor
"""

import math
import sys
from pathlib import Path

from compressed_tensors.quantization import preset_name_to_scheme
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

name = sys.argv[1] if len(sys.argv) > 1 else "W8A8"
expert = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/demo/experts/0.50/arithmetic").resolve()
folder = sys.argv[3] if len(sys.argv) > 3 else f"runs/{expert.name}-{name}"

# <run>/experts/<ratio>/<task>, and its texts as token ids in <run>/shards/<task>.
shards = sorted(map(str, expert.parents[2].glob(f"shards/{expert.name}/[0-9]*.parquet")))
texts = load_dataset("parquet", data_files=shards, split="train")
texts = texts.select_columns("ids").rename_column("ids", "input_ids")

# The folder's own code, which knows that each layer has its own widths.
model = AutoModelForCausalLM.from_pretrained(expert, dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(expert)

scheme = preset_name_to_scheme(name, ["Linear"])
if scheme.weights.group_size:
    # Columns that share a scale: as many as divide the columns of every layer.
    linear = [module for layer in model.model.layers for module in layer.modules() if hasattr(module, "in_features")]
    scheme.weights.group_size = math.gcd(scheme.weights.group_size, *(module.in_features for module in linear))

# FP8 needs no texts: weights are rounded to nearest, activations as they come.
needs_texts = not name.startswith("FP8")
modifier = GPTQModifier if needs_texts else QuantizationModifier
oneshot(
    model=model,
    tokenizer=tokenizer,
    trust_remote_code_model=True,
    recipe=modifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    output_dir=folder,
    **({"dataset": texts, "num_calibration_samples": len(texts), "max_seq_length": 256} if needs_texts else {}),
)
print(f"{expert.name} in {name}: {folder}")
