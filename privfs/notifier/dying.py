# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that have been killed and cannot exit yet, but can do no harm any more.

A killed thread in fallocate(2) or ftruncate(2) sleeps uninterruptibly until it has the inode's
lock (``fuse_file_fallocate`` and ``do_truncate`` take it for the whole call).  Its holder may be
waiting for that very process, as a user that does not acknowledge.  So the exit would never come;
but it is not needed, where of every thread one of these is true:

* it has no memory any more (``exit_mm``; the status of a dead thread has no ``VmSize``);
* SIGKILL is pending for it, so it never returns to its program (``exit_to_user_mode_loop``,
  ``get_signal``) and begins neither threads nor processes (``copy_process`` refuses where
  ``fatal_signal_pending``); and it sleeps in a call whose rest touches no memory of its caller.

SIGKILL alone is not enough: the rest of a read(2), say, still copies to the caller's memory, and a
worker of io_uring or vhost copies for others and never returns to a program at all.  A userfaultfd
stops such copies, and only the program itself could lift it: behind one, it is enough that the
program runs no more.
"""

from __future__ import annotations

import os
import signal
from typing import Final

#: System calls that touch no memory of their caller once they sleep, by their x86-64 numbers.
_HARMLESS: Final = {"76": "truncate", "77": "ftruncate", "285": "fallocate"}
_KILLED: Final = 1 << (signal.SIGKILL - 1)
_WORKER: Final = 0x10 | 0x4000  # PF_IO_WORKER, PF_USER_WORKER of linux/sched.h
_EXITING: Final = 0x4  # PF_EXITING
_IO_URING: Final = "anon_inode:[io_uring]"  # may copy for its owner before get_signal() ends it


def harmless(pid: int) -> bool:
    """Return True if no thread of process ``pid`` will touch its memory again before it exits.

    False if that cannot be told: it may run, or we may not look (ptrace(2), access mode).  A number
    that is another's by now does no harm: then its first owner has exited.
    """
    try:
        before = _threads(pid)
        alive = [tid for tid in before if "VmSize" in _status(f"/proc/{pid}/task/{tid}")]
        return (
            all(_sleeps_killed(f"/proc/{pid}/task/{tid}") for tid in alive)
            and not (alive and _has_io_uring(pid))
            # A listing may miss a thread while others exit; a killed process begins no new ones.
            and before == _threads(pid)
            and len(before) == int(_status(f"/proc/{pid}")["Threads"])
        )
    except (OSError, KeyError, ValueError):
        return False


def runs_no_more(pid: int) -> bool:
    """Return True if no thread of process ``pid`` will execute an instruction of its program.

    False if that cannot be told: init of our pid namespace, say, takes no SIGKILL from inside.
    """
    try:
        before = _threads(pid)
        return (
            all(_returns_no_more(f"/proc/{pid}/task/{tid}") for tid in before)
            and before == _threads(pid)
            and len(before) == int(_status(f"/proc/{pid}")["Threads"])
        )
    except (OSError, KeyError, ValueError):
        return False


def _threads(pid: int) -> set[str]:
    return set(os.listdir(f"/proc/{pid}/task"))


def _sleeps_killed(task: str) -> bool:
    status = _status(task)
    if status["State"][0] != "D" or not int(status["SigPnd"], 16) & _KILLED:
        return False
    with open(f"{task}/syscall") as file:
        return not _flags(task) & _WORKER and file.read().split()[0] in _HARMLESS


def _returns_no_more(task: str) -> bool:
    status = _status(task)
    killed = "VmSize" not in status or int(status["SigPnd"], 16) & _KILLED
    return bool(killed or _flags(task) & (_WORKER | _EXITING))


def _flags(task: str) -> int:
    with open(f"{task}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[6])


def _has_io_uring(pid: int) -> bool:
    folder = f"/proc/{pid}/fd"
    return any(os.readlink(f"{folder}/{fd}") == _IO_URING for fd in os.listdir(folder))


def _status(task: str) -> dict[str, str]:
    with open(f"{task}/status") as file:
        return {name: rest.strip() for name, _, rest in (line.partition(":") for line in file)}
