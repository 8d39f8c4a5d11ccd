# SPDX-License-Identifier: GPL-2.0-or-later
"""What every fence does, and the second stage that asks one before it stores a leaf."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from pyroaring import BitMap

from hwemu.stage2 import Stage2
from kvmsim.uapi import PAGE_SIZE
from privfs.notifier.wire import Fence as Kind

#: Called with a reason when a page was touched that was not to be touched; in no lock.
Trespass = Callable[[str], None]
#: Addresses [start, end) behind the fence, and whom to tell of a trespass.
Cover = tuple[int, int, Trespass]


class FenceError(OSError):
    """The wanted fence cannot be had, or its pages are not there."""


class Fence:
    """No fence; the others refine it.  ``base`` is the address that all ranges lie above."""

    kind = Kind.NONE
    fd = -1  #: the userfaultfd, of which an owner gets a copy

    def __init__(self, base: int) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._open = BitMap()  #: admitted pages, counted from ``base``
        self._covered: list[Cover] = []

    def cover(self, address: int, length: int, memfd: int, on_trespass: Trespass) -> None:
        """Put a fresh shared, writable mapping of a memfd behind the fence, if it can be."""

    def uncover(self, address: int, length: int) -> None:
        """Forget a range; something else is mapped there by now."""
        with self._lock:
            self._covered = [c for c in self._covered if not address <= c[0] < address + length]
            self._open.remove_range(*self._pages(address, length))

    def admit(self, address: int, length: int) -> None:
        """Let granted pages be touched: FenceError if they are not there."""

    def shut(self, address: int, length: int) -> None:
        """Let them be touched no more; nobody does any more."""

    def close(self) -> None:
        """End; what is mapped stays as it is."""

    def _pages(self, address: int, length: int) -> tuple[int, int]:
        start = (address - self._base) // PAGE_SIZE
        return start, start + length // PAGE_SIZE

    def _address(self, page: int) -> int:
        return self._base + page * PAGE_SIZE

    def _cover_of(self, address: int) -> Cover | None:
        at = bisect.bisect_right(self._covered, address, key=_start) - 1
        return self._covered[at] if at >= 0 and address < self._covered[at][1] else None

    def _parts(self, address: int, length: int) -> list[tuple[Cover, int, int]]:
        """Return the covers that a range meets, each with the pages that it meets there."""
        end = address + length
        at = bisect.bisect_right(self._covered, address, key=_start)
        found = []
        for cover in self._covered[max(at - 1, 0) :]:
            if cover[0] >= end:
                break
            lower, upper = max(address, cover[0]), min(end, cover[1])
            if lower < upper:
                found.append((cover, *self._pages(lower, upper - lower)))
        return found

    def _add_cover(self, address: int, length: int, on_trespass: Trespass) -> None:
        bisect.insort(self._covered, (address, address + length, on_trespass), key=_start)


def _start(cover: Cover) -> int:
    return cover[0]


class FencedStage2(Stage2):
    """A second stage that stores leaves only once their pages may be touched.

    ``admit`` takes a host-physical address and bytes.
    """

    def __init__(self, pool: object, pool_hpa: int, admit: Callable[[int, int], None]) -> None:
        super().__init__(pool, pool_hpa)
        self._admit = admit

    def map(self, gpa: int, hpa: int, npages: int, **leaf: Any) -> None:
        """Admit a contiguous range, then store its leaves; FenceError if it is not there."""
        self._admit(hpa, npages * PAGE_SIZE)
        super().map(gpa, hpa, npages, **leaf)


def gaps(pages: BitMap, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of [first, last) that ``pages`` lacks."""
    missing = BitMap(range(first, last)) - pages
    if missing:
        low, high = missing.min(), missing.max() + 1
        if high - low == len(missing):  # as nearly always: one run
            yield low, high
        else:
            yield from runs(missing)


def runs(pages: BitMap) -> Iterator[tuple[int, int]]:
    """Yield the runs of ``pages``, ascending and half-open."""
    numbers = np.asarray(pages.to_array(), dtype=np.int64)
    if len(numbers) == 0:
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    starts = numbers[np.concatenate(([0], breaks + 1))]
    ends = numbers[np.concatenate((breaks, [len(numbers) - 1]))] + 1
    yield from zip(starts.tolist(), ends.tolist(), strict=True)


def count_runs(pages: BitMap, first: int, last: int) -> int:
    """Return how many runs of ``pages`` reach into [first, last)."""
    numbers = np.asarray((pages & BitMap(range(first, last))).to_array(), dtype=np.int64)
    return int(np.count_nonzero(np.diff(numbers) != 1)) + 1 if len(numbers) else 0
