#!/usr/bin/env bash
# transformers 5.19.0, tokenizers 0.23.3: AutoTokenizer does not always tokenise as tokenizer.json says.
#
# The class that tokenizer_config.json or the model type names builds a pipeline of its own from the vocabulary and
# merges of tokenizer.json, and leaves that file's normalizer and pre-tokenizer aside. No warning is given.
#
# Seen, for one byte-level BPE without a normalizer, "the year 2024 cafe" with a combining accent (5 tokens by the file):
#   model_type llama, tokenizer_class LlamaTokenizerFast       6 tokens: spaces and the accent are lost
#   model_type qwen2, tokenizer_class PreTrainedTokenizerFast  8 tokens: NFC-normalised first, and every digit alone
#   model_type llama, tokenizer_class PreTrainedTokenizerFast  5 tokens, as in the file
#
# transformers keeps a list of model types whose named class it does not believe: qwen2 is on it, so its own class is
# taken whatever tokenizer_config.json names; llama is not.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
TEXT = "the year 2024 cafe\u0301"

by_file = Tokenizer(models.BPE())
by_file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
by_file.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
by_file.train_from_iterator(
    ["the year 2024 and 1999 caf\u00e9 cafe\u0301"] * 50,
    trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False),
)
expected = by_file.encode(TEXT).tokens


def tokens(model_type: str, tokenizer_class: str) -> list[str]:
    folder = Path(f"{model_type}-{tokenizer_class}")
    folder.mkdir()
    by_file.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder).tokenize(TEXT)


llama = tokens("llama", "LlamaTokenizerFast")
qwen2 = tokens("qwen2", "PreTrainedTokenizerFast")
plain = tokens("llama", "PreTrainedTokenizerFast")
for name, seen in (("tokenizer.json", expected), ("llama", llama), ("qwen2", qwen2), ("plain", plain)):
    print(f"{name:15} {len(seen)} {seen}")

assert plain == expected
assert llama != expected and not any("\u0120" in token for token in llama), "LlamaTokenizer keeps the spaces now"
assert [*"2024"] == [token for token in qwen2 if token.isdigit()] and "2024" in "".join(expected)
assert qwen2[-1] == by_file.encode(" caf\u00e9").tokens[-1] != expected[-1], "Qwen2Tokenizer does not normalise now"
PYTHON
