# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads that are stopped for a moment, and what becomes of those that die meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsim.exec.tracees import Tracees

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="registers of x86-64"
)

GETPID, GETPPID = 39, 110
#: A process whose child is killed while it is traced, and which tells how that ended.
PARENT = """
import os
child = os.fork()
if not child:
    while True:
        os.read(0, 1)
print(child, flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program that waits in read(2) of its standard input."""
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        yield program


def stop_in_read(tracees: Tracees, tid: int) -> None:
    """Stop a thread that is to wait in read(2)."""
    end = time.monotonic() + 30
    while not Path(f"/proc/{tid}/syscall").read_text().startswith("0 0x0 "):
        assert time.monotonic() < end
    tracees.seize(tid)
    tracees.wait(tid)


def test_a_thread_makes_calls_of_ours_and_goes_on() -> None:
    with started("cat") as cat:
        with Tracees(cat.pid) as tracees:
            stop_in_read(tracees, cat.pid)
            assert tracees.call(cat.pid, GETPID) == cat.pid
            assert tracees.made("getppid", cat.pid, GETPPID) == os.getpid()
            with pytest.raises(OSError, match="Bad file descriptor"):
                tracees.made("close", cat.pid, 3, 999)
        assert cat.communicate("heard\n") == ("heard\n", None)
        assert cat.returncode == 0


def test_a_stop_for_another_reason_is_not_the_end_of_a_call() -> None:
    with started("cat") as cat:
        with Tracees(cat.pid) as tracees:
            stop_in_read(tracees, cat.pid)
            tracees.interrupt(cat.pid)
            assert tracees.call(cat.pid, GETPID) == cat.pid
        assert cat.communicate("heard\n") == ("heard\n", None)


def test_the_status_of_a_child_of_ours_is_left_to_who_waits_for_it() -> None:
    with started("cat") as cat:
        with Tracees(cat.pid) as tracees:
            stop_in_read(tracees, cat.pid)
            cat.kill()
            with pytest.raises(ProcessLookupError):
                tracees.wait(cat.pid)
        assert cat.wait(10) == -signal.SIGKILL


def test_another_parent_hears_of_a_child_that_dies_here() -> None:
    with started(sys.executable, "-c", PARENT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        with Tracees(child) as tracees:
            stop_in_read(tracees, child)
            os.kill(child, signal.SIGKILL)
            with pytest.raises(ProcessLookupError):
                tracees.wait(child)
        assert parent.communicate(timeout=10)[0] == f"{-signal.SIGKILL}\n"
