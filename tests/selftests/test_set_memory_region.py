# SPDX-License-Identifier: GPL-2.0-or-later
"""set_memory_region_test: slots that are refused, overlap, move and go.

After tools/testing/selftests/kvm/set_memory_region_test.c.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from selftests.guest import Player
from selftests.machine import Background, Machine, code

from kvmsim import exits
from kvmsim.api import Dtable, Memory, Vm
from kvmsim.api.guest import Guest
from kvmsim.uapi import (
    KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_READONLY_MEM,
    KVM_CAP_USER_MEMORY2,
    KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    requests,
)

RAM = 64 << 20
SLOT = 1
MMIO = 0xDEAD_BEEF_0BAD


def test_zero_memory_regions(machine: Machine) -> None:
    """A VM without a slot: its first instruction cannot be had."""
    vm = machine.vm()
    # Else a KVM that shadows page tables has no page for them: as many as slots suggest (ENOSPC).
    machine.kvm.transport.ioctl(vm.handle, requests.KVM_SET_NR_MMU_PAGES, 64)
    left = vm.create_vcpu().run()
    assert isinstance(left, exits.InternalErrorExit), left
    assert left.suberror == KVM_INTERNAL_ERROR_EMULATION


@pytest.mark.parametrize("private", [False, True], ids=["default", "protected"])
def test_invalid_memory_region_flags(machine: Machine, private: bool) -> None:
    """Flags of the second ioctl in the first, and flags that are none."""
    vm = machine.vm(private=private)
    memory = machine.kvm.allocate(PAGE_SIZE)
    supported = KVM_MEM_LOG_DIRTY_PAGES
    if vm.check_extension(KVM_CAP_READONLY_MEM):
        supported |= KVM_MEM_READONLY
    for bit in range(32):
        flag = 1 << bit
        if flag & supported:
            continue
        region = (SLOT, RAM, PAGE_SIZE, memory.address, flag)
        assert code(lambda region=region: vm.set_user_memory_region(*region)) == "EINVAL", hex(flag)
        if flag != KVM_MEM_GUEST_MEMFD and vm.check_extension(KVM_CAP_USER_MEMORY2):
            found = code(lambda region=region: vm.set_user_memory_region2(*region))
            assert found == "EINVAL", hex(flag)
    machine.need_guest_memfd()
    file = vm.create_guest_memfd(PAGE_SIZE)
    for flag in (KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY):
        flags = KVM_MEM_GUEST_MEMFD | flag
        region = (SLOT, RAM, PAGE_SIZE, memory.address, flags)
        found = code(
            lambda region=region: vm.set_user_memory_region2(*region, guest_memfd=file.handle)
        )
        assert found == "EINVAL", hex(flags)


@pytest.mark.parametrize("private", [False, True], ids=["default", "protected"])
@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(600)]), 101]
)
def test_add_max_memory_regions(machine: Machine, private: bool, step: int) -> None:
    """As many slots as the capability says, and not one more; all, or each 101st."""
    vm = machine.vm(private=private)
    count = machine.kvm.check_extension(KVM_CAP_NR_MEMSLOTS)
    assert count > 0
    memory = machine.kvm.allocate(count * PAGE_SIZE)
    for slot in {*range(0, count, step), count - 1}:
        offset = slot * PAGE_SIZE
        vm.set_user_memory_region(slot, RAM + offset, PAGE_SIZE, memory.address + offset)
    above = RAM + count * PAGE_SIZE
    more = (count, above, PAGE_SIZE, memory.address)
    assert code(lambda: vm.set_user_memory_region(*more)) == "EINVAL"


def bind(vm: Vm, fd: int, offset: int = 0, *, gpa: int = RAM, size: int, slot: int = SLOT) -> str:
    return code(
        lambda: vm.set_user_memory_region2(
            slot, gpa, size, 0, KVM_MEM_GUEST_MEMFD, guest_memfd=fd, guest_memfd_offset=offset
        )
    )


@pytest.mark.parametrize("private", [False, True], ids=["default", "protected"])
def test_add_private_memory_region(machine: Machine, private: bool) -> None:
    """Only a guest_memfd of this VM, and from aligned offsets."""
    machine.need_guest_memfd()
    vm = machine.vm(private=private)
    size = 2 * PAGE_SIZE
    plain = os.memfd_create("plain")
    try:
        assert bind(vm, machine.kvm.handle, size=size) == "EINVAL", "/dev/kvm"
        assert bind(vm, vm.handle, size=size) == "EINVAL", "the VM"
        assert bind(vm, plain, size=size) == "EINVAL", "a memfd"
    finally:
        os.close(plain)
    with machine.kvm.create_vm(vm.type) as other, other.create_guest_memfd(size) as theirs:
        assert bind(vm, theirs.handle, size=size) == "EINVAL", "another VM's"
    file = vm.create_guest_memfd(4 * PAGE_SIZE)
    for offset in range(1, PAGE_SIZE):
        assert bind(vm, file.handle, offset, size=size) == "EINVAL", offset
    assert bind(vm, file.handle, size=size) == "0"


@pytest.mark.parametrize("private", [False, True], ids=["default", "protected"])
def test_add_overlapping_private_memory_regions(machine: Machine, private: bool) -> None:
    """Neither guest addresses nor pages of the file belong to two slots."""
    machine.need_guest_memfd()
    vm = machine.vm(private=private)
    size = 2 * PAGE_SIZE
    file = vm.create_guest_memfd(4 * size)
    fd = file.handle
    assert bind(vm, fd, size=size) == "0"
    assert bind(vm, fd, size, gpa=RAM + size, size=size, slot=SLOT + 1) == "0"
    # The same slot, gone: its range is free again.
    vm.set_user_memory_region(SLOT, RAM, 0, 0)
    assert bind(vm, fd, gpa=RAM + size // 2, size=size) == "EEXIST", "front half"
    assert bind(vm, fd, 2 * size, gpa=RAM + size + size // 2, size=size) == "EEXIST", "back half"
    assert bind(vm, fd, 2 * size, gpa=RAM, size=2 * size) == "EEXIST", "whole"
    assert bind(vm, fd, size // 2, gpa=RAM - size, size=size) == "EINVAL", "of the file"
    assert bind(vm, fd, gpa=RAM, size=size) == "0"


# --- a guest that runs meanwhile ----------------------------------------------------------------


@contextlib.contextmanager
def spinning(machine: Machine) -> Iterator[tuple[Vm, Player, Memory]]:
    """A guest, and two pages that it can spin on: the words 1 and 2."""
    vm = machine.vm()
    (player,) = machine.players(vm)
    memory = machine.kvm.allocate(3 * PAGE_SIZE)
    for page in range(3):
        memory.write(page * PAGE_SIZE, struct.pack("<Q", page + 1))
    yield vm, player, memory


def answering(player: Player, mmio: list[int]) -> exits.Exit | None:
    """Run; a load from where no slot is finds ``MMIO``."""
    while True:
        left = player.resume()
        if not isinstance(left, exits.MmioExit):
            return left
        assert (left.gpa, left.length, left.write) == (RAM, 8, False)
        mmio.append(left.gpa)
        player.vcpu.complete(struct.pack("<Q", MMIO))


def test_move_memory_region(machine: Machine) -> None:
    """While its slot moves a guest sees the old page, nothing, or the new page; no other."""
    with spinning(machine) as (vm, player, memory):
        vm.set_user_memory_region(SLOT, RAM, 2 * PAGE_SIZE, memory.address)
        for turn in range(10):
            seen = turn % 2 + 1  # the word that the guest sees before
            mmio: list[int] = []
            player.start(player.script().wait_while(RAM, seen))
            runner = Background(lambda mmio=mmio: answering(player, mmio))
            gpa = RAM if turn % 2 else RAM - PAGE_SIZE
            vm.set_user_memory_region(SLOT, gpa, 2 * PAGE_SIZE, memory.address)
            assert runner.end() is None
            if player.result == MMIO:  # it looked while the slot was nowhere
                assert mmio == [RAM]
            else:
                assert player.result == 3 - seen


@pytest.mark.logs("is a device: no code and no page table can be there")
def test_delete_memory_region(machine: Machine) -> None:
    """A device while it is deleted, zeros when it is made anew, and no way on without code."""
    with spinning(machine) as (vm, player, memory):
        vm.set_user_memory_region(SLOT, RAM, PAGE_SIZE, memory.address)
        mmio: list[int] = []
        player.start(player.script().wait_while(RAM, 1))
        runner = Background(lambda: answering(player, mmio))
        vm.set_user_memory_region(SLOT, RAM, 0, 0)
        assert runner.end() is None
        assert (mmio, player.result) == ([RAM], MMIO)

        fresh = machine.kvm.allocate(PAGE_SIZE)
        vm.set_user_memory_region(SLOT, RAM, PAGE_SIZE, fresh.address)
        assert player.play(player.script().wait_while(RAM, 1)) is None
        assert player.result == 0

        player.start(player.script().wait_while(RAM, 0))
        runner = Background(player.resume)
        vm.slots[0].delete()  # its code and tables
        left = runner.end()
        if isinstance(left, exits.InternalErrorExit):
            assert left.suberror == KVM_INTERNAL_ERROR_EMULATION
        else:
            assert left == exits.ShutdownExit()


@pytest.mark.logs("no event can be delivered to it")
def test_mmio_during_vectoring(machine: Machine) -> None:
    """An exception is to be delivered through a table where no memory is: the guest cannot go on.

    The table's gpa is the fourth word of what is said about it.
    """
    if machine.ring == 3:
        pytest.skip("a guest in ring 0 (a KVM with a second stage)")
    vm = machine.vm()
    guest = Guest(machine.kvm, vm, ring=0)
    guest.load(bytes.fromhex("0f0bf4"))  # ud2; hlt
    vcpu = vm.create_vcpu()
    guest.enter(vcpu)
    vcpu.sregs = replace(vcpu.sregs, idt=Dtable(RAM, PAGE_SIZE - 1))
    left = vcpu.run()
    assert isinstance(left, exits.InternalErrorExit)
    assert left.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV
    assert left.data[3] == RAM + 6 * 16
