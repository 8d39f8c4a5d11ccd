# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's registers as KVM_GET_REGS and KVM_GET_SREGS give them, under the kernel's names.

Layouts: struct kvm_regs, kvm_segment, kvm_dtable and kvm_sregs of
arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

from hwemu.cpu.api import (
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    DescriptorTable,
)
from hwemu.cpu.api import Regs as GeneralRegisters

_REGS: Final = struct.Struct("<18Q")
_SEGMENT: Final = struct.Struct("<QIH10B")
_DTABLE: Final = struct.Struct("<QH6x")
_CONTROL: Final = struct.Struct("<11Q")  # cr0 … cr8, efer, apic_base, interrupt_bitmap
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

REGS_SIZE: Final = _REGS.size
SREGS_SIZE: Final = len(_SEGMENTS) * _SEGMENT.size + 2 * _DTABLE.size + _CONTROL.size

RFLAGS_FIXED, RFLAGS_IOPL3 = 1 << 1, 3 << 12

Dtable = DescriptorTable
"""struct kvm_dtable: GDTR or IDTR."""
_NO_TABLE: Final = Dtable()


@dataclass(frozen=True, slots=True)
class Regs(GeneralRegisters):
    """struct kvm_regs: its fields are the engine's, in the same order."""

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> Self:
        """Decode REGS_SIZE bytes."""
        return cls(*_REGS.unpack_from(data))

    def to_bytes(self) -> bytes:
        """Encode; struct.error if a value is no u64."""
        return _REGS.pack(*(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Segment:
    """struct kvm_segment: a segment register with its hidden part, a flag per byte."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the kernel's name
    g: int = 0
    avl: int = 0
    unusable: int = 0
    padding: int = 0


@dataclass(frozen=True, slots=True)
class Sregs:
    """struct kvm_sregs: segments, descriptor tables, control registers."""

    cs: Segment = Segment()
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    tr: Segment = Segment()
    ldt: Segment = Segment()
    gdt: Dtable = _NO_TABLE
    idt: Dtable = _NO_TABLE
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    interrupt_bitmap: tuple[int, int, int, int] = (0, 0, 0, 0)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> Self:
        """Decode SREGS_SIZE bytes."""
        segments = [
            Segment(*_SEGMENT.unpack_from(data, number * _SEGMENT.size))
            for number in range(len(_SEGMENTS))
        ]
        at = len(_SEGMENTS) * _SEGMENT.size
        tables = [Dtable(*_DTABLE.unpack_from(data, at + n * _DTABLE.size)) for n in range(2)]
        *control, b0, b1, b2, b3 = _CONTROL.unpack_from(data, at + 2 * _DTABLE.size)
        values: dict[str, Any] = dict(
            zip((f.name for f in fields(cls)), (*segments, *tables, *control), strict=False)
        )
        return cls(**values, interrupt_bitmap=(b0, b1, b2, b3))

    def to_bytes(self) -> bytes:
        """Encode; struct.error if a value does not fit its place."""
        parts = [
            _SEGMENT.pack(*(getattr(getattr(self, name), f.name) for f in fields(Segment)))
            for name in _SEGMENTS
        ]
        parts += [_DTABLE.pack(table.base, table.limit) for table in (self.gdt, self.idt)]
        control = (self.cr0, self.cr2, self.cr3, self.cr4, self.cr8, self.efer, self.apic_base)
        return b"".join([*parts, _CONTROL.pack(*control, *self.interrupt_bitmap)])

    def long_mode(self, cr3: int, *, ring: int = 0) -> Self:
        """These registers in 64-bit mode: flat segments of ``ring`` (0 or 3), paging by ``cr3``.

        Ring 3 has the selectors that SYSRET would load from a STAR of 0x1b, ring 0 has 0x08 and
        0x10. What KVM owns (apic_base, cr8) stays as it is.
        """
        code, data = (0x2B, 0x23) if ring == 3 else (0x08, 0x10)
        flat = Segment(0, 0xFFFF_FFFF, data, type=3, present=1, dpl=ring, db=1, s=1, g=1)
        return replace(
            self,
            cs=Segment(0, 0xFFFF_FFFF, code, type=11, present=1, dpl=ring, s=1, l=1, g=1),
            ds=flat,
            es=flat,
            fs=flat,
            gs=flat,
            ss=flat,
            cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
            cr3=cr3,
            cr4=CR4_PAE,
            efer=EFER_LME | EFER_LMA | EFER_NXE,
        )
