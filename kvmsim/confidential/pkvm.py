# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's use of pKVM: one protected VM from __pkvm_init_vm() to its teardown.

What arch/arm64/kvm/pkvm.c and mmu.c do on the host's side (v6.18): pkvm_mem_abort() donates a page
on a fault, __pkvm_host_reclaim_page() takes it back, zeroed. Which page is whose the hypervisor
alone says; the second stage that the engine walks shows what is the guest's. Conversion is in
place: the guest shares a page of its own and the host learns that its index is shared. A page that
its owner moves is the guest's at its old place until it comes to the new one
(`Hypervisor.host_move_guest`, which no kernel has: there nothing moves).

The hypervisor takes nothing from a guest that lives. Where the owner of the memory frees a page of
the guest's all the same, the VM dies of it (as KVM_BUG_ON() leaves one), its teardown begins, and
the page is reclaimed, zeroed, before the owner is answered.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hwemu.cpu import api as cpu_api
from hwemu.cpu.api import Regs
from hwemu.encryptedaccess import Encrypt
from hwemu.pkvm.access import host_reaches
from hwemu.pkvm.hypercall import (
    MEM_SHARE,
    MEM_UNSHARE,
    SMCCC_RET_INVALID_PARAMETER,
    HostTask,
    Returned,
    hypercall,
)
from hwemu.pkvm.state import PageState, PkvmError
from hwemu.runs import true_runs
from kvmsim import exits
from kvmsim.confidential.pkvmhost import PkvmHost, pfns_of
from kvmsim.confidential.platform import Platform
from kvmsim.guard import Again, Answer, GuardRefusal, Inject, Leaf, Leave, Resolve, Verdict
from kvmsim.mmu import Zapped
from kvmsim.running import RunningVm
from kvmsim.uapi import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from kvmsim.views.pkvm import PkvmTables
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.vmsa import EntryState

log = logging.getLogger(__name__)

_MASK64: Final = (1 << 64) - 1
_UD: Final = 6
_OTHERS: Final = frozenset(
    ("tdcall", "seamcall", "vmgexit", "pvalidate", "rmpadjust", "psmash", "rmpupdate")
)


def make(platform: Platform, running: RunningVm, encrypt: Encrypt | None = None) -> PkvmGuard:
    """A protected VM for ``running``, under the hypervisor of this host: nothing is encrypted."""
    return PkvmGuard(platform, running)


class PkvmGuard:
    """One protected VM."""

    def __init__(self, platform: Platform, running: RunningVm) -> None:
        self._platform = platform
        self._running = running
        self._host = platform.hardware(PkvmHost, PkvmHost)
        self._hyp = self._host.hypervisor
        self._handle: int | None = None
        self._staged: dict[int, LaunchPage] = {}
        self._asked: dict[int, tuple[int, int] | None] = {}  #: vCPU → call and gfn, or a hypercall
        self._gone: list[tuple[int, int]] = []  #: (gpa, npages) unmapped and not yet told
        self.finished = False

    @property
    def movable(self) -> bool:
        """Nothing of a page depends on its address."""
        return True

    @property
    def instructions(self) -> frozenset[str]:
        """HVC, which is VMCALL here."""
        return _OTHERS | {"vmcall"}

    # --- launch ---------------------------------------------------------------------------------

    def start(self, vcpus: int) -> None:
        """__pkvm_init_vm(): a VM as wide as its slots."""
        npages = max((slot.end_gfn for slot in self._running.vm.mmu.slots), default=0)
        with self._refusing("the VM cannot be made"), self._platform.lock:
            self._handle = self._hyp.create_vm(npages)
            self._host.guards[self._handle] = self

    def stage(self, page: LaunchPage) -> bool:
        """A page that the host fills before it is the guest's: nothing is measured here."""
        if self.finished:
            raise GuardRefusal(errno.EINVAL, "the VM may run: its pages are its own")
        self._staged[page.gpa >> PAGE_SHIFT] = page
        return True

    def unstage(self, page: LaunchPage) -> None:
        """It is not filled."""
        self._staged.pop(page.gpa >> PAGE_SHIFT, None)

    def finish(self, entries: Sequence[EntryState]) -> None:
        """The VM may run."""
        self.finished = True

    # --- the second stage -----------------------------------------------------------------------

    def fault(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """A stage-2 abort is always the host's to resolve."""
        return None

    def mmio(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """So is an access to a device."""
        return None

    def admit(
        self, gfn: int, first: int, last: int, hpa: int, *, private: bool, writable: bool
    ) -> tuple[Leaf, ...]:
        """pkvm_mem_abort(): donate what the guest has not; what it has, it has."""
        handle = self._require()
        with self._refusing(f"gfn {gfn:#x} does not take hpa {hpa:#x}"), self._platform.lock:
            staged = self._staged.pop(gfn, None)
            if staged is not None:
                self._platform.memory.write(hpa + (gfn - first << PAGE_SHIFT), staged.data)
            if not self.finished:  # what lies around it is not loaded yet
                first, last, hpa = gfn, gfn + 1, hpa + (gfn - first << PAGE_SHIFT)
            guest = self._hyp.vms.get("stage-2 abort", handle)
            pfn = hpa >> PAGE_SHIFT
            has = guest.valid(first, last - first)
            pfns = guest.pfns(first, last - first)
            wanted = np.arange(pfn, pfn + last - first)
            if has[gfn - first] and pfns[gfn - first] != wanted[gfn - first]:
                raise GuardRefusal(
                    errno.EPERM, f"it is hpa {int(pfns[gfn - first]) << PAGE_SHIFT:#x} already"
                )
            start, end = _around(gfn - first, has == has[gfn - first])
            if has[gfn - first]:
                start, end = _around(gfn - first, has & (pfns == wanted))
            else:
                self._hyp.host_donate_guest(handle, pfn + start, first + start, end - start)
            return (Leaf(first + start, end - start, hpa + (start << PAGE_SHIFT)),)

    def unmap(self, gfn: int, npages: int) -> None:
        """The hypervisor has taken leaves away."""
        self._running.stage2.zap(gfn << PAGE_SHIFT, npages)
        self._gone.append((gfn << PAGE_SHIFT, npages))

    def zapped(self, gfn: int, npages: int, *, private: bool, moving: bool) -> None:
        """The host's idea of the guest's stage 2; the hypervisor's stands."""

    def drained(self) -> bool:
        """Nothing waits."""
        return False

    def leaving(self, hpa: int, size: int) -> bool:
        """It stays the guest's where it is."""
        with self._platform.lock:
            kept = self.keeps(hpa, size)
            if kept:
                self._host.vacated.add(pfns_of(hpa, size))
            return kept

    def keeps(self, hpa: int, size: int) -> bool:
        """Whether the guest has any page there."""
        with self._platform.lock:
            return bool(self._mine(hpa, size).any())

    def _mine(self, hpa: int, size: int) -> npt.NDArray[np.bool_]:
        """Which gfns lead there."""
        if self._handle is None:
            return np.zeros(0, np.bool_)
        guest = self._hyp.vms.get("look", self._handle)
        pfns, (start, end) = guest.pfns(0, guest.npages), pfns_of(hpa, size)
        return guest.valid(0, guest.npages) & (pfns >= start) & (pfns < end)

    def migrated(self, gfn: int, npages: int, old: int, new: int) -> None:
        """Donate the new place of every page that waits at the old one, in its stead."""
        with self._platform.lock:
            if self._handle is None or self._running.death is not None:
                return
            guest = self._hyp.vms.get("move", self._handle)
            pfn, waits = old >> PAGE_SHIFT, guest.valid(gfn, npages)
            waits &= guest.pfns(gfn, npages) == np.arange(pfn, pfn + len(waits))
            for first, last in true_runs(waits):
                target = (new >> PAGE_SHIFT) + first
                try:
                    self._hyp.host_move_guest(self._handle, target, gfn + first, last - first)
                except PkvmError as error:
                    log.warning("gpa %#x stays at hpa %#x: %s", gfn + first << PAGE_SHIFT,
                                pfn + first << PAGE_SHIFT, error)  # fmt: skip

    def released(self, hpa: int, size: int) -> None:
        """Reclaim what the guest has of them; GuardRefusal while it lives."""
        with self._platform.lock:
            for gfn, end in true_runs(self._mine(hpa, size)):
                self._reclaim(self._require(), gfn, end - gfn)
            self._host.vacated.discard(pfns_of(hpa, size))

    def _reclaim(self, handle: int, gfn: int, npages: int) -> None:
        """__pkvm_host_reclaim_page(): only of a VM whose teardown has begun."""
        what = f"gpa {gfn << PAGE_SHIFT:#x}+{npages << PAGE_SHIFT:#x} is freed under its guest"
        with self._refusing(what):
            if self._running.death is not None and not self._hyp.vms.get(what, handle).dying:
                self._hyp.start_teardown(handle)
            self._hyp.host_reclaim_guest(handle, gfn, npages)

    def host_reaches(self, hpa: int, size: int) -> bool:
        """What is the guest's alone left the host's stage 2 (handle_host_mem_abort())."""
        pfn, end = hpa >> PAGE_SHIFT, -(-(hpa + size) // PAGE_SIZE)
        with self._platform.lock:
            if not self._hyp.vmemmap.is_memory(pfn, end - pfn):
                return True
            return bool(host_reaches(self._hyp, pfn, end - pfn).all())

    # --- vCPUs ----------------------------------------------------------------------------------

    def enter(self, vcpu: int) -> None:
        """pkvm_load_hyp_vcpu()."""
        with self._platform.lock:
            self._hyp.vcpu_load(self._require())

    def leave(self, vcpu: int) -> None:
        """pkvm_put_hyp_vcpu()."""
        with self._platform.lock:
            self._hyp.vcpu_put(self._require())

    def instruction(self, vcpu: int, left: cpu_api.InterceptExit, regs: Regs) -> Verdict:
        """An HVC: function in RAX, arguments in RBX, RCX, RDX."""
        if left.instruction != "vmcall":
            return Inject(_UD)
        if self._running.death is not None:
            return Again()  # never: it has left guest code for good
        if regs.rax & 0xFFFF_FFFF == MEM_UNSHARE and self._shared(regs.rbx):
            # the host lets go first: a reference that it holds refuses the conversion
            return self._tell(vcpu, MEM_UNSHARE, regs.rbx)
        handle = self._require()
        with self._platform.lock:
            answer = hypercall(self._hyp, handle, regs.rax, regs.rbx, regs.rcx, regs.rdx)
        if isinstance(answer, Returned):
            if regs.rax & 0xFFFF_FFFF == MEM_SHARE and not answer.x0:
                return self._tell(vcpu, MEM_SHARE, regs.rbx)
            return self._answer(regs, answer.x0)
        if answer.task is HostTask.MAP:
            return Resolve(answer.ipa, cpu_api.Access.WRITE)
        if answer.task is HostTask.SPLIT:
            with self._platform.lock:
                self._hyp.host_split_guest(handle, answer.ipa >> PAGE_SHIFT)
            return Again(self._told())
        self._asked[vcpu] = None
        args = (regs.rbx, regs.rcx, regs.rdx, regs.rsi)
        return Leave(exits.HypercallExit(regs.rax, args))

    def _shared(self, ipa: int) -> bool:
        guest = self._hyp.vms.get("unshare", self._require())
        gfn = ipa >> PAGE_SHIFT
        fits = ipa % PAGE_SIZE == 0 and gfn < guest.npages
        return fits and guest.states(gfn, 1)[0] == PageState.SHARED_OWNED

    def _tell(self, vcpu: int, call: int, ipa: int) -> Leave:
        """Have the VMM note that an index has another type."""
        self._asked[vcpu] = (call, ipa >> PAGE_SHIFT)
        attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if call == MEM_UNSHARE else 0
        return Leave(exits.HypercallExit(KVM_HC_MAP_GPA_RANGE, (ipa, 1, attributes)))

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM has noted it, or refuses: then nothing is shared, or it stays so."""
        asked, result = self._asked.pop(vcpu), data if isinstance(data, int) else 0
        if asked is None or self._running.death is not None:
            return self._answer(regs, result)
        call, gfn = asked
        with self._platform.lock:
            if call == MEM_SHARE and result:
                self._hyp.guest_unshare_host(self._require(), gfn)
            if call == MEM_UNSHARE and not result:
                self._hyp.guest_unshare_host(self._require(), gfn)
        return self._answer(regs, SMCCC_RET_INVALID_PARAMETER if result else 0)

    def _answer(self, regs: Regs, result: int) -> Answer:
        return Answer(replace(regs, rax=result & _MASK64), self._told())

    def _told(self) -> Zapped:
        gone, self._gone = tuple(self._gone), []
        return Zapped(gone, sum(npages for _, npages in gone))

    # --- its end --------------------------------------------------------------------------------

    def close(self) -> None:
        """__pkvm_start_teardown_vm() and what follows: every page is the host's, zeroed."""
        if self._handle is None:
            return
        with self._platform.lock:
            self._hyp.teardown(self._handle)
            del self._host.guards[self._handle]
        self._handle = None

    def describe(self) -> dict[str, Any]:
        """How many pages are in which state."""
        with self._platform.lock:
            guest = self._hyp.vms.get("describe", self._require())
            states = guest.states(0, guest.npages)
            return {
                "technology": "pKVM",
                "handle": guest.handle,
                "pages": {
                    state.name: int(np.count_nonzero(states == state))
                    for state in PageState
                    if state is not PageState.NOPAGE
                },
            }

    def tables(self) -> PkvmTables:
        """The guest's stage 2, and the host's."""
        return PkvmTables(self._platform.lock, self._hyp, self._handle)

    def residue(self) -> dict[str, int]:
        """Pages that the host has not back, and VMs."""
        with self._platform.lock:
            states = self._hyp.vmemmap.host_state
            others = sum(guest.npages for guest in self._hyp.vms)
            missing = int(np.count_nonzero(states != PageState.OWNED)) if not others else 0
            return {"pages": missing, "VMs": int(self._handle is not None)}

    # --- inside ---------------------------------------------------------------------------------

    def _require(self) -> int:
        if self._handle is None:
            raise GuardRefusal(errno.EINVAL, "the VM was not made, or is torn down")
        return self._handle

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except PkvmError as error:
            raise GuardRefusal(error.errno or errno.EIO, f"{what}: {error}") from error


def _around(at: int, like: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """The run [start, end) of true entries around index ``at``."""
    no = np.flatnonzero(~like)
    before, after = no[no < at], no[no > at]
    return int(before[-1]) + 1 if len(before) else 0, int(after[0]) if len(after) else len(like)
