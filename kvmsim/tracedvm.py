# SPDX-License-Identifier: GPL-2.0-or-later
"""A running VM that tells what happens in it. One that is not traced has no line of this code.

A trace watches at the borders that the VM has anyhow – entry and exit of guest code, faults, exits
to the VMM, the core's brackets, the second stage – by overriding them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

from hwemu.cpu import api as cpu_api
from kvmsim import exits
from kvmsim.change import Invalidation, PoisonPage, ReleaseFile, StoreAttributes
from kvmsim.effect import Effect, NeedPage, PageGrant, Retry
from kvmsim.fault import Fault
from kvmsim.inplace import ConvertFile
from kvmsim.kind import VmKind
from kvmsim.memslot import SlotChange
from kvmsim.migration import Migration
from kvmsim.mmu import SecondStage, Zapped
from kvmsim.region import SharedSide
from kvmsim.running import RunningVm
from kvmsim.trace import Value
from kvmsim.uapi import (
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_IO,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    PAGE_SHIFT,
)
from kvmsim.vcpus import Vcpu
from kvmsim.vm import Vm

# Bits of a page fault's error code: arch/x86/include/asm/kvm_host.h (PFERR_*). A nested walk is a
# user's access (AMD APM vol. 2, 15.25.6).
_PFERR: Final = {cpu_api.Access.WRITE: 1 << 1, cpu_api.Access.EXEC: 1 << 4}
_PFERR_USER, _PFERR_GUEST_FINAL, _PFERR_PRIVATE = 1 << 2, 1 << 32, 1 << 49

# SVM_EXIT_REASONS of arch/x86/include/uapi/asm/svm.h.
_REASONS: Final[dict[type[Any], str]] = {
    cpu_api.Stage2Fault: "npf",
    cpu_api.IoExit: "io",
    cpu_api.MmioExit: "npf",
    cpu_api.HltExit: "hlt",
    cpu_api.HypercallExit: "hypercall",
    cpu_api.MsrExit: "msr",
    cpu_api.ShutdownExit: "shutdown",
    cpu_api.KickExit: "interrupt",
    cpu_api.CpuError: "invalid_guest_state",
}
_USERSPACE: Final[dict[type[Any], tuple[str, int]]] = {
    exits.IoExit: ("KVM_EXIT_IO", KVM_EXIT_IO),
    exits.MmioExit: ("KVM_EXIT_MMIO", KVM_EXIT_MMIO),
    exits.HltExit: ("KVM_EXIT_HLT", KVM_EXIT_HLT),
    exits.HypercallExit: ("KVM_EXIT_HYPERCALL", KVM_EXIT_HYPERCALL),
    exits.ShutdownExit: ("KVM_EXIT_SHUTDOWN", KVM_EXIT_SHUTDOWN),
    exits.InternalErrorExit: ("KVM_EXIT_INTERNAL_ERROR", KVM_EXIT_INTERNAL_ERROR),
    exits.SystemEventExit: ("KVM_EXIT_SYSTEM_EVENT", KVM_EXIT_SYSTEM_EVENT),
    exits.BadHvaExit: ("error", errno.EFAULT),
    exits.InterruptedExit: ("restart", errno.EINTR),
}


class Tracer(Protocol):
    """Where events go; called under the VM's lock, so it must not wait."""

    def tell(self, name: str, vm: str, vcpu: int | None, fields: dict[str, Value]) -> None:
        """Take an event of now."""


_Tell = Callable[..., None]


class _Stage2:
    """A second stage that tells what is stored and zapped."""

    def __init__(self, inner: SecondStage, kind: VmKind, tell: _Tell) -> None:
        self._inner = inner
        self._kind = kind
        self._tell = tell

    def map(
        self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool, level: int = 1
    ) -> object:
        """Store leaves."""
        done = self._inner.map(
            gpa, hpa, npages, writable=writable, executable=executable, level=level
        )
        access = f"r{'w' if writable else '-'}{'x' if executable else '-'}"
        self._tell(
            "kvm_mmu_set_spte", gfn=gpa >> PAGE_SHIFT, spte=hpa, access=access, level=level,
            pages=npages,
        )  # fmt: skip
        return done

    def whole_leaves(self, gpa: int, npages: int) -> tuple[int, int]:
        """Widen a range to whole leaves."""
        return self._inner.whole_leaves(gpa, npages)

    def zap(self, gpa: int, npages: int) -> int:
        """Clear leaves."""
        leaves = self._inner.zap(gpa, npages)
        kind = self._kind
        side = (
            "both"
            if not kind.side_bit
            else ("private" if gpa & kind.side_bit == kind.c_bit else "shared")
        )
        self._tell(
            "kvmsim_zap", gfn=(gpa & ~kind.side_bit) >> PAGE_SHIFT, side=side, pages=npages,
            leaves=leaves,
        )  # fmt: skip
        return leaves


class _Core(Vm):
    """A core that tells of the brackets in it; silent until :meth:`watch`."""

    __slots__ = ("_tell",)

    def watch(self, tell: _Tell) -> None:
        """Begin to tell."""
        self._tell = tell
        self.mmu.stage2 = _Stage2(self.mmu.stage2, self.kind, tell)

    def begin_invalidate_file(
        self, file: int, start: int, end: int, *, moving: bool = False
    ) -> Invalidation:
        """Zap the private side."""
        self._tell("kvmsim_gmem_invalidate", file=file, start=start, end=end)
        return super().begin_invalidate_file(file, start, end, moving=moving)

    def invalidate_shared(self, side: SharedSide, start: int, end: int) -> Zapped:
        """Zap the shared side."""
        self._tell("kvm_unmap_hva_range", start=start << PAGE_SHIFT, end=end << PAGE_SHIFT)
        return super().invalidate_shared(side, start, end)

    def end(self, invalidation: Invalidation) -> Zapped:
        """Make the change that was begun."""
        zapped = super().end(invalidation)
        match invalidation.then:
            case StoreAttributes(start, end, value):
                self._tell("kvm_vm_set_mem_attributes", start=start, end=end, attributes=value)
            case ConvertFile(file, start, end, value):
                self._tell(
                    "kvmsim_gmem_set_attributes", file=file, start=start, end=end,
                    attributes=value,
                )  # fmt: skip
            case ReleaseFile(file):
                self._tell("kvmsim_gmem_release", file=file)
            case PoisonPage(file, page):
                self._tell("kvmsim_gmem_error", file=file, page=page)
            case SlotChange(change, old, new) if (slot := new or old) is not None:
                self._tell(
                    "kvmsim_set_memory_region", change=change.name.lower(), slot=slot.id,
                    gfn=slot.base_gfn, pages=slot.npages, flags=slot.flags,
                    hva=slot.userspace_addr,
                )  # fmt: skip
        return zapped


class TracedVm(RunningVm):
    """A running VM with a tracer; :func:`traced` makes the class."""

    tracer: ClassVar[Tracer]
    core = _Core

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert isinstance(self.vm, _Core)
        self.vm.watch(self._tell)
        self._asked: dict[int, int] = {}

    def _tell(self, name: str, vcpu: int | None = None, /, **fields: Value) -> None:
        self.tracer.tell(name, self.label, vcpu, fields)

    # --- guest code ---------------------------------------------------------------------------

    def _in_guest(self, vcpu: Vcpu, run: Callable[[], cpu_api.CpuExit]) -> cpu_api.CpuExit:
        self._tell("kvm_entry", vcpu.index, rip=vcpu.cpu.get_regs().rip)
        left = super()._in_guest(vcpu, run)
        if not isinstance(left, cpu_api.Stage2Fault):  # which the fault itself has told
            self._tell_exit(vcpu, left)
        return left

    def _tell_exit(self, vcpu: Vcpu, left: cpu_api.CpuExit) -> None:
        regs = vcpu.cpu.get_regs()
        info1 = info2 = 0
        match left:
            case cpu_api.IoExit(port, size, is_write):  # AMD APM vol. 2, 15.10.2
                info1, info2 = port << 16 | size << 4 | (not is_write), regs.rip
            case cpu_api.MmioExit(gpa, _, is_write):
                info1, info2 = _error_code(cpu_api.Access(2 if is_write else 1)), gpa
        # What a confidential guest may not execute alone is called by its mnemonic.
        if isinstance(left, cpu_api.InterceptExit):
            reason = left.instruction
        else:
            reason = _REASONS[type(left)]
        self._tell("kvm_exit", vcpu.index, reason=reason, rip=regs.rip,
                   info1=info1, info2=info2)  # fmt: skip

    def _on_fault(self, vcpu: Vcpu, gpa: int, access: cpu_api.Access) -> bool:
        rip = vcpu.cpu.get_regs().rip
        code = _error_code(access)
        kind = self.vm.kind
        if kind.side_bit and gpa & kind.side_bit == kind.c_bit:
            code |= _PFERR_PRIVATE
        self._tell("kvm_exit", vcpu.index, reason="npf", rip=rip, info1=code, info2=gpa)
        self._tell("kvm_page_fault", vcpu.index, rip=rip, address=gpa, error_code=code)
        resolved = super()._on_fault(vcpu, gpa, access)
        if resolved:
            self._tell("kvm_entry", vcpu.index, rip=rip)
        return resolved

    def _faulted(self, vcpu: Vcpu, fault: Fault, effect: Effect) -> None:
        match effect:
            case NeedPage(file, page):
                self._asked[vcpu.index] = time.monotonic_ns()
                self._tell("kvmsim_get_page", vcpu.index, file=file, page=page)
            case Retry(reason):
                self._tell("kvmsim_retry", vcpu.index, gfn=fault.gfn, reason=reason.value)
        super()._faulted(vcpu, fault, effect)

    def _arrived(self, vcpu: Vcpu, fault: Fault, grant: PageGrant) -> None:
        now = time.monotonic_ns()
        took = now - self._asked.pop(vcpu.index, now)
        super()._arrived(vcpu, fault, grant)
        effect = "goes on" if vcpu.exit is None else "leaves"
        self._tell(
            "kvmsim_page_arrived", vcpu.index, file=grant.file, start=grant.start, end=grant.end,
            seq=grant.seq, status=grant.status, effect=effect, ns=took,
        )  # fmt: skip

    # --- user space ---------------------------------------------------------------------------

    def deliver(self, vcpu: Vcpu, left: exits.Exit) -> None:
        """Tell of an exit to user space, then deliver it."""
        match left:
            case exits.IoExit(port, size, write, data, count):
                self._tell(
                    "kvm_pio", vcpu.index, direction="write" if write else "read", port=port,
                    size=size, count=count, val=int.from_bytes(data[:size], "little"),
                )  # fmt: skip
            case exits.MmioExit(gpa, length, write, data):
                self._tell(
                    "kvm_mmio", vcpu.index, type="write" if write else "unsatisfied-read",
                    len=length, gpa=gpa, val=int.from_bytes(data, "little"),
                )  # fmt: skip
            case exits.HypercallExit(nr, args):
                a0, a1, a2, a3 = (*args, 0, 0, 0, 0)[:4]
                self._tell("kvm_hypercall", vcpu.index, nr=nr, a0=a0, a1=a1, a2=a2, a3=a3)
        if isinstance(left, exits.MemoryFaultExit):
            told = ("error", left.errno) if left.errno else ("MEMORY_FAULT", KVM_EXIT_MEMORY_FAULT)
        else:
            told = _USERSPACE[type(left)]
        self._tell("kvm_userspace_exit", vcpu.index, reason=told[0], code=told[1])
        super().deliver(vcpu, left)

    # --- zaps ---------------------------------------------------------------------------------

    def migrated(self, migration: Migration) -> None:
        """Note where pages lie now."""
        super().migrated(migration)
        file, start, end, old, new = migration
        self._tell("kvmsim_migrated", file=file, start=start, end=end, old=old, new=new)

    def drain(self, epoch: int) -> None:
        """Wait until no vCPU runs with an older translation."""
        start = time.monotonic_ns()
        super().drain(epoch)
        self._tell("kvmsim_drained", epoch=epoch, ns=time.monotonic_ns() - start)


def _error_code(access: cpu_api.Access) -> int:
    code = _PFERR_USER | _PFERR_GUEST_FINAL
    for bit, pferr in _PFERR.items():
        if access & bit:
            code |= pferr
    return code


def traced(tracer: Tracer) -> type[RunningVm]:
    """The class of VMs whose events go to ``tracer``."""
    return type("TracedVm", (TracedVm,), {"tracer": tracer})
