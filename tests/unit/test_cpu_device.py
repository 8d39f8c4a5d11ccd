# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory-mapped and port I/O without instruction decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from hwemu.cpu.api import (
    Access,
    CpuError,
    CpuExit,
    CpuStateError,
    DescriptorTable,
    HltExit,
    IoExit,
    KickExit,
    MmioExit,
    Stage2Fault,
)
from hwemu.cpu.device import read_ahead
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.stage2 import PAGE_SIZE
from hwemu.testing import HEAP, IDT, PD, TEXT, TSS, Machine

DEVICE = 0x200_0000
HLT = "f4"


@pytest.fixture(params=["exit-request", "quanta"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(precise=request.param) as machine:
        machine.holes.update((DEVICE >> 12, (DEVICE >> 12) + 1))
        yield machine


def code(*instructions: str) -> bytes:
    return bytes.fromhex(" ".join(instructions))


def talk(cpu: SvmCpu, *answers: bytes) -> list[CpuExit]:
    """Run to HLT as a VMM does: faults are devices, reads get the next answer."""
    seen: list[CpuExit] = []
    waiting = list(answers)
    exit_ = cpu.run()
    while not isinstance(exit_, HltExit):
        if isinstance(exit_, Stage2Fault):
            exit_ = cpu.run_mmio(exit_.gpa)
            continue
        seen.append(exit_)
        assert isinstance(exit_, IoExit | MmioExit), exit_
        if not exit_.is_write:
            cpu.complete(waiting.pop(0))
        exit_ = cpu.run()
    assert not waiting
    return seen


@pytest.mark.parametrize(
    ("bytes_", "size"),
    [("88 06", 1), ("66 89 06", 2), ("89 06", 4), ("48 89 06", 8)],
)
def test_store(machine: Machine, bytes_: str, size: int) -> None:
    value = 0x8877_6655_4433_2211
    cpu = machine.boot(code(bytes_, HLT), rsi=DEVICE + 8, rax=value)
    data = value.to_bytes(8, "little")[:size]
    assert talk(cpu) == [MmioExit(DEVICE + 8, size, True, data)]


@pytest.mark.parametrize(
    ("bytes_", "size", "result"),
    [
        ("8a 06", 1, 0xFFFF_FFFF_FFFF_FF11),
        ("66 8b 06", 2, 0xFFFF_FFFF_FFFF_2211),
        ("8b 06", 4, 0x4433_2211),
        ("48 8b 06", 8, 0x8877_6655_4433_2211),
        ("48 0f be 06", 1, 0x11),
        ("48 63 06", 4, 0x4433_2211),
    ],
)
def test_load_into_a_register_in_every_width(
    machine: Machine, bytes_: str, size: int, result: int
) -> None:
    cpu = machine.boot(code(bytes_, HLT), rsi=DEVICE, rax=(1 << 64) - 1)
    answer = (0x8877_6655_4433_2211).to_bytes(8, "little")[:size]
    assert talk(cpu, answer) == [MmioExit(DEVICE, size, False)]
    assert cpu.get_regs().rax == result


def test_a_read_leaves_before_and_a_write_after_the_instruction(machine: Machine) -> None:
    cpu = machine.boot(code("48 8b 06", "48 89 06", HLT), rsi=DEVICE)
    assert isinstance(cpu.run(), Stage2Fault)
    assert cpu.run_mmio(DEVICE) == MmioExit(DEVICE, 8, False)
    assert (cpu.get_regs().rip, cpu.get_regs().rax) == (TEXT, 0)
    with pytest.raises(CpuStateError, match="complete"):
        cpu.run()
    with pytest.raises(CpuStateError, match="8 bytes"):
        cpu.complete(b"abc")
    cpu.complete(0x55)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert (cpu.get_regs().rip, cpu.get_regs().rax) == (TEXT + 3, 0x55)
    assert cpu.run_mmio(fault.gpa) == MmioExit(DEVICE, 8, True, (0x55).to_bytes(8, "little"))
    assert cpu.get_regs().rip == TEXT + 6
    assert cpu.run() == HltExit()


@pytest.mark.parametrize(
    ("bytes_", "answer", "written"),
    [
        ("48 ff 06", 6, 7),  # inc
        ("f0 48 0f c1 1e", 6, 16),  # lock xadd [rsi],rbx
        ("48 87 1e", 6, 10),  # xchg
        ("48 f7 16", 6, (1 << 64) - 7),  # not
        ("f0 48 0f b1 1e", 0, 10),  # lock cmpxchg, equal
    ],
)
def test_read_modify_write_reads_then_writes(
    machine: Machine, bytes_: str, answer: int, written: int
) -> None:
    cpu = machine.boot(code(bytes_, HLT), rsi=DEVICE, rbx=10)
    assert talk(cpu, answer.to_bytes(8, "little")) == [
        MmioExit(DEVICE, 8, False),
        MmioExit(DEVICE, 8, True, written.to_bytes(8, "little")),
    ]


def test_flags_and_result_of_arithmetic_on_a_device(machine: Machine) -> None:
    # cmp rax,[rsi]; sete bl; hlt
    cpu = machine.boot(code("48 3b 06", "0f 94 c3", HLT), rsi=DEVICE, rax=77)
    talk(cpu, (77).to_bytes(8, "little"))
    assert cpu.get_regs().rbx == 1


def test_sixteen_bytes_are_two_accesses(machine: Machine) -> None:
    cpu = machine.boot(code("0f 10 06", "0f 11 07", HLT), rsi=DEVICE, rdi=HEAP)
    low, high = b"ABCDEFGH", b"IJKLMNOP"
    assert talk(cpu, low, high) == [MmioExit(DEVICE, 8, False), MmioExit(DEVICE + 8, 8, False)]
    assert machine.read(HEAP, 16) == low + high


def test_copies_between_device_and_memory(machine: Machine) -> None:
    machine.write(HEAP + 8, b"memory->")
    # movsq (device to memory); xchg rsi,rdi; movsq (memory to device); hlt
    cpu = machine.boot(code("48 a5", "48 87 fe", "48 a5", HLT), rsi=DEVICE, rdi=HEAP)
    seen = talk(cpu, b"<-device")
    assert seen == [
        MmioExit(DEVICE, 8, False),
        MmioExit(DEVICE + 8, 8, True, b"memory->"),
    ]
    assert machine.read(HEAP, 8) == b"<-device"
    regs = cpu.get_regs()
    assert (regs.rsi, regs.rdi) == (HEAP + 16, DEVICE + 16)


def test_memory_is_untouched_until_the_device_has_answered(machine: Machine) -> None:
    machine.write(HEAP, b"previous")
    cpu = machine.boot(code("48 a5", HLT), rsi=DEVICE, rdi=HEAP)
    assert isinstance(cpu.run(), Stage2Fault)
    assert cpu.run_mmio(DEVICE) == MmioExit(DEVICE, 8, False)
    assert machine.read(HEAP, 8) == b"previous"


def test_repeated_string_store_is_element_by_element(machine: Machine) -> None:
    cpu = machine.boot(code("f3 ab", HLT), rdi=DEVICE, rcx=3, rax=0x01020304)
    data = (0x01020304).to_bytes(4, "little")
    assert talk(cpu) == [MmioExit(DEVICE + 4 * n, 4, True, data) for n in range(3)]


def test_access_over_two_device_pages(machine: Machine) -> None:
    end = DEVICE + PAGE_SIZE
    cpu = machine.boot(code("48 89 06", HLT), rsi=end - 4, rax=0x8877_6655_4433_2211)
    data = (0x8877_6655_4433_2211).to_bytes(8, "little")
    assert talk(cpu) == [
        MmioExit(end - 4, 4, True, data[:4]),
        MmioExit(end, 4, True, data[4:]),
    ]
    machine.boot(code("48 8b 06", HLT), rsi=end - 4)
    assert talk(cpu, data[:4], data[4:]) == [
        MmioExit(end - 4, 4, False),
        MmioExit(end, 4, False),
    ]
    assert cpu.get_regs().rax == 0x8877_6655_4433_2211


@pytest.mark.parametrize("offset", [*range(8), *range(PAGE_SIZE - 8, PAGE_SIZE)])
@pytest.mark.parametrize(
    ("load", "store", "size"),
    [("8a 06", "88 06", 1), ("66 8b 06", "66 89 06", 2), ("8b 06", "89 06", 4),
     ("48 8b 06", "48 89 06", 8)],
)  # fmt: skip
def test_an_access_leaves_as_what_it_is(
    machine: Machine, load: str, store: str, size: int, offset: int
) -> None:
    """Its own gpa and length, aligned or not; in two where a page ends."""
    value = bytes(range(1, size + 1))
    first = min(size, PAGE_SIZE - offset)
    gpa = DEVICE + offset
    parts = [(gpa, value[:first])]
    if first < size:
        parts.append((DEVICE + PAGE_SIZE, value[first:]))
    cpu = machine.boot(code(load, store, HLT), rsi=gpa)
    assert talk(cpu, *(data for _, data in parts)) == [
        *(MmioExit(at, len(data), False) for at, data in parts),
        *(MmioExit(at, len(data), True, data) for at, data in parts),
    ]
    assert cpu.get_regs().rax == int.from_bytes(value, "little")


@pytest.mark.parametrize("offset", [3, 5])
@pytest.mark.parametrize(
    ("bytes_", "sizes"),
    [
        ("0f 10 06", [(0, 8), (8, 8)]),  # movups
        ("db 2e", [(0, 8), (8, 2)]),  # fld, 80 bits
        ("ff 36", [(0, 8)]),  # push
        ("48 3b 06", [(0, 8)]),  # cmp
        ("48 a5", [(0, 8)]),  # movsq
    ],
)
def test_misaligned_loads_of_all_kinds(
    machine: Machine, bytes_: str, sizes: list[tuple[int, int]], offset: int
) -> None:
    cpu = machine.boot(code(bytes_, HLT), rsi=DEVICE + offset, rdi=HEAP)
    answers = [bytes(range(8 * n, 8 * n + size)) for n, (_, size) in enumerate(sizes)]
    exits = [MmioExit(DEVICE + offset + at, size, False) for at, size in sizes]
    assert talk(cpu, *answers) == exits
    if bytes_ == "48 a5":
        assert machine.read(HEAP, 8) == answers[0]


@pytest.mark.parametrize("bytes_", ["48 ff 06", "f0 48 ff 06", "f0 48 0f c1 1e"])
def test_a_misaligned_read_modify_write(machine: Machine, bytes_: str) -> None:
    cpu = machine.boot(code(bytes_, HLT), rsi=DEVICE + 3, rbx=1)
    assert talk(cpu, (0x1FF).to_bytes(8, "little")) == [
        MmioExit(DEVICE + 3, 8, False),
        MmioExit(DEVICE + 3, 8, True, (0x200).to_bytes(8, "little")),
    ]


@pytest.mark.parametrize("memory_first", [True, False])
def test_a_load_may_lie_half_in_memory(machine: Machine, memory_first: bool) -> None:
    end = DEVICE + PAGE_SIZE
    at = DEVICE if memory_first else end
    machine.holes.discard(at >> 12)
    machine.write(end - 8, b"memory first, and memory behind"[:16])
    cpu = machine.boot(code("48 8b 06", HLT), rsi=end - 3)
    size = 5 if memory_first else 3
    asked = MmioExit(end if memory_first else end - 3, size, False)
    assert talk(cpu, b"*" * size) == [asked]
    loaded = cpu.get_regs().rax.to_bytes(8, "little")
    there = machine.read(end - 3, 8)
    assert loaded == (there[:3] + b"*" * 5 if memory_first else b"***" + there[3:])


def test_other_pages_of_the_instruction_may_fault_on_the_way(machine: Machine) -> None:
    machine.holes.add(HEAP >> 12)
    cpu = machine.boot(code("48 a5", HLT), rsi=DEVICE, rdi=HEAP)
    assert isinstance(cpu.run(), Stage2Fault)
    assert cpu.run_mmio(DEVICE) == MmioExit(DEVICE, 8, False)
    cpu.complete(b"answered")
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert fault.gpa == HEAP
    machine.holes.discard(HEAP >> 12)
    assert cpu.run() == HltExit()
    assert machine.read(HEAP, 8) == b"answered"


def test_device_page_is_not_reachable_afterwards(machine: Machine) -> None:
    cpu = machine.boot(code("48 89 06", "48 89 06", HLT), rsi=DEVICE)
    first = cpu.run()
    assert isinstance(first, Stage2Fault)
    assert isinstance(cpu.run_mmio(DEVICE), MmioExit)
    assert isinstance(cpu.run(), Stage2Fault), "the second store faults again"


def test_an_interrupt_waits_for_the_device_instruction(machine: Machine) -> None:
    machine.gate(0x40, 0x11000)
    machine.write(0x11000, code("48 8b 1c 24", "f4"))
    cpu = machine.boot(code("48 8b 06", HLT), rsi=DEVICE, rflags=0x202)
    assert isinstance(cpu.run(), Stage2Fault)
    assert isinstance(cpu.run_mmio(DEVICE), MmioExit)
    assert not cpu.interruptible
    cpu.complete(0x99)
    cpu.inject(0x40)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == TEXT + 3, "the load has completed first"
    assert cpu.get_regs().rax == 0x99


def test_kick_between_question_and_answer(machine: Machine) -> None:
    cpu = machine.boot(code("48 8b 06", HLT), rsi=DEVICE)
    assert isinstance(cpu.run(), Stage2Fault)
    assert isinstance(cpu.run_mmio(DEVICE), MmioExit)
    cpu.complete(0x99)
    cpu.kick()
    assert cpu.run() == KickExit()
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x99


def test_the_page_may_turn_into_memory_meanwhile(machine: Machine) -> None:
    cpu = machine.boot(code("48 8b 06", HLT), rsi=DEVICE)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    machine.holes.clear()
    machine.write(DEVICE, b"\x33")
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x33


def test_an_event_cannot_be_delivered_to_a_device(machine: Machine) -> None:
    machine.gate(0x40, 0x11000)
    cpu = machine.boot(code(HLT), rsp=DEVICE + 0x100)
    cpu.inject(0x40)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    error = cpu.run_mmio(fault.gpa)
    assert error == CpuError(
        f"gpa {fault.gpa:#x} is a device: no event can be delivered to it", fault
    )
    assert cpu.get_regs().rip == TEXT


def test_an_event_table_cannot_be_a_device(machine: Machine) -> None:
    cpu = machine.boot(code("0f 0b"))  # ud2
    cpu.set_sregs(replace(cpu.get_sregs(), idt=DescriptorTable(DEVICE, 0xFFF)))
    fault = cpu.run()
    assert fault == Stage2Fault(DEVICE + 6 * 16, Access.READ)
    error = cpu.run_mmio(DEVICE + 6 * 16)
    assert isinstance(error, CpuError)
    assert error.delivery == fault


# -- ports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bytes_", "size"), [("ee", 1), ("66 ef", 2), ("ef", 4), ("e6 80", 1), ("e7 80", 4)]
)
def test_out(machine: Machine, bytes_: str, size: int) -> None:
    cpu = machine.boot(code(bytes_, HLT), rdx=0x3F8, rax=0x4433_2211)
    port = 0x80 if bytes_.startswith("e") and bytes_.endswith("80") else 0x3F8
    data = (0x4433_2211).to_bytes(4, "little")[:size]
    assert cpu.run() == IoExit(port, size, True, data)
    assert cpu.get_regs().rip == TEXT + len(bytes.fromhex(bytes_))
    assert cpu.run() == HltExit()


@pytest.mark.parametrize(
    ("bytes_", "size", "result"),
    [
        ("ec", 1, 0xFFFF_FFFF_FFFF_FF11),
        ("66 ed", 2, 0xFFFF_FFFF_FFFF_2211),
        ("ed", 4, 0x4433_2211),
    ],
)
def test_in(machine: Machine, bytes_: str, size: int, result: int) -> None:
    cpu = machine.boot(code(bytes_, HLT), rdx=0x3F8, rax=(1 << 64) - 1)
    assert cpu.run() == IoExit(0x3F8, size, False)
    cpu.complete((0x4433_2211).to_bytes(4, "little")[:size])
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == result


def test_nothing_behind_out_runs_before_the_exit(machine: Machine) -> None:
    """OUT does not end a block of translated code; what follows it must wait all the same."""
    cpu = machine.boot(
        # out dx,al; mov [rsi],rax; inc rbx; out dx,al; syscall
        code("ee", "48 89 06", "48 ff c3", "ee", HLT),
        rdx=0x3F8,
        rax=0x41,
        rsi=HEAP,
    )
    assert cpu.run() == IoExit(0x3F8, 1, True, b"A")
    assert (cpu.get_regs().rbx, machine.word(HEAP)) == (0, 0)
    assert cpu.run() == IoExit(0x3F8, 1, True, b"A")
    assert (cpu.get_regs().rbx, machine.word(HEAP)) == (1, 0x41)
    assert cpu.run() == HltExit()


def test_string_out_and_in(machine: Machine) -> None:
    machine.write(HEAP, b"hello")
    cpu = machine.boot(code("f3 6e", HLT), rdx=0x3F8, rsi=HEAP, rcx=5)
    assert b"".join(exit_.data for exit_ in talk(cpu) if isinstance(exit_, IoExit)) == b"hello"
    assert (cpu.get_regs().rcx, cpu.get_regs().rsi) == (0, HEAP + 5)
    machine.boot(code("f3 6c", HLT), rdx=0x3F8, rdi=HEAP, rcx=5)
    assert talk(cpu, b"world") == [IoExit(0x3F8, 1, False, count=5)]
    assert machine.read(HEAP, 5) == b"world"


@pytest.mark.parametrize(
    ("size", "rcx", "rdi", "backwards", "count"),
    [
        (1, 16, 0x1000, False, 16),
        (4, 1000, 0x1000, False, 256),
        (1, 3000, 0x1FFD, False, 3),
        (4, 8, 0x1FFC, False, 4),
        (1, 16, 0x1005, True, 5),
        (2, 16, 0x1000, True, 1),
        (1, 1, 0x1000, False, 1),
    ],
)
def test_reading_ahead(size: int, rcx: int, rdi: int, backwards: bool, count: int) -> None:
    assert read_ahead(size, rcx, rdi, backwards=backwards) == count


def test_an_answer_of_many_elements_outlives_what_comes_between(machine: Machine) -> None:
    """A fault of the second stage, a kick, and a device where the last of them goes."""
    machine.holes.add((HEAP >> 12) + 1)
    to = HEAP + PAGE_SIZE - 4
    cpu = machine.boot(code("f3 6d", HLT), rdx=0x3F8, rdi=to, rcx=3)
    assert cpu.run() == IoExit(0x3F8, 4, False, count=3)
    assert not cpu.unfinished
    with pytest.raises(CpuStateError, match="12 bytes"):
        cpu.complete(b"abcd")
    cpu.complete(b"abcdefghijkl")
    assert cpu.unfinished
    cpu.kick()
    assert cpu.run() == KickExit()
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert (cpu.get_regs().rcx, cpu.get_regs().rdi) == (2, to + 4)
    assert machine.read(to, 4) == b"abcd"
    assert cpu.unfinished
    assert not cpu.interruptible
    assert cpu.run_mmio(fault.gpa) == MmioExit(to + 4, 4, True, b"efgh")
    machine.holes.discard((HEAP >> 12) + 1)
    assert cpu.settle() == KickExit()
    assert not cpu.unfinished
    assert (cpu.get_regs().rcx, cpu.get_regs().rdi) == (0, to + 12)
    assert cpu.run() == HltExit()
    assert machine.read(to + 8, 4) == b"ijkl"


def test_a_repeated_input_may_go_to_a_device(machine: Machine) -> None:
    cpu = machine.boot(code("f3 6d", HLT), rdx=0x3F8, rdi=DEVICE + PAGE_SIZE - 4, rcx=3)
    assert talk(cpu, b"abcdefghijkl") == [
        IoExit(0x3F8, 4, False, count=3),
        MmioExit(DEVICE + PAGE_SIZE - 4, 4, True, b"abcd"),
        MmioExit(DEVICE + PAGE_SIZE, 4, True, b"efgh"),
        MmioExit(DEVICE + PAGE_SIZE + 4, 4, True, b"ijkl"),
    ]


def test_elements_before_an_exception_stay(machine: Machine) -> None:
    """And those behind it are lost, as KVM loses them."""
    machine.gate(14, 0x11000)
    machine.write(0x11000, code("f4"))
    to = (31 << 21) - 4
    machine.write(PD + 31 * 8, bytes(8))  # not present in the guest's own tables
    cpu = machine.boot(code("f3 6d", HLT), rdx=0x3F8, rdi=to, rcx=3)
    assert talk(cpu, b"abcdefghijkl") == [IoExit(0x3F8, 4, False, count=3)]
    assert (cpu.get_regs().rcx, cpu.get_regs().rdi) == (2, to + 4)
    assert machine.read(to, 4) == b"abcd"
    assert not cpu.unfinished


def test_string_out_from_a_missing_page(machine: Machine) -> None:
    machine.write(HEAP, b"X")
    machine.holes.add(HEAP >> 12)
    cpu = machine.boot(code("6e", HLT), rdx=0x3F8, rsi=HEAP)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert fault.gpa == HEAP
    machine.holes.clear()
    assert cpu.run() == IoExit(0x3F8, 1, True, b"X")
    assert cpu.run() == HltExit()


def test_ports_need_privilege(machine: Machine) -> None:
    """The engine lets ring 3 use every port."""
    machine.gate(13, 0x11000)
    machine.write(0x11000, code("5a", "48 8b 1c 24", "f4"))
    cpu = machine.boot(code("90", "ee"), user=True, rdx=0x3F8)
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rdx, cpu.get_regs().rbx) == (0, TEXT + 1)
    machine.boot(code("90", "ee"), user=True, rdx=0x3F8, rflags=0x3002)
    assert cpu.run() == IoExit(0x3F8, 1, True, b"\0")


def test_ports_by_the_tss_bitmap(machine: Machine) -> None:
    machine.gate(13, 0x11000)
    machine.write(0x11000, code("f4"))
    machine.write(TSS + 0x66, (0x68).to_bytes(2, "little"))
    bitmap = bytearray(b"\xff" * 0x100)
    bitmap[0x80 // 8] = 0xFE
    machine.write(TSS + 0x68, bytes(bitmap))
    cpu = machine.cpu
    for port, allowed in ((0x80, True), (0x81, False)):
        machine.boot(code("ee"), user=True, rdx=port)
        sregs = machine.sregs(user=True)
        cpu.set_sregs(replace(sregs, tr=replace(sregs.tr, limit=0x168)))
        exit_ = cpu.run()
        assert isinstance(exit_, IoExit if allowed else HltExit)


def test_a_missing_idt_page_during_a_refused_port(machine: Machine) -> None:
    machine.gate(13, 0x11000)
    machine.write(0x11000, code("f4"))
    machine.holes.add(IDT >> 12)
    cpu = machine.boot(code("ee"), user=True)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert fault.gpa == IDT + 13 * 16
    machine.holes.clear()
    assert cpu.run() == HltExit()


@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("taken", [TEXT, HEAP])
def test_an_instruction_that_faults_when_it_is_tried_again_is_done_once(
    machine: Machine, taken: int, settle: bool
) -> None:
    """Its page, or that of what follows, was taken away between question and answer.

    Nothing behind it runs meanwhile, or a store would be made twice; and it is asked once.
    """
    # in al, dx; inc qword [HEAP]; jmp back
    again = f"48 ff 04 25 {HEAP.to_bytes(4, 'little').hex()}"
    cpu = machine.boot(code("ec", again, "eb f5"), rdx=0x3F8)
    for asked in range(20):
        assert cpu.run() == IoExit(0x3F8, 1, False)
        assert machine.word(HEAP) == asked
        cpu.complete(b"\x00")
        machine.stage2.zap(taken, 1)
        cpu.flush([(taken, 1)])
        if settle:
            assert cpu.settle() == KickExit()
            assert machine.word(HEAP) == asked
