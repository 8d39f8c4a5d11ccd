# SPDX-License-Identifier: GPL-2.0-or-later
"""gfn_to_pfn_cache: valid while nothing happened, and never longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from errno import EFAULT, EINVAL, EIO

import pytest

from hwemu.stage2 import Stage2
from kvmsim.effect import NeedPage, PageGrant, Retry, RetryReason
from kvmsim.gpc import GfnToPfnCache, Refreshed
from kvmsim.kind import KINDS
from kvmsim.mmu import Mmu
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import (
    EHWPOISON,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    PAGE_SIZE,
)
from kvmsim.vm import Vm

P = PAGE_SIZE
ARENA, RAM = 1 << 39, 1 << 38
BASE, NPAGES = 0x200, 64
SLOT = Region(0, KVM_MEM_GUEST_MEMFD, BASE * P, NPAGES * P, 0x1000 * P)
PLAIN = PrivateFile(7, NPAGES)
WHOLE = PrivateFile(7, NPAGES, GUEST_MEMFD_FLAG_MMAP)


class Ram:
    def hpa(self, page: int) -> int | None:
        return RAM + page * P if page != 0x1009 else None


class Pages:
    def __init__(self) -> None:
        self.newer = False
        self.here = True

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return (page, page) if self.newer else (start, end)

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * P if self.here else None


class World:
    def __init__(self, kind: str = "sw-protected", file: PrivateFile = PLAIN) -> None:
        self.pages, self.ram = Pages(), Ram()
        self.vm = Vm(Stage2(bytearray(64 * P), 1 << 28), self.pages, kind=KINDS[kind])
        self.file = file
        self.vm.set_user_memory_region2(SLOT, shared=self.ram, file=file)
        self.cache = GfnToPfnCache()

    @property
    def mmu(self) -> Mmu:
        return self.vm.mmu

    def activate(self, page: int = 3, offset: int = 8, length: int = 16) -> object:
        return self.cache.activate(self.mmu, (BASE + page) * P + offset, length)


def test_an_active_cache_knows_its_page() -> None:
    world = World()
    assert world.activate() == Refreshed(0, RAM + 0x1003 * P + 8)
    assert world.cache.check(world.mmu)
    assert world.cache.valid


@pytest.mark.parametrize(("offset", "length"), [(P - 8, 9), (0, P + 1), (0, 0), (5, -1)])
def test_nothing_over_a_page_boundary(offset: int, length: int) -> None:
    world = World()
    assert world.activate(0, offset, length) == Refreshed(EINVAL)
    assert not world.cache.active
    assert world.activate(0, P - 8, 8) == Refreshed(0, RAM + 0x1000 * P + P - 8)
    assert not world.cache.check(world.mmu, 9)
    assert world.cache.refresh(world.mmu, 9) == Refreshed(EINVAL)
    assert world.cache.check(world.mmu, 8)


def test_only_an_active_cache_can_be_used() -> None:
    world = World()
    assert world.cache.refresh(world.mmu) == Refreshed(EINVAL)
    assert not world.cache.check(world.mmu)
    world.activate()
    world.cache.deactivate(world.mmu)
    world.cache.deactivate(world.mmu)
    assert world.mmu.caches == []
    assert not world.cache.check(world.mmu)
    assert world.cache.refresh(world.mmu) == Refreshed(EINVAL)


@pytest.mark.parametrize("page", [NPAGES, 9])
def test_where_nothing_is_the_answer_is_efault_and_may_change(page: int) -> None:
    world = World()
    assert world.activate(page) == Refreshed(EFAULT)
    assert world.cache.active
    assert not world.cache.check(world.mmu)


TAKES: list[tuple[str, Callable[[World], object], bool]] = [
    ("attribute", lambda w: w.vm.set_memory_attributes((BASE + 3) * P, P, 8), True),
    ("neighbour", lambda w: w.vm.set_memory_attributes((BASE + 4) * P, P, 8), False),
    ("shared side", lambda w: w.vm.invalidate_shared(w.ram, 0x1000, 0x1010), True),
    ("another place", lambda w: w.vm.invalidate_shared(w.ram, 0x1004, 0x1010), False),
    ("its slot", lambda w: w.vm.set_user_memory_region2(replace(SLOT, memory_size=0)), True),
    ("another slot", lambda w: w.vm.set_user_memory_region2(Region(1, 0, 0, P)), True),
]


@pytest.mark.parametrize(("take", "taken"), [t[1:] for t in TAKES], ids=[t[0] for t in TAKES])
def test_what_takes_the_page_makes_it_invalid(take: Callable[[World], object], taken: bool) -> None:
    """Any change of slots does: kvm_gpc_check() compares their generation."""
    world = World()
    world.activate()
    take(world)
    assert world.cache.check(world.mmu) != taken


def test_it_is_invalid_before_the_bracket_is_left_and_not_refreshed_within() -> None:
    world = World()
    world.activate()
    change = world.vm.begin_set_memory_attributes((BASE + 3) * P, P, 8)
    assert not world.cache.check(world.mmu)
    assert world.cache.refresh(world.mmu) == Retry(RetryReason.IN_PROGRESS)
    world.vm.end(change)
    assert world.cache.refresh(world.mmu) == Refreshed(EFAULT), "private: not a device's"
    world.vm.set_memory_attributes((BASE + 3) * P, P, 0)
    assert world.cache.refresh(world.mmu) == Refreshed(0, RAM + 0x1003 * P + 8)


def test_a_moved_slot_is_followed() -> None:
    world = World()
    plain = Region(1, 0, 0, 16 * P, 0x2000 * P)
    world.vm.set_user_memory_region2(plain, shared=world.ram)
    assert world.cache.activate(world.mmu, P, 8) == Refreshed(0, RAM + 0x2001 * P)
    world.vm.set_user_memory_region2(replace(plain, guest_phys_addr=P), shared=world.ram)
    assert not world.cache.check(world.mmu)
    assert world.cache.refresh(world.mmu) == Refreshed(0, RAM + 0x2000 * P)


def test_a_read_only_slot_is_not_written() -> None:
    world = World()
    plain = Region(1, KVM_MEM_READONLY, 0, 16 * P, 0x2000 * P)
    world.vm.set_user_memory_region2(plain, shared=world.ram)
    world.cache.activate(world.mmu, 0, 8)
    assert world.cache.check(world.mmu)
    assert not world.cache.check(world.mmu, write=True)


# --- a slot that its file serves ------------------------------------------------------------------


def whole() -> World:
    return World("default", WHOLE)


def test_the_owner_is_asked_for_the_page_of_a_whole_slot() -> None:
    world = whole()
    assert world.activate() == NeedPage(7, 3, 3, 4, True)
    assert not world.cache.check(world.mmu)
    told = world.cache.page_arrived(world.mmu, PageGrant(7, 3, 4, 0, 1))
    assert told == Refreshed(0, ARENA + 3 * P + 8)
    assert world.cache.check(world.mmu, write=True)
    world.vm.invalidate_file(7, 3, 4)
    assert not world.cache.check(world.mmu)


def test_a_grant_that_came_too_late() -> None:
    world = whole()
    world.activate()
    world.vm.invalidate_file(7, 0, 8)
    late = PageGrant(7, 3, 4, 0, 1)
    assert world.cache.page_arrived(world.mmu, late) == Retry(RetryReason.INVALIDATED)
    assert world.cache.refresh(world.mmu) == NeedPage(7, 3, 3, 4, True)
    world.pages.newer = True
    assert world.cache.page_arrived(world.mmu, late) == Retry(RetryReason.NEWER)
    world.pages.newer, world.pages.here = False, False
    assert world.cache.page_arrived(world.mmu, late) == Retry(RetryReason.INSTANCE)
    assert not world.cache.valid


def test_what_the_owner_refuses() -> None:
    world = whole()
    world.activate()
    for grant, number in (
        (PageGrant(7, 3, 4, 0, 1, True, EIO), EIO),
        (PageGrant(7, 4, 5, 0, 1), EIO),
        (PageGrant(8, 3, 4, 0, 1), EIO),
    ):
        assert world.cache.page_arrived(world.mmu, grant) == Refreshed(number)
    told = world.cache.page_arrived(world.mmu, PageGrant(7, 3, 4, 0, 1, False))
    assert told == Refreshed(0, ARENA + 3 * P + 8)
    assert not world.cache.check(world.mmu, write=True)


def test_a_poisoned_page_and_a_file_that_is_gone() -> None:
    world = whole()
    world.vm.inject_memory_error(7, 3)
    assert world.activate() == Refreshed(EHWPOISON)
    world.vm.release_file(7)
    assert world.cache.refresh(world.mmu) == Refreshed(EFAULT)


def test_copies_belong_to_their_own_vm() -> None:
    world = World()
    world.activate()
    twin_vm = world.vm.copy(Stage2(bytearray(64 * P), 1 << 28), world.pages)
    twin = world.cache.copy(twin_vm.mmu)
    assert twin.key(twin_vm.mmu) == world.cache.key(world.mmu)
    twin_vm.set_memory_attributes((BASE + 3) * P, P, 8)
    assert world.cache.check(world.mmu)
    assert not twin.check(twin_vm.mmu)
    assert twin.key(twin_vm.mmu) != world.cache.key(world.mmu)
