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
import logging
import mmap
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final, Self

import numpy as np

from hwemu import processmemory
from kvmsim.exec.mapevents import FLAGS, SYS_USERFAULTFD, MapEvents
from kvmsim.exec.syscalls import check, libc, pidfd_getfd
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

log = logging.getLogger(__name__)

_SEIZE, _INTERRUPT, _DETACH, _SINGLESTEP = 0x4206, 0x4207, 17, 9
_GETREGS, _SETREGS = 12, 13
_WALL: Final = 0x40000000
_SYSCALL: Final = b"\x0f\x05"
_SYS_MMAP, _SYS_CLOSE = 9, 3
_MAP_SHARED, _MAP_FIXED, _MAP_NORESERVE = 1, 0x10, 0x4000
_REGISTERS: Final = Struct("<27Q")  # struct user_regs_struct
_NAMES: Final = [
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "eflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
]
_PRESENT: Final = np.uint64(3 << 62)  # present or swapped, /proc/PID/pagemap
_CHUNK: Final = 1 << 20
_SPAN: Final = 1 << 34  #: bytes looked up in pagemap at once: 32 MiB of entries


@dataclass(frozen=True, slots=True)
class Replacement:
    """Bytes [start, start + length) are to be ``fd`` from its beginning, which is empty yet.

    ``anonymous``: pages that are not there are zeros; else everything is copied.
    """

    start: int
    length: int
    fd: int
    protection: int
    anonymous: bool


class Remapper:
    """Replaces mappings of the process ``pid``, whose thread ``caller`` waits for its answer.

    In this order: :meth:`seize`; let the caller leave its system call; :meth:`stop`;
    :meth:`stop_others`; what is to be done. With the end of the context every thread runs again.
    Everything raises OSError.
    """

    def __init__(self, pid: int, caller: int) -> None:
        self.pid = pid
        self._caller = caller
        self._seized: set[int] = set()
        self._signals: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def replace(self, replacement: Replacement, number: int) -> None:
        """Map descriptor ``number`` of the process over what it has there, with the contents."""
        self._copy(replacement)
        self._map(replacement, number)

    def open_events(self, pidfd: int) -> MapEvents:
        """A userfaultfd of the process, which keeps no descriptor of it."""
        number = self._made(self._call(SYS_USERFAULTFD, FLAGS), "userfaultfd")
        try:
            fd = pidfd_getfd(pidfd, number)
        finally:
            self.close(number)
        return MapEvents(fd)

    def close(self, number: int) -> None:
        """Close a descriptor of the process."""
        self._call(_SYS_CLOSE, number)

    def answer(self, code: int) -> None:
        """Let the caller's system call fail with ``code`` after all."""
        regs = self._registers(self._caller)
        regs["rax"] = (1 << 64) - code
        self._set_registers(self._caller, regs)

    # --- threads ------------------------------------------------------------------------------

    def seize(self) -> None:
        """Let the caller stop as soon as it leaves its system call."""
        self._seize(self._caller)

    def stop(self) -> None:
        """Wait until it has."""
        self._wait(self._caller)

    def stop_others(self, waiting: frozenset[int]) -> None:
        """Stop all other threads but those in ``waiting``, which stay in their system calls."""
        while True:  # threads may be made until all that make them are stopped
            fresh = self._threads() - self._seized - waiting
            if not fresh:
                return
            for tid in fresh:
                with contextlib.suppress(ProcessLookupError):
                    self._seize(tid)
                    self._wait(tid)

    def _threads(self) -> set[int]:
        return {int(name) for name in os.listdir(f"/proc/{self.pid}/task")}

    def _seize(self, tid: int) -> None:
        _ptrace(_SEIZE, tid)
        self._seized.add(tid)
        _ptrace(_INTERRUPT, tid)

    def _wait(self, tid: int) -> int:
        _, status = os.waitpid(tid, _WALL)
        if not os.WIFSTOPPED(status):
            self._seized.discard(tid)
            raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone")
        number = os.WSTOPSIG(status)
        if number != signal.SIGTRAP and not status >> 16:
            self._signals.append((tid, number))  # it was on its way; sent again afterwards
        return status

    def _let_go(self) -> None:
        for tid in self._seized:
            with contextlib.suppress(OSError):
                _ptrace(_DETACH, tid)
        for tid, number in self._signals:
            libc.tgkill(self.pid, tid, number)
        self._seized.clear()
        self._signals.clear()

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
                present = np.zeros(pages + 2, np.int8)
                present[1:-1] = (entries & _PRESENT) != 0
                steps = np.diff(present)
                firsts, lasts = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
                for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                    yield at + (first << PAGE_SHIFT), at + (last << PAGE_SHIFT)

    def _map(self, replacement: Replacement, number: int) -> None:
        flags = _MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE
        done = self._call(
            _SYS_MMAP, replacement.start, replacement.length, replacement.protection, flags,
            number, 0,
        )  # fmt: skip
        self._made(done, f"mmap of {replacement.start:#x}")

    def _made(self, result: int, what: str) -> int:
        if result >= (1 << 64) - 4095:
            code = (1 << 64) - result
            raise OSError(code, f"{what} in thread {self._caller}: {os.strerror(code)}")
        return result

    def _call(self, nr: int, *arguments: int) -> int:
        """Have the caller, stopped, make a system call at the instruction of its last one."""
        tid = self._caller
        saved = self._registers(tid)
        regs = dict(saved)
        code = ctypes.create_string_buffer(2)
        processmemory.read(self.pid, regs["rip"] - 2, ctypes.addressof(code), 2)
        if code.raw != _SYSCALL:
            raise OSError(errno.EINVAL, f"thread {tid} did not come by a syscall instruction")
        regs["rip"] -= 2
        regs["rax"] = nr
        regs["orig_rax"] = (1 << 64) - 1
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            regs[name] = value
        self._set_registers(tid, regs)
        try:
            while True:
                _ptrace(_SINGLESTEP, tid)
                if os.WSTOPSIG(self._wait(tid)) == signal.SIGTRAP:
                    break
            return self._registers(tid)["rax"]
        finally:
            self._set_registers(tid, saved)

    def _registers(self, tid: int) -> dict[str, int]:
        buffer = ctypes.create_string_buffer(_REGISTERS.size)
        check(libc.ptrace(_GETREGS, tid, None, ctypes.addressof(buffer)), "PTRACE_GETREGS")
        return dict(zip(_NAMES, _REGISTERS.unpack(buffer.raw), strict=True))

    def _set_registers(self, tid: int, regs: dict[str, int]) -> None:
        data = _REGISTERS.pack(*(regs[name] for name in _NAMES))
        buffer = ctypes.create_string_buffer(data, len(data))
        check(libc.ptrace(_SETREGS, tid, None, ctypes.addressof(buffer)), "PTRACE_SETREGS")


def _ptrace(request: int, tid: int) -> None:
    check(libc.ptrace(request, tid, None, None), f"ptrace({request:#x}, {tid})")


def new_memory(length: int) -> int:
    """A memfd of ``length`` bytes for a replacement."""
    fd = os.memfd_create("kvmsim:exec", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return fd


assert PAGE_SIZE == mmap.PAGESIZE
