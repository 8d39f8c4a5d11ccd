# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages from shmem: the store that every machine has.

A range whose fallocate fails is undone as a whole (shmem_fallocate in mm/shmem.c).  Whether shmem
uses transparent huge pages is the machine's decision alone: memfds lie on a tmpfs of the kernel's
own, which has no option but /sys/kernel/mm/transparent_hugepage/shmem_enabled.  Where it does, one
page asked for is a huge page got: more is held, and shown as touched, than any file accounts for.
So such a machine is asked for whole huge pages (``pagesize=2M``), which are right on every machine.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from privfs.backing.store import MemfdStore, StoreError, text
from privfs.extents import MAX_PAGES, PAGE_SIZE

HUGE_PAGE_SIZE: Final = 2 << 20
SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
#: What it may say that lets fallocate use huge pages (shmem_huge_global_enabled).
_UNASKED: Final = frozenset({"always", "within_size", "force"})


class Shmem(MemfdStore):
    """Ordinary memfds, in pieces of ``page_size`` bytes: 4 KiB, or 2 MiB."""

    name: str = "shmem"
    undoes: int = MAX_PAGES * PAGE_SIZE
    locates: bool = True
    advice: Mapping[int, str] = {
        errno.ENOMEM: "free memory, or raise the memory limit of the daemon's cgroup",
        errno.ENOSPC: "free memory, or allow more overcommit (vm.overcommit_memory)",
    }

    def __init__(self, page_size: int = PAGE_SIZE) -> None:
        if page_size not in (PAGE_SIZE, HUGE_PAGE_SIZE):
            raise StoreError(
                errno.EINVAL,
                f"pagesize={text(page_size)}: shmem has pages of {text(PAGE_SIZE)}, or of "
                f"{text(HUGE_PAGE_SIZE)}",
            )
        self.page_size = page_size

    def require_exact(self) -> None:
        """Raise StoreError where the machine would hand out more than what is asked for."""
        setting = huge_setting()
        if self.page_size < HUGE_PAGE_SIZE and setting in _UNASKED:
            raise StoreError(
                errno.EOPNOTSUPP,
                f"this machine takes a huge page of {text(HUGE_PAGE_SIZE)} for every page of shmem "
                f"({setting}); mount with -o pagesize={text(HUGE_PAGE_SIZE)}, or as root: "
                f"echo advise > {SETTING}",
            )

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


def huge_setting() -> str:
    """Return when shmem uses huge pages, in the kernel's word; ``never`` where it cannot."""
    try:
        words = SETTING.read_text().split()
    except OSError:
        return "never"  # a kernel without CONFIG_TRANSPARENT_HUGEPAGE
    return next(word[1:-1] for word in words if word.startswith("["))
