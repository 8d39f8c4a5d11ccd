# SPDX-License-Identifier: GPL-2.0-or-later
"""One vCPU fault, from the missing second-stage leaf to a leaf, a new try or an exit.

Rules of this file:

* The snapshot of the invalidation counter comes first, before slot, attribute or page are looked
  at: whatever changes later moves the counter and is seen at the end.
* The retry check and the store of the leaf are one step, under the VM's lock.
* A page that cannot be had is an exit, never a retry: a vCPU must not spin on an error (v7 did).

The order is kvm_mmu_faultin_pfn() and direct_page_fault() of arch/x86/kvm/mmu/mmu.c (v6.18). The
one step that waits, for the owner's page, is an effect: the caller sends the request, drops the
lock, and comes back with a :class:`PageGrant`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final, Self

from kvmsim.effect import (
    Access,
    Effect,
    Installed,
    LeaveGuest,
    NeedPage,
    NeedShared,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.exits import BadHvaExit, Exit, InternalErrorExit, MemoryFaultExit, MmioExit
from kvmsim.kind import PrivateRule
from kvmsim.level import mapping_levels, pages_per_leaf
from kvmsim.memslot import Memslot
from kvmsim.mmu import Gate, GuardRefusal, Mmu
from kvmsim.uapi import (
    ABIS,
    EHWPOISON,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SHIFT,
    PAGE_SIZE,
    Abi,
)

__all__ = [
    "Access",
    "Effect",
    "Fault",
    "FaultStateError",
    "Installed",
    "LeaveGuest",
    "NeedPage",
    "NeedShared",
    "PageGrant",
    "Retry",
    "RetryReason",
    "State",
]

# --- the machine ------------------------------------------------------------------------------


class State(Enum):
    """Where a fault stands."""

    NEW = "new"
    SNAPPED = "snapped"
    WAIT_PAGE = "waits for a private page"
    WAIT_SHARED = "waits for a shared page"
    DONE = "done"


class FaultStateError(RuntimeError):
    """A step that the fault's state does not allow; nothing changed."""


_FROM: Final[Mapping[str, State]] = {
    "snapshot": State.NEW,
    "look_up": State.SNAPPED,
    "page_arrived": State.WAIT_PAGE,
    "shared_arrived": State.WAIT_SHARED,
}

_AFTER: Final[Mapping[type[Effect], State]] = {
    NeedPage: State.WAIT_PAGE,
    NeedShared: State.WAIT_SHARED,
    Installed: State.DONE,
    Retry: State.NEW,
    LeaveGuest: State.DONE,
}

# The owner's status to KVM_RUN's errno, and why. kvm_gmem_get_pfn() passes EIO, ENOMEM and
# EHWPOISON through; a page that is not there, beyond the end or not ours to write is EFAULT.
_PAGE_ERRORS: Final[Mapping[int, tuple[int, str]]] = {
    errno.ENOENT: (errno.EFAULT, "no page, and none may be made"),
    errno.EFBIG: (errno.EFAULT, "beyond the end of the private file"),
    errno.EACCES: (errno.EFAULT, "the private file may not be written"),
    errno.EIO: (errno.EIO, "the private page cannot be reached"),
    errno.ENOMEM: (errno.ENOMEM, "no memory for the private page"),
    EHWPOISON: (EHWPOISON, "the private page is poisoned"),
}
_LARGE: Final = pages_per_leaf(2)
_OTHER_ERROR: Final = (errno.EIO, "the owner's answer is none to this question")
_WRONG_TYPE: Final = "the access is of the other type than the gfn's attribute: convert it"


@dataclass(slots=True)
class Fault:
    """A fault of vCPU ``vcpu`` at ``gpa`` (bytes, with the bit of its side as the guest set it).

    :meth:`snapshot` fills in ``gfn``, without that bit, and whether the access is
    ``private``.
    """

    vcpu: int
    gpa: int
    access: Access = field(default_factory=Access)
    state: State = State.NEW
    snap: int = -1
    slot: Memslot | None = None
    gfn: int = -1
    private: bool = False

    def snapshot(self, mmu: Mmu) -> None:
        """Remember the counter (KVM: ``fault->mmu_seq``, before an smp_rmb()), then decode gpa.

        Where the attribute is the type, it is read anew for every try: such a fault can be of the
        wrong type only if the attribute changes under it, and then it starts again.
        """
        self._require("snapshot")
        self.snap = mmu.invalidate.seq
        kind = mmu.kind
        self.gfn = (self.gpa & ~kind.side_bit) >> PAGE_SHIFT
        if kind.side_bit:
            self.private = self.gpa & kind.side_bit == kind.c_bit
        else:
            self.private = _PRIVATE[kind.rule](self, mmu)
        self.state = State.SNAPPED

    def look_up(self, mmu: Mmu) -> Effect:
        """Find slot and attribute and say which page is needed, or why there is none."""
        self._require("look_up")
        gfn = self.gfn
        self.slot = slot = mmu.slots.find(gfn)
        leave = _REFUSE[mmu.abi](self, mmu, slot)
        if leave is not None or slot is None:
            return self._after(LeaveGuest(leave or self._mmio()))
        if self.access.write and slot.readonly:
            return self._after(LeaveGuest(self._mmio()))  # KVM_PFN_ERR_RO_FAULT: emulate
        # Unlocked in KVM, and only to save work: the check that counts is at the store.
        if mmu.invalidate.retry(gfn, self.snap):
            return self._after(self._stale(mmu))
        if not self._by_file(slot):
            return self._after(NeedShared(slot, slot.shared_page(gfn)))
        page = slot.private_page(gfn)
        if slot.file is None:  # as measured: EFAULT with MEMORY_FAULT until the slot is deleted
            return self._after(self._failed(errno.ENOENT))
        if (slot.file, page) in mmu.poison:
            return self._after(self._failed(EHWPOISON))
        first, last = self._around(mmu, slot, mmu.window)
        start, end = slot.private_page(first), slot.private_page(last)
        return self._after(NeedPage(slot.file, page, start, end, self.access.write))

    def page_arrived(self, mmu: Mmu, grant: PageGrant) -> Effect:
        """Install the granted pages if all that led here still holds, else retry or leave."""
        self._require("page_arrived")
        slot = self.slot
        assert slot is not None
        page = slot.private_page(self.gfn)
        status = grant.status
        if not status and self.access.write and not grant.writable:
            status = errno.EACCES
        fits = grant.file == slot.file and grant.start <= page < grant.end
        if status or not fits:
            return self._after(self._failed(status))
        if mmu.invalidate.retry(self.gfn, self.snap):
            return self._after(self._stale(mmu))
        start, end = mmu.backing.installable(grant.file, page, grant.start, grant.end, grant.seq)
        if not start <= page < end:
            return self._after(Retry(RetryReason.NEWER))
        hpa = mmu.backing.hpa(grant.instance, page)
        if hpa is None:
            return self._after(Retry(RetryReason.INSTANCE))
        first, last = self._around(mmu, slot, mmu.window)
        first, last = max(first, slot.private_gfn(start)), min(last, slot.private_gfn(end))
        # An instance is linear, so its ends tell whether all of it is here.
        base = hpa - (self.gfn - first) * PAGE_SIZE
        if mmu.backing.hpa(grant.instance, slot.private_page(first)) != base or (
            mmu.backing.hpa(grant.instance, slot.private_page(last - 1))
            != base + (last - 1 - first) * PAGE_SIZE
        ):
            first, last, base = self.gfn, self.gfn + 1, hpa
        return self._install(mmu, first, last, base, writable=grant.writable)

    def shared_arrived(self, mmu: Mmu, hpa: int | None) -> Effect:
        """Install the shared page at ``hpa`` (bytes); None: the userspace side has none."""
        self._require("shared_arrived")
        slot = self.slot
        assert slot is not None
        if hpa is None or slot.shared is None:
            return self._after(LeaveGuest(BadHvaExit(self.gfn << PAGE_SHIFT)))
        if mmu.invalidate.retry(self.gfn, self.snap):
            return self._after(self._stale(mmu))
        lowest, highest = self._around(mmu, slot, mmu.around)
        first, last, base = self.gfn, self.gfn + 1, hpa
        while first > lowest and slot.shared.hpa(slot.shared_page(first - 1)) == base - PAGE_SIZE:
            first, base = first - 1, base - PAGE_SIZE
        while last < highest and slot.shared.hpa(slot.shared_page(last)) == (
            base + (last - first) * PAGE_SIZE
        ):
            last += 1
        return self._install(mmu, first, last, base, writable=not slot.readonly)

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        slot = self.slot and (self.slot.id, self.slot.base_gfn, self.slot.file, self.slot.file_page)
        return (self.vcpu, self.gpa, self.access, self.state, self.snap, slot, self.private)

    def copy(self) -> Self:
        """An independent twin."""
        return type(self)(
            self.vcpu, self.gpa, self.access, self.state, self.snap, self.slot, self.gfn,
            self.private,
        )  # fmt: skip

    def _around(self, mmu: Mmu, slot: Memslot, npages: int) -> tuple[int, int]:
        """The gfns of the aligned block of ``npages`` that are like ours: slot and attribute."""
        gfn = self.gfn
        if mmu.invalidate.in_progress:  # not of ours, but perhaps of our neighbours
            return gfn, gfn + 1
        lowest, highest = mmu.same_type(gfn, slot)
        block = gfn & -npages
        first = max(block, slot.base_gfn, lowest)
        last = min(block + npages, slot.end_gfn, highest)
        if mmu.poison and slot.file is not None and self._by_file(slot):
            page = slot.private_page(gfn)
            start, end = slot.private_page(first), slot.private_page(last)
            start, end = mmu.poison.clip(slot.file, page, start, end)
            first, last = slot.private_gfn(start), slot.private_gfn(end)
        return first, last

    def _by_file(self, slot: Memslot) -> bool:
        """Whether it is the slot's private file that serves this access."""
        return slot.has_file and (self.private or slot.whole)

    def _install(self, mmu: Mmu, first: int, last: int, hpa: int, *, writable: bool) -> Effect:
        """Store the leaves of gfns [first, last), in the half that was accessed."""
        if mmu.gate is not None:
            return self._admitted(mmu, mmu.gate, first, last, hpa, writable=writable)
        half = self.gpa & mmu.kind.side_bit
        try:
            self._store(mmu, half, first, last, hpa, writable=writable)
        except MemoryError:
            return self._no_table()
        return self._after(Installed(first << PAGE_SHIFT | half, last - first))

    def _admitted(
        self, mmu: Mmu, gate: Gate, first: int, last: int, hpa: int, *, writable: bool
    ) -> Effect:
        """Store what the confidential processor lets in; what it keeps back faults again."""
        half = self.gpa & mmu.kind.side_bit
        try:
            for leaf in gate.admit(
                self.gfn, first, last, hpa, private=self.private, writable=writable
            ):
                end = leaf.gfn + leaf.npages
                self._store(mmu, half, leaf.gfn, end, leaf.hpa, writable=writable)
        except GuardRefusal as refusal:
            leave = self._memory_fault(refusal.errno, refusal.reason)
            return self._after(LeaveGuest(leave))
        except MemoryError:
            return self._no_table()
        return self._after(Installed(self.gfn << PAGE_SHIFT | half, 1))

    def _no_table(self) -> Effect:
        leave = self._memory_fault(errno.ENOMEM, "no memory for a second-stage table")
        return self._after(LeaveGuest(leave))

    def _store(
        self, mmu: Mmu, half: int, first: int, last: int, hpa: int, *, writable: bool
    ) -> None:
        """Store leaves of gfns [first, last), as large as they may be."""
        slot = self.slot
        # Writes are logged by the page (kvm_slot_dirty_track_enabled()).
        top = 1 if slot is not None and slot.flags & KVM_MEM_LOG_DIRTY_PAGES else mmu.max_level
        offset = (hpa >> PAGE_SHIFT) - first
        store = mmu.stage2.map
        if last - first < _LARGE:
            top = 1
        for gfn, npages, level in mapping_levels(first, last - first, first + offset, top):
            gpa, target = gfn << PAGE_SHIFT | half, (gfn + offset) << PAGE_SHIFT
            make = store if level == 1 else partial(store, level=level)
            make(gpa, target, npages, writable=writable, executable=True)

    def _require(self, step: str) -> None:
        if self.state is not _FROM[step]:
            raise FaultStateError(
                f"{step} of vCPU {self.vcpu}'s fault at gpa {self.gpa:#x}: it is "
                f"{self.state.value!r}, needs {_FROM[step].value!r}"
            )

    def _after(self, effect: Effect) -> Effect:
        self.state = _AFTER[type(effect)]
        return effect

    def _stale(self, mmu: Mmu) -> Retry:
        unchanged = mmu.invalidate.seq == self.snap
        return Retry(RetryReason.IN_PROGRESS if unchanged else RetryReason.INVALIDATED)

    def _mmio(self) -> Exit:
        if self.access.fetch:  # the emulator cannot fetch from a device
            return InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION)
        data = self.access.data if self.access.write else b""
        gpa = self.gfn << PAGE_SHIFT | self.gpa & (PAGE_SIZE - 1)
        return MmioExit(gpa, self.access.length, self.access.write, data)

    def _memory_fault(self, number: int | None, reason: str) -> MemoryFaultExit:
        return MemoryFaultExit(self.gfn << PAGE_SHIFT, PAGE_SIZE, self.private, number, reason)

    def _failed(self, status: int) -> LeaveGuest:
        """The exit for a private page that is not to be had."""
        number, reason = _PAGE_ERRORS.get(status, _OTHER_ERROR)
        return LeaveGuest(self._memory_fault(number, reason))

    def _mistyped(self, mmu: Mmu, slot: Memslot | None) -> MemoryFaultExit | None:
        if self.private == mmu.is_private(self.gfn, slot):
            return None
        return self._memory_fault(ABIS[mmu.abi].conversion_errno, _WRONG_TYPE)

    def _refuse_upstream(self, mmu: Mmu, slot: Memslot | None) -> Exit | None:
        """kvm_mmu_faultin_pfn(): the attribute is asked even where no slot is."""
        mistyped = self._mistyped(mmu, slot)
        if mistyped is None and self.private and (slot is None or not slot.has_file):
            return self._memory_fault(errno.EFAULT, "private access without a private file")
        return mistyped

    def _refuse_v7(self, mmu: Mmu, slot: Memslot | None) -> Exit | None:
        """Only KVM_MEM_PRIVATE slots have types; elsewhere both sides are the userspace memory."""
        return None if slot is None or not slot.has_file else self._mistyped(mmu, slot)


_PRIVATE: Final[Mapping[PrivateRule, Callable[[Fault, Mmu], bool]]] = {
    PrivateRule.ATTRIBUTE: lambda fault, mmu: mmu.is_private(fault.gfn, mmu.slots.find(fault.gfn)),
    PrivateRule.NEVER: lambda fault, mmu: False,
}

_REFUSE: Final[Mapping[Abi, Callable[[Fault, Mmu, Memslot | None], Exit | None]]] = {
    "upstream": Fault._refuse_upstream,
    "v7": Fault._refuse_v7,
}
