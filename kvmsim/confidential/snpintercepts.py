# SPDX-License-Identifier: GPL-2.0-or-later
"""What an SNP guest does that is not its own to do: intercepted instructions, and accesses.

The processor answers with #VC where the guest has to ask by GHCB
(:mod:`kvmsim.confidential.vmgexit`); accesses, PVALIDATE and RMPADJUST are the RMP's to decide, and
what it refuses is sev_handle_rmp_fault() of arch/x86/kvm/svm/sev.c (v6.18).
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Final

from hwemu.cpu import api as cpu_api
from hwemu.cpu.api import Regs
from hwemu.snp import guestops
from hwemu.snp.access import Granted, GuestAccess, Kind, guest_access
from hwemu.snp.guestops import Leaf as NestedLeaf
from hwemu.snp.guestops import Vcpu
from hwemu.snp.hostops import psmash
from hwemu.snp.outcome import (
    GeneralProtection,
    GuestFault,
    NestedPageFault,
    NpfError,
    Returned,
    VcException,
)
from hwemu.snp.rmp import Rmp
from kvmsim import exits
from kvmsim.confidential.frames import FrameMap
from kvmsim.confidential.guestview import GuestView
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.vmgexit import (
    MSR_GHCB,
    MSR_SEV_STATUS,
    SEV_STATUS,
    GuestRequest,
    VmgExits,
)
from kvmsim.device.translate import translate
from kvmsim.guard import Again, Answer, Inject, Leave, Resolve, Verdict
from kvmsim.mmu import Zapped
from kvmsim.running import RunningVm
from kvmsim.uapi import KVM_INTERNAL_ERROR_EMULATION, PAGE_SHIFT, PAGE_SIZE

_UD, _GP, _VC = 6, 13, 29
_LARGE: Final = 512
_MASK32: Final = 0xFFFF_FFFF
_CF: Final = 1

#: Non-automatic exits: #VC with the exit code (APM vol. 2, table 15-35). HLT is automatic.
_VC_CODES: Final = {"in": 0x7B, "ins": 0x7B, "out": 0x7B, "outs": 0x7B, "cpuid": 0x72,
                    "vmmcall": 0x81}  # fmt: skip
_VC_MSR: Final = 0x7C
_VC_NPF: Final = 0x400
_OWN: Final = frozenset(("rdmsr", "wrmsr", "vmgexit", "pvalidate", "rmpadjust"))
#: The host's instructions, and Intel's.
_UNDEFINED: Final = frozenset(("vmcall", "tdcall", "seamcall", "psmash", "rmpupdate"))
INSTRUCTIONS: Final = frozenset(_VC_CODES) | _OWN | _UNDEFINED
"""All that an SNP guest does not execute without its hypervisor, or its RMP."""


class SnpIntercepts:
    """Those of one guest. ``frames`` is where KVM has found its pages."""

    def __init__(
        self,
        platform: Platform,
        running: RunningVm,
        rmp: Rmp,
        frames: FrameMap,
        guest_request: GuestRequest,
    ) -> None:
        self._lock = platform.lock
        self._running = running
        self._rmp = rmp
        self._frames = frames
        self._c_bit = running.vm.kind.c_bit
        self._view = GuestView(running)
        self._calls = VmgExits(running, self._c_bit.bit_length() - 1, guest_request)

    def fault(self, asid: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """What the RMP says to a private access for which KVM has a page already."""
        if not gpa & self._c_bit:
            return None
        plain = gpa & ~self._c_bit
        with self._lock:
            pfn = self._frames.get(plain >> PAGE_SHIFT)
            if pfn is None:
                return None
            who = Vcpu(asid, cpl=0)
            leaf = NestedLeaf(plain, pfn)
            found = guest_access(GuestAccess(self._rmp, who, leaf, _kind(access)))
        if isinstance(found, Granted):
            return None
        return _verdict(found, plain)

    def mmio(self) -> Verdict:
        """No memory there: #VC, and the guest asks by GHCB."""
        return Inject(_VC, _VC_NPF)

    def instruction(self, asid: int, vcpu: int, left: cpu_api.InterceptExit, regs: Regs) -> Verdict:
        """VMGEXIT, PVALIDATE, RMPADJUST, the GHCB MSR; #VC or #UD for the others."""
        name = left.instruction
        if name in ("rdmsr", "wrmsr"):
            return self._msr(vcpu, regs, write=name == "wrmsr")
        if name == "vmgexit":
            return self._calls.begin(vcpu, regs)
        if name in ("pvalidate", "rmpadjust"):
            return self._page_operation(asid, vcpu, name, regs)
        code = _VC_CODES.get(name)
        return Inject(_UD) if code is None else Inject(_VC, code)

    def _msr(self, vcpu: int, regs: Regs, *, write: bool) -> Verdict:
        index = regs.rcx & _MASK32
        if index == MSR_GHCB and write:
            self._calls.write_msr(vcpu, (regs.rdx & _MASK32) << 32 | regs.rax & _MASK32)
            return Answer(regs)
        if index == MSR_GHCB or (index == MSR_SEV_STATUS and not write):
            value = SEV_STATUS if index == MSR_SEV_STATUS else self._calls.read_msr(vcpu)
            return Answer(replace(regs, rax=value & _MASK32, rdx=value >> 32))
        return Inject(_VC, _VC_MSR)

    def _page_operation(self, asid: int, vcpu: int, name: str, regs: Regs) -> Verdict:
        """PVALIDATE and RMPADJUST name their page by a linear address in RAX."""
        sregs = self._running.vcpus[vcpu].cpu.get_sregs()
        missing: list[int] = []

        def word(at: int) -> int | None:
            found = self._view.word(at)
            if found is None:
                missing.append(at)
            return found

        gpa = translate(sregs, regs.rax & -PAGE_SIZE, word)
        if missing:  # the processor's walk would fault there: a table is on its way
            return Resolve(missing[0], cpu_api.Access.READ)
        if gpa is None or not gpa & self._c_bit:
            return Leave(exits.InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION))
        plain = gpa & ~self._c_bit
        with self._lock:
            pfn = self._frames.get(plain >> PAGE_SHIFT)
            if pfn is None:  # #NPF: the second stage has nothing there
                return Resolve(gpa, cpu_api.Access.WRITE)
            leaf = NestedLeaf(plain, pfn)
            who = Vcpu(asid, cpl=sregs.ss.attributes >> 5 & 3)
            if name == "pvalidate":
                asked = guestops.PvalidateRegisters.decode(regs.rcx, regs.rdx)
                done = guestops.pvalidate(self._rmp, who, leaf, asked.size, validate=asked.validate)
            else:
                wanted = guestops.RmpadjustRegisters.decode(regs.rcx, regs.rdx)
                done = guestops.rmpadjust(
                    self._rmp, who, leaf, wanted.size, target=wanted.target,
                    permissions=wanted.permissions, vmsa=wanted.vmsa,
                )  # fmt: skip
            if isinstance(done, Returned):
                return self._returned(regs, done, plain, pfn)
            return self._refused(done, gpa, pfn)

    def _returned(self, regs: Regs, done: Returned, gpa: int, pfn: int) -> Verdict:
        """EAX and CF; a page that may be used less than before leaves the second stage."""
        flags = regs.rflags & ~_CF | done.carry
        changed = replace(regs, rax=done.eax, rflags=flags)
        entry, page = self._rmp.entry(pfn), self._rmp.page(pfn)
        if not done.ok or entry.validated:
            return Answer(changed)
        start = gpa - (pfn - page << PAGE_SHIFT) | self._c_bit
        npages = self._rmp.pages(entry.size)
        leaves = self._running.stage2.zap(start, npages)
        return Answer(changed, Zapped(((start, npages),), leaves))

    def _refused(self, fault: GuestFault, gpa: int, pfn: int) -> Verdict:
        """sev_handle_rmp_fault(): a part of a large page, so it is broken, its leaf zapped."""
        if isinstance(fault, NestedPageFault) and fault.error & NpfError.SIZEM:
            page = self._rmp.page(pfn)
            psmash(self._rmp, page)
            start = (gpa & -PAGE_SIZE) - (pfn - page << PAGE_SHIFT)
            leaves = self._running.stage2.zap(start, _LARGE)
            return Again(Zapped(((start, _LARGE),), leaves))
        verdict = _verdict(fault, gpa & ~self._c_bit)
        if verdict is not None:
            return verdict
        self._frames.forget(gpa - self._c_bit >> PAGE_SHIFT, 1)  # another guest's, or none
        return Resolve(gpa, cpu_api.Access.WRITE)

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM's answer to a VMGEXIT."""
        return self._calls.complete(vcpu, data, regs)


def _verdict(fault: GuestFault, gpa: int) -> Verdict | None:
    match fault:
        case VcException(_, code):
            return Inject(_VC, code)
        case GeneralProtection():
            return Inject(_GP, 0)
        case NestedPageFault(error, why) if error & NpfError.VMPL:
            reason = f"the guest's own permissions forbid it: {why}"
            return Leave(exits.MemoryFaultExit(
                gpa & -PAGE_SIZE, PAGE_SIZE, True, errno.EFAULT, reason
            ))  # fmt: skip
    return None  # not this guest's page: KVM assigns it, or finds another


def _kind(access: cpu_api.Access) -> Kind:
    if access & cpu_api.Access.EXEC:
        return Kind.FETCH
    return Kind.WRITE if access & cpu_api.Access.WRITE else Kind.READ
