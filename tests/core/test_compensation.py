"""Compensation: what each way makes of an output module, and the bias that stands for what is cut."""

from typing import get_args

import numpy as np
import pytest
import torch

from seap_ray.config.schema import FROM_COVARIANCES, Compensation
from seap_ray.core.compensation import COMPENSATIONS, OutputModule, compensation_of, mean_bias
from seap_ray.core.moments import Covariance, Moments
from seap_ray.core.reconstruction import least_squares, least_squares_without_bias

KEY = (0, "attn")
KEPT = torch.tensor([0, 2, 3, 5])


class Covariances(dict):
    """Covariances by (layer, site), each with one ridge."""

    def ridge_of(self, key):
        return 0.1


def activations():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2


def module(with_bias, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    bias_O = torch.randn(4, generator=generator).to(dtype) if with_bias else None
    return OutputModule(torch.randn(4, 6, generator=generator).to(dtype), bias_O, KEPT, KEY)


def test_every_way_of_the_configuration_is_there_and_says_what_it_needs():
    named = set(get_args(Compensation))
    assert set(COMPENSATIONS) == named | {"least_squares_without_bias"}
    assert all(way.name == name for name, way in COMPENSATIONS.items())
    needs_covariances = {name for name, way in COMPENSATIONS.items() if way.required == "covariance"}
    assert needs_covariances & named == set(FROM_COVARIANCES) & named
    assert needs_covariances - named == {"least_squares_without_bias"}
    for way in COMPENSATIONS.values():
        assert way.adds_biases == ("bias" in way.replaces)
        assert bool(way.replaces) == (way.required is not None)
        assert way.memory_factor == (way.required == "covariance")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", COMPENSATIONS)
def test_a_way_makes_the_tensors_that_it_replaces_in_the_dtype_of_the_weight(name, with_bias):
    way, cut = COMPENSATIONS[name], module(with_bias, torch.bfloat16)
    statistics = Covariances({KEY: Covariance.of(activations())})
    repaired = way.repaired(cut, statistics)
    assert set(repaired) == set(way.replaces)
    shapes = {"weight": (4, 4), "bias": (4,)}
    for kind, tensor in repaired.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, shapes[kind])


@pytest.mark.parametrize("with_bias", [False, True])
def test_mean_and_least_squares_add_to_the_bias_that_is_there(with_bias):
    cut, covariance = module(with_bias), Covariance.of(activations())
    moments = Moments.of(activations())
    expected = mean_bias(cut.weight_OD, moments.mean_D, KEPT, cut.bias_O)
    assert torch.equal(COMPENSATIONS["mean"].repaired(cut, {KEY: moments})["bias"], expected)

    weight_OS, added_O = least_squares(covariance, cut.weight_OD, KEPT, ridge=0.1)
    bias_O = added_O + cut.bias_O.double() if with_bias else added_O
    repaired = COMPENSATIONS["least_squares"].repaired(cut, Covariances({KEY: covariance}))
    assert torch.equal(repaired["weight"], weight_OS.float()) and torch.equal(repaired["bias"], bias_O.float())


@pytest.mark.parametrize("with_bias", [False, True])
def test_least_squares_without_a_bias_leaves_the_one_that_is_there(with_bias):
    cut, covariance = module(with_bias), Covariance.of(activations())
    repaired = COMPENSATIONS["least_squares_without_bias"].repaired(cut, Covariances({KEY: covariance}))
    expected = least_squares_without_bias(covariance, cut.weight_OD, KEPT, ridge=0.1)
    assert torch.equal(repaired["weight"], expected.float()) and set(repaired) == {"weight"}


def test_the_configurations_names_stand_for_ways_with_and_without_a_bias():
    for name in get_args(Compensation):
        assert compensation_of(name, has_bias=True) is COMPENSATIONS[name]
    assert compensation_of("none", has_bias=False) is COMPENSATIONS["none"]
    assert compensation_of("least_squares", has_bias=False) is COMPENSATIONS["least_squares_without_bias"]
    with pytest.raises(ValueError, match="mean is a bias"):
        compensation_of("mean", has_bias=False)


def test_a_way_without_the_statistics_that_it_needs_says_so():
    with pytest.raises(ValueError, match="needs moments"):
        COMPENSATIONS["mean"].repaired(module(False), None)
    for statistics in (None, {KEY: Moments.of(activations())}):
        for name in ("least_squares", "least_squares_without_bias"):
            with pytest.raises(ValueError, match="needs covariances"):
                COMPENSATIONS[name].repaired(module(False), statistics)


# --- the bias of the mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_mean_bias_equals_numpy_and_adds_to_the_bias_that_is_there(with_bias, dtype, rtol):
    generator = torch.Generator().manual_seed(0)
    weight_OD = torch.randn(6, 9, generator=generator, dtype=torch.float64).to(dtype)
    mean_D = 10 * torch.randn(9, generator=generator, dtype=torch.float64)
    bias_O = torch.randn(6, generator=generator, dtype=torch.float64).to(dtype) if with_bias else None
    cut = [1, 2, 6, 8]
    expected = weight_OD.double().numpy()[:, cut] @ mean_D.numpy()[cut]
    if bias_O is not None:
        expected = expected + bias_O.double().numpy()
    result = mean_bias(weight_OD, mean_D, torch.tensor([0, 3, 4, 5, 7]), bias_O)
    assert result.dtype == dtype
    np.testing.assert_allclose(result.double(), expected, rtol=rtol)


def test_mean_bias_keeps_what_float32_sums_would_lose():
    weight_OD = torch.tensor([[1.0, 1.0, 1.0]])
    mean_D = torch.tensor([1e8, 0.25, -1e8], dtype=torch.float64)
    assert mean_bias(weight_OD, mean_D, torch.tensor([], dtype=torch.int64), None).tolist() == [0.25]


def test_nothing_cut_needs_no_bias():
    weight_OD, mean_D = torch.ones(2, 3), torch.ones(3, dtype=torch.float64)
    assert mean_bias(weight_OD, mean_D, torch.arange(3), None).tolist() == [0.0, 0.0]
    assert mean_bias(weight_OD, mean_D, torch.arange(3), torch.tensor([4.0, 5.0])).tolist() == [4.0, 5.0]
