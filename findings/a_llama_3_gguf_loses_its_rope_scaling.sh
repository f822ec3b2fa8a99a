#!/usr/bin/env bash
# transformers 5.19.0: a Llama 3.1, 3.2 or 3.3 that is read from a GGUF file has lost its RoPE scaling.
#
# GGUF has metadata for RoPE scaling (rope.scaling.*), but llama.cpp keeps that of rope_type llama3 in a tensor,
# rope_freqs.weight, by which it divides the frequencies. from_pretrained(gguf_file=...) passes over this tensor without
# a word: all weights are equal to the original's, only config.rope_parameters says "default". The first tokens hide it,
# as the frequencies that differ are the low ones. (missing_keys and unexpected_keys are empty, too.)
#
# Seen, for one file with llama3 scaling, the log probabilities of the token after 300 others:
#   llama.cpp (xllamacpp 2026.10.11549)   those of the original model, to 0.01
#   transformers                          more than 5 off; save_pretrained then writes a model without scaling
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "transformers==5.19.0" \
    "accelerate==1.15.0" "gguf==0.19.0" "xllamacpp==2026.10.11549"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import numpy as np
import torch
import transformers
import xllamacpp
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, CONTEXT, BASE = 2, 4, 2, 16, 96, 512, 10000.0
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
SCALING = {"rope_type": "llama3", "rope_theta": BASE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

config = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=HEADS * HEAD_DIM,
    intermediate_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=CONTEXT,
    rope_parameters={**SCALING, "original_max_position_embeddings": 64},
    initializer_range=0.3,
)
original = LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k in the order of arch llama, where the two halves of a head alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


writer = GGUFWriter("model.gguf", "llama")
writer.add_context_length(CONTEXT)
writer.add_embedding_length(config.hidden_size)
writer.add_block_count(LAYERS)
writer.add_head_count(HEADS)
writer.add_head_count_kv(KV_HEADS)
writer.add_feed_forward_length(WIDTH)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_rope_dimension_count(HEAD_DIM)
writer.add_rope_freq_base(BASE)
writer.add_vocab_size(len(TOKENS))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(TOKENS)
writer.add_token_types([1] * len(TOKENS))
writer.add_token_merges(["a b"])
writer.add_eos_token_id(0)
names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
for name, tensor in original.state_dict().items():
    weight = tensor.numpy()
    if "q_proj" in name or "k_proj" in name:
        weight = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
unscaled = BASE ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
factors = unscaled / original.model.rotary_emb.inv_freq.numpy()
writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf").eval()
assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in original.state_dict().items())


@torch.no_grad()
def next_token(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the log probability of each token after the last one."""
    return model(ids).logits.log_softmax(-1)[0, -1]


# llama.cpp lists log probabilities only where the next token ends a character.
prompts = (torch.randint(1, 256, (1, 300)) for _ in range(100))
ids = next(ids for ids in prompts if TOKENS[next_token(original, ids).argmax()].isascii())
expected, seen = next_token(original, ids), next_token(read, ids)

settings = xllamacpp.CommonParams()
settings.model.path = "model.gguf"
settings.n_ctx = CONTEXT
settings.n_parallel = 1
settings.verbosity = 0
server = xllamacpp.Server(settings)
request = {"prompt": ids[0].tolist(), "n_predict": 1, "temperature": 0, "n_probs": 5, "logprobs": 5}
answer = server.handle_completions(request)
top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

print(f"rope: written {original.config.rope_parameters['rope_type']}, read {read.config.rope_parameters['rope_type']}")
for token in top:
    number, by_llama_cpp = token["id"], token["logprob"]
    numbers = (expected[number].item(), by_llama_cpp, seen[number].item())
    print(f"token {number:3}: original, llama.cpp, transformers", *(f"{value:6.2f}" for value in numbers))
    assert abs(by_llama_cpp - expected[number]) < 0.1, "llama.cpp reads the file as it was written"
assert read.config.rope_parameters["rope_type"] == "default", "transformers reads the scaling now"
assert (expected - seen).abs().max() > 5
PYTHON
