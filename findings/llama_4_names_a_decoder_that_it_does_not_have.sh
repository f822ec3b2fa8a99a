#!/usr/bin/env bash
# transformers 5.19.0: Llama4ForCausalLM.get_decoder() and .base_model are the whole model, head included.
#
# Both look for a part by the class's base_model_prefix, "language_model". The class that reads pictures has such a part;
# the one for texts calls it "model", and where nothing is found both answer with the model itself. Neither raises, so a tool
# that takes hidden states or walks layers by them works with every other family and gets, of a Llama 4, an output without
# last_hidden_state and a module without layers.
#
# Seen, for a small random model of each: Llama, Mixtral and Qwen3-MoE return their decoder; Llama4 returns itself.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

print("transformers", transformers.__version__)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
experts = {"num_local_experts": 2}
configs = {
    "Llama": LlamaConfig(**sizes, **heads),
    "Mixtral": MixtralConfig(**sizes, **heads, **experts),
    "Qwen3-MoE": Qwen3MoeConfig(**sizes, **heads, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32),
    "Llama4": Llama4TextConfig(**sizes, **heads, **experts, intermediate_size_mlp=32),
}
seen = {}
for name, config in configs.items():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.model.layers is not None
    seen[name] = model.get_decoder() is model
    assert (model.base_model is model) == seen[name]
    print(f"{name}: get_decoder() and base_model are {'the whole model' if seen[name] else 'its decoder'}")
assert seen == {"Llama": False, "Mixtral": False, "Qwen3-MoE": False, "Llama4": True}, "the behaviour has changed"
PYTHON
