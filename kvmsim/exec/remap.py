# SPDX-License-Identifier: GPL-2.0-or-later
"""Private memory of a process becomes shared with us, under its feet: ptrace(2), for a moment.

A memfd takes the place of an anonymous mapping: every thread that could touch it is stopped, what
is there is copied, one of them is made to call mmap(2), all go on.  All calls of one
:class:`Remapper` belong to one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from hwemu import processmemory
from hwemu.runs import true_runs
from kvmsim.exec.mapevents import FLAGS, SYS_USERFAULTFD, MapEvents
from kvmsim.exec.syscalls import pidfd_getfd
from kvmsim.exec.tracees import Tracees
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

_SYS_MMAP, _SYS_CLOSE, _SYS_MADVISE = 9, 3, 28
_MADV_DONTFORK: Final = 10
_MAP_SHARED, _MAP_FIXED, _MAP_NORESERVE = 1, 0x10, 0x4000
_PRESENT: Final = np.uint64(3 << 62)  # present or swapped, /proc/PID/pagemap
_CHUNK: Final = 1 << 20
_SPAN: Final = 1 << 34  #: bytes looked up in pagemap at once: 32 MiB of entries


@dataclass(frozen=True, slots=True)
class Replacement:
    """Bytes [start, start + length) are to be ``fd`` from its beginning, which is empty yet.

    ``anonymous``: pages that are not there are zeros; else everything is copied. ``inherited`` by
    children; else MADV_DONTFORK.
    """

    start: int
    length: int
    fd: int
    protection: int
    anonymous: bool
    inherited: bool


class Remapper:
    """Replaces mappings of the process ``pid``, whose thread ``caller`` waits for its answer.

    In this order: :meth:`seize`; let the caller leave its system call; :meth:`stop`;
    :meth:`stop_others`; what is to be done. With the end of the context every thread runs again.
    Everything raises OSError.
    """

    def __init__(self, pid: int, caller: int) -> None:
        self.pid = pid
        self._caller = caller
        self._tracees = Tracees(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tracees.let_go()

    def replace(self, replacement: Replacement, number: int) -> None:
        """Map descriptor ``number`` of the process over what it has there, with the contents."""
        self._copy(replacement)
        self._map(replacement, number)

    def open_events(self, pidfd: int) -> MapEvents:
        """A userfaultfd of the process, which keeps no descriptor of it."""
        number = self._tracees.made("userfaultfd", self._caller, SYS_USERFAULTFD, FLAGS)
        try:
            fd = pidfd_getfd(pidfd, number)
        finally:
            self.close(number)
        return MapEvents(fd)

    def close(self, number: int) -> None:
        """Close a descriptor of the process."""
        self._tracees.call(self._caller, _SYS_CLOSE, number)

    def answer(self, code: int) -> None:
        """Let the caller's system call fail with ``code`` after all."""
        regs = self._tracees.registers(self._caller)
        regs["rax"] = (1 << 64) - code
        self._tracees.set_registers(self._caller, regs)

    def call_again(self, nr: int) -> None:
        """Let the caller make its system call ``nr`` again; nothing else can be done with it."""
        self._tracees.rewind(self._caller, nr)

    # --- threads ------------------------------------------------------------------------------

    def seize(self) -> None:
        """Let the caller stop as soon as it leaves its system call."""
        self._tracees.seize(self._caller)

    def stop(self) -> None:
        """Wait until it has."""
        self._tracees.wait(self._caller)

    def stop_others(self, waiting: frozenset[int]) -> None:
        """Stop all other threads but those in ``waiting``, which stay in their system calls."""
        while True:  # threads may be made until all that make them are stopped
            fresh = self._threads() - self._tracees.seized - waiting
            if not fresh:
                return
            for tid in fresh:
                with contextlib.suppress(ProcessLookupError):
                    self._tracees.seize(tid)
                    self._tracees.wait(tid)

    def _threads(self) -> set[int]:
        return {int(name) for name in os.listdir(f"/proc/{self.pid}/task")}

    # --- memory -------------------------------------------------------------------------------

    def _copy(self, replacement: Replacement) -> None:
        with mmap.mmap(replacement.fd, replacement.length) as ours:
            target = (ctypes.c_char * replacement.length).from_buffer(ours)
            base = ctypes.addressof(target)
            for first, last in self._runs(replacement):
                for at in range(first, last, _CHUNK):
                    length = min(_CHUNK, last - at)
                    place = base + at - replacement.start
                    if processmemory.read(self.pid, at, place, length) != length:
                        raise OSError(errno.EFAULT, f"[{at:#x}, {at + length:#x}) went away")
            del target

    def _runs(self, replacement: Replacement) -> Iterator[tuple[int, int]]:
        start, end = replacement.start, replacement.start + replacement.length
        if not replacement.anonymous:
            yield start, end
            return
        with open(f"/proc/{self.pid}/pagemap", "rb") as pagemap:
            for at in range(start, end, _SPAN):
                pages = min(_SPAN, end - at) >> PAGE_SHIFT
                pagemap.seek((at >> PAGE_SHIFT) * 8)
                entries = np.frombuffer(pagemap.read(pages * 8), np.uint64)
                for first, last in true_runs((entries & _PRESENT) != 0):
                    yield at + (first << PAGE_SHIFT), at + (last << PAGE_SHIFT)

    def _map(self, replacement: Replacement, number: int) -> None:
        flags = _MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE
        self._tracees.made(
            f"mmap of {replacement.start:#x}", self._caller, _SYS_MMAP, replacement.start,
            replacement.length, replacement.protection, flags, number, 0,
        )  # fmt: skip
        if not replacement.inherited:
            self._tracees.made(
                f"madvise of {replacement.start:#x}", self._caller, _SYS_MADVISE, replacement.start,
                replacement.length, _MADV_DONTFORK,
            )  # fmt: skip


def new_memory(length: int) -> int:
    """A memfd of ``length`` bytes for a replacement."""
    fd = os.memfd_create("kvmsim:exec", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return fd


assert PAGE_SIZE == mmap.PAGESIZE
