"""Least squares, ridges and greedy scores for weights of 16 bits: in float32 where that does, else in float64."""

import numpy as np
import pytest
import torch

from seap_ray.core import ridge_regression
from seap_ray.core.moments import Covariance
from seap_ray.core.reconstruction import (
    RIDGES,
    choose_ridge,
    error_of,
    least_squares,
    least_squares_without_bias,
    obs,
)
from seap_ray.core.ridge_regression import (
    NormalEquations,
    RidgeRegression,
    are_accurate_errors,
    complement,
    factor_in_place,
    first_accurate,
    solve_rows,
    working_dtypes,
)

WIDTH = 300
KEPT = torch.arange(0, WIDTH, 2)


def tokens(n: int, seed: int) -> torch.Tensor:
    """Return correlated columns with means and scales far apart, as a layer has them."""
    mix = torch.randn(WIDTH // 6, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, WIDTH // 6, generator=generator, dtype=torch.float64)
    own = 0.3 * torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return (torch.nn.functional.silu(hidden @ mix) + own) * torch.logspace(-2, 1, WIDTH, dtype=torch.float64)


def nearly_dependent() -> torch.Tensor:
    """Return columns that are linear maps of fewer ones, but for a ten thousandth."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2000, WIDTH // 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(WIDTH // 6, WIDTH, generator=generator, dtype=torch.float64)
    return hidden @ mix + 1e-4 * torch.randn(2000, WIDTH, generator=generator, dtype=torch.float64)


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(40, WIDTH, generator=generator) / torch.logspace(-2, 1, WIDTH)).to(dtype)


def regressed(
    covariance: Covariance, w: torch.Tensor, ridge: float, *, has_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias by numpy's solver, in float64, from the formulas."""
    C = covariance.covariance_DD.numpy()
    mean = covariance.mean_D.numpy()
    W = w.double().numpy()
    kept = KEPT.numpy()
    cut = np.setdiff1d(np.arange(WIDTH), kept)
    R = np.diag(ridge * C[kept, kept])
    second = C if has_bias else C + np.outer(mean, mean)
    X = np.linalg.solve(second[np.ix_(kept, kept)] + R, second[np.ix_(kept, cut)] @ W[:, cut].T).T
    return W[:, kept] + X, W[:, cut] @ mean[cut] - X @ mean[kept]


@pytest.fixture
def used(monkeypatch) -> list[torch.dtype]:
    """Return the dtypes of all factors that are made from here on."""
    dtypes: list[torch.dtype] = []
    cholesky = torch.linalg.cholesky

    def noted(matrix: torch.Tensor) -> torch.Tensor:
        dtypes.append(matrix.dtype)
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", noted)
    return dtypes


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_weights_of_16_bits_are_those_of_float64_but_for_their_rounding(used, dtype, has_bias, ridge):
    covariance = Covariance.of(tokens(2000, seed=1))
    w = weight(dtype)
    expected, bias = regressed(covariance, w, ridge, has_bias=has_bias)
    if has_bias:
        new, added = least_squares(covariance, w, KEPT, ridge=ridge)
        np.testing.assert_allclose(added, bias, rtol=1e-3, atol=1e-4 * np.abs(bias).max())
    else:
        new = least_squares_without_bias(covariance, w, KEPT, ridge=ridge)
    assert used == [torch.float32] and new.dtype == torch.float64
    # Sixteenths of the spacing of the weight's numbers, in the size that a column's weights have.
    spacing_S = torch.finfo(dtype).eps * np.linalg.norm(expected, axis=0)
    assert (np.linalg.norm(new.numpy() - expected, axis=0) <= spacing_S / 16).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_computed_in_float64(used, dtype):
    covariance = Covariance.of(tokens(2000, seed=1))
    w = weight(dtype)
    new, _ = least_squares(covariance, w, KEPT, ridge=1e-3)
    np.testing.assert_allclose(new, regressed(covariance, w, 1e-3, has_bias=True)[0], rtol=1e-8, atol=1e-10)
    obs(covariance, w, block=1, ridge=1e-3)
    assert set(used) == {torch.float64}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-7, 1e-10])
def test_where_float32_has_too_few_digits_float64_takes_its_place(used, has_bias, ridge):
    """Columns that nearly depend on each other: a factor in float32 is inaccurate, or there is none."""
    covariance = Covariance.of(nearly_dependent())
    w = weight()
    expected, _ = regressed(covariance, w, ridge, has_bias=has_bias)
    if has_bias:
        new, _ = least_squares(covariance, w, KEPT, ridge=ridge)
    else:
        new = least_squares_without_bias(covariance, w, KEPT, ridge=ridge)
    assert used == [torch.float32, torch.float64]
    assert np.linalg.norm(new.numpy() - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_wrong_solution_is_known_by_one_step_of_refinement():
    regression = RidgeRegression(Covariance.of(tokens(2000, seed=1)), weight(), KEPT)
    solution = regression._solve(1e-2, torch.float32)
    assert regression._is_accurate(solution)
    solution.weight_OS[:, 7] *= 1.01
    assert not regression._is_accurate(solution)
    solution.weight_OS[:, 7] = torch.nan
    assert not regression._is_accurate(solution)


@pytest.mark.parametrize(("n", "dtype"), [(160, torch.bfloat16), (400, torch.float16), (4000, torch.bfloat16)])
def test_the_ridge_is_the_one_with_the_least_error_of_all_tokens_held_out(used, n, dtype):
    fitted = Covariance.of(tokens(n, seed=1))
    held_out = Covariance.of(tokens(n, seed=2) + 0.01)
    w = weight(dtype)
    ridge = choose_ridge(fitted, held_out, w)
    assert torch.float32 in used

    kept = (fitted.var_D * w.double().square().sum(0)).argsort()[WIDTH // 2 :].sort().values
    errors = []
    for each in RIDGES:
        repaired = least_squares(fitted, w.double(), kept, ridge=each)
        errors.append(error_of(held_out, w, kept, repaired))
    assert ridge == RIDGES[int(np.argmin(errors))]


def test_a_ridge_above_one_at_which_float32_was_accurate_is_not_probed(monkeypatch):
    probed: list[float] = []
    is_accurate = RidgeRegression._is_accurate

    def noted(self, solution):
        probed.append(float((solution.ridge_S / variances_S).mean()))
        return is_accurate(self, solution)

    covariance = Covariance.of(tokens(2000, seed=1))
    variances_S = covariance.var_D[KEPT]
    monkeypatch.setattr(RidgeRegression, "_is_accurate", noted)
    regression = RidgeRegression(covariance, weight(), KEPT)
    for ridge in (1e-2, 1e-1, 1e-3, 1.0):
        regression.solve(ridge)
    assert probed == pytest.approx([1e-2, 1e-3])


def test_after_float32_has_failed_smaller_ridges_are_solved_in_float64_alone(used):
    regression = RidgeRegression(Covariance.of(nearly_dependent()), weight(), KEPT)
    regression.solve(1e-7)
    del used[:]
    regression.solve(1e-8)
    assert used == [torch.float64]
    regression.solve(1.0)
    assert used[1] == torch.float32


@pytest.mark.parametrize(("best", "tried"), [(1.0, 3), (1e-2, 5), (1e-4, 6)])
def test_no_ridge_is_tried_after_two_that_are_worse_than_the_best(monkeypatch, best, tried):
    n_solved = 0
    solve = RidgeRegression.solve

    def counted(self, ridge):
        nonlocal n_solved
        n_solved += 1
        return solve(self, ridge)

    distance = {ridge: abs(np.log(ridge / best)) for ridge in RIDGES}
    errors = iter([distance[ridge] for ridge in sorted(RIDGES, reverse=True)])
    monkeypatch.setattr(RidgeRegression, "solve", counted)
    monkeypatch.setattr(NormalEquations, "error", lambda self, added_OS: torch.tensor(next(errors)))
    covariance = Covariance.of(tokens(400, seed=1))
    assert choose_ridge(covariance, covariance, weight()) == best
    assert n_solved == tried


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("block", [1, 10])
def test_greedy_scores_of_16_bits_are_those_of_float64_but_for_rounding(used, block, has_bias):
    covariance = Covariance.of(tokens(2000, seed=1))
    w = weight()
    scores = obs(covariance, w, block=block, ridge=1e-2, has_bias=has_bias)
    assert set(used) == {torch.float32} and scores.dtype == torch.float64
    exact = obs(covariance, w.double(), block=block, ridge=1e-2, has_bias=has_bias)
    assert (scores / exact - 1).abs().max() < 1e-3
    for share in (0.2, 0.5, 0.8):
        n_kept = int(share * len(scores))
        best, best_exact = (set(each.argsort()[-n_kept:].tolist()) for each in (scores, exact))
        assert best == best_exact


def test_greedy_scores_are_computed_in_float64_where_float32_has_too_few_digits(used):
    covariance = Covariance.of(nearly_dependent())
    scores = obs(covariance, weight(), block=1, ridge=1e-7)
    assert used[0] == torch.float32 and used[-1] == torch.float64
    torch.testing.assert_close(scores, obs(covariance, weight().double(), block=1, ridge=1e-7), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("ridge", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_whatever_the_ridge_no_score_is_off_by_more_than_rounding(used, ridge, dtype):
    """The columns that go last have lost most digits: where float32 has too few, its scores are not taken."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(20, 120, generator=generator, dtype=torch.float64)
    hidden = torch.randn(1000, 20, generator=generator, dtype=torch.float64)
    own = 1e-3 * torch.randn(1000, 120, generator=generator, dtype=torch.float64)
    covariance = Covariance.of(hidden @ mix + own)
    w = torch.randn(40, 120, generator=generator).to(dtype)
    scores = obs(covariance, w, block=1, ridge=ridge)
    if ridge == 1e-6:
        assert torch.float64 in used
    torch.testing.assert_close(scores, obs(covariance, w.double(), block=1, ridge=ridge), rtol=5e-3, atol=1e-6)


def test_errors_that_do_not_add_up_are_known():
    covariance = Covariance.of(tokens(2000, seed=1))
    w = weight()
    C = covariance.covariance_DD
    mean_D = covariance.mean_D
    ridge_D = 0.01 * covariance.var_D
    for moments_DD, mean in ((C, None), (C + torch.outer(mean_D, mean_D), mean_D)):
        error_O = torch.einsum("od,de,oe->o", w.double(), moments_DD + torch.diag(ridge_D), w.double())
        assert are_accurate_errors(error_O, w, covariance, ridge_D, mean_D=mean)
        assert not are_accurate_errors(1.001 * error_O, w, covariance, ridge_D, mean_D=mean)
        assert not are_accurate_errors(torch.nan * error_O, w, covariance, ridge_D, mean_D=mean)


def test_a_failure_of_float64_is_raised_and_one_of_float32_is_not():
    tried: list[torch.dtype] = []

    def fails(dtype: torch.dtype) -> None:
        tried.append(dtype)
        raise torch.linalg.LinAlgError("not positive definite")

    with pytest.raises(torch.linalg.LinAlgError):
        first_accurate(torch.bfloat16, fails)
    assert tried == [torch.float32, torch.float64]
    assert first_accurate(torch.float16, lambda dtype: dtype if dtype == torch.float64 else None) == torch.float64
    assert working_dtypes(torch.float32) == working_dtypes(torch.float64) == (torch.float64,)


def test_everything_is_computed_on_the_device_of_the_covariance():
    """A default device of another kind: whatever is made without saying where cannot be computed with."""
    covariance = Covariance.of(tokens(400, seed=1))
    w = weight()
    with torch.device("meta"):
        results = [
            *least_squares(covariance, w, KEPT, ridge=0.1),
            least_squares_without_bias(covariance, w, KEPT, ridge=0.1),
            obs(covariance, w, block=1, ridge=0.1),
            obs(covariance, w, block=10, ridge=0.1, has_bias=False),
            complement(KEPT, WIDTH),
        ]
        assert choose_ridge(covariance, covariance, w) in RIDGES
    assert {result.device.type for result in results} == {"cpu"}


def test_no_more_rows_of_a_covariance_are_picked_at_a_time_than_fit_a_cache(monkeypatch):
    covariance = Covariance.of(tokens(400, seed=1))
    exact = weight().float()  # of 32 bits: computed in float64
    whole, _ = least_squares(covariance, exact, KEPT, ridge=0.1)
    monkeypatch.setattr(ridge_regression, "ROWS", 7)
    picked: list[int] = []
    index_select = torch.Tensor.index_select

    def noted(self: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        if self is covariance.comoment_DD:
            picked.append(len(index))
        return index_select(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", noted)
    by_seven, _ = least_squares(covariance, exact, KEPT, ridge=0.1)
    assert max(picked) == 7 and sum(picked) == len(KEPT)
    torch.testing.assert_close(by_seven, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [1, 7, 8, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_by_blocks_is_choleskys(monkeypatch, width, dtype):
    monkeypatch.setattr(ridge_regression, "COLUMNS", 8)
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    matrix = rows.T @ rows / width
    expected = np.linalg.cholesky(matrix.numpy())
    factor = factor_in_place(matrix)
    assert factor is matrix
    np.testing.assert_allclose(factor.tril(), expected, rtol=1e-4, atol=1e-5)

    right = torch.randn(3, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    kept = right.clone()
    solved = np.linalg.solve(expected @ expected.T, right.numpy().T).T
    np.testing.assert_allclose(solve_rows(right, factor), solved, rtol=1e-2, atol=1e-3 * np.abs(solved).max())
    assert torch.equal(right, kept)


def test_a_matrix_that_is_not_positive_definite_has_no_factor(monkeypatch):
    monkeypatch.setattr(ridge_regression, "COLUMNS", 4)
    for place in (0, 5, 9):
        matrix = torch.eye(10)
        matrix[place, place] = -1
        with pytest.raises(torch.linalg.LinAlgError):
            factor_in_place(matrix)
