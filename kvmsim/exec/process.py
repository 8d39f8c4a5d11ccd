# SPDX-License-Identifier: GPL-2.0-or-later
"""A process of the program, as the caller of an ioctl: its memory, its descriptors, its signals."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import stat
from collections.abc import Hashable, Mapping, Sequence

from kvmsim.device.caller import Fd, HostPiece, NotOurs, PrivateFd
from kvmsim.device.copying import fetch, store
from kvmsim.device.local import on_fuse
from kvmsim.device.results import DeviceObject
from kvmsim.exec.slotmemory import SlotMemory
from kvmsim.exec.syscalls import pidfd_getfd

log = logging.getLogger(__name__)

Identity = tuple[int, int]
"""st_dev and st_ino of what a descriptor names: the same after dup(2), fork(2) and SCM_RIGHTS."""


class Process:
    """A process (thread group ``pid``) that makes ioctls.

    ``objects`` are the device's descriptors by identity.
    """

    def __init__(self, pid: int, objects: Mapping[Identity, DeviceObject]) -> None:
        self.pid = pid
        self._objects = objects
        self.pidfd = os.pidfd_open(pid)
        self._open_files = f"/proc/{pid}/fd/"
        self.slots = SlotMemory(pid, self.pidfd)

    # --- memory -------------------------------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return fetch(self.pid, address, length)

    def write(self, address: int, data: bytes) -> None:
        """See :class:`~kvmsim.device.caller.Caller`."""
        store(self.pid, address, data)

    # --- descriptors --------------------------------------------------------------------------

    def fd(self, number: int) -> Fd:
        """See :class:`~kvmsim.device.caller.Caller`."""
        number = ctypes.c_int(number).value
        identity = self.identify(number)
        if identity is None:
            return NotOurs.CLOSED
        if identity in self._objects:
            return self._objects[identity]
        try:
            fd = pidfd_getfd(self.pidfd, number)
        except OSError:
            return NotOurs.CLOSED
        self.slots.lend(fd)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        return PrivateFd(fd) if regular and on_fuse(fd) else NotOurs.OTHER

    def identify(self, number: int) -> Identity | None:
        """What a descriptor names, None if it is closed."""
        return _identify(f"{self._open_files}{number}")

    def close(self) -> None:
        """The process is gone."""
        self.slots.close()
        os.close(self.pidfd)


class Thread:
    """A thread of a :class:`Process` as the caller of ioctls.

    ``mm`` is the process: threads share their memory, children do not.
    """

    def __init__(self, process: Process, tid: int) -> None:
        self.process = process
        self.mm: Hashable = process
        self.tid = tid
        self.said = b""  #: what was read last
        self._open_files = f"/proc/{process.pid}/task/{tid}/fd/"

    def identify(self, number: int) -> Identity | None:
        """What a descriptor names; None if it is closed, or if no such thread is there (now)."""
        return _identify(f"{self._open_files}{number}")

    def read(self, address: int, length: int) -> bytes:
        """See :class:`~kvmsim.device.caller.Caller`."""
        self.said = self.process.read(address, length)
        return self.said

    def write(self, address: int, data: bytes) -> None:
        """See :class:`~kvmsim.device.caller.Caller`."""
        self.process.write(address, data)

    def fd(self, number: int) -> Fd:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return self.process.fd(number)

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return self.process.slots.host_range(start, size)

    def signal_pending(self, mask: int | None) -> bool:
        """Whether a signal waits that the thread neither blocks nor ignores."""
        return bool(pending_signals(self.tid, mask))


class Repeating(Thread):
    """A thread whose ioctl is ``data``: pointers are offsets in it. For ioctls of our own."""

    def __init__(self, thread: Thread, data: bytes) -> None:
        super().__init__(thread.process, thread.tid)
        self._data = data

    def read(self, address: int, length: int) -> bytes:
        """Bytes of ``data``."""
        return self._data[address : address + length]


def pending_signals(tid: int, mask: int | None = None) -> int:
    """The signals (bit n - 1) that would interrupt a thread; ``mask`` instead of its own."""
    try:
        with open(f"/proc/{tid}/status") as file:
            fields = dict(line.split(":", 1) for line in file if line.startswith(("Sig", "Shd")))
    except (FileNotFoundError, ProcessLookupError):
        return 1 << (signal.SIGKILL - 1)  # it is dead
    except OSError as error:  # no descriptors left: it is looked at again soon
        log.debug("signals of thread %d: %s", tid, error)
        return 0
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    blocked = int(fields["SigBlk"], 16) if mask is None else mask
    return pending & ~blocked & ~int(fields["SigIgn"], 16)


def _identify(link: str) -> Identity | None:
    try:
        status = os.stat(link)
    except OSError:
        return None
    return status.st_dev, status.st_ino
