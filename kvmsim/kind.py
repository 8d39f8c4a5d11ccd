# SPDX-License-Identifier: GPL-2.0-or-later
"""Kinds of VMs: what makes an access private, and which gfns exist.

Three things may say it: a bit of the guest-physical address (TDX's SHARED bit,
kvm_gfn_direct_bits() of arch/x86/kvm/mmu.h), the attribute of the gfn (KVM_X86_SW_PROTECTED_VM,
kvm_mmu_page_fault() of arch/x86/kvm/mmu/mmu.c), or the processor beside the address
(PFERR_PRIVATE_ACCESS: SNP's C-bit). Of pKVM the stage-2 entry itself says it; here the attribute
stands for that. Where no memory is private (KVM_X86_DEFAULT_VM:
kvm_arch_has_private_mem() is false) nothing has to.
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
"""The gpa bit that selects the shared side of a gfn where no other is chosen."""

MAX_GFN: Final = SHARED_BIT >> PAGE_SHIFT
"""First gfn that no slot may reach there: above it a gfn would alias another's shared side."""


class PrivateRule(Enum):
    """What says whether an access is private."""

    SHARED_BIT = "a bit of the gpa"
    ATTRIBUTE = "the attribute of the gfn"
    ACCESS = "the processor, beside the gpa"
    NEVER = "no access is"


class Contents(Enum):
    """Who can read what a page holds after it changed its type in place."""

    COMMON = "guest and host alike"
    ENCRYPTED = "who wrote it"
    OWNED = "its owner, and then the other as it stands"


@dataclass(frozen=True, slots=True)
class VmKind:
    """One kind. ``shared_bit`` is a mask, 0 but for ``PrivateRule.SHARED_BIT``."""

    name: str
    vm_type: int
    """KVM_X86_*_VM or KVM_VM_TYPE_ARM_*, the argument of KVM_CREATE_VM."""
    rule: PrivateRule
    shared_bit: int = 0
    protected_state: bool = False
    """Nobody emulates this guest's instructions: no read-only slots, whose writes are MMIO
    (kvm_arch_has_readonly_mem())."""
    contents: Contents = Contents.COMMON

    def __post_init__(self) -> None:
        bit = self.shared_bit
        if (self.rule is PrivateRule.SHARED_BIT) != (bit != 0) or bit & (bit - 1):
            raise ValueError(f"{self.name}: shared bit {bit:#x} with rule {self.rule.name}")
        if bit and not 1 << PAGE_SHIFT < bit < 1 << ADDRESS_BITS:
            raise ValueError(f"{self.name}: shared bit {bit:#x}: one of bits 13 to 39 of the gpa")

    @property
    def private_memory(self) -> bool:
        """Whether a gfn may be private (kvm_arch_has_private_mem())."""
        return self.rule is not PrivateRule.NEVER

    @property
    def max_gfn(self) -> int:
        """First gfn that no slot may reach (kvm_mmu_max_gfn() + 1)."""
        return (self.shared_bit or 1 << ADDRESS_BITS) >> PAGE_SHIFT

    @property
    def halves(self) -> tuple[int, ...]:
        """The sides that the second stage has: gpa offsets, the private one first."""
        return (0, self.shared_bit) if self.shared_bit else (0,)


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
                PrivateRule.ACCESS,
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
