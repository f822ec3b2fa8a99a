"""Scores against hand-written numpy, and the output errors that two of them stand for."""

import os
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seap_ray.config import Score
from seap_ray.core.compensation import mean_bias
from seap_ray.core.moments import SITES, Moments
from seap_ray.core.reconstruction import UNIT_SCORES
from seap_ray.core.scores import (
    SCORES,
    Norms,
    energy,
    head_scores,
    normalised,
    random_score,
    shrunk,
    standardised,
    wifv,
)
from tests.support import ROOT

EXPECTED = {
    "wifv": lambda x, w: x.var(0) * np.linalg.norm(w, axis=0) ** 2,
    "wifn": lambda x, w: np.mean(x * x, axis=0) * np.linalg.norm(w, ord=1, axis=0),
    "wanda_sp": lambda x, w: np.sqrt(np.mean(x * x, axis=0)) * np.abs(w).sum(0),
    "energy": lambda x, w: np.mean(x * x, axis=0) * (w * w).sum(0),
    "official_wifn": lambda x, w: np.sqrt(np.mean(x * x, axis=0)) * (w * w).sum(0),
    "magnitude": lambda x, w: np.linalg.norm(w, axis=0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_score_equals_numpy(name):
    rng = np.random.default_rng(0)
    x_ND = 2.0 * rng.standard_normal((40, 9)) + rng.standard_normal(9)
    weight_OD = rng.standard_normal((7, 9))
    score_D = SCORES[name](Moments.of(torch.from_numpy(x_ND)), Norms.of(torch.from_numpy(weight_OD)))
    np.testing.assert_allclose(score_D, EXPECTED[name](x_ND, weight_OD), rtol=1e-12)


def test_scores_of_the_config_are_the_scores_there_are():
    assert set(SCORES) == set(EXPECTED)
    assert {*SCORES, *UNIT_SCORES, "random", "reap"} == set(get_args(Score))


def test_random_scores_are_uniform_and_each_sites_own():
    scores = {
        (seed, layer, site): random_score(4000, seed, layer=layer, site=site)
        for seed in (0, 1, 11)
        for layer in (0, 1, 10)
        for site in SITES
    }
    rank = np.arange(1, 4001) / 4000
    for score_D in scores.values():
        assert score_D.dtype == torch.float64 and 0 < score_D.min() and score_D.max() < 1
        # Kolmogorov and Smirnov: beyond 0.031 in one of a thousand draws of 4,000 uniform numbers.
        assert np.abs(np.sort(score_D.numpy()) - rank).max() < 0.031
    correlation = np.corrcoef(torch.stack(list(scores.values())).numpy()) - np.eye(len(scores))
    assert np.abs(correlation).max() < 0.07, "no two alike"


def test_random_scores_are_the_same_in_every_process():
    code = "from seap_ray.core.scores import random_score; print(random_score(5, 7, layer=3, site='mlp').tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == str(random_score(5, 7, layer=3, site="mlp").tolist())


def test_heads_sum_their_columns():
    score_D = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert head_scores(score_D, 2).tolist() == [3.0, 12.0, 48.0]
    assert head_scores(score_D, 3).tolist() == [7.0, 56.0]


def test_norms_of_float16_weights_do_not_tie():
    # Rounded to float16, norms of 4,096 columns tie by the hundred, and underflow where weights are small.
    weight_OD = (0.02 * torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))).half()
    norms = Norms.of(weight_OD)
    exact = weight_OD.numpy().astype(np.float64)
    assert norms.l1_D.dtype == norms.l2_squared_D.dtype == torch.float64
    assert weight_OD.square().sum(0).unique().numel() < 1000, "or these weights could not show the fault"
    assert norms.l2_squared_D.unique().numel() > 4000
    np.testing.assert_allclose(norms.l2_squared_D, (exact * exact).sum(0), rtol=1e-12)
    np.testing.assert_allclose(norms.l1_D, np.abs(exact).sum(0), rtol=1e-12)
    tiny = torch.full((64, 1), 1e-5, dtype=torch.float16)
    np.testing.assert_allclose(Norms.of(tiny).l2_squared_D, 64 * float(tiny[0, 0]) ** 2, rtol=1e-12)


def squared_error(x_NP, weight_OP, bias_O):
    """Mean over tokens of || W_P x_P - b ||^2."""
    return float((x_NP @ weight_OP.T - bias_O).square().sum(1).mean())


def uncorrelated(n_columns):
    """64 tokens whose columns have their own means and variances and are exactly uncorrelated: Hadamard's matrix."""
    matrix = np.ones((1, 1))
    while len(matrix) < 64:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    columns = torch.from_numpy(matrix[:, 1 : n_columns + 1])
    return torch.arange(1.0, n_columns + 1) * columns + torch.linspace(-3, 3, n_columns, dtype=torch.float64)


def orthogonal_columns(n_out, n_columns):
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(n_out, n_columns, generator=generator, dtype=torch.float64)).Q
    return q * torch.linspace(0.5, 2, n_columns, dtype=torch.float64)


def test_wifv_sums_to_the_error_that_the_best_bias_leaves_when_columns_are_uncorrelated():
    x_ND = uncorrelated(10)
    weight_OD = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments, kept, cut = Moments.of(x_ND), torch.tensor([0, 3, 4, 8]), [1, 2, 5, 6, 7, 9]
    bias_O = mean_bias(weight_OD, moments.mean_D, kept, None)
    error = squared_error(x_ND[:, cut], weight_OD[:, cut], bias_O)
    assert error == pytest.approx(float(wifv(moments, Norms.of(weight_OD))[cut].sum()), rel=1e-12)
    for direction in torch.eye(6, dtype=torch.float64):
        assert squared_error(x_ND[:, cut], weight_OD[:, cut], bias_O + 0.01 * direction) > error
        assert squared_error(x_ND[:, cut], weight_OD[:, cut], bias_O - 0.01 * direction) > error


def test_wifv_and_energy_are_the_errors_with_and_without_a_bias_when_weights_are_orthogonal():
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    x_ND = torch.randn(50, 10, generator=generator, dtype=torch.float64) @ mixing + 2.0
    weight_OD = orthogonal_columns(16, 10)
    moments, norms, kept, cut = Moments.of(x_ND), Norms.of(weight_OD), torch.tensor([0, 1, 2]), list(range(3, 10))
    bias_O = mean_bias(weight_OD, moments.mean_D, kept, None)
    with_bias = squared_error(x_ND[:, cut], weight_OD[:, cut], bias_O)
    without = squared_error(x_ND[:, cut], weight_OD[:, cut], torch.zeros(16, dtype=torch.float64))
    assert with_bias == pytest.approx(float(wifv(moments, norms)[cut].sum()), rel=1e-12)
    assert without == pytest.approx(float(energy(moments, norms)[cut].sum()), rel=1e-12)
    assert with_bias < 0.9 * without


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_normalised_scores_average_to_one_or_are_all_zero(values):
    result = normalised(torch.tensor(values, dtype=torch.float64))
    assert float(result.mean()) == pytest.approx(1.0 if sum(values) > 0 else 0.0)
    assert torch.isfinite(result).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
@settings(max_examples=50, deadline=None)
def test_standardised_scores_have_mean_zero_and_deviation_one_or_are_all_zero(values):
    result = standardised(torch.tensor(values, dtype=torch.float64)).numpy()
    if np.ptp(values) == 0:
        assert np.abs(result).max() <= 1
    elif np.ptp(values) > max(1e-6 * np.abs(values).max(), 1e-100):  # squares of less are zero in float64
        assert result.mean() == pytest.approx(0, abs=1e-6)
        assert result.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(result).all()
    assert not standardised(torch.ones(5)).any()


# --- mixtures of experts ---------------------------------------------------------------------------------------------


def experts(*counts: int) -> list[Moments]:
    generator = torch.Generator().manual_seed(sum(counts))
    return [
        Moments.of(3 * torch.rand(n, 40, generator=generator, dtype=torch.float64) + i) for i, n in enumerate(counts)
    ]


def test_an_expert_with_many_tokens_is_believed_and_one_without_any_is_ranked_by_its_weights():
    many, few, none = shrunk(experts(100_000, 8, 0))
    own = experts(100_000, 8, 0)
    torch.testing.assert_close(many.var_D, own[0].var_D, rtol=1e-2, atol=0)
    torch.testing.assert_close(many.square_D, own[0].square_D, rtol=1e-2, atol=0)
    assert none.var_D.std() == 0 and none.square_D.std() < 1e-12, "every column is the same"
    spread, noise = few.var_D.std() / few.var_D.mean(), own[1].var_D.std() / own[1].var_D.mean()
    assert spread < 0.2 * noise
    norms = Norms.of(torch.rand(5, 40, generator=torch.Generator().manual_seed(1)))
    for name in ("wifv", "wifn", "wanda_sp", "energy", "official_wifn"):
        by_weights = norms.l1_D if name in ("wifn", "wanda_sp") else norms.l2_squared_D
        assert torch.equal(SCORES[name](none, norms).argsort(), by_weights.argsort())


def test_what_an_expert_is_believed_of_is_linear_in_its_variance_and_mean_square():
    some = experts(64, 640)
    half, _ = shrunk(some)
    total = 64 + 640
    usual_var = sum(moments.count * moments.var_D.mean() for moments in some) / total
    usual_square = sum(moments.count * moments.square_D.mean() for moments in some) / total
    torch.testing.assert_close(half.var_D, (some[0].var_D + usual_var) / 2)
    torch.testing.assert_close(half.square_D, (some[0].square_D + usual_square) / 2)


def test_experts_that_saw_nothing_at_all_have_scores_that_are_numbers():
    for moments in shrunk(experts(0, 0)):
        assert moments.count == 1
        assert torch.isfinite(moments.var_D).all() and torch.isfinite(moments.square_D).all()
