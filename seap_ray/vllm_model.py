"""vLLM model: a Llama-like decoder whose layers have their own heads, MLP widths and output biases.

vLLM's own Llama layer takes a configuration of its own, so a layer here is that class with the layer's configuration.
It serves Qwen2 as well, whose only difference is biases on q, k and v (``qkv_bias``).

vLLM cuts a tensor that is too large to the size it wants, and drops a bias that it does not know, both silently, so
every tensor is compared with the configuration before it is loaded.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

import seap_ray.hf  # noqa: F401  lets from_config know our architectures


class SeapDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: PreTrainedConfig | None = None):
        config = config or vllm_config.model_config.hf_config
        own = config.per_layer_config[extract_layer_index(prefix)]
        _check_divisible(own, vllm_config.parallel_config.tensor_parallel_size, prefix)
        super().__init__(vllm_config, prefix, config=own)
        quantization = self.get_quant_config(vllm_config)
        if own.o_proj_bias:
            width = own.num_attention_heads * own.head_dim
            self.self_attn.o_proj = _with_bias(width, own.hidden_size, quantization, f"{prefix}.self_attn.o_proj")
        if own.down_proj_bias:
            width = own.intermediate_size
            self.mlp.down_proj = _with_bias(width, own.hidden_size, quantization, f"{prefix}.mlp.down_proj")


def _with_bias(width: int, hidden_size: int, quantization: object, prefix: str) -> nn.Module:
    return RowParallelLinear(width, hidden_size, bias=True, quant_config=quantization, prefix=prefix)


def _check_divisible(own: PreTrainedConfig, ranks: int, prefix: str) -> None:
    """vLLM splits heads and channels over the ranks, and repeats key-value heads when there are fewer of them."""
    kv_heads = own.num_key_value_heads
    if own.num_attention_heads % ranks or own.intermediate_size % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{prefix} has {own.num_attention_heads} heads, {kv_heads} key-value heads and {own.intermediate_size} "
            f"channels, which do not divide by tensor_parallel_size {ranks}; "
            f"prune with pruning.tensor_parallel={ranks}"
        )


class SeapForCausalLM(LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SeapDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self._is_quantized = vllm_config.quant_config is not None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError at the first tensor that does not fit the configuration."""
        return super().load_weights(checked(weights, self.config, is_quantized=self._is_quantized))


def shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration holds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    return expected


def checked(
    weights: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, *, is_quantized: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors through, each compared with ``config`` first; at the end, none may be missing.

    A quantizer renames and packs weights, so of a quantized checkpoint only the biases are compared.
    """
    expected = shapes(config)
    if is_quantized:
        expected = {name: shape for name, shape in expected.items() if name.endswith(".bias")}
    missing = set(expected)
    for name, tensor in weights:
        if not (_is_ignored(name, config) or is_quantized and not name.endswith(".bias")):
            _check(name, tuple(tensor.shape), expected)
        missing.discard(name)
        yield name, tensor
    if missing:
        raise ValueError(f"the checkpoint lacks {min(missing)}, which config.json declares")


def _is_ignored(name: str, config: PreTrainedConfig) -> bool:
    """Whether a checkpoint may hold the tensor, though the model makes no use of it."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _check(name: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise ValueError(f"the checkpoint holds {name}, which config.json does not declare")
    if shape != expected[name]:
        raise ValueError(f"{name} is {list(shape)} in the checkpoint, and {list(expected[name])} by config.json")
