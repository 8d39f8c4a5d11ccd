# SPDX-License-Identifier: GPL-2.0-or-later
"""A translation cache that keeps what it was told until it is told to forget.

Set-associative, numpy, no I/O. It exists so that a forgotten flush is visible: a model or device
that looks here first goes on reaching the old page after a zap, as hardware would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAGE_SHIFT = 12
LEVELS = (1, 2, 3)
_EMPTY = -1


def _span_shift(level: int) -> int:
    """log2 of the 4 KiB pages of an entry of ``level``."""
    return 9 * (level - 1)


@dataclass(frozen=True, slots=True)
class TlbStatistics:
    """Counts since construction."""

    hits: int
    misses: int
    fills: int
    evictions: int
    flushes: int


class Tlb:
    """``entries`` translations in sets of ``ways``, tagged with an ASID.

    An entry is of a page of 4 KiB, 2 MiB or 1 GiB (level 1, 2, 3); its set is found by the number
    of a page of its size, so a lookup tries the sizes that were ever filled, smallest first.
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
        self._level = np.ones((sets, ways), dtype=np.int64)
        self._levels: tuple[int, ...] = (1,)
        self._victim = np.zeros(sets, dtype=np.int64)
        self._hits = self._misses = self._fills = self._evictions = self._flushes = 0

    def _find(self, gfn: int, asid: int, level: int) -> tuple[int, int]:
        """Set and way of an entry of ``level`` for ``gfn``; way -1 if it is not cached."""
        shift = _span_shift(level)
        row = gfn >> shift & self._mask
        ways = np.flatnonzero(
            (self._gfn[row] == gfn >> shift << shift)
            & (self._asid[row] == asid)
            & (self._level[row] == level)
        )
        return row, int(ways[0]) if len(ways) else -1

    def lookup(self, gpa: int, *, write: bool = False, asid: int = 0) -> int | None:
        """Host-physical address cached for ``gpa``, or None: walk the table and `fill`.

        A read-only entry does not answer a write.
        """
        for level in self._levels:
            row, way = self._find(gpa >> PAGE_SHIFT, asid, level)
            if way >= 0 and (not write or self._writable[row, way]):
                self._hits += 1
                inside = (1 << PAGE_SHIFT + _span_shift(level)) - 1
                return int(self._hfn[row, way]) << PAGE_SHIFT | gpa & inside
        self._misses += 1
        return None

    def fill(
        self, gpa: int, hpa: int, *, writable: bool = True, asid: int = 0, level: int = 1
    ) -> None:
        """Cache the translation of the page around ``gpa``, replacing what is cached for it.

        ``hpa`` is that of ``gpa``. Smaller and larger entries for the same address stay, as they
        may on hardware: who changes the level of a leaf has to flush.
        """
        if level not in LEVELS:
            raise ValueError(f"TLB fill at level {level}: there are 1, 2 and 3")
        shift = _span_shift(level)
        gfn, hfn = (gpa >> PAGE_SHIFT) >> shift << shift, (hpa >> PAGE_SHIFT) >> shift << shift
        if level not in self._levels:
            self._levels = tuple(sorted((*self._levels, level)))
        row, way = self._find(gfn, asid, level)
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
        self._hfn[row, way] = hfn
        self._level[row, way] = level
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
        """Forget every entry that translates any page of a range; how many there were."""
        first = gpa >> PAGE_SHIFT
        after = self._gfn + (1 << 9 * (self._level - 1))
        hit = (self._gfn != _EMPTY) & (self._asid == asid)
        hit &= (after > first) & (self._gfn < first + npages)
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
            np.where(live, self._level, 0).tobytes(),
            self._victim.tobytes(),
        )

    def copy(self) -> Tlb:
        """An independent copy."""
        other = Tlb.__new__(Tlb)
        other.__dict__.update(self.__dict__)
        for name in ("_gfn", "_asid", "_hfn", "_writable", "_level", "_victim"):
            setattr(other, name, getattr(self, name).copy())
        return other
