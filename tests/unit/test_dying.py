# SPDX-License-Identifier: GPL-2.0-or-later
"""Who counts as dead without having exited; tests/integration has those that sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

from privfs.notifier.dying import harmless


def test_who_runs_or_could_run_is_not_harmless() -> None:
    assert not harmless(os.getpid())
    assert not harmless(0)
    with subprocess.Popen(["sleep", "60"]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        assert not harmless(stopped.pid)
        stopped.kill()
        os.waitid(os.P_PID, stopped.pid, os.WEXITED | os.WNOWAIT)
        assert harmless(stopped.pid)
    assert not harmless(stopped.pid), "nobody of that number: it cannot be told"


def test_a_thread_that_lives_on() -> None:
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
        assert not harmless(process.pid)
        process.kill()


def open_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
