# SPDX-License-Identifier: GPL-2.0-or-later
"""pre_fault_memory_test: map before the guest runs, while somebody deletes the slot.

After tools/testing/selftests/kvm/pre_fault_memory_test.c.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

import pytest
from selftests.guest import Player
from selftests.machine import Background, Machine

from kvmsim.api import GuestMemfd, Memory, Memslot, Vcpu, Vm
from kvmsim.uapi import KVM_PRE_FAULT_MEMORY, PAGE_SIZE, PRE_FAULT_MEMORY

RAM = 64 << 20
HUGE = 2 << 20
SIZE = HUGE + PAGE_SIZE
TYPES = ["default", "shared", "private"]


@dataclass
class Setup:
    """A VM whose slot 1 is to be mapped."""

    machine: Machine
    vm: Vm
    player: Player
    memory: Memory
    file: GuestMemfd | None
    private: bool

    def slot(self) -> Memslot:
        return self.vm.add_slot(RAM, self.memory, guest_memfd=self.file, slot=1)

    def faults(self) -> int:
        """How many faults the simulator's guest has had."""
        transport = self.machine.kvm.transport
        device = transport.process.caller.objects[self.vm.handle]  # type: ignore[attr-defined]
        faults: int = device.running.vm.statistics().faults
        return faults


def setup(machine: Machine, kind: str) -> Setup:
    machine.need_pre_fault()
    vm = machine.vm(private=kind != "default")
    (player,) = machine.players(vm)
    memory = machine.kvm.allocate(SIZE)
    file = None
    if kind != "default":
        machine.need_guest_memfd()
        file = vm.create_guest_memfd(SIZE)
    made = Setup(machine, vm, player, memory, file, kind == "private")
    made.slot()
    if kind == "private":
        vm.convert(RAM, SIZE, private=True)
    return made


def pre_fault(vcpu: Vcpu, machine: Machine, gpa: int, size: int) -> tuple[int, int, int]:
    """One call: errno, and gpa and size as they are then."""
    argument = bytearray(PRE_FAULT_MEMORY.pack(gpa, size, 0))
    number = 0
    try:
        machine.kvm.transport.ioctl(vcpu.handle, KVM_PRE_FAULT_MEMORY, argument)
    except OSError as error:
        number = error.errno or -1
    left: tuple[int, int, int] = PRE_FAULT_MEMORY.unpack(argument)
    assert left[0] + left[1] == gpa + size, "gpa moves as size shrinks"
    assert (number == 0) == (left[1] < size), "an error, or progress"
    return number, left[0], left[1]


def all_of_it(made: Setup, gpa: int, size: int) -> tuple[int, int]:
    """Call again until it is done or refused: errno and what is left."""
    number = 0
    while size and number == 0:
        number, gpa, size = pre_fault(made.player.vcpu, made.machine, gpa, size)
    return number, size


def while_it_is_deleted(made: Setup, gpa: int, size: int) -> None:
    """A slot that comes and goes: progress, EAGAIN, or that there is none.

    For a gfn that is private that is EFAULT (kvm_handle_noslot_fault()), else ENOENT.
    """
    missing = errno.EFAULT if made.private else errno.ENOENT
    enough = threading.Event()
    slot = next(slot for slot in made.vm.slots if slot.id == 1)

    def delete() -> int:
        nonlocal slot
        rounds = 0
        while not enough.is_set() or rounds < 3:
            slot.delete()
            slot = made.slot()
            rounds += 1
        return rounds

    deleting = Background(delete)
    try:
        for _ in range(30):
            number, _ = all_of_it(made, gpa, size)
            assert number in (0, errno.EAGAIN, errno.ENOENT, missing)
    finally:
        enough.set()
        assert deleting.end() >= 3


@pytest.fixture(params=TYPES)
def made(request: pytest.FixtureRequest, machine: Machine) -> Setup:
    return setup(machine, request.param)


def test_pre_fault_range(made: Setup) -> None:
    """2 MiB and the page behind: nothing is left, and the guest finds all of it mapped."""
    while_it_is_deleted(made, RAM, HUGE)
    script = made.player.script().marked(RAM, SIZE, 0)
    assert all_of_it(made, RAM, HUGE) == (0, 0)
    assert all_of_it(made, RAM + HUGE, PAGE_SIZE) == (0, 0)
    if made.machine.simulated:
        warm = made.player.script().sync()
        assert made.player.play(warm, on_sync=lambda *words: None) is None
        before = made.faults()
        assert made.player.play(script) is None
        assert made.faults() == before, "the guest had faults"
    assert made.player.play(script) is None
    if made.file is not None and made.machine.simulated:
        held = set(range(SIZE // PAGE_SIZE)) if made.private else set()
        assert made.machine.pages(made.file) == held


def test_pre_fault_range_half_outside(made: Setup) -> None:
    """Two pages from the last one on: one is mapped, then ENOENT with one left."""
    while_it_is_deleted(made, RAM + SIZE - PAGE_SIZE, 2 * PAGE_SIZE)
    assert all_of_it(made, RAM + SIZE - PAGE_SIZE, 2 * PAGE_SIZE) == (errno.ENOENT, PAGE_SIZE)
    assert made.player.play(made.player.script().marked(RAM + HUGE, PAGE_SIZE, 0)) is None


def test_pre_fault_range_outside(made: Setup) -> None:
    """Where no slot is nothing is done."""
    while_it_is_deleted(made, RAM + SIZE, PAGE_SIZE)
    assert all_of_it(made, RAM + SIZE, PAGE_SIZE) == (errno.ENOENT, PAGE_SIZE)
    assert all_of_it(made, RAM + SIZE, HUGE) == (errno.ENOENT, HUGE)
