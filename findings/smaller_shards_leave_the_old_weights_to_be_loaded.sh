#!/usr/bin/env bash
# transformers 5.19.0: save_pretrained with shards does not replace the model.safetensors of an earlier save.
#
# save_pretrained tidies the folder that it writes into, but only files whose name has the form of a shard. A model that
# was saved whole and is saved again in shards (a smaller max_shard_size, or a model that has grown) leaves both in the
# folder, and from_pretrained prefers the whole file: it loads the model of the first save. No warning, at either end.
#
# Seen, for a model saved whole, changed, and saved again into the same folder:
#   second save whole      from_pretrained gives the second model
#   second save in shards  from_pretrained gives the FIRST model; model.safetensors stands beside the shards
#   third save whole       from_pretrained gives the third model; the shards are gone, but the index that names them
#                          stays, so a reader that believes the index finds no file
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0" "safetensors==0.8.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
SAVED = Path("model")
WHOLE = SAVED / "model.safetensors"
INDEX = SAVED / "model.safetensors.index.json"

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)


def loaded_after_save(version: int, **keywords) -> int:
    """Fill the norm with the version's number, save, and return the number that is loaded."""
    with torch.no_grad():
        model.model.norm.weight.fill_(version)
    model.save_pretrained(SAVED, **keywords)
    read = AutoModelForCausalLM.from_pretrained(SAVED).model.norm.weight
    assert bool((read == read[0]).all())
    print(f"saved {version}, loaded {int(read[0])}: {', '.join(sorted(file.name for file in SAVED.glob('model*')))}")
    return int(read[0])


assert loaded_after_save(1) == 1
assert loaded_after_save(2) == 2
assert loaded_after_save(3, max_shard_size="40KB") == 2, "a save in shards now replaces the whole file"
assert WHOLE.exists() and len(list(SAVED.glob("model-*"))) > 1
assert loaded_after_save(4) == 4
assert INDEX.exists() and not list(SAVED.glob("model-*")), "the index no longer outlives its shards"
PYTHON
