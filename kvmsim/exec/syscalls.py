# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls that Python has no way to: seccomp, ptrace, mounts, descriptors of others."""

from __future__ import annotations

import ctypes
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


def check(result: int, what: str) -> int:
    """Return the result of a call, or raise OSError from errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


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


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    check(libc.umount2(target.encode(), flags), f"umount {target}")


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(libc.unshare(flags), "unshare")
