#!/usr/bin/env bash
# transformers 5.19.0, peft 0.21.2: a merged model that is saved into its adapter's folder is adapted twice when loaded.
#
# from_pretrained looks for adapter_config.json in the folder. Where whole weights lie beside it, it takes those weights
# as the base (not the base that the adapter names) and puts the adapter on top. After
# merge_and_unload().save_pretrained(the adapter's folder), these weights hold the adapter already. No warning is given,
# and it depends on the environment: without peft installed, the same folder gives the merged model.
#
# Seen, for one folder with adapter_model.safetensors and the merged model.safetensors (logits of 20 tokens):
#   peft installed       from_pretrained = merged model + adapter, far from the model that was merged
#   peft not installed   from_pretrained = the model that was merged
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0" \
    "peft==0.21.2" "accelerate==1.15.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
IDS = torch.arange(20)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).save_pretrained("base")
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora)
expected = logits(adapted)
adapted.save_pretrained("expert")
assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("expert")), expected), "the adapter alone loads right"

merged = adapted.merge_and_unload()
assert torch.allclose(logits(merged), expected, atol=1e-3), "the merge itself is right"
merged.save_pretrained("expert")

seen = logits(AutoModelForCausalLM.from_pretrained("expert"))
twice = logits(PeftModel.from_pretrained(merged, "expert"))
print(f"with peft: {(seen - expected).abs().max():.3f} from the merged model")
assert torch.allclose(seen, twice, atol=1e-3), "the adapter is no longer put on top of the merged weights"
assert (seen - expected).abs().max() > 1
torch.save(expected, "expected.pt")
PYTHON

"$folder/venv/bin/pip" uninstall --quiet --yes peft
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
with torch.no_grad():
    seen = AutoModelForCausalLM.from_pretrained("expert").eval()(torch.arange(20)[None]).logits
difference = (seen - torch.load("expected.pt")).abs().max()
print(f"without peft: {difference:.3f} from the merged model")
assert difference < 1e-3
PYTHON
