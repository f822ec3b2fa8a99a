"""Kernels: what calibration sums over tokens on a GPU, each activation read once and summed in float64.

PyTorch's own operations would write a float64 copy of the activations and read it again for every step. What these give
depends on the numbers alone: tokens are split into chunks of one length on every GPU, and merged in one order.

Letters: N tokens, D columns, S chunks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """A program goes over ``steps`` tiles of ``tokens`` x ``columns``, one below the other."""

    tokens: int
    columns: int
    steps: int
    warps: int

    @property
    def chunk(self) -> int:
        return self.tokens * self.steps


TILE = Tile(tokens=32, columns=64, steps=8, warps=4)
"""With more steps it is a fifth faster, and tokens that are named no longer give the bytes of those tokens alone."""
CHUNKS, MERGED_COLUMNS, WIDTH = 32, 16, 1024
"""What a merging program takes at a time, and the columns that a token's program does."""


def moments(x_ND: Tensor, rows_N: Tensor | None = None, tile: Tile = TILE) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviations, float64, of each column over all tokens, or those that ``rows_N`` names."""
    x_ND = x_ND.contiguous()
    n, width = len(x_ND if rows_N is None else rows_N), x_ND.shape[1]
    mean_D, m2_D = torch.zeros(2, width, dtype=torch.float64, device=x_ND.device)
    n_chunks = triton.cdiv(n, tile.chunk)
    if n_chunks:
        mean_SD, m2_SD = torch.empty(2, n_chunks, width, dtype=torch.float64, device=x_ND.device)
        grid = triton.cdiv(width, tile.columns), n_chunks
        of_chunks = {"TOKENS": tile.tokens, "COLUMNS": tile.columns, "STEPS": tile.steps, "num_warps": tile.warps}
        merging = {"CHUNK": tile.chunk, "CHUNKS": CHUNKS, "COLUMNS": MERGED_COLUMNS}
        with torch.cuda.device_of(x_ND):  # of several GPUs, Triton would take the current one
            _chunk_moments[grid](x_ND, rows_N, mean_SD, m2_SD, n, width, IS_ALL=rows_N is None, **of_chunks)
            _merged[(triton.cdiv(width, MERGED_COLUMNS),)](mean_SD, m2_SD, mean_D, m2_D, n, width, n_chunks, **merging)
    return mean_D, m2_D


def cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None = None) -> Tensor:
    """Cosine of each token's ``x`` and ``y``, float64 (N,); of zeros, 0."""
    x_ND, y_ND = x_ND.contiguous(), y_ND.contiguous()
    n = len(x_ND if rows_N is None else rows_N)
    cosine_N = torch.empty(n, dtype=torch.float64, device=x_ND.device)
    if n:
        with torch.cuda.device_of(x_ND):
            _token_cosine[(n,)](x_ND, y_ND, rows_N, cosine_N, x_ND.shape[1], IS_ALL=rows_N is None, WIDTH=WIDTH)
    return cosine_N


@triton.jit
def _chunk_moments(
    x, rows, means, m2s, n, width,
    IS_ALL: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Moments of a chunk of tokens: every lane of the tile runs Welford's recurrence, then the lanes are merged."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, TOKENS)
    first = tl.program_id(1) * TOKENS * STEPS
    mean = tl.zeros((TOKENS, COLUMNS), tl.float64)
    m2 = tl.zeros((TOKENS, COLUMNS), tl.float64)
    for step in tl.static_range(STEPS):
        token = first + step * TOKENS + lane
        row = token.to(tl.int64) if IS_ALL else tl.load(rows + token, mask=token < n, other=0)
        is_there = (token < n)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None] * width + column[None, :], mask=is_there, other=0).to(tl.float64)
        delta = tl.where(is_there, value - mean, 0)
        mean += delta * (1 / (step + 1))  # a lane has no gaps, so this is its number of tokens
        m2 += delta * tl.where(is_there, value - mean, 0)
    count = tl.minimum(tl.maximum(n - first - lane + TOKENS - 1, 0) // TOKENS, STEPS).to(tl.float64)[:, None]
    mean_all = tl.sum(count * mean, 0) / tl.sum(count)
    between = mean - mean_all[None, :]
    out = tl.program_id(1).to(tl.int64) * width + column
    tl.store(means + out, mean_all, mask=column < width)
    tl.store(m2s + out, tl.sum(m2 + count * between * between, 0), mask=column < width)


@triton.jit
def _merged(
    means, m2s, mean_out, m2_out, n, width, n_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments of all chunks (Chan, Golub & LeVeque): a tile of them at a time, each lane on its own, then the lanes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, CHUNKS)
    mean = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    m2 = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    so_far = tl.zeros((CHUNKS, 1), tl.float64)
    for first in range(0, n_chunks, CHUNKS):
        chunk = first + lane
        count = tl.minimum(tl.maximum(n - chunk * CHUNK, 0), CHUNK).to(tl.float64)[:, None]
        is_there = (chunk < n_chunks)[:, None] & (column < width)[None, :]
        place = chunk.to(tl.int64)[:, None] * width + column[None, :]
        delta = tl.where(is_there, tl.load(means + place, mask=is_there, other=0) - mean, 0)
        share = count / tl.maximum(so_far + count, 1)
        mean += delta * share
        m2 += tl.load(m2s + place, mask=is_there, other=0) + delta * delta * so_far * share
        so_far += count
    mean_all = tl.sum(so_far * mean, 0) / tl.sum(so_far)
    between = mean - mean_all[None, :]
    tl.store(mean_out + column, mean_all, mask=column < width)
    tl.store(m2_out + column, tl.sum(m2 + so_far * between * between, 0), mask=column < width)


@triton.jit
def _token_cosine(x, y, rows, out, width, IS_ALL: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0)
    row = token.to(tl.int64) if IS_ALL else tl.load(rows + token)
    xx = tl.zeros((WIDTH,), tl.float64)
    xy = tl.zeros((WIDTH,), tl.float64)
    yy = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        before = tl.load(x + row * width + column, mask=column < width, other=0).to(tl.float64)
        after = tl.load(y + row * width + column, mask=column < width, other=0).to(tl.float64)
        xx += before * before
        xy += before * after
        yy += after * after
    product = tl.sum(xx) * tl.sum(yy)
    tl.store(out + token, tl.where(product == 0, 0, tl.sum(xy) / tl.sqrt(product)))
