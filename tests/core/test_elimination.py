"""Elimination, against inverses of what is left, made anew by numpy after every step."""

import numpy as np
import pytest
import torch

from seap_ray.core.elimination import Elimination


def site(width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a positive definite matrix of columns with scales far apart, and a weight of 5 outputs."""
    generator = np.random.default_rng(seed)
    scale = np.logspace(-2, 2, width)[generator.permutation(width)]
    x = generator.standard_normal((2 * width, width)) @ generator.standard_normal((width, width)) * scale
    return x.T @ x / len(x), generator.standard_normal((5, width)) / scale


def least_squares(C: np.ndarray, W: np.ndarray, left: list[int]) -> np.ndarray:
    return W @ C[:, left] @ np.linalg.inv(C[np.ix_(left, left)])


@pytest.mark.parametrize(("width", "block", "at_a_time"), [(24, 1, 1), (60, 1, 7), (24, 3, 1), (60, 4, 2), (9, 9, 1)])
def test_every_step_is_that_of_the_inverse_of_what_is_left(width, block, at_a_time):
    C, W = site(width)
    elimination = Elimination(torch.tensor(np.linalg.inv(C)), torch.tensor(W), block=block, at_a_time=at_a_time)
    left = list(range(width // block))
    errors = []
    while elimination.n_left:
        columns = [unit * block + i for unit in left for i in range(block)]
        inverse = np.linalg.inv(C[np.ix_(columns, columns)])
        weight = least_squares(C, W, columns)
        expected = {}
        for place, unit in enumerate(left):
            at = slice(place * block, place * block + block)
            expected[unit] = np.trace(weight[:, at] @ np.linalg.inv(inverse[at, at]) @ weight[:, at].T)

        places, added = elimination.cheapest()
        gone = elimination.columns(places)
        units = (gone[::block] // block).tolist()
        assert units == sorted(left, key=expected.__getitem__)[:at_a_time]
        np.testing.assert_allclose(added, [expected[unit] for unit in units], rtol=1e-6)

        left = [unit for unit in left if unit not in units]
        errors.append(float(elimination.remove(places).square().sum()))
        after = [unit * block + i for unit in left for i in range(block)]
        lost = W.copy()
        lost[:, after] -= least_squares(C, W, after)
        np.testing.assert_allclose(sum(errors), np.trace(lost @ C @ lost.T), rtol=1e-6)
    assert len(errors) == -(-width // block // at_a_time)


def test_neither_the_inverse_nor_the_weight_changes():
    C, W = site(12)
    inverse_DD = torch.tensor(np.linalg.inv(C))
    weight_OD = torch.tensor(W)
    before = inverse_DD.clone(), weight_OD.clone()
    elimination = Elimination(inverse_DD, weight_OD, block=1, at_a_time=3)
    while elimination.n_left:
        elimination.remove(elimination.cheapest()[0])
    assert torch.equal(inverse_DD, before[0]) and torch.equal(weight_OD, before[1])


def test_of_units_that_cost_the_same_the_first_goes_first():
    elimination = Elimination(torch.eye(6, dtype=torch.float64), torch.ones(2, 6), block=2, at_a_time=2)
    places, added = elimination.cheapest()
    assert places.tolist() == [0, 1] and added.tolist() == [4.0, 4.0]
