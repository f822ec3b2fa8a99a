"""A session of its own: signals to the caller's whole process group, and what the caller is told in the end."""

import configparser
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from seap_ray.config import Config
from tests.support import ROOT

SERVICE = """
import signal, subprocess, sys, time
from serve.session import enter_own_session

enter_own_session()
# Before anybody knows that the service has started.
signal.signal(signal.SIGTERM, signal.default_int_handler)
# Stands for Ray, which any signal ends.
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
try:
    print("started", helper.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    print("helper", "alive" if helper.poll() is None else "dead", flush=True)
    helper.kill()
    helper.wait()
    sys.exit(7)
"""


@pytest.fixture
def started() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A stand-in for the service in a process group of its own, and the process that it has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    word, pid = process.stdout.readline().split()
    assert word == "started"
    yield process, int(pid)
    process.kill()
    process.wait()
    process.stdout.close()


def ends(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody waits for, within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_leaves_what_the_service_has_started_alive_until_it_ends_in_order(started, number):
    process, helper = started

    os.killpg(process.pid, number)

    assert process.stdout.read().split() == ["helper", "alive"]
    assert process.wait(20) == 7, "the exit code of the service itself"
    assert ends(helper)


def test_a_service_whose_first_process_is_killed_stops_in_order(started):
    process, helper = started

    process.kill()

    assert process.stdout.read().split() == ["helper", "alive"]
    assert process.wait(20) == -signal.SIGKILL
    assert ends(helper)


def test_a_service_that_is_killed_ends_as_a_shell_says_it(started):
    process, _ = started
    (service,) = psutil.Process(process.pid).children()

    service.kill()

    assert process.wait(20) == 128 + signal.SIGKILL
    for child in psutil.process_iter():
        if child.pid == started[1]:
            child.kill()


def test_the_unit_for_systemd_signals_the_first_process_alone_and_waits_for_replies() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "cluster" / "seap-ray.service")
    service = unit["Service"]

    assert service["KillMode"] == "mixed"
    assert service["KillSignal"] == "SIGTERM"
    # The drain by default, and the half minute that the service takes for its own end at most.
    assert float(service["TimeoutStopSec"]) > Config().serve.drain_timeout_s + 30
    command = shlex.split(service["ExecStart"])
    assert Path(command[0]).name == "seap-ray" and command[1] == "deploy"
    assert "SEAP_API_KEYS" not in service, "keys come from a file that others cannot read"
