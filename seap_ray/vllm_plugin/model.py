"""vLLM models: a family's own, with layers that have their own heads, MLP widths and output biases.

vLLM's layers take a configuration, so a layer here is vLLM's with the layer's own. Llama's class takes another layer as
an argument; of the other families' modules the name of the layer stands for ours while a model is built.

Every tensor is compared with the configuration before it is loaded (see ``hf.shapes``).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models import gemma2, gemma3, mixtral, opt, qwen3, qwen3_moe
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from seap_ray.core.architecture import family_of
from seap_ray.models.hf.shapes import compared, declared

# --- layers ----------------------------------------------------------------------------------------------------------


class SeapDecoderLayer(LlamaDecoderLayer):
    """Llama's, Mistral's, Qwen2's and Phi-3's."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: LlamaConfig | None = None):
        whole: Any = config or vllm_config.model_config.hf_config
        own = _own(whole, prefix)
        super().__init__(vllm_config, prefix, config=own)
        _add_biases(self, own, self.get_quant_config(vllm_config), prefix)


class _OwnLayer:
    """Mixed into a family's layer: the configuration of the layer in the place of the whole model's."""

    def __init__(self, config: PreTrainedConfig, *more: Any, prefix: str = "", **named: Any):
        own = _own(config, prefix)
        self._build(own, *more, prefix=prefix, **named)
        _add_biases(self, own, named.get("quant_config") or (more[1] if len(more) > 1 else None), prefix)

    def _build(self, own: PreTrainedConfig, *more: Any, **named: Any) -> None:
        super().__init__(own, *more, **named)  # type: ignore[call-arg]


class SeapQwen3DecoderLayer(_OwnLayer, qwen3.Qwen3DecoderLayer):
    pass


class SeapGemma2DecoderLayer(_OwnLayer, gemma2.Gemma2DecoderLayer):
    pass


class SeapGemma3DecoderLayer(_OwnLayer, gemma3.Gemma3DecoderLayer):
    pass


class SeapMixtralDecoderLayer(_OwnLayer, mixtral.MixtralDecoderLayer):
    pass


class SeapQwen3MoeDecoderLayer(qwen3_moe.Qwen3MoeDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **named: Any):
        own = _own(vllm_config.model_config.hf_text_config, prefix)
        of_layer = copy.copy(vllm_config)
        of_layer.model_config = copy.copy(vllm_config.model_config)
        of_layer.model_config.hf_text_config = own
        super().__init__(of_layer, prefix, **named)
        _add_biases(self, own, vllm_config.quant_config, prefix)


class SeapOPTDecoderLayer(_OwnLayer, opt.OPTDecoderLayer):
    def _build(self, own: PreTrainedConfig, *more: Any, **named: Any) -> None:
        with _in_place_of(opt, "OPTAttention", partial(SeapOPTAttention, own.head_dim)):
            super()._build(own, *more, **named)


class SeapOPTAttention(opt.OPTAttention):
    """vLLM's own has heads of hidden size / heads."""

    def __init__(
        self,
        head_dim: int,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        cache_config: Any = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        nn.Module.__init__(self)
        self.embed_dim, self.head_dim, self.scaling = embed_dim, head_dim, head_dim**-0.5
        self.num_heads = num_heads // get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            embed_dim, head_dim, num_heads, bias=bias, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.out_proj = RowParallelLinear(
            num_heads * head_dim, embed_dim, bias=bias, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )
        self.attn = Attention(
            self.num_heads,
            head_dim,
            scale=self.scaling,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )


def _own(whole: Any, prefix: str) -> Any:
    own = whole.per_layer_config[extract_layer_index(prefix)]
    _check_divisible(own, get_tensor_model_parallel_world_size(), prefix)
    return own


def _add_biases(layer: Any, own: Any, quantization: QuantizationConfig | None, prefix: str) -> None:
    family = family_of(own.model_type)
    widths = {family.o_proj: (own.o_proj_bias, own.num_attention_heads * own.head_dim)}
    if not family.is_mixture:
        widths[family.down_proj] = own.down_proj_bias, getattr(own, family.channels_key)
    for name, (is_added, width) in widths.items():
        # vLLM's Qwen 3 has no bias there, whatever the family's config says.
        has_own = name == family.o_proj and isinstance(family.o_bias, tuple) and getattr(own, family.o_bias[0])
        if is_added or has_own and layer.get_submodule(name).bias is None:
            linear = RowParallelLinear(
                width, own.hidden_size, bias=True, quant_config=quantization, prefix=f"{prefix}.{name}"
            )
            layer.set_submodule(name, linear)


def _check_divisible(own: PreTrainedConfig, ranks: int, prefix: str) -> None:
    """vLLM splits heads and channels over the ranks, and repeats key-value heads when there are fewer of them."""
    family = family_of(own.model_type)
    heads, channels = own.num_attention_heads, getattr(own, family.channels_key)
    kv_heads = getattr(own, family.groups_key) if family.groups_key else heads
    if heads % ranks or channels % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{prefix} has {heads} heads, {kv_heads} key-value heads and {channels} channels, which do not divide by "
            f"tensor_parallel_size {ranks}; prune with pruning.tensor_parallel={ranks}"
        )


# --- models ----------------------------------------------------------------------------------------------------------


@contextmanager
def _in_place_of(owner: Any, name: str, ours: Any) -> Iterator[None]:
    theirs = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        setattr(owner, name, theirs)


class _Checked:
    """Mixed into a family's model: tensors are compared before they are loaded."""

    config: PreTrainedConfig
    is_loaded = False

    @cached_property
    def _declared(self) -> dict[str, tuple[int, ...]]:
        return declared(self.config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError at the first tensor that does not fit the configuration.

        Those that come once the model is loaded replace some, and all others stay.
        """
        # By a quantizer that wrote the checkpoint; one that vLLM applies by itself finds the tensors as they are.
        is_quantized = getattr(self.config, "quantization_config", None) is not None
        checked = _checked(weights, self.config, self._declared, is_quantized=is_quantized, are_all=not self.is_loaded)
        loaded = super().load_weights(checked)  # type: ignore[misc]
        self.is_loaded = True
        return loaded


class SeapForCausalLM(_Checked, LlamaForCausalLM):
    """Llama, Mistral and Qwen2."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SeapDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class SeapPhi3ForCausalLM(_Checked, Phi3ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SeapDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class _WithOurLayers(_Checked):
    parts: ClassVar[tuple[tuple[Any, str, Any], ...]]
    """Whose attribute is replaced by what while the model is built."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        with ExitStack() as replaced:
            for part in self.parts:
                replaced.enter_context(_in_place_of(*part))
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]


class SeapQwen3ForCausalLM(_WithOurLayers, qwen3.Qwen3ForCausalLM):
    parts = ((qwen3.Qwen3Model, "decoder_layer_type", SeapQwen3DecoderLayer),)


class SeapGemma2ForCausalLM(_WithOurLayers, gemma2.Gemma2ForCausalLM):
    parts = ((gemma2, "Gemma2DecoderLayer", SeapGemma2DecoderLayer),)


class SeapGemma3ForCausalLM(_WithOurLayers, gemma3.Gemma3ForCausalLM):
    parts = ((gemma3, "Gemma3DecoderLayer", SeapGemma3DecoderLayer),)


class SeapMixtralForCausalLM(_WithOurLayers, mixtral.MixtralForCausalLM):
    parts = ((mixtral, "MixtralDecoderLayer", SeapMixtralDecoderLayer),)


class SeapQwen3MoeForCausalLM(_WithOurLayers, qwen3_moe.Qwen3MoeForCausalLM):
    parts = (
        (
            qwen3_moe,
            "Qwen3MoeModel",
            partial(qwen3_moe.Qwen3MoeModel, decoder_layer_type=SeapQwen3MoeDecoderLayer),
        ),
    )


class SeapOPTForCausalLM(_WithOurLayers, opt.OPTForCausalLM):
    parts = ((opt, "OPTDecoderLayer", SeapOPTDecoderLayer),)


def _checked(
    weights: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    expected: Mapping[str, tuple[int, ...]],
    *,
    is_quantized: bool,
    are_all: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors through, each compared with ``config`` before vLLM sees it."""
    tensor: torch.Tensor

    def found() -> Iterator[tuple[str, tuple[int, ...]]]:
        nonlocal tensor
        for name, tensor in weights:
            yield name, tuple(tensor.shape)

    for name in compared(found(), config, expected, is_quantized=is_quantized, are_all=are_all):
        yield name, tensor
