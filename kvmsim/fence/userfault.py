# SPDX-License-Identifier: GPL-2.0-or-later
"""userfaultfd(2): as much of it as a fence of shared memory takes.

A range is registered for missing and minor faults (Documentation/admin-guide/mm/userfaultfd.rst):
whoever touches a page of it that is not mapped sleeps, whether the file has the page or not, and
allocates nothing.  :meth:`Userfault.resume` maps what the file has.

Only faults of user mode sleep (UFFD_USER_MODE_ONLY, which needs no privilege).  What the kernel
touches on our behalf, process_vm_readv(2) or the rest of a read(2), gets EFAULT instead: a device
must not sleep, and an access that nobody waits for any more must not succeed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

_SYS_USERFAULTFD: Final = 323  # asm/unistd_64.h
_DEVICE: Final = "/dev/userfaultfd"  # Linux 6.1; for those whom seccomp denies the system call
_USERFAULTFD_IOC_NEW: Final = 0xAA00  # linux/userfaultfd.h
_UFFD_USER_MODE_ONLY: Final = 1
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_CONTINUE: Final = 0xC020AA07
_FEATURES: Final = 1 << 5 | 1 << 10  # UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_MINOR_SHMEM
_MODES: Final = 1 | 4  # UFFDIO_REGISTER_MODE_MISSING, _MINOR
_EVENT_PAGEFAULT: Final = 0x12

_API: Final = struct.Struct("=QQQ")  # struct uffdio_api
_REGISTER: Final = struct.Struct("=QQQQ")  # struct uffdio_register
_RANGE: Final = struct.Struct("=QQ")  # struct uffdio_range
_CONTINUE: Final = struct.Struct("=QQQq")  # struct uffdio_continue
_MESSAGE: Final = struct.Struct("=B7xQQ8x")  # struct uffd_msg of a page fault

_PAGE: Final = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class Userfault:
    """One userfaultfd of this process; OSError where the kernel has none that will do."""

    def __init__(self) -> None:
        self.fd = _open()
        try:
            fcntl.ioctl(self.fd, _UFFDIO_API, bytearray(_API.pack(_UFFD_API, _FEATURES, 0)))
        except OSError as error:
            os.close(self.fd)
            why = "userfaultfd without missing and minor faults of shmem"
            raise OSError(error.errno, why) from error

    def register(self, address: int, length: int) -> None:
        """Let every touch of an unmapped page of a shared, writable mapping of shmem sleep."""
        request = bytearray(_REGISTER.pack(address, length, _MODES, 0))
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, request)

    def resume(self, address: int, length: int) -> None:
        """Map what the file has there, in one call where nothing is mapped yet; wake sleepers.

        OSError EFAULT where the file has a hole; what lies before it is mapped then.
        """
        end = address + length
        while address < end:
            request = bytearray(_CONTINUE.pack(address, end - address, 0, 0))
            try:
                fcntl.ioctl(self.fd, _UFFDIO_CONTINUE, request)
            except OSError as error:
                if error.errno == errno.EEXIST:  # the first page is mapped already
                    address += _PAGE
                elif error.errno == errno.EAGAIN:  # it got as far as it says
                    address += max(_CONTINUE.unpack(request)[3], 0)
                else:
                    raise
            else:
                return

    def wake(self, address: int, length: int) -> None:
        """Let who sleeps in the range try again."""
        fcntl.ioctl(self.fd, _UFFDIO_WAKE, bytearray(_RANGE.pack(address, length)))

    def next_fault(self) -> int | None:
        """Return the address that somebody new sleeps at, None if there is nobody."""
        try:
            event, _, address = _MESSAGE.unpack(os.read(self.fd, _MESSAGE.size))
        except BlockingIOError:
            return None
        if event != _EVENT_PAGEFAULT:
            raise OSError(errno.EPROTO, f"userfaultfd event {event:#x} is no page fault")
        return int(address)

    def close(self) -> None:
        """Let go of it; the fence stands as long as anyone has a copy."""
        os.close(self.fd)


def _open() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
    fd: int = _libc.syscall(_SYS_USERFAULTFD, flags)
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise OSError(code, f"userfaultfd: {os.strerror(code)}") from None
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)
