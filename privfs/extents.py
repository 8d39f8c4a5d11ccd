# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the extents of a private file lie: a pure function of the page number.

A file's memory is cut into extents, each one memfd of its own. The cuts never depend on the
size of the file, so that growing or shrinking it moves no page from one memfd to another. By
default extents 0 to 63 hold 64 MiB each (together 4 GiB), and extent 64 + k holds the file's
bytes [4 GiB * 2**k, 4 GiB * 2**(k + 1)): 76 extents reach 16 TiB, which is 2**32 pages. A store
whose memory can only be given back by the memfd cuts it into equal ones (:class:`Layout`).

Units: pages of 4096 bytes, ranges half-open ``[start, end)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

PAGE_SIZE = 4096
SMALL_EXTENT_PAGES = 64 * 1024 * 1024 // PAGE_SIZE
DOUBLING_START = 64 * SMALL_EXTENT_PAGES
MAX_PAGES = 1 << 32
CHUNK_PAGES = SMALL_EXTENT_PAGES


@dataclass(frozen=True, slots=True)
class Layout:
    """How the pages of a file are cut into extents, and when an extent ends.

    Extents hold ``pages`` pages each, up to page ``doubles``; from there on each holds as many as
    all before it (both powers of two; ``doubles`` 0: never). ``whole``: an extent comes and goes
    as one piece, and ends when its pages do; others are used again until they leave the file.
    """

    pages: int = SMALL_EXTENT_PAGES
    doubles: int = DOUBLING_START
    whole: bool = False

    @property
    def count(self) -> int:
        """How many extents the longest file has."""
        if not self.doubles:
            return MAX_PAGES // self.pages
        return self.doubles // self.pages + MAX_PAGES.bit_length() - self.doubles.bit_length()

    def extent_of(self, page: int) -> int:
        """Return the index of the extent that holds *page*.

        Raises ValueError for a page outside [0, MAX_PAGES).
        """
        if not 0 <= page < MAX_PAGES:
            raise ValueError(f"extent_of: page {page:#x} is outside [0, {MAX_PAGES:#x})")
        if not self.doubles or page < self.doubles:
            return page // self.pages
        return self.doubles // self.pages + page.bit_length() - self.doubles.bit_length()

    def extent_range(self, index: int) -> tuple[int, int]:
        """Return the file pages [start, end) of extent *index*.

        Raises ValueError for an index outside [0, count).
        """
        if not 0 <= index < self.count:
            raise ValueError(f"extent_range: index {index} is outside [0, {self.count})")
        if not self.doubles or index < self.doubles // self.pages:
            return index * self.pages, (index + 1) * self.pages
        start = self.doubles << (index - self.doubles // self.pages)
        return start, 2 * start

    def within(self, start: int, end: int) -> range:
        """Return the indexes of the extents that lie wholly in the file pages [start, end).

        Raises ValueError for a range outside [0, MAX_PAGES].
        """
        check_range(start, end)
        if start == end:
            return range(0)
        first, last = self.extent_of(start), self.extent_of(end - 1)
        first += self.extent_range(first)[0] < start
        last += self.extent_range(last)[1] == end
        return range(first, max(first, last))

    def split(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Cut the file pages [start, end) at extent boundaries.

        Yields (index, start, end) in ascending order, start and end in file pages, no piece
        empty. Raises ValueError, at the first step, for a range outside [0, MAX_PAGES].
        """
        check_range(start, end)
        while start < end:
            index = self.extent_of(start)
            stop = min(end, self.extent_range(index)[1])
            yield index, start, stop
            start = stop


#: What every store has that can give back a part of a memfd.
GROWING: Final = Layout()
#: One extent, for what is mapped by offset.
SINGLE: Final = Layout(MAX_PAGES, 0)


def check_range(start: int, end: int) -> None:
    """Raise ValueError unless 0 <= start <= end <= MAX_PAGES."""
    if not 0 <= start <= end <= MAX_PAGES:
        raise ValueError(
            f"page range [{start:#x}, {end:#x}) is not ascending within [0, {MAX_PAGES:#x}]"
        )


def chunks(start: int, end: int, pages: int = CHUNK_PAGES) -> Iterator[tuple[int, int]]:
    """Cut the file pages [start, end) at multiples of *pages*.

    For long allocations: the caller looks for an interrupt between two chunks. With the pages of
    a layout's smallest extent (by default 64 MiB) no chunk crosses an extent boundary.
    Raises ValueError, at the first step, for a bad range or pages < 1.
    """
    check_range(start, end)
    if pages < 1:
        raise ValueError(f"chunks: a chunk of {pages} pages; give 1 or more")
    while start < end:
        stop = min(end, (start // pages + 1) * pages)
        yield start, stop
        start = stop
