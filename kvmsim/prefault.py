# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_PRE_FAULT_MEMORY: map a range for a vCPU before it runs, one fault after the other.

kvm_vcpu_pre_fault_memory() of virt/kvm/kvm_main.c and kvm_arch_vcpu_pre_fault_memory() of
arch/x86/kvm/mmu/mmu.c (v6.18); Documentation/virt/kvm/api.rst, 4.143. Every access is a read of
the type that the gfn has, so none is of the wrong type. What was mapped stays mapped: with any
progress the ioctl succeeds, and gpa and size say what is left.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Final, Self

from kvmsim.effect import (
    Access,
    Effect,
    Installed,
    LeaveGuest,
    NeedPage,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.exits import Exit, MemoryFaultExit, MmioExit
from kvmsim.fault import Fault
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, U64, KvmError
from kvmsim.vm import Vm

_OPERATION: Final = "KVM_PRE_FAULT_MEMORY"


@dataclass(frozen=True, slots=True)
class Progress:
    """Mapped up to ``gpa``; ``size`` bytes are left. The time to look for signals."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The ioctl answers ``errno`` (0: at least a page was mapped), with what is left."""

    errno: int
    gpa: int
    size: int


Step = NeedPage | Retry | Progress | Finished
"""NeedPage: ask the owner, then ``page_arrived``. Retry and Progress: drop the lock, ``step``."""

_Check = tuple[int, str, Callable[["PreFault", Vm], bool]]

# In the kernel's order; the last two are the architecture's.
_CHECKS: Final[tuple[_Check, ...]] = (
    (errno.ENOTTY, "v7 has no such ioctl", lambda p, vm: vm.abi == "v7"),
    (errno.EINVAL, "flags must be 0", lambda p, vm: p.flags != 0),
    (errno.EINVAL, "gpa is not page-aligned", lambda p, vm: bool(p.gpa % PAGE_SIZE)),
    (errno.EINVAL, "size is not page-aligned", lambda p, vm: bool(p.size % PAGE_SIZE)),
    (errno.EINVAL, "size is 0", lambda p, vm: p.size == 0),
    (errno.EINVAL, "gpa + size wraps", lambda p, vm: p.gpa + p.size >= U64),
    (
        errno.EOPNOTSUPP,
        "not before this guest is finalized",
        lambda p, vm: not vm.pre_fault_allowed,
    ),
    (
        errno.EINVAL,
        "gpa has the bit of a side",
        lambda p, vm: bool(p.gpa & vm.kind.side_bit),
    ),
)


@dataclass(slots=True)
class PreFault:
    """One call by ``vcpu`` on bytes [gpa, gpa + size), which move as pages are mapped."""

    vcpu: int
    gpa: int
    size: int
    flags: int = 0
    progressed: bool = False
    fault: Fault | None = None

    def check(self, vm: Vm) -> None:
        """Refuse what cannot be: KvmError, and nothing was begun."""
        for number, reason, refused in _CHECKS:
            if refused(self, vm):
                raise KvmError(number, _OPERATION, reason, start=self.gpa, size=self.size)

    def step(self, vm: Vm) -> Step:
        """Begin the next fault, or the same again after Retry (lock held)."""
        if self.fault is None:
            kind, gfn = vm.kind, self.gpa >> PAGE_SHIFT
            if gfn >= kind.max_gfn:  # no slot can be there
                return self._finish(errno.ENOENT)
            private = kind.private_memory and vm.mmu.is_private(gfn, vm.mmu.slots.find(gfn))
            gpa = self.gpa | kind.half(private=private)
            self.fault = Fault(self.vcpu, gpa, Access(length=PAGE_SIZE))
        return self._after(vm, vm.begin_fault(self.fault))

    def page_arrived(self, vm: Vm, grant: PageGrant) -> Step:
        """Go on after NeedPage (lock held)."""
        if self.fault is None:
            raise RuntimeError(f"{_OPERATION}: a page arrived that was not asked for")
        return self._after(vm, vm.page_arrived(self.fault, grant))

    def interrupted(self) -> Finished:
        """A signal is pending: success if there was any progress, else EINTR."""
        return self._finish(errno.EINTR)

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        fault = self.fault and self.fault.key()
        return (self.vcpu, self.gpa, self.size, self.flags, self.progressed, fault)

    def copy(self) -> Self:
        """An independent twin."""
        return replace(self, fault=self.fault and self.fault.copy())

    def _after(self, vm: Vm, effect: Effect) -> Step:
        match effect:
            case NeedPage():
                return effect
            case Retry(RetryReason.IN_PROGRESS) if vm.deletes(self.gpa >> PAGE_SHIFT):
                return self._finish(errno.EAGAIN)  # KVM_MEMSLOT_INVALID and fault->prefetch
            case Retry():
                # The gfn may have another type by now, and then another address.
                self.fault = None
                return effect
            case Installed(gpa, npages):
                end = (gpa & ~vm.kind.side_bit) + npages * PAGE_SIZE
                done = min(self.size, end - self.gpa)
                self.gpa, self.size = self.gpa + done, self.size - done
                self.progressed, self.fault = True, None
                return Progress(self.gpa, self.size) if self.size else self._finish(0)
            case LeaveGuest(exit):
                return self._finish(_number(exit))
        raise AssertionError(effect)

    def _finish(self, number: int) -> Finished:
        self.fault = None
        return Finished(0 if self.progressed else number, self.gpa, self.size)


def _number(exit: Exit) -> int:
    """What a fault that would leave the guest is for this ioctl."""
    if isinstance(exit, MmioExit):
        return errno.ENOENT  # RET_PF_EMULATE
    if isinstance(exit, MemoryFaultExit) and exit.errno is not None:
        return exit.errno
    return errno.EFAULT
