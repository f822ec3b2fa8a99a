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

from benchmarks.gpu.device import HAS_GPU, SIZES, Ceilings, build_model, flops_per_token, gpu_row, now, random_sequences
from benchmarks.gpu.statistics import select_rows, two_pass
from benchmarks.measure import Row, alternate
from seap_ray.models.batching import Batch
from seap_ray.models.forward import record
from seap_ray.models.recorder import recording
from seap_ray.models.sequences import Sequences

BATCHES = 3
"""Batches of a shard."""


def calibration_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield a job's ``record`` of a shard of three batches, and the hooks alone, beside the bare decoder."""
    name, config = next(iter(SIZES.models.items()))
    model = build_model(config)
    for B, T in SIZES.batches:
        batches = [random_sequences(config, [T] * B) for _ in range(BATCHES)]
        limit = ceilings.flops_per_s / flops_per_token(model.get_decoder(), T)
        yield from _compared_rows(f"calibration of {name}, {B} x {T}", model, batches, limit)


def contrast_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield calibration without the kernels, and of sequences that differ in length, which a job packs into rows."""
    name, config = next(iter(SIZES.models.items()))
    model = build_model(config)
    B, T = SIZES.batches[-1]
    # Without a GPU there are no kernels to leave out.
    if HAS_GPU:
        batches = [random_sequences(config, [T] * B) for _ in range(BATCHES)]
        limit = ceilings.flops_per_s / flops_per_token(model.get_decoder(), T)
        with _without_kernels():
            case = f"calibration of {name}, {B} x {T}, without kernels"
            yield from _compared_rows(case, model, batches, limit, target="")

    # From half of a row to a whole one.
    lengths = torch.linspace(T / 2, T, B).long().tolist()
    ragged = [random_sequences(config, lengths) for _ in range(BATCHES)]
    yield from _compared_rows(f"calibration of {name}, {B} of {T // 2} to {T}", model, ragged, None)


def _compared_rows(
    name: str, model: Any, batches: list[Sequences], limit: float | None, target: str = "ratio <= 1.05"
) -> Iterator[Row]:
    """Yield hooks and ``record`` beside the bare forward pass; the target is that of ``record``."""
    sequences = [sequence for batch in batches for sequence in batch]
    longest = max(map(len, sequences))
    contestants = {
        "bare": lambda: [_forward(model, batch) for batch in batches],
        "hooks": lambda: [_forward(model, batch, is_recording=True) for batch in batches],
        "record": lambda: record(model, sequences, batch_tokens=len(batches[0]) * longest),
    }
    timings = alternate(contestants, SIZES.rounds, now=now)
    n_tokens = sum(map(len, sequences))

    for contestant in ("hooks", "record"):
        yield gpu_row(
            f"{name}: {contestant} beside the bare forward pass (ratio of seconds)",
            ours=n_tokens / timings.median(contestant),
            baseline=n_tokens / timings.median("bare"),
            unit="tokens/s",
            ratios=timings.ratios(contestant, "bare"),
            limit=limit,
            limit_name="product in bfloat16",
            target=target if contestant == "record" else "",
            why="its batches are short, and merging their moments and copying them to the CPU take as long for any",
        )


@torch.inference_mode()
def _forward(model: Any, sequences: Sequences, *, is_recording: bool = False) -> None:
    """Run the decoder over a batch whose rows are one sequence each."""
    decoder = model.get_decoder()
    # Positions are left out: without them a decoder counts from 0 in each row.
    batch = Batch.of([[sequence] for sequence in sequences], False, model.device)
    if is_recording:
        with recording(decoder, batch.rows_N):
            decoder(input_ids=batch.ids_BT, use_cache=False)
    else:
        decoder(input_ids=batch.ids_BT, use_cache=False)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Compute statistics by PyTorch's own operations inside the block."""
    from seap_ray.core import kernels

    def moments(x_ND: Tensor, rows_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stand for ``kernels.moments``."""
        return two_pass(select_rows(x_ND, rows_N))

    def cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None) -> Tensor:
        """Stand for ``kernels.cosines``."""
        return cosine_similarity(select_rows(x_ND, rows_N).double(), select_rows(y_ND, rows_N).double(), dim=1)

    with mock.patch.multiple(kernels, moments=moments, cosines=cosines):
        yield
