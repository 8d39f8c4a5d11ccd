# SPDX-License-Identifier: GPL-2.0-or-later
"""The Physical Address Metadata Table: what every page of the TDMRs is, and whose.

Three tables a TDMR, for pages of 4 KiB, 2 MiB and 1 GiB (``pamt_manager.c``). An entry of a large
page and entries beneath it are never in use together: who asks for a page of one size walks from
1 GiB down and stops at the first entry that is not NDA.

Sizes are levels: 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB. Addresses are host-physical, in bytes.
Hardware wants TDMRs of whole GiB; here any whole number of pages will do, so that a world can be
small. A large page must lie in its TDMR as a whole.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
LEVELS: Final = (0, 1, 2)
ENTRIES: Final = 512


class PageType(enum.IntEnum):
    """PAMT.PT."""

    NDA = 0  #: not assigned: the host's
    RSVD = 1  #: reserved, in no TD's reach
    REG = 3  #: memory of a TD
    TDR = 4
    TDCX = 5
    TDVPR = 6
    EPT = 8  #: a page of a Secure EPT


@dataclass(frozen=True, slots=True)
class Tdmr:
    """A trust-domain memory range: ``base`` and ``size`` in bytes, ``reserved`` (offset, size)."""

    base: int
    size: int
    reserved: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PamtEntry:
    """One entry as it is now; ``owner`` is the page number of the TDR, 0 for none."""

    level: int
    pt: PageType
    owner: int
    bepoch: int


class Columns(NamedTuple):
    """What `Pamt.walk` finds of each of some pages: ``pt``, ``level`` uint8, ``owner`` uint64."""

    pt: npt.NDArray[np.uint8]
    level: npt.NDArray[np.uint8]
    owner: npt.NDArray[np.uint64]


def span(level: int) -> int:
    """Return the 4 KiB pages of a page of ``level``."""
    return 1 << 9 * level


@dataclass(slots=True)
class _Tables:
    """The tables of one TDMR; ``pt``, ``owner`` and ``bepoch`` by level, one row a page."""

    first: int  #: page number
    npages: int
    pt: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    owner: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    bepoch: list[npt.NDArray[np.uint64]] = field(default_factory=list)

    def row(self, page: int, level: int) -> int:
        return (page >> 9 * level) - (self.first >> 9 * level)


class Pamt:
    """The PAMT of all TDMRs, which must be in order and apart."""

    def __init__(self, tdmrs: Sequence[Tdmr]) -> None:
        self._tables: list[_Tables] = []
        end = 0
        for tdmr in tdmrs:
            if tdmr.base % PAGE_SIZE or tdmr.size % PAGE_SIZE or tdmr.size <= 0:
                raise ValueError(f"TDMR at {tdmr.base:#x}, {tdmr.size:#x} bytes: not whole pages")
            if not tdmr.base:
                raise ValueError("TDMR at 0: page number 0 stands for no owner")
            if tdmr.base < end:
                raise ValueError(f"TDMR at {tdmr.base:#x}: overlaps, or is not in order")
            end = tdmr.base + tdmr.size
            first, npages = tdmr.base >> PAGE_SHIFT, tdmr.size >> PAGE_SHIFT
            tables = _Tables(first, npages)
            for level in LEVELS:
                rows = ((first + npages - 1) >> 9 * level) - (first >> 9 * level) + 1
                tables.pt.append(np.zeros(rows, np.uint8))
                tables.owner.append(np.zeros(rows, np.uint64))
                tables.bepoch.append(np.zeros(rows, np.uint64))
            for offset, size in tdmr.reserved:
                if offset % PAGE_SIZE or size % PAGE_SIZE or offset + size > tdmr.size:
                    raise ValueError(f"reserved area {offset:#x}+{size:#x} of the TDMR at {tdmr}")
                tables.pt[0][offset >> PAGE_SHIFT : (offset + size) >> PAGE_SHIFT] = PageType.RSVD
            self._tables.append(tables)

    # -- one page -------------------------------------------------------------------------------

    def _of(self, page: int) -> _Tables | None:
        for tables in self._tables:
            if tables.first <= page < tables.first + tables.npages:
                return tables
        return None

    def __contains__(self, hpa: int) -> bool:
        return self._of(hpa >> PAGE_SHIFT) is not None

    def _get(self, hpa: int, level: int) -> tuple[_Tables, int]:
        page = hpa >> PAGE_SHIFT
        tables = self._of(page)
        if tables is None:
            raise LookupError(f"PAMT: hpa {hpa:#x} is in no TDMR")
        return tables, tables.row(page, level)

    def walk(self, hpa: int, level: int = 0) -> PamtEntry:
        """Return the entry that holds ``hpa``: the largest in use, else that of ``level``."""
        page = hpa >> PAGE_SHIFT
        tables = self._of(page)
        if tables is None:
            raise LookupError(f"PAMT: hpa {hpa:#x} is in no TDMR")
        for at in (2, 1, 0):
            row = tables.row(page, at)
            pt = int(tables.pt[at][row])
            if pt or at == level:
                return PamtEntry(
                    at, PageType(pt), int(tables.owner[at][row]), int(tables.bepoch[at][row])
                )
        raise AssertionError("the last level is always an answer")

    def is_free(self, hpa: int, level: int) -> bool:
        """Whether the whole page of ``level`` at ``hpa`` is NDA, at every level."""
        page, count = hpa >> PAGE_SHIFT, span(level)
        tables = self._of(page)
        if tables is None or page + count > tables.first + tables.npages:
            return False
        if self.walk(hpa, level).pt is not PageType.NDA:
            return False
        for at in range(level):
            row = tables.row(page, at)
            if tables.pt[at][row : row + (count >> 9 * at)].any():
                return False
        return True

    def bepoch(self, hpa: int, level: int) -> int:
        """Return the TLB epoch in which the page of ``level`` was blocked."""
        tables, row = self._get(hpa, level)
        return int(tables.bepoch[level][row])

    # -- changes, of checked pages --------------------------------------------------------------

    def assign(self, hpa: int, level: int, pt: PageType, owner: int) -> None:
        """Make the free page of ``level`` at ``hpa`` one of ``pt``; ``owner`` is a page number."""
        tables, row = self._get(hpa, level)
        tables.pt[level][row] = pt
        tables.owner[level][row] = owner
        tables.bepoch[level][row] = 0

    def free(self, hpa: int, level: int) -> None:
        """Give the page of ``level`` at ``hpa`` back to the host."""
        self.assign(hpa, level, PageType.NDA, 0)

    def set_bepoch(self, hpa: int, level: int, epoch: int) -> None:
        """Note that the page of ``level`` at ``hpa`` was blocked in ``epoch``."""
        tables, row = self._get(hpa, level)
        tables.bepoch[level][row] = epoch

    def split(self, hpa: int, level: int) -> None:
        """Make 512 pages of the page of ``level`` at ``hpa``, of the same type and owner."""
        tables, row = self._get(hpa, level)
        below = tables.row(hpa >> PAGE_SHIFT, level - 1)
        rows = slice(below, below + ENTRIES)
        tables.pt[level - 1][rows] = tables.pt[level][row]
        tables.owner[level - 1][rows] = tables.owner[level][row]
        tables.bepoch[level - 1][rows] = 0
        self.free(hpa, level)

    def merge(self, hpa: int, level: int) -> None:
        """Make one page of ``level`` of the 512 at ``hpa``, which are of one type and owner."""
        tables, below = self._get(hpa, level - 1)
        rows = slice(below, below + ENTRIES)
        pt, owner = PageType(int(tables.pt[level - 1][below])), int(tables.owner[level - 1][below])
        tables.pt[level - 1][rows] = PageType.NDA
        tables.owner[level - 1][rows] = 0
        tables.bepoch[level - 1][rows] = 0
        self.assign(hpa, level, pt, owner)

    # -- all of it ------------------------------------------------------------------------------

    def counts(self) -> dict[PageType, int]:
        """Return the 4 KiB pages of each type in use; RSVD and NDA are left out."""
        found: dict[PageType, int] = {}
        for tables in self._tables:
            for level in LEVELS:
                values = np.bincount(tables.pt[level], minlength=9)
                for pt in PageType:
                    if pt not in (PageType.NDA, PageType.RSVD) and values[pt]:
                        found[pt] = found.get(pt, 0) + int(values[pt]) * span(level)
        return found

    def columns(self, hpas: npt.NDArray[np.int64]) -> Columns:
        """What is written of the pages at ``hpas`` (bytes); NDA where no TDMR is."""
        pages = hpas >> PAGE_SHIFT
        found = Columns(
            np.zeros(len(pages), np.uint8),
            np.zeros(len(pages), np.uint8),
            np.zeros(len(pages), np.uint64),
        )
        for tables in self._tables:
            inside = (pages >= tables.first) & (pages < tables.first + tables.npages)
            for level in reversed(LEVELS):
                at = np.flatnonzero(inside & (found.pt == PageType.NDA))
                rows = (pages[at] >> 9 * level) - (tables.first >> 9 * level)
                found.pt[at] = tables.pt[level][rows]
                found.owner[at] = tables.owner[level][rows]
                found.level[at] = np.where(found.pt[at] > 0, level, 0)
        return found

    def owned_runs(self, owner: int) -> Iterator[tuple[int, int, int, PageType]]:
        """The same as `owned` in runs of neighbours: (hpa, pages of 4 KiB, level, type)."""
        for tables in self._tables:
            for level in LEVELS:
                used = (tables.pt[level] > PageType.RSVD) & (tables.owner[level] == owner)
                rows = np.flatnonzero(used)
                if not len(rows):
                    continue
                types = tables.pt[level][rows]
                cut = (np.diff(rows) != 1) | (np.diff(types.astype(np.int8)) != 0)
                edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(rows)]
                for first, last in pairwise(edges):
                    page = ((tables.first >> 9 * level) + int(rows[first])) << 9 * level
                    npages = (last - first) << 9 * level
                    yield page << PAGE_SHIFT, npages, level, PageType(int(types[first]))

    def owns(self, owner: int, hpa: int, size: int) -> bool:
        """Whether any page of ``size`` bytes at ``hpa`` is of the TD whose TDR is page ``owner``.

        What lies in no TDMR is nobody's.
        """
        first, last = hpa >> PAGE_SHIFT, (hpa + size - 1) >> PAGE_SHIFT
        for tables in self._tables:
            low, high = max(first, tables.first), min(last, tables.first + tables.npages - 1)
            for level in LEVELS if low <= high else ():
                rows = slice(tables.row(low, level), tables.row(high, level) + 1)
                used = tables.pt[level][rows] > PageType.RSVD
                if bool((used & (tables.owner[level][rows] == owner)).any()):
                    return True
        return False

    def owned(self, owner: int) -> Iterator[tuple[int, int, PageType]]:
        """Pages (hpa, level, type) of the TD whose TDR is page ``owner``, its TDR left out."""
        for tables in self._tables:
            for level in LEVELS:
                used = (tables.pt[level] > PageType.RSVD) & (tables.owner[level] == owner)
                for row in np.flatnonzero(used).tolist():
                    page = ((tables.first >> 9 * level) + row) << 9 * level
                    yield page << PAGE_SHIFT, level, PageType(int(tables.pt[level][row]))

    def key(self, epochs: Iterable[tuple[int, int]]) -> tuple[object, ...]:
        """A hashable value equal for tables that behave alike.

        ``epochs`` gives (owner, TD epoch): of a block's epoch only its distance counts, to 2.
        """
        parts: list[object] = []
        current = dict(epochs)
        for tables in self._tables:
            for level in LEVELS:
                rows = np.flatnonzero(tables.pt[level])
                owner, bepoch = tables.owner[level], tables.bepoch[level]
                parts.append(
                    tuple(
                        (
                            row,
                            int(tables.pt[level][row]),
                            int(owner[row]),
                            min(current.get(int(owner[row]), 0) - int(bepoch[row]), 2),
                        )
                        for row in rows.tolist()
                    )
                )
        return tuple(parts)

    def copy(self) -> Pamt:
        """An independent copy."""
        other = Pamt.__new__(Pamt)
        other._tables = [
            _Tables(
                tables.first,
                tables.npages,
                [one.copy() for one in tables.pt],
                [one.copy() for one in tables.owner],
                [one.copy() for one in tables.bepoch],
            )
            for tables in self._tables
        ]
        return other
