# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls of x86-64 by number, so that no library stands between a probe and the kernel.

glibc would help: it emulates posix_fallocate, refuses bad arguments itself and retries.  Numbers
are those of ``arch/x86/entry/syscalls/syscall_64.tbl``.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class Nr(enum.IntEnum):
    """System call numbers."""

    READ = 0
    WRITE = 1
    LSEEK = 8
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    IOCTL = 16
    PREAD64 = 17
    PWRITE64 = 18
    READV = 19
    WRITEV = 20
    MSYNC = 26
    MINCORE = 27
    MADVISE = 28
    SENDFILE = 40
    FCNTL = 72
    FLOCK = 73
    FSYNC = 74
    FDATASYNC = 75
    TRUNCATE = 76
    FTRUNCATE = 77
    GETDENTS = 78
    FCHDIR = 81
    UNLINK = 87
    CHMOD = 90
    FCHMOD = 91
    FCHOWN = 93
    FSTATFS = 138
    MLOCK = 149
    SWAPON = 167
    READAHEAD = 187
    FSETXATTR = 190
    FGETXATTR = 193
    FLISTXATTR = 196
    FREMOVEXATTR = 199
    IO_SETUP = 206
    IO_DESTROY = 207
    IO_GETEVENTS = 208
    IO_SUBMIT = 209
    REMAP_FILE_PAGES = 216
    FADVISE64 = 221
    MBIND = 237
    INOTIFY_INIT1 = 294
    INOTIFY_ADD_WATCH = 254
    FCHOWNAT = 260
    LINKAT = 265
    SPLICE = 275
    TEE = 276
    SYNC_FILE_RANGE = 277
    VMSPLICE = 278
    UTIMENSAT = 280
    FALLOCATE = 285
    PREADV = 295
    PWRITEV = 296
    FANOTIFY_INIT = 300
    FANOTIFY_MARK = 301
    NAME_TO_HANDLE_AT = 303
    OPEN_BY_HANDLE_AT = 304
    SYNCFS = 306
    PROCESS_VM_READV = 310
    EXECVEAT = 322
    USERFAULTFD = 323
    COPY_FILE_RANGE = 326
    PREADV2 = 327
    PWRITEV2 = 328
    STATX = 332
    IO_URING_SETUP = 425
    IO_URING_ENTER = 426
    OPEN_TREE = 428
    OPENAT2 = 437
    PIDFD_GETFD = 438
    LANDLOCK_CREATE_RULESET = 444
    LANDLOCK_ADD_RULE = 445
    CACHESTAT = 451
    FILE_GETATTR = 468


Argument = int | bytes | ctypes.Array[ctypes.c_char] | ctypes.Structure | None


def call(number: Nr, *arguments: Argument) -> int:
    """Make one system call; return its result or raise OSError.  Integers wrap to 64 bits."""
    passed: list[object] = []
    for argument in arguments:
        if isinstance(argument, int):
            passed.append(ctypes.c_ulong(argument & (1 << 64) - 1))
        elif isinstance(argument, ctypes.Structure):
            passed.append(ctypes.byref(argument))
        else:
            passed.append(argument)
    ctypes.set_errno(0)
    result = int(_syscall(ctypes.c_long(number), *passed))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{number.name}: {os.strerror(code)}")
    return result


def errno_name(code: int) -> str:
    """Return the name of an errno as the manuals write it."""
    return errno.errorcode.get(code, f"errno {code}").replace("ENOTSUP", "EOPNOTSUPP")


class IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def iovec(buffer: ctypes.Array[ctypes.c_char]) -> IoVec:
    """Return one vector over all of ``buffer``."""
    return IoVec(ctypes.addressof(buffer), len(buffer))


def buffer(size: int) -> ctypes.Array[ctypes.c_char]:
    """Return a writable buffer."""
    return ctypes.create_string_buffer(size)
