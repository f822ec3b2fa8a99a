"""Tensors of a GGUF file: what each is made of, in what shape and type, and its bytes, some rows at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from seap_ray.core.architecture import Architecture, Shape, split_moe_expert
from seap_ray.core.slicing import in_pieces
from seap_ray.models.checkpoint import HEADS, Checkpoint, completed_config
from seap_ray.models.conversion.gguf_form import llama3_factors
from seap_ray.models.gguf.layouts import Layout, rope_parameters

OUTER = ("token_embd.weight", "output.weight")
"""Embedding and head, in llama.cpp's names."""
FOUR_AND_FIVE_BITS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types in which embedding and head lose too much: they get eight bits."""
ROUTER = "ffn_gate_inp"
"""llama.cpp's name of a mixture's router."""

Part = Callable[[], Tensor]
"""Reads and rearranges a tensor of the checkpoint."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, before it is made."""

    name: str
    """In llama.cpp's names, such as ``blk.0.attn_q.weight``."""
    shape: tuple[int, ...]
    """As in torch; the file has the dimensions in reverse."""
    parts: tuple[Part, ...]
    """Tensors that lie one behind another in it, in memory's order: several where the file has one matrix, or one for
    all MoE experts, in the place of several."""
    type: str
    """Type of its elements, such as ``Q8_0``."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the data, without padding."""
        import gguf

        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return prod(self.shape) // block * block_bytes

    def pieces(self) -> Iterator[Any]:
        """Yield its data as arrays, some rows at a time."""
        for part in self.parts:
            for rows in in_pieces(part()):
                yield _encoded(rows, self.type)


def _encoded(rows: Tensor, type_: str) -> Any:
    """Return the bytes of some rows in one of GGUF's types, as an array."""
    import gguf

    # NumPy knows no bfloat16, and torch rounds to it as llama.cpp does.
    if type_ == "BF16":
        return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return gguf.quants.quantize(rows.float().contiguous().numpy(), gguf.GGMLQuantizationType[type_])


def gguf_tensors(checkpoint: Checkpoint, layout: Layout, type_: str) -> list[GgufTensor]:
    """List the tensors of a model's GGUF file. No weight is read.

    Args:
        checkpoint: The model.
        layout: The layout that holds it.
        type_: Type of its matrices. Norms, biases and a mixture's router are F32; of a matrix whose rows are no whole
            blocks of the type, the elements are F16.
    """
    import gguf

    architecture = checkpoint.architecture
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[layout.name], architecture.n_layers)
    tensors: list[GgufTensor] = []
    for arranged in _Arranger(checkpoint, layout).all():
        # A head that is the embedding may be stored a second time.
        if architecture.ties_embeddings and arranged.name in HEADS:
            continue
        name = names.get_name(arranged.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"llama.cpp's {layout.name} has no tensor for {arranged.name}")
        tensors.append(GgufTensor(name, arranged.shape, arranged.parts, _type_of(name, arranged.shape, type_)))

    return [*tensors, *_rope_tensors(completed_config(checkpoint.config), architecture)]


def _type_of(name: str, shape: tuple[int, ...], type_: str) -> str:
    import gguf

    if len(shape) == 1 or ROUTER in name:
        return "F32"
    if name in OUTER and type_ in FOUR_AND_FIVE_BITS:
        type_ = "Q8_0"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
    return "F16" if shape[-1] % block else type_


# --- how tensors are arranged ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arranged:
    """Tensors of the checkpoint that are one in the file, by the name that Hugging Face has for such a one."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Arranger:
    """Arranges a checkpoint's tensors as a layout wants them."""

    checkpoint: Checkpoint
    layout: Layout

    def all(self) -> Iterator[_Arranged]:
        """Yield what becomes of every tensor, in the checkpoint's order."""
        for name in self.checkpoint.tensors:
            layer, module, kind = self.checkpoint.architecture.split(name)
            if layer is None:
                yield self._as_it_is(name)
            else:
                yield from self._of_a_layer(layer, module, kind)

    def _of_a_layer(self, layer: int, module: str, kind: str) -> Iterator[_Arranged]:
        architecture = self.checkpoint.architecture
        name = architecture.tensor(layer, module, kind)
        shape = architecture.layers[layer].shape
        template, expert = split_moe_expert(module)

        if expert is not None:
            # All MoE experts of a layer are one tensor, which is made where the first of them lies.
            if expert == 0:
                yield self._stacked(layer, template, kind)
        elif module == "self_attn.qkv_proj":
            yield from self._split_rows(name, "qkv_proj", _qkv_rows(shape, architecture.head_dim))
        elif module == "mlp.gate_up_proj":
            yield from self._split_rows(name, "gate_up_proj", {"gate_proj": shape.channels, "up_proj": shape.channels})
        elif module == "attention.query_key_value":
            yield self._with(name, partial(_by_kind, n_heads=shape.heads))
        elif self.layout.fuses_qkv and module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            if module == "self_attn.q_proj":
                yield self._fused_qkv(layer, kind)
        elif self.layout.interleaves_rope and module in ("self_attn.q_proj", "self_attn.k_proj"):
            n_heads = shape.heads if module == "self_attn.q_proj" else shape.groups
            yield self._with(name, partial(interleaved, n_heads=n_heads))
        else:
            yield self._as_it_is(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape

    def _as_it_is(self, name: str) -> _Arranged:
        offset = self.layout.norm_offset if "norm" in name else 0.0
        return self._with(name, partial(_plus, offset=offset)) if offset else self._with(name, _unchanged)

    def _with(self, name: str, arrange: Callable[[Tensor], Tensor]) -> _Arranged:
        return _Arranged(name, self._shape(name), (partial(self._read, name, arrange),))

    def _read(self, name: str, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        return arrange(self.checkpoint.read(name))

    def _stacked(self, layer: int, template: str, kind: str) -> _Arranged:
        architecture = self.checkpoint.architecture
        names = []
        for e in range(architecture.n_experts):
            names.append(architecture.tensor(layer, template.format(e=e), kind))
        parts = tuple(partial(self._read, name, _unchanged) for name in names)
        # Hugging Face's name of all together has no number.
        name = architecture.tensor(layer, template.replace(".{e}", ""), kind)
        return _Arranged(name, (len(names), *self._shape(names[0])), parts)

    def _split_rows(self, name: str, fused: str, n_rows: dict[str, int]) -> Iterator[_Arranged]:
        """Yield the matrices that a fused one consists of, block after block of rows."""
        start = 0
        shape = self.checkpoint.architecture.layers[self.checkpoint.architecture.split(name)[0] or 0].shape
        for module, n in n_rows.items():
            arrange = partial(_rows, start=start, stop=start + n)
            if self.layout.interleaves_rope and module in ("q_proj", "k_proj"):
                n_heads = shape.heads if module == "q_proj" else shape.groups
                arrange = partial(_interleaved_rows, start=start, stop=start + n, n_heads=n_heads)
            parts = (partial(self._read, name, arrange),)
            yield _Arranged(name.replace(fused, module), (n, *self._shape(name)[1:]), parts)
            start += n

    def _fused_qkv(self, layer: int, kind: str) -> _Arranged:
        architecture = self.checkpoint.architecture
        names = [architecture.tensor(layer, f"self_attn.{module}", kind) for module in ("q_proj", "k_proj", "v_proj")]
        parts = tuple(partial(self._read, name, _unchanged) for name in names)
        rows = sum(self._shape(name)[0] for name in names)
        # A name that gguf's table has for it.
        name = f"transformer.layers.{layer}.attn.qkv_proj.{kind}"
        return _Arranged(name, (rows, *self._shape(names[0])[1:]), parts)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _plus(tensor: Tensor, offset: float) -> Tensor:
    return tensor.float() + offset


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _interleaved_rows(tensor: Tensor, start: int, stop: int, n_heads: int) -> Tensor:
    return interleaved(tensor[start:stop], n_heads)


def interleaved(tensor: Tensor, n_heads: int) -> Tensor:
    """Return rows of queries or keys, or their bias, with the two halves of each head's rotation interleaved.

    transformers rotates row i of a head with row i + head size / 2, llama.cpp's Llama row 2i with row 2i + 1.
    """
    halves = tensor.reshape(n_heads, 2, tensor.shape[0] // n_heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _by_kind(tensor: Tensor, n_heads: int) -> Tensor:
    """Return GPT-NeoX's rows, query, key and value of head after head, as all queries, all keys, all values."""
    by_head = tensor.reshape(n_heads, 3, tensor.shape[0] // n_heads // 3, *tensor.shape[1:])
    return by_head.swapaxes(0, 1).reshape(tensor.shape)


def _qkv_rows(shape: Shape, head_dim: int) -> dict[str, int]:
    return {"q_proj": shape.heads * head_dim, "k_proj": shape.groups * head_dim, "v_proj": shape.groups * head_dim}


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def _rope_tensors(config: dict[str, Any], architecture: Architecture) -> list[GgufTensor]:
    """Return what llama.cpp divides the frequencies of rotary embeddings by, where those are scaled one by one."""
    rope = rope_parameters(config)["full_attention"]
    half = architecture.head_dim // 2
    if rope.get("rope_type") == "llama3":
        factors = {"rope_freqs": llama3_factors(rope, half)}
    elif rope.get("rope_type") == "longrope":
        # llama.cpp takes those for long sequences as soon as its context is longer than the original one.
        factors = {f"rope_factors_{kind}": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    else:
        return []
    return [GgufTensor(f"{name}.weight", (half,), (partial(_unchanged, f),), "F32") for name, f in factors.items()]
