"""GGUF files of tiny models as llama.cpp's converter writes them: names, permuted rows, metadata, vocabulary."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""llama.cpp's names; those of a layer without its beginning."""


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every byte, one for ``ab``, and a beginning and an end token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", *symbols, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", **options)


def save_llama(folder: Path, **settings: Any) -> LlamaForCausalLM:
    """Write a random Llama with a tokenizer as transformers saves it, whose matrices are whole blocks of Q8_0."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def permuted(weight_OD: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows of queries or keys in llama.cpp's order: the two halves of a head's rotation interleaved."""
    halves = weight_OD.reshape(n_heads, 2, weight_OD.shape[0] // n_heads // 2, *weight_OD.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight_OD.shape)


def write_gguf(
    path: Path,
    folder: Path,
    *,
    kind: str = "Q8_0",
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write the Llama in a folder as a GGUF file.

    Args:
        path: The file.
        folder: A folder of ``save_llama``.
        kind: Type of the matrices, such as ``Q8_0``, ``F16``; norms are float32.
        architecture: Name of the family.
        metadata: More keys and their values.
        tensors: More tensors.
        without: llama.cpp's names of tensors that are left out.
    """
    config = LlamaConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, _type_of(value))

    for name, tensor in load_file(folder / "model.safetensors").items():
        _add_tensor(writer, config, name, tensor.float().numpy(), kind, without)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type_of(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return kinds.get(type(value), gguf.GGUFValueType.STRING)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([special if token.startswith("<") and len(token) > 1 else 1 for token, _ in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _add_tensor(
    writer: gguf.GGUFWriter, config: LlamaConfig, name: str, array: np.ndarray, kind: str, without: tuple[str, ...]
) -> None:
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stored = f"blk.{layer}.{TENSORS[rest]}" if name.startswith("model.layers.") else TENSORS[name]
    if stored in without:
        return

    if "q_proj" in name:
        array = permuted(array, config.num_attention_heads)
    elif "k_proj" in name:
        array = permuted(array, config.num_key_value_heads)
    if array.ndim == 1 or kind == "F32":
        writer.add_tensor(stored, array)
        return
    quantized = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
    writer.add_tensor(stored, quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
