"""Device: the GPU, or a CPU over tiny shapes; how time is taken on it, and what it reaches."""

import copy
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import seap_ray.models.hf  # noqa: F401  makes the compacted families known
from benchmarks.measure import Row, alternate
from benchmarks.shapes import LLAMA_2_7B, LLAMA_3_8B
from seap_ray.models.batching import Sequences

HAS_GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if HAS_GPU else "cpu"), torch.bfloat16
TINY = LlamaConfig(
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=4,
    vocab_size=50,
)


@dataclass(frozen=True, slots=True)
class Sizes:
    models: Mapping[str, LlamaConfig]
    """What is cut; the first is what is calibrated."""
    batches: tuple[tuple[int, int], ...]
    """(B, T) of calibration."""
    layers: int
    """Of the model that is read layer by layer."""
    prompts: tuple[tuple[int, int], ...]
    """(B, T) of prefill."""
    decoding: tuple[int, ...]
    """B of decoding."""
    context: int
    """Positions that a decoding step attends to."""
    steps: int
    """Steps of a round of decoding."""
    reply: int
    """Tokens of a reply of vLLM after its first."""
    served_cache: int
    """Bytes of keys and values of an engine of vLLM."""
    aligns: tuple[int, ...]
    """Tiles of channels."""
    rounds: int
    matmul: int
    copied: int
    """Bytes."""


SIZES = (
    Sizes(
        models={"Llama-2-7B": LLAMA_2_7B, "Llama-3-8B": LLAMA_3_8B},
        batches=((16, 512), (8, 1024), (8, 512)),
        layers=8,
        prompts=((1, 1024), (8, 1024)),
        decoding=(1, 8, 64),
        context=512,
        steps=16,
        reply=64,
        served_cache=20 << 30,
        aligns=(1, 16, 64, 128),
        rounds=5,
        matmul=8192,
        copied=1 << 32,
    )
    if HAS_GPU
    else Sizes(
        models={"tiny": TINY},
        batches=((2, 8),),
        layers=3,
        prompts=((1, 8),),
        decoding=(1, 2),
        context=16,
        steps=2,
        reply=4,
        served_cache=1 << 26,
        aligns=(1, 16),
        rounds=2,
        matmul=64,
        copied=1 << 16,
    )
)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU reaches."""

    bytes_per_s: float
    """Read and written by a copy."""
    flops_per_s: float
    """Of a large product in bfloat16."""


def now() -> float:
    if HAS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of single runs, by the GPU's own clock where there is one: launching is left out."""
    if not HAS_GPU:
        return alternate({"it": work}, 2, now=now).median("it")
    for _ in range(3):
        work()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(50_000_000)  # some 30 ms in which the CPU runs ahead
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in marks) / 1e3


def emptied() -> None:
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()


def built(config: Any, **more: Any) -> Any:
    """A model with random weights, on the device."""
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPE, **more).eval()


def loaded(folder: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    return model.to(DEVICE).eval()


def random_sequences(config: Any, lengths: Iterable[int]) -> Sequences:
    return [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]


def ceilings() -> Ceilings:
    source, target = torch.randn(2, SIZES.copied // 8, device=DEVICE).unbind()
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    n = SIZES.matmul
    one, other = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE).unbind()
    return Ceilings(copied, 2 * n**3 / seconds_of(lambda: one @ other))


def ceiling_rows(of: Ceilings) -> Iterator[Row]:
    yield row("copy on the device", ours=of.bytes_per_s / 1e9, unit="GB/s")
    yield row(f"product of {SIZES.matmul} x {SIZES.matmul}, bfloat16", ours=of.flops_per_s / 1e12, unit="TFLOP/s")


def row(name: str, **more: Any) -> Row:
    return Row.of("gpu", name, command="python -m benchmarks.gpu OUT.json", **more)


def flops(decoder: Any, positions: int) -> int:
    """Of a token among ``positions``, of which it sees half."""
    linear = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear))
    return 2 * (linear + positions * sum(layer.self_attn.o_proj.in_features for layer in decoder.layers))
