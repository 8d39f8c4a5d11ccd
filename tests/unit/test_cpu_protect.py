# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions that are not the guest's own to execute: they exit before anything happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hwemu.cpu.api import (
    Access,
    CpuExit,
    CpuStateError,
    HltExit,
    HypercallExit,
    InterceptExit,
    IoExit,
    MsrExit,
    Stage2Fault,
)
from hwemu.cpu.guestmemory import GuestMemory
from hwemu.testing import PAGE, TEXT, Machine

HLT = "f4"
ALL = (
    *("in", "out", "hlt", "cpuid", "rdmsr", "wrmsr"),
    *("tdcall", "vmgexit", "pvalidate", "rmpadjust", "vmmcall", "vmcall"),
)
GHCB_MSR = 0xC001_0130


@pytest.fixture(params=["exit-request", "quanta"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(precise=request.param) as machine:
        yield machine


def load(machine: Machine, *instructions: str, **registers: int) -> None:
    machine.boot(bytes.fromhex(" ".join(instructions)), **registers)


@pytest.mark.parametrize(
    ("bytes_", "expected"),
    [
        ("66 0f 01 cc", InterceptExit("tdcall", 4)),
        ("f3 0f 01 d9", InterceptExit("vmgexit", 4)),
        ("f2 0f 01 ff", InterceptExit("pvalidate", 4)),
        ("f3 0f 01 fe", InterceptExit("rmpadjust", 4)),
        ("0f 01 d9", InterceptExit("vmmcall", 3)),
        ("0f 01 c1", InterceptExit("vmcall", 3)),
        ("0f a2", InterceptExit("cpuid", 2)),
        ("0f 32", InterceptExit("rdmsr", 2)),
        ("0f 30", InterceptExit("wrmsr", 2)),
        ("f4", InterceptExit("hlt", 1)),
        ("e4 71", InterceptExit("in", 2, 0x71, 1, False)),
        ("66 ed", InterceptExit("in", 2, 0x3F8, 2, False)),
        ("ee", InterceptExit("out", 1, 0x3F8, 1, True)),
        ("e7 80", InterceptExit("out", 2, 0x80, 4, True)),
    ],
)
def test_the_instruction_leaves_before_it_does_anything(
    machine: Machine, bytes_: str, expected: CpuExit
) -> None:
    """The next run goes on behind it, with the registers that the user set."""
    cpu = machine.cpu
    cpu.protect(ALL)
    load(machine, bytes_, "48 ff c3", HLT, rax=7, rcx=GHCB_MSR, rdx=0x3F8, rbx=1)
    assert cpu.run() == expected
    before = cpu.get_regs()
    assert (before.rip, before.rax, before.rdx, before.rbx) == (TEXT, 7, 0x3F8, 1)
    cpu.set_regs(replace(before, r10=5, rflags=before.rflags | 1))
    end = cpu.run()
    assert end == InterceptExit("hlt", 1)
    after = cpu.get_regs()
    assert (after.rip, after.rbx, after.r10, after.rflags & 1) == (
        TEXT + len(bytes.fromhex(bytes_)) + 3, 2, 5, 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bytes_", "expected"),
    [
        ("66 0f 01 cc", InterceptExit("tdcall", 4)),
        ("0f a2", InterceptExit("cpuid", 2)),
        ("0f 32", InterceptExit("rdmsr", 2)),
        ("0f 01 d9", InterceptExit("vmmcall", 3)),
        ("f4", InterceptExit("hlt", 1)),
        ("ee", InterceptExit("out", 1, 0x3F8, 1, True)),
    ],
)
def test_its_page_is_zapped_before_it_is_looked_at(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, bytes_: str, expected: CpuExit
) -> None:
    """Another thread's zap comes between fetch and intercept: a fault, and then the exit."""
    cpu = machine.cpu
    cpu.protect(ALL)
    load(machine, bytes_, HLT, rcx=GHCB_MSR, rdx=0x3F8)
    look = GuestMemory.code

    def zapped(self: GuestMemory, address: int, user: bool) -> bytes:
        machine.stage2.zap(TEXT, 1)
        machine.holes.add(TEXT // PAGE)
        monkeypatch.undo()
        return look(self, address, user)

    monkeypatch.setattr(GuestMemory, "code", zapped)
    assert cpu.run() == Stage2Fault(TEXT, Access.EXEC)
    assert cpu.get_regs().rip == TEXT
    machine.holes.clear()
    assert cpu.run() == expected
    assert cpu.run() == InterceptExit("hlt", 1)


def test_an_exception_takes_its_place(machine: Machine) -> None:
    """As #VE does: RIP on the stack is that of the instruction."""
    cpu = machine.cpu
    cpu.protect(ALL)
    load(machine, "ee", HLT)
    machine.gate(20, TEXT + 0x100)
    machine.write(TEXT + 0x100, bytes.fromhex("48 8b 1c 24 f4"))  # mov rbx, [rsp]; hlt
    assert isinstance(cpu.run(), InterceptExit)
    cpu.inject(20)
    assert cpu.run() == InterceptExit("hlt", 1)
    assert cpu.get_regs().rbx == TEXT


def test_what_is_not_named_stays_the_guests(machine: Machine) -> None:
    cpu = machine.cpu
    cpu.protect({"tdcall"})
    load(machine, "ee", "0f a2", "0f 32", HLT, rcx=GHCB_MSR, rdx=0x3F8)
    assert isinstance(cpu.run(), IoExit)
    assert isinstance(cpu.run(), MsrExit)
    cpu.complete(0)
    assert isinstance(cpu.run(), HltExit)


def test_kept_registers_are_not_told(machine: Machine) -> None:
    """EFER, STAR, … are context-switched with the guest."""
    cpu = machine.cpu
    cpu.protect(ALL)
    load(machine, "0f 32", HLT, rcx=0xC000_0080)
    assert cpu.run() == InterceptExit("hlt", 1)
    assert cpu.get_regs().rax & 0x500


def test_without_protection_calls_are_hypercalls(machine: Machine) -> None:
    load(machine, "66 0f 01 cc", HLT, rax=9)
    found = machine.cpu.run()
    assert isinstance(found, HypercallExit)
    assert (found.instruction, found.nr) == ("tdcall", 9)


def test_it_takes_no_answer(machine: Machine) -> None:
    machine.cpu.protect(ALL)
    load(machine, "0f a2", HLT)
    machine.cpu.run()
    with pytest.raises(CpuStateError, match="takes registers"):
        machine.cpu.complete(1)
