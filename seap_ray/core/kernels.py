"""Kernels: what calibration sums over tokens on a GPU, each activation read once and summed in float64.

PyTorch's own operations would write a float64 copy of the activations and read it again for every step. The results
depend on the numbers alone: tokens are split into chunks of one length on every GPU, and merged in one order.

Letters: N tokens, D columns, S chunks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program reads: ``steps`` tiles of ``tokens`` x ``columns``, one below the other."""

    tokens: int
    columns: int
    steps: int
    warps: int
    """Warps of the program."""

    @property
    def chunk(self) -> int:
        """Tokens of all tiles."""
        return self.tokens * self.steps


TILE = Tile(tokens=32, columns=64, steps=8, warps=4)
"""With more steps it is a fifth faster, and tokens that are named no longer give the bytes of those tokens alone."""
CHUNKS = 32
"""Chunks that a merging program takes at a time."""
MERGED_COLUMNS = 16
"""Columns of a merging program."""
COSINE_COLUMNS = 1024
"""Columns that a token's program takes at a time."""


def moments(x_ND: Tensor, rows_N: Tensor | None = None, tile: Tile = TILE) -> tuple[Tensor, Tensor]:
    """Compute the mean and summed squared deviations of each column.

    Args:
        x_ND: Activations, (N, D), on a GPU, in any floating dtype.
        rows_N: Indices of the tokens that count; None for all.
        tile: What a program reads.

    Returns:
        Mean and sum of squared deviations, each (D,), float64; zeros for no tokens.
    """
    # The kernels find an element by token x width + column, so rows must follow one another.
    x_ND = x_ND.contiguous()
    n = len(x_ND if rows_N is None else rows_N)
    width = x_ND.shape[1]
    mean_D, m2_D = torch.zeros(2, width, dtype=torch.float64, device=x_ND.device)
    n_chunks = triton.cdiv(n, tile.chunk)
    # A grid of no programs cannot be launched.
    if not n_chunks:
        return mean_D, m2_D

    # Every chunk has moments of its own, which a second kernel merges.
    mean_SD, m2_SD = torch.empty(2, n_chunks, width, dtype=torch.float64, device=x_ND.device)
    chunk_grid = triton.cdiv(width, tile.columns), n_chunks
    chunk_sizes = {"TOKENS": tile.tokens, "COLUMNS": tile.columns, "STEPS": tile.steps, "num_warps": tile.warps}
    merge_grid = (triton.cdiv(width, MERGED_COLUMNS),)
    merge_sizes = {"CHUNK": tile.chunk, "CHUNKS": CHUNKS, "COLUMNS": MERGED_COLUMNS}
    # Of several GPUs, Triton would take the current one.
    with torch.cuda.device_of(x_ND):
        _chunk_moments[chunk_grid](x_ND, rows_N, mean_SD, m2_SD, n, width, IS_ALL=rows_N is None, **chunk_sizes)
        _merged_moments[merge_grid](mean_SD, m2_SD, mean_D, m2_D, n, width, n_chunks, **merge_sizes)
    return mean_D, m2_D


def cosines(x_ND: Tensor, y_ND: Tensor, rows_N: Tensor | None = None) -> Tensor:
    """Compute the cosine of each token's ``x`` and ``y``.

    Args:
        x_ND: Vectors, (N, D), on a GPU.
        y_ND: Vectors, (N, D), on the same GPU.
        rows_N: Indices of the tokens that count; None for all.

    Returns:
        Cosines, (N,), float64; 0 where a vector is zero.
    """
    x_ND = x_ND.contiguous()
    y_ND = y_ND.contiguous()
    n = len(x_ND if rows_N is None else rows_N)
    cosine_N = torch.empty(n, dtype=torch.float64, device=x_ND.device)
    # A grid of no programs cannot be launched.
    if n:
        with torch.cuda.device_of(x_ND):
            _token_cosine[(n,)](
                x_ND, y_ND, rows_N, cosine_N, x_ND.shape[1], IS_ALL=rows_N is None, COLUMNS=COSINE_COLUMNS
            )
    return cosine_N


@triton.jit
def _chunk_moments(
    x, rows, means, m2s, n, width,
    IS_ALL: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Compute the moments of a chunk of tokens.

    Every lane of the tile runs Welford's recurrence, then the lanes are merged.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, TOKENS)
    first = tl.program_id(1) * TOKENS * STEPS
    mean = tl.zeros((TOKENS, COLUMNS), tl.float64)
    m2 = tl.zeros((TOKENS, COLUMNS), tl.float64)

    for step in tl.static_range(STEPS):
        token = first + step * TOKENS + lane
        # In int64, since row x width may be beyond what 32 bits hold. Lanes behind the last token
        # read row 0, which does not count.
        row = token.to(tl.int64) if IS_ALL else tl.load(rows + token, mask=token < n, other=0)
        is_there = (token < n)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None] * width + column[None, :], mask=is_there, other=0).to(tl.float64)
        delta = tl.where(is_there, value - mean, 0)
        # A lane has no gaps, so step + 1 is its number of tokens.
        mean += delta * (1 / (step + 1))
        m2 += delta * tl.where(is_there, value - mean, 0)

    # Tokens that each lane has seen: the chunk's lane-th, and every TOKENS-th after it.
    count = tl.minimum(tl.maximum(n - first - lane + TOKENS - 1, 0) // TOKENS, STEPS).to(tl.float64)[:, None]
    mean_all = tl.sum(count * mean, 0) / tl.sum(count)
    # Deviations from a lane's mean, and of that mean from the chunk's.
    between = mean - mean_all[None, :]

    out = tl.program_id(1).to(tl.int64) * width + column
    tl.store(means + out, mean_all, mask=column < width)
    tl.store(m2s + out, tl.sum(m2 + count * between * between, 0), mask=column < width)


@triton.jit
def _merged_moments(
    means, m2s, mean_out, m2_out, n, width, n_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the moments of all chunks (Chan, Golub & LeVeque): lane by lane, a tile of chunks at a time, then lanes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, CHUNKS)
    mean = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    m2 = tl.zeros((CHUNKS, COLUMNS), tl.float64)
    so_far = tl.zeros((CHUNKS, 1), tl.float64)

    for first in range(0, n_chunks, CHUNKS):
        chunk = first + lane
        # All chunks are full but the last one; those behind it have no tokens.
        count = tl.minimum(tl.maximum(n - chunk * CHUNK, 0), CHUNK).to(tl.float64)[:, None]
        is_there = (chunk < n_chunks)[:, None] & (column < width)[None, :]
        place = chunk.to(tl.int64)[:, None] * width + column[None, :]
        delta = tl.where(is_there, tl.load(means + place, mask=is_there, other=0) - mean, 0)
        # Not below 1, so that a lane without tokens does not divide by zero.
        share = count / tl.maximum(so_far + count, 1)
        mean += delta * share
        m2 += tl.load(m2s + place, mask=is_there, other=0) + delta * delta * so_far * share
        so_far += count

    mean_all = tl.sum(so_far * mean, 0) / tl.sum(so_far)
    between = mean - mean_all[None, :]
    tl.store(mean_out + column, mean_all, mask=column < width)
    tl.store(m2_out + column, tl.sum(m2 + so_far * between * between, 0), mask=column < width)


@triton.jit
def _token_cosine(x, y, rows, out, width, IS_ALL: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute the cosine of one token."""
    token = tl.program_id(0)
    row = token.to(tl.int64) if IS_ALL else tl.load(rows + token)
    xx = tl.zeros((COLUMNS,), tl.float64)
    xy = tl.zeros((COLUMNS,), tl.float64)
    yy = tl.zeros((COLUMNS,), tl.float64)

    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        before = tl.load(x + row * width + column, mask=column < width, other=0).to(tl.float64)
        after = tl.load(y + row * width + column, mask=column < width, other=0).to(tl.float64)
        xx += before * before
        xy += before * after
        yy += after * after

    # A vector of zeros has no direction: its cosine is 0, not NaN.
    product = tl.sum(xx) * tl.sum(yy)
    tl.store(out + token, tl.where(product == 0, 0, tl.sum(xy) / tl.sqrt(product)))
