"""The process of one conversion: a form and a folder on stdin; an exit code, and one line for an error, out."""

import ctypes
import pickle
import signal
import sys
from contextlib import redirect_stdout

import torch

from seap_ray.errors import SeapError

PR_SET_PDEATHSIG = 1
"""Linux's number for the signal that a process is sent when the one that started it ends."""


def _main() -> int:
    """Convert what the parent process sends; return the exit code, with one line on stdout for an error."""
    # If the parent ends, so does this, which nobody would take the result of.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)  # sums, and so bytes, depend on it
    answer = sys.stdout
    with redirect_stdout(sys.stderr):
        form, target = pickle.load(sys.stdin.buffer)
        try:
            form.convert(target)
        except SeapError as error:
            print(str(error), file=answer)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
