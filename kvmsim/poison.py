# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of private files in which the memory failed.

kvm_gmem_error_folio() of virt/kvm/guest_memfd.c zaps such a page and leaves it where it is; every
later fault on it is EHWPOISON. Only when it is freed (punched, or its file dies) is the index
usable again: the next page there is another one.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self


class Poison:
    """The poisoned pages of each file."""

    __slots__ = ("_pages",)

    def __init__(self) -> None:
        self._pages: dict[int, set[int]] = {}

    def __contains__(self, page: tuple[int, int]) -> bool:
        """Whether (file, page) is poisoned."""
        return page[1] in self._pages.get(page[0], ())

    def __len__(self) -> int:
        """How many files have poisoned pages."""
        return len(self._pages)

    def add(self, file: int, page: int) -> None:
        """The memory of ``page`` failed."""
        self._pages.setdefault(file, set()).add(page)

    def freed(self, file: int, start: int, end: int) -> None:
        """Pages [start, end) were given back."""
        pages = self._pages.get(file)
        if pages:
            pages.difference_update([page for page in pages if start <= page < end])
            if not pages:
                del self._pages[file]

    def clip(self, file: int, page: int, start: int, end: int) -> tuple[int, int]:
        """The longest part of [start, end) around ``page``, itself good, without a poisoned one."""
        for bad in self._pages.get(file, ()):
            if start <= bad < page:
                start = bad + 1
            elif page < bad < end:
                end = bad
        return start, end

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        return tuple((file, tuple(sorted(pages))) for file, pages in sorted(self._pages.items()))

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)()
        twin._pages = {file: pages.copy() for file, pages in self._pages.items()}
        return twin
