# SPDX-License-Identifier: GPL-2.0-or-later
"""Killed processes that have not exited: whether one will ever run its program again.

A thread with SIGKILL pending does not return to user mode (``exit_to_user_mode_loop``,
``get_signal``), nor does one that exits (PF_EXITING) or never was there (a worker of io_uring or
vhost).  What such a process could still do to memory is done by the kernel for it: the rest of a
read(2), a copy by a worker.  That is what a userfaultfd stops, and only the process itself could
lift it.  Both together are as good as the exit; neither is alone.
"""

from __future__ import annotations

import os
import signal
from typing import Final

_KILLED: Final = 1 << (signal.SIGKILL - 1)
_NEVER_RETURNS: Final = 0x4 | 0x10 | 0x4000  # linux/sched.h: PF_EXITING, PF_IO_, PF_USER_WORKER


def runs_no_more(pid: int) -> bool:
    """Return True if no thread of process ``pid`` will execute an instruction of its program.

    False if that cannot be told: init of our pid namespace, say, takes no SIGKILL from inside.
    """
    try:
        before = os.listdir(f"/proc/{pid}/task")
        return (
            all(_is_over(f"/proc/{pid}/task/{tid}") for tid in before)
            # A listing may miss a thread while others exit; a killed process begins no new ones.
            and before == os.listdir(f"/proc/{pid}/task")
            and len(before) == int(_status(f"/proc/{pid}")["Threads"])
        )
    except (OSError, KeyError, ValueError):
        return False


def _is_over(task: str) -> bool:
    status = _status(task)
    if "VmSize" not in status or int(status["SigPnd"], 16) & _KILLED:
        return True  # without an address space (exit_mm), or about to be
    with open(f"{task}/stat") as file:
        return bool(int(file.read().rpartition(")")[2].split()[6]) & _NEVER_RETURNS)


def _status(task: str) -> dict[str, str]:
    with open(f"{task}/status") as file:
        return {name: rest.strip() for name, _, rest in (line.partition(":") for line in file)}
