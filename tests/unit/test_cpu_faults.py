# SPDX-License-Identifier: GPL-2.0-or-later
"""Second-stage faults: where, why, and that the instruction runs exactly once afterwards."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hwemu.cpu.api import Access, CpuError, HltExit, MmioExit, Stage2Fault
from hwemu.stage2 import PAGE_SIZE
from hwemu.testing import HEAP, PD, PDPT, PML4, TEXT, Machine

HLT = b"\xf4"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def code(*instructions: str) -> bytes:
    return bytes.fromhex(" ".join(instructions))


def allow(machine: Machine, gpa: int, *, writable: bool = True) -> None:
    """What the user of a fault does: make the leaf."""
    page = gpa // PAGE_SIZE * PAGE_SIZE
    machine.holes.discard(page // PAGE_SIZE)
    machine.stage2.map(page, machine.hpa + page, 1, writable=writable)


def test_both_stages_fault_in_the_order_of_the_walk(machine: Machine) -> None:
    cpu = machine.boot(code("48 8b 04 25 00 00 04 00", "f4"))  # mov rax,[HEAP]
    machine.write(HEAP, b"\x42")
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x42
    assert machine.faults == [
        (PML4, Access.WRITE),
        (PDPT, Access.WRITE),
        (PD, Access.WRITE),
        (TEXT, Access.EXEC),
        (HEAP, Access.READ),
    ]


def test_faults_on_page_tables_are_marked(machine: Machine) -> None:
    machine.holes.update((PML4 >> 12, PDPT >> 12, PD >> 12, HEAP >> 12))
    cpu = machine.boot(code("48 89 04 25 00 00 04 00", "f4"))  # mov [HEAP],rax
    for table in (PML4, PDPT, PD):
        assert cpu.run() == Stage2Fault(table, Access.WRITE)
        assert cpu.get_regs().rip == TEXT
        allow(machine, table)
    assert cpu.run() == Stage2Fault(HEAP, Access.WRITE)
    allow(machine, HEAP)
    assert cpu.run() == HltExit()


@pytest.mark.parametrize(
    ("bytes_", "access", "gpa"),
    [
        ("48 8b 04 25 08 00 04 00", Access.READ, HEAP + 8),
        ("48 89 04 25 08 00 04 00", Access.WRITE, HEAP + 8),
        # the engine reads first: an absent page under a read-modify-write is a read fault
        ("f0 48 ff 04 25 08 00 04 00", Access.READ, HEAP + 8),
        ("ff 24 25 08 00 04 00", Access.READ, HEAP + 8),
    ],
)
def test_fault_exits_before_the_instruction_and_retries_it(
    machine: Machine, bytes_: str, access: Access, gpa: int
) -> None:
    machine.holes.add(HEAP >> 12)
    machine.write(HEAP + 8, struct.pack("<Q", TEXT + len(bytes.fromhex(bytes_)) + 4))
    cpu = machine.boot(code("48 ff c3", bytes_, "90", "f4"))  # inc rbx; …; nop; hlt
    for _ in range(3):  # nothing changes: the same fault again and again
        assert cpu.run() == Stage2Fault(gpa, access)
        regs = cpu.get_regs()
        assert (regs.rip, regs.rbx) == (TEXT + 3, 1)
    allow(machine, HEAP)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == 1


def test_locked_add_through_three_faults_adds_once(machine: Machine) -> None:
    machine.holes.update((HEAP >> 12, (HEAP >> 12) + 1))
    cpu = machine.boot(code("f0 83 07 03", "f4"), rdi=HEAP)  # lock add dword [rdi],3
    cpu.set_regs(replace(cpu.get_regs(), rdi=HEAP + PAGE_SIZE - 2))
    seen = []
    while isinstance(exit_ := cpu.run(), Stage2Fault):
        seen.append(exit_.gpa & ~0xFFF)
        allow(machine, exit_.gpa)
    assert exit_ == HltExit()
    assert sorted(seen) == [HEAP, HEAP + PAGE_SIZE]
    assert machine.read(HEAP + PAGE_SIZE - 2, 4) == struct.pack("<I", 3)


def test_string_copy_over_a_missing_page_resumes_where_it_was(machine: Machine) -> None:
    machine.holes.update(((HEAP >> 12) + 1, (HEAP >> 12) + 17))
    pattern = bytes(range(1, 251)) * 33
    machine.write(HEAP, pattern)
    cpu = machine.boot(code("f3 a4", "f4"), rsi=HEAP, rdi=HEAP + 0x10000, rcx=len(pattern))
    exits = []
    while isinstance(exit_ := cpu.run(), Stage2Fault):
        exits.append(exit_)
        done = cpu.get_regs().rsi - HEAP
        assert cpu.get_regs().rcx == len(pattern) - done, "registers show what is done"
        allow(machine, exit_.gpa)
    assert exits == [
        Stage2Fault(HEAP + PAGE_SIZE, Access.READ),
        Stage2Fault(HEAP + 0x11000, Access.WRITE),
    ]
    assert machine.read(HEAP + 0x10000, len(pattern)) == pattern


def test_access_over_a_page_boundary_faults_on_the_page_that_is_missing(
    machine: Machine,
) -> None:
    machine.holes.add((HEAP >> 12) + 1)
    cpu = machine.boot(code("48 89 06", "f4"), rsi=HEAP + PAGE_SIZE - 3, rax=0x1122334455667788)
    fault = cpu.run()
    assert isinstance(fault, Stage2Fault)
    assert fault.gpa & ~0xFFF == HEAP + PAGE_SIZE
    assert fault.access == Access.WRITE
    assert machine.read(HEAP + PAGE_SIZE - 3, 3) == bytes(3), "nothing of it was stored"
    allow(machine, fault.gpa)
    assert cpu.run() == HltExit()
    assert machine.read(HEAP + PAGE_SIZE - 3, 8) == (0x1122334455667788).to_bytes(8, "little")


def test_read_only_leaf_faults_on_the_first_write(machine: Machine) -> None:
    machine.holes.add(HEAP >> 12)
    allow(machine, HEAP, writable=False)
    machine.holes.add(HEAP >> 12)
    machine.write(HEAP, b"\x05")
    cpu = machine.boot(code("48 8b 06", "48 ff 06", "f4"), rsi=HEAP)  # mov rax,[rsi]; inc [rsi]
    assert cpu.run() == Stage2Fault(HEAP, Access.WRITE)
    assert cpu.get_regs().rax == 5
    assert cpu.get_regs().rip == TEXT + 3
    allow(machine, HEAP)
    assert cpu.run() == HltExit(), "a wider leaf needs no flush"
    assert machine.word(HEAP) == 6


def test_read_only_page_table_faults_as_a_write(machine: Machine) -> None:
    """Nested walks are user writes: AMD APM vol. 2, 15.25.5."""
    allow(machine, PML4, writable=False)
    machine.holes.add(PML4 >> 12)
    assert machine.boot(HLT).run() == Stage2Fault(PML4, Access.WRITE)


def test_large_leaves_work_and_split(machine: Machine) -> None:
    machine.stage2.map(0, machine.hpa, 512, level=2)
    machine.stage2.zap(HEAP, 1)
    cpu = machine.boot(code("48 ff 06", "f4"), rsi=HEAP - 8)
    assert cpu.run() == HltExit()
    assert machine.faults == []
    machine.holes.add(HEAP >> 12)
    machine.boot(code("48 89 06", "f4"), rsi=HEAP)
    assert cpu.run() == Stage2Fault(HEAP, Access.WRITE)


def test_a_gigabyte_leaf_works_and_splits(machine: Machine) -> None:
    machine.stage2.map(0, machine.hpa, 1 << 18, level=3)
    cpu = machine.boot(code("48 ff 06", "f4"), rsi=HEAP - 8)
    assert cpu.run() == HltExit()
    assert (machine.faults, machine.word(HEAP - 8)) == ([], 1)
    machine.holes.add(HEAP >> 12)
    machine.stage2.zap(HEAP, 1)
    cpu.flush([(HEAP, 1)])
    machine.boot(code("48 ff 06", "48 89 07", "f4"), rsi=HEAP - 8, rdi=HEAP)
    assert cpu.run() == Stage2Fault(HEAP, Access.WRITE)
    assert machine.word(HEAP - 8) == 2


@pytest.mark.parametrize("level", [2, 3])
def test_a_zapped_large_leaf_is_forgotten_whole(machine: Machine, level: int) -> None:
    """The engine caches 4 KiB pages of a large leaf: one flush must lose all of them."""
    npages = 512 ** (level - 1)
    machine.stage2.map(0, machine.hpa, npages, level=level)
    loop = code("48 8b 06", "48 8b 07", "f4", "eb f7")  # mov rax,[rsi]; mov rax,[rdi]; hlt; jmp
    cpu = machine.boot(loop, rsi=HEAP, rdi=HEAP + 0x10_0000)
    assert cpu.run() == HltExit()
    machine.stage2.zap(0, npages)
    cpu.flush([(0, npages)])
    assert cpu.run() == HltExit()
    assert {HEAP, HEAP + 0x10_0000} <= {gpa & -PAGE_SIZE for gpa, _ in machine.faults}


@pytest.mark.parametrize("level", [2, 3])
def test_a_device_page_inside_a_read_only_large_leaf(machine: Machine, level: int) -> None:
    """As of a read-only slot: its writes are MMIO, all around it stays the slot's memory."""
    machine.stage2.map(1 << 39, machine.hpa, 512 ** (level - 1), level=level, writable=False)
    machine.write(PD + 8, struct.pack("<Q", 1 << 39 | 0x87))
    window = 2 << 20
    machine.write(HEAP + PAGE_SIZE, b"\x2a")
    cpu = machine.boot(  # mov [rsi],rax; mov bl,[rdi]; hlt
        code("48 89 06", "8a 1f", "f4"), rsi=window | HEAP, rdi=window | HEAP + PAGE_SIZE, rax=7
    )
    gpa = 1 << 39 | HEAP
    machine.holes.add(gpa >> 12)
    assert cpu.run() == Stage2Fault(gpa, Access.WRITE)
    assert cpu.run_mmio(gpa) == MmioExit(gpa, 8, True, (7).to_bytes(8, "little"))
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rbx == 0x2A
    assert machine.word(HEAP) == 0


def test_jump_into_a_hole_is_a_fetch_fault(machine: Machine) -> None:
    machine.holes.add(HEAP >> 12)
    machine.write(HEAP, HLT)
    cpu = machine.boot(code("ff e0"), rax=HEAP)  # jmp rax
    assert cpu.run() == Stage2Fault(HEAP, Access.EXEC)
    assert cpu.get_regs().rip == HEAP
    assert cpu.run_mmio(HEAP) == CpuError(
        f"gpa {HEAP:#x} is a device: no code and no page table can be there"
    )
    assert cpu.run() == Stage2Fault(HEAP, Access.EXEC)
    allow(machine, HEAP)
    assert cpu.run() == HltExit()


def test_instruction_over_a_page_boundary_into_a_hole(machine: Machine) -> None:
    end = HEAP + PAGE_SIZE
    machine.holes.add(end >> 12)
    cpu = machine.boot(code("48 b8 88 77 66 55 44 33 22 11", "f4"), at=end - 4)  # mov rax,imm64
    assert cpu.run() == Stage2Fault(end, Access.EXEC)
    assert cpu.get_regs().rip == end - 4
    allow(machine, end)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x1122334455667788


def test_shared_bit_reaches_the_other_half(machine: Machine) -> None:
    """Guest-physical bit 39 in a guest entry selects the shared side of the same frame."""
    shared = 1 << 39
    machine.write(PD + 8, struct.pack("<Q", shared | 0x87))
    machine.stage2.map(shared | HEAP, machine.hpa + HEAP + PAGE_SIZE, 1)
    cpu = machine.boot(
        code("48 ff 06", "48 ff 07", "48 ff 07", "f4"), rsi=HEAP, rdi=(2 << 20) | HEAP
    )
    assert cpu.run() == HltExit()
    assert (machine.word(HEAP), machine.word(HEAP + PAGE_SIZE)) == (1, 2)
    machine.stage2.zap(shared | HEAP, 1)
    cpu.flush()
    machine.boot(code("48 89 07", "f4"), rdi=(2 << 20) | HEAP)
    assert cpu.run() == Stage2Fault(shared | HEAP, Access.WRITE)


def test_another_process_may_write_the_pages(machine: Machine) -> None:
    """The guest spins on a word that only the other process stores."""
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys; sys.stdin.read(1); os.pwrite(int(sys.argv[1]), b'x', "
            "int(sys.argv[2]))",
            str(machine.fd),
            str(HEAP),
        ],
        stdin=subprocess.PIPE,
        pass_fds=[machine.fd],
    )
    try:
        # loop: cmp qword [rsi],0; je loop; hlt
        cpu = machine.boot(code("48 83 3e 00", "74 fa", "f4"), rsi=HEAP)
        assert other.stdin is not None
        other.stdin.close()
        assert cpu.run() == HltExit()
    finally:
        other.wait(30)
