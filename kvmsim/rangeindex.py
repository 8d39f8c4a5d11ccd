# SPDX-License-Identifier: GPL-2.0-or-later
"""Which slots have pages of one thing, a file or a userspace memory: ranges that may overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from kvmsim.sortedkeys import SortedKeys


class RangeIndex:
    """Ranges of pages by first page, each with a slot id.

    A query looks at the ranges that begin less than the longest one's length before it: with
    equal ranges those are the ones that meet it.
    """

    __slots__ = ("_entries", "_longest")

    def __init__(self) -> None:
        self._entries: SortedKeys[tuple[int, int, int]] = SortedKeys()  # first page, slot, pages
        self._longest = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        """The slot ids, by first page."""
        return (slot for _, slot, _ in self._entries)

    def add(self, first: int, npages: int, slot: int) -> None:
        """Slot ``slot`` has pages [first, first + npages)."""
        self._entries.add((first, slot, npages))
        self._longest = max(self._longest, npages)

    def remove(self, first: int, npages: int, slot: int) -> None:
        """It has them no more."""
        try:
            self._entries.remove((first, slot, npages))
        except KeyError:
            what = f"pages [{first:#x}, {first + npages:#x}) of slot {slot}"
            raise KeyError(what) from None

    def meeting(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The slots with any of pages [start, end): (slot, first page, page after the last)."""
        for first, slot, npages in self._entries.since((start - self._longest + 1, -1, 0)):
            if first >= end:
                return
            lower, upper = max(start, first), min(end, first + npages)
            if lower < upper:
                yield slot, lower, upper

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)()
        twin._entries, twin._longest = self._entries.copy(), self._longest
        return twin
