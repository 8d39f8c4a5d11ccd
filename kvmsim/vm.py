# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM: slots, attributes, invalidations, faults and the second stage, joined.

Every method is called under the VM's lock and never waits. What takes memory away from a guest
comes in two halves, as in KVM: ``begin_…`` opens the invalidation bracket and zaps, :meth:`Vm.end`
makes the change and closes it; in between, faults on the range retry. The undivided methods are
both halves at once.

A zap clears the table, not the TLBs. Whoever lets memory be freed, answers an ioctl or
acknowledges an invalidation must first request a flush epoch and wait until no vCPU can hold an
older translation, **also if no leaf was zapped**: an earlier zap of the same range may still be
waiting for its flush.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from typing import Self

from kvmsim.attributes import GFN_LIMIT, Attributes, check_request
from kvmsim.fault import (
    Effect,
    Fault,
    Installed,
    LeaveGuest,
    NeedPage,
    NeedShared,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import SHARED_BIT_KIND, VmKind
from kvmsim.memslot import Memslots, SlotChange
from kvmsim.mmu import Backing, Mmu, SecondStage
from kvmsim.region import BadFd, PrivateFile, Region, SharedSide
from kvmsim.uapi import ABIS, PAGE_SHIFT, Abi, KvmError


@dataclass(frozen=True, slots=True)
class Zapped:
    """What left the second stage: (gpa, npages) ranges and the number of leaves in them.

    A gpa has the shared bit if it is the shared side that was zapped.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    leaves: int = 0


@dataclass(frozen=True, slots=True)
class _StoreAttributes:
    start: int
    end: int
    value: int


@dataclass(frozen=True, slots=True)
class Invalidation:
    """An open bracket: what was zapped, and what :meth:`Vm.end` has still to do."""

    zapped: Zapped
    bracketed: bool
    then: SlotChange | _StoreAttributes | None = None


@dataclass(slots=True)
class _Counters:
    faults: int = 0
    retries: int = 0
    exits: int = 0
    installed_pages: int = 0
    invalidations: int = 0
    zapped_leaves: int = 0


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Pages of slots by attribute; ``unbacked`` are private ones without a private file."""

    private: int = 0
    shared: int = 0
    unbacked: int = 0


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """What a VM did so far, and its memory now."""

    faults: int
    retries: int
    exits: int
    installed_pages: int
    invalidations: int
    zapped_leaves: int
    slots: int
    memory: MemoryUse


class Vm:
    """A VM over a second-stage table and the private memory's user side."""

    __slots__ = ("_changing", "_counters", "mmu")

    def __init__(
        self,
        stage2: SecondStage,
        backing: Backing,
        *,
        abi: Abi = "upstream",
        kind: VmKind = SHARED_BIT_KIND,
        around: int = 16,
        window: int = 512,
    ) -> None:
        slots = Memslots(abi, kind)
        self.mmu = Mmu(slots, Attributes(), MmuInvalidate(), stage2, backing, abi, around, window)
        self._counters = _Counters()
        self._changing = False

    @property
    def abi(self) -> Abi:
        """Which interface this VM has."""
        return self.mmu.abi

    @property
    def kind(self) -> VmKind:
        """What makes an access private in this VM."""
        return self.mmu.kind

    # --- memslots ------------------------------------------------------------------------

    def begin_set_user_memory_region2(
        self,
        region: Region,
        *,
        shared: SharedSide | None = None,
        file: PrivateFile | BadFd = BadFd.CLOSED,
        v1: bool = False,
    ) -> Invalidation:
        """Check the change and zap what it takes away; KvmError if it is refused."""
        self._require_unchanging("KVM_SET_USER_MEMORY_REGION2")
        change = self.mmu.slots.plan(region, shared=shared, file=file, v1=v1)
        taken = change.taken
        gfns = [] if taken is None else [(taken.base_gfn, taken.end_gfn)]
        return self._begin(gfns, halves=self.kind.halves, then=change)

    def set_user_memory_region2(
        self,
        region: Region,
        *,
        shared: SharedSide | None = None,
        file: PrivateFile | BadFd = BadFd.CLOSED,
        v1: bool = False,
    ) -> Zapped:
        """Create, delete, move or re-flag a slot (KVM_SET_USER_MEMORY_REGION2).

        ``shared`` is what ``region.userspace_addr`` is an address in, ``file`` what
        ``region.guest_memfd`` was resolved to. ``v1`` is the older ioctl. KvmError (EINVAL,
        EEXIST, EBADF) changes nothing.
        """
        return self.end(self.begin_set_user_memory_region2(region, shared=shared, file=file, v1=v1))

    # --- attributes ----------------------------------------------------------------------

    def begin_set_memory_attributes(
        self, address: int, size: int, attributes: int, flags: int = 0
    ) -> Invalidation:
        """Check the request and zap both sides; nothing is begun if nothing would change."""
        operation = "KVM_SET_MEMORY_ATTRIBUTES"
        if self.abi == "v7":
            raise KvmError(errno.ENOTTY, operation, "v7 has KVM_MEMORY_ENCRYPT_REG_REGION")
        self._require_unchanging(operation)
        supported = ABIS[self.abi].attribute_private if self.kind.private_memory else 0
        start, end = check_request(operation, address, size, attributes, flags, supported=supported)
        around = self.mmu.attributes.run(start)
        if around.value == attributes and end <= around.end:
            return Invalidation(Zapped(), bracketed=False)
        then = _StoreAttributes(start, end, attributes)
        return self._begin([(start, end)], halves=self.kind.halves, then=then)

    def set_memory_attributes(
        self, address: int, size: int, attributes: int, flags: int = 0
    ) -> Zapped:
        """KVM_SET_MEMORY_ATTRIBUTES on bytes [address, address + size): all or nothing."""
        return self.end(self.begin_set_memory_attributes(address, size, attributes, flags))

    def encrypt_region(self, address: int, size: int, *, private: bool) -> Zapped:
        """v7's KVM_MEMORY_ENCRYPT_{REG,UNREG}_REGION. Zaps even if nothing changes."""
        operation = f"KVM_MEMORY_ENCRYPT_{'REG' if private else 'UNREG'}_REGION"
        if self.abi != "v7":
            raise KvmError(errno.ENOTTY, operation, "use KVM_SET_MEMORY_ATTRIBUTES")
        if not self.kind.private_memory:
            raise KvmError(errno.ENOTTY, operation, "this kind of VM has no private memory")
        self._require_unchanging(operation)
        start, end = check_request(operation, address, size, 0, 0, supported=0)
        value = ABIS[self.abi].attribute_private if private else 0
        then = _StoreAttributes(start, end, value)
        return self.end(self._begin([(start, end)], halves=self.kind.halves, then=then))

    # --- invalidations from below --------------------------------------------------------

    def begin_invalidate_file(self, file: int, start: int, end: int) -> Invalidation:
        """Zap the private side of every slot bound to pages [start, end) of ``file``."""
        found = list(self.mmu.slots.find_file(file, start, end))
        gfns = [(first, last) for _, first, last in found]
        whole = any(slot.whole for slot, _, _ in found)
        return self._begin(gfns, halves=self.kind.halves if whole else _PRIVATE)

    def invalidate_file(self, file: int, start: int, end: int) -> Zapped:
        """The same with its end: what the acknowledging thread calls."""
        return self.end(self.begin_invalidate_file(file, start, end))

    def invalidate_shared(self, side: SharedSide, start: int, end: int) -> Zapped:
        """Zap what maps pages [start, end) of a shared side (KVM: the hva's mmu_notifier)."""
        found = list(self.mmu.slots.find_shared(side, start, end))
        gfns = [(first, last) for _, first, last in found]
        # A plain slot of v7 has the userspace memory on both sides.
        both = any(slot.file is None for slot, _, _ in found)
        halves = self.kind.halves
        return self.end(self._begin(gfns, halves=halves if both else halves[-1:]))

    def end(self, invalidation: Invalidation) -> Zapped:
        """Make the change that was begun and let faults on its range succeed again."""
        match invalidation.then:
            case SlotChange() as change:
                self.mmu.slots.apply(change)
                self._changing = False
            case _StoreAttributes(start, end, value):
                self.mmu.attributes.set(start, end, value)
                self._changing = False
        if invalidation.bracketed:
            self.mmu.invalidate.end()
        return invalidation.zapped

    # --- faults --------------------------------------------------------------------------

    def begin_fault(self, fault: Fault) -> Effect:
        """Start a new fault, or start it again after :class:`Retry`."""
        self._counters.faults += 1
        return self._count(self._look(fault))

    def page_arrived(self, fault: Fault, grant: PageGrant) -> Effect:
        """Go on with a fault that answered NeedPage, mostly to Installed, Retry or LeaveGuest."""
        effect = fault.page_arrived(self.mmu, grant)
        if effect == Retry(RetryReason.INVALIDATED):
            # The counter moves for any change of the VM, the grant's own rule is exact: look
            # again, and if the page is still the one, do not ask the owner a second time.
            effect = self._look(fault)
            if (
                isinstance(effect, NeedPage)
                and effect.file == grant.file
                and grant.start <= effect.page < grant.end
            ):
                effect = fault.page_arrived(self.mmu, grant)
        return self._count(effect)

    # --- what there is -------------------------------------------------------------------

    def memory(self, start: int = 0, end: int = GFN_LIMIT) -> MemoryUse:
        """Pages of slots in gfns [start, end), by attribute."""
        private = shared = unbacked = 0
        for slot, first, last in self.mmu.slots.find_range(start, end):
            for run in self.mmu.attributes.runs(first, last):
                pages = run.end - run.start
                if not run.value & ABIS[self.abi].attribute_private:
                    shared += pages
                elif slot.file is None:
                    unbacked += pages
                else:
                    private += pages
        return MemoryUse(private, shared, unbacked)

    def statistics(self) -> VmStatistics:
        """Counters since the start, and the memory of now."""
        counted = {f.name: getattr(self._counters, f.name) for f in fields(_Counters)}
        return VmStatistics(**counted, slots=len(self.mmu.slots), memory=self.memory())

    def key(self) -> Hashable:
        """Slots, attributes and counter as a hashable value; table and backing have their own."""
        mmu = self.mmu
        return (mmu.slots.key(), mmu.attributes.key(), mmu.invalidate.key(), self._changing)

    def copy(self, stage2: SecondStage, backing: Backing) -> Self:
        """An independent twin over a copied second stage and backing."""
        mmu = self.mmu
        twin = type(self)(
            stage2, backing, abi=mmu.abi, kind=mmu.kind, around=mmu.around, window=mmu.window
        )
        twin.mmu.slots = mmu.slots.copy()
        twin.mmu.attributes = mmu.attributes.copy()
        twin.mmu.invalidate = mmu.invalidate.copy()
        twin._changing = self._changing
        return twin

    # --- inside --------------------------------------------------------------------------

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
        then: SlotChange | _StoreAttributes | None = None,
    ) -> Invalidation:
        invalidate = self.mmu.invalidate
        ranges: list[tuple[int, int]] = []
        leaves = 0
        if gfns:
            invalidate.begin()
            for start, end in gfns:
                invalidate.range_add(start, end)
        for start, end in gfns:
            # Attributes may be set where no slot can be.
            npages = min(end, self.kind.max_gfn) - start
            if npages <= 0:
                continue
            for half in halves:
                gpa = start << PAGE_SHIFT | half
                leaves += self.mmu.stage2.zap(gpa, npages)
                ranges.append((gpa, npages))
        if then is not None:
            self._changing = True
        self._counters.invalidations += bool(gfns)
        self._counters.zapped_leaves += leaves
        return Invalidation(Zapped(tuple(ranges), leaves), bool(gfns), then)

    def _look(self, fault: Fault) -> Effect:
        fault.snapshot(self.mmu)
        effect = fault.look_up(self.mmu)
        if isinstance(effect, NeedShared):
            side = effect.slot.shared
            effect = fault.shared_arrived(self.mmu, side.hpa(effect.page) if side else None)
        return effect

    def _count(self, effect: Effect) -> Effect:
        match effect:
            case Installed(_, npages):
                self._counters.installed_pages += npages
            case Retry():
                self._counters.retries += 1
            case LeaveGuest():
                self._counters.exits += 1
        return effect


_PRIVATE = (0,)
