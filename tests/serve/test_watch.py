"""What the watch believes, with Serve's status played by the test."""

import time
from types import SimpleNamespace

import pytest

from serve import watch as module
from serve.watch import Watch

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning")


@pytest.fixture
def states(monkeypatch):
    """States of the replicas of each deployment, or an exception that Serve raises; counts how often it is asked."""
    states = {"g": {"RUNNING": 1}, "e": {"RUNNING": 1}, "asked": 0}

    def status():
        states["asked"] += 1
        if error := states.get("error"):
            raise error
        deployments = {name: SimpleNamespace(replica_states=states[name]) for name in ("g", "e") if name in states}
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments=deployments)})

    monkeypatch.setattr(module, "serve", SimpleNamespace(status=status))
    monkeypatch.setattr(module, "PERIOD_S", 0.02)
    monkeypatch.setattr(module, "DOUBT_S", 0.2)
    yield states
    states.pop("error", None)
    states.update(g={"RUNNING": 1}, e={"RUNNING": 1})
    asked = -1
    while asked != states["asked"]:  # all is well, so threads wait for an alarm, and do not ask the real Serve
        asked = states["asked"]
        time.sleep(0.3)


def watch(has_one_replica=True):
    return Watch({"general": "g", "expert": "e"}, "app", has_one_replica=has_one_replica)


def becomes(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_no_model_is_up_before_serve_said_so(states):
    states.update(g={"STARTING": 1}, error=RuntimeError("the controller is busy"))
    made = watch()
    assert not made.is_up("general") and not made.is_up("expert")
    del states["error"]
    becomes(lambda: made.is_up("expert"))
    assert not made.is_up("general")
    states["g"] = {"RUNNING": 1}
    becomes(lambda: made.is_up("general"))


def test_serve_is_asked_only_until_all_is_well(states):
    made = watch()
    becomes(lambda: made.is_up("expert"))
    time.sleep(0.1)
    asked = states["asked"]
    time.sleep(0.2)
    assert states["asked"] == asked
    made.alarm()
    becomes(lambda: states["asked"] > asked)


def test_a_model_without_a_running_replica_is_found_by_an_alarm_and_back_by_itself(states):
    made = watch()
    becomes(lambda: made.is_up("expert"))
    states["e"] = {"STARTING": 1}
    made.alarm()
    becomes(lambda: not made.is_up("expert"))
    assert made.is_gone("expert") and made.is_up("general")
    states["e"] = {"RUNNING": 1}
    becomes(lambda: made.is_up("expert") and not made.is_gone("expert"))


def test_a_stopping_replica_takes_nothing_new_and_ends_what_it_has(states):
    states["e"] = {"STOPPING": 1}
    made = watch()
    becomes(lambda: made.is_up("general"))
    assert not made.is_up("expert") and not made.is_gone("expert")


def test_a_failed_request_is_believed_for_a_while_where_it_speaks_for_the_model(states):
    single, several = watch(), watch(has_one_replica=False)
    becomes(lambda: single.is_up("expert") and several.is_up("expert"))
    for made in (single, several):
        made.doubt("expert")
    assert not single.is_up("expert") and several.is_up("expert")
    becomes(lambda: single.is_up("expert"))


def test_what_was_known_stays_while_serve_is_silent(states):
    made = watch()
    becomes(lambda: made.is_up("expert"))
    states["error"] = RuntimeError("the controller restarts")
    made.alarm()
    asked = states["asked"]
    becomes(lambda: states["asked"] > asked + 2)
    assert made.is_up("expert")
    del states["error"]
    states["e"] = {}
    becomes(lambda: not made.is_up("expert"))
