"""Model: vLLM's own model classes, with layers that have their own heads, MLP widths and output biases.

A layer of vLLM is built from a configuration. The layers here are vLLM's, built from the configuration of their own
layer in place of the whole model's. vLLM's Llama takes the layer class as an argument. In the modules of the other
families the name of the layer class is replaced by ours while a model is built. The classes of most of them are made
when they are first asked for, as ``SeapGemmaForCausalLM`` of vLLM's ``GemmaForCausalLM``. Families that vLLM has no
class of are served by its Transformers backend.

Every tensor is compared with the configuration before it is loaded (see ``seap_ray.models.hf.shapes``).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from importlib import import_module
from inspect import signature
from itertools import groupby
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models import ModelRegistry, gpt_oss, opt, qwen2_moe, qwen3, qwen3_moe
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index

from seap_ray.core.families import family_of
from seap_ray.models.hf.shapes import compared, declared

# --- layers ----------------------------------------------------------------------------------------------------------


class _UnequalLlamaLayer:
    """Mixin for a decoder layer that vLLM builds as a Llama's: the configuration may be given by name."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: PreTrainedConfig | None = None, **kwargs: Any
    ):
        # As vLLM's own layer chooses it.
        layer_config = _layer_config(config or vllm_config.model_config.hf_config, prefix)
        super().__init__(vllm_config, prefix, config=layer_config, **kwargs)  # type: ignore[call-arg]

        # A Llama's layer may be a draft model's, whose quantisation is another.
        chosen = getattr(self, "get_quant_config", None)
        _add_biases(self, layer_config, chosen(vllm_config) if chosen else vllm_config.quant_config, prefix)


class SeapDecoderLayer(_UnequalLlamaLayer, LlamaDecoderLayer):
    """A decoder layer of Llama, Mistral, Qwen2, Phi-3 or ERNIE 4.5 with its own widths."""


class _UnequalLayer:
    """Mixin for a family's decoder layer: builds it from its own configuration, not from the whole model's."""

    def __init__(self, config: PreTrainedConfig, *args: Any, prefix: str = "", **kwargs: Any):
        layer_config = _layer_config(config, prefix)
        self._build(layer_config, *args, prefix=prefix, **kwargs)

        # The families pass it by name, or as the third positional argument, behind the cache's configuration.
        quant_config = kwargs.get("quant_config")
        if quant_config is None and len(args) > 1:
            quant_config = args[1]
        _add_biases(self, layer_config, quant_config, prefix)

    def _build(self, layer_config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        """Build vLLM's own layer."""
        super().__init__(layer_config, *args, **kwargs)  # type: ignore[call-arg]


class SeapQwen3DecoderLayer(_UnequalLayer, qwen3.Qwen3DecoderLayer):
    """A decoder layer of Qwen 3 with its own widths."""


class _UnequalLayerOfVllmConfig:
    """Mixin for a family's decoder layer that reads its configuration from ``vllm_config``."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        layer_config = _layer_config(vllm_config.model_config.hf_text_config, prefix)
        layer_vllm_config = _vllm_config_with(vllm_config, layer_config)
        super().__init__(vllm_config=layer_vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        _add_biases(self, layer_config, vllm_config.quant_config, prefix)


class SeapQwen3MoeDecoderLayer(_UnequalLayerOfVllmConfig, qwen3_moe.Qwen3MoeDecoderLayer):
    """A decoder layer of Qwen 3 MoE with its own widths."""


class SeapQwen2MoeDecoderLayer(_UnequalLayer, qwen2_moe.Qwen2MoeDecoderLayer):
    """A decoder layer of Qwen 2 MoE with its own widths.

    vLLM's attention computes the size of a head as hidden size / heads. A Llama's with biases computes the same, and is
    told the size.
    """

    def _build(self, layer_config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        def attention(dual_chunk_attention_config: Any, rope_parameters: Any, **settings: Any) -> LlamaAttention:
            """Build the attention; the configuration has the rotary embedding, too."""
            if dual_chunk_attention_config:
                raise ValueError("dual_chunk_attention_config is not supported in layers of unequal widths")
            config: Any = layer_config
            return LlamaAttention(config=config, bias=config.qkv_bias, **settings)

        with _replaced(qwen2_moe, "Qwen2MoeAttention", attention):
            super()._build(layer_config, *args, **kwargs)


class SeapGptOssAttention(gpt_oss.OAIAttention):
    """gpt-oss's attention with the window that the configuration lists, in place of one for every layer of even number.

    Layers have other numbers where earlier ones have gone.
    """

    def _build_attention(self, config: Any, *args: Any, **settings: Any) -> Attention:
        is_sliding = config.layer_types[self.layer_idx] == "sliding_attention"
        self.layer_idx = 0 if is_sliding else 1
        return super()._build_attention(config, *args, **settings)


class SeapGptOssDecoderLayer(gpt_oss.TransformerBlock):
    """A decoder layer of gpt-oss with its own widths; its attention always has a bias on ``o_proj``."""

    attention_cls = SeapGptOssAttention

    def __init__(self, vllm_config: VllmConfig, quant_config: Any, prefix: str = ""):
        layer_config = _layer_config(vllm_config.model_config.hf_config, prefix)
        super().__init__(_vllm_config_with(vllm_config, layer_config), quant_config, prefix)


class SeapGptOssModel(gpt_oss.GptOssModel):
    """gpt-oss without its head, with layers of unequal widths."""

    block_cls = SeapGptOssDecoderLayer

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors, those of each layer by its own widths."""
        loaded: set[str] = set()
        for layer, of_layer in groupby(weights, lambda weight: _layer_of(weight[0])):
            config = self.config if layer is None else self.config.per_layer_config[layer]
            with _replaced(self, "config", config):
                loaded |= super().load_weights(of_layer)
        return loaded


def _layer_of(name: str) -> int | None:
    """Return the number of the decoder layer that a tensor of a model is of; None for one of no layer."""
    beginning, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if beginning == "layers" else None


class SeapOPTDecoderLayer(_UnequalLayer, opt.OPTDecoderLayer):
    """A decoder layer of OPT with its own widths."""

    def _build(self, layer_config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with _replaced(opt, "OPTAttention", partial(SeapOPTAttention, layer_config.head_dim)):
            super()._build(layer_config, *args, **kwargs)


class SeapOPTAttention(opt.OPTAttention):
    """OPT's attention with heads of a given size. vLLM's own computes it as hidden size / heads."""

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
        # Not vLLM's own constructor, which would build projections for the other head size.
        nn.Module.__init__(self)
        self.embed_dim, self.head_dim, self.scaling = embed_dim, head_dim, head_dim**-0.5
        self.num_heads = num_heads // get_tensor_model_parallel_world_size()

        # These take the number of all heads, and split it over the ranks themselves.
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


def _vllm_config_with(vllm_config: VllmConfig, layer_config: PreTrainedConfig) -> VllmConfig:
    """Return vLLM's configuration with a layer's own in place of the whole model's."""
    # Shallow copies: the other layers keep the whole model's configuration.
    layer_vllm_config = copy.copy(vllm_config)
    layer_vllm_config.model_config = copy.copy(vllm_config.model_config)
    layer_vllm_config.model_config.hf_config = layer_config
    layer_vllm_config.model_config.hf_text_config = layer_config
    return layer_vllm_config


def _layer_config(model_config: Any, prefix: str) -> Any:
    """Return the configuration of the layer whose module name is ``prefix``.

    Raises:
        ValueError: Its heads or channels cannot be split over the tensor-parallel ranks.
    """
    layer_config = model_config.per_layer_config[extract_layer_index(prefix)]
    _check_divisible(layer_config, get_tensor_model_parallel_world_size(), prefix)
    return layer_config


def _add_biases(layer: Any, layer_config: Any, quant_config: QuantizationConfig | None, prefix: str) -> None:
    """Give ``o_proj`` and ``down_proj`` the output biases that the checkpoint has and vLLM's own layer lacks."""
    family = family_of(layer_config.model_type)
    o_proj_width = layer_config.num_attention_heads * layer_config.head_dim

    # vLLM's Qwen 3 has no bias on o_proj, whatever the family's configuration says.
    has_family_bias = isinstance(family.o_bias, tuple) and getattr(layer_config, family.o_bias[0])
    is_missing = has_family_bias and layer.get_submodule(family.o_proj).bias is None

    # The down_proj of an MoE's experts get no bias, and its configuration does not have the key.
    widths = {}
    if layer_config.o_proj_bias or is_missing:
        widths[family.o_proj] = o_proj_width
    if not family.is_moe and layer_config.down_proj_bias:
        widths[family.down_proj] = getattr(layer_config, family.channels_key)

    for name, width in widths.items():
        linear = RowParallelLinear(
            width,
            layer_config.hidden_size,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.{name}",
        )
        # Of parallel blocks the sum alone is reduced over the ranks. The first rank alone adds a bias, though vLLM's
        # constructor takes none together with this.
        linear.reduce_results = layer.get_submodule(name).reduce_results
        # In place of vLLM's own, before weights arrive.
        layer.set_submodule(name, linear)


def _check_divisible(layer_config: PreTrainedConfig, ranks: int, prefix: str) -> None:
    """Raise ValueError where a layer cannot be split over the ranks.

    vLLM splits heads and channels evenly, and repeats key-value heads when there are fewer of them than ranks.
    """
    family = family_of(layer_config.model_type)
    heads = layer_config.num_attention_heads
    channels = getattr(layer_config, family.channels_key)
    kv_heads = getattr(layer_config, family.groups_key) if family.groups_key else heads

    if heads % ranks or channels % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{prefix} has {heads} heads, {kv_heads} key-value heads and {channels} channels, which do not divide by "
            f"tensor_parallel_size {ranks}; prune with pruning.tensor_parallel={ranks}"
        )


# --- models ----------------------------------------------------------------------------------------------------------


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute of a module or class while inside."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:  # whatever happens: the module also builds models that are not compacted
        setattr(owner, name, original)


class _CheckedModel:
    """Mixin for a family's model: compares every tensor with the configuration before it is loaded."""

    config: PreTrainedConfig
    is_loaded = False

    @cached_property
    def _declared(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name, as the configuration has them."""
        return declared(self.config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors, and return the names of the parameters that they went to.

        The first call must bring all tensors. A later one replaces some, and all others stay.

        Raises:
            ValueError: A tensor does not fit the configuration, or one is missing.
        """
        # Set where a quantizer wrote the checkpoint. One that vLLM applies by itself finds the tensors as they are.
        is_quantized = getattr(self.config, "quantization_config", None) is not None
        checked_weights = _checked(
            weights, self.config, self._declared, is_quantized=is_quantized, are_all=not self.is_loaded
        )
        loaded = super().load_weights(checked_weights)  # type: ignore[misc]
        # Only now: a load that has failed leaves a model without some of its tensors.
        self.is_loaded = True
        return loaded


class SeapForCausalLM(_CheckedModel, LlamaForCausalLM):
    """Llama, Mistral and Qwen2 with layers of unequal widths."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SeapDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class SeapPhi3ForCausalLM(_CheckedModel, Phi3ForCausalLM):
    """Phi-3 with layers of unequal widths."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SeapDecoderLayer):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class SeapErnie4_5ForCausalLM(SeapForCausalLM):
    """ERNIE 4.5 with layers of unequal widths: a Llama that rotates neighbours.

    vLLM's own class takes the bias of ``o_proj`` away, which compensation has added here.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.model.layers:
            if not isinstance(layer, PPMissingLayer):
                layer.self_attn.rotary_emb.is_neox_style = False


class SeapTransformersForCausalLM(_CheckedModel, TransformersForCausalLM):
    """A family that vLLM has no class of: the class of ``modeling_seap``, with vLLM's attention and linear layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        family = family_of(config.model_type)
        if family.is_moe or family.has_other_parts:
            other_parts = "layers with states" if family.mixer else "attention with heads of two sizes"
            what = other_parts if family.has_other_parts else "MoE experts"
            raise ValueError(
                f"{config.model_type}: vLLM does not serve {what} of this family here; load the checkpoint with "
                "transformers, or where a stock one holds the cut, write it with export.format=stock"
            )
        # Each is checked for the ranks; vLLM's own words would name no layer.
        for layer in range(config.num_hidden_layers):
            _layer_config(config, f"model.layers.{layer}")
        with _class_of_vllm_alone(type(config)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


@contextmanager
def _class_of_vllm_alone(config_class: type[PreTrainedConfig]) -> Iterator[None]:
    """Have ``AutoModel`` build a subclass of the family's model meanwhile.

    vLLM changes the class that it is given, so that nobody else in the process could build a model of it any more.
    """
    model_class: Any = AutoModel._model_mapping[config_class]
    about = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    AutoModel.register(config_class, type(model_class.__name__, (model_class,), about), exist_ok=True)
    try:
        yield
    finally:
        AutoModel.register(config_class, model_class, exist_ok=True)


class _ReplacedLayers(_CheckedModel):
    """Mixin for a family's model: names in vLLM's modules stand for our layers while the model is built."""

    replacements: ClassVar[tuple[tuple[Any, str, Any], ...]]
    """Owner, attribute and what replaces it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        settings: dict[str, Any] = {"vllm_config": vllm_config, "prefix": prefix}
        if "layer_type" in signature(super().__init__).parameters:
            # The name of the layer class is looked up no more: it is the argument's default.
            settings["layer_type"] = self.replacements[0][2]

        with ExitStack() as stack:
            for owner, name, replacement in (*self.replacements, *self._whole_shared_experts(vllm_config)):
                stack.enter_context(_replaced(owner, name, replacement))
            super().__init__(**settings)

    def _whole_shared_experts(self, vllm_config: VllmConfig) -> list[tuple[Any, str, Any]]:
        """Return what else is replaced in a mixture whose shared experts are as wide as follows from the others.

        They stay as wide as the top level of the configuration has it, which is that of the model before it was cut.
        """
        config = vllm_config.model_config.hf_config
        family = family_of(config.model_type)
        if family.channels_key not in family.shared_width_keys:
            return []

        top_level = config.to_dict()
        shared_channels = prod(top_level[key] for key in family.shared_width_keys)
        owner, _, _ = self.replacements[0]
        name = _class_in(owner, "MLP")
        return [(owner, name, partial(_mlp, getattr(owner, name), shared_channels))]


def _mlp(mlp_class: Any, shared_channels: int, *, intermediate_size: int, prefix: str, **settings: Any) -> nn.Module:
    """Build an MLP of vLLM; shared experts as wide as before the cut."""
    width = shared_channels if prefix.endswith(".shared_experts") else intermediate_size
    return mlp_class(intermediate_size=width, prefix=prefix, **settings)


class SeapQwen3ForCausalLM(_ReplacedLayers, qwen3.Qwen3ForCausalLM):
    """Qwen 3 with layers of unequal widths."""

    replacements = ((qwen3.Qwen3Model, "decoder_layer_type", SeapQwen3DecoderLayer),)


class SeapQwen3MoeForCausalLM(_ReplacedLayers, qwen3_moe.Qwen3MoeForCausalLM):
    """Qwen 3 MoE with layers of unequal widths."""

    replacements = (
        (
            qwen3_moe,
            "Qwen3MoeModel",
            partial(qwen3_moe.Qwen3MoeModel, decoder_layer_type=SeapQwen3MoeDecoderLayer),
        ),
    )


class SeapQwen2MoeForCausalLM(_ReplacedLayers, qwen2_moe.Qwen2MoeForCausalLM):
    """Qwen 2 MoE with layers of unequal widths."""

    replacements = ((qwen2_moe, "Qwen2MoeDecoderLayer", SeapQwen2MoeDecoderLayer),)


class SeapGptOssForCausalLM(_ReplacedLayers, gpt_oss.GptOssForCausalLM):
    """gpt-oss with layers of unequal widths."""

    replacements = ((gpt_oss, "GptOssModel", SeapGptOssModel),)
    fixed: ClassVar[dict[str, Any]] = {
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
    }
    """Values with which vLLM computes whatever the configuration says."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        for key, value in self.fixed.items():
            if (own := getattr(config, key, value)) != value:
                raise ValueError(f"vLLM computes every gpt-oss with {key} {value}, and this one has {own}")
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class SeapOPTForCausalLM(_ReplacedLayers, opt.OPTForCausalLM):
    """OPT with layers of unequal widths."""

    replacements = ((opt, "OPTDecoderLayer", SeapOPTDecoderLayer),)


def __getattr__(name: str) -> type[nn.Module]:
    """Make the class of a family that vLLM has itself when it is first asked for, as an attribute of this module.

    vLLM's registry says in which module the family's class is; the class of its layers lies beside it.
    """
    registered = ModelRegistry.models.get(name.removeprefix("Seap"))
    if not name.startswith("Seap") or registered is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    family = import_module(registered.module_name)  # type: ignore[attr-defined]  # of vLLM's own models
    model_class = getattr(family, registered.class_name)  # type: ignore[attr-defined]
    layer_name = _class_in(family, "DecoderLayer")
    layer_class = getattr(family, layer_name)

    parameters = signature(layer_class).parameters.keys()
    mixin: type = _UnequalLayer
    if "vllm_config" in parameters:
        mixin = _UnequalLlamaLayer if "config" in parameters else _UnequalLayerOfVllmConfig
    about = {"__module__": __name__, "__doc__": f"{layer_name} of vLLM with its own widths."}
    layer = type(f"Seap{layer_name}", (mixin, layer_class), about)

    content = {
        "__module__": __name__,
        "__doc__": f"{model_class.__name__} of vLLM with layers of unequal widths.",
        "replacements": ((family, layer_name, layer),),
    }
    made = type(name, (_ReplacedLayers, model_class), content)
    globals()[name] = made
    return made


def _class_in(module: Any, end: str) -> str:
    """Return the name of the one class of a module of vLLM that ends so."""
    # Names that the module has imported are other families' classes.
    (name,) = (key for key, value in vars(module).items() if key.endswith(end) and value.__module__ == module.__name__)
    return name


def _checked(
    weights: Iterable[tuple[str, Tensor]],
    config: PreTrainedConfig,
    expected: Mapping[str, tuple[int, ...]],
    *,
    is_quantized: bool,
    are_all: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors through, each compared with ``config`` before vLLM sees it.

    Raises ValueError at the first tensor that does not fit, and at the end where one is missing.
    """
    tensor: Tensor

    def names_and_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield what ``compared`` looks at, and keep the tensor itself at hand."""
        nonlocal tensor
        for name, tensor in weights:
            yield name, tuple(tensor.shape)

    # ``compared`` asks for the next tensor when the last has been judged, so the one at hand is what it has just let
    # through.
    for name in compared(names_and_shapes(), config, expected, is_quantized=is_quantized, are_all=are_all):
        yield name, tensor
