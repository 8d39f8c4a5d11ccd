# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that have been killed and cannot exit yet, but can do no harm any more.

A killed thread in fallocate(2) or ftruncate(2) sleeps uninterruptibly until it has the inode's
lock (``fuse_file_fallocate`` and ``do_truncate`` take it for the whole call).  Its holder may be
waiting for that very process, as a user that does not acknowledge.  So the exit would never come;
but it is not needed: a thread with SIGKILL pending does not return to its program
(``exit_to_user_mode_loop``, ``get_signal``), and what is left of these calls touches no memory of
the process.
"""

from __future__ import annotations

import os
import signal
from typing import Final

#: System calls that touch no memory of their caller once they sleep, by their x86-64 numbers.
_HARMLESS: Final = {"76": "truncate", "77": "ftruncate", "285": "fallocate"}
_KILLED: Final = 1 << (signal.SIGKILL - 1)


def harmless(pid: int) -> bool:
    """Return True if no thread of process ``pid`` will touch its memory again before it exits.

    Every thread has exited, or sleeps with SIGKILL pending in a call of the table above; False if
    that cannot be told.  The process must be known not to have exited, or its number may be
    another's.
    """
    try:
        before = _threads(pid)
        return all(_is_harmless(f"/proc/{pid}/task/{tid}") for tid in before) and (
            # A listing may miss a thread while others exit; a killed process begins no new ones.
            before == _threads(pid) and len(before) == int(_status(f"/proc/{pid}")["Threads"])
        )
    except (OSError, KeyError, ValueError):
        return False  # one has just ended, or we may not look


def _threads(pid: int) -> set[str]:
    return set(os.listdir(f"/proc/{pid}/task"))


def _is_harmless(task: str) -> bool:
    status = _status(task)
    state = status["State"][0]
    if state in "ZX":
        return True
    if state != "D" or not int(status["SigPnd"], 16) & _KILLED:
        return False
    with open(f"{task}/syscall") as file:
        return file.read().split()[0] in _HARMLESS


def _status(task: str) -> dict[str, str]:
    with open(f"{task}/status") as file:
        return {name: rest.strip() for name, _, rest in (line.partition(":") for line in file)}
