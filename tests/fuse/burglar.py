# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way into another process that Linux offers to its own user: ``burglar.py PID ADDRESS``.

Prints one JSON object: attack → the errnos that it met, empty if it got in.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Final

_SYS_PIDFD_GETFD: Final = 438  # asm/unistd_64.h
_PTRACE_SEIZE: Final = 0x4206
_FDS: Final = 128
_WORD: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _any_fd(attack: Callable[[int], int]) -> None:
    """Try every descriptor; raise what all of them said."""
    said: set[int] = set()
    for number in range(_FDS):
        try:
            os.close(attack(number))
            return
        except OSError as error:
            said.add(error.errno or 0)
    raise ExceptionGroup("no descriptor", [OSError(code, os.strerror(code)) for code in said])


def _pidfd_getfd(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        _any_fd(lambda number: _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)))
    finally:
        os.close(pidfd)


def _mem(pid: int, address: int) -> None:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        memory.read(_WORD)


def _process_vm_readv(pid: int, address: int) -> None:
    buffer = ctypes.create_string_buffer(_WORD)
    here, there = _Iovec(ctypes.addressof(buffer), _WORD), _Iovec(address, _WORD)
    _check(_libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))


def _read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(_WORD)


def attacks(pid: int, address: int) -> dict[str, Callable[[], object]]:
    """Return all of them; ``address`` is mapped in a target that lets us in."""
    proc = f"/proc/{pid}"
    flags = os.O_RDONLY | os.O_NONBLOCK
    return {
        "list of descriptors": lambda: os.listdir(f"{proc}/fd"),
        "descriptors through /proc": lambda: _any_fd(lambda n: os.open(f"{proc}/fd/{n}", flags)),
        "descriptors by pidfd_getfd": lambda: _pidfd_getfd(pid),
        "mem": lambda: _mem(pid, address),
        "process_vm_readv": lambda: _process_vm_readv(pid, address),
        "maps": lambda: _read(f"{proc}/maps"),
        "map_files": lambda: os.listdir(f"{proc}/map_files"),
        "environ": lambda: _read(f"{proc}/environ"),
        "ptrace": lambda: _check(_libc.ptrace(_PTRACE_SEIZE, pid, None, None)),  # stays: the last
    }


def outcome(attack: Callable[[], object]) -> list[str]:
    """Make an attack; return the names of the errnos that it met."""
    try:
        attack()
    except OSError as error:
        return [errno.errorcode[error.errno or 0]]
    except ExceptionGroup as group:
        return sorted(errno.errorcode[e.errno] for e in group.exceptions)  # type: ignore[attr-defined]
    return []


if __name__ == "__main__":
    made = attacks(int(sys.argv[1]), int(sys.argv[2], 0))
    print(json.dumps({name: outcome(attack) for name, attack in made.items()}))
