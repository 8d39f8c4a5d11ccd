# SPDX-License-Identifier: GPL-2.0-or-later
"""Another process tells when it unmaps or moves memory: events of its userfaultfd(2).

Its calls wait until the event was read (userfaultfd_event_wait_completion() of fs/userfaultfd.c),
when the page tables have changed already: what an mmu_notifier does for KVM can be done meanwhile.
Registered for write protection of nothing, no page fault ever waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from struct import Struct
from typing import Final

SYS_USERFAULTFD: Final = 323  # arch/x86/entry/syscalls/syscall_64.tbl
FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | 1  # UFFD_USER_MODE_ONLY, which needs no privilege
_UFFDIO_API: Final = 0xC018AA3F  # linux/userfaultfd.h
_UFFDIO_REGISTER: Final = 0xC020AA00
_API: Final = Struct("=QQQ")  # struct uffdio_api
_REGISTER: Final = Struct("=QQQQ")  # struct uffdio_register
_WRITE_PROTECT: Final = 2  # UFFDIO_REGISTER_MODE_WP, of shmem since Linux 5.19
# UFFD_FEATURE_PAGEFAULT_FLAG_WP, _EVENT_REMAP, _EVENT_UNMAP, _WP_HUGETLBFS_SHMEM
_FEATURES: Final = 1 << 0 | 1 << 2 | 1 << 6 | 1 << 12
_MESSAGE: Final = 32  # sizeof(struct uffd_msg)


class MapEvents:
    """The events of a process whose userfaultfd ``fd`` is, a duplicate that is now this object's.

    OSError, with ``fd`` closed, where the kernel has no such events.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            fcntl.ioctl(fd, _UFFDIO_API, bytearray(_API.pack(0xAA, _FEATURES, 0)))
        except OSError:
            os.close(fd)
            raise

    def register(self, address: int, length: int) -> None:
        """Tell of [address, address + length) of the process, shared memory; OSError."""
        request = bytearray(_REGISTER.pack(address, length, _WRITE_PROTECT, 0))
        fcntl.ioctl(self.fd, _UFFDIO_REGISTER, request)

    def let_go(self) -> None:
        """Let who waits longest go on: what it did has been seen to, what others did may not."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, _MESSAGE)

    def close(self) -> None:
        """No events any more; nobody waits."""
        os.close(self.fd)
