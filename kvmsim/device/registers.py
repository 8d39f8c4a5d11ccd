# SPDX-License-Identifier: GPL-2.0-or-later
"""Between the engine's registers and KVM's structures of them, with KVM's checks.

kvm_regs, kvm_sregs, kvm_sregs2, kvm_fpu, kvm_xsave: arch/x86/include/uapi/asm/kvm.h;
kvm_is_valid_sregs() and __set_sregs() of arch/x86/kvm/x86.c (v6.18).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from hwemu.cpu.api import (
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    DescriptorTable,
    Regs,
    Segment,
    Sregs,
)
from hwemu.cpu.fpu import Fpu
from kvmsim.uapi import structs

_REGS: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES: Final = ("gdt", "idt")

_CR0_PE, _CR0_NW, _CR0_CD = 1 << 0, 1 << 29, 1 << 30
# VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT: what the processor has
_CR4_KNOWN: Final = 0x7FF
_EFER_KNOWN: Final = 1 << 0 | EFER_LME | EFER_LMA | 1 << 11  # SCE LME LMA NXE
_CS_L: Final = 1 << 9
_ADDRESS_BITS: Final = 40
_MXCSR_KNOWN: Final = 0xFFFF
_XFEATURES: Final = 0b11  # x87 and SSE
APIC_BASE_RESET: Final = 0xFEE0_0000 | 1 << 11
APIC_BASE_BSP: Final = 1 << 8
_APIC_BASE_KNOWN: Final = (1 << _ADDRESS_BITS) - 1 & ~0x6FF  # EXTD is not simulated

RESET_REGS: Final = Regs(rip=0xFFF0, rdx=0x600)
"""kvm_vcpu_reset(): EDX is the processor's family where CPUID does not say."""
RESET_SREGS: Final = Sregs(
    cr0=0x6000_0010, gdt=DescriptorTable(0, 0xFFFF), idt=DescriptorTable(0, 0xFFFF)
)


class Invalid(ValueError):
    """A state that the processor cannot be in; EINVAL."""


@dataclass(frozen=True, slots=True)
class ControlState:
    """What struct kvm_sregs holds besides the engine's share."""

    sregs: Sregs
    cr8: int = 0
    apic_base: int = APIC_BASE_RESET


def pack_regs(regs: Regs) -> bytes:
    """Struct kvm_regs."""
    return structs.REGS.pack(*(getattr(regs, name) for name in _REGS))


def unpack_regs(data: bytes) -> Regs:
    """The registers of struct kvm_regs; kvm_set_rflags() keeps bit 1 set."""
    regs = Regs(**dict(zip(_REGS, structs.REGS.unpack(data), strict=True)))
    return replace(regs, rflags=regs.rflags | 2)


def _pack_segment(segment: Segment) -> bytes:
    bits = segment.attributes
    return structs.SEGMENT.pack(
        segment.base,
        segment.limit,
        segment.selector,
        bits & 0xF,
        bits >> 7 & 1,
        bits >> 5 & 3,
        bits >> 10 & 1,
        bits >> 4 & 1,
        bits >> 9 & 1,
        bits >> 11 & 1,
        bits >> 8 & 1,
        not bits >> 7 & 1,  # svm_get_segment(): unusable is not present
    )


def _unpack_segment(data: bytes) -> Segment:
    base, limit, selector, kind, present, dpl, db, s, long, g, avl, unusable = (
        structs.SEGMENT.unpack(data)
    )
    attributes = (
        (kind & 0xF)
        | (s & 1) << 4
        | (dpl & 3) << 5
        | (present & 1) << 7
        | (avl & 1) << 8
        | (long & 1) << 9
        | (db & 1) << 10
        | (g & 1) << 11
    )
    if unusable:
        attributes &= ~(1 << 7)
    return Segment(selector, base, limit, attributes)


def _pack_common(state: ControlState) -> bytes:
    sregs = state.sregs
    parts = [_pack_segment(getattr(sregs, name)) for name in _SEGMENTS]
    for name in _TABLES:
        descriptors: DescriptorTable = getattr(sregs, name)
        parts.append(structs.DTABLE.pack(descriptors.base, descriptors.limit & 0xFFFF))
    control = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, state.cr8, sregs.efer, state.apic_base)
    return b"".join((*parts, structs.SREGS_CONTROL.pack(*control)))


def _common_parts(data: bytes) -> Iterator[bytes]:
    at = 0
    for layout in (structs.SEGMENT,) * 8 + (structs.DTABLE,) * 2 + (structs.SREGS_CONTROL,):
        yield data[at : at + layout.size]
        at += layout.size


def pack_sregs(state: ControlState, interrupt: int | None = None) -> bytes:
    """Struct kvm_sregs; ``interrupt`` is the vector that waits for injection."""
    words = [0, 0, 0, 0]
    if interrupt is not None:
        words[interrupt // 64] |= 1 << interrupt % 64
    return _pack_common(state) + structs.INTERRUPT_BITMAP.pack(*words)


def pack_sregs2(state: ControlState) -> bytes:
    """Struct kvm_sregs2, without PDPTRs."""
    return _pack_common(state) + structs.SREGS2_TAIL.pack(0, 0, 0, 0, 0)


def unpack_common(data: bytes) -> ControlState:
    """What kvm_sregs and kvm_sregs2 begin with; :class:`Invalid`."""
    *parts, control = _common_parts(data)
    fields: dict[str, Segment | DescriptorTable] = {
        name: _unpack_segment(part) for name, part in zip(_SEGMENTS, parts[:8], strict=True)
    }
    for name, part in zip(_TABLES, parts[8:], strict=True):
        fields[name] = DescriptorTable(*structs.DTABLE.unpack(part))
    cr0, cr2, cr3, cr4, cr8, efer, apic_base = structs.SREGS_CONTROL.unpack(control)
    sregs = Sregs(**fields, cr0=cr0, cr2=cr2, cr3=cr3, cr4=cr4, efer=efer)  # type: ignore[arg-type]
    state = ControlState(sregs, cr8 & 0xF, apic_base)
    _check(state)
    return state


def unpack_sregs(data: bytes) -> tuple[ControlState, int | None]:
    """Struct kvm_sregs: the state, and the vector to inject; :class:`Invalid`."""
    words = structs.INTERRUPT_BITMAP.unpack(data[-structs.INTERRUPT_BITMAP.size :])
    bits = sum(word << 64 * at for at, word in enumerate(words))
    return unpack_common(data), (bits & -bits).bit_length() - 1 if bits else None


def check_apic_base(value: int) -> None:
    """kvm_apic_set_base(); :class:`Invalid`."""
    if value & ~_APIC_BASE_KNOWN:
        raise Invalid(f"apic_base {value:#x}: reserved bits, or x2APIC, which is not simulated")


def _check(state: ControlState) -> None:
    sregs = state.sregs
    if sregs.cr0 >> 32 or (sregs.cr0 & _CR0_NW and not sregs.cr0 & _CR0_CD):
        raise Invalid(f"cr0 {sregs.cr0:#x} is not valid")
    if sregs.cr0 & CR0_PG and not sregs.cr0 & _CR0_PE:
        raise Invalid(f"cr0 {sregs.cr0:#x}: paging without protection")
    if sregs.cr4 & ~_CR4_KNOWN:
        raise Invalid(f"cr4 {sregs.cr4:#x}: the processor does not have all of it")
    if sregs.efer & ~_EFER_KNOWN:
        raise Invalid(f"efer {sregs.efer:#x}: the processor does not have all of it")
    if sregs.efer & EFER_LME and sregs.cr0 & CR0_PG:
        if not (sregs.cr4 & CR4_PAE and sregs.efer & EFER_LMA):
            raise Invalid("long mode with paging needs CR4.PAE and EFER.LMA")
        if sregs.cr3 >> _ADDRESS_BITS:
            raise Invalid(f"cr3 {sregs.cr3:#x} is beyond the physical addresses")
    elif sregs.efer & EFER_LMA or sregs.cs.attributes & _CS_L:
        raise Invalid("EFER.LMA or CS.L outside long mode")
    check_apic_base(state.apic_base)


def pack_fpu(fpu: Fpu) -> bytes:
    """Struct kvm_fpu."""
    return structs.FPU.pack(
        b"".join(fpu.st), fpu.fcw, fpu.fsw, fpu.ftw, 0, 0, 0, b"".join(fpu.xmm), fpu.mxcsr
    )


def _split(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[at : at + 16] for at in range(0, len(data), 16))


def unpack_fpu(data: bytes) -> Fpu:
    """The state in struct kvm_fpu."""
    fpr, fcw, fsw, ftw, _, _, _, xmm, mxcsr = structs.FPU.unpack(data)
    return Fpu(fcw, fsw, ftw, mxcsr & _MXCSR_KNOWN, _split(fpr), _split(xmm))


def pack_xsave(fpu: Fpu) -> bytes:
    """Struct kvm_xsave of a processor without XSAVE: the FXSAVE area, marked restorable."""
    area = structs.FXSAVE.pack(
        fpu.fcw, fpu.fsw, fpu.ftw, 0, 0, 0, fpu.mxcsr, _MXCSR_KNOWN,
        b"".join(fpu.st), b"".join(fpu.xmm),
    )  # fmt: skip
    return (area + structs.XSAVE_HEADER.pack(_XFEATURES, 0)).ljust(structs.XSAVE_SIZE, b"\0")


def unpack_xsave(data: bytes) -> Fpu:
    """The state in struct kvm_xsave; :class:`Invalid` (fpu_copy_uabi_to_guest_fpstate())."""
    xstate, _ = structs.XSAVE_HEADER.unpack_from(data, structs.XSAVE_HEADER_OFFSET)
    if xstate & ~_XFEATURES:
        raise Invalid(f"xstate_bv {xstate:#x}: only x87 and SSE are there")
    fcw, fsw, ftw, _, _, _, mxcsr, _, fpr, xmm = structs.FXSAVE.unpack_from(data)
    if mxcsr & ~_MXCSR_KNOWN:
        raise Invalid(f"mxcsr {mxcsr:#x}: reserved bits")
    return Fpu(fcw, fsw, ftw, mxcsr, _split(fpr), _split(xmm))
