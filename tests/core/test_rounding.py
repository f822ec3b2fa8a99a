"""Rounding, against GPTQ column by column with explicit inverses, and compressed-tensors' own scales."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.core.rounding import ErrorFeedback, IntegerGrid, gptq, rounding_error


def moments(width: int, seed: int, n: int = 200) -> torch.Tensor:
    """Second moments of random activations with correlated columns of different sizes and means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x_ND = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix_DD
    x_ND = x_ND * torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    return x_ND.T @ x_ND / n


def weight(n_outputs: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_outputs, width, generator=generator, dtype=torch.float64)


def gptq_by_inverses(
    weight_OD: np.ndarray, H_DD: np.ndarray, grid: IntegerGrid, order: list[int], damping: float
) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323 without blocks: the inverse of what is left is computed anew for each column."""
    H_DD = H_DD + damping * np.mean(np.diag(H_DD)) * np.eye(len(H_DD))
    left_OD = weight_OD.copy()
    codes_OD = np.zeros(weight_OD.shape, dtype=np.int8)
    for n_done, column in enumerate(order):
        rest = order[n_done:]
        inverse = np.linalg.inv(H_DD[np.ix_(rest, rest)])
        scale_O = grid.scale_OG[:, column // grid.columns].double().numpy()
        zero_O = grid.zero_OG[:, column // grid.columns].numpy()
        limit = 2 ** (grid.bits - 1)
        codes_OD[:, column] = np.clip(np.round(left_OD[:, column] / scale_O) + zero_O, -limit, limit - 1)
        error_O = left_OD[:, column] - scale_O * (codes_OD[:, column].astype(float) - zero_O)
        left_OD[:, rest] -= np.outer(error_O / inverse[0, 0], inverse[0])
    return codes_OD


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize(("width", "columns"), [(24, None), (24, 8), (300, 100)])
def test_gptq_is_that_of_explicit_inverses(width: int, columns: int | None, by_size: bool, is_symmetric: bool) -> None:
    # 300 columns are three blocks.
    H_DD = moments(width, seed=width)
    weight_OD = weight(5, width, seed=1)
    grid = IntegerGrid.of(weight_OD, bits=4, columns=columns, is_symmetric=is_symmetric, scale_dtype=torch.float64)
    feedback = ErrorFeedback.of(H_DD, damping=0.01, by_size=by_size)

    codes_OD = gptq(weight_OD, grid, feedback)

    order = feedback.order_D.tolist()
    assert sorted(order) == [*range(width)]
    sizes = H_DD.diagonal()[feedback.order_D]
    assert (sizes.diff() <= 0).all() if by_size else order == [*range(width)]
    expected = gptq_by_inverses(weight_OD.numpy(), H_DD.numpy(), grid, order, 0.01)
    assert torch.equal(codes_OD, torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_outputs_error_is_never_above_that_of_rounding_to_nearest(bits: int, seed: int, dtype: torch.dtype) -> None:
    H_DD = moments(64, seed)
    weight_OD = weight(16, 64, seed).to(dtype)
    grid = IntegerGrid.of(weight_OD, bits=bits, columns=32, scale_dtype=dtype)

    by_gptq = grid.values(gptq(weight_OD, grid, ErrorFeedback.of(H_DD)))
    nearest = grid.values(grid.codes(weight_OD))

    assert rounding_error(H_DD, weight_OD, by_gptq) < 0.8 * rounding_error(H_DD, weight_OD, nearest)


@given(
    bits=st.integers(2, 8),
    columns=st.sampled_from([None, 4, 8]),
    is_symmetric=st.booleans(),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_codes_are_within_their_bits_and_nearest_values_within_half_a_step(
    bits: int, columns: int | None, is_symmetric: bool, seed: int, scale: float
) -> None:
    weight_OD = weight(3, 16, seed) * scale
    grid = IntegerGrid.of(weight_OD, bits=bits, columns=columns, is_symmetric=is_symmetric, scale_dtype=torch.float64)
    codes_OD = grid.codes(weight_OD)
    by_gptq = gptq(weight_OD, grid, ErrorFeedback.of(moments(16, seed)))

    for codes in (codes_OD, by_gptq):
        assert codes.dtype == torch.int8
        assert int(codes.min()) >= -(2 ** (bits - 1))
        assert int(codes.max()) < 2 ** (bits - 1)
    step_OD = grid.scale_OG.repeat_interleave(grid.columns, 1)
    # Half a step, and with zero points, which are whole numbers, up to as much again at the ends.
    most = 0.5 if is_symmetric else 1.0
    assert ((grid.values(codes_OD, torch.float64) - weight_OD).abs() <= (most + 1e-9) * step_OD).all()


def test_columns_that_have_nothing_to_do_with_one_another_are_rounded_to_nearest() -> None:
    weight_OD = weight(7, 48, seed=3)
    grid = IntegerGrid.of(weight_OD, bits=4, columns=16)
    diagonal_DD = torch.diag(torch.rand(48, dtype=torch.float64))

    for by_size in (True, False):
        codes_OD = gptq(weight_OD, grid, ErrorFeedback.of(diagonal_DD, by_size=by_size))
        assert torch.equal(codes_OD, grid.codes(weight_OD))


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight_OD = weight(7, 48, seed=3)
    grid = IntegerGrid.of(weight_OD, bits=4)

    assert torch.equal(gptq(weight_OD, grid, ErrorFeedback.of(torch.zeros(48, 48))), grid.codes(weight_OD))
    # One of them alone has no part in the others' errors.
    H_DD = moments(48, seed=0)
    H_DD[5] = H_DD[:, 5] = 0
    assert torch.equal(gptq(weight_OD, grid, ErrorFeedback.of(H_DD))[:, 5], grid.codes(weight_OD)[:, 5])


def test_zeros_stay_zeros_and_scales_are_never_zero() -> None:
    weight_OD = weight(4, 32, seed=0)
    weight_OD[1] = 0
    weight_OD[2, :16] = 1e-12  # zero in float16
    for is_symmetric in (True, False):
        grid = IntegerGrid.of(weight_OD, bits=4, columns=16, is_symmetric=is_symmetric, scale_dtype=torch.float16)
        values_OD = grid.values(grid.codes(weight_OD))
        assert (grid.scale_OG > 0).all()
        assert (values_OD[1] == 0).all() and (values_OD[2, :16] == 0).all()


def test_an_asymmetric_grid_reaches_what_is_on_one_side_of_zero() -> None:
    weight_OD = weight(4, 32, seed=0).abs() + 1
    symmetric = IntegerGrid.of(weight_OD, bits=4)
    asymmetric = IntegerGrid.of(weight_OD, bits=4, is_symmetric=False)

    assert asymmetric.scale_OG.max() < 0.6 * symmetric.scale_OG.max()
    assert (asymmetric.zero_OG == -8).all()


def test_groups_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="20 columns are no multiple of a group of 16"):
        IntegerGrid.of(torch.ones(2, 20), bits=4, columns=16)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_zero_points_are_those_of_compressed_tensors(bits: int, is_symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight_OD = weight(6, 32, seed=1).float()
    grid = IntegerGrid.of(weight_OD, bits=bits, columns=16, is_symmetric=is_symmetric)

    groups_OGC = weight_OD.unflatten(1, (-1, 16))
    arguments = QuantizationArgs(num_bits=bits, symmetric=is_symmetric, strategy="group", group_size=16)
    scale_OG, zero_OG = calculate_qparams(groups_OGC.amin(2), groups_OGC.amax(2), arguments)
    assert torch.allclose(grid.scale_OG, scale_OG, rtol=1e-6)
    assert torch.equal(grid.zero_OG, zero_OG.to(torch.int8))
