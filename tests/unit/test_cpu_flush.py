# SPDX-License-Identifier: GPL-2.0-or-later
"""Stale translations and stale code, two engines on one arena, memory that comes and goes."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from hwemu.cpu.api import Access, CpuExit, HltExit, KickExit, Regs, Stage2Fault
from hwemu.stage2 import PAGE_SIZE
from hwemu.testing import HEAP, IDT, STACK, TEXT, Machine

LOAD = bytes.fromhex("48 8b 06 f4")  # mov rax,[rsi]; hlt


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(cpus=2) as machine:
        yield machine


def again(machine: Machine, cpu: int, at: int = TEXT, **regs: int) -> CpuExit:
    """Run from ``at`` without anything that would flush."""
    vcpu = machine.cpus[cpu]
    old = vcpu.get_regs()
    values = {name: getattr(old, name) for name in old.__dataclass_fields__}
    vcpu.set_regs(type(old)(**{**values, **regs, "rip": at}))
    return vcpu.run()


def test_a_forgotten_flush_reads_the_old_page_and_a_flush_does_not(machine: Machine) -> None:
    machine.write(HEAP, b"\x11")
    machine.write(HEAP + PAGE_SIZE, b"\x22")
    cpu = machine.boot(LOAD, rsi=HEAP)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x11
    machine.stage2.zap(HEAP, 1)
    machine.stage2.map(HEAP, machine.hpa + HEAP + PAGE_SIZE, 1)
    assert again(machine, 0, rsi=HEAP) == HltExit()
    assert cpu.get_regs().rax == 0x11, "stale, as on hardware: this is why flushes exist"
    cpu.flush()
    assert again(machine, 0, rsi=HEAP) == HltExit()
    assert cpu.get_regs().rax == 0x22


def test_code_of_a_refilled_page_runs_only_after_a_flush(machine: Machine) -> None:
    """Translated code outlives its page: the same offset, freed and filled again."""
    machine.write(HEAP, bytes.fromhex("b8 01 00 00 00 f4"))  # mov eax,1; hlt
    cpu = machine.boot(b"\x90", at=TEXT)
    assert again(machine, 0, at=HEAP) == HltExit()
    assert cpu.get_regs().rax == 1
    machine.stage2.zap(HEAP, 1)
    os.pwrite(machine.fd, bytes.fromhex("b8 02 00 00 00 f4"), HEAP)
    machine.stage2.map(HEAP, machine.hpa + HEAP, 1)
    cpu._engine.flush_tlb()
    assert again(machine, 0, at=HEAP) == HltExit()
    assert cpu.get_regs().rax == 1, "a TLB flush alone is not enough"
    cpu.flush()
    assert again(machine, 0, at=HEAP) == HltExit()
    assert cpu.get_regs().rax == 2


def test_zapped_page_faults_after_a_flush(machine: Machine) -> None:
    cpu = machine.boot(LOAD, rsi=HEAP)
    assert cpu.run() == HltExit()
    machine.stage2.zap(HEAP, 1)
    machine.holes.add(HEAP >> 12)
    assert again(machine, 0, rsi=HEAP) == HltExit()
    cpu.flush()
    assert again(machine, 0, rsi=HEAP) == Stage2Fault(HEAP, Access.READ)


def test_each_vcpu_has_its_own_translations(machine: Machine) -> None:
    for index in (0, 1):
        machine.boot(LOAD, cpu=index, rsi=HEAP)
        assert machine.cpus[index].run() == HltExit()
    machine.stage2.zap(HEAP, 1)
    machine.holes.add(HEAP >> 12)
    machine.cpus[0].flush()
    assert again(machine, 0, rsi=HEAP) == Stage2Fault(HEAP, Access.READ)
    assert again(machine, 1, rsi=HEAP) == HltExit()


def test_vcpus_in_turn_share_locked_counters(machine: Machine) -> None:
    loops = 100_000
    spin = bytes.fromhex("f0 48 ff 06 48 ff c9 75 f7 f4")  # lock inc [rsi]; dec rcx; jnz; hlt
    for index in (0, 1):
        machine.boot(spin, cpu=index, rsi=HEAP, rcx=loops)
    going = {0, 1}
    stop = threading.Event()

    def ticker() -> None:
        while not stop.is_set():
            for index in (0, 1):
                machine.cpus[index].kick()
            time.sleep(2e-4)

    thread = threading.Thread(target=ticker)
    thread.start()
    try:
        while going:
            for index in tuple(going):
                exit_ = machine.cpus[index].run()
                assert isinstance(exit_, HltExit | KickExit)
                if isinstance(exit_, HltExit):
                    going.discard(index)
    finally:
        stop.set()
        thread.join(10)
    assert machine.word(HEAP) == 2 * loops


def test_memory_comes_and_goes_under_running_engines(machine: Machine) -> None:
    """Hundreds of rounds: place, run, shoot down, over-map, kill the file, place elsewhere.

    Two engines in turn add one to every page of a window; each round the window moves to a fresh
    file, and the old one is truncated to nothing after it was over-mapped.
    """
    pages, window = 8, 0x200_0000
    # loop: inc qword [rsi]; add rsi,4096; dec rcx; jnz loop; hlt
    code = bytes.fromhex("48 ff 06 48 81 c6 00 10 00 00 48 ff c9 75 f1 f4")
    for index in (0, 1):
        machine.boot(code, cpu=index, rsi=window, rcx=0)
    stop = threading.Event()
    chance = random.Random(7)

    def kicker() -> None:
        while not stop.is_set():
            machine.cpus[0].kick()
            machine.cpus[1].kick()
            time.sleep(chance.random() * 3e-4)

    thread = threading.Thread(target=kicker)
    thread.start()
    try:
        for round_ in range(300):
            fd = os.memfd_create("extent")
            os.ftruncate(fd, pages * PAGE_SIZE)
            hpa = machine.arena.place(fd, 0, pages * PAGE_SIZE)
            machine.stage2.map(window, hpa, pages)
            for index in (0, 1):
                exit_ = again(machine, index, rsi=window, rcx=pages)
                while isinstance(exit_, KickExit):
                    exit_ = machine.cpus[index].run()
                assert exit_ == HltExit(), f"round {round_}"
            for page in range(pages):
                assert os.pread(fd, 1, page * PAGE_SIZE) == b"\x02", f"round {round_}"
            assert machine.stage2.zap(window, pages) == pages
            for cpu in machine.cpus:
                cpu.flush()
            machine.stage2.reclaim()
            machine.arena.retire(hpa, pages * PAGE_SIZE)
            os.ftruncate(fd, 0)
            os.close(fd)
    finally:
        stop.set()
        thread.join(10)
    assert machine.arena.statistics().placements == 1


def test_a_stale_access_after_retirement_is_no_signal(machine: Machine) -> None:
    """A dead file under a stale translation: zeros instead of SIGBUS."""
    fd = os.memfd_create("extent")
    os.ftruncate(fd, PAGE_SIZE)
    os.pwrite(fd, b"\x77", 0)
    hpa = machine.arena.place(fd, 0, PAGE_SIZE)
    machine.stage2.map(HEAP, hpa, 1)
    cpu = machine.boot(LOAD, rsi=HEAP)
    assert cpu.run() == HltExit()
    assert cpu.get_regs().rax == 0x77
    machine.stage2.zap(HEAP, 1)
    machine.arena.retire(hpa, PAGE_SIZE)
    os.ftruncate(fd, 0)
    os.close(fd)
    assert again(machine, 0, rsi=HEAP) == HltExit()
    assert cpu.get_regs().rax == 0


def test_closing_one_engine_leaves_the_other(machine: Machine) -> None:
    machine.boot(LOAD, cpu=1, rsi=HEAP)
    machine.cpus[0].close()
    assert machine.cpus[1].run() == HltExit()


def test_guest_tables_that_change_need_the_guests_own_flush(machine: Machine) -> None:
    """Invlpg in the guest is enough for the guest's own changes."""
    machine.write(IDT, bytes(16))
    # mov rax,[rsi]; mov [rdi],rbx; invlpg [rsi]; mov rcx,[rsi]; hlt
    code = bytes.fromhex("48 8b 06 48 89 1f 0f 01 3e 48 8b 0e f4")
    machine.write(HEAP, b"\x11")
    machine.write((2 << 20) + HEAP, b"\x22")
    cpu = machine.boot(code, rsi=(4 << 20) + HEAP, rdi=0x3010, rbx=(2 << 20) | 0x87)
    machine.write((4 << 20) + HEAP, b"\x44")
    assert cpu.run() == HltExit()
    assert (cpu.get_regs().rax, cpu.get_regs().rcx) == (0x44, 0x22)


MOV_EAX_HLT = "b8 %02x000000 f4"  # mov eax, N; hlt


def _code(value: int) -> bytes:
    return bytes.fromhex(MOV_EAX_HLT % value)


def test_a_zap_of_a_code_page_drops_its_code() -> None:
    with Machine() as machine:
        cpu = machine.boot(_code(1))
        cpu.run()
        machine.stage2.zap(TEXT, 1)
        machine.write(TEXT, _code(2))
        cpu.flush([(HEAP, 4), (TEXT, 1)])
        cpu.set_regs(Regs(rip=TEXT, rsp=STACK))
        cpu.run()
        assert cpu.get_regs().rax == 2


def test_a_zap_of_data_keeps_the_code() -> None:
    with Machine() as machine:
        cpu = machine.boot(_code(1))
        cpu.run()
        before = cpu._engine._translations
        machine.stage2.zap(HEAP, 4)
        cpu.flush([(HEAP, 4)])
        cpu.set_regs(Regs(rip=TEXT, rsp=STACK))
        cpu.run()
        assert cpu.get_regs().rax == 1
        assert cpu._engine._translations == before


def test_both_pages_of_a_block_count() -> None:
    """A block that begins in one page and ends in the next belongs to both."""
    with Machine() as machine:
        start = TEXT + PAGE_SIZE - 3  # mov's immediate lies in the next page
        cpu = machine.boot(_code(1), at=start)
        cpu.run()
        machine.stage2.zap(TEXT + PAGE_SIZE, 1)
        machine.write(start, _code(7))
        cpu.flush([(TEXT + PAGE_SIZE, 1)])
        assert not cpu._code.touched_by([(TEXT, 2)])  # all of it was dropped
        cpu.set_regs(Regs(rip=start, rsp=STACK))
        cpu.run()
        assert cpu.get_regs().rax == 7
