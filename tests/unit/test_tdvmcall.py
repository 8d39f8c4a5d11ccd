# SPDX-License-Identifier: GPL-2.0-or-later
"""TDG.VP.VMCALL, call by call: what reaches the VMM, what is answered, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from guest_calls import FakeRunning

from hwemu.cpu.api import Regs
from kvmsim import exits
from kvmsim.confidential.tdvmcall import (
    ALIGN_ERROR,
    INVALID_OPERAND,
    MAP_GPA_CHUNK,
    RETRY,
    SUBFUNC_UNSUPPORTED,
    TdVmCalls,
    passed,
)
from kvmsim.guard import Answer, Leave
from kvmsim.uapi import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED

ALL = 0xFFFC  # every register that RCX can name
SHARED = 1 << 39
INFO, MAP_GPA, FATAL, CPUID, HLT, IO, RDMSR, WRMSR, MMIO = (
    0x10000, 0x10001, 0x10003, 10, 12, 30, 31, 32, 48
)  # fmt: skip


def regs(leaf: int, **values: int) -> Regs:
    return Regs(**{"rip": 0x1000, "rax": 0, "rcx": ALL, "r10": 0, "r11": leaf, **values})


def calls() -> tuple[TdVmCalls, FakeRunning]:
    running = FakeRunning("tdx")
    return TdVmCalls(running), running  # type: ignore[arg-type]


def refused(leaf: int, status: int, **values: int) -> None:
    """The call is answered with ``status``, and nothing else of the guest changes."""
    called, running = calls()
    given = regs(leaf, **values)
    verdict = called.begin(0, given)
    assert isinstance(verdict, Answer), verdict
    assert verdict.regs.r10 == status
    assert running.vcpus[0].cpu.msrs == FakeRunning("tdx").vcpus[0].cpu.msrs
    with pytest.raises(KeyError):
        called.complete(0, 0, given)  # nothing is under way


def left(verdict: Any) -> exits.Exit:
    assert isinstance(verdict, Leave), verdict
    return verdict.exit


@pytest.mark.parametrize("leaf", [0x10002, 0x10004, 1, 49, 0xFFFF_FFFF_FFFF_FFFF])
def test_an_unknown_call_is_unsupported(leaf: int) -> None:
    refused(leaf, SUBFUNC_UNSUPPORTED)


@pytest.mark.parametrize(
    ("leaf", "values", "status"),
    [
        (IO, {"r12": 3, "r13": 0, "r14": 0x3F8}, INVALID_OPERAND),
        (IO, {"r12": 8, "r13": 0, "r14": 0x3F8}, INVALID_OPERAND),
        (IO, {"r12": 0, "r13": 1, "r14": 0x3F8}, INVALID_OPERAND),
        (IO, {"r12": 1, "r13": 2, "r14": 0x3F8}, INVALID_OPERAND),
        (IO, {"r12": 1, "r13": 0, "r14": 0x10000}, INVALID_OPERAND),
        (MMIO, {"r12": 3, "r13": 0, "r14": 0xFEE0_0000}, INVALID_OPERAND),
        (MMIO, {"r12": 16, "r13": 0, "r14": 0xFEE0_0000}, INVALID_OPERAND),
        (MMIO, {"r12": 8, "r13": 2, "r14": 0xFEE0_0000}, INVALID_OPERAND),
        (MMIO, {"r12": 8, "r13": 0, "r14": 0xFEE0_0FFC}, INVALID_OPERAND),
        (MMIO, {"r12": 8, "r13": 0, "r14": 1 << 40}, INVALID_OPERAND),
        (RDMSR, {"r12": 0x12}, INVALID_OPERAND),
        (WRMSR, {"r12": 0x11, "r13": 7}, INVALID_OPERAND),
        (WRMSR, {"r12": 0x12, "r13": 7}, INVALID_OPERAND),
        (MAP_GPA, {"r12": 0x1000, "r13": 0}, INVALID_OPERAND),
        (MAP_GPA, {"r12": 1 << 40, "r13": 0x1000}, INVALID_OPERAND),
        (MAP_GPA, {"r12": (1 << 39) - 0x1000, "r13": 0x2000}, INVALID_OPERAND),
        (MAP_GPA, {"r12": 0x1000, "r13": (1 << 64) - 0x1000}, INVALID_OPERAND),
        (MAP_GPA, {"r12": 0x1800, "r13": 0x1000}, ALIGN_ERROR),
        (MAP_GPA, {"r12": 0x1000, "r13": 0x800}, ALIGN_ERROR),
    ],
)
def test_what_cannot_be_is_refused(leaf: int, values: dict[str, int], status: int) -> None:
    refused(leaf, status, **values)


def test_only_what_rcx_names_is_passed() -> None:
    given = regs(IO, r12=1, r13=1, r14=0x3F8, r15=0x41)
    assert passed(given).r15 == 0x41
    hidden = regs(IO, r12=1, r13=1, r14=0x3F8, r15=0x41, rcx=ALL & ~(1 << 15))
    assert passed(hidden).r15 == 0
    called, _ = calls()
    assert left(called.begin(0, hidden)) == exits.IoExit(0x3F8, 1, True, b"\0")
    nothing = passed(regs(IO, rcx=0, r12=1))
    assert (nothing.r10, nothing.r11, nothing.r12, nothing.rcx) == (0, 0, 0, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_io(size: int) -> None:
    called, _ = calls()
    given = regs(IO, r12=size, r13=1, r14=0x3F8, r15=0x1122_3344_5566_7788)
    verdict = called.begin(0, given)
    data = bytes((0x88, 0x77, 0x66, 0x55))[:size]
    assert left(verdict) == exits.IoExit(0x3F8, size, True, data)
    assert isinstance(verdict, Leave)
    assert verdict.regs is not None  # nothing is to be answered
    given = regs(IO, r12=size, r13=0, r14=0x60)
    assert left(called.begin(1, given)) == exits.IoExit(0x60, size, False)
    answer = called.complete(1, b"\x5a" * size, given)
    assert isinstance(answer, Answer)
    assert (answer.regs.r10, answer.regs.r11) == (0, int.from_bytes(b"\x5a" * size, "little"))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("bit", [0, SHARED])
def test_mmio(size: int, bit: int) -> None:
    called, _ = calls()
    given = regs(MMIO, r12=size, r13=0, r14=0xFEE0_0000 | bit)
    assert left(called.begin(0, given)) == exits.MmioExit(0xFEE0_0000, size, False)
    answer = called.complete(0, b"\x81" * size, given)
    assert isinstance(answer, Answer)
    assert (answer.regs.r10, answer.regs.r11) == (0, int.from_bytes(b"\x81" * size, "little"))
    given = regs(MMIO, r12=size, r13=1, r14=0xFEE0_0000 | bit, r15=(1 << 64) - 2)
    data = ((1 << 64) - 2).to_bytes(8, "little")[:size]
    assert left(called.begin(0, given)) == exits.MmioExit(0xFEE0_0000, size, True, data)


def test_msrs_cpuid_hlt_and_info() -> None:
    called, running = calls()
    answer = called.begin(0, regs(RDMSR, r12=0x10))
    assert isinstance(answer, Answer)
    assert (answer.regs.r10, answer.regs.r11) == (0, 0x1122_3344_5566_7788)
    answer = called.begin(1, regs(WRMSR, r12=0x10, r13=5))
    assert isinstance(answer, Answer)
    assert answer.regs.r10 == 0
    assert (running.vcpus[0].cpu.msrs[0x10], running.vcpus[1].cpu.msrs[0x10]) != (5, 5)
    assert running.vcpus[1].cpu.msrs[0x10] == 5
    answer = called.begin(0, regs(CPUID, r12=0, r13=0))
    assert isinstance(answer, Answer)
    assert answer.regs.r10 == 0
    assert answer.regs.r12 > 0  # the largest leaf
    halted = called.begin(0, regs(HLT))
    assert left(halted) == exits.HltExit()
    assert isinstance(halted, Leave)
    assert halted.regs is not None
    assert halted.regs.r10 == 0
    answer = called.begin(0, regs(INFO, r12=0, r13=9, r14=9))
    assert isinstance(answer, Answer)
    assert [getattr(answer.regs, name) for name in ("r10", "r11", "r12", "r13", "r14")] == [0] * 5


def test_a_hypercall_of_kvm_is_passed_on() -> None:
    called, _ = calls()
    given = regs(0x1111, r10=12, r12=2, r13=3, r14=4)
    assert left(called.begin(0, given)) == exits.HypercallExit(12, (0x1111, 2, 3, 4))
    answer = called.complete(0, -22, given)
    assert isinstance(answer, Answer)
    assert answer.regs.r10 == (1 << 64) - 22


def test_a_fatal_error_is_told_with_the_registers() -> None:
    called, _ = calls()
    exit_ = left(called.begin(0, regs(FATAL, r12=7, r14=0x4142)))
    assert isinstance(exit_, exits.SystemEventExit)
    assert 0x4142 in exit_.data


@pytest.mark.parametrize("private", [True, False])
def test_map_gpa_goes_chunk_by_chunk(private: bool) -> None:
    called, _ = calls()
    bit = 0 if private else SHARED
    given = regs(MAP_GPA, r12=0x1000 | bit, r13=2 * MAP_GPA_CHUNK + 0x3000)
    verdict = called.begin(0, given)
    attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if private else 0
    asked = []
    while isinstance(verdict, Leave):
        assert isinstance(verdict.exit, exits.HypercallExit)
        assert verdict.exit.nr == KVM_HC_MAP_GPA_RANGE
        asked.append(verdict.exit.args[:3])
        verdict = called.complete(0, 0, given)
    assert asked == [
        (0x1000, 512, attributes),
        (0x1000 + MAP_GPA_CHUNK, 512, attributes),
        (0x1000 + 2 * MAP_GPA_CHUNK, 3, attributes),
    ]
    assert isinstance(verdict, Answer)
    assert verdict.regs.r10 == 0


def test_map_gpa_says_where_it_failed_and_where_a_signal_stopped_it() -> None:
    called, running = calls()
    given = regs(MAP_GPA, r12=SHARED, r13=3 * MAP_GPA_CHUNK)
    assert isinstance(called.begin(0, given), Leave)
    assert isinstance(called.complete(0, 0, given), Leave)
    answer = called.complete(0, -22, given)
    assert isinstance(answer, Answer)
    assert (answer.regs.r10, answer.regs.r11) == (INVALID_OPERAND, MAP_GPA_CHUNK | SHARED)
    assert isinstance(called.begin(0, given), Leave)
    running.vcpus[0].interrupted = True
    answer = called.complete(0, 0, given)
    assert isinstance(answer, Answer)
    assert (answer.regs.r10, answer.regs.r11) == (RETRY, MAP_GPA_CHUNK | SHARED)


def test_calls_of_two_vcpus_do_not_meet() -> None:
    called, _ = calls()
    read, mapped = regs(IO, r12=1, r13=0, r14=0x60), regs(MAP_GPA, r12=0, r13=0x1000)
    assert isinstance(called.begin(0, read), Leave)
    assert isinstance(called.begin(1, mapped), Leave)
    first = called.complete(0, b"\x07", read)
    second = called.complete(1, 0, mapped)
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert (first.regs.r11, second.regs.r10) == (7, 0)
