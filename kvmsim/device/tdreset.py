# SPDX-License-Identifier: GPL-2.0-or-later
"""How a vCPU of a TD starts; nobody but the TDX module sets its registers."""

from __future__ import annotations

from typing import Final

from hwemu.cpu.api import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    EFER_LME,
    EFER_NXE,
    DescriptorTable,
    Regs,
    Segment,
    Sregs,
)
from hwemu.cpu.cpuid import DEFAULT
from kvmsim.kind import ADDRESS_BITS

_CR4_MCE: Final = 1 << 6
_FLAT_CODE, _FLAT_DATA = 0xC9B, 0xC93


def reset_state(index: int, rcx: int) -> tuple[Regs, Sregs]:
    """How a vCPU of a TD starts: 32-bit protected mode, flat, at the reset vector.

    TDX module base specification, "Initial State of TD VCPUs": RBX has the width of guest-physical
    addresses, RCX and R8 what KVM_TDX_INIT_VCPU said, RDX the processor's family, RSI the vCPU's
    index; EFER.LME is set, and no WRMSR is needed to enter 64-bit mode.
    """
    data = Segment(0, 0, 0xFFFF_FFFF, _FLAT_DATA)
    regs = Regs(rip=0xFFFF_FFF0, rbx=ADDRESS_BITS, rcx=rcx, r8=rcx,
                rdx=DEFAULT[1][0], rsi=index)  # fmt: skip
    sregs = Sregs(
        cs=Segment(0, 0, 0xFFFF_FFFF, _FLAT_CODE), ds=data, es=data, fs=data, gs=data, ss=data,
        gdt=DescriptorTable(0, 0), idt=DescriptorTable(0, 0),
        cr0=CR0_PE | CR0_ET | CR0_NE, cr4=_CR4_MCE, efer=EFER_LME | EFER_NXE,
    )  # fmt: skip
    return regs, sregs
