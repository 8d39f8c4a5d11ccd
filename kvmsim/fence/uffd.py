# SPDX-License-Identifier: GPL-2.0-or-later
"""The fence that the kernel keeps, by userfaultfd(2)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import select
import threading
from typing import Final

from kvmsim.fence.base import Fence, FenceError, Trespass, gaps
from kvmsim.fence.userfault import Userfault
from kvmsim.uapi import PAGE_SIZE
from privfs.notifier.wire import Fence as Kind

_TMPFS_MAGIC: Final = 0x01021994  # linux/magic.h
_STATFS_SIZE: Final = 120
_MLOCK_ONFAULT: Final = 1
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class UffdFence(Fence):
    """Puts ranges of shmem behind a userfaultfd; what it admits, it maps."""

    kind = Kind.UFFD

    def __init__(self, base: int) -> None:
        super().__init__(base)
        self._userfault = Userfault()
        self.fd = self._userfault.fd
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._touched: queue.SimpleQueue[tuple[Trespass, str] | None] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._keep, name="fence keeper", daemon=True)
        self._teller = threading.Thread(target=self._tell, name="fence teller", daemon=True)
        self._keeper.start()
        self._teller.start()

    def cover(self, address: int, length: int, memfd: int, on_trespass: Trespass) -> None:
        """Register the range, if it is of shmem; other kinds of memory are not fenced."""
        if not _is_shmem(memfd):
            return
        if is_swapped():
            # So that a page, once admitted, stays mapped until it is punched: the kernel takes
            # pages away to swap them out, and for userfaultfd that is as if they were nobody's.
            _libc.mlock2(address, length, _MLOCK_ONFAULT)
        with self._lock:
            self._userfault.register(address, length)
            self._add_cover(address, length, on_trespass)

    def admit(self, address: int, length: int) -> None:
        """Map the pages; FenceError if they are not there: they were punched, unasked."""
        with self._lock:
            for _, first, last in self._parts(address, length):
                for start, end in gaps(self._open, first, last):
                    try:
                        self._userfault.resume(self._address(start), (end - start) * PAGE_SIZE)
                    except OSError as error:
                        why = f"pages [{start:#x}, {end:#x}) of the arena: granted, but not there"
                        raise FenceError(error.errno or errno.EFAULT, why) from error
                self._open.add_range(first, last)

    def shut(self, address: int, length: int) -> None:
        """Admit them again before they are touched again; the owner's punch unmaps them."""
        with self._lock:
            self._open.remove_range(*self._pages(address, length))

    def close(self) -> None:
        """End the threads; let go of the userfaultfd."""
        self._touched.put(None)
        self._teller.join()
        os.eventfd_write(self._stop, 1)
        self._keeper.join()
        os.close(self._stop)
        self._userfault.close()

    # --- the threads ----------------------------------------------------------------------------

    def _tell(self) -> None:
        """Say what was touched. Who stops the sleeper waits for it, and it may sleep again."""
        while (touched := self._touched.get()) is not None:
            on_trespass, why = touched
            on_trespass(why)

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while all(fd != self._stop for fd, _ in poll.poll()):
            while (address := self._userfault.next_fault()) is not None:
                self._answer(address & -PAGE_SIZE)

    def _answer(self, address: int) -> None:
        """Map an admitted page again that the kernel took away; put nothing behind any other.

        Who sleeps at such a page can only go on with zeros of its own, and is stopped for it.
        """
        with self._lock:
            cover = self._cover_of(address)
            admitted = self._pages(address, 0)[0] in self._open
            if cover is not None and not (admitted and self._resumed(address)):
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
                rights = mmap.PROT_READ | mmap.PROT_WRITE
                _libc.mmap(address, PAGE_SIZE, rights, flags, -1, 0)
                self._open.add(self._pages(address, 0)[0])  # no grant will ever map it again
            else:
                cover = None
        self._userfault.wake(address, PAGE_SIZE)
        if cover is not None:
            page = self._pages(address, 0)[0]
            self._touched.put((cover[2], f"page {page:#x} of the arena was touched ungranted"))

    def _resumed(self, address: int) -> bool:
        try:
            self._userfault.resume(address, PAGE_SIZE)
        except OSError:
            return False
        return True


def is_swapped() -> bool:
    """Whether there is swap space."""
    with open("/proc/swaps") as file:
        return len(file.readlines()) > 1


def may_stay(address: int, length: int) -> bool:
    """Whether what is mapped stays mapped: nothing is swapped, or locking helps.

    Locking is tried on a range that nobody uses yet.
    """
    if not is_swapped():
        return True
    failed = _libc.mlock2(address, length, _MLOCK_ONFAULT)
    _libc.munlock(address, length)
    return not failed


def _is_shmem(memfd: int) -> bool:
    """Whether a memfd is of shmem: hugetlb has other pages, secretmem no userfaultfd."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.fstatfs(memfd, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"fstatfs of an extent: {os.strerror(code)}")
    return int.from_bytes(buffer.raw[:8], "little") == _TMPFS_MAGIC
