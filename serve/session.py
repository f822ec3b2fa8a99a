"""Session: a process of its own for the service, which no signal to a whole process group reaches.

``timeout`` and a terminal that closes send their signal to all processes of the group, Ray's among them, which end at
once and cut replies off. The service and all that it starts are in another session; the first process stays in the
caller's group, and hands on what it is told.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``: which signal a process gets when its parent ends."""
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def enter_own_session() -> None:
    """Go on in a new process in a session of its own; this one waits for it and ends with its exit code.

    To be called before anything has started a thread, since these are not copied.
    """
    parent = os.getpid()
    # What is in a buffer would be written by both.
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal waits until the first process can hand it on.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    child = os.fork()
    if child:
        os._exit(_wait(child))

    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    # A first process that is killed takes nobody with it: the service then stops as by SIGTERM.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _wait(child: int) -> int:
    """Hand signals on to a process until it ends, and return its exit code, as a shell does for one that was killed."""

    def hand_on(number: int, _frame: FrameType | None) -> None:
        """Send a signal that this process got to the child, as SIGTERM where that would not stop it in order."""
        os.kill(child, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
