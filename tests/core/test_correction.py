"""Which part of a correction is taken, against errors that numpy counts token by token."""

import numpy as np
import pytest
import torch

from seap_ray.core.correction import CORRECTION_RIDGES, choose_correction
from seap_ray.core.moments import Covariance
from seap_ray.core.reconstruction import error_map

N_INPUTS = 6


def tokens(n: int, seed: int, signal: float) -> np.ndarray:
    """Inputs with means, and behind them errors that follow from the inputs by so much, beside noise."""
    generator = np.random.default_rng(seed)
    map_SO = np.random.default_rng(0).normal(size=(N_INPUTS, 4))
    inputs = generator.normal(size=(n, N_INPUTS)) + np.arange(N_INPUTS) / 3
    return np.concatenate([inputs, signal * inputs @ map_SO + generator.normal(size=(n, 4)) + 0.5], axis=1)


def covariance(joint: np.ndarray) -> Covariance:
    return Covariance.of(torch.from_numpy(joint))


@pytest.mark.parametrize("has_intercept", [True, False])
@pytest.mark.parametrize("signal", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [12, 40, 4000])
def test_no_other_ridge_and_share_leave_less_error_on_the_held_out_tokens(n, signal, has_intercept):
    fitted = covariance(tokens(n, 1, signal))
    held_out = tokens(200, 2, signal)
    ridge, share = choose_correction(fitted, covariance(held_out), N_INPUTS, has_intercept=has_intercept)

    def error_of(ridge: float, share: float) -> float:
        weight, bias = error_map(fitted, N_INPUTS, ridge=ridge, has_intercept=has_intercept)
        mapped = held_out[:, :N_INPUTS] @ weight.numpy().T + bias.numpy()
        return float(np.square(held_out[:, N_INPUTS:] - share * mapped).sum(1).mean())

    best = min(error_of(ridge, share) for ridge in CORRECTION_RIDGES for share in np.linspace(0, 1, 201))
    assert error_of(ridge, share) <= best + 1e-9
    assert 0 <= share <= 1


def test_noise_corrects_little_and_many_tokens_of_a_plain_map_nearly_all():
    def share_of(n: int, signal: float, seed: int) -> float:
        joint = tokens(n, seed, signal)
        other = tokens(2000, 99, signal)
        # The mean of the errors is known from few tokens; what follows from inputs is not.
        joint[:, N_INPUTS:] -= 0.5
        other[:, N_INPUTS:] -= 0.5
        return choose_correction(covariance(joint), covariance(other), N_INPUTS)[1]

    assert max(share_of(12, 0.0, seed) for seed in range(5)) < 0.2
    assert share_of(4000, 1.0, 1) > 0.99


def test_an_error_that_is_zero_needs_nothing():
    joint = tokens(50, 1, 0.0)
    joint[:, N_INPUTS:] = 0
    assert choose_correction(covariance(joint), covariance(joint), N_INPUTS)[1] == 0
