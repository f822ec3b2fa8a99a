#!/usr/bin/env bash
# transformers 5.19.0: a Gemma 2 that is loaded as it is computes without the soft cap of its attention.
#
# Gemma 2 caps attention's logits, attn_logit_softcapping * tanh(logits / attn_logit_softcapping), and its config.json says
# so. from_pretrained chooses scaled_dot_product_attention, which has no such cap, and leaves it out without a warning, so
# that the model computes what a config with the cap set to null computes. With attn_implementation="eager" it is applied.
# Perplexities, activation statistics and distances between a pruned and a dense Gemma 2 are then those of another model
# than the one that vLLM and llama.cpp serve.
#
# Seen, for a small random Gemma 2 with large attention logits, largest difference of the logits:
#   loaded as it is  and  the cap set to null      1e-6
#   loaded as it is  and  attn_implementation="eager"   0.4
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

print("transformers", transformers.__version__)
torch.manual_seed(0)
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, attn_logit_softcapping=1.0)).eval()
for name, weight in model.named_parameters():
    if "q_proj" in name or "k_proj" in name:
        weight.data *= 30
model.save_pretrained("model")

ids = torch.arange(1, 21)[None]


def logits(**arguments):
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        loaded = Gemma2ForCausalLM.from_pretrained("model", **arguments).eval()
        computed = loaded(ids).logits
    assert not [w for w in warned if "cap" in str(w.message)], "it warns now"
    return computed


as_it_is = logits()
eager = logits(attn_implementation="eager")
without_cap = logits(attn_implementation="eager", attn_logit_softcapping=None)
print(f"loaded as it is, and the cap set to null: {(as_it_is - without_cap).abs().max():.1e}")
print(f"loaded as it is, and eager: {(as_it_is - eager).abs().max():.2f}")
assert (as_it_is - without_cap).abs().max() < 1e-4 and (as_it_is - eager).abs().max() > 0.1, "the behaviour has changed"
PYTHON
