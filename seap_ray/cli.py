"""Command: what every job does with its arguments: help, a config, and one line for what a user can mend."""

import signal
import sys
from collections.abc import Callable, Sequence

from seap_ray.config import Config, help_text, load_config
from seap_ray.errors import SeapError


def command(usage: str, arguments: Sequence[str], work: Callable[[Config], None], *, stopped: tuple[str, int]) -> int:
    """Do ``work`` with the config of ``arguments`` and return the exit code.

    ``usage`` is the job's docstring; ``stopped`` what is said, and the exit code, after Ctrl-C or SIGTERM.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(usage))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work(load_config(arguments))
    except SeapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        said, exit_code = stopped
        print(said, file=sys.stderr)
        return exit_code
    return 0
