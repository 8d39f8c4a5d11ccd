# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the extents of a private file lie: a pure function of the page number.

A file's memory is cut into extents, each one memfd of its own. The cuts never depend on the
size of the file, so that growing or shrinking it moves no page from one memfd to another:
extents 0 to 63 hold 64 MiB each (together 4 GiB), and extent 64 + k holds the file's bytes
[4 GiB * 2**k, 4 GiB * 2**(k + 1)). 76 extents reach 16 TiB, which is 2**32 pages.

Units: pages of 4096 bytes, ranges half-open ``[start, end)``.
"""

from __future__ import annotations

from collections.abc import Iterator

PAGE_SIZE = 4096
SMALL_EXTENTS = 64
SMALL_EXTENT_PAGES = 64 * 1024 * 1024 // PAGE_SIZE
DOUBLING_START = SMALL_EXTENTS * SMALL_EXTENT_PAGES
MAX_PAGES = 1 << 32
EXTENT_COUNT = SMALL_EXTENTS + MAX_PAGES.bit_length() - DOUBLING_START.bit_length()
CHUNK_PAGES = SMALL_EXTENT_PAGES


def extent_of(page: int) -> int:
    """Return the index of the extent that holds *page*.

    Raises ValueError for a page outside [0, MAX_PAGES).
    """
    if not 0 <= page < MAX_PAGES:
        raise ValueError(f"extent_of: page {page:#x} is outside [0, {MAX_PAGES:#x})")
    if page < DOUBLING_START:
        return page // SMALL_EXTENT_PAGES
    return SMALL_EXTENTS + page.bit_length() - DOUBLING_START.bit_length()


def extent_range(index: int) -> tuple[int, int]:
    """Return the file pages [start, end) of extent *index*.

    Raises ValueError for an index outside [0, EXTENT_COUNT).
    """
    if not 0 <= index < EXTENT_COUNT:
        raise ValueError(f"extent_range: index {index} is outside [0, {EXTENT_COUNT})")
    if index < SMALL_EXTENTS:
        return index * SMALL_EXTENT_PAGES, (index + 1) * SMALL_EXTENT_PAGES
    start = DOUBLING_START << (index - SMALL_EXTENTS)
    return start, 2 * start


def check_range(start: int, end: int) -> None:
    """Raise ValueError unless 0 <= start <= end <= MAX_PAGES."""
    if not 0 <= start <= end <= MAX_PAGES:
        raise ValueError(
            f"page range [{start:#x}, {end:#x}) is not ascending within [0, {MAX_PAGES:#x}]"
        )


def split(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Cut the file pages [start, end) at extent boundaries.

    Yields (index, start, end) in ascending order, start and end in file pages, no piece empty.
    Raises ValueError, at the first step, for a range outside [0, MAX_PAGES].
    """
    check_range(start, end)
    while start < end:
        index = extent_of(start)
        stop = min(end, extent_range(index)[1])
        yield index, start, stop
        start = stop


def chunks(start: int, end: int, pages: int = CHUNK_PAGES) -> Iterator[tuple[int, int]]:
    """Cut the file pages [start, end) at multiples of *pages*.

    For long allocations: the caller looks for an interrupt between two chunks. With the default
    (the size of the smallest extent, 64 MiB) no chunk crosses an extent boundary.
    Raises ValueError, at the first step, for a bad range or pages < 1.
    """
    check_range(start, end)
    if pages < 1:
        raise ValueError(f"chunks: a chunk of {pages} pages; give 1 or more")
    while start < end:
        stop = min(end, (start // pages + 1) * pages)
        yield start, stop
        start = stop
