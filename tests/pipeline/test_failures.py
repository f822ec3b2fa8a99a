"""Failures: which end a job with 4, so that the same command goes on, and which end it otherwise."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError

from seap_ray.errors import ConfigError, DataError, IncompleteError, SeapError, error_by_code
from seap_ray.pipeline.evaluate import Failure
from seap_ray.pipeline.ray_errors import known_error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("tasks.mine: no rows"), 3),
        (ConfigError("model.source: none"), 2),
        (IncompleteError("the disk is full"), 4),
        (ConnectionError("no network"), 4),
        (OSError("no space"), 4),
        (WorkerCrashedError(), 4),
        (ValueError("a bug"), 1),
        (RayTaskError("f", "a traceback", KeyError("a bug")), 1),
    ],
)
def test_only_a_failure_that_the_same_command_may_mend_ends_with_4(error, code):
    failure = Failure.of(error)
    assert failure.exit_code == code
    assert error_by_code([4, failure.exit_code], "general on sort: ...").exit_code == code


@pytest.mark.parametrize(
    ("traceback", "expected"),
    [
        ("Traceback\nRuntimeError: size mismatch for model.layers.3", None),
        ("Traceback\nseap_ray.errors.ConfigError: model.source: no tensor", ConfigError),
        ("Traceback\nseap_ray.errors.IncompleteError: the disk is full", IncompleteError),
    ],
)
def test_an_actor_that_cannot_be_made_is_no_lost_one(traceback, expected):
    """The next one would meet the same error, and the same command with it."""
    known = known_error(ActorDiedError(RayTaskError("Calibrator.__init__", traceback, RuntimeError())))
    assert type(known) is (expected or type(None))


def test_an_actor_that_ended_unexpectedly_is_a_lost_one():
    known = known_error(ActorDiedError())
    assert type(known) is IncompleteError and "run the same command again" in str(known)


def test_among_several_failures_the_one_counts_that_time_does_not_mend():
    assert type(error_by_code([4, 4], "x")) is IncompleteError
    assert type(error_by_code([4, 3, 2], "x")) is ConfigError
    assert error_by_code([4, 1], "x").exit_code == SeapError.exit_code == 1
