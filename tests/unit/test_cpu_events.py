# SPDX-License-Identifier: GPL-2.0-or-later
"""Exceptions and interrupts through the guest's IDT."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hwemu.cpu.api import (
    Access,
    DescriptorTable,
    HltExit,
    KickExit,
    ShutdownExit,
    Stage2Fault,
)
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.testing import (
    HEAP,
    IDT,
    IST1_STACK,
    PD,
    RING0_STACK,
    STACK,
    TEXT,
    TSS,
    USER_STACK,
    Machine,
)

HANDLER = 0x11000
IF = 0x200


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def code(*instructions: str) -> bytes:
    return bytes.fromhex(" ".join(instructions))


def frame(machine: Machine, top: int, words: int) -> tuple[int, ...]:
    return struct.unpack(f"<{words}Q", machine.read(top - 8 * words, 8 * words))


def test_interrupt_frame_and_return(machine: Machine) -> None:
    machine.gate(0x40, HANDLER)
    # mov r8,[rsp]; pushf; pop r9; iretq
    machine.write(HANDLER, code("4c 8b 04 24", "9c", "41 59", "48 cf"))
    cpu = machine.boot(code("90", "f4"), rsp=STACK - 8, rflags=IF | 0xD5 | 2)
    cpu.inject(0x40)
    assert cpu.run() == HltExit()
    regs = cpu.get_regs()
    assert regs.r8 == TEXT
    assert not regs.r9 & IF, "an interrupt gate clears IF"
    assert (regs.rip, regs.rsp, regs.rflags) == (TEXT + 2, STACK - 8, IF | 0xD5 | 2)
    top = (STACK - 8) & ~15
    assert frame(machine, top, 5) == (TEXT, 0x08, IF | 0xD7, STACK - 8, 0x10)


def test_trap_gate_keeps_if(machine: Machine) -> None:
    machine.gate(0x40, HANDLER, trap=True)
    machine.write(HANDLER, code("9c", "41 59", "48 cf"))
    cpu = machine.boot(code("f4"), rflags=IF | 2)
    cpu.inject(0x40)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().r9 & IF


def test_from_ring_3_the_stack_comes_from_the_tss(machine: Machine) -> None:
    machine.gate(0x40, HANDLER)
    machine.write(HANDLER, code("8c c8", "f4"))  # mov eax,cs; hlt
    cpu = machine.boot(code("eb fe"), user=True, rflags=IF | 2)
    cpu.inject(0x40)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x08
    assert cpu.get_regs().rsp == RING0_STACK - 40
    assert frame(machine, RING0_STACK, 5) == (TEXT, 0x2B, IF | 2, USER_STACK, 0x23)
    assert cpu.get_sregs().ss.selector == 0


def test_return_to_ring_3_and_back_in(machine: Machine) -> None:
    machine.gate(0x80, HANDLER, dpl=3)
    machine.write(HANDLER, code("49 ff c0", "48 cf"))  # inc r8; iretq
    machine.gate(13, HANDLER + 0x100)
    machine.write(HANDLER + 0x100, code("f4"))
    cpu = machine.boot(code("cd 80", "cd 80", "8c c8", "f4"), user=True)
    assert cpu.run() == HltExit(), "HLT in ring 3 is #GP, whose handler halts"
    assert cpu.get_regs().r8 == 2
    assert cpu.get_regs().rax & 3 == 3


def test_ist_stack_is_used_even_without_a_ring_change(machine: Machine) -> None:
    machine.gate(0x40, HANDLER, ist=1)
    machine.write(HANDLER, code("48 cf"))
    cpu = machine.boot(code("f4"))
    cpu.inject(0x40)
    assert cpu.run() == HltExit()
    assert frame(machine, IST1_STACK, 5)[0] == TEXT
    assert cpu.get_regs().rsp == STACK


def test_software_interrupt_below_the_gates_privilege(machine: Machine) -> None:
    machine.gate(0x80, HANDLER)
    machine.gate(3, HANDLER)
    machine.gate(13, HANDLER + 0x100)
    machine.write(HANDLER + 0x100, code("5a", "48 8b 1c 24", "f4"))  # pop rdx; mov rbx,[rsp]; hlt
    for bytes_, vector in (("cd 80", 0x80), ("cc", 3), ("cd 03", 3)):
        cpu = machine.boot(code("90", bytes_), user=True)
        assert cpu.run() == HltExit()
        assert cpu.get_regs().rdx == vector * 8 + 2
        assert cpu.get_regs().rbx == TEXT + 1, f"{bytes_}: at the instruction, not behind it"


def test_breakpoint_frame_points_behind_the_instruction(machine: Machine) -> None:
    machine.gate(3, HANDLER)
    machine.write(HANDLER, code("48 8b 1c 24", "48 cf"))
    cpu = machine.boot(code("cc", "f4"))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == TEXT + 1


def test_page_fault_has_error_code_and_exact_address(machine: Machine) -> None:
    machine.gate(14, HANDLER)
    # mov rbx,cr2; pop rdx; add qword [rsp],8; iretq
    machine.write(HANDLER, code("0f 20 d3", "5a", "48 83 04 24 08", "48 cf"))
    address = 0x7FFF_1234
    for bytes_, error in (("48 8b 04 25", 0), ("48 89 04 25", 2)):
        cpu = machine.boot(code(bytes_, address.to_bytes(4, "little").hex(), "f4"))
        assert cpu.run() == HltExit()
        assert (cpu.get_regs().rbx, cpu.get_regs().rdx) == (address, error)
        assert cpu.get_sregs().cr2 == address


def test_supervisor_page_from_ring_3(machine: Machine) -> None:
    machine.gate(14, HANDLER)
    machine.write(HANDLER, code("5a", "f4"))
    machine.write(PD + 8, struct.pack("<Q", 2 << 20 | 0x83))
    cpu = machine.boot(code("48 8b 04 25 00 00 20 00"), user=True)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rdx == 5


def test_the_same_exception_again_and_again_is_no_double_fault(machine: Machine) -> None:
    """The engine never clears the exception in flight by itself."""
    machine.gate(0, HANDLER)
    # add qword [rsp],3; inc r8; iretq
    machine.write(HANDLER, code("48 83 04 24 03", "49 ff c0", "48 cf"))
    cpu = machine.boot(code("31 d2", "48 f7 f2", "48 f7 f2", "48 f7 f2", "f4"))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().r8 == 3


def test_exits_after_a_software_interrupt_report_their_own_address(machine: Machine) -> None:
    """The engine would move RIP to the stale address behind the INT at the next exit."""
    machine.gate(0x80, HANDLER)
    machine.write(HANDLER, code("f4", "0f a2", "48 cf"))  # hlt; cpuid; iretq
    cpu = machine.boot(code("cd 80", "0f a2", "f4"))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rip == HANDLER + 1
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rip == TEXT + 5


def test_double_fault_then_triple_fault(machine: Machine) -> None:
    machine.gate(8, HANDLER, ist=1)
    machine.write(HANDLER, code("5a", "48 8b 1c 24", "f4"))
    # #PF with an empty gate: #GP while delivering it: #DF
    cpu = machine.boot(code("48 8b 04 25 00 00 00 7f"))
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rdx, cpu.get_regs().rbx) == (0, TEXT)
    machine.write(IDT + 8 * 16, bytes(16))
    machine.boot(code("48 8b 04 25 00 00 00 7f"))
    assert cpu.run() == ShutdownExit("triple fault")


def test_invalid_opcode_with_an_empty_gate_is_one_protection_fault(machine: Machine) -> None:
    """#UD is benign: its failed delivery gives #GP, not #DF."""
    machine.gate(13, HANDLER)
    machine.write(HANDLER, code("5a", "f4"))
    cpu = machine.boot(code("0f 0b"))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rdx == 6 * 8 + 2 + 1


def open_window(cpu: SvmCpu) -> bool:
    return cpu.interruptible


def test_interrupt_window(machine: Machine) -> None:
    machine.gate(0x40, HANDLER)
    machine.write(HANDLER, code("48 cf"))
    cpu = machine.boot(code("f4", "fb", "f4", "f4"))  # hlt; sti; hlt; hlt
    assert not open_window(cpu)
    assert cpu.run() == HltExit()
    assert not open_window(cpu), "IF is clear"
    assert cpu.run() == HltExit()
    assert open_window(cpu), "HLT has ended the shadow of STI"
    cpu.inject(0x40)
    assert not open_window(cpu), "one waits already"
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rip == TEXT + 4
    machine.boot(code("f4"), rflags=IF | 2)
    assert open_window(cpu), "before the first entry"


def test_missing_stage_2_pages_suspend_a_delivery_and_do_not_lose_it(machine: Machine) -> None:
    machine.gate(0x40, 0x15000, ist=1)
    machine.write(0x15000, code("49 ff c0", "48 cf"))
    stack = IST1_STACK - 8
    machine.holes.update((IDT >> 12, TSS >> 12, stack >> 12))
    cpu = machine.boot(code("90", "f4"))
    cpu.inject(0x40)
    expected = [
        (IDT + 0x40 * 16, Access.READ),
        (TSS + 0x24, Access.READ),
        (IST1_STACK - 40, Access.WRITE),
    ]
    for gpa, access in expected:
        for _ in range(2):
            assert cpu.run() == Stage2Fault(gpa, access)
            assert cpu.get_regs().rip == TEXT
        machine.holes.discard(gpa >> 12)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().r8 == 1, "delivered once"


def test_an_exception_waits_for_its_pages_too(machine: Machine) -> None:
    machine.gate(6, HANDLER)
    machine.write(HANDLER, code("48 8b 1c 24", "f4"))
    machine.holes.add(IDT >> 12)
    cpu = machine.boot(code("0f 0b"))
    assert cpu.run() == Stage2Fault(IDT + 6 * 16, Access.READ)
    machine.holes.clear()
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == TEXT


def test_injected_page_fault_and_vc_push_their_error_code(machine: Machine) -> None:
    machine.write(HANDLER, code("5a", "f4"))
    cpu = machine.boot(code("90"))
    for vector, error in ((14, 6), (29, 0x72)):
        machine.gate(vector, HANDLER)
        machine.boot(code("90"))
        cpu.inject(vector, error)
        assert cpu.run() == HltExit()
        assert cpu.get_regs().rdx == error


def test_ve_has_no_error_code(machine: Machine) -> None:
    machine.gate(20, HANDLER)
    machine.write(HANDLER, code("48 cf"))
    cpu = machine.boot(code("f4"))
    cpu.inject(20)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rsp == STACK


def test_vector_beyond_the_idt(machine: Machine) -> None:
    machine.gate(13, HANDLER)
    machine.write(HANDLER, code("5a", "f4"))
    cpu = machine.boot(code("90"))
    cpu.set_sregs(replace(machine.sregs(), idt=DescriptorTable(IDT, 16 * 16 - 1)))
    cpu.inject(0x40)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rdx == 0x40 * 8 + 2 + 1


def test_timer_preempts_a_loop(machine: Machine) -> None:
    """A ticker kicks, the runner injects where it may: what a machine's timer does."""
    machine.gate(0x40, HANDLER)
    machine.write(HANDLER, code("49 ff c0", "48 cf"))
    # loop: inc rbx; cmp r8,20; jb loop; hlt
    cpu = machine.boot(code("48 ff c3", "49 83 f8 14", "72 f7", "f4"), rflags=IF | 2)
    over = threading.Event()

    def ticker() -> None:
        while not over.wait(2e-4):
            cpu.kick()

    thread = threading.Thread(target=ticker)
    thread.start()
    injected = 0
    try:
        while isinstance(exit_ := cpu.run(), KickExit):
            if cpu.interruptible:
                cpu.inject(0x40)
                injected += 1
    finally:
        over.set()
        thread.join(10)
    assert exit_ == HltExit()
    assert cpu.get_regs().r8 == injected == 20


def test_page_boundary_frame(machine: Machine) -> None:
    """A frame over two pages is written as one or not at all."""
    machine.gate(0x40, HANDLER)
    machine.write(HANDLER, code("48 cf"))
    machine.holes.add((HEAP >> 12) - 1)
    cpu = machine.boot(code("f4"), rsp=HEAP + 16)
    cpu.inject(0x40)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert fault.gpa >> 12 == (HEAP >> 12) - 1
    assert machine.read(HEAP, 16) == bytes(16)
    machine.holes.clear()
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rsp == HEAP + 16
