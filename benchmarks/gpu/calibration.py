"""Calibration: what a job records, beside the bare forward pass.

Letters: B sequences, T tokens of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.gpu.device import HAS_GPU, SIZES, Ceilings, built, flops, now, random_sequences, row
from benchmarks.gpu.statistics import chosen, two_pass
from benchmarks.measure import Row, alternate
from seap_ray.models.batching import Batch, Sequences
from seap_ray.models.forward import record
from seap_ray.models.recorder import recording


def calibration_rows(of: Ceilings) -> Iterator[Row]:
    """A job's ``record`` of a shard of three batches, and the hooks alone, beside the bare decoder."""
    name, config = next(iter(SIZES.models.items()))
    model = built(config)
    for B, T in SIZES.batches:
        parts = [random_sequences(config, [T] * B) for _ in range(3)]
        limit = of.flops_per_s / flops(model.get_decoder(), T)
        yield from _calibration_rows(f"calibration of {name}, {B} x {T}", model, parts, limit)


def contrast_rows(of: Ceilings) -> Iterator[Row]:
    """The same without the kernels, and of sequences that differ in length, which a job packs into rows."""
    name, config = next(iter(SIZES.models.items()))
    model, (B, T) = built(config), SIZES.batches[-1]
    parts = [random_sequences(config, [T] * B) for _ in range(3)]
    limit = of.flops_per_s / flops(model.get_decoder(), T)
    if HAS_GPU:
        with _copies():
            named = f"calibration of {name}, {B} x {T}, without kernels"
            yield from _calibration_rows(named, model, parts, limit, target="")
    lengths = torch.linspace(T / 2, T, B).long().tolist()
    ragged = [random_sequences(config, lengths) for _ in range(3)]
    yield from _calibration_rows(f"calibration of {name}, {B} of {T // 2} to {T}", model, ragged, None)


def _calibration_rows(
    name: str, model: Any, parts: list[Sequences], limit: float | None, target: str = "ratio <= 1.05"
) -> Iterator[Row]:
    sequences = [sequence for part in parts for sequence in part]
    longest = max(map(len, sequences))
    contestants = {
        "bare": lambda: [_forward(model, part) for part in parts],
        "hooks": lambda: [_forward(model, part, is_recording=True) for part in parts],
        "record": lambda: record(model, sequences, batch_tokens=len(parts[0]) * longest),
    }
    found = alternate(contestants, SIZES.rounds, now=now)
    tokens = sum(map(len, sequences))
    for contestant in ("hooks", "record"):
        yield row(
            f"{name}: {contestant} beside the bare forward pass (ratio of seconds)",
            ours=tokens / found.median(contestant),
            baseline=tokens / found.median("bare"),
            unit="tokens/s",
            ratios=found.ratios(contestant, "bare"),
            limit=limit,
            limit_name="product in bfloat16",
            target=target if contestant == "record" else "",
            why="its batches are short, and merging their moments and copying them to the CPU take as long for any",
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
    from seap_ray.core import kernels

    def moments(x_ND: Tensor, rows_N: Tensor | None) -> tuple[Tensor, Tensor]:
        return two_pass(chosen(x_ND, rows_N))

    def cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None) -> Tensor:
        return cosine_similarity(chosen(x_ND, rows_N).double(), chosen(y_ND, rows_N).double(), dim=1)

    with mock.patch.multiple(kernels, moments=moments, cosines=cosines):
        yield
