# SPDX-License-Identifier: GPL-2.0-or-later
"""Kicks: never lost, and always between two instructions."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable

import pytest

from hwemu.cpu import rawcontext
from hwemu.cpu.api import Access, CpuExit, HltExit, IoExit, KickExit, MmioExit, Stage2Fault
from hwemu.cpu.engine import Precise
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.testing import HEAP, PD, TEXT, Machine

# lock inc [rsi]; add [rsi+64],rax; mov rbx,1; lock xadd [rsi+128],rbx; inc [rsi+192];
# dec rcx; jnz; hlt
COUNTERS = bytes.fromhex(
    "f0 48 ff 06  48 01 46 40  48 c7 c3 01 00 00 00  f0 48 0f c1 9e 80 00 00 00"
    "48 ff 86 c0 00 00 00  48 ff c9  75 dc  f4"
)
SPIN = bytes.fromhex("eb fe")
DEVICE = 0x200_0000
HANDLER = 0x1_2000
MODES: list[Precise] = ["exit-request", "quanta"]


class Runner:
    """Runs a vCPU in its own thread until an exit that ``more`` does not want to go on after."""

    def __init__(self, cpu: SvmCpu, more: Callable[[CpuExit], bool]) -> None:
        self.kicks = 0
        self.last: CpuExit | None = None
        self.error: BaseException | None = None
        self._cpu = cpu
        self._more = more
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                self.last = self._cpu.run()
                self.kicks += isinstance(self.last, KickExit)
                if not self._more(self.last):
                    return
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


def storm(machine: Machine, loops: int) -> tuple[int, list[int]]:
    """Counters after ``loops`` rounds under kicks at random moments, and the kicks answered."""
    for at in range(0, 256, 64):
        machine.write(HEAP + at, bytes(8))
    cpu = machine.boot(COUNTERS, rcx=loops, rax=3, rsi=HEAP)
    runner = Runner(cpu, lambda exit_: isinstance(exit_, KickExit))
    chance = random.Random(1)
    while runner.thread.is_alive():
        cpu.kick()
        time.sleep(chance.random() * 4e-4)
    runner.join()
    assert runner.last == HltExit()
    return runner.kicks, [machine.word(HEAP + at) for at in range(0, 256, 64)]


def test_a_storm_of_kicks_repeats_no_instruction() -> None:
    loops = 3_000_000
    with Machine() as machine:
        kicks, counters = storm(machine, loops)
        assert counters == [loops, 3 * loops, loops, loops]
        assert kicks > 50


def test_slices_of_instructions_repeat_none_either() -> None:
    loops = 150_000
    with Machine(precise="quanta") as machine:
        kicks, counters = storm(machine, loops)
        assert counters == [loops, 3 * loops, loops, loops]
        assert kicks > 5


def test_without_the_cure_instructions_are_repeated() -> None:
    """The test of the test: the engine's own stops run a read-modify-write twice."""
    with Machine() as machine:
        engine = machine.cpu._engine
        byte = rawcontext.find_no_exit_request(engine._uc._uch.value, "2.1.4")
        ctypes.c_uint8.from_address(byte).value = 0
        for _ in range(20):
            loops = 500_000
            _, counters = storm(machine, loops)
            if counters != [loops, 3 * loops, loops, loops]:
                return
        pytest.fail("twenty storms without one repeated instruction")


def test_kicks_are_never_lost() -> None:
    """Each kick of a spinning guest is answered; one lost would hang here."""
    with Machine() as machine:
        cpu = machine.boot(SPIN)
        answered = threading.Semaphore(0)
        going = True

        def more(_: CpuExit) -> bool:
            answered.release()
            return going

        runner = Runner(cpu, more)
        for _ in range(2000):
            cpu.kick()
            assert answered.acquire(timeout=10)
        going = False
        cpu.kick()
        runner.join()
        assert runner.kicks == 2001
        assert cpu.get_regs().rip == TEXT


def test_a_kick_meets_a_run_that_is_just_beginning() -> None:
    """The engine forgets a stop that comes while it starts; the kick insists."""
    with Machine() as machine:
        cpu = machine.boot(SPIN)
        for _ in range(300):
            barrier = threading.Barrier(2)

            def run(barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                assert cpu.run() == KickExit()

            thread = threading.Thread(target=run)
            thread.start()
            barrier.wait()
            cpu.kick()
            thread.join(10)
            assert not thread.is_alive()


def test_a_kick_from_inside_a_fault_hook_is_seen() -> None:
    with Machine() as machine:
        machine.write(HEAP, b"\x01")
        cpu = machine.boot(bytes.fromhex("48 8b 06 eb fe"), rsi=HEAP)  # mov rax,[rsi]; spin
        real = machine.on_fault

        def hook(gpa: int, access: object) -> bool:
            if gpa == HEAP:
                cpu.kick()
            return real(gpa, access)  # type: ignore[arg-type]

        cpu._on_fault = hook
        assert cpu.run() == KickExit()


def test_kicks_from_many_threads_with_faults_between() -> None:
    pages = 400
    with Machine() as machine:
        # inc qword [rsi]; add rsi,4096; dec rcx; jnz; hlt
        cpu = machine.boot(
            bytes.fromhex("48 ff 06 48 81 c6 00 10 00 00 48 ff c9 75 f1 f4"),
            rcx=pages,
            rsi=0x100_0000,
        )
        machine.holes.update(range(0x1000, 0x1000 + pages, 2))

        def more(exit_: CpuExit) -> bool:
            if isinstance(exit_, Stage2Fault):
                page = exit_.gpa & ~0xFFF
                machine.stage2.map(page, machine.hpa + page, 1)
            return not isinstance(exit_, HltExit)

        runner = Runner(cpu, more)

        def kicker() -> None:
            while runner.thread.is_alive():
                cpu.kick()

        threads = [threading.Thread(target=kicker) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        runner.join()
        assert runner.last == HltExit()
        assert all(machine.word(0x100_0000 + page * 4096) == 1 for page in range(pages))


@pytest.mark.parametrize("precise", MODES)
def test_a_kick_that_waits_cuts_no_port_access_short(precise: Precise) -> None:
    """Although the step is translated afresh, and each translation is a hook, which may stop."""
    with Machine(precise=precise) as machine:
        # in al, dx; inc rbx; jmp back
        cpu = machine.boot(bytes.fromhex("ec 48 ff c3 eb fa"), rdx=0x3F8)
        for asked in range(4):
            assert cpu.run() == IoExit(0x3F8, 1, False)
            assert cpu.get_regs().rbx == asked
            cpu.complete(bytes([asked]))
            cpu.flush()
            cpu.kick()
            assert cpu.settle() == KickExit()
            regs = cpu.get_regs()
            assert (regs.rip, regs.rax & 0xFF) == (TEXT + 1, asked)
            assert cpu.run() == KickExit(), "the kick still waits for its answer"


@pytest.mark.parametrize("precise", MODES)
def test_a_kick_that_waits_cuts_no_device_access_short(precise: Precise) -> None:
    """Each load is a hook too, in the middle of an instruction that has yet to store."""
    with Machine(precise=precise) as machine:
        machine.holes.add(DEVICE >> 12)
        # inc qword [rsi]; jmp back
        cpu = machine.boot(bytes.fromhex("48 ff 06 eb fb"), rsi=DEVICE)
        for asked in range(4):
            fault = cpu.run()
            assert isinstance(fault, Stage2Fault)
            assert cpu.run_mmio(fault.gpa) == MmioExit(DEVICE, 8, False)
            cpu.complete(asked.to_bytes(8, "little"))
            cpu.flush()
            cpu.kick()
            assert cpu.settle() == MmioExit(DEVICE, 8, True, (asked + 1).to_bytes(8, "little"))
            assert cpu.settle() == KickExit()
            assert cpu.get_regs().rip == TEXT + 3
            assert cpu.run() == KickExit()


@pytest.mark.parametrize("precise", MODES)
def test_a_step_ends_where_its_instruction_faults(precise: Precise) -> None:
    """The handler is run like anything else, so that kicks reach it."""
    far = 2 << 21
    with Machine(precise=precise) as machine:
        machine.gate(14, HANDLER)
        machine.write(HANDLER, bytes.fromhex("48 ff c3 f4"))  # inc rbx; hlt
        assert machine.on_fault(HANDLER, Access.EXEC)  # or fetching it would end the step
        cpu = machine.boot(bytes.fromhex("ec eb fd"), at=far, rdx=0x3F8)  # in al, dx; jmp back
        assert cpu.run() == IoExit(0x3F8, 1, False)
        cpu.complete(b"\x01")
        machine.write(PD + 8 * (far >> 21), bytes(8))  # meanwhile another vCPU took its page away
        cpu.flush()
        assert cpu.settle() == KickExit()
        regs = cpu.get_regs()
        assert (regs.rip, regs.rbx, regs.rax) == (HANDLER, 0, 0)
        cpu.kick()
        assert [cpu.run(), cpu.run()] == [KickExit(), HltExit()]
        assert cpu.get_regs().rbx == 1
