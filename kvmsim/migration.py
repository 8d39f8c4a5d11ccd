# SPDX-License-Identifier: GPL-2.0-or-later
"""Which host-physical pages became which others, when the memory of a file has moved.

The owner tells nobody where its memory lies; it takes an extent away (INVALIDATE, reason MOVE) and
hands out another at the next access.  The host-physical address of a page is its place in the
arena, so the two addresses of one page are known here first: what a table of the hardware that
names pages by their addresses must be told (TDH.MEM.PAGE.RELOCATE, SNP_PAGE_MOVE).

Units: file pages in half-open ranges, host-physical addresses in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from kvmsim.uapi import PAGE_SIZE

# include/linux/memfile_notifier.h of "KVM: mm: fd-based approach …" v7
MEMFILE_F_USER_INACCESSIBLE: Final = 1 << 0
MEMFILE_F_UNMOVABLE: Final = 1 << 1
MEMFILE_F_UNRECLAIMABLE: Final = 1 << 2

#: What KVM wants its memory to be, and what remains where moves are welcome.
UNMOVABLE: Final = MEMFILE_F_USER_INACCESSIBLE | MEMFILE_F_UNMOVABLE | MEMFILE_F_UNRECLAIMABLE
MOVABLE: Final = UNMOVABLE & ~MEMFILE_F_UNMOVABLE


class Migration(NamedTuple):
    """File pages ``[start, end)`` were at ``old_hpa`` and are at ``new_hpa``, bytes unchanged."""

    file: int
    start: int
    end: int
    old_hpa: int
    new_hpa: int


class Migrations:
    """What has left its old place and has not come to its new one."""

    __slots__ = ("_away",)

    def __init__(self) -> None:
        self._away: dict[int, list[tuple[int, int, int]]] = {}  #: file → (start, end, old hpa)

    def left(self, file: int, start: int, end: int, hpa: int) -> None:
        """Pages were at ``hpa`` until now, and will be somewhere else."""
        self.freed(file, start, end)
        self._away.setdefault(file, []).append((start, end, hpa))

    def arrived(self, file: int, start: int, end: int, hpa: int) -> Iterator[Migration]:
        """Yield what of ``[start, end)``, now at ``hpa``, was somewhere else before."""
        found = [
            Migration(
                file, low, high, old + (low - first) * PAGE_SIZE, hpa + (low - start) * PAGE_SIZE
            )
            for first, last, old in self._away.get(file, ())
            if (low := max(start, first)) < (high := min(end, last))
        ]
        self.freed(file, start, end)
        yield from found

    def freed(self, file: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """These pages are given back: those that come in their place are others.

        Returns (hpa, bytes) of where they were.
        """
        kept: list[tuple[int, int, int]] = []
        gone: list[tuple[int, int]] = []
        for first, last, hpa in self._away.pop(file, ()):
            low, high = min(max(start, first), last), max(min(end, last), first)
            if low < high:
                gone.append((hpa + (low - first) * PAGE_SIZE, (high - low) * PAGE_SIZE))
            if first < min(start, last):
                kept.append((first, min(start, last), hpa))
            if max(end, first) < last:
                kept.append((max(end, first), last, hpa + (max(end, first) - first) * PAGE_SIZE))
        if kept:
            self._away[file] = kept
        return tuple(gone)

    def forget(self, file: int) -> tuple[tuple[int, int], ...]:
        """A file is used no more. Returns (hpa, bytes) of what had not come to its new place."""
        away = self._away.pop(file, ())
        return tuple((hpa, (end - start) * PAGE_SIZE) for start, end, hpa in away)
