# SPDX-License-Identifier: GPL-2.0-or-later
"""userfaultfd(2) by ctypes: as much as fencing a mapping of shared memory takes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass

_SYS_USERFAULTFD = 323  # x86-64
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_CONTINUE = 0xC020AA07
_MISSING_SHMEM = 1 << 5
_MINOR_SHMEM = 1 << 10
_MODE_MISSING, _MODE_MINOR = 1, 4
_EVENT_PAGEFAULT = 0x12
_MSG_SIZE = 32

_libc = ctypes.CDLL(None, use_errno=True)


def available() -> str:
    """Return why userfaultfd with minor faults on shared memory is not to be had, or ``""``."""
    try:
        os.close(open_fence())
    except OSError as error:
        return f"userfaultfd with MISSING and MINOR on shmem: {error.strerror}"
    return ""


def open_fence() -> int:
    """Open a userfaultfd that reports missing and minor faults of shared memory."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = _libc.syscall(_SYS_USERFAULTFD, flags)
    if fd < 0:
        fd = _libc.syscall(_SYS_USERFAULTFD, flags | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        api = bytearray(struct.pack("<QQQ", _UFFD_API, _MISSING_SHMEM | _MINOR_SHMEM, 0))
        fcntl.ioctl(fd, _UFFDIO_API, api)
    except BaseException:
        os.close(fd)
        raise
    return fd


def fence(fd: int, address: int, length: int) -> None:
    """Let every touch of an unmapped page of the range sleep until it is answered."""
    register = bytearray(struct.pack("<QQQQ", address, length, _MODE_MISSING | _MODE_MINOR, 0))
    fcntl.ioctl(fd, _UFFDIO_REGISTER, register)


def resume(fd: int, address: int, length: int) -> None:
    """Map what the file holds at the range (UFFDIO_CONTINUE) and wake who sleeps there."""
    fcntl.ioctl(fd, _UFFDIO_CONTINUE, bytearray(struct.pack("<QQQq", address, length, 0, 0)))


@dataclass(frozen=True, slots=True)
class Fault:
    """Somebody touched ``address`` and sleeps."""

    address: int


def read_fault(fd: int) -> Fault:
    """Read one event; BlockingIOError when there is none."""
    message = os.read(fd, _MSG_SIZE)
    event, address = message[0], struct.unpack_from("<Q", message, 16)[0]
    if event != _EVENT_PAGEFAULT:
        raise OSError(f"userfaultfd event {event:#x} is no page fault")
    return Fault(address)
