# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that the kernel itself does not map: memfd_secret(2), one for each chunk of a file.

A page of it is taken out of the kernel's direct map, is never swapped or migrated, and cannot be
pinned: no way into it leads through the kernel (mem, process_vm_readv, O_DIRECT, /proc/kcore).
The price (mm/secretmem.c): it takes no seals, cannot be punched, and is given a size only once.
So an extent is one chunk, which comes and goes whole: every page of it is touched when it is
allocated, and it ends when the last descriptor and the last mapping of it have gone.  The kernel
zeroes a page before it hands it to anybody else (secretmem_free_folio).  A user that keeps what it
promised to let go keeps that memory, but sees nothing that anyone else puts anywhere: a new
allocation is a new memfd.

Every mapping counts as locked memory of the process that has it (secretmem_mmap), up to its
RLIMIT_MEMLOCK unless it has CAP_IPC_LOCK.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Final

from privfs.backing.store import Promise, StoreError, text
from privfs.extents import PAGE_SIZE, SMALL_EXTENT_PAGES, Layout

SMALLEST: Final = 2 << 20
LARGEST: Final = SMALL_EXTENT_PAGES * PAGE_SIZE
#: Bytes that the owner maps at a time, all of its threads together.
WINDOW: Final = 1 << 20
_SYS_MEMFD_SECRET: Final = 447  # asm/unistd_64.h
_SYS_CACHESTAT: Final = 451

#: What mends it when no chunk can be had.
REMEDIES: Final[Mapping[int, str]] = {
    errno.ENOSYS: "boot with secretmem.enable=1 (the default since Linux 6.5), on a kernel with "
    "CONFIG_SECRETMEM",
    errno.EPERM: "allow memfd_secret in the seccomp profile",
    errno.EAGAIN: f"ulimit -l {WINDOW >> 10} (RLIMIT_MEMLOCK; LimitMEMLOCK= of a service)",
    errno.ENOMEM: "free memory, or raise the memory limit of the daemon's cgroup",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class Secretmem:
    """memfd_secrets of ``page_size`` bytes each, a power of two from 2 MiB to 64 MiB."""

    name: str = "secretmem"
    promises: frozenset[Promise] = frozenset()
    read_only: bool = False  # /proc/self/fd/N cannot be opened again: ENXIO
    pooled: bool = False
    prompt: int = 64 << 10  # 5 to 15 us a page: each leaves the direct map of every CPU
    locates: bool = True
    advice: Mapping[int, str] = REMEDIES
    #: secretmem_migrate_folio answers EBUSY; a copy of ours would pass through mapped memory.
    fixed: str = "the kernel never moves secret memory, and neither do we"

    def __init__(self, page_size: int = SMALLEST) -> None:
        if not SMALLEST <= page_size <= LARGEST or page_size & (page_size - 1):
            raise StoreError(
                errno.EINVAL,
                f"pagesize={text(page_size)}: secretmem comes in chunks of {text(SMALLEST)} to "
                f"{text(LARGEST)}, in powers of two",
            )
        self.page_size = self.undoes = page_size
        self.layout = Layout(page_size // PAGE_SIZE, 0, whole=True)
        self._lock = threading.Lock()  # held while a window is mapped: RLIMIT_MEMLOCK

    def create(self, name: str, size: int) -> int:
        """Return a new memfd_secret of ``size`` bytes, all holes; it bears no name.  OSError."""
        fd: int = _libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Give a range memory by touching it; what has some keeps its contents.  OSError."""
        sink = os.memfd_create("privfs:touch", os.MFD_CLOEXEC)
        try:
            for window in range(offset, offset + length, WINDOW):
                with self._lock:
                    _touch(fd, window, min(WINDOW, offset + length - window), sink)
        finally:
            os.close(sink)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Refuse: secretmem has no fallocate(2)."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        """Refuse: it is ``fixed``."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def end(self, fd: int) -> None:
        """Do nothing: the memory goes with the last descriptor, of which ``fd`` is ours."""

    def held(self, fd: int) -> int:
        """Return the bytes of memory that the memfd holds (st_blocks is always 0).  OSError."""
        counted = _cached_pages(fd)
        if counted is None:
            return sum(last - first for first, last in self._resident(fd))
        return counted * PAGE_SIZE

    def touched(self, fd: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges that hold memory, ascending.  OSError."""
        size = os.fstat(fd).st_size
        if _cached_pages(fd) == size // PAGE_SIZE:
            yield 0, size  # as it should be, and told twenty times as fast
        else:
            yield from self._resident(fd)

    def _resident(self, fd: int) -> Iterator[tuple[int, int]]:
        size = os.fstat(fd).st_size
        resident = bytearray()
        for window in range(0, size, WINDOW):
            with self._lock, mmap.mmap(fd, min(WINDOW, size - window), offset=window) as memory:
                resident += _resident(memory)
        end = 0
        while (start := resident.find(1, end)) >= 0:
            end = resident.find(0, start)
            end = len(resident) if end < 0 else end
            yield start * PAGE_SIZE, end * PAGE_SIZE

    def require_works(self) -> None:
        """Raise StoreError unless a chunk can be had now.  Tried, then given back."""
        try:
            fd = self.create("privfs:trial", self.page_size)
            try:
                self.allocate(fd, 0, self.page_size)
            finally:
                os.close(fd)
        except OSError as error:
            code = error.errno or errno.EIO
            raise StoreError(
                code,
                f"no secret memory can be had ({os.strerror(code)})"
                + (f"; {REMEDIES[code]}" if code in REMEDIES else ""),
            ) from error


def _cached_pages(fd: int) -> int | None:
    """Return how many pages a memfd_secret holds, by cachestat(2); None before Linux 6.5."""
    found = (ctypes.c_uint64 * 5)()  # struct cachestat: nr_cache is the first
    everything = (ctypes.c_uint64 * 2)(0, 0)  # struct cachestat_range
    if _libc.syscall(_SYS_CACHESTAT, fd, everything, found, 0) != 0:
        return None
    return int(found[0])


def _resident(memory: mmap.mmap) -> bytes:
    """Return a byte for each page: 1 if it is there."""
    anchor = ctypes.c_char.from_buffer(memory)
    found = ctypes.create_string_buffer(len(memory) // PAGE_SIZE)
    failed = _libc.mincore(ctypes.addressof(anchor), len(memory), found)
    del anchor  # or the mapping could not be closed
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return bytes(byte & 1 for byte in found.raw)


def _touch(fd: int, offset: int, length: int, sink: int) -> None:
    """Let the kernel read a byte of every page that is not there; raises OSError.

    It cannot be asked to populate such a mapping (EFAULT), and what runs out of memory in our own
    load would end the process; in a system call it is an error.
    """
    with mmap.mmap(fd, length, offset=offset) as memory, memoryview(memory) as view:
        absent = [page * PAGE_SIZE for page, there in enumerate(_resident(memory)) if not there]
        bytes_ = [view[start : start + 1] for start in absent]
        try:
            if bytes_ and os.pwritev(sink, bytes_, 0) != len(bytes_):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
        finally:
            for byte in bytes_:
                byte.release()
