"""Statistics: ways to find the moments, cosines and covariances of a batch: time, error, and whether twice is the same.

Letters: N tokens, D columns.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.gpu.device import DEVICE, DTYPE, HAS_GPU, SIZES, Ceilings, emptied, row, seconds_of
from benchmarks.measure import Row
from seap_ray.core.moments import Covariance, Moments, split_product

Way = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mean and summed squared deviations of each column."""


def chosen(x_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """The rows that are named; without names, all."""
    return x_ND if rows_N is None else x_ND.index_select(0, rows_N)


def two_pass(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and summed squared deviations of each column, float64, by copies of the whole."""
    n = max(len(x_ND), 1)
    mean_D = x_ND.sum(0, dtype=torch.float64) / n
    deviation_ND = x_ND - mean_D
    return mean_D, deviation_ND.square().sum(0) - deviation_ND.sum(0).square() / n


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
    yield row(f"{name}: error", ours=error, unit="relative")
    yield row(f"{name}: the same bytes twice", ours=float(is_same), unit="yes", target="ours >= 1")


def ways() -> dict[str, Way]:
    plain: dict[str, Way] = {"copies in float64": two_pass, "float32": float32_sums}
    if not HAS_GPU:
        return plain
    from seap_ray.core import kernels

    tiles = [astuple(kernels.TILE), (16, 64, 32, 4)]
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
        from seap_ray.core import kernels

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
