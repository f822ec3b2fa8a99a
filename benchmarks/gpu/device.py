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
from seap_ray.models.sequences import Sequences

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16
SPIN_CYCLES = 50_000_000
"""Cycles that the GPU waits, some 30 ms, in which the CPU runs ahead."""
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
    """Models, batches and repetitions of all parts."""

    models: Mapping[str, LlamaConfig]
    """Models to cut; the first one is calibrated, too."""
    batches: tuple[tuple[int, int], ...]
    """(B, T) of calibration."""
    layers: int
    """Layers of the model that is read layer by layer."""
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
    """Side of the square matrices whose product is timed."""
    copied: int
    """Bytes that are read and written by the copy that is timed."""


GPU_SIZES = Sizes(
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
CPU_SIZES = Sizes(
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
SIZES = GPU_SIZES if HAS_GPU else CPU_SIZES


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU reaches."""

    bytes_per_s: float
    """Bytes that a copy reads and writes in a second."""
    flops_per_s: float
    """FLOP of a large product in bfloat16 in a second."""


# --- time ------------------------------------------------------------------------------------------------------------


def now() -> float:
    """Return the time in seconds once the device has done all that it was given."""
    if HAS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median seconds of single runs, by the GPU's own clock where there is one: launching is left out."""
    if not HAS_GPU:
        return alternate({"work": work}, 2, now=now).median("work")

    for _ in range(3):  # kernels are compiled, and memory is taken, before anything is timed
        work()
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    torch.cuda._sleep(SPIN_CYCLES)

    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        work()
        end.record()

    torch.cuda.synchronize()
    # Events count in milliseconds.
    return median(begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)) / 1e3


def free_memory() -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()


# --- models ----------------------------------------------------------------------------------------------------------


def build_model(config: Any, **more: Any) -> Any:
    """Make a model with random weights on the device; ``more`` goes to ``from_config``."""
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPE, **more).eval()


def load_model(folder: str) -> Any:
    """Load a model from a folder onto the device."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    return model.to(DEVICE).eval()


def random_sequences(config: Any, lengths: Iterable[int]) -> Sequences:
    """Return random token ids, a sequence for each length."""
    return [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]


def flops_per_token(decoder: Any, positions: int) -> int:
    """Return the FLOP of a token among ``positions``, of which it sees half."""
    linear = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear))
    # Two products of all heads with half of the positions: 2 x positions / 2.
    attention = positions * sum(layer.self_attn.o_proj.in_features for layer in decoder.layers)
    return 2 * (linear + attention)


# --- ceilings --------------------------------------------------------------------------------------------------------


def measure_ceilings() -> Ceilings:
    """Measure a copy on the device and a large product."""
    # Two arrays of float32: each has half of the bytes.
    source, target = torch.randn(2, SIZES.copied // 8, device=DEVICE).unbind()
    copied = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    n = SIZES.matmul
    left, right = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE).unbind()
    return Ceilings(copied, 2 * n**3 / median_seconds(lambda: left @ right))


def ceiling_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield what the device reaches."""
    yield gpu_row("copy on the device", ours=ceilings.bytes_per_s / 1e9, unit="GB/s")
    product = f"product of {SIZES.matmul} x {SIZES.matmul}, bfloat16"
    yield gpu_row(product, ours=ceilings.flops_per_s / 1e12, unit="TFLOP/s")


def gpu_row(name: str, **more: Any) -> Row:
    """Make a row of the suite ``gpu``; ``more`` goes to ``Row.of``."""
    return Row.of("gpu", name, command="python -m benchmarks.gpu OUT.json", **more)
