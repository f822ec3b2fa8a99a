#!/usr/bin/env bash
# transformers 5.19.0: a key that only per_layer_config has keeps the whole folder from being read, its tokenizer, too.
#
# config.json may give single layers their own values under per_layer_config. A key there must also stand at the top
# level, although no generic loader uses either of them, and although the model class of the folder (auto_map) may have
# a default for it.
#
# Seen, for a config whose layer 1 has o_proj_bias:
#   without a top-level o_proj_bias   PreTrainedConfig and AutoTokenizer: ValueError, "The following attributes are
#                                     missing: ['o_proj_bias']"
#   with "o_proj_bias": false         both load
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.19.0" "tokenizers==0.23.3"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedConfig

transformers.logging.set_verbosity_error()
LAYERS = {"num_hidden_layers": 2, "per_layer_config": {"1": {"o_proj_bias": True}}}


def outcome(loader, name: str, **top_level) -> str:
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "custom", **LAYERS, **top_level}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    try:
        loader.from_pretrained(folder)
    except ValueError as error:
        return str(error).splitlines()[0]
    return "loaded"


for loader in (PreTrainedConfig, AutoTokenizer):
    without = outcome(loader, "without")
    beside = outcome(loader, "beside", o_proj_bias=False)
    print(f"{loader.__name__:17} without: {without}    with: {beside}")
    assert without == "The following attributes are missing: ['o_proj_bias']" and beside == "loaded"
PYTHON
