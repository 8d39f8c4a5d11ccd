# SPDX-License-Identifier: GPL-2.0-or-later
"""State of a vCPU beyond its general registers: FPU, model-specific registers, CPUID."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hwemu.cpu import msr
from hwemu.cpu.api import HltExit, IoExit, MmioExit, Regs, Stage2Fault
from hwemu.cpu.fpu import Fpu
from hwemu.testing import HEAP, TEXT, Machine

HLT = "f4"
DEVICE = 0x200_0000


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def test_fpu_state_is_what_the_guest_has(machine: Machine) -> None:
    # fninit; fld1; fldpi; movq xmm3, rax; hlt
    cpu = machine.boot(bytes.fromhex("dbe3 d9e8 d9eb 66480f6ed8" + HLT), rax=0x1122334455667788)
    assert cpu.run() == HltExit()
    fpu = cpu.get_fpu()
    assert fpu.fsw >> 11 & 7 == 6, "two pushes move the top from 8 to 6"
    assert fpu.ftw == 0b1100_0000
    one = (1 << 63).to_bytes(8, "little") + (0x3FFF).to_bytes(2, "little") + bytes(6)
    assert fpu.st[1] == one
    assert fpu.xmm[3] == (0x1122334455667788).to_bytes(16, "little")


def test_fpu_state_goes_into_the_guest_and_survives_new_segments(machine: Machine) -> None:
    # movq [HEAP], xmm5; fstp qword [HEAP + 8]; stmxcsr [HEAP + 16]; hlt
    code = "660fd62c25" + HEAP.to_bytes(4, "little").hex()
    code += "dd1c25" + (HEAP + 8).to_bytes(4, "little").hex()
    code += "0fae1c25" + (HEAP + 16).to_bytes(4, "little").hex()
    cpu = machine.boot(bytes.fromhex(code + HLT))
    one = (1 << 63).to_bytes(8, "little") + (0x3FFF).to_bytes(2, "little") + bytes(6)
    xmm = [bytes(16)] * 16
    xmm[5] = bytes(range(16))
    state = Fpu(fsw=7 << 11, ftw=0x80, mxcsr=0x1FA0, st=(one, *[bytes(16)] * 7), xmm=tuple(xmm))
    cpu.set_fpu(state)
    cpu.set_sregs(machine.sregs())
    assert cpu.get_fpu() == state
    assert cpu.run() == HltExit()
    assert machine.read(HEAP, 8) == bytes(range(8))
    assert machine.read(HEAP + 8, 8) == bytes.fromhex("000000000000f03f")  # 1.0
    assert machine.word(HEAP + 16) & 0xFFFF_FFFF == 0x1FA0


@pytest.mark.parametrize("entered", [False, True])
def test_msrs_are_read_and_written_before_and_after_entry(machine: Machine, entered: bool) -> None:
    # mov rax, gs:[0]; hlt
    code = bytes.fromhex("65488b042500000000" + HLT)
    cpu = machine.boot(code)
    machine.write(HEAP, bytes(range(8)))
    if entered:
        cpu.run()
    assert cpu.set_msr(msr.GS_BASE, HEAP)
    assert cpu.get_msr(msr.GS_BASE) == HEAP
    assert cpu.get_sregs().gs.base == HEAP
    assert cpu.set_msr(msr.STAR, 0x1234 << 32)
    assert cpu.get_msr(msr.STAR) == 0x1234 << 32
    assert not cpu.set_msr(msr.LSTAR, 1 << 50), "not canonical"
    assert not cpu.set_msr(msr.GS_BASE, 1 << 50)
    assert not cpu.set_msr(msr.EFER, 1 << 20), "reserved"
    assert not cpu.set_msr(msr.EFER, 0), "LME cannot go while paging is on"
    assert not cpu.set_msr(0x1B, 0)
    assert cpu.get_msr(0x1B) is None
    cpu.set_regs(replace(cpu.get_regs(), rip=TEXT))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == int.from_bytes(bytes(range(8)), "little")


def test_efer_of_a_vcpu_without_paging(machine: Machine) -> None:
    cpu = machine.cpu
    assert cpu.set_msr(msr.EFER, 0x900)
    assert cpu.get_sregs().efer == 0x900


def test_cpuid_is_asked_with_its_subleaf(machine: Machine) -> None:
    cpu = machine.boot(bytes.fromhex("0fa2" + HLT), rax=0xFFFF_FFFF_0000_0007, rcx=2)
    asked = []

    def lookup(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        asked.append((leaf, subleaf))
        return 1, 2, 3, 4

    cpu.set_cpuid(lookup)
    assert cpu.run() == HltExit()
    assert asked == [(7, 2)]
    regs = cpu.get_regs()
    assert isinstance(regs, Regs)
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (1, 2, 3, 4)


@pytest.mark.parametrize("instruction", ["ee", "ec", "e6 80", "0f a2", "8a 06", "88 06"])
@pytest.mark.parametrize(
    ("setting", "flags"), [("31 c0 f9", 0x47), ("48 39 db fd", 0x446), ("f9 48 85 e4", 0x06)]
)
def test_flags_outlive_an_instruction_that_leaves(
    instruction: str, setting: str, flags: int
) -> None:
    """Carry, zero, direction … as they were, behind a port, a device page and CPUID."""
    with Machine() as machine:
        machine.holes.add(DEVICE >> 12)
        code = bytes.fromhex(f"{setting} {instruction} 9c 5b fc f4")  # pushfq; pop rbx; cld; hlt
        cpu = machine.boot(code, rsi=DEVICE, rdx=0x3F8)
        while not isinstance(exit_ := cpu.run(), HltExit):
            if isinstance(exit_, Stage2Fault):
                exit_ = cpu.run_mmio(exit_.gpa)
            if isinstance(exit_, IoExit | MmioExit) and not exit_.is_write:
                cpu.complete(bytes(exit_.size))
        assert cpu.get_regs().rbx == flags


@pytest.mark.parametrize("flags", [0x2, 0x3, 0x8D7, 0x402])
def test_flags_that_were_set_are_the_guests(flags: int) -> None:
    """As KVM_SET_REGS leaves them for a vCPU that has run already."""
    with Machine() as machine:
        cpu = machine.boot(bytes.fromhex("f4 9c 5b fc f4"))
        cpu.run()
        cpu.set_regs(replace(cpu.get_regs(), rflags=flags))
        assert cpu.get_regs().rflags == flags
        cpu.run()
        assert cpu.get_regs().rbx == flags
