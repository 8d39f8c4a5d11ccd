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
from typing import Final, Protocol, Self

from kvmsim.attributes import Attributes
from kvmsim.exits import BadHvaExit, Exit, InternalErrorExit, MemoryFaultExit, MmioExit
from kvmsim.invalidate import MmuInvalidate
from kvmsim.memslot import SHARED_BIT, Memslot, Memslots
from kvmsim.uapi import ABIS, EHWPOISON, KVM_INTERNAL_ERROR_EMULATION, PAGE_SHIFT, PAGE_SIZE, Abi


class SecondStage(Protocol):
    """The second-stage table of one VM. Addresses are bytes, page-aligned; counts are pages."""

    def map(self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool) -> object:
        """Store leaves for a contiguous range over whatever was there; MemoryError: no table."""

    def zap(self, gpa: int, npages: int) -> int:
        """Clear the leaves of a range; how many there were."""


class Backing(Protocol):
    """The user's half of the contract with the owner of private files."""

    def may_install(self, file: int, page: int, seq: int) -> bool:
        """False if an invalidation of ``page`` newer than ``seq`` was processed here."""

    def hpa(self, instance: int, page: int) -> int | None:
        """Host-physical address of ``page`` in an extent instance; None: that one is gone."""


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


@dataclass(frozen=True, slots=True)
class Access:
    """What the guest did. ``data`` is what a write stores; only an MMIO exit needs it."""

    write: bool = False
    fetch: bool = False
    length: int = 1
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class PageGrant:
    """The owner's answer: pages [start, end) of ``file`` lie in extent instance ``instance``.

    ``seq`` is the last invalidation the owner had sent when it granted; ``status`` an errno, 0 if
    granted.
    """

    file: int
    start: int
    end: int
    seq: int
    instance: int
    writable: bool = True
    status: int = 0


@dataclass(frozen=True, slots=True)
class NeedPage:
    """Ask the owner for ``page`` of the private ``file``, then call ``page_arrived``."""

    file: int
    page: int
    write: bool


@dataclass(frozen=True, slots=True)
class NeedShared:
    """Look ``page`` up in the shared side of ``slot``, then call ``shared_arrived``."""

    slot: Memslot
    page: int


@dataclass(frozen=True, slots=True)
class Installed:
    """Leaves exist for ``npages`` from ``gpa`` (with the shared bit, if shared): resume."""

    gpa: int
    npages: int


class RetryReason(Enum):
    """Why what was found may no longer hold."""

    IN_PROGRESS = "an invalidation of the gfn is in progress"
    INVALIDATED = "slots, attributes or pages of the VM changed since the snapshot"
    NEWER = "a newer invalidation of the page was processed than the owner's grant knew"
    INSTANCE = "the extent instance of the grant is gone"


@dataclass(frozen=True, slots=True)
class Retry:
    """Begin the same fault again; nothing was installed."""

    reason: RetryReason


@dataclass(frozen=True, slots=True)
class LeaveGuest:
    """KVM_RUN ends with ``exit``."""

    exit: Exit


Effect = NeedPage | NeedShared | Installed | Retry | LeaveGuest


class State(Enum):
    """Where a fault stands."""

    NEW = "new"
    SNAPPED = "snapped"
    WAIT_PAGE = "waits for a private page"
    WAIT_SHARED = "waits for a shared page"
    DONE = "done"


class FaultStateError(RuntimeError):
    """A step that the fault's state does not allow; nothing changed."""


_STEP_FROM: Final[Mapping[str, State]] = {
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
_OTHER_ERROR: Final = (errno.EIO, "the owner answered what is no answer")


@dataclass(slots=True)
class Fault:
    """A fault of vCPU ``vcpu`` at ``gpa`` (bytes, with the shared bit as the guest set it)."""

    vcpu: int
    gpa: int
    access: Access = field(default_factory=Access)
    state: State = State.NEW
    snap: int = -1
    slot: Memslot | None = None

    @property
    def private(self) -> bool:
        """Whether the guest meant the private side."""
        return not self.gpa & SHARED_BIT

    @property
    def gfn(self) -> int:
        """The guest frame number, without the shared bit."""
        return (self.gpa & ~SHARED_BIT) >> PAGE_SHIFT

    def snapshot(self, mmu: Mmu) -> None:
        """Remember the counter. (KVM: ``fault->mmu_seq``, before an smp_rmb().)"""
        self._require("snapshot")
        self.snap = mmu.invalidate.seq
        self.state = State.SNAPPED

    def look_up(self, mmu: Mmu) -> Effect:
        """Find slot and attribute and say which page is needed, or why there is none."""
        self._require("look_up")
        gfn = self.gfn
        self.slot = slot = mmu.slots.find(gfn)
        leave = _LOOK_UP[mmu.abi](self, mmu, slot)
        if leave is not None:
            return self._after(LeaveGuest(leave))
        assert slot is not None
        if self.access.write and slot.readonly:
            return self._after(LeaveGuest(self._mmio()))  # KVM_PFN_ERR_RO_FAULT: emulate
        # Unlocked in KVM, and only to save work: the check that counts is at the store.
        if mmu.invalidate.retry(gfn, self.snap):
            return self._after(self._stale(mmu))
        if slot.file is not None and self.private:
            return self._after(NeedPage(slot.file, slot.private_page(gfn), self.access.write))
        return self._after(NeedShared(slot, slot.shared_page(gfn)))

    def page_arrived(self, mmu: Mmu, grant: PageGrant) -> Effect:
        """Install the granted pages if all that led here still holds, else retry or leave."""
        self._require("page_arrived")
        slot = self.slot
        assert slot is not None
        page = slot.private_page(self.gfn)
        status = grant.status
        if status == 0 and self.access.write and not grant.writable:
            status = errno.EACCES
        if status == 0 and not (grant.file == slot.file and grant.start <= page < grant.end):
            status = errno.EIO  # an answer to another question
        if status:
            number, reason = _PAGE_ERRORS.get(status, _OTHER_ERROR)
            return self._after(LeaveGuest(self._memory_fault(number, reason)))
        if mmu.invalidate.retry(self.gfn, self.snap):
            return self._after(self._stale(mmu))
        if not mmu.backing.may_install(grant.file, page, grant.seq):
            return self._after(Retry(RetryReason.NEWER))
        hpa = mmu.backing.hpa(grant.instance, page)
        if hpa is None:
            return self._after(Retry(RetryReason.INSTANCE))

        def granted(gfn: int) -> int | None:
            other = slot.private_page(gfn)
            if not mmu.backing.may_install(grant.file, other, grant.seq):
                return None
            return mmu.backing.hpa(grant.instance, other)

        window = slot.private_gfn(grant.start), slot.private_gfn(grant.end)
        return self._install(mmu, slot, hpa, window, granted, writable=grant.writable)

    def shared_arrived(self, mmu: Mmu, hpa: int | None) -> Effect:
        """Install the shared page at ``hpa`` (bytes); None: the userspace side has none."""
        self._require("shared_arrived")
        slot = self.slot
        assert slot is not None
        if hpa is None:
            return self._after(LeaveGuest(BadHvaExit(self.gfn << PAGE_SHIFT)))
        if mmu.invalidate.retry(self.gfn, self.snap):
            return self._after(self._stale(mmu))
        side = slot.shared
        first = self.gfn & -mmu.around

        def present(gfn: int) -> int | None:
            return None if side is None else side.hpa(slot.shared_page(gfn))

        window = first, first + mmu.around
        return self._install(mmu, slot, hpa, window, present, writable=not slot.readonly)

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        slot = self.slot and (self.slot.id, self.slot.base_gfn, self.slot.file, self.slot.file_page)
        return (self.vcpu, self.gpa, self.access, self.state, self.snap, slot)

    def copy(self) -> Self:
        """An independent twin."""
        return type(self)(self.vcpu, self.gpa, self.access, self.state, self.snap, self.slot)

    def _install(
        self,
        mmu: Mmu,
        slot: Memslot,
        hpa: int,
        window: tuple[int, int],
        hpa_of: Callable[[int], int | None],
        *,
        writable: bool,
    ) -> Effect:
        """Map the gfn and, around it, what of ``window`` is as good and contiguous in hpa."""
        gfn = self.gfn
        run = mmu.attributes.run(gfn)
        lowest = max(window[0], slot.base_gfn, run.start)
        highest = min(window[1], slot.end_gfn, run.end)
        if mmu.invalidate.in_progress:  # of other gfns, which may be our neighbours
            lowest, highest = gfn, gfn + 1
        first, last = gfn, gfn + 1
        while first > lowest and hpa_of(first - 1) == hpa - (gfn - first + 1) * PAGE_SIZE:
            first -= 1
        while last < highest and hpa_of(last) == hpa + (last - gfn) * PAGE_SIZE:
            last += 1
        gpa = first << PAGE_SHIFT | (self.gpa & SHARED_BIT)
        start = hpa - (gfn - first) * PAGE_SIZE
        try:
            mmu.stage2.map(gpa, start, last - first, writable=writable, executable=True)
        except MemoryError:
            leave = self._memory_fault(errno.ENOMEM, "no memory for a second-stage table")
            return self._after(LeaveGuest(leave))
        return self._after(Installed(gpa, last - first))

    def _require(self, step: str) -> None:
        if self.state is not _STEP_FROM[step]:
            raise FaultStateError(
                f"{step} of vCPU {self.vcpu}'s fault at gpa {self.gpa:#x}: it is "
                f"{self.state.value!r}, needs {_STEP_FROM[step].value!r}"
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
        return MmioExit(self.gpa & ~SHARED_BIT, self.access.length, self.access.write, data)

    def _memory_fault(self, number: int | None, reason: str) -> MemoryFaultExit:
        return MemoryFaultExit(self.gfn << PAGE_SHIFT, PAGE_SIZE, self.private, number, reason)


_WRONG_TYPE: Final = "the access is of the other type than the gfn's attribute: convert it"


def _is_private(mmu: Mmu, gfn: int) -> bool:
    return bool(mmu.attributes.get(gfn) & ABIS[mmu.abi].attribute_private)


def _look_up_upstream(fault: Fault, mmu: Mmu, slot: Memslot | None) -> Exit | None:
    """kvm_mmu_faultin_pfn(): the attribute is asked even where no slot is."""
    if fault.private != _is_private(mmu, fault.gfn):
        return fault._memory_fault(ABIS[mmu.abi].conversion_errno, _WRONG_TYPE)
    if slot is None and not fault.private:
        return fault._mmio()
    if fault.private and (slot is None or slot.file is None):
        return fault._memory_fault(errno.EFAULT, "private access without a private file")
    return None


def _look_up_v7(fault: Fault, mmu: Mmu, slot: Memslot | None) -> Exit | None:
    """Only KVM_MEM_PRIVATE slots know types; elsewhere either side is the userspace memory."""
    if slot is None:
        return fault._mmio()
    if slot.file is not None and fault.private != _is_private(mmu, fault.gfn):
        return fault._memory_fault(ABIS[mmu.abi].conversion_errno, _WRONG_TYPE)
    return None


_LOOK_UP: Final[Mapping[Abi, Callable[[Fault, Mmu, Memslot | None], Exit | None]]] = {
    "upstream": _look_up_upstream,
    "v7": _look_up_v7,
}
