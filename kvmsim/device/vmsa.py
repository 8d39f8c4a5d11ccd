# SPDX-License-Identifier: GPL-2.0-or-later
"""The save area (VMSA) of an SNP guest's vCPU, as KVM fills it in before it is measured.

sev_es_sync_vmsa() of arch/x86/kvm/svm/sev.c (v6.18); offsets of AMD APM vol. 2, table B-4.
"""

from __future__ import annotations

import struct
from typing import Final

from hwemu.cpu.api import Regs, Sregs
from hwemu.cpu.fpu import Fpu
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.vmsa import SEGMENTS, SNP_ACTIVE, WORDS

_SEGMENT: Final = struct.Struct("<HHIQ")
_CPL: Final = 0xCB
_CR2: Final = 0x240
_MXCSR, _FSW, _FCW = 0x408, 0x40E, 0x410
_GENERAL: Final = {
    "rax": 0x1F8, "rsp": 0x1D8, "rcx": 0x308, "rdx": 0x310, "rbx": 0x318, "rbp": 0x328,
    "rsi": 0x330, "rdi": 0x338, **{f"r{n}": 0x340 + 8 * (n - 8) for n in range(8, 16)},
    "rip": WORDS["rip"], "rflags": WORDS["rflags"],
}  # fmt: skip
_CONTROL: Final = ("cr0", "cr3", "cr4")
_SVME: Final = 1 << 12  # VMRUN wants it in the guest's EFER
_PAT: Final = 0x0007_0406_0007_0406


def pack(
    regs: Regs, sregs: Sregs, fpu: Fpu, *, dr6: int, dr7: int, pat: int | None, features: int = 0
) -> bytes:
    """The 4096 bytes; ``features`` are those of SEV_FEATURES beside SNP's own."""
    page = bytearray(PAGE_SIZE)
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
        one = getattr(sregs, name)
        _SEGMENT.pack_into(page, SEGMENTS[name], one.selector, one.attributes, one.limit, one.base)
    ldt = sregs.ldt
    _SEGMENT.pack_into(page, SEGMENTS["ldtr"], ldt.selector, ldt.attributes, ldt.limit, ldt.base)
    for name, table in (("gdtr", sregs.gdt), ("idtr", sregs.idt)):
        _SEGMENT.pack_into(page, SEGMENTS[name], 0, 0, table.limit, table.base)
    words = {at: getattr(regs, name) for name, at in _GENERAL.items()}
    words |= {WORDS[name]: getattr(sregs, name) for name in _CONTROL}
    words |= {
        _CR2: sregs.cr2, WORDS["efer"]: sregs.efer | _SVME, WORDS["dr6"]: dr6,
        WORDS["dr7"]: dr7, WORDS["g_pat"]: _PAT if pat is None else pat,
        WORDS["sev_features"]: features | SNP_ACTIVE, WORDS["xcr0"]: 1,
    }  # fmt: skip
    for at, value in words.items():
        struct.pack_into("<Q", page, at, value)
    page[_CPL] = sregs.ss.attributes >> 5 & 3
    struct.pack_into("<I", page, _MXCSR, fpu.mxcsr)
    struct.pack_into("<H", page, _FSW, fpu.fsw)
    struct.pack_into("<H", page, _FCW, fpu.fcw)
    return bytes(page)
