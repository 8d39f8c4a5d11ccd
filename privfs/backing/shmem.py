# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of 4 KiB from shmem: the store that every machine has.

A range whose fallocate fails is undone as a whole (shmem_fallocate in mm/shmem.c).  Whether shmem
uses transparent huge pages for it is the machine's decision alone
(/sys/kernel/mm/transparent_hugepage/shmem_enabled): memfds have no option for it, and the contract
is the same, since a punched part of a huge page is split off.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping

from privfs.backing.store import MemfdStore
from privfs.extents import MAX_PAGES, PAGE_SIZE


class Shmem(MemfdStore):
    """Ordinary memfds."""

    name: str = "shmem"
    page_size: int = PAGE_SIZE
    undoes: int = MAX_PAGES * PAGE_SIZE
    locates: bool = True
    advice: Mapping[int, str] = {
        errno.ENOMEM: "free memory, or raise the memory limit of the daemon's cgroup",
        errno.ENOSPC: "free memory, or allow more overcommit (vm.overcommit_memory)",
    }

    def touched(self, fd: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges that users have touched, ascending.

        By SEEK_DATA and SEEK_HOLE (lseek(2)). A page that was allocated but never touched counts
        as a hole there (mapping_seek_hole_data skips folios that are not uptodate, mm/filemap.c);
        allocated a second time, it counts as touched (SGP_FALLOC clears it, shmem_get_folio_gfp).
        """
        end = 0
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, end
