"""Errors that a user can correct: one line each, with the exit code of the job that meets them."""


class SeapError(Exception):
    """Base of all expected failures."""

    exit_code = 1
    """Exit code of a job that meets the error."""


class ConfigError(SeapError):
    """A key, value, model or run directory that cannot be used as it stands."""

    exit_code = 2


class DataError(SeapError):
    """A corpus, shard or record that is missing, empty or does not fit its task."""

    exit_code = 3


class IncompleteError(SeapError):
    """Work that was cut short; what is done is kept, and the same command goes on from there."""

    exit_code = 4
