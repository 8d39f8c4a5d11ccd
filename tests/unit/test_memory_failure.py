# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that goes away or fails under a slot; defects of the July 2022 series, not repeated."""

from __future__ import annotations

from dataclasses import replace
from errno import EFAULT, EFBIG, EINVAL, EIO, ENOMEM

import pytest

from hwemu.stage2 import Stage2, WalkError
from kvmsim.attributes import Attributes
from kvmsim.exits import MemoryFaultExit, MmioExit
from kvmsim.fault import Access, Effect, Fault, Installed, LeaveGuest, NeedPage, PageGrant, Retry
from kvmsim.kind import KINDS
from kvmsim.poison import Poison
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import (
    ABIS,
    EHWPOISON,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    PAGE_SIZE,
    Abi,
    KvmError,
)
from kvmsim.vm import Vm, Zapped

P = PAGE_SIZE
ARENA, RAM = 1 << 39, 1 << 38
FILE = 7
SLOT = Region(0, KVM_MEM_GUEST_MEMFD, 0x200 * P, 0x400 * P, 0x1000 * P)  # file pages from 0
SHARED = 1 << 39


class Ram:
    def hpa(self, page: int) -> int | None:
        return RAM + page * P


class Pages:
    """A file of which ``allocated`` pages are granted around the one that is asked for."""

    def __init__(self) -> None:
        self.failing = 0
        self.asked = 0

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * P


class World:
    def __init__(self, abi: Abi = "upstream", *, kind: str = "shared-bit", flags: int = 0) -> None:
        self.table = Stage2(bytearray(64 * P), 1 << 28)
        self.pages = Pages()
        self.ram = Ram()
        self.file = PrivateFile(FILE, 0x400, flags)
        self.vm = Vm(self.table, self.pages, abi=abi, kind=KINDS[kind], max_level=2)
        self.vm.set_user_memory_region2(SLOT, shared=self.ram, file=self.file)
        if self.vm.kind.private_memory:
            self.private()

    def private(self) -> None:
        size = SLOT.memory_size
        if self.vm.abi == "v7":
            self.vm.encrypt_region(SLOT.guest_phys_addr, size, private=True)
        else:
            self.vm.set_memory_attributes(SLOT.guest_phys_addr, size, 8)

    def touch(self, page: int, *, write: bool = False, npages: int = 1) -> Effect:
        fault = Fault(0, SLOT.guest_phys_addr + page * P, Access(write=write))
        effect = self.vm.begin_fault(fault)
        for _ in range(8):
            if not isinstance(effect, NeedPage):
                return effect
            self.pages.asked += 1
            start, end = max(effect.start, page), min(effect.end, page + npages)
            status = self.pages.failing
            effect = self.vm.page_arrived(fault, PageGrant(FILE, start, end, 0, 1, True, status))
            if isinstance(effect, Retry):
                effect = self.vm.begin_fault(fault)
        raise AssertionError("the vCPU spins")

    def mapped(self, page: int) -> bool:
        try:
            return bool(self.table.walk(SLOT.guest_phys_addr + page * P).hpa)
        except WalkError:
            return False


def number_of(effect: Effect) -> int | None:
    assert isinstance(effect, LeaveGuest), effect
    assert isinstance(effect.exit, MemoryFaultExit), effect
    return effect.exit.errno


# --- defects of v7 ----------------------------------------------------------------------------


@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_v7_defect_no_memory_made_the_vcpu_spin(abi: Abi) -> None:
    """memfile_get_pfn() failing was RET_PF_RETRY: the same fault for ever."""
    world = World(abi)
    world.pages.failing = ENOMEM
    assert number_of(world.touch(5)) == ENOMEM
    assert world.pages.asked == 1
    world.pages.failing = 0
    assert isinstance(world.touch(5), Installed)


@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_v7_defect_a_slot_beyond_its_file_allocated_there(abi: Abi) -> None:
    """The check of i_size was skipped for SGP_WRITE: the file had pages past its end."""
    world = World(abi)
    world.pages.failing = EFBIG
    assert number_of(world.touch(0x3FF, write=True)) == EFAULT
    assert not world.mapped(0x3FF)


@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_v7_defect_a_huge_page_punched_in_part_stayed_mapped(abi: Abi) -> None:
    """A folio that could not be split was freed in part without a notification of the rest."""
    world = World(abi)
    world.touch(0, npages=512)
    assert world.table.statistics().large_leaves == 1
    zapped = world.vm.invalidate_file(FILE, 17, 18)
    assert zapped == Zapped(((SLOT.guest_phys_addr, 512),), 512)
    assert not world.mapped(17)


# --- the file goes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flags", "private"),
    [("shared-bit", 0, True), ("sw-protected", 0, True), ("default", GUEST_MEMFD_FLAG_MMAP, False)],
)
def test_a_file_that_is_gone_is_an_exit_until_the_slot_is_deleted(
    kind: str, flags: int, private: bool
) -> None:
    """As measured: the last close, then -1 EFAULT with KVM_EXIT_MEMORY_FAULT; never MMIO."""
    world = World(kind=kind, flags=flags)
    world.touch(5)
    assert world.vm.release_file(FILE).leaves == 1
    assert not world.mapped(5)
    for _ in range(2):
        effect = world.touch(5)
        assert number_of(effect) == EFAULT
        assert isinstance(effect, LeaveGuest)
        assert isinstance(effect.exit, MemoryFaultExit)
        assert effect.exit.private == private
        assert world.pages.asked == 1
    world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    if private:
        assert number_of(world.touch(5)) == EFAULT
    else:
        gone = world.touch(5)
        assert isinstance(gone, LeaveGuest)
        assert isinstance(gone.exit, MmioExit)


def test_shared_memory_of_a_slot_stays_when_its_file_goes() -> None:
    world = World()
    world.vm.set_memory_attributes(SLOT.guest_phys_addr, P, 0)
    world.vm.release_file(FILE)
    fault = Fault(0, SLOT.guest_phys_addr | SHARED)
    assert isinstance(world.vm.begin_fault(fault), Installed)


def test_a_slot_without_its_file_is_still_none_that_can_be_changed() -> None:
    world = World()
    world.vm.release_file(FILE)
    for region in (SLOT, replace(SLOT, flags=0), replace(SLOT, guest_phys_addr=0)):
        with pytest.raises(KvmError) as caught:
            world.vm.set_user_memory_region2(region, shared=world.ram, file=world.file)
        assert caught.value.errno == EINVAL


def test_pages_of_a_file_that_went_are_bound_to_nothing() -> None:
    world = World()
    world.vm.release_file(FILE)
    assert world.vm.invalidate_file(FILE, 0, 0x400) == Zapped()
    again = replace(SLOT, slot=1, guest_phys_addr=0x800 * P)
    world.vm.set_user_memory_region2(again, shared=world.ram, file=world.file)


def test_a_file_that_goes_during_the_wait() -> None:
    world = World()
    fault = Fault(0, SLOT.guest_phys_addr)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    world.vm.release_file(FILE)
    assert number_of(world.vm.page_arrived(fault, PageGrant(FILE, 0, 1, 0, 1))) == EFAULT
    assert not world.mapped(0)


def test_v7_slots_keep_their_file() -> None:
    with pytest.raises(RuntimeError, match="keeps its file"):
        World("v7").vm.release_file(FILE)


# --- the memory fails -------------------------------------------------------------------------


@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_a_memory_error_zaps_the_page_and_every_later_fault_is_ehwpoison(abi: Abi) -> None:
    world = World(abi)
    world.touch(5)
    seq = world.vm.mmu.invalidate.seq
    assert world.vm.inject_memory_error(FILE, 5).leaves == 1
    assert world.vm.mmu.invalidate.seq == seq + 1
    for _ in range(3):
        assert number_of(world.touch(5)) == EHWPOISON
    assert world.pages.asked == 1, "the owner is not asked for a page that is bad"
    assert isinstance(world.touch(6), Installed)


def test_neighbours_are_mapped_around_a_poisoned_page() -> None:
    world = World()
    world.vm.inject_memory_error(FILE, 5)
    assert world.touch(2, npages=512) == Installed(SLOT.guest_phys_addr + 2 * P, 3)
    assert world.touch(7, npages=512) == Installed(SLOT.guest_phys_addr + 7 * P, 512 - 7)
    assert not world.mapped(5)


def test_a_memory_error_during_the_wait() -> None:
    world = World()
    fault = Fault(0, SLOT.guest_phys_addr)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    world.vm.inject_memory_error(FILE, 0)
    assert number_of(world.vm.page_arrived(fault, PageGrant(FILE, 0, 8, 0, 1))) == EHWPOISON
    assert not world.mapped(0)


def test_a_page_that_was_given_back_is_another_page() -> None:
    world = World()
    world.vm.inject_memory_error(FILE, 5)
    world.vm.invalidate_file(FILE, 0, 10)
    assert number_of(world.touch(5)) == EHWPOISON, "zapped, not freed"
    world.vm.freed(FILE, 0, 10)
    assert isinstance(world.touch(5), Installed)


def test_deleting_the_slot_does_not_mend_the_page() -> None:
    world = World()
    world.vm.inject_memory_error(FILE, 5)
    world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    world.vm.set_user_memory_region2(SLOT, shared=world.ram, file=world.file)
    assert number_of(world.touch(5)) == EHWPOISON


def test_poison_is_part_of_the_state() -> None:
    world = World()
    twin = world.vm.copy(world.table, world.pages)
    world.vm.inject_memory_error(FILE, 5)
    assert twin.mmu.poison.key() == () != world.vm.mmu.poison.key()
    assert twin.key() != world.vm.key()


def test_poison_clips_to_the_nearest_on_either_side() -> None:
    poison = Poison()
    for page in (3, 7, 20):
        poison.add(1, page)
    assert poison.clip(1, 10, 0, 32) == (8, 20)
    assert poison.clip(1, 10, 9, 12) == (9, 12)
    assert poison.clip(2, 10, 0, 32) == (0, 32)
    poison.freed(1, 0, 8)
    assert poison.clip(1, 10, 0, 32) == (0, 20)
    assert (1, 20) in poison
    assert (1, 7) not in poison
    poison.freed(1, 0, 64)
    assert poison.key() == Poison().key()


@pytest.mark.parametrize("status", [EIO, EHWPOISON])
def test_what_the_owner_says_of_a_page_is_told(status: int) -> None:
    world = World()
    world.pages.failing = status
    assert number_of(world.touch(5)) == status
    assert ABIS["upstream"].conversion_errno == EFAULT  # which the VMM can tell from a conversion


def test_a_change_that_fails_at_its_end_leaves_the_vm_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.touch(5)

    def fail(self: Attributes, start: int, end: int, value: int) -> bool:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Attributes, "set", fail)
        with pytest.raises(MemoryError):
            world.vm.set_memory_attributes(SLOT.guest_phys_addr, P, 0)
    assert world.vm.mmu.invalidate.in_progress == 0
    assert world.vm.mmu.attributes.get(0x200) == 8
    assert isinstance(world.touch(5), Installed)
    world.vm.set_memory_attributes(SLOT.guest_phys_addr, P, 0)
