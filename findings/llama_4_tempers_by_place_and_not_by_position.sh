#!/usr/bin/env bash
# transformers 5.19.0: a Llama 4 answers otherwise when its prompt is padded on the left, whatever position_ids say.
#
# Layers without rotary embeddings scale queries by the token's position, in steps of floor_scale (8,192 as published). The
# position is counted in the attention itself, from the start of the row: position_ids are not asked, though rotary layers
# go by them. A prompt that padding pushes over a step, as the shorter of a batch does, gets another temperature than alone;
# so do sequences that share a row. vLLM's class of the same family goes by positions.
#
# Seen, in float64 with floor_scale 8 and eager attention, 6 tokens behind 6 of padding, masks and positions as transformers
# makes them: logits differ by more than 1e-3 of the largest from those of the 6 tokens alone. With temperature tuning off,
# or without rotary-free layers, by less than 1e-6.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import Llama4ForCausalLM, Llama4TextConfig

print("transformers", transformers.__version__)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "pad_token_id": 0}
prompt = torch.tensor([[5, 17, 33, 8, 41, 29]])
padded = torch.cat([torch.zeros_like(prompt), prompt], dim=1)
mask = (padded != 0).long()
positions = (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def difference(**changed) -> float:
    """The largest difference of the prompt's logits, padded and alone, relative to the largest logit."""
    torch.manual_seed(0)
    settings = {"no_rope_layer_interval": 2, "floor_scale": 8, "attn_scale": 1.0, "initializer_range": 0.2, **changed}
    config = Llama4TextConfig(**sizes, **heads, **settings)
    model = Llama4ForCausalLM._from_config(config, attn_implementation="eager").double().eval()
    alone = model(prompt).logits
    behind = model(padded, attention_mask=mask, position_ids=positions).logits[:, prompt.shape[1] :]
    return float((behind - alone).abs().max() / alone.abs().max())


tempered, plain, rotary = difference(), difference(attn_temperature_tuning=False), difference(no_rope_layers=[1, 1])
print(f"padded on the left against alone: {tempered:.1e}; without temperature: {plain:.1e}; all layers rotary: {rotary:.1e}")
assert tempered > 1e-3 and plain < 1e-6 and rotary < 1e-6, "the behaviour has changed"
PYTHON
