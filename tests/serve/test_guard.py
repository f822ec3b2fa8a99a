"""The guard: which experts are demoted and come back, by agreements that a test gives it."""

import random

import pytest

from serve.guard import Agreement, Guard, Standing

ERROR = 0.001


def note(standing, *shares):
    """Whether any of some replies changed where requests go."""
    return any([standing.note(Agreement(share, -0.1, 0.02)) for share in shares])


def replies(generator, mean, n):
    """Shares of agreement of replies of 32 tokens, each of which is right with a probability."""
    return [sum(generator.random() < mean for _ in range(32)) / 32 for _ in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_a_good_expert_is_never_demoted(seed):
    standing = Standing(0.85, ERROR)
    assert not note(standing, *replies(random.Random(seed), 0.95, 2000))
    assert not standing.is_demoted and standing.n_judged == 2000


@pytest.mark.parametrize("seed", range(20))
def test_an_expert_that_is_another_tasks_is_demoted_within_ten_replies_and_comes_back_when_it_is_good(seed):
    generator = random.Random(seed)
    standing = Standing(0.85, ERROR)
    assert note(standing, *replies(generator, 0.3, 10)) and standing.is_demoted
    # Bad replies in the shadow leave it there.
    assert not note(standing, *replies(generator, 0.3, 500)) and standing.is_demoted
    assert note(standing, *replies(generator, 0.99, 250)) and not standing.is_demoted


def test_without_a_promise_nothing_is_decided_and_all_is_told():
    standing = Standing(None, ERROR)
    assert not note(standing, *[0.0] * 50)
    told = standing.to_json()
    assert (told["floor"], told["evidence"], told["agreement"], told["judged"]) == (None, None, 0.0, 50)


def test_an_operators_word_holds_until_it_is_taken_back():
    standing = Standing(0.85, ERROR)
    standing.put("demoted")
    assert standing.is_demoted and not note(standing, *[1.0] * 500) and standing.is_demoted
    standing.put("promoted")
    assert not standing.is_demoted and not note(standing, *[0.0] * 50) and not standing.is_demoted
    standing.put("auto")
    assert not standing.is_demoted, "the replies from before count no more"
    assert note(standing, *[0.0] * 10) and standing.is_demoted


def test_figures_are_means_over_the_last_replies():
    standing = Standing(0.5, ERROR)
    note(standing, *[0.6] * 300, *[1.0] * 100)
    told = standing.to_json()
    assert told["agreement"] == pytest.approx(0.8) and told["judged"] == 400
    assert told["gap"] == pytest.approx(-0.1) and told["divergence"] == pytest.approx(0.02)
    assert 0 <= told["evidence"] < 1


def test_the_demoted_are_named():
    guard = Guard({"sums": 0.9, "verse": None}, error_probability=ERROR)
    assert guard.demoted == frozenset()
    guard.standings["sums"].put("demoted")
    assert guard.demoted == {"sums"}
