# SPDX-License-Identifier: GPL-2.0-or-later
"""What a confidential processor's own tables add to a VM: the hooks, and what they answer.

KVM reaches such hardware through struct kvm_x86_ops (arch/x86/include/asm/kvm_host.h, v6.18), and
the hooks here stand for these of it: ``admit`` for set_external_spte (TDX) and gmem_prepare (SNP),
``zapped`` and ``drained`` for remove_external_spte with its TDH.MEM.TRACK, ``released`` for
gmem_invalidate, ``enter`` and ``leave`` for vcpu_run, ``instruction`` for handle_exit. ``migrated``
is what kvm_gmem_migrate_folio() would need if it moved pages. ``fault`` is what the processor
itself decides before KVM hears of a missing leaf.

A guard is called under the VM's lock and never waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hwemu.cpu import api as cpu_api
from hwemu.cpu.api import Regs
from kvmsim.exits import Exit
from kvmsim.mmu import GuardRefusal, Leaf, Zapped

__all__ = [
    "Again",
    "Answer",
    "Guard",
    "GuardRefusal",
    "Inject",
    "Leaf",
    "Leave",
    "Resolve",
    "Verdict",
]


@dataclass(frozen=True, slots=True)
class Inject:
    """The instruction at RIP faults: #VE, #VC, #GP, …"""

    vector: int
    error_code: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The guest goes on with these registers, behind the instruction if RIP is as it was.

    ``zapped`` is what the instruction took out of the second stage; every vCPU forgets it first.
    """

    regs: Regs
    zapped: Zapped = field(default_factory=Zapped)


@dataclass(frozen=True, slots=True)
class Leave:
    """KVM, or the VMM, has to do something: what its answer means `Guard.complete` says.

    With ``regs`` nothing is to be answered: the guest goes on with them, when it goes on.
    """

    exit: Exit
    regs: Regs | None = None


@dataclass(frozen=True, slots=True)
class Again:
    """Try the access or the instruction again: what it needs is there now."""

    zapped: Zapped = field(default_factory=Zapped)


@dataclass(frozen=True, slots=True)
class Resolve:
    """KVM must find the page of ``gpa`` first, as for a fault there; then it is tried again."""

    gpa: int
    access: cpu_api.Access


Verdict = Inject | Answer | Leave | Again | Resolve


class Guard(Protocol):
    """The hardware's side of one VM. gpas have the bit of their side, gfns have not."""

    @property
    def instructions(self) -> frozenset[str]:
        """What the guest may not execute alone (`Cpu.protect`)."""

    @property
    def movable(self) -> bool:
        """Whether `migrated` can follow a page of its to another place; the same always."""

    def fault(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """No leaf allows this access. None: it is KVM's to resolve, as in any VM."""

    def mmio(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict | None:
        """No memory is there. None: KVM emulates the access, as in a VM whose state it sees."""

    def admit(
        self, gfn: int, first: int, last: int, hpa: int, *, private: bool, writable: bool
    ) -> tuple[Leaf, ...]:
        """Pages for gfns [first, last) around ``gfn`` were found, one behind the other from
        ``hpa``: take them, or some with ``gfn`` among them. Returns the leaves to store now.

        Raises GuardRefusal.
        """

    def zapped(self, gfn: int, npages: int, *, private: bool, moving: bool) -> None:
        """The leaves of that side are cleared; a TLB may still hold them.

        ``moving``: the pages stay the guest's, until `migrated` or a `zapped` that moves nothing.
        """

    def drained(self) -> bool:
        """No vCPU holds a translation from before the zaps so far, or it is told of again.

        True: another flush must be requested and proven first, and this called again.
        """

    def host_reaches(self, hpa: int, size: int) -> bool:
        """Whether the host's own stage 2, if it has one, lets it get to these bytes."""

    def leaving(self, hpa: int, size: int) -> bool:
        """The owner is about to copy these bytes to another place, and no vCPU gets there.

        Whether a table names any of them, and must until `migrated`, or a `released` of them.
        """

    def keeps(self, hpa: int, size: int) -> bool:
        """Whether a table still names any of these bytes as this guest's; no leaf may."""

    def migrated(self, gfn: int, npages: int, old: int, new: int) -> None:
        """What lay at hpa ``old`` lies at ``new`` now, its bytes copied by their owner."""

    def released(self, hpa: int, size: int) -> None:
        """These bytes go back to their owner: no guest of this host has them any more.

        Raises GuardRefusal where the hardware takes nothing from a guest that lives: this one ends
        first, then this is called again.
        """

    def enter(self, vcpu: int) -> None:
        """It is about to run guest code."""

    def leave(self, vcpu: int) -> None:
        """It has left guest code."""

    def instruction(self, vcpu: int, left: cpu_api.InterceptExit, regs: Regs) -> Verdict:
        """One of `instructions` was met."""

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM has done what the last `Leave` of this vCPU asked for."""

    def close(self) -> None:
        """The guest is no more: give everything back to the host."""
