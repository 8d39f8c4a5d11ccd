# SPDX-License-Identifier: GPL-2.0-or-later
"""The brackets around everything that takes memory away from a VM, and what comes from below.

What comes from below is not the VM's own change and may come inside one: an owner's invalidation
of a file, the end of a file, a failing page, the userspace side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvmsim.attributes import GFN_LIMIT
from kvmsim.change import Invalidation, PoisonPage, ReleaseFile, StoreAttributes, Then
from kvmsim.inplace import ConvertFile
from kvmsim.kind import VmKind
from kvmsim.memslot import SlotChange
from kvmsim.mmu import Mmu, Zapped
from kvmsim.region import SharedSide
from kvmsim.statistics import Counters
from kvmsim.uapi import Abi


class Brackets:
    """Begins and ends invalidations of one VM; see :mod:`kvmsim.vm` for the rules."""

    __slots__ = ("_changing", "_counters", "mmu")

    def __init__(self, mmu: Mmu) -> None:
        self.mmu = mmu
        self._counters = Counters()
        self._changing: Then | None = None

    @property
    def abi(self) -> Abi:
        """Which interface this VM has."""
        return self.mmu.abi

    @property
    def kind(self) -> VmKind:
        """What makes an access private in this VM."""
        return self.mmu.kind

    def begin_invalidate_file(
        self, file: int, start: int, end: int, *, moving: bool = False
    ) -> Invalidation:
        """Zap the private side of every slot bound to pages [start, end) of ``file``.

        ``moving``: they are not lost, but will lie somewhere else.
        """
        known = (self.mmu.files or {}).get(file)
        if known is not None:
            known.sever(start, end)
        found = list(self.mmu.slots.find_file(file, start, end))
        gfns = [(first, last) for _, first, last in found]
        whole = any(slot.whole for slot, _, _ in found)
        halves = self.kind.halves if whole else self.kind.halves[:1]
        return self._begin(gfns, halves=halves, moving=moving)

    def invalidate_file(self, file: int, start: int, end: int, *, moving: bool = False) -> Zapped:
        """The same with its end: what the acknowledging thread calls."""
        return self.end(self.begin_invalidate_file(file, start, end, moving=moving))

    def freed(self, file: int, start: int, end: int) -> None:
        """The owner gives pages [start, end) back: what was wrong with their memory is past."""
        self.mmu.poison.freed(file, start, end)

    def release_file(self, file: int) -> Zapped:
        """The file is no more: its slots lose it and every access to them is an exit.

        kvm_gmem_release(). v7's slots hold their file, so there this is a defect of the caller.
        """
        if self.abi == "v7":
            raise RuntimeError(f"release of file {file}: a slot of v7 keeps its file")
        then = ReleaseFile(file)
        return self.end(replace(self.begin_invalidate_file(file, 0, GFN_LIMIT), then=then))

    def inject_memory_error(self, file: int, page: int) -> Zapped:
        """The memory of a page fails: it is zapped, stays, and every fault on it is EHWPOISON.

        kvm_gmem_error_folio(), as madvise(MADV_HWPOISON) would reach it.
        """
        then = PoisonPage(file, page)
        return self.end(replace(self.begin_invalidate_file(file, page, page + 1), then=then))

    def invalidate_shared(self, side: SharedSide, start: int, end: int) -> Zapped:
        """Zap what maps pages [start, end) of a shared side (KVM: the hva's mmu_notifier)."""
        found = list(self.mmu.slots.find_shared(side, start, end))
        gfns = [(first, last) for _, first, last in found]
        # A plain slot of v7 has the userspace memory on both sides.
        both = any(slot.file is None for slot, _, _ in found)
        halves = self.kind.halves
        return self.end(self._begin(gfns, halves=halves if both else halves[-1:]))

    def end(self, invalidation: Invalidation) -> Zapped:
        """Make the change that was begun and let faults on its range succeed again.

        Should it fail for want of memory, nothing has changed but what was zapped.
        """
        try:
            self._do(invalidation.then)
        finally:
            if invalidation.then == self._changing:
                self._changing = None
            if invalidation.bracketed:
                self.mmu.invalidate.end()
        return invalidation.zapped

    def abandon(self, invalidation: Invalidation) -> None:
        """Close the bracket without its change: nothing has changed but what was zapped."""
        if isinstance(invalidation.then, ConvertFile):
            assert self.mmu.files is not None
            self.mmu.files[invalidation.then.file].converting = None
        if invalidation.then == self._changing:
            self._changing = None
        self.end(replace(invalidation, then=None))

    def _do(self, then: Then | None) -> None:
        match then:
            case SlotChange() as change:
                self.mmu.slots.apply(change)
            case StoreAttributes(start, end, value):
                self.mmu.attributes.set(start, end, value)
            case ConvertFile(file, start, end, value):
                assert self.mmu.files is not None
                self.mmu.files[file].converting = None
                self.mmu.files[file].attributes.set(start, end, value)
            case ReleaseFile(file):
                self.mmu.slots.release(file)
                self.mmu.poison.freed(file, 0, GFN_LIMIT)
            case PoisonPage(file, page):
                self.mmu.poison.add(file, page)

    def deletes(self, gfn: int) -> bool:
        """Whether the slot of ``gfn`` is being deleted or moved (KVM_MEMSLOT_INVALID)."""
        match self._changing:
            case SlotChange() as change if (taken := change.taken) is not None:
                return taken.base_gfn <= gfn < taken.end_gfn
        return False

    def _require_unchanging(self, operation: str) -> None:
        if self._changing:
            raise RuntimeError(
                f"{operation}: another change of slots or attributes is begun and not ended; "
                "serialise them (KVM: slots_lock)"
            )

    def _begin(
        self,
        gfns: list[tuple[int, int]],
        *,
        halves: Iterable[int],
        then: Then | None = None,
        moving: bool = False,
    ) -> Invalidation:
        zapped = self.mmu.begin_zap(gfns, halves, moving=moving)
        if then is not None:
            self._changing = then
        self._counters.invalidations += bool(gfns)
        self._counters.zapped_leaves += zapped.leaves
        return Invalidation(zapped, bool(gfns), then)
