# SPDX-License-Identifier: GPL-2.0-or-later
"""A process of the program, as the caller of an ioctl: its memory, its descriptors, its signals."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import stat
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from threading import get_ident

from kvmsim.device.caller import Fd, HostPiece, NotOurs, PrivateFd
from kvmsim.device.copying import fetch, store
from kvmsim.device.local import on_fuse
from kvmsim.device.results import DeviceObject
from kvmsim.exec import maps
from kvmsim.exec.remap import Replacement, new_memory
from kvmsim.exec.syscalls import pidfd_getfd

log = logging.getLogger(__name__)

Identity = tuple[int, int]
"""st_dev and st_ino of what a descriptor names: the same after dup(2), fork(2) and SCM_RIGHTS."""


class Process:
    """A process (thread group ``pid``) that makes ioctls.

    ``objects`` are the device's descriptors by identity. While a ``plan`` is there, private memory
    that a slot asks for is put on it; else it cannot be shared.
    """

    def __init__(self, pid: int, objects: Mapping[Identity, DeviceObject]) -> None:
        self.pid = pid
        self.plan: list[Replacement] | None = None
        self._objects = objects
        self.pidfd = os.pidfd_open(pid)
        self._open_files = f"/proc/{pid}/fd/"
        self._lent: defaultdict[int, list[int]] = defaultdict(list)  #: by thread of ours
        self._ours: list[Replacement] = []

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
        self._lent[get_ident()].append(fd)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        return PrivateFd(fd) if regular and on_fuse(fd) else NotOurs.OTHER

    def identify(self, number: int) -> Identity | None:
        """What a descriptor names, None if it is closed."""
        return _identify(f"{self._open_files}{number}")

    def returned(self) -> None:
        """The ioctl is over: what this thread of ours was lent is closed."""
        for fd in self._lent.pop(get_ident(), ()):
            os.close(fd)

    # --- memory of slots ----------------------------------------------------------------------

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        """See :class:`~kvmsim.device.caller.Caller`."""
        if self.plan is None:  # the device's own thread asks: it has mapped what it got before
            self.returned()
        with open(f"/proc/{self.pid}/maps") as file:
            text = file.read()
        pieces = []
        for first, last, mapping in maps.overlapping(text, start, start + size):
            found = self._share(first, last, mapping)
            if found is not None:
                fd, offset = found
                pieces.append(HostPiece(first, last - first, fd, offset, mapping.writable))
        return pieces

    def _share(self, first: int, last: int, mapping: maps.Mapping) -> tuple[int, int] | None:
        if mapping.special or not mapping.protection:
            return None
        if mapping.shared:
            for old in self._ours:
                if old.start <= first < old.start + old.length and _names(old.fd, mapping):
                    return old.fd, mapping.offset + first - mapping.start
            fd = self._open(mapping)
            if fd is None:
                log.warning("[%#x, %#x): %s cannot be shared", first, last, mapping.name)
                return None
            self._lent[get_ident()].append(fd)
            return fd, mapping.offset + first - mapping.start
        if self.plan is None:
            return None
        start, end = (mapping.start, mapping.end) if self._continues(mapping) else (first, last)
        fd = new_memory(end - start)
        anonymous = mapping.ino == 0
        self.plan.append(Replacement(start, end - start, fd, mapping.protection, anonymous))
        return fd, first - start

    def _continues(self, mapping: maps.Mapping) -> bool:
        """Whether it is what was left of a mapping when a slot took part of it.

        More slots are to come then: all of it is taken, since each step stops the process.
        """
        return any(
            old.start + old.length == mapping.start or old.start == mapping.end
            for old in self._ours
        )

    def _open(self, mapping: maps.Mapping) -> int | None:
        """A descriptor of what is mapped: root has map_files, others what the process has open."""
        flags = (os.O_RDWR if mapping.writable else os.O_RDONLY) | os.O_CLOEXEC
        name = f"/proc/{self.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        with contextlib.suppress(OSError):
            return os.open(name, flags)
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{self.pid}/fd/{number}")
                if status.st_ino == mapping.ino and _device(status.st_dev) == mapping.dev:
                    return pidfd_getfd(self.pidfd, int(number))
        return None

    def adopted(self, plan: Sequence[Replacement]) -> None:
        """The replacements are made; other slots may want the same memory."""
        self._ours += plan

    def close(self) -> None:
        """The process is gone."""
        for lent in self._lent.values():
            for fd in lent:
                os.close(fd)
        os.close(self.pidfd)
        for old in self._ours:
            os.close(old.fd)
        self._ours.clear()


class Thread:
    """A thread of a :class:`Process` as the caller of ioctls.

    ``mm`` is the process: threads share their memory, children do not.
    """

    def __init__(self, process: Process, tid: int) -> None:
        self.process = process
        self.mm: Hashable = process
        self._tid = tid
        self._open_files = f"/proc/{process.pid}/task/{tid}/fd/"

    def identify(self, number: int) -> Identity | None:
        """What a descriptor names; None if it is closed, or if no such thread is there (now)."""
        return _identify(f"{self._open_files}{number}")

    def read(self, address: int, length: int) -> bytes:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return self.process.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """See :class:`~kvmsim.device.caller.Caller`."""
        self.process.write(address, data)

    def fd(self, number: int) -> Fd:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return self.process.fd(number)

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return self.process.host_range(start, size)

    def signal_pending(self, mask: int | None) -> bool:
        """Whether a signal waits that the thread neither blocks nor ignores."""
        return bool(pending_signals(self._tid, mask))


def pending_signals(tid: int, mask: int | None = None) -> int:
    """The signals (bit n - 1) that would interrupt a thread; ``mask`` instead of its own."""
    try:
        with open(f"/proc/{tid}/status") as file:
            fields = dict(line.split(":", 1) for line in file if line.startswith(("Sig", "Shd")))
    except OSError:
        return 1 << (signal.SIGKILL - 1)  # it is dead
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    blocked = int(fields["SigBlk"], 16) if mask is None else mask
    return pending & ~blocked & ~int(fields["SigIgn"], 16)


def _identify(link: str) -> Identity | None:
    try:
        status = os.stat(link)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _device(dev: int) -> tuple[int, int]:
    return os.major(dev), os.minor(dev)


def _names(fd: int, mapping: maps.Mapping) -> bool:
    status = os.fstat(fd)
    return status.st_ino == mapping.ino and _device(status.st_dev) == mapping.dev
