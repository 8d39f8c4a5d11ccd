# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads of another process that stop for a moment and make system calls of ours: ptrace(2).

All calls of one :class:`Tracees` belong to one thread. Everything raises OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from struct import Struct
from typing import Final, NamedTuple, Self

from hwemu import processmemory
from kvmsim.exec.syscalls import check, libc

_SEIZE, _INTERRUPT, _DETACH, _SINGLESTEP, _SYSCALL = 0x4206, 0x4207, 17, 9, 24
_GETREGS, _SETREGS, _SETOPTIONS, _GETEVENTMSG = 12, 13, 0x4200, 0x4201
_WALL: Final = 0x40000000
_INSTRUCTION: Final = b"\x0f\x05"  # syscall
_AT_SYSCALL: Final = signal.SIGTRAP | 0x80  # with PTRACE_O_TRACESYSGOOD
# PTRACE_O_TRACESYSGOOD, _TRACEFORK, _TRACEVFORK, _TRACECLONE, _EXITKILL
_TRACE_CHILDREN: Final = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 20
_CHILD_EVENTS: Final = (1, 2, 3)  # PTRACE_EVENT_FORK, _VFORK, _CLONE
_REGISTERS: Final = Struct("<27Q")  # struct user_regs_struct
_NAMES: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi",
    "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs",
    "gs",
)  # fmt: skip
_STRAY_LOOKS, _STRAY_SECONDS = 20, 0.001
_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class Stop(NamedTuple):
    """Why a thread stopped; ``event`` is PTRACE_EVENT_*, or 0."""

    signal: int
    event: int


class Tracees:
    """Threads of the process ``pid``. With the end of the context every thread runs again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.seized: set[int] = set()
        self._signals: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def let_go(self) -> None:
        """Let every thread run again."""
        for tid in self.seized:
            with contextlib.suppress(OSError):
                _ptrace(_DETACH, tid)
        for tid, number in self._signals:
            libc.tgkill(self.pid, tid, number)
        self.seized.clear()
        self._signals.clear()

    def seize(self, tid: int) -> None:
        """Let a thread stop as soon as it leaves its system call; then :meth:`wait`."""
        _ptrace(_SEIZE, tid)
        self.seized.add(tid)
        self.interrupt(tid)

    def interrupt(self, tid: int) -> None:
        """Let a thread that is seized stop, once more if it has."""
        _ptrace(_INTERRUPT, tid)

    def adopt(self, tid: int) -> None:
        """Wait for a thread that was born traced, and stops before it does anything."""
        self.seized.add(tid)
        self.wait(tid)

    def wait(self, tid: int) -> Stop:
        """Wait until a thread has stopped; ProcessLookupError if it is gone."""
        taken = None
        while taken is None:  # it may be killed between the two looks
            seen = os.waitid(os.P_PID, tid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | _WALL)
            if seen is None or seen.si_code not in (os.CLD_TRAPPED, os.CLD_STOPPED):
                self.seized.discard(tid)
                if not self._is_ours(tid):
                    os.waitpid(tid, _WALL)  # its parent hears of it then
                raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone")
            taken = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | _WALL)
        stop = Stop(taken.si_status & 0xFF, taken.si_status >> 8)
        if stop.signal not in (signal.SIGTRAP, _AT_SYSCALL) and not stop.event:
            self._signals.append((tid, stop.signal))  # it was on its way; sent again afterwards
        return stop

    def _is_ours(self, tid: int) -> bool:
        """Whether a dead thread is a child of ours, whose status somebody else here waits for."""
        if tid != self.pid:
            return False
        with open(f"/proc/{tid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1]) == os.getpid()

    def call(self, tid: int, nr: int, *arguments: int) -> int:
        """Have a thread, stopped behind a syscall instruction, make a call; what that returns."""
        saved = self.rewind(tid, nr, **dict(zip(_ARGUMENTS, arguments, strict=False)))
        try:
            while True:
                _ptrace(_SINGLESTEP, tid)
                if self.wait(tid) == (signal.SIGTRAP, 0):
                    break
            return self.registers(tid)["rax"]
        finally:
            self.set_registers(tid, saved)

    def let_strays_go(self) -> None:
        """Let go of a child whose maker died before it could be asked for it."""
        for _ in range(_STRAY_LOOKS):
            try:
                stopped = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG | _WALL)
            except ChildProcessError:
                return
            if stopped is not None:
                with contextlib.suppress(OSError):
                    _ptrace(_DETACH, stopped.si_pid)
            time.sleep(_STRAY_SECONDS)

    def made(self, what: str, tid: int, nr: int, *arguments: int) -> int:
        """:meth:`call`, or OSError from what it returns; ``what`` is for people."""
        result = self.call(tid, nr, *arguments)
        if result >= (1 << 64) - 4095:
            code = (1 << 64) - result
            raise OSError(code, f"{what} in thread {tid}: {os.strerror(code)}")
        return result

    def fork(self, tid: int, nr: int, sixth: int) -> int:
        """Have a thread make its last call ``nr`` anew; the child, which is traced, or 0.

        With argument ``sixth``, which the call ignores. Afterwards the thread may only go on: it
        sees what its call returned, and is called again if a signal came first. Should we die,
        the child is killed, and the thread unless the call is over.
        """
        _ptrace(_SETOPTIONS, tid, _TRACE_CHILDREN)  # the child is born with them
        saved = self.rewind(tid, nr, r9=sixth)
        stops = 0
        while True:
            _ptrace(_SYSCALL, tid)
            stop = self.wait(tid)
            stops += stop.signal == _AT_SYSCALL
            if stops == 2 or stop.event in _CHILD_EVENTS:
                break
        regs = self.registers(tid)
        regs["r9"] = saved["r9"]
        self.set_registers(tid, regs)
        _ptrace(_SETOPTIONS, tid, 0)
        if stops == 2:
            return 0
        child = ctypes.c_ulong()
        _ptrace(_GETEVENTMSG, tid, ctypes.addressof(child))
        return child.value

    def rewind(self, tid: int, nr: int, **changes: int) -> dict[str, int]:
        """Put a thread before its last syscall instruction; the registers that it had.

        It will make call ``nr`` with the arguments in its registers, some of them changed.
        """
        saved = self.registers(tid)
        code = ctypes.create_string_buffer(2)
        processmemory.read(self.pid, saved["rip"] - 2, ctypes.addressof(code), 2)
        if code.raw != _INSTRUCTION:
            raise OSError(errno.EINVAL, f"thread {tid} did not come by a syscall instruction")
        before = {"rip": saved["rip"] - 2, "rax": nr, "orig_rax": (1 << 64) - 1}
        self.set_registers(tid, {**saved, **before, **changes})
        return saved

    def registers(self, tid: int) -> dict[str, int]:
        """The registers of a thread that is stopped, by their names."""
        buffer = ctypes.create_string_buffer(_REGISTERS.size)
        _ptrace(_GETREGS, tid, ctypes.addressof(buffer))
        return dict(zip(_NAMES, _REGISTERS.unpack(buffer.raw), strict=True))

    def set_registers(self, tid: int, regs: dict[str, int]) -> None:
        """Set all of them."""
        data = _REGISTERS.pack(*(regs[name] for name in _NAMES))
        buffer = ctypes.create_string_buffer(data, len(data))
        _ptrace(_SETREGS, tid, ctypes.addressof(buffer))


def _ptrace(request: int, tid: int, data: int = 0) -> None:
    check(libc.ptrace(request, tid, None, data), f"ptrace({request:#x}, {tid})")
