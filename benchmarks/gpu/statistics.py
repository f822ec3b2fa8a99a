"""Statistics: ways to compute the moments, cosines and covariances of a batch.

Each is measured by its time, its error against float64, and whether twice gives the same bytes.
Letters: N tokens, D columns.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.gpu.device import DEVICE, DTYPE, HAS_GPU, SIZES, Ceilings, free_memory, gpu_row, median_seconds
from benchmarks.measure import Row
from seap_ray.core.moments import Covariance, Moments, split_product

Method = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations (N, D) in, mean and summed squared deviations of each column out."""
LARGER_TILE = (16, 64, 32, 4)
"""Fields of a ``kernels.Tile`` that is faster, but does not give named tokens the bytes of those tokens alone."""
FIRST_TOKEN = 300
"""Times that the first token of a text is as large as the others."""
PRODUCT_REPEATS = 5


def select_rows(x_ND: Tensor, rows_N: Tensor | None) -> Tensor:
    """Return the rows of these indices; None means all."""
    return x_ND if rows_N is None else x_ND.index_select(0, rows_N)


def two_pass(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and summed squared deviations of each column, (D,), float64, by copies of the whole."""
    n = max(len(x_ND), 1)
    mean_D = x_ND.sum(0, dtype=torch.float64) / n
    deviation_ND = x_ND - mean_D
    return mean_D, deviation_ND.square().sum(0) - deviation_ND.sum(0).square() / n


def float32_sums(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by sums about the first token, in float32 within blocks of 128 tokens, in float64 across them."""
    shift_D = x_ND[0].float()
    parts = [(part.float() - shift_D) for part in x_ND.split(128)]
    sum_D = torch.stack([part.sum(0) for part in parts]).double().sum(0)
    square_D = torch.stack([part.square().sum(0) for part in parts]).double().sum(0)
    return shift_D.double() + sum_D / len(x_ND), square_D - sum_D.square() / len(x_ND)


def activations(n: int, width: int) -> Tensor:
    """Return columns of other means and scales, (N, D), with a first token far from all others, as a text's is."""
    # Scales from 0.01 to 10.
    x_ND = torch.randn(n, width, device=DEVICE) * torch.logspace(-2, 1, width, device=DEVICE)
    x_ND += torch.randn(width, device=DEVICE)
    x_ND[0] *= FIRST_TOKEN
    return x_ND.to(DTYPE)


# --- moments and cosines ---------------------------------------------------------------------------------------------


def statistics_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield ways to compute the cosines of a layer, and the moments of its two sites."""
    config = next(iter(SIZES.models.values()))
    B, T = SIZES.batches[0]
    yield from _cosine_rows(B * T, config.hidden_size, ceilings)
    for width in (config.hidden_size, config.intermediate_size):
        yield from _moments_rows(B * T, width, moment_methods(), ceilings)


def compiled_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield moments by what torch.compile makes of two passes."""
    config = next(iter(SIZES.models.values()))
    B, T = SIZES.batches[0]
    for width in (config.hidden_size, config.intermediate_size):
        yield from _moments_rows(B * T, width, {"compiled": torch.compile(two_pass)}, ceilings)


def moment_methods() -> dict[str, Method]:
    """Return the ways to compute moments, by name: PyTorch's operations, and on a GPU kernels of two tiles."""
    methods: dict[str, Method] = {"copies in float64": two_pass, "float32": float32_sums}
    if not HAS_GPU:
        return methods
    from seap_ray.core import kernels  # Triton is there with a GPU alone

    for sizes in (astuple(kernels.TILE), LARGER_TILE):
        methods[f"kernel {sizes}"] = partial(kernels.moments, tile=kernels.Tile(*sizes))
    return methods


def _moments_rows(n: int, width: int, methods: Mapping[str, Method], ceilings: Ceilings) -> Iterator[Row]:
    x_ND = activations(n, width)
    mean_D = x_ND.mean(0, dtype=torch.float64)
    exact = Moments(n, mean_D, (x_ND - mean_D).square_().sum(0))
    base_s = median_seconds(partial(two_pass, x_ND))
    least_s = x_ND.nbytes / ceilings.bytes_per_s
    for name, method in methods.items():
        yield from _method_rows(f"moments of {n} x {width}, {name}", partial(method, x_ND), base_s, least_s, exact)

    rows_N = torch.arange(n, device=DEVICE)[torch.rand(n, device=DEVICE) < 0.75]
    seconds = median_seconds(partial(Moments.of, x_ND, rows_N))
    yield gpu_row(f"moments of {n} x {width}, three tokens of four", ours=1e3 * seconds, unit="ms")


def _method_rows(
    name: str, compute: Callable[[], tuple[Tensor, Tensor]], base_s: float, least_s: float, exact: Moments
) -> Iterator[Row]:
    """Yield time, error and sameness of one way to compute moments."""
    mean_D, m2_D = compute()
    again_mean_D, again_m2_D = compute()
    # A mean may be near zero, so its error is relative to the column's root mean square.
    mean_error_D = (mean_D - exact.mean_D).abs() / exact.square_D.sqrt()
    m2_error_D = (m2_D - exact.m2_D).abs() / exact.m2_D
    error = max(float(mean_error_D.max()), float(m2_error_D.max()))
    # Statistics are compared by their hashes, so bytes must not change from run to run.
    is_same = torch.equal(mean_D, again_mean_D) and torch.equal(m2_D, again_m2_D)
    seconds = median_seconds(compute)

    yield gpu_row(
        name,
        ours=1e3 * seconds,
        baseline=1e3 * base_s,
        unit="ms",
        ratios=[seconds / base_s],
        limit=1e3 * least_s,
        limit_name="reading at the speed of a copy",
    )
    yield gpu_row(f"{name}: error", ours=error, unit="relative")
    yield gpu_row(f"{name}: the same bytes twice", ours=float(is_same), unit="yes", target="ours >= 1")


def _cosine_rows(n: int, width: int, ceilings: Ceilings) -> Iterator[Row]:
    x_ND = activations(n, width)
    y_ND = activations(n, width)

    def plain() -> Tensor:
        """Compute cosines by copies in float64."""
        return cosine_similarity(x_ND.double(), y_ND.double(), dim=1)

    base_s = median_seconds(plain)
    methods: dict[str, Callable[[], Tensor]] = {"copies in float64": plain}
    if HAS_GPU:
        from seap_ray.core import kernels

        methods["kernel"] = lambda: kernels.cosines(x_ND, y_ND)

    for name, compute in methods.items():
        yield gpu_row(
            f"cosines of {n} x {width}, {name}",
            ours=1e3 * median_seconds(compute),
            baseline=1e3 * base_s,
            unit="ms",
            limit=1e3 * 2 * x_ND.nbytes / ceilings.bytes_per_s,
            limit_name="reading at the speed of a copy",
        )
        error = float((compute() - plain()).abs().max())
        yield gpu_row(f"cosines of {n} x {width}, {name}: error", ours=error, unit="absolute", target="ours <= 1e-12")

    column_ND = plain()[:, None]
    seconds = median_seconds(lambda: Moments.of(column_ND))
    yield gpu_row(f"moments of {n} cosines", ours=1e3 * seconds, unit="ms")


# --- covariances -----------------------------------------------------------------------------------------------------


def covariance_rows(ceilings: Ceilings) -> Iterator[Row]:
    """Yield products of deviations in float32, as they are recorded, and by cheaper ways; errors against float64."""
    config = next(iter(SIZES.models.values()))
    B, T = SIZES.batches[0]
    for width in (config.hidden_size, config.intermediate_size):
        yield from _covariance_rows(B * T, width, ceilings)
        free_memory()


def _covariance_rows(n: int, width: int, ceilings: Ceilings) -> Iterator[Row]:
    x_ND = activations(n, width)
    name = f"covariance of {n} x {width}"
    deviation_ND = x_ND - x_ND.mean(0, dtype=torch.float64)
    # In float64, which no method here uses.
    exact_DD = deviation_ND.T @ deviation_ND
    single_ND = deviation_ND.float()
    scale_D = exact_DD.diagonal().sqrt()
    base_s = median_seconds(partial(product_methods()["float32"], single_ND), PRODUCT_REPEATS)
    seconds = median_seconds(partial(Covariance.of, x_ND), PRODUCT_REPEATS)

    yield gpu_row(
        f"{name}, as recorded, beside the product in float32",
        ours=1e3 * seconds,
        baseline=1e3 * base_s,
        unit="ms",
        ratios=[seconds / base_s],
    )

    for method, product in product_methods().items():
        # In place: at the width of down_proj's input each of these is a gigabyte.
        error_DD = (product(single_ND) - exact_DD).abs_().div_(scale_D).div_(scale_D[:, None])
        seconds = median_seconds(partial(product, single_ND), PRODUCT_REPEATS)
        yield gpu_row(
            f"{name}, {method}",
            ours=1e3 * seconds,
            baseline=1e3 * base_s,
            unit="ms",
            ratios=[seconds / base_s],
            limit=1e3 * 2 * n * width**2 / ceilings.flops_per_s,
            limit_name="product in bfloat16",
        )
        yield gpu_row(f"{name}, {method}: error", ours=float(error_DD.max()), unit="of the two deviations")


def product_methods() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the ways to multiply a matrix in float32 with itself, (N, D) -> (D, D), by name."""

    def tf32(x_ND: Tensor) -> Tensor:
        """Multiply in TF32, whose mantissa has 10 bits."""
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return x_ND.T @ x_ND
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    methods: dict[str, Callable[[Tensor], Tensor]] = {"float32": lambda x_ND: x_ND.T @ x_ND}
    if HAS_GPU:
        methods |= {"tf32": tf32, "two bfloat16": split_product}
    return methods
