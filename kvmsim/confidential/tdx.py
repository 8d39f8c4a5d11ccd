# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's use of the TDX module: one TD from its creation to its teardown.

What arch/x86/kvm/vmx/tdx.c does (v6.18): tdx_td_init(), tdx_gmem_post_populate(),
tdx_sept_set_private_spte(), tdx_sept_remove_private_spte() with tdx_track(), tdx_td_finalize(),
tdx_vm_destroy(). The Secure EPT decides; the second stage that the engine walks is its shadow and
has a leaf only where an entry is MAPPED.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from typing import Any, Final

from hwemu.cpu import api as cpu_api
from hwemu.cpu.api import Regs
from hwemu.encryptedaccess import Encrypt, Technology
from hwemu.tdx import TdxError, TdxModule
from hwemu.tdx.entry import STATES, SeptState, hpa_of
from hwemu.tdx.fields import pack_params
from hwemu.tdx.states import KeyState, OpState
from hwemu.tdx.td import ATTRIBUTE_SEPT_VE_DISABLE, Td, TdParams
from kvmsim.confidential.encryption import GuestPages
from kvmsim.confidential.leaving import Leaving
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.tdvcpus import INSTRUCTIONS, TdVcpus
from kvmsim.confidential.tdxhost import ModulePages, make_module
from kvmsim.guard import GuardRefusal, Leaf, Verdict
from kvmsim.running import RunningVm
from kvmsim.uapi import EHWPOISON, PAGE_SHIFT, PAGE_SIZE
from kvmsim.views.tdx import TdxTables
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.launch import PageType as Loaded
from kvmsim.vmm.vmsa import EntryState

_LARGE: Final = 512
_CHUNK: Final = 256


def make(
    platform: Platform, running: RunningVm, encrypt: Encrypt | None = Encrypt.VIEW
) -> TdxGuard:
    """A TD of the VM ``running``, on the module of this host."""
    return TdxGuard(platform, running, encrypt=encrypt)


class TdxGuard:
    """One TD. ``ve_disable``: the guest gets no #VE for memory that it has not accepted."""

    def __init__(
        self,
        platform: Platform,
        running: RunningVm,
        *,
        ve_disable: bool = False,
        encrypt: Encrypt | None = Encrypt.VIEW,
    ) -> None:
        self._platform = platform
        self._running = running
        self._module = platform.hardware(TdxModule, make_module)
        self._ve_disable = ve_disable
        self._encrypt = encrypt
        self._pages: GuestPages | None = None  #: while the TD has its key
        self._tdr = 0
        self._vcpus = TdVcpus(platform, running, self._module)
        self._lent = ModulePages(platform)
        self._staged: dict[int, LaunchPage] = {}
        self._leaving: Leaving | None = None  #: while the TD has its key
        self.finished = False

    # --- what it is -----------------------------------------------------------------------------

    @property
    def instructions(self) -> frozenset[str]:
        """All that a TD does not execute by itself."""
        return INSTRUCTIONS

    @property
    def movable(self) -> bool:
        """Ciphertext in the file is bound to its address, and its owner copies it as it is."""
        return self._encrypt is not Encrypt.BACKING

    @property
    def td(self) -> Td:
        """The TD, while it is one."""
        return self._module.td(self._tdr)

    # --- launch ---------------------------------------------------------------------------------

    def start(self, vcpus: int) -> None:
        """KVM_TDX_INIT_VM and KVM_TDX_INIT_VCPU of all."""
        attributes = ATTRIBUTE_SEPT_VE_DISABLE if self._ve_disable else 0
        self.init_vm(TdParams(attributes, max_vcpus=vcpus))
        for index in range(vcpus):
            self.init_vcpu(index)

    def init_vm(self, params: TdParams) -> None:
        """KVM_TDX_INIT_VM (__tdx_td_init()): refused, nothing is left of it."""
        with self._refusing("the TD cannot be made"), self._platform.lock:
            try:
                self._init_vm(params)
            except BaseException:
                self.close()
                self._tdr = 0
                raise

    def _init_vm(self, params: TdParams) -> None:
        free = [hkid for hkid, key in self._module.keys.items() if key.state is KeyState.FREE]
        if not free:
            raise GuardRefusal(errno.ENOSPC, "every HKID of this host has a TD")
        tdr = self._lent.take()
        self._module.mng_create(tdr, free[0])
        self._tdr = tdr
        self._module.mng_key_config(tdr)
        self._pages = GuestPages(
            self._platform, self._running, Technology.TDX, free[0], self._encrypt
        )
        self._leaving = Leaving(
            self._module, tdr, self._platform.memory, self._pages, self._lent,
            self._running.stage2.zap,
        )  # fmt: skip
        for _ in range(self._module.config.tdcs_pages):
            self._module.mng_addcx(tdr, self._lent.take())
        with self._lent.page(pack_params(params)) as page:
            self._module.mng_init(tdr, page)

    def init_vcpu(self, index: int) -> None:
        """KVM_TDX_INIT_VCPU (tdx_td_vcpu_init())."""
        with self._refusing(f"vCPU {index} cannot be made"), self._platform.lock:
            tdvpr = self._lent.take()
            self._module.vp_create(self._tdr, tdvpr)
            self._vcpus.add(index, tdvpr)
            for _ in range(self._module.config.tdvps_pages - 1):
                self._module.vp_addcx(tdvpr, self._lent.take())
            self._module.vp_init(tdvpr, lp=index)

    def stage(self, page: LaunchPage) -> bool:
        """KVM_TDX_INIT_MEM_REGION, a page of it."""
        if self.finished:
            raise GuardRefusal(errno.EINVAL, "the TD is finalized: no page is added any more")
        self._staged[page.gpa >> PAGE_SHIFT] = page
        return True

    def unstage(self, page: LaunchPage) -> None:
        """It is not added."""
        self._staged.pop(page.gpa >> PAGE_SHIFT, None)

    def finish(self, entries: Sequence[EntryState]) -> None:
        """KVM_TDX_FINALIZE_VM."""
        with self._refusing("the TD cannot be finalized"):
            self._module.mr_finalize(self._tdr)
        self.finished = True

    def _add(self, gfn: int, hpa: int, page: LaunchPage) -> None:
        gpa = gfn << PAGE_SHIFT
        self._need_tables(gpa, 0)
        with self._lent.page(page.data) as source:
            self._module.mem_page_add(self._tdr, gpa, hpa, source)
        if page.type is not Loaded.UNMEASURED:  # KVM_TDX_MEASURE_MEMORY_REGION
            for offset in range(0, PAGE_SIZE, _CHUNK):
                self._module.mr_extend(self._tdr, gpa + offset)

    # --- the second stage -----------------------------------------------------------------------

    def fault(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """What the module makes of a private access without a leaf."""
        if gpa & self._shared:
            return None
        with self._platform.lock:
            if STATES[self.td.tree.walk(gpa & -PAGE_SIZE, 0).state].accepted is None:
                return None  # MAPPED: the shadow lacks it; else an EPT violation, KVM's to resolve
            return self._vcpus.access(vcpu, gpa, access)

    def mmio(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """No memory on the shared side: the shared EPT's entry says #VE."""
        return self._vcpus.mmio(vcpu, gpa, access)

    def admit(
        self, gfn: int, first: int, last: int, hpa: int, *, private: bool, writable: bool
    ) -> tuple[Leaf, ...]:
        """TDH.MEM.PAGE.ADD before the TD runs, TDH.MEM.PAGE.AUG afterwards."""
        if not private:
            return (Leaf(first, last - first, hpa),)
        gpa, page = gfn << PAGE_SHIFT, hpa + (gfn - first << PAGE_SHIFT)
        with self._refusing(f"gpa {gpa:#x} does not take hpa {page:#x}"), self._platform.lock:
            staged = self._staged.pop(gfn, None)
            if staged is not None:
                self._add(gfn, page, staged)
                return self._own.leaves(gfn, (Leaf(gfn, 1, page),))
            if not self.finished:
                raise GuardRefusal(errno.EIO, "the TD is not finalized: only loaded pages are its")
            at = self.td.tree.walk(gpa, 0)
            if at.state is SeptState.MAPPED:
                span = 1 << 9 * at.level
                begin = gfn & -span
                if hpa_of(at.word, at.level) + (gfn - begin << PAGE_SHIFT) != page:
                    raise GuardRefusal(errno.EIO, f"gpa {gpa:#x} has another page already")
                return self._mapped(gfn, page, Leaf(begin, span, hpa_of(at.word, at.level)))
            if self._leaving is not None and self._leaving.moves(gfn):
                raise GuardRefusal(errno.EIO, f"gpa {gpa:#x} was not relocated, and stays blocked")
            if at.state in (SeptState.FREE, SeptState.REMOVED):
                self._augment(gfn, first, last, hpa)
            return ()

    def _mapped(self, gfn: int, page: int, leaf: Leaf) -> tuple[Leaf, ...]:
        """What of an accepted page may be used: no line of it that is poisoned."""
        if self._own.poisoned(page):
            raise GuardRefusal(EHWPOISON, "machine check: the host has written to the page")
        if self._own.poisoned(leaf.hpa, leaf.npages):
            leaf = Leaf(gfn, 1, page)
        return self._own.leaves(gfn, (leaf,))

    def _augment(self, gfn: int, first: int, last: int, hpa: int) -> None:
        """As large as pages and table allow it: 2 MiB, or 4 KiB."""
        begin = gfn & -_LARGE
        large = hpa + (begin - first << PAGE_SHIFT)
        if first <= begin and begin + _LARGE <= last and not large % (_LARGE << PAGE_SHIFT):
            self._need_tables(begin << PAGE_SHIFT, 1)
            if self.td.tree.walk(begin << PAGE_SHIFT, 1).state is SeptState.FREE:
                self._module.mem_page_aug(self._tdr, begin << PAGE_SHIFT, large, 1)
                return
        self._need_tables(gfn << PAGE_SHIFT, 0)
        self._module.mem_page_aug(self._tdr, gfn << PAGE_SHIFT, hpa + (gfn - first << PAGE_SHIFT))

    def _need_tables(self, gpa: int, level: int) -> None:
        """TDH.MEM.SEPT.ADD until there is an entry of ``level``."""
        while (at := self.td.tree.walk(gpa, level)).level > level:
            if at.state is not SeptState.FREE:
                return  # a leaf that is larger, or blocked: the leaf that follows says so
            span = PAGE_SIZE << 9 * at.level
            self._module.mem_sept_add(self._tdr, gpa & -span, at.level, self._lent.take())

    def zapped(self, gfn: int, npages: int, *, private: bool, moving: bool) -> None:
        """TDH.MEM.RANGE.BLOCK of what is mapped there, and a new TLB epoch."""
        if not private:
            return
        with self._platform.lock:
            if self._tdr not in self._module.tds or self._leaving is None:
                return  # it is no more, or was never made
            self._leaving.zap(gfn, npages, moving=moving)

    def drained(self) -> bool:
        """TDH.MEM.PAGE.REMOVE or DEMOTE of what was blocked, as far as it is tracked."""
        with self._platform.lock:
            return self._leaving is not None and self._leaving.settle()

    def leaving(self, hpa: int, size: int) -> bool:
        """It stays blocked: `zapped` was told."""
        return self.keeps(hpa, size)

    def keeps(self, hpa: int, size: int) -> bool:
        """Whether the PAMT says of any page there that it is the TD's."""
        with self._platform.lock:
            if self._leaving is None:
                return False
            return self._module.pamt.owns(self._tdr >> PAGE_SHIFT, hpa, size)

    def migrated(self, gfn: int, npages: int, old: int, new: int) -> None:
        """TDH.MEM.PAGE.RELOCATE of what was blocked to move."""
        with self._platform.lock:
            if self._leaving is not None:
                self._leaving.relocate(gfn, npages, old, new)

    def released(self, hpa: int, size: int) -> None:
        """The PAMT must not say any more that these bytes are the TD's."""
        with self._platform.lock:
            if self.keeps(hpa, size):
                raise RuntimeError(f"hpa {hpa:#x}+{size:#x} is released, and is the TD's still")
            if self._pages is not None:
                self._pages.release(hpa, size >> PAGE_SHIFT)

    def host_reaches(self, hpa: int, size: int) -> bool:
        """The host's mappings have all memory; what it gets of a guest's is another matter."""
        return True

    # --- vCPUs ----------------------------------------------------------------------------------

    def enter(self, vcpu: int) -> None:
        """TDH.VP.ENTER; what the module wants flushed is flushed."""
        self._vcpus.enter(vcpu)

    def leave(self, vcpu: int) -> None:
        """A TD exit: an interrupt of the host's."""
        self._vcpus.leave(vcpu)

    def instruction(self, vcpu: int, left: cpu_api.InterceptExit, regs: Regs) -> Verdict:
        """TDCALL, and what is #VE or #UD in a TD."""
        return self._vcpus.instruction(vcpu, left, regs)

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM's answer to a TDVMCALL."""
        return self._vcpus.complete(vcpu, data, regs)

    # --- its end --------------------------------------------------------------------------------

    def close(self) -> None:
        """TDH.VP.FLUSH … TDH.PHYMEM.PAGE.RECLAIM (tdx_mmu_release_hkid(), tdx_vm_destroy())."""
        module, tdr = self._module, self._tdr
        if not tdr:
            self._lent.give_all()
            return
        with self._platform.lock:
            self._vcpus.flush()
            module.mng_vpflushdone(tdr)
            for package in range(module.config.packages):
                module.phymem_cache_wb(lp=package * module.config.lps // module.config.packages)
            module.mng_key_freeid(tdr)
            if self._pages is not None:
                self._pages.close()
                self._pages = self._leaving = None
            for hpa, _, _ in list(module.pamt.owned(tdr >> PAGE_SHIFT)):
                module.phymem_page_reclaim(hpa)
            module.phymem_page_reclaim(tdr)
            self._lent.give_all()

    def describe(self) -> dict[str, Any]:
        """Measurement registers, states, pages."""
        with self._platform.lock:
            td = self.td
            pages: dict[str, int] = {}
            for _, level, pt in self._module.pamt.owned(td.owner):
                pages[pt.name] = pages.get(pt.name, 0) + (1 << 9 * level)
            return {
                "technology": "TDX 1.5",
                "op_state": OpState(td.op_state).name,
                "mrtd": td.mrtd.hex(),
                "rtmr": [one.hex() for one in td.rtmr],
                "epoch": td.epoch,
                "pamt_pages": pages,
                **self._own.describe(),
            }

    def tables(self) -> TdxTables:
        """S-EPT and PAMT."""
        shadowed = self._encrypt is Encrypt.BACKING
        return TdxTables(self._platform.lock, self._module, self._tdr, shadowed=shadowed)

    def residue(self) -> dict[str, int]:
        """What the module still knows of the TD."""
        with self._platform.lock:
            left = sum(1 << 9 * level for _, level, _ in
                       self._module.pamt.owned(self._tdr >> PAGE_SHIFT))  # fmt: skip
            return {
                "PAMT": left,
                "TDs": int(self._tdr in self._module.tds),
                "pages": len(self._lent),
            }

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _own(self) -> GuestPages:
        assert self._pages is not None, "a TD that runs has a key"
        return self._pages

    @property
    def _shared(self) -> int:
        return self._running.vm.kind.side_bit

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except TdxError as error:
            raise GuardRefusal(errno.EIO, f"{what}: {error}") from error
        except MemoryError as error:
            raise GuardRefusal(errno.ENOMEM, f"{what}: {error}") from error
