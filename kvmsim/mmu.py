# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fault stands on: the VM's maps, its second stage and its source of private pages.

The Protocols are what the core needs of its surroundings; hwemu's table and the notifier's user
side satisfy them without knowing of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvmsim.attributes import Attributes
from kvmsim.inplace import InPlaceFile
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import VmKind
from kvmsim.memslot import Memslot, Memslots
from kvmsim.poison import Poison
from kvmsim.uapi import ABIS, PAGE_SHIFT, Abi


class SecondStage(Protocol):
    """The second-stage table of one VM. Addresses are bytes, page-aligned; counts are pages."""

    def map(
        self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool, level: int = 1
    ) -> object:
        """Store leaves for a contiguous range over whatever was there; MemoryError: no table.

        ``level`` says how large they are (:mod:`kvmsim.level`).
        """

    def whole_leaves(self, gpa: int, npages: int) -> tuple[int, int]:
        """The range (gpa, npages) widened to the large leaves that reach out of it."""

    def zap(self, gpa: int, npages: int) -> int:
        """Clear the leaves of a range; how many there were."""


class Cache(Protocol):
    """Something that remembers where a gfn is."""

    def invalidate(self, start: int, end: int) -> None:
        """Forget gfns [start, end)."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Leaves to store: ``npages`` gfns from ``gfn`` at ``hpa``, each as large as it may be."""

    gfn: int
    npages: int
    hpa: int


class GuardRefusal(Exception):
    """The hardware does not take a page; ``errno`` is what KVM makes of it. Nothing changed."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno
        self.reason = reason


class Gate(Protocol):
    """What of a confidential processor the table itself must ask (:mod:`kvmsim.guard`)."""

    def admit(
        self, gfn: int, first: int, last: int, hpa: int, *, private: bool, writable: bool
    ) -> tuple[Leaf, ...]:
        """Take pages for gfns around ``gfn``; the leaves to store now. Raises GuardRefusal."""

    def zapped(self, gfn: int, npages: int, *, private: bool, moving: bool) -> None:
        """Leaves were cleared; ``moving``: what the pages hold comes back at another place."""


class Backing(Protocol):
    """The user's half of the contract with the owner of private files."""

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        """The part of [start, end) around ``page`` that a grant with ``seq`` still allows.

        Empty if an invalidation of ``page`` newer than ``seq`` was processed here.
        """

    def hpa(self, instance: int, page: int) -> int | None:
        """Host-physical address of ``page`` in an extent instance; None: not here (any more).

        Linear within an instance: what lies between two pages that are here is here.
        """


@dataclass(frozen=True, slots=True)
class Zapped:
    """What left the second stage: (gpa, npages) ranges and the number of pages in them.

    A gpa has the shared bit if it is the shared side that was zapped. A range is wider than what
    was asked for where a large leaf reached out of it.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    leaves: int = 0


@dataclass(slots=True)
class Mmu:
    """What a fault looks at and changes, all under the VM's lock."""

    slots: Memslots
    attributes: Attributes
    invalidate: MmuInvalidate
    stage2: SecondStage
    backing: Backing
    abi: Abi = "upstream"
    around: int = 16
    """Pages, a power of two: the aligned block of shared memory that one fault maps."""
    window: int = 512
    """Pages, a power of two: the aligned block of private memory that one request may name."""
    max_level: int = 1
    """The largest leaves that may be made (KVM: max_huge_page_level)."""
    poison: Poison = field(default_factory=Poison)
    caches: list[Cache] = field(default_factory=list)
    """What is told of every gfn that is taken away (:mod:`kvmsim.gpc`)."""
    gate: Gate | None = None
    """The confidential processor of this VM; None: an ordinary one."""
    files: dict[int, InPlaceFile] | None = None
    """The files that keep their indices' types; None: the VM keeps its gfns' types."""

    @property
    def kind(self) -> VmKind:
        """What makes an access private here."""
        return self.slots.kind

    def is_private(self, gfn: int, slot: Memslot | None) -> bool:
        """Whether the gfn's attribute says so (kvm_mem_is_private()).

        Where files keep the types, what has none is shared (kvm_gmem_get_memory_attributes()).
        """
        if self.files is not None:
            if slot is None or slot.file is None:
                return False
            return self.files[slot.file].is_private(slot.private_page(gfn))
        return bool(self.attributes.get(gfn) & ABIS[self.abi].attribute_private)

    def same_type(self, gfn: int, slot: Memslot) -> tuple[int, int]:
        """The gfns [first, last) around ``gfn``, not all of them of the slot, of one type."""
        if self.files is not None:
            if slot.file is None:
                return slot.base_gfn, slot.end_gfn
            run = self.files[slot.file].attributes.run(slot.private_page(gfn))
            return slot.private_gfn(run.start), slot.private_gfn(run.end)
        run = self.attributes.run(gfn)
        return run.start, run.end

    def begin_zap(
        self, gfns: Sequence[tuple[int, int]], halves: Iterable[int], *, moving: bool = False
    ) -> Zapped:
        """Open the bracket over ranges [start, end) and clear their leaves on these sides.

        ``moving``: what the pages hold is not lost, it comes back at another place.
        Without a range nothing is opened. ``invalidate.end()`` closes it.
        """
        ranges: list[tuple[int, int]] = []
        leaves = 0
        if gfns:
            self.invalidate.begin()
            for start, end in gfns:
                self.invalidate.range_add(start, end)
                for cache in self.caches:
                    cache.invalidate(start, end)
        for start, end in gfns:
            # Attributes may be set where no slot can be.
            npages = min(end, self.kind.max_gfn) - start
            if npages <= 0:
                continue
            for half in halves:
                gone = (start << PAGE_SHIFT | half, npages)
                if self.max_level > 1 and self.gate is None:
                    gone = self.stage2.whole_leaves(*gone)
                leaves += self.stage2.zap(*gone)
                ranges.append(gone)
                if self.gate is not None:  # exactly these: what is lost there loses its content
                    private = not self.kind.side_bit or half == self.kind.half(private=True)
                    self.gate.zapped(start, npages, private=private, moving=moving)
        return Zapped(tuple(ranges), leaves)
