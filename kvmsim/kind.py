# SPDX-License-Identifier: GPL-2.0-or-later
"""Kinds of VMs: what makes an access private, and which gfns exist.

Two things may say it: a bit of the guest-physical address (TDX's SHARED bit,
kvm_gfn_direct_bits() of arch/x86/kvm/mmu.h; SNP's C-bit, which KVM is told of beside the address,
by PFERR_PRIVATE_ACCESS, and which our engine leaves in it), or the attribute of the gfn
(KVM_X86_SW_PROTECTED_VM, kvm_mmu_page_fault() of arch/x86/kvm/mmu/mmu.c). Of pKVM the stage-2
entry itself says it; here the attribute stands for that. Where no memory is private
(KVM_X86_DEFAULT_VM: kvm_arch_has_private_mem() is false) nothing has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from kvmsim.uapi import (
    KVM_VM_TYPE_ARM_PROTECTED,
    KVM_X86_DEFAULT_VM,
    KVM_X86_SNP_VM,
    KVM_X86_SW_PROTECTED_VM,
    KVM_X86_TDX_VM,
    PAGE_SHIFT,
)

ADDRESS_BITS: Final = 40
"""Width of a guest-physical address, the shared bit included (what the engine has)."""

SHARED_BIT: Final = 1 << 39
"""The gpa bit that selects the shared side of a gfn where no other is chosen; SNP's C-bit too."""

MAX_GFN: Final = SHARED_BIT >> PAGE_SHIFT
"""First gfn that no slot may reach there: above it a gfn would alias another's shared side."""


class PrivateRule(Enum):
    """What says whether an access is private."""

    SHARED_BIT = "a bit of the gpa that is clear"
    C_BIT = "a bit of the gpa that is set"
    ATTRIBUTE = "the attribute of the gfn"
    NEVER = "no access is"


class Contents(Enum):
    """Who can read what a page holds after it changed its type in place."""

    COMMON = "guest and host alike"
    ENCRYPTED = "who wrote it"
    OWNED = "its owner, and then the other as it stands"


@dataclass(frozen=True, slots=True)
class VmKind:
    """One kind. ``side_bit`` is the mask of the gpa bit that tells the sides apart, 0 for none."""

    name: str
    vm_type: int
    """KVM_X86_*_VM or KVM_VM_TYPE_ARM_*, the argument of KVM_CREATE_VM."""
    rule: PrivateRule
    side_bit: int = 0
    protected_state: bool = False
    """Nobody emulates this guest's instructions: no read-only slots, whose writes are MMIO
    (kvm_arch_has_readonly_mem())."""
    contents: Contents = Contents.COMMON

    def __post_init__(self) -> None:
        bit = self.side_bit
        by_bit = self.rule in (PrivateRule.SHARED_BIT, PrivateRule.C_BIT)
        if by_bit != (bit != 0) or bit & (bit - 1):
            raise ValueError(f"{self.name}: bit {bit:#x} with rule {self.rule.name}")
        if bit and not 1 << PAGE_SHIFT < bit < 1 << ADDRESS_BITS:
            raise ValueError(f"{self.name}: bit {bit:#x}: one of bits 13 to 39 of the gpa")

    @property
    def shared_bit(self) -> int:
        """The mask of the gpa bit that a shared access has set, 0 if there is none."""
        return self.side_bit if self.rule is PrivateRule.SHARED_BIT else 0

    @property
    def c_bit(self) -> int:
        """The mask of the gpa bit that a private access has set, 0 if there is none."""
        return self.side_bit if self.rule is PrivateRule.C_BIT else 0

    def half(self, *, private: bool) -> int:
        """What a gpa of that side has beside its gfn."""
        return self.c_bit if private else self.shared_bit

    @property
    def private_memory(self) -> bool:
        """Whether a gfn may be private (kvm_arch_has_private_mem())."""
        return self.rule is not PrivateRule.NEVER

    @property
    def movable(self) -> bool:
        """Whether a page may get another host-physical address without its hardware's help.

        What is encrypted is bound to its address, and what a hypervisor protects it moves alone
        (kvm_gmem_migrate_folio() of virt/kvm/guest_memfd.c moves nothing either). The hardware
        around a VM has the last word (`kvmsim.guard.Guard.movable`).
        """
        return self.contents is Contents.COMMON

    @property
    def max_gfn(self) -> int:
        """First gfn that no slot may reach (kvm_mmu_max_gfn() + 1)."""
        return (self.side_bit or 1 << ADDRESS_BITS) >> PAGE_SHIFT

    @property
    def halves(self) -> tuple[int, ...]:
        """The sides that the second stage has: gpa offsets, the private one first."""
        return (self.c_bit, self.shared_bit) if self.side_bit else (0,)


def shared_bit_kind(bit: int) -> VmKind:
    """The kind whose gpas have their shared bit at position ``bit``; ValueError if none can."""
    name = "shared-bit" if 1 << bit == SHARED_BIT else f"shared-bit-{bit}"
    return VmKind(name, KVM_X86_DEFAULT_VM, PrivateRule.SHARED_BIT, 1 << bit)


SHARED_BIT_KIND: Final = shared_bit_kind(39)
"""This project's own guests: TDX's address bit, without TDX's protection of registers."""

KINDS: Final[Mapping[str, VmKind]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            SHARED_BIT_KIND,
            VmKind("default", KVM_X86_DEFAULT_VM, PrivateRule.NEVER),
            VmKind("sw-protected", KVM_X86_SW_PROTECTED_VM, PrivateRule.ATTRIBUTE),
            VmKind(
                "tdx",
                KVM_X86_TDX_VM,
                PrivateRule.SHARED_BIT,
                SHARED_BIT,
                protected_state=True,
                contents=Contents.ENCRYPTED,
            ),
            VmKind(
                "snp",
                KVM_X86_SNP_VM,
                PrivateRule.C_BIT,
                SHARED_BIT,
                protected_state=True,
                contents=Contents.ENCRYPTED,
            ),
            VmKind(
                "pkvm",
                KVM_VM_TYPE_ARM_PROTECTED,
                PrivateRule.ATTRIBUTE,
                protected_state=True,
                contents=Contents.OWNED,
            ),
        )
    }
)
