# SPDX-License-Identifier: GPL-2.0-or-later
"""Which slots have pages of one thing, a file or a userspace memory: ranges that may overlap."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Self


class RangeIndex:
    """Ranges of pages by first page, each with a slot id.

    A query looks at the ranges that begin less than the longest one's length before it: with
    equal ranges those are the ones that meet it.
    """

    __slots__ = ("_entries", "_longest")

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, int]] = []  # first page, slot id, pages
        self._longest = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        """The slot ids, by first page."""
        return (slot for _, slot, _ in self._entries)

    def add(self, first: int, npages: int, slot: int) -> None:
        """Slot ``slot`` has pages [first, first + npages)."""
        insort(self._entries, (first, slot, npages))
        self._longest = max(self._longest, npages)

    def remove(self, first: int, npages: int, slot: int) -> None:
        """It has them no more."""
        at = bisect_left(self._entries, (first, slot, npages))
        if self._entries[at : at + 1] != [(first, slot, npages)]:
            raise KeyError(f"pages [{first:#x}, {first + npages:#x}) of slot {slot}")
        del self._entries[at]

    def meeting(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The slots with any of pages [start, end): (slot, first page, page after the last)."""
        at = bisect_left(self._entries, (start - self._longest + 1, -1, 0))
        while at < len(self._entries) and self._entries[at][0] < end:
            first, slot, npages = self._entries[at]
            lower, upper = max(start, first), min(end, first + npages)
            if lower < upper:
                yield slot, lower, upper
            at += 1

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)()
        twin._entries, twin._longest = self._entries.copy(), self._longest
        return twin
