# SPDX-License-Identifier: GPL-2.0-or-later
"""How a vCPU starts, and the save area (VMSA) in which SNP measures that.

Offsets: AMD APM vol. 2, table B-4; struct sev_es_save_area of arch/x86/include/asm/svm.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvmsim.vmm.bootparams import PAGE_SIZE

VMSA_GPA: Final = 0xFFFF_FFFF_F000
"""The gpa that is measured with a VMSA, which has no gpa of its own."""


@dataclass(frozen=True, slots=True)
class EntryState:
    """How one vCPU starts: 64-bit mode, paging on, interrupts off, flat segments.

    CS is selector 0x08, the data segments 0x10, both from the GDT at ``gdt_base``; CR0 has
    PE MP ET NE WP PG, CR4 PAE, EFER LME LMA NXE; registers not named here are 0.
    """

    rip: int
    rsp: int
    rdi: int
    """The vCPU's index; 0 is the boot vCPU."""
    rsi: int
    """The gpa of the boot-parameter page."""
    cr3: int
    gdt_base: int
    gdt_limit: int
    rflags: int = 0x2


SNP_ACTIVE: Final = 1 << 0
"""SEV_FEATURES: the guest is an SNP guest."""

_SEGMENT: Final = struct.Struct("<HHIQ")
_CODE64, _DATA, _LDT, _TSS = 0xA9B, 0xC93, 0x082, 0x08B

SEGMENTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "es": 0x00, "cs": 0x10, "ss": 0x20, "ds": 0x30, "fs": 0x40, "gs": 0x50,
        "gdtr": 0x60, "ldtr": 0x70, "idtr": 0x80, "tr": 0x90,
    }
)  # fmt: skip
"""Offsets of the segments: selector, attributes, limit, base."""

WORDS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "efer": 0xD0, "cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "dr7": 0x160, "dr6": 0x168,
        "rflags": 0x170, "rip": 0x178, "rsp": 0x1D8, "g_pat": 0x268, "rsi": 0x330, "rdi": 0x338,
        "sev_features": 0x3B0, "xcr0": 0x3E8,
    }
)  # fmt: skip
"""Offsets of the 8-byte fields that are not 0 at entry."""

_MXCSR: Final = (0x408, 0x1F80)
_FCW: Final = (0x410, 0x037F)

# CR0: PE MP ET NE WP PG; CR4: PAE OSFXSR OSXMMEXCPT; EFER: SCE LME LMA SVME NXE; the rest at reset
_FIXED: Final[Mapping[str, int]] = MappingProxyType(
    {
        "cr0": 0x8001_0033, "cr4": 0x620, "efer": 0x1D01, "dr6": 0xFFFF_0FF0, "dr7": 0x400,
        "g_pat": 0x0007_0406_0007_0406, "sev_features": SNP_ACTIVE, "xcr0": 1,
    }
)  # fmt: skip


def pack_vmsa(entry: EntryState) -> bytes:
    """The 4096 bytes of the VMSA of a vCPU that starts with ``entry``, at VMPL 0."""
    page = bytearray(PAGE_SIZE)
    flat = (0x10, _DATA, 0xFFFF_FFFF, 0)
    segments = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), flat) | {
        "cs": (0x08, _CODE64, 0xFFFF_FFFF, 0),
        "gdtr": (0, 0, entry.gdt_limit, entry.gdt_base),
        "ldtr": (0, _LDT, 0xFFFF, 0),
        "tr": (0, _TSS, 0xFFFF, 0),
    }
    for name, fields in segments.items():
        _SEGMENT.pack_into(page, SEGMENTS[name], *fields)
    words = {name: getattr(entry, name) for name in ("cr3", "rflags", "rip", "rsp", "rsi", "rdi")}
    for name, value in (dict(_FIXED) | words).items():
        struct.pack_into("<Q", page, WORDS[name], value)
    struct.pack_into("<I", page, *_MXCSR)
    struct.pack_into("<H", page, *_FCW)
    return bytes(page)
