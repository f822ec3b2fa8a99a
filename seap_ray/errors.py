"""Errors that a user can correct: one line each, with the exit code of the job that meets them."""

from collections.abc import Iterable


class SeapError(Exception):
    """Base of all expected failures."""

    exit_code = 1
    """Exit code of a job that meets the error."""


class FaultError(SeapError):
    """A part of the work that failed by a fault of the program, while the rest went on; the line names the fault."""


class ConfigError(SeapError):
    """A key, value, model or run directory that cannot be used as it stands."""

    exit_code = 2


class DataError(SeapError):
    """A corpus, shard or record that is missing, empty or does not fit its task."""

    exit_code = 3


class IncompleteError(SeapError):
    """Work that was cut short; what is done is kept, and the same command goes on from there."""

    exit_code = 4


def error_by_code(exit_codes: Iterable[int], message: str) -> SeapError:
    """Return the error that ends a job in which parts of the work have failed, each with an exit code.

    Only where the same command can mend all of them, it is an IncompleteError.
    """
    kinds = {kind.exit_code: kind for kind in (FaultError, ConfigError, DataError)}
    lasting = sorted(set(exit_codes) & kinds.keys())
    return kinds[lasting[0]](message) if lasting else IncompleteError(message)
