# SPDX-License-Identifier: GPL-2.0-or-later
"""What a stranger would try with private memory, which the kernel at hand does not have."""

from __future__ import annotations

import errno
import threading

import pytest
from selftests.guest import GuestAssert, Player
from selftests.machine import Background, Machine, code

from kvmsim import exits
from kvmsim.api import Vm
from kvmsim.api.guest import Guest
from kvmsim.uapi import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_PRE_FAULT_MEMORY,
    PAGE_SIZE,
    PRE_FAULT_MEMORY,
)

RAM = 64 << 20
PAGES = 8
SIZE = PAGES * PAGE_SIZE
PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE


def fault(page: int, *, private: bool) -> exits.MemoryFaultExit:
    return exits.MemoryFaultExit(RAM + page * PAGE_SIZE, PAGE_SIZE, private, errno.EFAULT)


@pytest.fixture
def vm(machine: Machine) -> Vm:
    machine.need_guest_memfd()
    return machine.vm(private=True)


def mark(player: Player, page: int, value: int) -> exits.Exit | None:
    return player.play(player.script().mark(RAM + page * PAGE_SIZE, PAGE_SIZE, value))


def marked(player: Player, page: int, value: int) -> exits.Exit | None:
    return player.play(player.script().marked(RAM + page * PAGE_SIZE, PAGE_SIZE, value))


# --- attributes ---------------------------------------------------------------------------------


def test_attributes_that_are_refused(vm: Vm) -> None:
    """Nothing of a refused range is changed, and what is refused first is told."""
    top = (1 << 64) - PAGE_SIZE
    cases = {
        "flags": (RAM, SIZE, PRIVATE, 1), "readable": (RAM, SIZE, 1, 0),
        "readable too": (RAM, SIZE, PRIVATE | 1, 0), "bit 63": (RAM, SIZE, 1 << 63, 0),
        "size 0": (RAM, 0, PRIVATE, 0), "size 1": (RAM, 1, PRIVATE, 0),
        "gpa 1": (RAM + 1, SIZE, PRIVATE, 0), "wraps": (top, 2 * PAGE_SIZE, PRIVATE, 0),
        "wraps to 0": (top, PAGE_SIZE, PRIVATE, 0), "everything": (0, 1 << 63, PRIVATE, 3),
    }  # fmt: skip
    found = {name: code(lambda words=words: vm.set_memory_attributes(*words))
             for name, words in cases.items()}  # fmt: skip
    assert found == dict.fromkeys(cases, "EINVAL")


def test_attributes_over_holes_and_across_slots(machine: Machine, vm: Vm) -> None:
    """They are the VM's: a range may have no slot, two, and slots that come later."""
    (player,) = machine.players(vm)
    file, memory = vm.create_guest_memfd(SIZE), machine.kvm.allocate(SIZE)
    half = SIZE // 2
    vm.convert(RAM, 4 * SIZE, private=True)  # before there is any slot
    assert marked(player, 0, 0) == fault(0, private=True)
    for number, offset in ((1, 0), (2, half)):
        vm.add_slot(RAM + 2 * offset, memory, memory_offset=offset, size=half,
                    guest_memfd=file, offset=offset, slot=number)  # fmt: skip
    pages = [0, PAGES // 2 - 1, PAGES, PAGES + PAGES // 2 - 1]
    for page in pages:
        assert mark(player, page, page + 1) is None
    assert marked(player, PAGES // 2, 0) == fault(PAGES // 2, private=True), "the hole between"
    assert not any(memory.read(0, SIZE)), "it went into the file"
    # From the last page of the first slot on, over the hole, to the first page of the second.
    vm.convert(RAM + half - PAGE_SIZE, half + 2 * PAGE_SIZE, private=False)
    for page in pages:
        converted = page in (PAGES // 2 - 1, PAGES)
        assert marked(player, page, 0 if converted else page + 1) is None
    left = player.play(player.script().marked(RAM + half, PAGE_SIZE, 0))
    assert isinstance(left, exits.MmioExit), "shared, and no slot: a device"
    assert left.gpa == RAM + half
    player.vcpu.complete(bytes(8))
    assert player.resume() is None


def test_conversions_of_what_has_it_already(machine: Machine, vm: Vm) -> None:
    """No zap, no loss: a guest does not notice."""
    (player,) = machine.players(vm)
    file = vm.create_guest_memfd(SIZE)
    vm.add_slot(RAM, guest_memfd=file)
    vm.convert(RAM, SIZE, private=True)
    assert mark(player, 3, 77) is None
    for first, count in ((0, PAGES), (3, 1), (2, 3)):
        vm.convert(RAM + first * PAGE_SIZE, count * PAGE_SIZE, private=True)
        assert marked(player, 3, 77) is None


# --- exits --------------------------------------------------------------------------------------


def test_a_fault_that_user_space_answers_late(machine: Machine, vm: Vm) -> None:
    """KVM_RUN again without doing anything is the same exit; with a slot the access is done."""
    (player,) = machine.players(vm)
    vm.convert(RAM, SIZE, private=True)
    script = player.script().mark(RAM, PAGE_SIZE, 5).marked(RAM, PAGE_SIZE, 5)
    assert player.play(script) == fault(0, private=True)
    for _ in range(3):
        assert player.resume() == fault(0, private=True)
    player.vcpu.immediate_exit = True
    assert player.resume() == exits.InterruptedExit()
    player.vcpu.immediate_exit = False
    vm.add_slot(RAM, guest_memfd=vm.create_guest_memfd(SIZE))
    assert player.resume() is None


def test_exits_that_nobody_answers(machine: Machine, vm: Vm) -> None:
    """A hypercall and HLT: KVM_RUN again goes on behind them, the hypercall with 0."""
    (player,) = machine.players(vm)
    script = player.script().map_private(RAM, SIZE).map_shared(RAM, SIZE)
    left = player.play(script)
    assert left == exits.HypercallExit(12, (RAM, PAGES, 1 << 4, 0, 0, 0))
    player.vcpu.immediate_exit = True
    assert player.vcpu.run() == exits.InterruptedExit()
    player.vcpu.immediate_exit = False
    assert player.resume() == exits.HypercallExit(12, (RAM, PAGES, 0, 0, 0, 0))
    player.vcpu.complete(5)
    with pytest.raises(GuestAssert, match="0x5 instead of"):
        player.resume()
    guest = Guest(machine.kvm, machine.vm(), ring=0)
    guest.load(bytes.fromhex("f4 f4 e680 f4"))  # hlt; hlt; out 0x80, al; hlt
    vcpu = guest.slot.vm.create_vcpu()
    guest.enter(vcpu)
    found = [vcpu.run() for _ in range(4)]
    assert found == [exits.HltExit(), exits.HltExit(), exits.IoExit(0x80, 1, True, b"\0"),
                     exits.HltExit()]  # fmt: skip


def test_a_private_slot_without_a_shared_side(machine: Machine, vm: Vm) -> None:
    """userspace_addr 0: what is shared there is a bad address, private memory works."""
    (player,) = machine.players(vm)
    vm.add_slot(RAM, guest_memfd=vm.create_guest_memfd(SIZE))
    assert marked(player, 0, 0) == exits.BadHvaExit(0)
    vm.convert(RAM, SIZE, private=True)
    assert player.resume() is None


def test_the_file_is_gone(machine: Machine, vm: Vm) -> None:
    """The last descriptor closed: private accesses are exits, shared ones work, until deleted."""
    (player,) = machine.players(vm)
    file, memory = vm.create_guest_memfd(SIZE), machine.kvm.allocate(SIZE)
    slot = vm.add_slot(RAM, memory, guest_memfd=file)
    half = SIZE // 2
    vm.convert(RAM, half, private=True)
    assert mark(player, 0, 9) is None
    machine.close(file)
    assert marked(player, 0, 9) == fault(0, private=True)
    assert mark(player, PAGES // 2, 6) is None
    vm.convert(RAM, half, private=False)
    assert marked(player, 0, 0) is None
    slot.delete()
    assert isinstance(marked(player, 0, 0), exits.MmioExit)


def test_a_slot_that_goes_while_its_page_is_awaited(machine: Machine, vm: Vm) -> None:
    """Faults and deletions cross in any order: an exit or a page, and then it goes on."""
    (player,) = machine.players(vm)
    file = vm.create_guest_memfd(SIZE)
    for turn in range(30):
        slot = vm.add_slot(RAM, guest_memfd=file, slot=1)
        vm.convert(RAM, SIZE, private=True)
        file.discard(0, SIZE)
        ready = threading.Event()

        def run(turn: int = turn, ready: threading.Event = ready) -> exits.Exit | None:
            ready.set()
            return mark(player, turn % PAGES, turn)

        runner = Background(run)
        ready.wait()
        slot.delete()
        left = runner.end()
        assert left in (None, fault(turn % PAGES, private=True))
        if left is not None:
            again = vm.add_slot(RAM, guest_memfd=file, slot=1)
            assert player.resume() is None
            again.delete()


# --- faults beforehand --------------------------------------------------------------------------


def pre_fault(machine: Machine, player: Player, gpa: int, size: int, flags: int = 0) -> str:
    """The answer, and what is left."""
    argument = bytearray(PRE_FAULT_MEMORY.pack(gpa, size, flags))
    answer = code(
        lambda: machine.kvm.transport.ioctl(player.vcpu.handle, KVM_PRE_FAULT_MEMORY, argument)
    )
    left_gpa, left_size, _ = PRE_FAULT_MEMORY.unpack(argument)
    assert left_gpa + left_size == gpa + size
    return f"{answer} {left_size // PAGE_SIZE}"


def test_how_far_a_fault_beforehand_comes(machine: Machine, vm: Vm) -> None:
    """Over private and shared pages, into what nobody has, from the middle of a hole."""
    machine.need_pre_fault()
    (player,) = machine.players(vm)
    file, memory = vm.create_guest_memfd(SIZE), machine.kvm.allocate(SIZE)
    vm.add_slot(RAM, memory, guest_memfd=file)
    vm.convert(RAM + 2 * PAGE_SIZE, 2 * PAGE_SIZE, private=True)
    assert pre_fault(machine, player, RAM, SIZE) == "0 0"
    assert machine.pages(file) == {2, 3}
    assert pre_fault(machine, player, RAM + SIZE - PAGE_SIZE, 3 * PAGE_SIZE) == "0 2"
    assert pre_fault(machine, player, RAM + SIZE, 2 * PAGE_SIZE) == "ENOENT 2"
    vm.convert(RAM + SIZE, PAGE_SIZE, private=True)
    assert pre_fault(machine, player, RAM + SIZE, 2 * PAGE_SIZE) == "EFAULT 2", "private, no slot"
    assert pre_fault(machine, player, 1 << 50, PAGE_SIZE) == "ENOENT 1"
    machine.close(file)
    assert pre_fault(machine, player, RAM, SIZE) == f"0 {PAGES - 2}"
    assert pre_fault(machine, player, RAM + 2 * PAGE_SIZE, PAGE_SIZE) == "EFAULT 1"


def test_faults_beforehand_that_are_refused(machine: Machine, vm: Vm) -> None:
    """Flags, alignment, nothing at all; and no page is allocated for a refused one."""
    machine.need_pre_fault()
    (player,) = machine.players(vm)
    file = vm.create_guest_memfd(SIZE)
    vm.add_slot(RAM, guest_memfd=file)
    vm.convert(RAM, SIZE, private=True)
    refused = [
        (RAM, SIZE, 1), (RAM, SIZE, 1 << 63), (RAM + 1, SIZE, 0), (RAM, SIZE + 1, 0), (RAM, 0, 0),
    ]  # fmt: skip
    for gpa, size, flags in refused:
        assert pre_fault(machine, player, gpa, size, flags).startswith("EINVAL"), (gpa, size)
    assert machine.pages(file) == set()
