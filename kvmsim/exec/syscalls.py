# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that Python has no way to: seccomp, ptrace, mounts, and another process's memory."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

libc: Final = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

SYS_SECCOMP: Final = 317  # arch/x86/entry/syscalls/syscall_64.tbl
SYS_PIDFD_GETFD: Final = 438
CLONE_NEWNS: Final = 0x00020000  # linux/sched.h
CLONE_NEWUSER: Final = 0x10000000


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int, ctypes.POINTER(_Iovec), ctypes.c_ulong,
        ctypes.POINTER(_Iovec), ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip


def check(result: int, what: str) -> int:
    """Return the result of a call, or raise OSError from errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def read_memory(pid: int, address: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    """process_vm_readv(2): how many bytes there were; OSError."""
    return _copy("process_vm_readv", pid, address, buffer)


def write_memory(pid: int, address: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    """process_vm_writev(2): how many bytes went; OSError."""
    return _copy("process_vm_writev", pid, address, buffer)


def _copy(call: str, pid: int, address: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    if not 0 <= address < 1 << 64:
        raise OSError(errno.EFAULT, f"{call}: {address:#x} is no address")
    local = _Iovec(ctypes.addressof(buffer), len(buffer))
    remote = _Iovec(address, len(buffer))
    done = getattr(libc, call)(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return check(done, call)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A duplicate of another process's descriptor; OSError."""
    return check(libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0), f"pidfd_getfd({number})")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    done = libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags),
        data.encode() or None,
    )  # fmt: skip
    check(done, f"mount {target}")


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(libc.unshare(flags), "unshare")
