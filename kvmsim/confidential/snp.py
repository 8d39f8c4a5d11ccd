# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's use of SEV-SNP: one guest from SNP_LAUNCH_START to SNP_DECOMMISSION.

What arch/x86/kvm/svm/sev.c does (v6.18): snp_launch_start(), sev_gmem_post_populate(),
snp_launch_finish(), sev_gmem_prepare(), sev_gmem_invalidate(), sev_vm_destroy(). The RMP decides;
the second stage that the engine walks has a leaf only where every access of the guest's would pass
it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

from hwemu.cpu import api as cpu_api
from hwemu.cpu.api import Regs
from hwemu.encryptedaccess import Encrypt, Technology
from hwemu.snp.asids import AsidState
from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.guestcontext import IdBlock, Policy
from hwemu.snp.hostops import HYPERVISOR, NewState
from hwemu.snp.launch import VMSA_GPA, PageType
from hwemu.snp.rmpentry import PageSize
from kvmsim.confidential.encryption import GuestPages
from kvmsim.confidential.frames import FrameMap
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.rmppages import RmpPages
from kvmsim.confidential.snphost import SnpHost, make_host
from kvmsim.confidential.snpintercepts import INSTRUCTIONS, SnpIntercepts
from kvmsim.guard import GuardRefusal, Leaf, Verdict
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE
from kvmsim.views.snp import SnpTables
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.launch import PageType as Loaded
from kvmsim.vmm.vmsa import EntryState

log = logging.getLogger(__name__)

_LARGE: Final = 512
DEFAULT_POLICY: Final = int(Policy.MUST_BE_ONE | Policy.SMT)

_TYPES: Final = {
    Loaded.NORMAL: PageType.NORMAL,
    Loaded.ZERO: PageType.ZERO,
    Loaded.UNMEASURED: PageType.UNMEASURED,
    Loaded.SECRETS: PageType.SECRETS,
    Loaded.CPUID: PageType.CPUID,
    Loaded.VMSA: PageType.VMSA,
}


def make(
    platform: Platform, running: RunningVm, encrypt: Encrypt | None = Encrypt.VIEW
) -> SnpGuard:
    """An SNP guest of the VM ``running``, on the hardware of this host."""
    return SnpGuard(platform, running, encrypt=encrypt)


class SnpGuard:
    """One guest; ``policy`` is that of SNP_LAUNCH_START."""

    def __init__(
        self,
        platform: Platform,
        running: RunningVm,
        *,
        policy: int = DEFAULT_POLICY,
        encrypt: Encrypt | None = Encrypt.VIEW,
    ) -> None:
        self._platform = platform
        self._running = running
        self._host = platform.hardware(SnpHost, make_host)
        self._rmp, self._firmware = self._host.rmp, self._host.firmware
        self._entries = RmpPages(self._rmp, self._firmware)
        self._policy = policy
        self._encrypt = encrypt
        self._pages: GuestPages | None = None  #: while its ASID has a key
        self._frames = FrameMap()  #: gfn → pfn, as the second stage would have it
        self._intercepts = SnpIntercepts(
            platform, running, self._rmp, self._frames, self._guest_request
        )
        self._staged: dict[int, LaunchPage] = {}
        self._vmsas: dict[int, int] = {}  #: vCPU → hpa
        self._context = 0  #: hpa of the guest context page
        self.asid = 0
        self.status = 0  #: what the AMD-SP answered to its last command that it refused
        self.rejected = b""  #: the page that it last refused, as it left it
        self.finished = False

    @property
    def movable(self) -> bool:
        """By SNP_PAGE_MOVE, unless its policy forbids that. Ciphertext in the file is bound to its
        address, and its owner copies it as it is.
        """
        allowed = not self._policy & Policy.PAGE_SWAP_DISABLE
        return allowed and self._encrypt is not Encrypt.BACKING

    @property
    def instructions(self) -> frozenset[str]:
        """All that an SNP guest does not execute without its hypervisor, or its RMP."""
        return INSTRUCTIONS

    # --- launch ---------------------------------------------------------------------------------

    def start(self, vcpus: int) -> None:
        """KVM_SEV_SNP_LAUNCH_START."""
        self.launch_start(self._policy)

    def launch_start(self, policy: int, gosvw: bytes = bytes(16)) -> None:
        """KVM_SEV_SNP_LAUNCH_START (snp_launch_start()): refused, nothing is left of it."""
        with self._refusing("the guest cannot be launched"), self._platform.lock:
            asid = self._host.free_asid()
            context = self._platform.pages.take()
            page = context >> PAGE_SHIFT
            self._host.update(page, NewState(assigned=True, immutable=True))
            self._firmware.gctx_create(page)
            self._context, self.asid = context, asid
            try:
                self._firmware.launch_start(page, policy, gosvw=gosvw)
                self._firmware.activate(page, asid)
                self._pages = GuestPages(
                    self._platform, self._running, Technology.SNP, asid, self._encrypt
                )
            except BaseException:
                self.close()
                self.asid = 0
                raise

    def stage(self, page: LaunchPage) -> bool:
        """KVM_SEV_SNP_LAUNCH_UPDATE, a page of it; of a VMSA all of it."""
        if self.finished:
            self.status = int(FwStatus.INVALID_GUEST_STATE)
            raise GuardRefusal(errno.EINVAL, "the launch is finished: no page is added any more")
        if page.vcpu is None:
            self._staged[page.gpa >> PAGE_SHIFT] = page
            return True
        with self._refusing(f"the VMSA of vCPU {page.vcpu} is not taken"), self._platform.lock:
            hpa = self._platform.pages.take()
            self._vmsas[page.vcpu] = hpa
            self._add(VMSA_GPA, hpa, page)
        return False

    def unstage(self, page: LaunchPage) -> None:
        """It is not added."""
        self._staged.pop(page.gpa >> PAGE_SHIFT, None)

    def _add(self, gpa: int, hpa: int, page: LaunchPage) -> None:
        """sev_gmem_post_populate(): copy in, make it Pre-Guest, let the AMD-SP measure it."""
        pfn = hpa >> PAGE_SHIFT
        self._platform.memory.write(hpa, page.data)
        state = NewState(assigned=True, immutable=True, gpa=gpa, asid=self.asid)
        self._host.update(pfn, state)
        try:
            self._firmware.launch_update(self._context >> PAGE_SHIFT, pfn, _TYPES[page.type])
        except BaseException:  # snp_page_reclaim(): the page is the host's again
            self._firmware.page_reclaim(pfn)
            self._host.update(pfn, HYPERVISOR)
            self.rejected = self._platform.memory.read(hpa, PAGE_SIZE)
            raise

    def finish(self, entries: Sequence[EntryState]) -> None:
        """KVM_SEV_SNP_LAUNCH_FINISH."""
        if len(self._vmsas) != len(entries):
            raise GuardRefusal(errno.EINVAL, f"{len(self._vmsas)} VMSAs for {len(entries)} vCPUs")
        self.launch_finish()

    def launch_finish(
        self, *, host_data: bytes = bytes(32), id_block: IdBlock | None = None
    ) -> None:
        """KVM_SEV_SNP_LAUNCH_FINISH, after the VMSAs."""
        with self._refusing("the launch cannot be finished"), self._platform.lock:
            self._firmware.launch_finish(
                self._context >> PAGE_SHIFT, host_data=host_data, id_block=id_block
            )
        self.finished = True

    # --- the second stage -----------------------------------------------------------------------

    def fault(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """What the RMP says to a private access for which KVM has a page already."""
        return self._intercepts.fault(self.asid, gpa, access)

    def mmio(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """No memory there: #VC, and the guest asks by GHCB."""
        return self._intercepts.mmio()

    def admit(
        self, gfn: int, first: int, last: int, hpa: int, *, private: bool, writable: bool
    ) -> tuple[Leaf, ...]:
        """sev_gmem_prepare(): RMPUPDATE what the guest may validate, as large as it may be."""
        if not private:
            return (Leaf(first, last - first, hpa),)
        page = hpa + (gfn - first << PAGE_SHIFT)
        with self._refusing(f"gfn {gfn:#x} does not take hpa {page:#x}"), self._platform.lock:
            pfn = page >> PAGE_SHIFT
            staged = self._staged.pop(gfn, None)
            if staged is not None:
                self._add(gfn << PAGE_SHIFT, page, staged)
                self._frames.set(gfn, 1, pfn)
                return self._own.leaves(gfn, (Leaf(gfn, 1, page),))
            if not self.finished:
                raise GuardRefusal(errno.EIO, "the launch is not finished: only loaded pages count")
            entry = self._rmp.entry(pfn)
            if entry.assigned and (entry.asid, self._rmp.gpa(pfn)) != (
                self.asid, gfn << PAGE_SHIFT
            ):  # fmt: skip
                raise GuardRefusal(
                    errno.EIO, f"it is asid {entry.asid}'s at gpa {self._rmp.gpa(pfn):#x}"
                )
            if not entry.assigned:
                self._assign(gfn, first, last, hpa >> PAGE_SHIFT)
            return self._leaves(gfn, pfn)

    def _assign(self, gfn: int, first: int, last: int, pfn: int) -> None:
        """rmp_make_private(); ``pfn`` belongs to ``first``."""
        begin = gfn & -_LARGE
        large = pfn + begin - first
        fits = first <= begin and begin + _LARGE <= last and not large % _LARGE
        if fits and not self._rmp.assigned(large, _LARGE):
            new = NewState(True, PageSize.SIZE_2M, False, begin << PAGE_SHIFT, self.asid)
            self._host.update(large, new)
        else:
            self._host.update(
                pfn + gfn - first, NewState(True, gpa=gfn << PAGE_SHIFT, asid=self.asid)
            )

    def _leaves(self, gfn: int, pfn: int) -> tuple[Leaf, ...]:
        """Remember where the page around ``gfn`` is; leaves if the guest has validated it."""
        entry, page = self._rmp.entry(pfn), self._rmp.page(pfn)
        base, npages = gfn - (pfn - page), self._rmp.pages(entry.size)
        self._frames.set(base, npages, page)
        if not entry.validated:
            return ()
        return self._own.leaves(gfn, (Leaf(base, npages, page << PAGE_SHIFT),))

    def zapped(self, gfn: int, npages: int, *, private: bool, moving: bool) -> None:
        """The second stage forgets; the RMP does not, before it is told of frames."""
        if private:
            self._frames.forget(gfn, npages)

    def drained(self) -> bool:
        """Nothing waits: an RMPUPDATE flushes what it has to."""
        return False

    def leaving(self, hpa: int, size: int) -> bool:
        """What of it is the guest's becomes Pre-Swap, or Pre-Guest, until it has moved."""
        with self._platform.lock:
            if self._pages is None:
                return False  # it is no more, or was never made
            self._entries.lend(self.asid, hpa >> PAGE_SHIFT, size >> PAGE_SHIFT)
            return self.keeps(hpa, size)

    def keeps(self, hpa: int, size: int) -> bool:
        """Whether the RMP says of any frame there that it is the guest's."""
        with self._platform.lock:
            if self._pages is None:
                return False
            return self._entries.any_of(self.asid, hpa >> PAGE_SHIFT, size >> PAGE_SHIFT)

    def migrated(self, gfn: int, npages: int, old: int, new: int) -> None:
        """SNP_PAGE_MOVE of what was lent; what the AMD-SP refuses the guest has to take anew."""
        memory, context = self._platform.memory, self._context >> PAGE_SHIFT
        with self._platform.lock, memory.copied(old, new, npages):
            if self._pages is None:
                return
            for lost in self._entries.move(
                context, self.asid, old >> PAGE_SHIFT, new >> PAGE_SHIFT, npages
            ):
                log.warning("gpa %#x+%#x did not move from hpa %#x to %#x, and is not validated "
                            "any more: %s", lost.gpa, lost.npages << PAGE_SHIFT, old, new,
                            lost.why)  # fmt: skip

    def released(self, hpa: int, size: int) -> None:
        """sev_gmem_invalidate(): the pages are the hypervisor's, large ones broken first."""
        with self._platform.lock:
            if self._pages is not None:
                self._pages.release(hpa, size >> PAGE_SHIFT)
            self._entries.take_back(hpa >> PAGE_SHIFT, size >> PAGE_SHIFT)

    def host_reaches(self, hpa: int, size: int) -> bool:
        """The host's mappings have all memory; what it gets of a guest's is another matter."""
        return True

    # --- vCPUs ----------------------------------------------------------------------------------

    def enter(self, vcpu: int) -> None:
        """VMRUN: the VMSA is in use."""
        with self._platform.lock:
            self._rmp.hold(self._vmsas[vcpu] >> PAGE_SHIFT)

    def leave(self, vcpu: int) -> None:
        """#VMEXIT."""
        with self._platform.lock:
            self._rmp.release(self._vmsas[vcpu] >> PAGE_SHIFT)

    def instruction(self, vcpu: int, left: cpu_api.InterceptExit, regs: Regs) -> Verdict:
        """VMGEXIT, PVALIDATE, RMPADJUST, the GHCB MSR; #VC or #UD for the others."""
        return self._intercepts.instruction(self.asid, vcpu, left, regs)

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM's answer to a VMGEXIT."""
        return self._intercepts.complete(vcpu, data, regs)

    def _guest_request(self, request: bytes) -> tuple[bytes, int]:
        try:
            with self._platform.lock:
                return self._firmware.guest_request(self._context >> PAGE_SHIFT, request), 0
        except FirmwareRefused as refused:
            return b"", int(refused.status)

    # --- its end --------------------------------------------------------------------------------

    def close(self) -> None:
        """SNP_DECOMMISSION; VMSAs and context page are the host's again (sev_vm_destroy()).

        The guest's memory follows as its owners take it back.
        """
        with self._platform.lock:
            for hpa in self._vmsas.values():
                self._give(hpa)
            if self._context:
                page = self._context >> PAGE_SHIFT
                self._firmware.decommission(page)
                if self._pages is not None:
                    self._pages.close()
                    self._pages = None
                self._firmware.page_reclaim(page)
                self._give(self._context)
            self._vmsas.clear()
            self._frames.clear()
            self._context = 0

    def describe(self) -> dict[str, Any]:
        """The launch digest, what the AMD-SP says, frames."""
        with self._platform.lock:
            status = self._firmware.guest_status(self._context >> PAGE_SHIFT)
            return {
                "technology": "SEV-SNP",
                "asid": self.asid,
                "state": status.state.value,
                "policy": hex(status.policy),
                "measurement": status.digest.hex(),
                "frames": self._rmp.frames_of(self.asid),
                **self._own.describe(),
            }

    def tables(self) -> SnpTables:
        """The RMP."""
        with self._platform.lock:
            own = {hpa >> PAGE_SHIFT for hpa in (*self._vmsas.values(), self._context) if hpa}
        return SnpTables(
            self._platform.lock, self._rmp, self.asid, self._frames, own,
            shadowed=self._encrypt is Encrypt.BACKING,
        )  # fmt: skip

    def residue(self) -> dict[str, int]:
        """Frames that the RMP still has for the guest, and what the AMD-SP has."""
        with self._platform.lock:
            active = self.asid and self._firmware.asid_state(self.asid) is AsidState.ACTIVE
            return {
                "RMP": self._rmp.frames_of(self.asid) if self.asid else 0,
                "contexts": int(bool(self._context)),
                "ASIDs": int(active),
                "VMSAs": len(self._vmsas),
            }

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _own(self) -> GuestPages:
        assert self._pages is not None, "a guest that runs has a key"
        return self._pages

    def _give(self, hpa: int) -> None:
        self._host.update(hpa >> PAGE_SHIFT, HYPERVISOR)
        self._platform.pages.give(hpa)

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except FirmwareRefused as error:
            self.status = int(error.status)
            raise GuardRefusal(errno.EIO, f"{what}: {error}") from error
        except MemoryError as error:
            raise GuardRefusal(errno.ENOMEM, f"{what}: {error}") from error
