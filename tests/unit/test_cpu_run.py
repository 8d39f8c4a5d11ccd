# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers, exits of single instructions, ring 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hwemu.cpu import cpuid
from hwemu.cpu.api import (
    Cpu,
    CpuError,
    CpuStateError,
    HltExit,
    HypercallExit,
    KickExit,
    MsrExit,
    Regs,
    Segment,
    ShutdownExit,
    Stage2Fault,
)
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.testing import HEAP, POOL_HPA, RING0_STACK, TEXT, Machine

HLT = b"\xf4"


@pytest.fixture(params=["exit-request", "quanta"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(precise=request.param) as machine:
        yield machine


def code(*instructions: str) -> bytes:
    return bytes.fromhex(" ".join(instructions))


def test_the_engine_is_a_cpu(machine: Machine) -> None:
    cpu: Cpu = machine.boot(HLT)  # the type checker compares every signature
    assert cpu.run() == HltExit()


def test_registers_survive_the_way_in_and_out(machine: Machine) -> None:
    values = {
        name: 0x1111_1111_1111_1111 * index % (1 << 64)
        for index, name in enumerate(
            (
                "rax",
                "rbx",
                "rcx",
                "rdx",
                "rsi",
                "rdi",
                "rsp",
                "rbp",
                *(f"r{n}" for n in range(8, 16)),
            )
        )
    }
    wanted = Regs(**values, rip=TEXT, rflags=0xCD7)
    cpu = machine.boot(HLT)
    cpu.set_regs(wanted)
    assert cpu.get_regs() == wanted
    assert cpu.run() == HltExit()
    assert cpu.get_regs() == replace(wanted, rip=TEXT + 1)
    cpu.set_regs(wanted)
    assert cpu.get_regs() == wanted
    assert cpu.run() == HltExit()


def test_segments_and_control_registers_survive(machine: Machine) -> None:
    cpu = machine.boot(HLT)
    wanted = replace(
        machine.sregs(), fs=Segment(0, 0x1234_5678_9000, 0xFFFF_FFFF, 0xC93), cr2=0xABC000
    )
    cpu.set_sregs(wanted)
    assert cpu.run() == HltExit()
    assert cpu.get_sregs() == wanted
    assert cpu.get_regs().rip == TEXT + 1


def test_setting_segments_keeps_registers_and_sse_state(machine: Machine) -> None:
    # movq xmm3, rax; hlt; movq rbx, xmm3; hlt
    cpu = machine.boot(code("66 48 0f 6e d8", "f4", "66 48 0f 7e db", "f4"), rax=0x77)
    assert cpu.run() == HltExit()
    cpu.set_sregs(cpu.get_sregs())
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == 0x77


def test_cpuid_answers_from_the_table(machine: Machine) -> None:
    # cpuid; hlt
    cpu = machine.boot(code("0f a2", "f4"), rax=0x4000_0000)
    assert cpu.run() == HltExit()
    regs = cpu.get_regs()
    text = b"".join(value.to_bytes(4, "little") for value in (regs.rbx, regs.rcx, regs.rdx))
    assert text == b"privfsprivfs"
    machine.boot(code("0f a2", "f4"), rax=0x8000_0001)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rdx >> 29 & 1, "long mode"
    machine.boot(code("0f a2", "f4"), rax=1)
    assert cpu.run() == HltExit()
    assert not cpu.get_regs().rcx >> 28 & 1, "no AVX"
    assert cpu.get_regs().rcx >> 31 & 1, "a hypervisor"


def test_cpuid_table_can_be_given() -> None:
    with Machine() as machine:
        cpu = SvmCpu(
            machine.arena,
            machine.pool,
            POOL_HPA,
            machine.stage2.root_hpa,
            5,
            machine.on_fault,
            cpuid_table={**cpuid.DEFAULT, 1: (1, 2, 3, 4)},
        )
        try:
            machine.write(TEXT, code("0f a2", "f4"))
            cpu.set_sregs(machine.sregs())
            cpu.set_regs(Regs(rip=TEXT, rax=1))
            assert cpu.run() == HltExit()
            regs = cpu.get_regs()
            assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (1, 2 | 5 << 24, 3, 4)
        finally:
            cpu.close()


@pytest.mark.parametrize(
    ("bytes_", "name"),
    [
        ("0f 01 c1", "vmcall"),
        ("0f 01 d9", "vmmcall"),
        ("f3 0f 01 d9", "vmgexit"),
        ("f2 0f 01 d9", "vmgexit"),
        ("66 0f 01 cc", "tdcall"),
        ("f2 0f 01 ff", "pvalidate"),
        ("f3 0f 01 fe", "rmpadjust"),
    ],
)
def test_calls_to_the_host_by_name(bytes_: str, name: str) -> None:
    with Machine() as machine:
        cpu = machine.boot(code(bytes_, "f4"), rax=9, rbx=1, rcx=2, rdx=3, rsi=4)
        assert cpu.run() == HypercallExit(9, (1, 2, 3, 4), name)
        assert cpu.get_regs().rip == TEXT
        cpu.complete(0x1234)
        assert cpu.run() == HltExit()
        assert cpu.get_regs().rax == 0x1234
        assert cpu.get_regs().rip == TEXT + len(bytes.fromhex(bytes_)) + 1


def test_ring_3_may_not_use_the_security_module() -> None:
    with Machine() as machine:
        machine.gate(13, 0x11000)
        machine.write(0x11000, HLT)
        cpu = machine.boot(code("f2 0f 01 ff"), user=True)
        assert cpu.run() == HltExit()
        assert cpu.get_regs().rip == 0x11001


def test_hypercall_result_is_optional_and_regs_may_be_set(machine: Machine) -> None:
    cpu = machine.boot(code("0f 01 d9", "f4"), rax=7)
    assert isinstance(cpu.run(), HypercallExit)
    cpu.set_regs(replace(cpu.get_regs(), rdx=0x55))
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rax, cpu.get_regs().rdx) == (7, 0x55)
    assert cpu.get_regs().rip == TEXT + 4


def test_hypercall_can_fault_instead(machine: Machine) -> None:
    machine.gate(6, 0x11000)
    machine.write(0x11000, code("48 8b 1c 24", "f4"))  # mov rbx,[rsp]; hlt
    cpu = machine.boot(code("0f 01 d9", "f4"))
    assert isinstance(cpu.run(), HypercallExit)
    cpu.inject(6)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == TEXT, "the frame points at the instruction itself"


def test_foreign_msr_leaves_the_engine(machine: Machine) -> None:
    # mov ecx,0x1b; rdmsr; wrmsr; hlt
    cpu = machine.boot(code("b9 1b 00 00 00", "0f 32", "0f 30", "f4"))
    assert cpu.run() == MsrExit(0x1B, False, 0)
    with pytest.raises(CpuStateError, match="complete"):
        cpu.run()
    with pytest.raises(CpuStateError, match="value"):
        cpu.complete()
    cpu.complete(0xAABB_CCDD_1122_3344)
    assert cpu.run() == MsrExit(0x1B, True, 0xAABB_CCDD_1122_3344)
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rdx, cpu.get_regs().rax) == (0xAABB_CCDD, 0x1122_3344)


def test_refused_msr_becomes_a_general_protection_fault(machine: Machine) -> None:
    machine.gate(13, 0x11000)
    machine.write(0x11000, code("5a", "48 8b 1c 24", "f4"))  # pop rdx; mov rbx,[rsp]; hlt
    cpu = machine.boot(code("0f 32", "f4"), rcx=0x1234)
    assert cpu.run() == MsrExit(0x1234, False, 0)
    cpu.inject(13, 0)
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rdx, cpu.get_regs().rbx) == (0, TEXT)


def test_engine_keeps_its_own_msrs(machine: Machine) -> None:
    # mov eax,0x40000; wrmsr FS_BASE; mov rbx,fs:[8]; rdmsr; hlt
    machine.write(HEAP + 8, (0xFEED).to_bytes(8, "little"))
    cpu = machine.boot(
        code(
            "b8 00 00 04 00", "31 d2", "0f 30", "64 48 8b 1c 25 08 00 00 00", "31 c0", "0f 32", "f4"
        ),
        rcx=0xC0000100,
    )
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rbx, cpu.get_regs().rax) == (0xFEED, HEAP)


@pytest.mark.parametrize(
    ("index", "value"),
    [(0xC0000082, 1 << 63), (0xC0000100, 1 << 50), (0xC0000080, 1 << 12), (0xC0000080, 0)],
)
def test_values_a_processor_refuses(machine: Machine, index: int, value: int) -> None:
    machine.gate(13, 0x11000)
    machine.write(0x11000, HLT)
    cpu = machine.boot(code("0f 30", "f4"), rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rip == 0x11001


def test_guest_does_not_see_svm(machine: Machine) -> None:
    cpu = machine.boot(code("0f 32", "f4"), rcx=0xC0000080)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0xD01


def test_syscall_and_sysret(machine: Machine) -> None:
    kernel = code(
        "b9 82 00 00 c0",
        "b8 00 20 01 00",
        "31 d2",
        "0f 30",  # LSTAR = 0x12000
        "b9 81 00 00 c0",
        "ba 08 00 18 00",
        "31 c0",
        "0f 30",  # STAR
        "b9 84 00 00 c0",
        "b8 00 02 00 00",
        "31 d2",
        "0f 30",  # SFMASK = IF
        "b9 00 30 01 00",  # mov ecx,0x13000
        "49 c7 c3 02 02 00 00",  # mov r11,0x202
        "48 0f 07",  # sysretq
    )
    handler = code(
        "49 89 c9",
        "4d 89 da",  # mov r9,rcx; mov r10,r11
        "66 41 8c cc",
        "9c",
        "41 5d",  # mov r12w,cs; pushf; pop r13
        "48 8d 04 3f",
        "49 ff c7",  # lea rax,[rdi+rdi]; inc r15
        "48 0f 07",
    )
    user = code("bf 05 00 00 00", "0f 05", "48 89 c3", "48 0f 05", "8c c8", "f4")
    machine.gate(13, 0x11000)
    machine.write(0x11000, code("5a", "48 8b 2c 24", "f4"))  # pop rdx; mov rbp,[rsp]; hlt
    machine.write(0x12000, handler)
    machine.write(0x13000, user)
    cpu = machine.boot(kernel)
    assert cpu.run() == HltExit()
    regs = cpu.get_regs()
    assert regs.rbx == 10
    assert regs.r15 == 2, "both calls, the prefixed one too"
    assert regs.r9 == 0x13000 + 5 + 2 + 3 + 3, "RCX is behind the second syscall"
    assert regs.r10 & 0x200, "R11 has the caller's IF"
    assert not regs.r13 & 0x200, "SFMASK cleared IF in the kernel"
    assert regs.r12 == 0x08
    assert regs.rax & 0xFFFF == 0x2B, "back in ring 3"
    assert regs.rbp == 0x13000 + 5 + 2 + 3 + 3 + 2, "HLT in ring 3 is #GP at HLT"
    assert regs.rsp == RING0_STACK - 40


def test_syscall_without_sce_is_undefined(machine: Machine) -> None:
    machine.gate(6, 0x11000)
    machine.write(0x11000, code("48 8b 1c 24", "f4"))
    cpu = machine.boot(code("0f 05", "f4"))
    sregs = machine.sregs()
    cpu.set_sregs(replace(sregs, efer=sregs.efer & ~1))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == TEXT


@pytest.mark.parametrize("bytes_", ["0f 01 d8", "0f 01 da", "0f 01 dc", "0f 01 df", "0f 0b"])
def test_a_guest_has_no_svm_of_its_own(machine: Machine, bytes_: str) -> None:
    machine.gate(6, 0x11000)
    machine.write(0x11000, code("48 8b 1c 24", "f4"))
    cpu = machine.boot(code(bytes_))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == TEXT


def test_first_run_without_registers_faults_at_the_reset_vector() -> None:
    with Machine() as machine:
        machine.cpu.set_regs(Regs(rip=0xFFF0))
        fault = machine.cpu.run()
        assert isinstance(fault, Stage2Fault)
        assert fault.gpa == 0xFFFF_FFF0


def test_a_state_the_processor_cannot_use_is_an_error_or_a_fault() -> None:
    with Machine() as machine:
        cpu = machine.boot(HLT)
        cpu.set_sregs(replace(machine.sregs(), cr3=machine.size))
        fault = cpu.run()
        assert fault == Stage2Fault(machine.size, fault.access)  # type: ignore[union-attr]


def test_calls_that_do_not_fit_the_state_are_named(machine: Machine) -> None:
    cpu = machine.boot(HLT)
    with pytest.raises(CpuStateError, match="no exit waits"):
        cpu.complete(1)
    with pytest.raises(CpuStateError, match="no fault there"):
        cpu.run_mmio(0x1000)
    with pytest.raises(ValueError, match="256"):
        cpu.inject(256)
    with pytest.raises(ValueError, match="no error code"):
        cpu.inject(6, 1)
    cpu.inject(32)
    with pytest.raises(CpuStateError, match="another event"):
        cpu.inject(33)
    cpu.close()
    cpu.close()
    cpu.kick()
    with pytest.raises(CpuStateError, match="closed"):
        cpu.run()


def test_a_kick_before_a_run_is_answered_at_once_and_once(machine: Machine) -> None:
    cpu = machine.boot(HLT)
    cpu.kick()
    cpu.kick()
    assert cpu.run() == KickExit()
    assert cpu.get_regs().rip == TEXT
    assert cpu.run() == HltExit()


def test_an_exception_in_the_fault_hook_comes_out_of_run(machine: Machine) -> None:
    class Broken(Exception):
        pass

    def hook(gpa: int, access: object) -> bool:
        raise Broken(hex(gpa))

    cpu = SvmCpu(machine.arena, machine.pool, POOL_HPA, machine.stage2.root_hpa, 0, hook)
    try:
        machine.write(TEXT, HLT)
        cpu.set_sregs(machine.sregs())
        cpu.set_regs(Regs(rip=TEXT))
        for _ in range(2):
            with pytest.raises(Broken, match="0x1000"):
                cpu.run()
            assert cpu.get_regs().rip == TEXT
    finally:
        cpu.close()


def test_leaf_outside_the_arena_is_an_error_and_no_crash() -> None:
    with Machine() as machine:
        machine.stage2.map(HEAP, 0x5000_0000_00, 1)  # nothing is mapped there
        cpu = machine.boot(code("48 8b 04 25 00 00 04 00", "f4"))
        error = cpu.run()
        assert isinstance(error, CpuError)
        assert "unmapped" in error.reason.lower() or "UNMAPPED" in error.reason


def test_shutdown_lasts_until_registers_are_set(machine: Machine) -> None:
    cpu = machine.boot(code("0f 0b"))
    cpu.set_sregs(replace(machine.sregs(), idt=replace(machine.sregs().idt, limit=0)))
    assert cpu.run() == ShutdownExit("triple fault")
    assert cpu.run() == ShutdownExit("triple fault")
    assert not cpu.interruptible
    machine.boot(HLT)
    assert cpu.run() == HltExit()
