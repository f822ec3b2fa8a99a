"""Shapes: large models, dense and cut, as shapes alone and as checkpoints in sparse files.

Such a checkpoint has real headers, and zeros that take no disk.
"""

import json
import struct
from math import prod
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from seap_ray.config import AllocationSection, PruningSection
from seap_ray.core.allocation import choose_shapes
from seap_ray.core.architecture import Architecture, Shape
from seap_ray.core.compensation import COMPENSATIONS
from seap_ray.core.plan import Kept, Plan

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, vocab_size=32000
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=32,
    vocab_size=128256,
    max_position_embeddings=8192,
)
LLAMA_3_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    num_hidden_layers=80,
    vocab_size=128256,
)
SHAPES = {"7b": LLAMA_2_7B, "70b": LLAMA_3_70B}
Align = int | Literal["auto"]
"""Tile of channels, as ``pruning.align`` has it."""
BFLOAT16_BYTES = 2
TensorShapes = dict[str, tuple[int, ...]]


def shapes_of(config: LlamaConfig, ratio: float, kind: str, align: Align = "auto") -> list[Shape]:
    """Return what an allocation that knows no scores leaves of every layer."""
    architecture = Architecture.of({**config.to_dict(), "model_type": "llama"})
    # Without scores an allocation goes by the layer's place in the model.
    pruning = PruningSection(align=align, allocation=AllocationSection(kind=kind))  # type: ignore[arg-type]
    return choose_shapes(architecture, pruning, ratio=ratio, adds_biases=True, scores_L=())


def plan_of(config: LlamaConfig, ratio: float, kind: str, align: Align = "auto") -> Plan:
    """Return a plan that keeps the first units of every layer: for speed it does not matter which."""
    kept: list[Kept] = []
    for shape in shapes_of(config, ratio, kind, align):
        kept.append(Kept(tuple(range(shape.groups)), tuple(range(shape.heads)), (tuple(range(shape.channels)),)))
    return Plan("expert", ratio, COMPENSATIONS["mean"], tuple(kept), {})


def sparse_checkpoint(folder: Path, config: LlamaConfig, *, max_bytes: int = 5 * 10**9) -> Path:
    """Write a bfloat16 checkpoint of zeros with an index, as the hub has large ones, and return its folder.

    Args:
        folder: Folder to make.
        config: Shape of the model.
        max_bytes: Size of a file of weights; a tensor is never torn apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()

    # A file is filled until the next tensor would not fit.
    files: list[TensorShapes] = [{}]
    n_bytes = 0
    for name, tensor in state.items():
        tensor_bytes = BFLOAT16_BYTES * tensor.numel()
        if files[-1] and n_bytes + tensor_bytes > max_bytes:
            files.append({})
            n_bytes = 0
        files[-1][name] = tuple(tensor.shape)
        n_bytes += tensor_bytes

    weight_map: dict[str, str] = {}
    for i, shapes in enumerate(files, 1):
        path = folder / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        _write_zeros(path, shapes)
        weight_map |= dict.fromkeys(shapes, path.name)

    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # What a config on the hub has.
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return folder


def _write_zeros(path: Path, shapes: TensorShapes) -> None:
    """Write a safetensors file whose data are a hole."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end += BFLOAT16_BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}

    # A safetensors file is the header's length, the header, padded to 8 bytes, and the data.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
