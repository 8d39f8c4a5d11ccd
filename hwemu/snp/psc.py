# SPDX-License-Identifier: GPL-2.0-or-later
"""Page state changes: a guest's list of pages to be private or shared, worked off by ranges.

The list lies in the scratch area: a header {u16 cur_entry, u16 end_entry, u32 reserved} and up to
253 entries {cur_page:12, gfn:40, operation:4, pagesize:1} (SEV-ES GHCB standardization 56421;
``struct psc_entry`` in ``arch/x86/include/asm/sev-common.h``).  `PscList` is KVM's side
(``snp_begin_psc``): neighbours that ask for the same become one KVM_HC_MAP_GPA_RANGE, progress is
written to the list, and an error ends the work where it was met.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace
from typing import Final

from hwemu.snp.rmpentry import GROUP, PageSize

MAX_ENTRIES: Final = 253
_HEADER: Final = struct.Struct("<HHI")
_ENTRY: Final = struct.Struct("<Q")
LIST_SIZE: Final = _HEADER.size + MAX_ENTRIES * _ENTRY.size


class PscOp(enum.IntEnum):
    """``operation`` of an entry; KVM passes over SMASH and UNSMASH, which are hints."""

    PRIVATE = 1
    SHARED = 2
    PSMASH = 3
    UNSMASH = 4


class PscError(enum.IntEnum):
    """SW_EXITINFO2 after a list (``VMGEXIT_PSC_ERROR_*``)."""

    NONE = 0
    INVALID_HEADER = 1 << 32 | 1
    INVALID_ENTRY = 1 << 32 | 2
    GENERIC = 0x100 << 32


@dataclass(frozen=True, slots=True)
class PscEntry:
    """One entry; ``done`` (cur_page) small pages of it are."""

    gfn: int
    operation: int
    size: int = PageSize.SIZE_4K
    done: int = 0

    def encode(self) -> int:
        """Return the word; ValueError for a field that does not fit."""
        limits = ((self.done, 12), (self.gfn, 40), (self.operation, 4), (self.size, 1))
        if any(not 0 <= value < 1 << width for value, width in limits):
            raise ValueError(f"PSC entry {self}: a field does not fit")
        return self.done | self.gfn << 12 | self.operation << 52 | self.size << 56

    @classmethod
    def decode(cls, word: int) -> PscEntry:
        """Read a word; reserved bits are ignored."""
        return cls(word >> 12 & (1 << 40) - 1, word >> 52 & 0xF, word >> 56 & 1, word & 0xFFF)

    @property
    def npages(self) -> int:
        """Small pages of the entry."""
        return GROUP if self.size else 1


@dataclass(frozen=True, slots=True)
class MapGpaRange:
    """KVM_HC_MAP_GPA_RANGE: what user space is asked.  ``size`` is that of the guest's pages."""

    gpa: int
    npages: int
    private: bool
    size: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The list is done, or given up: the guest is answered SW_EXITINFO2 ``error``."""

    error: PscError


def pack(entries: list[PscEntry], *, first: int = 0) -> bytearray:
    """Return a list as a guest writes it; ValueError for none or more than 253."""
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise ValueError(f"PSC list of {len(entries)} entries: 1 to {MAX_ENTRIES}")
    raw = bytearray(_HEADER.pack(first, len(entries) - 1, 0))
    for entry in entries:
        raw += _ENTRY.pack(entry.encode())
    return raw


class PscList:
    """A list that is being worked off, in the guest's memory.

    The guest may write to it at any time: every word is read once, and indices are checked.
    Call `next_range` until it is `Finished`; `complete` after each range.
    """

    def __init__(self, area: bytearray | memoryview) -> None:
        self._area = area
        self._flights: list[list[int]] = []  # the entries of each range that is under way
        self._capacity = min(MAX_ENTRIES, max(0, (len(area) - _HEADER.size) // _ENTRY.size))

    def _entry(self, index: int) -> PscEntry:
        return PscEntry.decode(
            _ENTRY.unpack_from(self._area, _HEADER.size + index * _ENTRY.size)[0]
        )

    def _set_current(self, index: int) -> None:
        struct.pack_into("<H", self._area, 0, index)

    def next_range(self) -> MapGpaRange | Finished:
        """Return what to do next; ValueError while a range is under way."""
        if self._flights:
            raise ValueError("PSC list: the last range is not complete")
        if len(self._area) < _HEADER.size:
            return Finished(PscError.INVALID_HEADER)
        while True:
            index, end, _ = _HEADER.unpack_from(self._area)
            if end >= self._capacity:
                return Finished(PscError.INVALID_HEADER)
            while index <= end:
                entry = self._entry(index)
                if entry.done > entry.npages or entry.gfn % entry.npages:
                    return Finished(PscError.INVALID_ENTRY)
                if entry.done < entry.npages:
                    break
                index += 1
                self._set_current(index)
            if index > end:
                return Finished(PscError.NONE)
            gpa, npages = self._merge(index, end, entry)
            if entry.operation in (PscOp.PRIVATE, PscOp.SHARED):
                private = entry.operation == PscOp.PRIVATE
                return MapGpaRange(gpa, npages, private, entry.size)
            self._advance()

    def further(self, limit: int) -> list[MapGpaRange]:
        """Return up to ``limit`` ranges behind the one under way, to be done with it.

        It ends before an entry that is wrong, a hint, or broken: those are `next_range`'s.
        """
        found: list[MapGpaRange] = []
        _, end, _ = _HEADER.unpack_from(self._area)
        end = min(end, self._capacity - 1)
        while len(found) < limit and (index := self._flights[-1][-1] + 1) <= end:
            entry = self._entry(index)
            converts = entry.operation in (PscOp.PRIVATE, PscOp.SHARED)
            if entry.done or entry.gfn % entry.npages or not converts:
                break
            gpa, npages = self._merge(index, end, entry)
            found.append(MapGpaRange(gpa, npages, entry.operation == PscOp.PRIVATE, entry.size))
        return found

    def _merge(self, index: int, end: int, entry: PscEntry) -> tuple[int, int]:
        """Take the entry and the neighbours that continue it; gpa and pages of all."""
        gfn, npages = entry.gfn + entry.done, entry.npages - entry.done
        flight = [index]
        self._flights.append(flight)
        if entry.done:
            return gfn << 12, npages  # the rest of a broken page goes alone, by small pages
        for following in range(index + 1, end + 1):
            other = self._entry(following)
            if other != replace(entry, gfn=gfn + npages):
                break
            flight.append(following)
            npages += other.npages
        return gfn << 12, npages

    @property
    def under_way(self) -> int:
        """How many ranges were asked for and are not complete."""
        return len(self._flights)

    def complete(self, done: int) -> Finished | None:
        """Say how many of the ranges under way were done; an answer for the guest if not all.

        ValueError without a range, or for more than there are.
        """
        if not 0 <= done <= len(self._flights) or not self._flights:
            raise ValueError(f"PSC list: {done} of {len(self._flights)} ranges complete")
        failed = done < len(self._flights)
        for _ in range(done):
            self._advance()
        self._flights.clear()
        return Finished(PscError.GENERIC) if failed else None

    def _advance(self) -> None:
        flight = self._flights.pop(0)
        for index in flight:
            entry = self._entry(index)
            done = replace(entry, done=entry.npages)
            _ENTRY.pack_into(self._area, _HEADER.size + index * _ENTRY.size, done.encode())
        self._set_current(flight[-1] + 1)


class Step(enum.Enum):
    """What a guest does to convert pages."""

    VALIDATE = "PVALIDATE, validate"
    RESCIND = "PVALIDATE, rescind"
    PSC = "page state change"


#: In which order (``__set_pages_state`` and ``set_pages_state`` in ``arch/x86/coco/sev``): what is
#: given away is rescinded first, what is received is validated last.  So no page is ever shared
#: that the guest still believes to be its own.
ORDER: Final = {
    PscOp.SHARED: (Step.RESCIND, Step.PSC),
    PscOp.PRIVATE: (Step.PSC, Step.VALIDATE),
}
