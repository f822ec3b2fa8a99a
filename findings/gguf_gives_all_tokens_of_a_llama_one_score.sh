#!/usr/bin/env bash
# gguf 0.19.0: a SentencePiece vocabulary that is read from tokenizer.json makes other tokens in llama.cpp.
#
# llama.cpp merges two neighbours whose token has the highest score. LlamaHfVocab reads tokenizer.json, which has an
# ordered list of merges and no scores, and says -1000.0 for every token ("placeholder for actual logic"). All merges are
# then equally good, and the leftmost one wins. llama.cpp's convert_hf_to_gguf.py takes this class for a Llama or Mistral
# whose folder has tokenizer.json and no tokenizer.model, as transformers 5 saves it; nothing warns of it.
#
# Seen, for the merges a+t, h+at, t+h in this order and the text "that":
#   transformers                               t, hat
#   llama.cpp with LlamaHfVocab's scores       th, at
#   llama.cpp with minus the rank of a merge   t, hat
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "transformers==5.19.0" "gguf==0.19.0" "xllamacpp==2026.10.11549"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGUFWriter, LlamaHfVocab
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

TEXT = "that"
MERGES = [("a", "t"), ("h", "at"), ("t", "h")]
tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "t", "h", "a", *map("".join, MERGES)]
vocabulary = {token: i for i, token in enumerate(tokens)}
tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
fast.save_pretrained("model")


def by_llama_cpp(file: str, scores: list[float], types: list[int]) -> list[str]:
    """Write a model of one layer with these scores, and return the tokens that llama.cpp makes of the text."""
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    square = np.eye(32, dtype=np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", square.sum(0))
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx = 32
    settings.n_parallel = 1
    settings.verbosity = 0
    server = xllamacpp.Server(settings)
    body = json.dumps({"content": TEXT}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return [tokens[i] for i in json.load(answer)["tokens"]]


read = list(LlamaHfVocab(Path("model")).all_tokens())
types = [int(kind) for _, _, kind in read]
scores = [score for _, score, _ in read]
merged = ["".join(merge) for merge in MERGES]
ranks = [-float(merged.index(token)) if token in merged else -9.0 for token in tokens]

expected = fast.convert_ids_to_tokens(fast(TEXT)["input_ids"])
placeholder = by_llama_cpp("placeholder.gguf", scores, types)
ranked = by_llama_cpp("ranked.gguf", ranks, types)
print("transformers:", expected)
print("llama.cpp, scores of LlamaHfVocab:", placeholder, set(scores))
print("llama.cpp, minus the rank of each merge:", ranked)
assert ranked == expected
assert set(scores) == {-1000.0}, "LlamaHfVocab has scores now"
assert placeholder != expected
PYTHON
