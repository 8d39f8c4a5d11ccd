# SPDX-License-Identifier: GPL-2.0-or-later
"""Who counts as dead without having exited; tests/integration has those that sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable

import pytest

from privfs.notifier.dying import harmless, runs_no_more

JUDGES = [harmless, runs_no_more]


@pytest.mark.parametrize("judge", JUDGES)
def test_who_runs_or_could_run_does_not_count(judge: Callable[[int], bool]) -> None:
    assert not judge(os.getpid())
    assert not judge(0)
    with subprocess.Popen(["sleep", "60"]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        assert not judge(stopped.pid)
        stopped.kill()
        os.waitid(os.P_PID, stopped.pid, os.WEXITED | os.WNOWAIT)
        assert judge(stopped.pid)
    assert not judge(stopped.pid), "nobody of that number: it cannot be told"


@pytest.mark.parametrize("judge", JUDGES)
def test_a_thread_that_lives_on(judge: Callable[[int], bool]) -> None:
    """A dead leader is not a dead process."""
    program = (
        "import ctypes, threading\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit(2) of this thread alone
    )
    with subprocess.Popen(["python3", "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while open_state(process.pid) != "Z":
            threading.Event().wait(0.005)
        assert not judge(process.pid)
        process.kill()


def open_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
