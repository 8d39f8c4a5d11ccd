# SPDX-License-Identifier: GPL-2.0-or-later
"""Between the engine's raw CPU state and `Regs`, `Sregs`."""

from __future__ import annotations

from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import DescriptorTable, Regs, Segment, Sregs
from hwemu.cpu.rawcontext import RawState

ORDER = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{index}" for index in range(8, 16)),
)
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_SEGMENTS = {
    "es": raw_layout.ES,
    "cs": raw_layout.CS,
    "ss": raw_layout.SS,
    "ds": raw_layout.DS,
    "fs": raw_layout.FS,
    "gs": raw_layout.GS,
    "ldt": raw_layout.LDT,
    "tr": raw_layout.TR,
}


def read_regs(raw: RawState, rflags: int) -> Regs:
    """General registers out of the CPU state."""
    values = dict(zip(ORDER, raw.q[:16].tolist(), strict=True))
    return Regs(**values, rip=raw.q[raw_layout.RIP], rflags=rflags)


def write_regs(raw: RawState, regs: Regs) -> None:
    """General registers, RIP and RFLAGS into the CPU state."""
    for word, name in enumerate(ORDER):
        raw.q[word] = getattr(regs, name) & _MASK64
    raw.q[raw_layout.RIP] = regs.rip & _MASK64
    raw.keep_rflags(regs.rflags)


def _read_segment(raw: RawState, at: int) -> Segment:
    flags = raw.d[at // 4 + 5]
    return Segment(
        selector=raw.d[at // 4],
        base=raw.q[at // 8 + 1],
        limit=raw.d[at // 4 + 4],
        attributes=(flags >> 8 & 0xFF) | (flags >> 12 & 0xF00),
    )


def _read_table(raw: RawState, at: int) -> DescriptorTable:
    return DescriptorTable(raw.q[at // 8 + 1], raw.d[at // 4 + 4])


def read_sregs(raw: RawState, efer: int) -> Sregs:
    """Segments and control registers out of the CPU state; ``efer`` as the guest sees it."""
    segments = {name: _read_segment(raw, at) for name, at in _SEGMENTS.items()}
    return Sregs(
        **segments,
        gdt=_read_table(raw, raw_layout.GDT),
        idt=_read_table(raw, raw_layout.IDT),
        cr0=raw.q[raw_layout.CR0],
        cr2=raw.q[raw_layout.CR2],
        cr3=raw.q[raw_layout.CR3],
        cr4=raw.q[raw_layout.CR4],
        efer=efer,
    )
