"""python -m seap_ray.benchmarks.gpu OUT.json [part ...]

What a GPU does: calibration beside the bare forward pass, its statistics one by one, layer by layer beside the whole
model, and dense beside compacted models. Weights are random ones, made on the GPU, since speed depends on shapes. Rows
are written as they are measured; a part that takes longer than its share of time is cut off after a row, and one that
fails leaves its traceback. Without a GPU the same code runs over tiny shapes, which says nothing of speed.

Letters: B sequences, T tokens of each, H heads, D columns, N tokens.
"""

import copy
import gc
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Cache, LlamaConfig, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

import seap_ray.hf  # noqa: F401  makes the compacted families known
from seap_ray.architecture import Architecture, Shape
from seap_ray.benchmarks.engine import Engine
from seap_ray.benchmarks.measure import Row, alternate, machine
from seap_ray.checkpoint import Checkpoint
from seap_ray.compaction import Compaction
from seap_ray.config import AllocationSection, PruningSection
from seap_ray.layerwise import LayerwiseModel
from seap_ray.moments import Covariance, Moments, split_product
from seap_ray.plan import Kept, Plan, choose_shapes
from seap_ray.recorder import Batch, Sequences, record, recording
from seap_ray.storage import write_json

HAS_GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if HAS_GPU else "cpu"), torch.bfloat16
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
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=4,
    vocab_size=50,
)
CAUSAL = "causal_sdpa"
"""Attention that is given no mask, since all positions are real; while a graph is captured, transformers makes one."""
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


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
        aligns=(1, 16),
        rounds=2,
        matmul=64,
        copied=1 << 16,
    )
)
Way = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mean and summed squared deviations of each column."""
PAST, CLOSE = SIZES.context - 1, "ours <= 0.05"
RATIOS, ALLOCATIONS = (0.2, 0.5), ("uniform", "logistic")
SPEEDUPS = {0.2: "ratio >= 1.17", 0.5: "ratio >= 1.48"}
"""The paper's, at batch 1."""


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


# --- what the GPU reaches --------------------------------------------------------------------------------------------


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
    return Row.of("gpu", name, command="python -m seap_ray.benchmarks.gpu OUT.json", **more)


# --- calibration -----------------------------------------------------------------------------------------------------


def calibration_rows(of: Ceilings) -> Iterator[Row]:
    """A job's ``record`` of a shard of three batches, and the hooks alone, beside the bare decoder."""
    name, config = next(iter(SIZES.models.items()))
    model = built(config)
    for B, T in SIZES.batches:
        parts = [random_sequences(config, [T] * B) for _ in range(3)]
        limit = of.flops_per_s / flops(model.get_decoder(), T)
        yield from _calibration_rows(f"calibration of {name}, {B} x {T}", model, parts, limit)


def contrast_rows(of: Ceilings) -> Iterator[Row]:
    """The same without the kernels, and of sequences that differ in length, with and without masks."""
    name, config = next(iter(SIZES.models.items()))
    model, (B, T) = built(config), SIZES.batches[-1]
    parts = [random_sequences(config, [T] * B) for _ in range(3)]
    limit = of.flops_per_s / flops(model.get_decoder(), T)
    if HAS_GPU:
        with _copies():
            yield from _calibration_rows(f"calibration of {name}, {B} x {T}, without kernels", model, parts, limit)
    lengths = torch.linspace(T / 2, T, B).long().tolist()
    ragged = [random_sequences(config, lengths) for _ in range(3)]
    yield from _calibration_rows(f"calibration of {name}, {B} of {T // 2} to {T}", model, ragged, None)


def _calibration_rows(name: str, model: Any, parts: list[Sequences], limit: float | None) -> Iterator[Row]:
    sequences = [sequence for part in parts for sequence in part]
    longest = max(map(len, sequences))
    contestants = {
        "bare": lambda: [_forward(model, part) for part in parts],
        "hooks": lambda: [_forward(model, part, is_recording=True) for part in parts],
        "record": lambda: record(model, sequences, batch_tokens=len(parts[0]) * longest),
    }
    found = alternate(contestants, SIZES.rounds, now=now)
    tokens = sum(map(len, sequences))
    for contestant, target in (("hooks", ""), ("record", "ratio <= 1.05")):
        yield row(
            f"{name}: {contestant} beside the bare forward pass (ratio of seconds)",
            ours=tokens / found.median(contestant),
            baseline=tokens / found.median("bare"),
            unit="tokens/s",
            ratios=found.ratios(contestant, "bare"),
            limit=limit,
            limit_name="product in bfloat16",
            target=target,
            why="see the statistics one by one",
        )


@torch.inference_mode()
def _forward(model: Any, sequences: Sequences, *, is_recording: bool = False) -> None:
    batch = Batch.of([[sequence] for sequence in sequences], False, model.device)
    named: dict[str, Any] = {"input_ids": batch.ids_BT, "use_cache": False}
    if is_recording:
        with recording(model.get_decoder(), batch.rows_N):
            model.get_decoder()(**named)
    else:
        model.get_decoder()(**named)


@contextmanager
def _copies() -> Iterator[None]:
    """Statistics by PyTorch's own operations."""
    from seap_ray import kernels

    def moments(x_ND: Tensor, rows_N: Tensor | None) -> tuple[Tensor, Tensor]:
        return two_pass(chosen(x_ND, rows_N))

    def cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None) -> Tensor:
        return cosine_similarity(chosen(x_ND, rows_N).double(), chosen(y_ND, rows_N).double(), dim=1)

    with mock.patch.multiple(kernels, moments=moments, cosines=cosines):
        yield


def chosen(x_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """The rows that are named; without names, all."""
    return x_ND if rows_N is None else x_ND.index_select(0, rows_N)


def two_pass(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviations of each column, float64, by copies of the whole."""
    n = max(len(x_ND), 1)
    mean_D = x_ND.sum(0, dtype=torch.float64) / n
    deviation_ND = x_ND - mean_D
    return mean_D, deviation_ND.square().sum(0) - deviation_ND.sum(0).square() / n


def flops(decoder: Any, positions: int) -> int:
    """Of a token among ``positions``, of which it sees half."""
    linear = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear))
    return 2 * (linear + positions * sum(layer.self_attn.o_proj.in_features for layer in decoder.layers))


# --- statistics ------------------------------------------------------------------------------------------------------


def statistics_rows(of: Ceilings) -> Iterator[Row]:
    """Ways to find the moments of one site, and the cosines of a layer: time, error, and whether twice is the same."""
    config, (B, T) = next(iter(SIZES.models.values())), SIZES.batches[0]
    yield from _cosine_rows(B * T, config.hidden_size, of)
    for width in (config.hidden_size, config.intermediate_size):
        yield from _moments_rows(B * T, width, ways(), of)


def compiled_rows(of: Ceilings) -> Iterator[Row]:
    """The same of what torch.compile makes of two passes."""
    config, (B, T) = next(iter(SIZES.models.values())), SIZES.batches[0]
    for width in (config.hidden_size, config.intermediate_size):
        yield from _moments_rows(B * T, width, {"compiled": torch.compile(two_pass)}, of)


def _moments_rows(n: int, width: int, ways: Mapping[str, Way], of: Ceilings) -> Iterator[Row]:
    x_ND = activations(n, width)
    mean_D = x_ND.mean(0, dtype=torch.float64)
    exact = Moments(n, mean_D, (x_ND - mean_D).square_().sum(0))
    base, least = seconds_of(partial(two_pass, x_ND)), x_ND.nbytes / of.bytes_per_s
    for name, way in ways.items():
        yield from _way_rows(f"moments of {n} x {width}, {name}", partial(way, x_ND), base, least, exact)
    rows_N = torch.arange(n, device=DEVICE)[torch.rand(n, device=DEVICE) < 0.75]
    seconds = seconds_of(partial(Moments.of, x_ND, rows_N))
    yield row(f"moments of {n} x {width}, three tokens of four", ours=1e3 * seconds, unit="ms")


def _way_rows(
    name: str, way: Callable[[], tuple[Tensor, Tensor]], base: float, least: float, exact: Moments
) -> Iterator[Row]:
    (mean_D, m2_D), again = way(), way()
    of_mean = (mean_D - exact.mean_D).abs() / exact.square_D.sqrt()
    error = max(float(of_mean.max()), float(((m2_D - exact.m2_D).abs() / exact.m2_D).max()))
    is_same = torch.equal(mean_D, again[0]) and torch.equal(m2_D, again[1])
    seconds = seconds_of(way)
    yield row(
        name,
        ours=1e3 * seconds,
        baseline=1e3 * base,
        unit="ms",
        ratios=[seconds / base],
        limit=1e3 * least,
        limit_name="reading at the speed of a copy",
    )
    yield row(f"{name}: error", ours=error, unit="relative", target="ours <= 1e-9", why="sums in float32")
    yield row(f"{name}: the same bytes twice", ours=float(is_same), unit="yes", target="ours >= 1")


def ways() -> dict[str, Way]:
    plain: dict[str, Way] = {"copies in float64": two_pass, "float32": float32_sums}
    if not HAS_GPU:
        return plain
    from seap_ray import kernels

    tiles = [(32, 64, 8, 4), (32, 64, 16, 4), (32, 64, 4, 4), (16, 64, 16, 4), (16, 128, 16, 4), (64, 64, 8, 8)]
    tiles += [(32, 32, 8, 4), (16, 64, 32, 4)]
    return plain | {f"kernel {tile}": partial(kernels.moments, tile=kernels.Tile(*tile)) for tile in tiles}


def float32_sums(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Sums about the first token, in float32 within blocks of 128 tokens, in float64 across them."""
    shift_D = x_ND[0].float()
    parts = [(part.float() - shift_D) for part in x_ND.split(128)]
    sum_D = torch.stack([part.sum(0) for part in parts]).double().sum(0)
    square_D = torch.stack([part.square().sum(0) for part in parts]).double().sum(0)
    return shift_D.double() + sum_D / len(x_ND), square_D - sum_D.square() / len(x_ND)


def activations(n: int, width: int) -> Tensor:
    """Columns of other means and scales, and a first token far from all the others, as the first of a text is."""
    x_ND = torch.randn(n, width, device=DEVICE) * torch.logspace(-2, 1, width, device=DEVICE)
    x_ND += torch.randn(width, device=DEVICE)
    x_ND[0] *= 300
    return x_ND.to(DTYPE)


def _cosine_rows(n: int, width: int, of: Ceilings) -> Iterator[Row]:
    x_ND, y_ND = activations(n, width), activations(n, width)

    def plain() -> Tensor:
        return cosine_similarity(x_ND.double(), y_ND.double(), dim=1)

    base = seconds_of(plain)
    ours: dict[str, Callable[[], Tensor]] = {"copies in float64": plain}
    if HAS_GPU:
        from seap_ray import kernels

        ours |= {"kernel": lambda: kernels.cosines(x_ND, y_ND)}
    for name, way in ours.items():
        yield row(
            f"cosines of {n} x {width}, {name}",
            ours=1e3 * seconds_of(way),
            baseline=1e3 * base,
            unit="ms",
            limit=1e3 * 2 * x_ND.nbytes / of.bytes_per_s,
            limit_name="reading at the speed of a copy",
        )
        error = float((way() - plain()).abs().max())
        yield row(f"cosines of {n} x {width}, {name}: error", ours=error, unit="absolute", target="ours <= 1e-12")
    column_ND = plain()[:, None]
    yield row(f"moments of {n} cosines", ours=1e3 * seconds_of(lambda: Moments.of(column_ND)), unit="ms")


# --- covariances -----------------------------------------------------------------------------------------------------


def covariance_rows(of: Ceilings) -> Iterator[Row]:
    """Products of deviations in float32, as they are made, and by cheaper ways; errors against float64."""
    config, (B, T) = next(iter(SIZES.models.values())), SIZES.batches[0]
    for width in (config.hidden_size, config.intermediate_size):
        yield from _covariance_rows(B * T, width, of)
        emptied()


def _covariance_rows(n: int, width: int, of: Ceilings) -> Iterator[Row]:
    x_ND, name = activations(n, width), f"covariance of {n} x {width}"
    deviation_ND = x_ND - x_ND.mean(0, dtype=torch.float64)
    exact_DD, single_ND = deviation_ND.T @ deviation_ND, deviation_ND.float()
    scale_D = exact_DD.diagonal().sqrt()
    base = seconds_of(partial(products()["float32"], single_ND), 5)
    seconds = seconds_of(partial(Covariance.of, x_ND), 5)
    named = f"{name}, as recorded, beside the product in float32"
    yield row(named, ours=1e3 * seconds, baseline=1e3 * base, unit="ms", ratios=[seconds / base])
    for way, product in products().items():
        error_DD = (product(single_ND) - exact_DD).abs_().div_(scale_D).div_(scale_D[:, None])
        seconds = seconds_of(partial(product, single_ND), 5)
        yield row(
            f"{name}, {way}",
            ours=1e3 * seconds,
            baseline=1e3 * base,
            unit="ms",
            ratios=[seconds / base],
            limit=1e3 * 2 * n * width**2 / of.flops_per_s,
            limit_name="product in bfloat16",
        )
        yield row(f"{name}, {way}: error", ours=float(error_DD.max()), unit="of the two deviations")


def products() -> dict[str, Callable[[Tensor], Tensor]]:
    """Of a matrix in float32 with itself, (N, D) -> (D, D)."""

    def tf32(x_ND: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return x_ND.T @ x_ND
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    plain: dict[str, Callable[[Tensor], Tensor]] = {"float32": lambda x_ND: x_ND.T @ x_ND}
    return plain | {"tf32": tf32, "two bfloat16": split_product} if HAS_GPU else plain


# --- layer by layer --------------------------------------------------------------------------------------------------


def stream_rows(_of: Ceilings) -> Iterator[Row]:
    """A checkpoint on disk, read layer by layer beside loaded as a whole; statistics of both to the byte."""
    name, whole = next(iter(SIZES.models.items()))
    config = copy.deepcopy(whole)
    config.num_hidden_layers = SIZES.layers
    B, T = SIZES.batches[0]
    with TemporaryDirectory() as folder:
        built(config).save_pretrained(folder)
        emptied()
        checkpoint = Checkpoint.open(folder)
        layerwise = LayerwiseModel(checkpoint, DTYPE, DEVICE, 1 << 34)
        for n_shards in (1, 8):
            shards = {f"{i}": random_sequences(config, [T] * B) for i in range(n_shards)}
            tokens, of = B * T * n_shards, f"{SIZES.layers} layers of {name}, {B * T * n_shards} tokens"
            yield from _stream_rows(of, layerwise, folder, shards, tokens)


def _stream_rows(
    name: str, layerwise: LayerwiseModel, folder: str, shards: dict[str, Sequences], tokens: int
) -> Iterator[Row]:
    B, T = SIZES.batches[0]
    kept: dict[str, Any] = {}

    def single() -> None:
        model = loaded(folder)
        kept["single"] = {shard: record(model, of, batch_tokens=B * T) for shard, of in shards.items()}

    def stream() -> None:
        kept["stream"] = {shard: {} for shard in shards}
        for shard, recorded in layerwise.record(shards, batch_tokens=B * T):
            kept["stream"][shard] |= recorded

    found = alternate({"single": single, "stream": stream}, 3, now=now)
    yield row(
        f"stream beside single, loading included, {name}",
        ours=tokens / found.median("stream"),
        baseline=tokens / found.median("single"),
        unit="tokens/s",
        ratios=found.speedups("stream", "single"),
    )
    is_equal = all(
        torch.equal(getattr(moments, part), getattr(kept["stream"][shard][key], part))
        for shard, recorded in kept["single"].items()
        for key, moments in recorded.items()
        for part in ("mean_D", "m2_D")
    )
    yield row(f"stream and single the same bytes, {name}", ours=float(is_equal), unit="yes", target="ours >= 1")
    yield from _overlap_rows(name, layerwise, folder, shards, found.median("stream"))


def _overlap_rows(
    name: str, layerwise: LayerwiseModel, folder: str, shards: dict[str, Sequences], streamed: float
) -> Iterator[Row]:
    """How much of the shorter of reading and computing is hidden behind the other, of what can be.

    Before there are layers, sequences are embedded; then nothing can be computed while the first layer is read, nor
    anything read while the last one works.
    """
    B, T = SIZES.batches[0]
    skeleton = layerwise._skeleton()
    before = {"embed": lambda: layerwise._enter(layerwise._skeleton(), shards, B * T, False)}
    embedding = alternate(before, 3, now=now).median("embed")
    reading = SIZES.layers * alternate({"one": lambda: layerwise._block(skeleton.layers, 1)}, 5, now=now).median("one")
    model = loaded(folder)
    whole = alternate({"all": lambda: [record(model, of, batch_tokens=B * T) for of in shards.values()]}, 3, now=now)
    computing = whole.median("all")
    n_bytes = sum(parameter.nbytes for parameter in model.get_decoder().layers[0].parameters())
    yield row(
        f"reading a layer, {name}",
        ours=SIZES.layers * n_bytes / reading / 1e9,
        unit="GB/s",
        limit=_pinned_bytes_per_s() / 1e9,
        limit_name="copy from pinned memory",
    )
    yield row(f"embedding before the first layer, {name}", ours=embedding, unit="s")
    longer, shorter = sorted((reading, computing), reverse=True)
    hideable = shorter * (1 - 1 / SIZES.layers)
    least = embedding + longer + shorter - hideable
    yield row(
        f"stream beside the least that reading and computing take together, {name}",
        ours=streamed,
        baseline=least,
        unit="s",
        ratios=[streamed / least],
    )
    hidden = (embedding + longer + shorter - streamed) / hideable
    named = f"share of the shorter of reading and computing that is hidden behind the other, {name}"
    yield row(named, ours=hidden, unit="share", target="ours >= 0.8" if shorter > longer / 2 else "")


def _pinned_bytes_per_s() -> float:
    pinned = torch.empty(SIZES.copied // 16, dtype=torch.uint8, pin_memory=HAS_GPU)
    there = torch.empty_like(pinned, device=DEVICE)
    return pinned.nbytes / seconds_of(lambda: there.copy_(pinned, non_blocking=True), 5)


# --- served shapes ---------------------------------------------------------------------------------------------------


def speed_rows(of: Ceilings) -> Iterator[Row]:
    """Prefill and decoding of dense and compacted models as CUDA graphs, so that launching costs neither anything."""
    for name, config in SIZES.models.items():
        dense = built(config, attn_implementation=CAUSAL)
        for ratio, kind in itertools.product(RATIOS, ALLOCATIONS):
            cut = built(compacted(config, ratio, kind), attn_implementation=CAUSAL)
            yield from _speed_rows(f"{name}, {ratio:.0%} {kind}", dense, cut, SPEEDUPS[ratio], of)
            del cut
            emptied()
        del dense
        emptied()


def compacted(config: LlamaConfig, ratio: float, kind: str) -> Any:
    """The configuration of an expert; which units it keeps does not matter."""
    values = {**config.to_dict(), "model_type": "llama"}
    shapes = shapes_of(config, ratio, kind)
    kept = tuple(Kept(tuple(range(s.groups)), tuple(range(s.heads)), tuple(range(s.channels))) for s in shapes)
    compaction = Compaction(Checkpoint(Path(), values, {}, ""), Plan("expert", ratio, "mean", kept, {}))
    return AutoConfig.for_model(**{key: value for key, value in compaction.config().items() if key != "auto_map"})


def shapes_of(config: LlamaConfig, ratio: float, kind: str, align: int | Literal["auto"] = "auto") -> list[Shape]:
    architecture = Architecture.of({**config.to_dict(), "model_type": "llama"})
    pruning = PruningSection(align=align, allocation=AllocationSection(kind=kind))  # type: ignore[arg-type]
    return choose_shapes(architecture, pruning, ratio=ratio, compensated=True, scores_L=())


def _speed_rows(name: str, dense: Any, cut: Any, target: str, of: Ceilings) -> Iterator[Row]:
    for B, T in SIZES.prompts:
        found = _raced({"dense": dense, "cut": cut}, B, T, 0)
        limit = of.flops_per_s / flops(cut.get_decoder(), T)
        yield _speed_row(f"prefill {B} x {T}, {name}", found, B * T, limit=limit)
    for B in SIZES.decoding:
        found = _raced({"dense": dense, "cut": cut}, B, 1, PAST)
        limit, named = _decoding_limit(cut, B, of), f"decoding {B} at {SIZES.context}, {name}"
        yield _speed_row(named, found, B, limit=limit, target=target if B == 1 else "")


def _decoding_limit(model: Any, B: int, of: Ceilings) -> float:
    per_step = weight_bytes(model) + B * SIZES.context * cache_bytes(model)
    return of.bytes_per_s * B / per_step


def _raced(models: Mapping[str, Any], B: int, T: int, past: int) -> Any:
    """All take turns."""
    return _timed({name: captured(model, B, T, past) for name, model in models.items()}, SIZES.steps if past else 1)


def _timed(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step in each round, which is some steps of decoding, or one prefill."""

    def repeated(step: Callable[[], object]) -> None:
        for _ in range(repeats):
            step()

    found = alternate({name: partial(repeated, step) for name, step in steps.items()}, SIZES.rounds, now=now)
    names = [*steps]
    steps.clear()
    emptied()
    return {name: [seconds / repeats for seconds in found.seconds[name]] for name in names}


def _speed_row(name: str, found: Mapping[str, Sequence[float]], tokens: int, *, limit: float, target: str = "") -> Row:
    return row(
        f"{name}, CUDA graph" if HAS_GPU else name,
        ours=tokens / median(found["cut"]),
        baseline=tokens / median(found["dense"]),
        unit="tokens/s",
        ratios=[dense / cut for dense, cut in zip(found["dense"], found["cut"], strict=True)],
        limit=limit,
        limit_name="product in bfloat16" if "prefill" in name else "reading weights and cache at the speed of a copy",
        target=target,
        why="kernels that do not shrink with the weights; see the limit",
    )


class Context(StaticLayer):
    """Keys and values of ``past`` positions and of the tokens given, always the same ones: each step costs as much.

    With no past, what a prompt writes.
    """

    is_compileable = False

    def __init__(self, past: int):
        super().__init__(max_cache_len=past)
        self.past = past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        (B, H, T, D), device, dtype = key_states.shape, key_states.device, key_states.dtype
        self.keys, self.values = torch.randn(2, B, H, self.past + T, D, device=device, dtype=dtype).unbind()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        keys[:, :, self.past :] = key_states
        values[:, :, self.past :] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past + query_length, 0


def captured(model: Any, B: int, T: int, past: int) -> Callable[[], object]:
    """A forward pass with a greedy choice at the end: on a GPU as a graph, which is replayed."""
    ids_BT = torch.randint(model.config.vocab_size, (B, T), device=DEVICE)
    cache = Cache(layers=[Context(past) for _ in model.get_decoder().layers])

    @torch.inference_mode()
    def step() -> Tensor:
        out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    return graphed(step, ids_BT, cache)


def graphed(step: Callable[[], object], *read: object) -> Callable[[], object]:
    """A step as a graph, with what it reads, which must outlive it; without a GPU the step itself."""
    if not HAS_GPU:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replayed, graph, *read)


def _replayed(graph: torch.cuda.CUDAGraph, *_read: object) -> None:
    graph.replay()


def weight_bytes(model: Any) -> int:
    """What every decoding step reads: all but the embeddings."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name)


def cache_bytes(model: Any) -> int:
    """Of one position in all layers."""
    of_keys = sum(layer.self_attn.k_proj.out_features for layer in model.get_decoder().layers)
    return 2 * of_keys * DTYPE.itemsize


# --- as an engine serves them ----------------------------------------------------------------------------------------


def engine_rows(of: Ceilings) -> Iterator[Row]:
    """Decoding by an engine's kernels as CUDA graphs: dense beside compacted, and beside transformers' own kernels."""
    for name, config in SIZES.models.items():
        dense = built(config, attn_implementation=CAUSAL)
        served = Engine(dense, is_compiled=HAS_GPU)
        yield row(f"logits of the engine of {name}", ours=_difference(dense, served), unit="relative", target=CLOSE)
        for B in SIZES.decoding:
            found = _timed({"cut": engine_step(dense, served, B), "dense": captured(dense, B, 1, PAST)}, SIZES.steps)
            named = f"decoding {B} at {SIZES.context}, {name}, engine beside transformers"
            yield _speed_row(named, found, B, limit=_decoding_limit(dense, B, of))
        for ratio, kind in itertools.product(RATIOS, ALLOCATIONS):
            cut = built(compacted(config, ratio, kind), attn_implementation=CAUSAL)
            ours, named = Engine(cut, is_compiled=HAS_GPU), f"{name}, {ratio:.0%} {kind}, engine"
            yield row(f"logits of {named}", ours=_difference(cut, ours), unit="relative", target=CLOSE)
            for B in SIZES.decoding:
                steps = {"dense": engine_step(dense, served, B), "cut": engine_step(cut, ours, B)}
                found, target = _timed(steps, SIZES.steps), SPEEDUPS[ratio] if B == 1 else ""
                limit = _decoding_limit(cut, B, of)
                yield _speed_row(f"decoding {B} at {SIZES.context}, {named}", found, B, limit=limit, target=target)
            del cut, ours, steps
            emptied()
        del dense, served
        emptied()


def engine_step(model: Any, engine: Engine, B: int) -> Callable[[], object]:
    """A step of the engine with a greedy choice at its end, as ``captured`` has it of transformers."""
    ids_B, contexts = _random_context(model, B)
    return graphed(lambda: engine.step(ids_B, contexts).argmax(-1), ids_B, contexts)


def _random_context(model: Any, B: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Token ids, and keys and values of all layers."""
    contexts = []
    for block in model.get_decoder().layers:
        D = block.self_attn.head_dim
        shape = B, block.self_attn.k_proj.out_features // D, SIZES.context, D
        contexts.append(
            (torch.randn(shape, device=DEVICE, dtype=DTYPE), torch.randn(shape, device=DEVICE, dtype=DTYPE))
        )
    return torch.randint(model.config.vocab_size, (B,), device=DEVICE), contexts


@torch.inference_mode()
def _difference(model: Any, engine: Engine) -> float:
    """Of the engine's logits from transformers', over these."""
    ids_B, contexts = _random_context(model, 2)
    layers: list[Any] = [Context(PAST) for _ in contexts]
    for layer, (keys, values) in zip(layers, contexts, strict=True):
        layer.keys, layer.values, layer.is_initialized = keys.clone(), values.clone(), True
    cache = Cache(layers=layers)
    expected_BV = model(input_ids=ids_B[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    difference_BV = engine.step(ids_B, contexts) - expected_BV
    return float(difference_BV.double().norm() / expected_BV.double().norm())


# --- products by width -----------------------------------------------------------------------------------------------


def linears_rows(of: Ceilings) -> Iterator[Row]:
    """All products of a model's layers and nothing else: what unequal layers and the tile of channels cost."""
    name, config = next(iter(SIZES.models.items()))
    cases = {"dense": products_of(config, shapes_of(config, 0, "uniform"))}
    for ratio, kind, align in itertools.product(RATIOS, ALLOCATIONS, SIZES.aligns):
        shapes = shapes_of(config, ratio, kind, align)
        cases[f"{ratio:.0%} {kind}, align {align}"] = products_of(config, shapes)
    pool = torch.empty(_taken(cases["dense"]), device=DEVICE, dtype=DTYPE).normal_()
    for B in (SIZES.decoding[0], SIZES.decoding[-1]):
        seconds = {case: seconds_of(linears(pool, sizes, B)) for case, sizes in cases.items()}
        for case, sizes in cases.items():
            yield row(
                f"linear layers of {name} at batch {B}, {case}",
                ours=1e3 * seconds[case],
                baseline=1e3 * seconds["dense"],
                unit="ms",
                ratios=[seconds["dense"] / seconds[case]],
                limit=1e3 * sum(math.prod(size) for size in sizes) * DTYPE.itemsize / of.bytes_per_s,
                limit_name="reading weights at the speed of a copy",
            )


def products_of(config: LlamaConfig, shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """Sizes of the weights of all layers, with those joined that an engine joins."""
    hidden, width = config.hidden_size, config.hidden_size // config.num_attention_heads
    return [
        size
        for shape in shapes
        for size in (
            ((shape.heads + 2 * shape.groups) * width, hidden),
            (hidden, shape.heads * width),
            (2 * shape.channels, hidden),
            (hidden, shape.channels),
        )
    ]


def linears(pool: Tensor, sizes: Sequence[tuple[int, int]], B: int) -> Callable[[], object]:
    """Products of ``B`` rows with weights one behind the other in ``pool``, each of which is read from memory."""
    weights, first = [], 0
    for size in sizes:
        weights.append(pool[first : first + math.prod(size)].view(size))
        first += _taken([size])
    inputs = {columns: torch.randn(B, columns, device=DEVICE, dtype=DTYPE) for _, columns in sizes}

    def step() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    return graphed(step, weights, inputs)


def _taken(sizes: Sequence[tuple[int, int]]) -> int:
    """Numbers that weights take, each at an address of its own allocation: a multiple of 512 bytes."""
    return sum(-(-math.prod(size) // 256) * 256 for size in sizes)


# --- all together ----------------------------------------------------------------------------------------------------

PARTS: Mapping[str, tuple[Callable[[Ceilings], Iterator[Row]], float]] = {
    "ceilings": (ceiling_rows, 20),
    "calibration": (calibration_rows, 60),
    "contrast": (contrast_rows, 60),
    "statistics": (statistics_rows, 60),
    "speed": (speed_rows, 170),
    "stream": (stream_rows, 60),
    "covariance": (covariance_rows, 30),
    "compiled": (compiled_rows, 30),
    "engine": (engine_rows, 150),
    "linears": (linears_rows, 40),
}
"""Parts, and the seconds after which no further row of one is waited for."""


def main(path: Path, names: Sequence[str]) -> None:
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    rows: list[Row] = []
    parts: dict[str, Any] = {}
    reached = ceilings()
    for name in names:
        started, (part, allowed) = time.perf_counter(), PARTS[name]
        parts[name] = {"seconds": 0.0, "cut off": False, "error": ""}
        try:
            for found in part(reached):
                rows.append(found)
                print(shown(found), flush=True)
                parts[name]["seconds"] = time.perf_counter() - started
                save(path, rows, parts)
                if parts[name]["seconds"] > allowed:
                    parts[name]["cut off"] = True
                    break
        except Exception:
            parts[name]["error"] = traceback.format_exc()
            print(parts[name]["error"], file=sys.stderr, flush=True)
        parts[name]["seconds"] = time.perf_counter() - started
        save(path, rows, parts)
        emptied()
        print(f"--- {name}: {parts[name]['seconds']:.0f} s", flush=True)


def save(path: Path, rows: Sequence[Row], parts: Mapping[str, Any]) -> None:
    written = {"suite": "gpu", "machine": machine(), "rows": [asdict(one) for one in rows], "parts": parts}
    write_json(path, written)


def shown(one: Row) -> str:
    compared = "" if one.ratio is None else f"  x{one.ratio:.3f}"
    limit = "" if one.limit is None else f"  limit {one.limit:.4g}"
    met = {None: "", True: "  met", False: f"  NOT {one.target}"}[one.met]
    return f"{one.name}: {one.ours:.4g} {one.unit}{compared}{limit}{met}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [*PARTS])
