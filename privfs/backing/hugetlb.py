# SPDX-License-Identifier: GPL-2.0-or-later
"""Huge pages from the pools of hugetlbfs(5): reserved by the administrator, never split.

hugetlbfs_fallocate (fs/hugetlbfs/inode.c) rounds an allocation out to whole huge pages and only
zeroes what a punch leaves of them; so everything that comes here is whole ones, and a file on this
store refuses the rest.  Its seek is generic_file_llseek: nobody can ask which pages are there,
only how many (st_blocks).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from privfs.backing.store import MemfdStore, StoreError, text
from privfs.extents import PAGE_SIZE, SMALL_EXTENT_PAGES

_MFD_HUGETLB: Final = 4  # linux/memfd.h
_MFD_HUGE_SHIFT: Final = 26
POOLS: Final = Path("/sys/kernel/mm/hugepages")
DEFAULT_PAGE_SIZE: Final = 2 << 20


class Hugetlb(MemfdStore):
    """memfds of huge pages of ``page_size`` bytes."""

    name: str = "hugetlb"
    locates: bool = False
    pooled: bool = True

    def __init__(self, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        check_page_size(page_size)
        self.page_size = page_size
        # A fallocate that fails part-way keeps what it got: one huge page at a time tells how many.
        self.undoes = page_size
        self._flags = _MFD_HUGETLB | (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
        room = f"free huge pages, or enlarge the pool: {enlarge(page_size)}"
        self.advice: Mapping[int, str] = {errno.ENOSPC: room, errno.ENOMEM: room}

    def touched(self, fd: int) -> Iterator[tuple[int, int]]:
        """Yield nothing: hugetlbfs does not say."""
        return iter(())

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        """Copy a range; hugetlbfs has no write(2), so the new one is mapped.  OSError."""
        with mmap.mmap(target, length, offset=offset) as memory, memoryview(memory) as view:
            done = 0
            while done < length:
                with view[done:] as rest:
                    copied = os.preadv(source, [rest], offset + done)
                if not copied:
                    raise OSError(errno.EIO, "a user has cut the extent short")
                done += copied

    def require_pool(self) -> None:
        """Raise StoreError unless a huge page can be had now.  Tried, then given back."""
        try:
            fd = self.create("privfs:trial", self.page_size)
            try:
                self.allocate(fd, 0, self.page_size)
            finally:
                os.close(fd)
        except OSError as error:
            raise StoreError(
                error.errno,
                f"no huge page of {text(self.page_size)} can be had ({error.strerror}); "
                f"reserve some: {enlarge(self.page_size)}",
            ) from error


def check_page_size(page_size: int) -> None:
    """Raise StoreError unless extents can be made of pages of so many bytes here."""
    most = SMALL_EXTENT_PAGES * PAGE_SIZE
    if page_size > most:
        raise StoreError(
            errno.EINVAL,
            f"pagesize={text(page_size)}: memory comes in extents from {text(most)} on, which no "
            f"larger page fits into",
        )
    if not _pool(page_size).is_dir():
        known = sorted(int(p.name.split("-")[1][:-2]) << 10 for p in POOLS.glob("hugepages-*kB"))
        kinds = ", ".join(text(size) for size in known if size <= most) or "none"
        raise StoreError(
            errno.EINVAL, f"pagesize={text(page_size)}: this kernel has huge pages of: {kinds}"
        )


def pool_bytes(page_size: int) -> int:
    """Return what a pool may hold in all, used or not; it may add pages up to its overcommit."""
    pool = _pool(page_size)
    counts = [(pool / name).read_text() for name in ("nr_hugepages", "nr_overcommit_hugepages")]
    return sum(map(int, counts)) * page_size


def enlarge(page_size: int) -> str:
    """Return the command that enlarges a pool."""
    meminfo = Path("/proc/meminfo").read_text()
    if f"Hugepagesize: {page_size >> 10:>10} kB" in meminfo:  # the one that the sysctl is about
        return "sysctl -w vm.nr_hugepages=N"
    return f"echo N > {_pool(page_size)}/nr_hugepages"


def _pool(page_size: int) -> Path:
    return POOLS / f"hugepages-{page_size >> 10}kB"
