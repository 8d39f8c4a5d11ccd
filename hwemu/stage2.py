# SPDX-License-Identifier: GPL-2.0-or-later
"""The second-stage (nested) page table, in the format the engine's C walker reads.

Four levels of 512 eight-byte entries, x86-64 long-mode format (AMD APM vol. 2, 15.25 "Nested
Paging" and 5.3). The tables live in a pool that the caller gives and that every engine of the
VM maps at ``pool_hpa``; the same bytes are read by the engine (C), by the scalar walker here
(memoryview) and by the range operations (numpy).

Rules that come from the engine:

* non-leaf entries carry the accessed bit from birth, or the engine writes it behind our back;
* no entry ever has NX: the engine reads through a null pointer when such a page serves as a
  guest page table. ``executable=False`` is kept in an available bit, for models to read;
* host-physical addresses stay below 2**40, above that every walk is a reserved-bit fault.

Nothing here locks: one writer at a time, engines may walk at any moment. So an emptied table is
parked first (`hwemu.tablepool`) and returns to the pool with `Stage2.reclaim`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hwemu.leafruns import LeafColumns, leaf_columns, leaf_runs
from hwemu.npt import (
    ACCESSED,
    ADDRESS_BITS,
    ADDRESS_MASK,
    DIRTY,
    ENTRIES,
    LARGE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PRESENT,
    ROOT_LEVEL,
    SOFT_NO_EXEC,
    USER,
    WRITABLE,
    Stage2Error,
    Translation,
    WalkError,
    WalkReason,
    walk,
)
from hwemu.tablepool import PoolFullError, RangeError, TablePool

__all__ = [
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PoolFullError",
    "RangeError",
    "Stage2",
    "Stage2Error",
    "Stage2Statistics",
    "Translation",
    "WalkError",
    "WalkReason",
]

_LEAF = PRESENT | USER | ACCESSED | DIRTY
_GFN_LIMIT = 1 << (ADDRESS_BITS - PAGE_SHIFT)
_STEPS = np.arange(ENTRIES, dtype=np.uint64)


def _shift(level: int) -> int:
    """log2 of the pages that one entry of a table of ``level`` maps."""
    return 9 * (level - 1)


@dataclass(frozen=True, slots=True)
class Stage2Statistics:
    """Tables in the pool by state, pages by what maps them (in 4 KiB units)."""

    tables: int
    parked_tables: int
    free_tables: int
    mapped_pages: int
    large_leaves: int


class Stage2:
    """A nested page table in ``pool`` (writable buffer, whole pages), which begins at ``pool_hpa``.

    The root is the first page of the pool.
    """

    def __init__(self, pool: object, pool_hpa: int) -> None:
        self._pool = TablePool(pool, pool_hpa)
        self._words = self._pool.words
        self._rows = self._pool.rows
        self._live = self._pool.live
        # gfn >> 9 -> leaf table: the short way for single pages
        self._leaf_tables: dict[int, int] = {}
        self._pages = 0
        self._large = 0

    @property
    def root_hpa(self) -> int:
        """Host-physical address of the root table: the nested CR3."""
        return self._pool.hpa

    # -- tables ---------------------------------------------------------------------------------

    def _park(self, level: int, prefix: int, table: int) -> None:
        self._pool.park(level, prefix, table)
        if level == 1:
            self._leaf_tables.pop(prefix, None)

    def _split(self, parent_word: int, gfn: int, level: int) -> int:
        """Replace a leaf of ``level`` by a table of 512 equal leaves below it; return the table."""
        entry = self._words[parent_word]
        table = self._pool.take(level - 1, gfn >> _shift(level))
        step = PAGE_SIZE << _shift(level - 1)
        base = entry & ADDRESS_MASK & ~(step * ENTRIES - 1)
        flags = entry & 0xFFF & ~(LARGE if level == 2 else 0)
        self._rows[table] = _STEPS * np.uint64(step) + np.uint64(base | flags)
        self._live[table] = ENTRIES
        self._words[parent_word] = self._pool.entry(table)
        if level == 2:
            self._leaf_tables[gfn >> 9] = table
        self._large += -1 if level == 2 else ENTRIES - 1
        return table

    def _descend(self, gfn: int, level: int) -> int:
        """Table of ``level`` that holds ``gfn``, made if missing."""
        table = 0
        for upper in range(ROOT_LEVEL, level, -1):
            shift = _shift(upper)
            word = table * ENTRIES + ((gfn >> shift) & 511)
            entry = self._words[word]
            if not entry & PRESENT:
                below = self._pool.take(upper - 1, gfn >> shift)
                self._words[word] = self._pool.entry(below)
                self._live[table] += 1
                table = below
            elif entry & LARGE:
                table = self._split(word, gfn, upper)
            else:
                table = self._pool.index(entry)
        if level == 1:
            self._leaf_tables[gfn >> 9] = table
        return table

    # -- operations -----------------------------------------------------------------------------

    def _check(self, operation: str, gpa: int, npages: int) -> int:
        gfn = gpa >> PAGE_SHIFT
        if gpa % PAGE_SIZE or gpa < 0 or npages < 0 or gfn + npages > _GFN_LIMIT:
            raise RangeError(
                f"stage-2 {operation} of {npages} pages at gpa {gpa:#x}: must be page-aligned and "
                "end at or below 2**40"
            )
        return gfn

    def map(
        self,
        gpa: int,
        hpa: int,
        npages: int,
        *,
        writable: bool = True,
        executable: bool = True,
        level: int = 1,
    ) -> None:
        """Map ``npages`` 4 KiB pages at ``gpa`` to ``hpa``, replacing what was there.

        ``level`` 2 makes leaves of 2 MiB and 3 of 1 GiB: both addresses and the length must be
        multiples of that. Small leaves over part of a large one split it. Raises `RangeError`
        (nothing changed) or `PoolFullError` (a prefix may be mapped). Replacing a present leaf
        needs a flush afterwards, as on hardware.
        """
        gfn = self._check("map", gpa, npages)
        if hpa % PAGE_SIZE or hpa < 0 or hpa + npages * PAGE_SIZE > 1 << ADDRESS_BITS:
            raise RangeError(
                f"stage-2 map of gpa {gpa:#x} to hpa {hpa:#x}, {npages} pages: the host range must "
                "be page-aligned and end at or below 2**40"
            )
        flags = _LEAF | (WRITABLE if writable else 0) | (0 if executable else SOFT_NO_EXEC)
        if level in (2, 3):
            self._map_large(gfn, hpa, npages, flags, level)
            return
        if level != 1:
            raise RangeError(f"stage-2 map at level {level}: 1 (4 KiB), 2 (2 MiB), 3 (1 GiB) exist")
        if npages == 1:
            table = self._leaf_tables.get(gfn >> 9)
            if table is None:
                table = self._descend(gfn, 1)
            word = table * ENTRIES + (gfn & 511)
            if not self._words[word] & PRESENT:
                self._live[table] += 1
                self._pages += 1
            self._words[word] = hpa | flags
            return
        end = gfn + npages
        while gfn < end:
            first = gfn & 511
            count = min(end - gfn, ENTRIES - first)
            table = self._descend(gfn, 1)
            row = self._rows[table, first : first + count]
            fresh = count - int(np.count_nonzero(row & np.uint64(PRESENT)))
            row[:] = _STEPS[:count] * np.uint64(PAGE_SIZE) + np.uint64(hpa | flags)
            self._live[table] += fresh
            self._pages += fresh
            gfn += count
            hpa += count * PAGE_SIZE

    def _map_large(self, gfn: int, hpa: int, npages: int, flags: int, level: int) -> None:
        shift = _shift(level)
        span = 1 << shift
        if gfn % span or npages % span or hpa % (span * PAGE_SIZE):
            raise RangeError(
                f"stage-2 map at level {level} of gpa {gfn << PAGE_SHIFT:#x} to hpa {hpa:#x}, "
                f"{npages} pages: all three must be multiples of {span * PAGE_SIZE >> 20} MiB"
            )
        for at in range(gfn, gfn + npages, span):
            table = self._descend(at, level)
            word = table * ENTRIES + ((at >> shift) & 511)
            old = self._words[word]
            self._words[word] = hpa | flags | LARGE
            if not old & PRESENT:
                self._live[table] += 1
            if not old & PRESENT or not old & LARGE:
                self._pages += span
                self._large += 1
            if old & PRESENT and not old & LARGE:
                below = self._pool.index(old)
                self._zap(below, level - 1, at, at, at + span)
                self._park(level - 1, at >> shift, below)
            hpa += span * PAGE_SIZE

    def whole_leaves(self, gpa: int, npages: int) -> tuple[int, int]:
        """The range (gpa, npages) widened to the leaves that reach out of it at either end.

        What KVM zaps: tdp_mmu_zap_leafs() removes a large leaf that the range only touches, and
        the next fault maps what is still allowed. Nothing is widened where no large leaf is.
        """
        gfn = self._check("whole_leaves", gpa, npages)
        if not self._large or not npages:
            return gpa, npages
        end = gfn + npages
        size = self._leaf_pages(gfn) or 1
        first = gfn - gfn % size
        if npages > 1:
            size = self._leaf_pages(end - 1) or 1
        end += -end % size
        return first << PAGE_SHIFT, end - first

    def _leaf_pages(self, gfn: int) -> int:
        """Pages of the large leaf that maps ``gfn``; 1 if a table of small ones may, 0 if none."""
        table = 0
        for level in range(ROOT_LEVEL, 1, -1):
            shift = _shift(level)
            entry = self._words[table * ENTRIES + ((gfn >> shift) & 511)]
            if not entry & PRESENT:
                return 0
            if entry & LARGE:
                return 1 << shift
            table = self._pool.index(entry)
        return 1

    def zap(self, gpa: int, npages: int) -> int:
        """Remove ``npages`` pages at ``gpa``; the number of 4 KiB pages that had been mapped.

        The cost follows what is mapped, not the width of the range. A large leaf that is only
        partly covered is split first (needs tables from the pool; see `whole_leaves`).
        """
        gfn = self._check("zap", gpa, npages)
        if npages == 1:
            table = self._leaf_tables.get(gfn >> 9)
            if table is not None and self._live[table] > 1:
                word = table * ENTRIES + (gfn & 511)
                if not self._words[word] & PRESENT:
                    return 0
                self._words[word] = 0
                self._live[table] -= 1
                self._pages -= 1
                return 1
            if table is None and not self._leaf_pages(gfn):
                return 0
        return self._zap(0, ROOT_LEVEL, 0, gfn, gfn + npages) if npages else 0

    def _zap(self, table: int, level: int, base: int, start: int, end: int) -> int:
        """Zap [start, end) below ``table``, whose first entry maps gfn ``base``."""
        row = self._rows[table]
        shift = _shift(level)
        first = max(start - base, 0) >> shift
        last = min((end - base + (1 << shift) - 1) >> shift, ENTRIES)
        present = np.flatnonzero(row[first:last] & np.uint64(PRESENT)) + first
        if level == 1:
            row[present] = 0
            self._live[table] -= len(present)
            self._pages -= len(present)
            return len(present)
        zapped = 0
        for index in present.tolist():
            word = table * ENTRIES + index
            entry = self._words[word]
            span = base + (index << shift)
            if entry & LARGE:
                if start <= span and end >= span + (1 << shift):
                    self._words[word] = 0
                    self._live[table] -= 1
                    self._large -= 1
                    self._pages -= 1 << shift
                    zapped += 1 << shift
                    continue
                below = self._split(word, span, level)
            else:
                below = self._pool.index(entry)
            zapped += self._zap(below, level - 1, span, start, end)
            if self._live[below] == 0:
                self._words[word] = 0
                self._live[table] -= 1
                self._park(level - 1, span >> shift, below)
        return zapped

    def reclaim(self) -> int:
        """Give parked tables back to the pool; how many.

        Only after every engine that was running when they were parked has flushed or left guest
        code: until then one may be in the middle of a walk through them.
        """
        return self._pool.reclaim()

    # -- reading --------------------------------------------------------------------------------

    def walk(self, gpa: int, *, write: bool = False) -> Translation:
        """Translate ``gpa`` as the hardware does; raises `WalkError`.

        Nested accesses are user accesses (APM vol. 2, 15.25.5): every entry on the path must have
        U/S set. With ``write``, every entry must also be writable.
        """
        return walk(self._words, self._pool.hpa, 0, gpa, write)

    def mapped(self, gpa: int, npages: int) -> Iterator[tuple[int, int, int]]:
        """Runs (gpa, hpa, npages) mapped in the range, in order; neighbours are coalesced."""
        gfn = self._check("mapped", gpa, npages)
        for at, hpa, count in leaf_runs(self._pool, gfn, gfn + npages):
            yield at << PAGE_SHIFT, hpa, count

    def columns(self, gpa: int, npages: int) -> LeafColumns:
        """A copy of the leaves of a range, an element a page."""
        gfn = self._check("columns", gpa, npages)
        return leaf_columns(self._pool, gfn, gfn + npages)

    def statistics(self) -> Stage2Statistics:
        """Counts of tables and pages now."""
        used, parked, free = self._pool.counts()
        return Stage2Statistics(
            tables=used,
            parked_tables=parked,
            free_tables=free,
            mapped_pages=self._pages,
            large_leaves=self._large,
        )
