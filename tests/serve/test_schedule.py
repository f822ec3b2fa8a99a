"""Whose turn at an engine it is: played requests, a played clock, no engine."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.schedule import Admit, Limits, QueueFullError, Schedule, Swap

EXPERTS = ("general", "sums", "verse")


def schedule(**limits):
    return Schedule(EXPERTS, "general", Limits(**{"running": 4, "waiting": 100, "max_wait_s": 2.0} | limits))


def steps(of, now=0.0, time_slice_s=1.0):
    """What it asks for, until it asks for nothing or a swap."""
    taken = []
    while isinstance(step := of.next(now, time_slice_s), Admit):
        taken.append(step.request)
    return [*taken, step]


def test_requests_for_the_expert_in_the_engine_begin_at_once_up_to_the_limit():
    of = schedule()
    for i in range(6):
        of.offer(i, "general", 0)
    assert steps(of) == [0, 1, 2, 3, None]
    of.leave(2)
    assert steps(of) == [4, None] and of.waiting["general"] == 1


def test_another_expert_comes_in_when_nobody_waits_for_the_one_in_the_engine_and_what_runs_has_ended():
    of = schedule()
    of.offer("a", "general", 0)
    of.offer("b", "sums", 0)
    assert steps(of) == ["a", None]
    of.leave("a")
    assert steps(of) == [Swap("sums")]
    of.swapped("sums", 0)
    assert steps(of) == ["b", None]


def test_the_one_in_the_engine_is_served_first_until_another_has_waited_for_the_bound():
    of = schedule()
    of.offer("b", "sums", 0)
    for i in range(3):
        of.offer(i, "general", 0)
    assert steps(of, now=1.9) == [0, 1, 2, None]
    of.offer(3, "general", 2)
    assert steps(of, now=2) == [None]  # the turn is over, though there is room
    for i in range(3):
        of.leave(i)
    assert steps(of, now=2.5) == [Swap("sums")]


def test_a_turn_lasts_its_time_slice_whoever_waits():
    of = schedule()
    of.swapped("sums", 10)
    of.offer("b", "verse", 0)
    of.offer("a", "sums", 10)
    assert steps(of, now=12, time_slice_s=5) == ["a", None]
    of.offer("c", "sums", 15)
    assert steps(of, now=15, time_slice_s=5) == [None]


def test_the_next_turn_is_that_of_who_has_waited_longest_by_weight():
    for weights, first in (({}, "sums"), ({"verse": 3.0}, "verse")):
        of = schedule(weights=weights)
        of.offer("a", "sums", 0)
        of.offer("b", "verse", 1)
        assert steps(of, now=2) == [Swap(first)]


def test_more_than_may_wait_are_refused():
    of = schedule(running=2, waiting=1)
    for i in range(3):  # two run as soon as they can, one waits
        of.offer(i, "general", 0)
    with pytest.raises(QueueFullError):
        of.offer(3, "general", 0)
    of.offer("b", "sums", 0)
    with pytest.raises(QueueFullError):
        of.offer("c", "sums", 0)


def test_who_leaves_while_waiting_is_not_served_and_who_is_dropped_is_named():
    of = schedule()
    for i in range(3):
        of.offer(i, "sums", 0)
    of.leave(1)
    assert of.drop("sums") == [0, 2] and steps(of) == [None]


REQUESTS = st.lists(
    st.tuples(st.floats(0, 20), st.sampled_from(EXPERTS), st.floats(0.01, 2.0), st.booleans()), max_size=40
)


def play(requests, *, running, max_wait_s, time_slice_s, swap_s, patience_s=3.0):
    """Let requests (time, expert, length, whether its client leaves early) come, run and end; what happened."""
    of, now, told = schedule(running=running, max_wait_s=max_wait_s), 0.0, []
    coming = sorted((at, i) for i, (at, *_) in enumerate(requests))
    ends: dict[int, float] = {}
    leaving = {i: at + patience_s for i, (at, _, _, leaves) in enumerate(requests) if leaves}
    while True:
        while coming and coming[0][0] <= now:
            of.offer(coming[0][1], requests[coming[0][1]][1], coming[0][0])
            coming.pop(0)
        for i in {i for of_whom in (ends, leaving) for i, at in of_whom.items() if at <= now}:
            of.leave(i)
            ends.pop(i, None)
            leaving.pop(i, None)
        step = of.next(now, time_slice_s)
        if isinstance(step, Admit):
            told.append(("begins", now, step.request, of.resident))
            ends[step.request] = now + requests[step.request][2]
            assert len(ends) <= running
        elif isinstance(step, Swap):
            assert not ends, "a swap while a request runs"
            now += swap_s
            of.swapped(step.expert, now)
            told.append(("swap", now, None, step.expert))
        else:
            later = [at for at, _ in coming[:1]] + list(ends.values()) + list(leaving.values())
            if not later:
                return told, now
            now = max(now, min(later))


SETTINGS = {"running": st.integers(1, 4), "max_wait_s": st.floats(0, 3), "time_slice_s": st.floats(0, 2)}


@given(REQUESTS, st.fixed_dictionaries(SETTINGS), st.floats(0, 0.5))
def test_everyone_who_stays_is_served_once_and_by_their_own_expert(requests, settings, swap_s):
    told, _ = play(requests, **settings, swap_s=swap_s)
    begun = [(i, expert) for kind, _, i, expert in told if kind == "begins"]
    assert all(requests[i][1] == expert for i, expert in begun)
    assert len({i for i, _ in begun}) == len(begun)
    assert {i for i, (*_, leaves) in enumerate(requests) if not leaves} <= {i for i, _ in begun}


@given(REQUESTS, st.fixed_dictionaries(SETTINGS), st.floats(0, 0.5))
def test_beyond_the_bound_who_came_first_is_first(requests, settings, swap_s):
    """Nobody is overtaken by who came after they had waited for the bound, and everyone else's turn had passed."""
    told, _ = play([(*request[:3], False) for request in requests], **settings, swap_s=swap_s)
    longest = max((length for _, _, length, _ in requests), default=0)
    # A turn of each other expert may stand between, each with its slice, its last requests and its swap.
    allowed = settings["max_wait_s"] + len(EXPERTS) * (settings["time_slice_s"] + 2 * longest + swap_s)
    begun = [(at, i) for kind, at, i, _ in told if kind == "begins"]
    for at, i in begun:
        overtaking = [j for before, j in begun if before < at and requests[j][0] > requests[i][0] + allowed]
        assert not overtaking, (i, overtaking)


@given(REQUESTS, st.fixed_dictionaries(SETTINGS))
def test_swaps_are_bounded_each_is_for_someone_who_is_served(requests, settings):
    told, _ = play([(*request[:3], False) for request in requests], **settings, swap_s=0.1)
    served = defaultdict(int)
    turn = None
    for kind, _, _, expert in told:
        if kind == "swap":
            assert turn is None or served[turn], "a turn in which nobody was served"
            turn = (expert, len(served))
        elif turn:
            served[turn] += 1
    assert sum(kind == "swap" for kind, *_ in told) <= len(requests)


def test_one_expert_under_endless_load_does_not_starve_the_others():
    """A new request for the one in the engine every 20 ms, one for another: it waits for the bound, and what ran."""
    busy = [(i * 0.02, "general", 0.05, False) for i in range(500)]
    told, _ = play([*busy, (1.0, "verse", 0.05, False)], running=4, max_wait_s=2.0, time_slice_s=1.0, swap_s=0.1)
    (began,) = [at for kind, at, i, _ in told if kind == "begins" and i == 500]
    assert 3.0 <= began <= 3.0 + 0.05 + 0.1 + 1e-6
