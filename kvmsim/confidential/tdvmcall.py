# SPDX-License-Identifier: GPL-2.0-or-later
"""TDG.VP.VMCALL: what a TD asks of its VMM, register by register.

Guest-Hypervisor Communication Interface 1.5, chapter 3; handle_tdvmcall() of
arch/x86/kvm/vmx/tdx.c (v6.18). R10 = 0 is GHCI's own list, by R11; any other R10 is the number of
one of KVM's hypercalls. What the guest has not named in RCX is not passed; here it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from hwemu.cpu import cpuid
from hwemu.cpu.api import Regs
from kvmsim import exits
from kvmsim.guard import Answer, Leave, Verdict
from kvmsim.rangelist import MapGpaRange
from kvmsim.running import RunningVm
from kvmsim.uapi import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_SYSTEM_EVENT_TDX_FATAL,
    KVMSIM_MAP_GPA_RANGES_MAX,
    PAGE_SHIFT,
    PAGE_SIZE,
)

SUCCESS: Final = 0
RETRY: Final = 1
INVALID_OPERAND: Final = 0x8000_0000_0000_0000
ALIGN_ERROR: Final = 0x8000_0000_0000_0002
SUBFUNC_UNSUPPORTED: Final = 0x8000_0000_0000_0003

#: KVM converts by so much and looks for signals in between (TDX_MAP_GPA_MAX_LEN).
MAP_GPA_CHUNK: Final = 2 << 20
_MASK32: Final = 0xFFFF_FFFF
_NAMES: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                 *(f"r{number}" for number in range(8, 16)))  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Map:
    """A TDVMCALL<MapGPA> under way: bytes [gpa, end) are left, of which one chunk was asked for,
    or as many as one exit may have.
    """

    gpa: int
    end: int
    private: bool


def passed(regs: Regs) -> Regs:
    """The registers that RCX names; the others are zero to the VMM."""
    hidden = {name: 0 for bit, name in enumerate(_NAMES) if bit > 1 and not regs.rcx >> bit & 1}
    return replace(regs, **hidden)


class TdVmCalls:
    """The calls of one TD's vCPUs."""

    def __init__(self, running: RunningVm) -> None:
        self._running = running
        self._under_way: dict[int, _Map | exits.Exit] = {}

    def begin(self, vcpu: int, regs: Regs) -> Verdict:
        """A TDVMCALL with these registers."""
        given = passed(regs)
        if given.r10:
            args = (given.r11, given.r12, given.r13, given.r14)
            return self._ask(vcpu, exits.HypercallExit(given.r10, args))
        call = _CALLS.get(given.r11)
        if call is None:
            return _done(regs, SUBFUNC_UNSUPPORTED)
        return call(self, vcpu, given, regs)

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM has answered."""
        asked = self._under_way.pop(vcpu)
        number = int.from_bytes(data, "little") if isinstance(data, bytes) else data or 0
        match asked:
            case _Map(gpa, end, private):
                done = 0 if number else 1
                if self._running.batches:  # how many were done, or an errno
                    done = number if number <= len(_chunks(asked)) else 0
                if not done:
                    return _done(regs, INVALID_OPERAND, gpa | self._side(private))
                left = _Map(min(gpa + done * MAP_GPA_CHUNK, end), end, private)
                return self._map(vcpu, left, regs)
            case exits.HypercallExit():
                return _done(regs, number)
            case _:
                return _done(regs, SUCCESS, number)

    def _ask(self, vcpu: int, exit_: exits.Exit) -> Leave:
        self._under_way[vcpu] = exit_
        return Leave(exit_)

    def _side(self, private: bool) -> int:
        return self._running.vm.kind.half(private=private)

    # --- one by one -----------------------------------------------------------------------------

    def _info(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        """GetTdVmCallInfo: R12 = 0 asks for the calls that all must have."""
        return Answer(replace(regs, r10=SUCCESS, r11=0, r12=0, r13=0, r14=0))

    def _cpuid(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        lookup = cpuid.fixed(cpuid.DEFAULT, vcpu)
        eax, ebx, ecx, edx = lookup(given.r12 & _MASK32, given.r13 & _MASK32)
        return Answer(replace(regs, r10=SUCCESS, r12=eax, r13=ebx, r14=ecx, r15=edx))

    def _hlt(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        return Leave(exits.HltExit(), replace(regs, r10=SUCCESS))

    def _io(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        size, write, port = given.r12, given.r13, given.r14
        if size not in (1, 2, 4) or write > 1 or port >> 16:
            return _done(regs, INVALID_OPERAND)
        if not write:
            return self._ask(vcpu, exits.IoExit(port, size, False))
        data = (given.r15 & (1 << 8 * size) - 1).to_bytes(size, "little")
        return Leave(exits.IoExit(port, size, True, data), replace(regs, r10=SUCCESS))

    def _rdmsr(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        value = self._running.vcpus[vcpu].cpu.get_msr(given.r12 & _MASK32)
        return _done(regs, INVALID_OPERAND) if value is None else _done(regs, SUCCESS, value)

    def _wrmsr(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        kept = self._running.vcpus[vcpu].cpu.set_msr(given.r12 & _MASK32, given.r13)
        return _done(regs, SUCCESS if kept else INVALID_OPERAND)

    def _mmio(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        size, write, gpa = given.r12, given.r13, given.r14
        gpa &= ~self._side(private=False)  # the SHARED bit is optional (tdx_emulate_mmio())
        crosses = gpa % PAGE_SIZE + size > PAGE_SIZE
        if size not in (1, 2, 4, 8) or write > 1 or crosses or gpa >> 39:
            return _done(regs, INVALID_OPERAND)
        if not write:
            return self._ask(vcpu, exits.MmioExit(gpa, size, False))
        data = (given.r15 & (1 << 8 * size) - 1).to_bytes(size, "little")
        return Leave(exits.MmioExit(gpa, size, True, data), replace(regs, r10=SUCCESS))

    def _map_gpa(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        """tdx_map_gpa(): the SHARED bit of R12 says to which side."""
        bit = self._side(private=False)
        gpa, size = given.r12 & ~bit, given.r13
        if not size or gpa + size > bit:
            return _done(regs, INVALID_OPERAND)
        if (gpa | size) % PAGE_SIZE:
            return _done(regs, ALIGN_ERROR)
        return self._map(vcpu, _Map(gpa, gpa + size, private=not given.r12 & bit), regs, first=True)

    def _map(self, vcpu: int, left: _Map, regs: Regs, *, first: bool = False) -> Verdict:
        """__tdx_map_gpa() and tdx_complete_vmcall_map_gpa()."""
        if left.gpa >= left.end:
            return _done(regs, SUCCESS)
        if not first and self._running.vcpus[vcpu].interrupted:  # a signal waits
            return _done(regs, RETRY, left.gpa | self._side(left.private))
        self._under_way[vcpu] = left
        chunks = _chunks(left)
        if self._running.batches:
            return Leave(exits.map_gpa_ranges(chunks))
        return Leave(exits.HypercallExit(KVM_HC_MAP_GPA_RANGE, chunks[0]))

    def _fatal(self, vcpu: int, given: Regs, regs: Regs) -> Verdict:
        """ReportFatalError: the guest's registers, in the order of KVM's event."""
        words = tuple(getattr(given, name) for name in _NAMES)
        event = exits.SystemEventExit(KVM_SYSTEM_EVENT_TDX_FATAL, words)
        return Leave(event, replace(regs, r10=SUCCESS))


def _chunks(left: _Map) -> list[MapGpaRange]:
    """What is left, as far as one exit may ask for it, in pieces that can fail one by one."""
    attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if left.private else 0
    end = min(left.end, left.gpa + KVMSIM_MAP_GPA_RANGES_MAX * MAP_GPA_CHUNK)
    return [
        MapGpaRange(gpa, min(end - gpa, MAP_GPA_CHUNK) >> PAGE_SHIFT, attributes)
        for gpa in range(left.gpa, end, MAP_GPA_CHUNK)
    ]


def _done(regs: Regs, r10: int, r11: int | None = None) -> Answer:
    """The call's status, and R11 where the call has an answer there. RAX: TDCALL itself is fine."""
    changed = {"rax": 0, "r10": r10 & (1 << 64) - 1}
    if r11 is not None:
        changed["r11"] = r11
    return Answer(replace(regs, **changed))


_Handler = Callable[[TdVmCalls, int, Regs, Regs], Verdict]
_CALLS: Final[Mapping[int, _Handler]] = {
    0x10000: TdVmCalls._info,
    0x10001: TdVmCalls._map_gpa,
    0x10003: TdVmCalls._fatal,
    10: TdVmCalls._cpuid,
    12: TdVmCalls._hlt,
    30: TdVmCalls._io,
    31: TdVmCalls._rdmsr,
    32: TdVmCalls._wrmsr,
    48: TdVmCalls._mmio,
}
