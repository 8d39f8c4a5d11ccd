# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest pages an engine holds translated code of.

Translated code outlives the content of its page, so a zap of such a page must drop it. Dropping
all of it costs tens of microseconds and as much again to translate anew, and most zaps are of
data: so the engine says where it translates, and only a zap of one of these pages counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

PAGE_SHIFT = 12


class CodePages:
    """Guest-physical pages of translated code; every page, once one could not be found out."""

    def __init__(self) -> None:
        self._pages: set[int] = set()
        self._unknown = False

    def note(self, translate: Callable[[int], int | None], address: int, size: int) -> None:
        """Code of ``size`` bytes at linear ``address`` was translated.

        ``translate`` gives the guest-physical address of a linear one, None if it cannot.
        """
        last = address + max(size, 1) - 1
        for linear in {address >> PAGE_SHIFT, last >> PAGE_SHIFT}:
            gpa = translate(linear << PAGE_SHIFT)
            if gpa is None:
                self._unknown = True
            else:
                self._pages.add(gpa >> PAGE_SHIFT)

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
        self._unknown = False
