# SPDX-License-Identifier: GPL-2.0-or-later
"""The fence that a process makes for itself, by mprotect(2)."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from pathlib import Path
from typing import Final

from kvmsim.fence.base import Cover, Fence, FenceError, Trespass, count_runs
from kvmsim.uapi import PAGE_SIZE
from privfs.notifier.wire import Fence as Kind

log = logging.getLogger(__name__)

#: Mappings that the process needs for all else.
_HEADROOM: Final = 4096
_PROT_NONE: Final = 0
_PROT_ALL: Final = mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MprotectFence(Fence):
    """PROT_NONE where nothing is admitted; ``max_runs`` bounds the runs of pages that are."""

    kind = Kind.MPROTECT

    def __init__(self, base: int, max_runs: int = 0) -> None:
        super().__init__(base)
        self._max_runs = max_runs or max((_max_map_count() - _HEADROOM) // 2, 1)
        self._runs = 0

    @property
    def runs(self) -> int:
        """Runs of admitted pages: each costs two mappings."""
        return self._runs

    def cover(self, address: int, length: int, memfd: int, on_trespass: Trespass) -> None:
        """Take all rights to the range."""
        with self._lock:
            self._protect(*self._pages(address, length), _PROT_NONE)
            self._add_cover(address, length, on_trespass)

    def uncover(self, address: int, length: int) -> None:
        """Forget a range; something else is mapped there by now."""
        with self._lock:
            self._forget(*self._pages(address, length))
        super().uncover(address, length)

    def admit(self, address: int, length: int) -> None:
        """Give the rights to pages; all of their mapping's, for good, where that is too much."""
        with self._lock:
            for cover, first, last in self._parts(address, length):
                if self._open.contains_range(first, last):
                    continue
                # they join what lies beside and between them
                more = 1 - count_runs(self._open, max(first - 1, 0), last + 1)
                if self._runs + more > self._max_runs:
                    self._give_up(cover)
                    continue
                self._protect(first, last, _PROT_ALL)
                self._open.add_range(first, last)
                self._runs += more

    def shut(self, address: int, length: int) -> None:
        """Take the rights back."""
        with self._lock:
            for _, first, last in self._parts(address, length):
                if count_runs(self._open, first, last):
                    self._protect(first, last, _PROT_NONE)
                    self._forget(first, last)

    def _give_up(self, cover: Cover) -> None:
        start, end, _ = cover
        log.warning(
            "granted pages lie in more than %d pieces: %d MiB of the arena are not fenced any "
            "more; sysctl -w vm.max_map_count=1048576 allows more", self._max_runs,
            (end - start) >> 20,
        )  # fmt: skip
        pages = self._pages(start, end - start)
        self._protect(*pages, _PROT_ALL)
        self._forget(*pages)
        self._covered.remove(cover)

    def _forget(self, first: int, last: int) -> None:
        around = max(first - 1, 0), last + 1
        before = count_runs(self._open, *around)
        self._open.remove_range(first, last)
        self._runs += count_runs(self._open, *around) - before

    def _protect(self, first: int, last: int, rights: int) -> None:
        length = (last - first) * PAGE_SIZE
        if _libc.mprotect(self._address(first), length, rights) != 0:
            code = ctypes.get_errno()
            raise FenceError(code, f"mprotect of {length} bytes of the arena: {os.strerror(code)}")


def _max_map_count() -> int:
    return int(Path("/proc/sys/vm/max_map_count").read_text())
