# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM's memory costs: how much of it is private, and what is held on each side.

With a shared and a private side of their own, a gfn has two pages until the side that a conversion
left is given back: "double allocation", the reason for the discard in a VMM's conversion. It is
counted here from what the owners of both sides say is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvmsim.memslot import Memslot
from kvmsim.mmu import Mmu


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Pages of slots by attribute; ``unbacked`` are private ones without a private file."""

    private: int = 0
    shared: int = 0
    unbacked: int = 0


@dataclass(frozen=True, slots=True)
class Allocated:
    """Pages of slots that are held, in pages of the guest.

    ``private`` and ``shared`` are what each side holds, ``both`` the gfns held twice, and
    ``stale`` what lies on the side that its gfn's attribute does not name: memory that no access
    of the guest reaches.
    """

    private: int = 0
    shared: int = 0
    both: int = 0
    stale: int = 0

    def __add__(self, other: Allocated) -> Allocated:
        """Both together."""
        return Allocated(
            self.private + other.private,
            self.shared + other.shared,
            self.both + other.both,
            self.stale + other.stale,
        )


class Span(NamedTuple):
    """Gfns or pages [start, end)."""

    start: int
    end: int


class Holdings(Protocol):
    """Who knows what is allocated. Runs are (start, end) pages, in order, apart, clipped."""

    def private_runs(self, file: int, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Allocated pages of a private file."""

    def shared_runs(self, slot: Memslot, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Allocated pages of a slot's shared side, numbered as ``Memslot.shared_page`` does."""


def memory_use(mmu: Mmu, start: int, end: int) -> MemoryUse:
    """Pages of slots in gfns [start, end), by attribute."""
    private = shared = unbacked = 0
    for slot, first, last in mmu.slots.find_range(start, end):
        for span, is_private in types_of(mmu, slot, first, last):
            pages = span.end - span.start
            if not is_private:
                shared += pages
            elif slot.has_file:
                private += pages
            else:
                unbacked += pages
    return MemoryUse(private, shared, unbacked)


def allocated(mmu: Mmu, slot: Memslot, holdings: Holdings) -> Allocated:
    """What one slot holds. A slot that its file serves alone has nothing twice."""
    private: list[Span] = []
    shared: list[Span] = []
    if slot.file is not None:
        delta = slot.base_gfn - slot.file_page
        pages = holdings.private_runs(slot.file, slot.file_page, slot.file_page + slot.npages)
        private = [Span(first + delta, last + delta) for first, last in pages]
    if slot.shared is not None and not slot.whole:
        page = slot.shared_page(slot.base_gfn)
        delta = slot.base_gfn - page
        pages = holdings.shared_runs(slot, page, page + slot.npages)
        shared = [Span(first + delta, last + delta) for first, last in pages]
    stale = 0
    if not slot.whole:
        types = list(types_of(mmu, slot, slot.base_gfn, slot.end_gfn))
        stale = _common(private, [span for span, is_private in types if not is_private])
        stale += _common(shared, [span for span, is_private in types if is_private])
    return Allocated(_pages(private), _pages(shared), _common(private, shared), stale)


def allocated_by_slot(mmu: Mmu, holdings: Holdings) -> dict[int, Allocated]:
    """What every slot holds, by id; their sum is the VM's, if no page is in two slots."""
    return {slot.id: allocated(mmu, slot, holdings) for slot in mmu.slots}


def types_of(mmu: Mmu, slot: Memslot, first: int, last: int) -> Iterator[tuple[Span, bool]]:
    """The runs of gfns [first, last) of one type, and whether they are private."""
    while first < last:
        _, end = mmu.same_type(first, slot)
        end = min(end, last)
        yield Span(first, end), mmu.is_private(first, slot)
        first = end


def _pages(spans: Sequence[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _common(one: Sequence[Span], two: Sequence[Span]) -> int:
    """How many are in both; each in order and apart."""
    total = i = j = 0
    while i < len(one) and j < len(two):
        total += max(0, min(one[i].end, two[j].end) - max(one[i].start, two[j].start))
        if one[i].end <= two[j].end:
            i += 1
        else:
            j += 1
    return total
