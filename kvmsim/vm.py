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
from collections.abc import Hashable
from dataclasses import replace
from typing import Self

from kvmsim.attributes import GFN_LIMIT, Attributes, check_request
from kvmsim.bracket import Brackets
from kvmsim.change import (
    Invalidation,
    StoreAttributes,
)
from kvmsim.effect import (
    Effect,
    Installed,
    LeaveGuest,
    NeedPage,
    NeedShared,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.fault import Fault
from kvmsim.inplace import (
    Attributes2,
    Fill,
    InPlaceFile,
    changes_types,
    plan_conversion,
)
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import SHARED_BIT_KIND, VmKind
from kvmsim.memoryuse import MemoryUse, memory_use
from kvmsim.memslot import Memslots, SlotChange
from kvmsim.mmu import Backing, Mmu, SecondStage, Zapped
from kvmsim.region import BadFd, PrivateFile, Region, SharedSide
from kvmsim.statistics import VmStatistics
from kvmsim.uapi import ABIS, Abi, KvmError

__all__ = ["Invalidation", "MemoryUse", "Vm", "VmStatistics", "Zapped"]


class Vm(Brackets):
    """A VM over a second-stage table and the private memory's user side.

    ``pre_fault_allowed`` is false for guests with protected state until a model finalizes them.
    """

    __slots__ = ("pre_fault_allowed",)

    def __init__(
        self,
        stage2: SecondStage,
        backing: Backing,
        *,
        abi: Abi = "upstream",
        kind: VmKind = SHARED_BIT_KIND,
        around: int = 16,
        window: int = 512,
        max_level: int = 1,
        in_place: bool = False,
    ) -> None:
        slots = Memslots(abi, kind)
        mmu = Mmu(
            slots, Attributes(), MmuInvalidate(), stage2, backing, abi, around, window, max_level
        )
        if in_place:
            if abi == "v7":
                raise ValueError("v7 has no conversion in place")
            mmu.files = {}
        super().__init__(mmu)
        self.pre_fault_allowed = not kind.protected_state

    # --- memslots ------------------------------------------------------------------------

    def begin_set_user_memory_region2(
        self,
        region: Region,
        *,
        shared: SharedSide | None = None,
        file: PrivateFile | BadFd = BadFd.CLOSED,
        v1: bool = False,
        planned: SlotChange | None = None,
    ) -> Invalidation:
        """Check the change and zap what it takes away; KvmError if it is refused.

        ``planned``: what :meth:`Memslots.plan` said of it, where no slot has changed since.
        """
        self._require_unchanging("KVM_SET_USER_MEMORY_REGION2")
        if self.mmu.files is not None and isinstance(file, PrivateFile):
            file = replace(file, in_place=True)  # kvm_gmem_prepare_memory_region() of the series
        change = planned or self.mmu.slots.plan(region, shared=shared, file=file, v1=v1)
        if change.new is not None and isinstance(file, PrivateFile) and change.new.has_file:
            self.know(file)
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
        planned: SlotChange | None = None,
    ) -> Zapped:
        """Create, delete, move or re-flag a slot (KVM_SET_USER_MEMORY_REGION2).

        ``shared`` is what ``region.userspace_addr`` is an address in, ``file`` what
        ``region.guest_memfd`` was resolved to. ``v1`` is the older ioctl. KvmError (EINVAL,
        EEXIST, EBADF) changes nothing.
        """
        return self.end(
            self.begin_set_user_memory_region2(
                region, shared=shared, file=file, v1=v1, planned=planned
            )
        )

    # --- attributes ----------------------------------------------------------------------

    def begin_set_memory_attributes(
        self, address: int, size: int, attributes: int, flags: int = 0
    ) -> Invalidation:
        """Check the request and zap both sides; nothing is begun if nothing would change."""
        operation = "KVM_SET_MEMORY_ATTRIBUTES"
        if self.abi == "v7":
            raise KvmError(errno.ENOTTY, operation, "v7 has KVM_MEMORY_ENCRYPT_REG_REGION")
        if self.mmu.files is not None:
            raise KvmError(errno.ENOTTY, operation, "the files of this VM keep the types")
        self._require_unchanging(operation)
        supported = ABIS[self.abi].attribute_private if self.kind.private_memory else 0
        start, end = check_request(operation, address, size, attributes, flags, supported=supported)
        around = self.mmu.attributes.run(start)
        if around.value == attributes and end <= around.end:
            return Invalidation(Zapped(), bracketed=False)
        then = StoreAttributes(start, end, attributes)
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
        then = StoreAttributes(start, end, value)
        return self.end(self._begin([(start, end)], halves=self.kind.halves, then=then))

    def know(self, file: PrivateFile) -> InPlaceFile | None:
        """The types of a file's indices, made at its first mention; None: the VM keeps types."""
        if self.mmu.files is None:
            return None
        return self.mmu.files.setdefault(file.id, InPlaceFile.of(file))

    def begin_set_memory_attributes2(self, file: PrivateFile, request: Attributes2) -> Invalidation:
        """KVM_SET_MEMORY_ATTRIBUTES2 on ``file``, until its pages are unreachable for the guest.

        Then prove that, fill the allocated pages of the range as ``then`` says, and call
        :meth:`end`. ConversionError changes nothing.
        """
        self._require_unchanging("KVM_SET_MEMORY_ATTRIBUTES2")
        known = self.know(file)
        plan = plan_conversion(file.id, known, request, self.kind, launched=self.pre_fault_allowed)
        assert known is not None
        gfns: list[tuple[int, int]] = []
        if changes_types(known, plan) or plan.fill is not Fill.KEEP:
            found = self.mmu.slots.find_file(file.id, plan.start, plan.end)
            gfns = [(first, last) for _, first, last in found]
        known.converting = (plan.start, plan.end)
        return self._begin(gfns, halves=self.kind.halves, then=plan)

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
        return memory_use(self.mmu, start, end)

    def statistics(self) -> VmStatistics:
        """Counters since the start, and the memory of now."""
        return VmStatistics.of(self._counters, len(self.mmu.slots), self.memory())

    def key(self) -> Hashable:
        """Slots, attributes and counter as a hashable value; table and backing have their own."""
        mmu = self.mmu
        return (
            mmu.slots.key(),
            mmu.attributes.key(),
            mmu.invalidate.key(),
            mmu.poison.key(),
            mmu.files and tuple((file, mmu.files[file].key()) for file in sorted(mmu.files)),
            self._changing is not None,
            self.pre_fault_allowed,
        )

    def copy(self, stage2: SecondStage, backing: Backing) -> Self:
        """An independent twin over a copied second stage and backing."""
        mmu = self.mmu
        twin = type(self)(
            stage2, backing, abi=mmu.abi, kind=mmu.kind, around=mmu.around, window=mmu.window,
            max_level=mmu.max_level,
        )  # fmt: skip
        twin.mmu.slots = mmu.slots.copy()
        twin.mmu.attributes = mmu.attributes.copy()
        twin.mmu.invalidate = mmu.invalidate.copy()
        twin.mmu.poison = mmu.poison.copy()
        if mmu.files is not None:
            twin.mmu.files = {number: file.copy() for number, file in mmu.files.items()}
        twin._changing = self._changing
        twin.pre_fault_allowed = self.pre_fault_allowed
        return twin

    # --- inside --------------------------------------------------------------------------

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
