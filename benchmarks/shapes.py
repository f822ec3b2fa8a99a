"""Shapes of large models, dense and cut, and checkpoints of them in sparse files: real headers, and zeros that take no
disk."""

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


def shapes_of(config: LlamaConfig, ratio: float, kind: str, align: int | Literal["auto"] = "auto") -> list[Shape]:
    """What an allocation that knows no scores leaves of every layer."""
    architecture = Architecture.of({**config.to_dict(), "model_type": "llama"})
    pruning = PruningSection(align=align, allocation=AllocationSection(kind=kind))  # type: ignore[arg-type]
    return choose_shapes(architecture, pruning, ratio=ratio, compensated=True, scores_L=())


def plan_of(config: LlamaConfig, ratio: float, kind: str, align: int | Literal["auto"] = "auto") -> Plan:
    """A plan that keeps the first units of every layer: for speed it does not matter which."""
    shapes = shapes_of(config, ratio, kind, align)
    kept = tuple(Kept(tuple(range(s.groups)), tuple(range(s.heads)), (tuple(range(s.channels)),)) for s in shapes)
    return Plan("expert", ratio, COMPENSATIONS["mean"], kept, {})


def sparse_checkpoint(folder: Path, config: LlamaConfig, *, max_bytes: int = 5 * 10**9) -> Path:
    """Write a bfloat16 checkpoint of zeros with an index, as the hub has large ones; a layer is never torn apart."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        tensors = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if files[-1] and 2 * sum(prod(one) for one in [*files[-1].values(), shape]) > max_bytes:
            files.append({})
        files[-1][name] = shape
    weight_map: dict[str, str] = {}
    for i, of in enumerate(files, 1):
        path = folder / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        _write(path, of)
        weight_map |= dict.fromkeys(of, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    return folder


def _write(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
