#!/usr/bin/env bash
# transformers 5.17.0: an LFM2 whose configuration is of a class of one's own is read back as a model that raises KeyError.
#
# Configurations whose class is not in the package are taken for custom code, whose layer_types are given newer names when they
# are read from a folder: conv becomes linear_attention. LFM2's own decoder looks its masks up by the older name. An empty subclass of
# Lfm2Config is enough, with transformers' own model. 5.18.0 leaves conv as it is.
#
# Seen, for the same small random model, written by save_pretrained and read by from_pretrained:
#   Lfm2Config                      layer_types conv, full_attention   logits
#   class Own(Lfm2Config): pass     layer_types linear_attention, full_attention   KeyError: 'linear_attention'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.17.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import Lfm2Config, Lfm2ForCausalLM

print("transformers", transformers.__version__)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "block_multiple_of": 8}


class Own(Lfm2Config):
    pass


seen = {}
for config_class in (Lfm2Config, Own):
    name = config_class.__name__
    Lfm2ForCausalLM(config_class(**sizes, **heads, layer_types=["conv", "full_attention"])).save_pretrained(name)
    config = config_class.from_pretrained(name)
    try:
        logits = Lfm2ForCausalLM.from_pretrained(name, config=config).eval()(torch.tensor([[3, 5, 7]])).logits
        seen[name] = (config.layer_types, tuple(logits.shape))
    except KeyError as error:
        seen[name] = (config.layer_types, f"KeyError: {error}")
    print(name, *seen[name])

renamed = ["linear_attention", "full_attention"]
if seen["Lfm2Config"][1] != (1, 3, 64) or seen["Own"] != (renamed, "KeyError: 'linear_attention'"):
    raise SystemExit("the behaviour has changed")
PYTHON
