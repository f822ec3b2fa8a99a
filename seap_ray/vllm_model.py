"""vLLM model: a Llama-like decoder whose layers have their own heads, MLP widths and output biases.

vLLM's own Llama layer takes a configuration of its own, so a layer here is that class with the layer's configuration.
It serves Qwen2 as well, whose only difference is biases on q, k and v (``qkv_bias``).

Every tensor is compared with the configuration before it is loaded (see ``hf.shapes``).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from seap_ray.hf.shapes import compared


class SeapDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: LlamaConfig | None = None):
        whole: Any = config or vllm_config.model_config.hf_config
        own = whole.per_layer_config[extract_layer_index(prefix)]
        _check_divisible(own, vllm_config.parallel_config.tensor_parallel_size, prefix)
        super().__init__(vllm_config, prefix, config=own)
        quantization = self.get_quant_config(vllm_config)
        if own.o_proj_bias:
            width = own.num_attention_heads * own.head_dim
            self.self_attn.o_proj = _with_bias(width, own.hidden_size, quantization, f"{prefix}.self_attn.o_proj")
        if own.down_proj_bias:
            width = own.intermediate_size
            self.mlp.down_proj = _with_bias(width, own.hidden_size, quantization, f"{prefix}.mlp.down_proj")


def _with_bias(width: int, hidden_size: int, quantization: QuantizationConfig | None, prefix: str) -> RowParallelLinear:
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
        # By a quantizer that wrote the checkpoint; one that vLLM applies by itself finds the tensors as they are.
        self._is_quantized = getattr(self.config, "quantization_config", None) is not None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError at the first tensor that does not fit the configuration."""
        return super().load_weights(_checked(weights, self.config, is_quantized=self._is_quantized))


def _checked(
    weights: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, *, is_quantized: bool
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors through, each compared with ``config`` before vLLM sees it."""
    tensor: Tensor

    def found() -> Iterator[tuple[str, tuple[int, ...]]]:
        nonlocal tensor
        for name, tensor in weights:
            yield name, tuple(tensor.shape)

    for name in compared(found(), config, is_quantized=is_quantized):
        yield name, tensor
