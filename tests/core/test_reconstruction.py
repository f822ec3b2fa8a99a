"""Least squares and the optimal brain surgeon, against regressions on the tokens themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.core.moments import Covariance, pooled_covariance
from seap_ray.core.reconstruction import (
    RIDGES,
    UNIT_SCORES,
    block_wifv,
    choose_ridge,
    error_of,
    least_squares,
    least_squares_without_bias,
    obs,
    ridged,
)

often = settings(max_examples=60, deadline=None)
EXACT = 1e-13
"""A ridge that rounds to none; a config asks for 1e-5 at least."""


def tokens(n: int, width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Correlated columns with means far from zero and scales far apart, (n, width) float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, rank or width, generator=generator, dtype=torch.float64)
    mix = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-2, 2, width, dtype=torch.float64)
    shift = 3 * torch.randn(width, generator=generator, dtype=torch.float64)
    return (hidden @ mix + shift) * scale


def weight(outputs: int, width: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, width, generator=generator, dtype=torch.float64) / torch.logspace(-2, 2, width)


def regressed(x: torch.Tensor, w: torch.Tensor, kept: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The affine map of the kept columns nearest to all of them, by numpy's regression on the tokens."""
    design = np.hstack([x[:, kept].numpy(), np.ones((len(x), 1))])
    solution, *_ = np.linalg.lstsq(design, (x @ w.T).numpy(), rcond=None)
    return solution[:-1].T, solution[-1]


def squared_error(x: torch.Tensor, w: torch.Tensor, kept: torch.Tensor, new: torch.Tensor, bias: torch.Tensor) -> float:
    return float((x @ w.T - x[:, kept] @ new.T - bias).square().sum(1).mean())


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = draw(st.integers(2, 12))
    kept = sorted(draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width)))
    x = tokens(draw(st.integers(2, 60)), width, draw(st.integers(0, 99)), draw(st.none() | st.integers(1, width)))
    return x, weight(draw(st.integers(1, 5)), width), torch.tensor(kept)


# --- least squares ---------------------------------------------------------------------------------------------------


def test_it_is_the_regression_of_the_output_on_the_kept_columns():
    x, w, kept = tokens(500, 12, seed=1), weight(7, 12), torch.tensor([0, 3, 4, 9, 11])
    new, bias = least_squares(Covariance.of(x), w, kept, ridge=EXACT)
    by_hand, constant = regressed(x, w, kept)
    np.testing.assert_allclose(new, by_hand, rtol=1e-6)
    np.testing.assert_allclose(bias, constant, rtol=1e-6)


@often
@given(cases(), st.sampled_from(RIDGES))
def test_it_is_never_worse_than_the_mean_on_the_calibration_tokens(case, ridge):
    x, w, kept = case
    covariance = Covariance.of(x)
    new, bias = least_squares(covariance, w, kept, ridge=ridge)
    cut = [i for i in range(w.shape[1]) if i not in kept.tolist()]
    of_mean = squared_error(x, w, kept, w[:, kept], w[:, cut] @ x.mean(0)[cut])
    scale = float((x @ w.T).square().sum(1).mean())
    assert squared_error(x, w, kept, new, bias) <= of_mean + 1e-9 * scale


@often
@given(cases(), st.sampled_from(RIDGES))
def test_the_error_from_a_covariance_is_that_of_the_tokens(case, ridge):
    x, w, kept = case
    repaired = least_squares(Covariance.of(x), w, kept, ridge=ridge)
    other = tokens(40, w.shape[1], seed=3)
    for seen in (x, other):
        assert error_of(Covariance.of(seen), w, kept, repaired) == pytest.approx(
            squared_error(seen, w, kept, *repaired), rel=1e-6, abs=1e-9 * float((seen @ w.T).square().sum(1).mean())
        )


def test_with_nothing_cut_it_is_the_identity():
    w = weight(4, 6)
    new, bias = least_squares(Covariance.of(tokens(30, 6, seed=0)), w, torch.arange(6), ridge=0.1)
    assert torch.equal(new, w) and torch.equal(bias, torch.zeros(4, dtype=torch.float64))


def test_columns_that_depend_on_others_are_replaced_exactly():
    x = tokens(200, 10, seed=2)
    planted = torch.randn(4, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    x[:, 6:] = x[:, :6] @ planted.T + torch.tensor([1.0, -2.0, 0.5, 30.0])
    w, kept = weight(5, 10), torch.arange(6)
    repaired = least_squares(Covariance.of(x), w, kept, ridge=EXACT)
    fresh = tokens(50, 10, seed=77)  # holds beyond the calibration tokens, as the dependence does
    fresh[:, 6:] = fresh[:, :6] @ planted.T + torch.tensor([1.0, -2.0, 0.5, 30.0])
    assert squared_error(fresh, w, kept, *repaired) < 1e-9 * float((fresh @ w.T).square().sum(1).mean())


@pytest.mark.parametrize("ridge", RIDGES)
def test_fewer_tokens_than_columns_and_columns_that_never_vary_are_no_trouble(ridge):
    x = tokens(5, 40, seed=4)
    x[:, 7] = 2.0
    covariance = Covariance.of(x.float())  # float32 products, as a recorder makes them
    new, bias = least_squares(covariance, weight(3, 40), torch.arange(0, 40, 2), ridge=ridge)
    assert new.isfinite().all() and bias.isfinite().all()
    silent = Covariance.of(torch.zeros(5, 8))
    new, bias = least_squares(silent, weight(3, 8), torch.arange(4), ridge=ridge)
    assert torch.equal(new, weight(3, 8)[:, :4]) and not bias.any()


def test_the_ridge_is_relative_so_a_columns_unit_does_not_matter():
    x, w, kept = tokens(60, 8, seed=6), weight(3, 8), torch.tensor([1, 2, 6])
    unit = torch.logspace(-5, 4, 8, dtype=torch.float64)
    new, bias = least_squares(Covariance.of(x), w, kept, ridge=0.1)
    scaled, same = least_squares(Covariance.of(x * unit), w / unit, kept, ridge=0.1)
    torch.testing.assert_close(scaled * unit[kept], new, rtol=1e-6, atol=0)
    torch.testing.assert_close(same, bias, rtol=1e-6, atol=1e-9)


def test_a_large_ridge_leaves_the_mean():
    x, w, kept = tokens(60, 8, seed=6), weight(3, 8), torch.tensor([1, 2, 6])
    cut = [0, 3, 4, 5, 7]
    new, bias = least_squares(Covariance.of(x), w, kept, ridge=1e12)
    torch.testing.assert_close(new, w[:, kept], rtol=1e-6, atol=0)
    torch.testing.assert_close(bias, w[:, cut] @ x.mean(0)[cut], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("n", "least", "most"), [(12, 1e-1, 1.0), (20_000, 1e-5, 1e-3)])
def test_the_ridge_is_chosen_by_the_tokens_held_out(n, least, most):
    """Few tokens need much of a ridge, many little."""
    x, w = tokens(2 * n, 30, seed=10), weight(6, 30)
    fitted, held_out = Covariance.of(x[:n]), Covariance.of(x[n:])
    ridge = choose_ridge(fitted, held_out, w)
    assert least <= ridge <= most
    kept = (fitted.var_D * w.square().sum(0)).argsort()[15:].sort().values
    errors = [error_of(held_out, w, kept, least_squares(fitted, w, kept, ridge=r)) for r in RIDGES]
    assert RIDGES[int(np.argmin(errors))] == ridge


# --- without a bias --------------------------------------------------------------------------------------------------


def regressed_through_zero(x: torch.Tensor, w: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The linear map of the kept columns nearest to all of them, by numpy's regression on the tokens."""
    solution, *_ = np.linalg.lstsq(x[:, kept].numpy(), (x @ w.T).numpy(), rcond=None)
    return torch.tensor(solution.T)


def linear_error(x: torch.Tensor, w: torch.Tensor, kept: torch.Tensor, new: torch.Tensor) -> float:
    return squared_error(x, w, kept, new, torch.zeros(len(w), dtype=torch.float64))


def test_without_a_bias_it_is_the_regression_without_an_intercept():
    x, w, kept = tokens(500, 12, seed=1), weight(7, 12), torch.tensor([0, 3, 4, 9, 11])
    new = least_squares_without_bias(Covariance.of(x), w, kept, ridge=EXACT)
    torch.testing.assert_close(new, regressed_through_zero(x, w, kept), rtol=1e-6, atol=0)


@often
@given(cases(), st.sampled_from(RIDGES))
def test_without_a_bias_it_is_ridge_regression_on_second_moments(case, ridge):
    """Against rows of the ridge below the tokens, and numpy's regression on both."""
    x, w, kept = case
    covariance = Covariance.of(x)
    root = (len(x) * ridge * covariance.var_D[kept]).sqrt()
    cut = [i for i in range(w.shape[1]) if i not in kept.tolist()]
    design = np.vstack([x[:, kept].numpy(), np.diag(root.numpy())])
    lost = (x[:, cut] @ w[:, cut].T).numpy()
    solution, *_ = np.linalg.lstsq(design, np.vstack([lost, np.zeros((len(kept), len(w)))]), rcond=None)
    new = least_squares_without_bias(covariance, w, kept, ridge=ridge)
    scale = float((x @ w.T).abs().max())
    # What the map gives is compared: with fewer tokens than columns its weights hang on the last digits.
    np.testing.assert_allclose(x[:, kept] @ (new - w[:, kept]).T, x[:, kept].numpy() @ solution, atol=1e-6 * scale)


@often
@given(cases(), st.sampled_from(RIDGES))
def test_without_a_bias_it_is_between_nothing_and_the_affine_map_on_the_calibration_tokens(case, ridge):
    x, w, kept = case
    covariance = Covariance.of(x)
    linear = linear_error(x, w, kept, least_squares_without_bias(covariance, w, kept, ridge=ridge))
    scale = float((x @ w.T).square().sum(1).mean())
    assert linear <= linear_error(x, w, kept, w[:, kept]) + 1e-9 * scale
    best = squared_error(x, w, kept, *map(torch.tensor, regressed(x, w, kept)))
    assert best <= linear + 1e-9 * scale


@often
@given(cases(), st.sampled_from(RIDGES))
def test_where_means_are_zero_a_bias_changes_nothing(case, ridge):
    x, w, kept = case
    centred = Covariance.of(torch.cat([x, -x]))
    affine, bias = least_squares(centred, w, kept, ridge=ridge)
    torch.testing.assert_close(least_squares_without_bias(centred, w, kept, ridge=ridge), affine, rtol=1e-7, atol=1e-9)
    assert float(bias.abs().max()) < 1e-9


def test_what_a_bias_is_worth_is_what_its_columns_cannot_say_of_a_constant():
    x, w, kept = tokens(500, 12, seed=1), weight(7, 12), torch.tensor([0, 3, 4, 9, 11])
    covariance = Covariance.of(x)
    affine, bias = least_squares(covariance, w, kept, ridge=EXACT)
    linear = least_squares_without_bias(covariance, w, kept, ridge=EXACT)
    solution, *_ = np.linalg.lstsq(x[:, kept].numpy(), np.ones(len(x)), rcond=None)
    unsaid = float((x[:, kept] @ torch.tensor(solution) - 1).square().mean())
    gap = linear_error(x, w, kept, linear) - squared_error(x, w, kept, affine, bias)
    assert gap == pytest.approx(float(bias.square().sum()) * unsaid, rel=1e-6)


@often
@given(st.integers(0, 50), st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
def test_second_moments_of_several_tasks_are_weighted_sums(seed, weights):
    """The general model's map is the weighted regression over all tasks' tokens."""
    parts = [tokens(30 + 10 * i, 8, seed + i) + i for i in range(3)]
    w, kept = weight(4, 8), torch.tensor([1, 2, 6, 7])
    pooled = pooled_covariance([Covariance.of(part) for part in parts], weights)
    scaled = [part * (share / len(part)) ** 0.5 for part, share in zip(parts, weights, strict=True)]
    expected = regressed_through_zero(torch.cat(scaled), w, kept)
    new = least_squares_without_bias(pooled, w, kept, ridge=EXACT)
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-9)


def test_without_a_bias_and_with_nothing_cut_it_is_the_identity():
    w = weight(4, 6)
    assert torch.equal(least_squares_without_bias(Covariance.of(tokens(30, 6, 0)), w, torch.arange(6), ridge=0.1), w)


@pytest.mark.parametrize("ridge", RIDGES)
def test_a_column_that_never_varies_stands_for_the_intercept(ridge):
    x = tokens(300, 9, seed=4)
    x[:, 3] = 250.0
    w, kept = weight(3, 9), torch.tensor([1, 3, 6])
    covariance = Covariance.of(x)
    with_it = least_squares_without_bias(covariance, w, kept, ridge=1e-9)
    affine = squared_error(x, w, kept, *least_squares(covariance, w, kept, ridge=1e-9))
    assert linear_error(x, w, kept, with_it) == pytest.approx(affine, rel=1e-6)
    silent = Covariance.of(torch.zeros(5, 8))
    new = least_squares_without_bias(silent, weight(3, 8), torch.arange(4), ridge=ridge)
    assert torch.equal(new, weight(3, 8)[:, :4])


@pytest.mark.parametrize("ridge", RIDGES)
def test_without_a_bias_a_columns_unit_does_not_matter(ridge):
    x, w, kept = tokens(60, 8, seed=6), weight(3, 8), torch.tensor([1, 2, 6])
    x[:, 2] = -3.0
    unit = torch.logspace(-5, 4, 8, dtype=torch.float64)
    new = least_squares_without_bias(Covariance.of(x), w, kept, ridge=ridge)
    scaled = least_squares_without_bias(Covariance.of(x * unit), w / unit, kept, ridge=ridge)
    torch.testing.assert_close(scaled * unit[kept], new, rtol=1e-6, atol=0)


# --- scores of units -------------------------------------------------------------------------------------------------


def test_a_blocks_wifv_is_its_error_with_the_mean_for_it():
    x, w = tokens(300, 12, seed=3), weight(5, 12)
    total = float((x @ w.T).var(0, correction=0).sum())
    scores = block_wifv(Covariance.of(x), w, block=3, ridge=1.0)
    for u in range(4):
        at = slice(3 * u, 3 * u + 3)
        cut = x[:, at] @ w[:, at].T
        assert float(scores[u]) == pytest.approx(float(cut.var(0, correction=0).sum()) / total)


def test_single_columns_have_the_wifv_of_their_variance():
    x, w = tokens(300, 12, seed=3), weight(5, 12)
    scores = block_wifv(Covariance.of(x), w, block=1, ridge=1.0)
    diagonal = x.var(0, correction=0) * w.square().sum(0)
    torch.testing.assert_close(scores / scores.sum(), diagonal / diagonal.sum())


def least_error(x: torch.Tensor, w: torch.Tensor, kept: list[int]) -> float:
    if not kept:
        return float((x @ w.T).var(0, correction=0).sum())
    new, bias = regressed(x, w, torch.tensor(kept))
    return squared_error(x, w, torch.tensor(kept), torch.tensor(new), torch.tensor(bias))


@pytest.mark.parametrize("block", [1, 2])
def test_obs_takes_out_the_block_that_costs_least_after_the_best_repair_again_and_again(block):
    x, w = tokens(400, 10, seed=9), weight(4, 10)
    scores = obs(Covariance.of(x), w, block=block, ridge=EXACT)
    units = [list(range(block * u, block * u + block)) for u in range(10 // block)]
    left, order, reached, total = list(range(len(units))), [], 0.0, least_error(x, w, [])
    while left:
        now = least_error(x, w, [i for u in left for i in units[u]])
        added = {u: least_error(x, w, [i for v in left if v != u for i in units[v]]) - now for u in left}
        best = min(left, key=added.__getitem__)
        reached = max(reached, added[best] / total)
        assert float(scores[best]) == pytest.approx(reached, rel=1e-4, abs=1e-9)
        order.append(best)
        left.remove(best)
    assert scores.argsort().tolist() == order


def least_linear_error(x: torch.Tensor, w: torch.Tensor, kept: list[int]) -> float:
    if not kept:
        return float((x @ w.T).square().sum(1).mean())
    return linear_error(x, w, torch.tensor(kept), regressed_through_zero(x, w, torch.tensor(kept)))


@pytest.mark.parametrize("block", [1, 2])
def test_obs_without_a_bias_is_the_error_that_linear_maps_leave_step_by_step(block):
    x, w = tokens(400, 10, seed=9), weight(4, 10)
    scores = obs(Covariance.of(x), w, block=block, ridge=EXACT, has_bias=False)
    units = [list(range(block * u, block * u + block)) for u in range(10 // block)]
    left, reached, total = list(range(len(units))), 0.0, least_linear_error(x, w, [])
    for u in scores.argsort().tolist():
        now = least_linear_error(x, w, [i for v in left for i in units[v]])
        added = {v: least_linear_error(x, w, [i for o in left if o != v for i in units[o]]) - now for v in left}
        assert min(left, key=added.__getitem__) == u
        reached = max(reached, added[u] / total)
        assert float(scores[u]) == pytest.approx(reached, rel=1e-4, abs=1e-9)
        left.remove(u)


def test_obs_is_the_same_without_a_bias_where_means_are_zero():
    x, w = tokens(200, 12, seed=3), weight(5, 12)
    centred = Covariance.of(torch.cat([x, -x]))
    without = obs(centred, w, block=2, ridge=0.01, has_bias=False)
    torch.testing.assert_close(without, obs(centred, w, block=2, ridge=0.01), rtol=1e-7, atol=1e-12)


def test_obs_rises_strictly_and_takes_many_columns_in_steps():
    x = tokens(600, 200, seed=1)
    scores = obs(Covariance.of(x), weight(6, 200), block=1, ridge=1e-3)
    assert len(scores.unique()) == 200 and (scores > 0).all()


def test_obs_spares_what_nothing_else_can_say():
    """Two columns that are alike and heavy: one goes first of all, the other then stays."""
    x, w = tokens(400, 8, seed=9), weight(4, 8)
    x[:, 5] = 3 * x[:, 2] + 1
    w[:, [2, 5]] *= 50
    order = obs(Covariance.of(x), w, block=1, ridge=EXACT).argsort().tolist()
    assert {2, 5} & {order[0]} and {2, 5} & {order[-1]}
    assert block_wifv(Covariance.of(x), w, block=1, ridge=EXACT).argsort().tolist()[-2:] in ([2, 5], [5, 2])


@pytest.mark.parametrize("name", UNIT_SCORES)
def test_shares_of_the_outputs_variance_do_not_know_the_models_scale(name):
    x, w = tokens(300, 12, seed=3), weight(5, 12)
    once = UNIT_SCORES[name](Covariance.of(x), w, block=2, ridge=0.01)
    again = UNIT_SCORES[name](Covariance.of(x * 7), w * 3, block=2, ridge=0.01)
    torch.testing.assert_close(again, once)


def test_a_ridge_raises_each_columns_own_variance():
    covariance = Covariance.of(tokens(50, 6, seed=0)).covariance_DD
    raised = ridged(covariance, 0.25)
    torch.testing.assert_close(raised.diagonal(), 1.25 * covariance.diagonal(), rtol=1e-6, atol=1e-6)
    assert torch.equal(raised - torch.diag(raised.diagonal()), covariance - torch.diag(covariance.diagonal()))
