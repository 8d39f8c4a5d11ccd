# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest pages an engine holds translated code of.

Translated code outlives the content of its page, so a zap of such a page must drop it. Dropping
all of it costs tens of microseconds and as much again to translate anew, and most zaps are of
data: so the engine says where it translates, and only a zap of one of these pages counts.

A host that stores to guest memory says nothing. Where that has to be seen, pages are summed when
code of them is translated, and again when someone asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

PAGE_SHIFT = 12
MANY = 32

Sum: TypeAlias = Callable[[int], int | None]
"""Checksum of a guest-physical page, by number; None: it cannot be read."""


class CodePages:
    """Guest-physical pages of translated code; every page, once one could not be found out."""

    def __init__(self) -> None:
        self._pages: set[int] = set()
        self._unknown = False
        self._sum: Sum | None = None
        self._sums: dict[int, int | None] = {}
        self._mixed = False  # a page changed between two translations of it

    def watch(self, sum: Sum) -> None:
        """Keep sums from now on; what was translated before is of unknown content."""
        self._sum = sum
        self._mixed = self._mixed or bool(self._pages)

    def note(self, translate: Callable[[int], int | None], address: int, size: int) -> None:
        """Code of ``size`` bytes at linear ``address`` was translated.

        ``translate`` gives the guest-physical address of a linear one, None if it cannot.
        """
        last = address + max(size, 1) - 1
        for linear in {address >> PAGE_SHIFT, last >> PAGE_SHIFT}:
            gpa = translate(linear << PAGE_SHIFT)
            if gpa is None:
                self._unknown = True
                continue
            page = gpa >> PAGE_SHIFT
            self._pages.add(page)
            if self._sum is not None:
                now = self._sum(page)
                self._mixed = self._mixed or self._sums.get(page, now) != now
                self._sums[page] = now

    def changed(self) -> bool:
        """Whether any page is not what it was when code of it was translated.

        Not looked at where code is of more than `MANY` pages: that would take too long.
        """
        if self._mixed or self._sum is None or len(self._sums) > MANY:
            return self._mixed
        return any(self._sum(page) != before for page, before in self._sums.items())

    def touched_by(self, zapped: Iterable[tuple[int, int]]) -> bool:
        """Whether a zap of these (gpa, npages) ranges took the page of any translated code."""
        if self._unknown:
            return True
        for gpa, npages in zapped:
            first = gpa >> PAGE_SHIFT
            if npages < len(self._pages):
                if any(page in self._pages for page in range(first, first + npages)):
                    return True
            elif any(first <= page < first + npages for page in self._pages):
                return True
        return False

    def clear(self) -> None:
        """All translated code is gone."""
        self._pages.clear()
        self._sums.clear()
        self._unknown = self._mixed = False
