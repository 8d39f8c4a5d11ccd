# SPDX-License-Identifier: GPL-2.0-or-later
"""Event delivery through the guest's 64-bit IDT, which the engine never does itself.

AMD APM vol. 2, 8.9 "Long-Mode Interrupt Control Transfers"; double fault rules 8.2.9.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import CR0_PE
from hwemu.cpu.guestmemory import GuestFault, GuestMemory, Unsupported
from hwemu.cpu.rawcontext import RawState

ERROR_CODE_VECTORS = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_PAGE_FAULT, _DOUBLE_FAULT = 14, 8
_EXTERNAL, _IDT = 1, 2

_TF, _IF, _NT, _RF, _VM, _AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Event:
    """Something to deliver. ``rip`` is what the frame holds; None: RIP at delivery."""

    vector: int
    error_code: int | None
    rip: int | None
    cr2: int | None = None
    software: bool = False
    external: bool = False
    software_start: int = 0
    """RIP of the INT instruction: where a fault during its delivery is reported."""


def combine(first: Event, second: GuestFault) -> Event | None:
    """What becomes of ``first`` when its delivery raises ``second``; None is a triple fault."""
    rip = first.software_start if first.software else first.rip
    if first.vector == _DOUBLE_FAULT and not first.software and not first.external:
        return None
    plain = not first.software and not first.external
    serious = second.vector in _CONTRIBUTORY
    if plain and first.vector in _CONTRIBUTORY and serious:
        return Event(_DOUBLE_FAULT, 0, rip)
    if plain and first.vector == _PAGE_FAULT and (serious or second.vector == _PAGE_FAULT):
        return Event(_DOUBLE_FAULT, 0, rip, cr2=second.cr2)
    return Event(second.vector, second.error_code, rip, cr2=second.cr2)


def resolve(raw: RawState, memory: GuestMemory, rflags: int, event: Event) -> bool:
    """Deliver ``event``, or the fault its delivery raises, and so on; False: triple fault.

    A `Stage2Miss` passes through with the guest unchanged: ``event`` can be tried again.
    """
    current: Event | None = event
    while current is not None:
        try:
            deliver(raw, memory, rflags, current)
        except GuestFault as fault:
            current = combine(current, fault)
        else:
            return True
    return False


def _selector_error(selector: int, event: Event) -> int:
    return (selector & 0xFFFC) | (0 if event.software else _EXTERNAL * event.external)


def deliver(raw: RawState, memory: GuestMemory, rflags: int, event: Event) -> None:
    """Enter the handler of ``event``. Raises GuestFault or Stage2Miss and then changes nothing
    but guest stack bytes below RSP.
    """
    hflags = raw.d[raw_layout.HFLAGS]
    if not hflags & raw_layout.HF_LMA:
        if raw.q[raw_layout.CR0] & CR0_PE:
            raise Unsupported("event delivery in protected mode")
        _deliver_real(raw, memory, rflags, event)
        return
    if event.cr2 is not None:
        raw.q[raw_layout.CR2] = event.cr2
    gate_error = event.vector * 8 + _IDT + (_EXTERNAL if not event.software else 0)
    if event.vector * 16 + 15 > raw.d[(raw_layout.IDT + 16) // 4]:
        raise GuestFault(13, gate_error)
    gate = memory.read_int(raw.q[raw_layout.IDT_BASE] + event.vector * 16, 16)
    kind = gate >> 40 & 0x1F
    if kind not in (0xE, 0xF):
        raise GuestFault(13, gate_error)
    cpl = raw.cpl
    if event.software and (gate >> 45 & 3) < cpl:
        raise GuestFault(13, gate_error)
    if not gate >> 47 & 1:
        raise GuestFault(11, gate_error)
    selector = gate >> 16 & 0xFFFF
    descriptor = _code_descriptor(raw, memory, selector, event)
    dpl = descriptor >> 45 & 3
    conforming = bool(descriptor >> 42 & 1)
    if dpl > cpl:
        raise GuestFault(13, _selector_error(selector, event))
    new_cpl = cpl if conforming else dpl

    ist = gate >> 32 & 7
    if ist:
        stack = _tss_stack(raw, memory, 0x1C + 8 * ist)
    elif new_cpl != cpl:
        stack = _tss_stack(raw, memory, 4 + 8 * new_cpl)
    else:
        stack = raw.q[raw_layout.RSP]
    stack &= ~0xF
    assert event.rip is not None
    words = [
        event.rip,
        raw.d[raw_layout.CS // 4],
        rflags,
        raw.q[raw_layout.RSP],
        raw.d[raw_layout.SS // 4],
    ]
    if event.error_code is not None:
        words.insert(0, event.error_code)
    frame = b"".join((word & _MASK64).to_bytes(8, "little") for word in words)
    top = (stack - len(frame)) & _MASK64
    memory.write(top, frame, user=new_cpl == 3)

    # nothing below can fail
    if new_cpl != cpl:
        _set_segment(raw, raw_layout.SS, new_cpl, 0, 0, new_cpl << 13)
    _set_segment(
        raw,
        raw_layout.CS,
        (selector & ~3) | new_cpl,
        0,
        0xFFFF_FFFF,
        descriptor >> 32 & 0xFFFFFF | 0x100,
    )
    hflags &= ~(raw_layout.HF_CPL | raw_layout.HF_ADDSEG | raw_layout.HF_INHIBIT_IRQ)
    hflags |= raw_layout.HF_CS64 | raw_layout.HF_CS32 | raw_layout.HF_SS32 | new_cpl
    raw.d[raw_layout.HFLAGS] = hflags
    cleared = _TF | _NT | _RF | _VM | (_IF if kind == 0xE else 0)
    raw.set_rflags(rflags & ~cleared)
    raw.q[raw_layout.RSP] = top
    raw.q[raw_layout.RIP] = (
        (gate & 0xFFFF) | (gate >> 48 & 0xFFFF) << 16 | (gate >> 64 & 0xFFFFFFFF) << 32
    )


def _deliver_real(raw: RawState, memory: GuestMemory, rflags: int, event: Event) -> None:
    """Enter a handler of real mode: no error code, a frame of 16-bit words (APM vol. 2, 8.6)."""
    at = event.vector * 4
    if at + 3 > raw.d[(raw_layout.IDT + 16) // 4]:
        raise GuestFault(13, 0)
    vector = memory.read_int(raw.q[raw_layout.IDT_BASE] + at, 4)
    assert event.rip is not None
    words = (event.rip, raw.d[raw_layout.CS // 4], rflags)
    frame = b"".join((word & 0xFFFF).to_bytes(2, "little") for word in words)
    rsp = raw.q[raw_layout.RSP]
    top = (rsp - len(frame)) & 0xFFFF
    memory.write(raw.q[raw_layout.SS // 8 + 1] + top, frame)

    # nothing below can fail
    selector = vector >> 16
    flags = raw.d[raw_layout.CS // 4 + 5]
    _set_segment(raw, raw_layout.CS, selector, selector << 4, 0xFFFF, flags)
    raw.d[raw_layout.HFLAGS] &= ~raw_layout.HF_INHIBIT_IRQ
    raw.set_rflags(rflags & ~(_TF | _IF | _AC | _RF))
    raw.q[raw_layout.RSP] = rsp & ~0xFFFF | top
    raw.q[raw_layout.RIP] = vector & 0xFFFF


def _code_descriptor(raw: RawState, memory: GuestMemory, selector: int, event: Event) -> int:
    """The 64-bit code descriptor that a gate names."""
    if not selector & ~3:
        raise GuestFault(13, _EXTERNAL if not event.software else 0)
    table = raw_layout.LDT if selector & 4 else raw_layout.GDT
    if (selector | 7) > raw.d[(table + 16) // 4]:
        raise GuestFault(13, _selector_error(selector, event))
    descriptor = memory.read_int(raw.q[table // 8 + 1] + (selector & ~7), 8)
    code64 = descriptor >> 43 & 3 == 3 and descriptor >> 53 & 1 and not descriptor >> 54 & 1
    if not code64:
        raise GuestFault(13, _selector_error(selector, event))
    if not descriptor >> 47 & 1:
        raise GuestFault(11, _selector_error(selector, event))
    return descriptor


def _tss_stack(raw: RawState, memory: GuestMemory, offset: int) -> int:
    selector = raw.d[raw_layout.TR // 4]
    if offset + 7 > raw.d[(raw_layout.TR + 16) // 4]:
        raise GuestFault(10, selector & 0xFFFC)
    stack = memory.read_int(raw.q[raw_layout.TR // 8 + 1] + offset, 8)
    if (stack >> 47) not in (0, 0x1FFFF):
        raise GuestFault(12, 0)
    return stack


def _set_segment(raw: RawState, at: int, selector: int, base: int, limit: int, flags: int) -> None:
    raw.d[at // 4] = selector
    raw.q[at // 8 + 1] = base
    raw.d[at // 4 + 4] = limit
    raw.d[at // 4 + 5] = flags & 0xFFFF_FFFF


def set_flat(raw: RawState, at: int, selector: int, flags: int) -> None:
    """Load a flat segment as SYSCALL does (AMD APM vol. 3, SYSCALL)."""
    _set_segment(raw, at, selector, 0, 0xFFFF_FFFF, flags)
