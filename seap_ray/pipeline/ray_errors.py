"""Ray errors: an error that Ray wrapped in, the error that a user can fix out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import OutOfDiskError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from seap_ray import errors
from seap_ray.errors import IncompleteError, SeapError

OUR_ERROR = re.compile(r"^seap_ray\.errors\.(\w+): (.+)$", re.MULTILINE)
"""A line in a traceback: type and message of ours, which a function of rows or an actor raised."""


@contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """While inside, raise errors that a user can fix as they are; Ray's own text of one is a traceback."""
    try:
        yield
    except Exception as error:
        # What no user can fix is a fault of ours, whose traceback is needed.
        known = known_error(error)
        if known is None:
            raise
        raise known from None


def known_error(error: BaseException | None) -> SeapError | None:
    """Return what a Ray task, actor or Ray Data function met, out of Ray's wrappers; None if no user can fix it."""
    # From the outermost wrapper inwards; the first that is known counts.
    while error is not None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, SeapError):
            return cause
        if isinstance(error, SeapError):
            return error

        # Ray Data keeps of our error only the text, and so does an actor that could not be made.
        if _is_of_code(error) and (match := OUR_ERROR.search(str(error))):
            name, message = match.groups()
            return getattr(errors, name)(message)

        if isinstance(error, OutOfDiskError):
            return IncompleteError("the disk of a node is full; make room and run the same command again")
        # What is left of Ray's own errors are lost nodes, processes and objects; an error in code is none of these,
        # since the same command would meet it again.
        if isinstance(error, RayError) and not _is_of_code(error):
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return IncompleteError(f"the cluster lost a part of the job ({reason}); run the same command again")

        error = cause or error.__cause__

    return None


def _is_of_code(error: BaseException) -> bool:
    """Return whether an error comes from code that ran, or could not be run, and not from a process that was lost."""
    if isinstance(error, RayActorError):
        return error.actor_init_failed
    return isinstance(error, RayTaskError | RuntimeEnvSetupError)
