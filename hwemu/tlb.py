# SPDX-License-Identifier: GPL-2.0-or-later
"""A translation cache that keeps what it was told until it is told to forget.

Set-associative, numpy, no I/O. It exists so that a forgotten flush is visible: a model or device
that looks here first goes on reaching the old page after a zap, as hardware would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAGE_SHIFT = 12
_EMPTY = -1


@dataclass(frozen=True, slots=True)
class TlbStatistics:
    """Counts since construction."""

    hits: int
    misses: int
    fills: int
    evictions: int
    flushes: int


class Tlb:
    """``entries`` translations of 4 KiB pages in sets of ``ways``, tagged with an ASID.

    ``entries`` must be a multiple of ``ways`` and the number of sets a power of two. Replacement
    is round robin inside a set.
    """

    def __init__(self, entries: int = 1024, ways: int = 4) -> None:
        sets = entries // ways if ways > 0 else 0
        if sets < 1 or sets * ways != entries or sets & (sets - 1):
            raise ValueError(
                f"TLB of {entries} entries in sets of {ways}: the number of sets must be a power "
                "of two"
            )
        self._mask = sets - 1
        self._gfn = np.full((sets, ways), _EMPTY, dtype=np.int64)
        self._asid = np.zeros((sets, ways), dtype=np.int64)
        self._hfn = np.zeros((sets, ways), dtype=np.int64)
        self._writable = np.zeros((sets, ways), dtype=np.bool_)
        self._victim = np.zeros(sets, dtype=np.int64)
        self._hits = self._misses = self._fills = self._evictions = self._flushes = 0

    def _find(self, gfn: int, asid: int) -> tuple[int, int]:
        """Set and way of an entry; way -1 if it is not cached."""
        row = gfn & self._mask
        ways = np.flatnonzero((self._gfn[row] == gfn) & (self._asid[row] == asid))
        return row, int(ways[0]) if len(ways) else -1

    def lookup(self, gpa: int, *, write: bool = False, asid: int = 0) -> int | None:
        """Host-physical address cached for ``gpa``, or None: walk the table and `fill`.

        A read-only entry does not answer a write.
        """
        row, way = self._find(gpa >> PAGE_SHIFT, asid)
        if way < 0 or (write and not self._writable[row, way]):
            self._misses += 1
            return None
        self._hits += 1
        return int(self._hfn[row, way]) << PAGE_SHIFT | (gpa & ((1 << PAGE_SHIFT) - 1))

    def fill(self, gpa: int, hpa: int, *, writable: bool = True, asid: int = 0) -> None:
        """Cache the translation of one page, replacing what is cached for it."""
        gfn = gpa >> PAGE_SHIFT
        row, way = self._find(gfn, asid)
        if way < 0:
            free = np.flatnonzero(self._gfn[row] == _EMPTY)
            if len(free):
                way = int(free[0])
            else:
                way = int(self._victim[row])
                self._victim[row] = (way + 1) % self._gfn.shape[1]
                self._evictions += 1
        self._gfn[row, way] = gfn
        self._asid[row, way] = asid
        self._hfn[row, way] = hpa >> PAGE_SHIFT
        self._writable[row, way] = writable
        self._fills += 1

    def flush_all(self) -> None:
        """Forget everything."""
        self._gfn.fill(_EMPTY)
        self._flushes += 1

    def flush_asid(self, asid: int) -> None:
        """Forget one guest's translations (AMD APM vol. 2, 15.16)."""
        self._gfn[self._asid == asid] = _EMPTY
        self._flushes += 1

    def flush_range(self, gpa: int, npages: int, *, asid: int = 0) -> int:
        """Forget the pages of a range; how many were cached."""
        first = gpa >> PAGE_SHIFT
        hit = (self._gfn >= first) & (self._gfn < first + npages) & (self._asid == asid)
        self._gfn[hit] = _EMPTY
        self._flushes += 1
        return int(np.count_nonzero(hit))

    def statistics(self) -> TlbStatistics:
        """Counts so far."""
        return TlbStatistics(self._hits, self._misses, self._fills, self._evictions, self._flushes)

    def key(self) -> tuple[bytes, ...]:
        """A hashable value equal for caches that behave alike."""
        live = self._gfn != _EMPTY
        return (
            self._gfn.tobytes(),
            np.where(live, self._asid, 0).tobytes(),
            np.where(live, self._hfn, 0).tobytes(),
            (live & self._writable).tobytes(),
            self._victim.tobytes(),
        )

    def copy(self) -> Tlb:
        """An independent copy."""
        other = Tlb.__new__(Tlb)
        other.__dict__.update(self.__dict__)
        for name in ("_gfn", "_asid", "_hfn", "_writable", "_victim"):
            setattr(other, name, getattr(self, name).copy())
        return other
