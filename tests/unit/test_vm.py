# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM as a whole: what each change zaps, what a fault then finds, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from errno import EEXIST, EFAULT, EINVAL, ENOMEM, ENOTTY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwemu.stage2 import Stage2, WalkError
from kvmsim.exits import BadHvaExit, MemoryFaultExit, MmioExit
from kvmsim.fault import (
    Access,
    Effect,
    Fault,
    Installed,
    LeaveGuest,
    NeedPage,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.kind import MAX_GFN, SHARED_BIT
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import ABIS, KVM_MEM_GUEST_MEMFD, PAGE_SIZE, Abi, KvmError
from kvmsim.vm import MemoryUse, Vm, Zapped
from privfs.notifier.user import User
from privfs.notifier.wire import Flag, Op, Reason, Record

P = PAGE_SIZE
GM = KVM_MEM_GUEST_MEMFD
FILE = PrivateFile(7, 1024)
INSTANCE = 1
ARENA = 1 << 39
RAM = 1 << 38
BASE = 0x100
SLOT = Region(0, GM, BASE * P, 64 * P, 0x1000 * P, 32 * P)


class Ram:
    """A linear shared side of which ``size`` pages from 0x1000 exist."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def hpa(self, page: int) -> int | None:
        return RAM + page * P if 0x1000 <= page < 0x1000 + self.size else None


class Pages:
    """The notifier's real user side, with one extent instance at ARENA."""

    def __init__(self) -> None:
        self.user = User()
        self.seq = 0
        request = self.user.register()
        self.user.received(
            Record(Op.REGISTERED, req=request.req, obj=FILE.id, start=1, end=FILE.npages)
        )

    def invalidated(self, start: int, end: int) -> None:
        self.seq += 1
        self.user.received(
            Record(Op.INVALIDATE, Flag.NONE, Reason.PUNCH, 0, FILE.id, start, end, self.seq)
        )

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return self.user.installable(file, page, start, end, seq)

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * P if instance == INSTANCE else None


class World:
    """A VM over the real table and the real user side."""

    def __init__(self, abi: Abi = "upstream", *, tables: int = 64) -> None:
        self.table = Stage2(bytearray(tables * P), 1 << 28)
        self.pages = Pages()
        self.ram = Ram()
        self.vm = Vm(self.table, self.pages, abi=abi, around=4, window=8)
        self.vm.set_user_memory_region2(SLOT, shared=self.ram, file=FILE)

    def private(self, first: int, last: int) -> Zapped:
        if self.vm.abi == "v7":
            return self.vm.encrypt_region(first * P, (last - first) * P, private=True)
        return self.vm.set_memory_attributes(first * P, (last - first) * P, 8)

    def answer(self, needed: NeedPage, *, wide: bool = False, seq: int | None = None) -> PageGrant:
        start, end = (needed.start, needed.end) if wide else (needed.page, needed.page + 1)
        at = self.pages.seq if seq is None else seq
        return PageGrant(needed.file, start, end, at, INSTANCE)

    def touch(self, gfn: int, *, private: bool, wide: bool = False) -> Effect:
        fault = Fault(0, gfn * P | (0 if private else SHARED_BIT))
        effect = self.vm.begin_fault(fault)
        if isinstance(effect, NeedPage):
            effect = self.vm.page_arrived(fault, self.answer(effect, wide=wide))
        return effect

    def walk(self, gfn: int, *, private: bool) -> int | None:
        try:
            return self.table.walk(gfn * P | (0 if private else SHARED_BIT)).hpa
        except WalkError:
            return None


def convert(private: bool) -> Callable[[Effect], bool]:
    def told(effect: Effect) -> bool:
        return (
            isinstance(effect, LeaveGuest)
            and isinstance(effect.exit, MemoryFaultExit)
            and effect.exit.private == private
        )

    return told


@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_life_of_a_page(abi: Abi) -> None:
    world = World(abi)
    gfn = BASE + 5
    assert convert(private=True)(world.touch(gfn, private=True))
    assert isinstance(world.touch(gfn, private=False), Installed)
    assert world.walk(gfn, private=False) == RAM + (0x1000 + 5) * P

    # Conversion takes the shared leaf away.
    zapped = world.private(gfn, gfn + 1)
    assert zapped == Zapped(((gfn * P, 1), (gfn * P | SHARED_BIT, 1)), 1)
    assert world.walk(gfn, private=False) is None
    assert convert(private=False)(world.touch(gfn, private=False))
    assert isinstance(world.touch(gfn, private=True), Installed)
    assert world.walk(gfn, private=True) == ARENA + (32 + 5) * P

    # A punch takes the private leaf away; the next touch asks for a page again.
    assert world.vm.invalidate_file(FILE.id, 0, FILE.npages) == Zapped(((BASE * P, 64),), 1)
    assert world.walk(gfn, private=True) is None
    assert isinstance(world.touch(gfn, private=True), Installed)

    # And deleting the slot takes everything: the page and its three shared neighbours.
    gone = world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    assert gone == Zapped(((BASE * P, 64), (BASE * P | SHARED_BIT, 64)), 4)
    expected = convert(True) if abi == "upstream" else _is_mmio
    assert expected(world.touch(gfn, private=True))


def _is_mmio(effect: Effect) -> bool:
    return isinstance(effect, LeaveGuest) and isinstance(effect.exit, MmioExit)


def test_conversion_back_takes_the_private_leaf() -> None:
    world = World()
    world.private(BASE, BASE + 64)
    assert world.touch(BASE + 9, private=True, wide=True) == Installed((BASE + 8) * P, 8)
    zapped = world.vm.set_memory_attributes((BASE + 10) * P, 2 * P, 0)
    assert zapped.leaves == 2
    left = [gfn for gfn in range(BASE, BASE + 64) if world.walk(gfn, private=True) is not None]
    assert left == [BASE + 8, BASE + 9, *range(BASE + 12, BASE + 16)]


def test_equal_attributes_change_nothing_upstream_but_zap_in_v7() -> None:
    world = World()
    world.private(BASE, BASE + 4)
    world.touch(BASE, private=True)
    seq = world.vm.mmu.invalidate.seq
    assert world.private(BASE, BASE + 4) == Zapped()
    assert world.vm.mmu.invalidate.seq == seq
    assert world.walk(BASE, private=True) is not None

    world = World("v7")
    world.private(BASE, BASE + 4)
    world.touch(BASE, private=True)
    assert world.private(BASE, BASE + 4).leaves == 1
    assert world.walk(BASE, private=True) is None


def test_attributes_without_a_slot_and_beyond_all_slots() -> None:
    world = World()
    assert world.private(0x9000, 0x9001).leaves == 0
    assert world.vm.mmu.attributes.get(0x9000) == 8
    # What lies above the shared bit is stored, as in KVM, and has nothing to zap.
    assert world.private(MAX_GFN - 1, MAX_GFN + 5).ranges == (
        ((MAX_GFN - 1) * P, 1),
        ((MAX_GFN - 1) * P | SHARED_BIT, 1),
    )
    assert world.private(MAX_GFN + 10, MAX_GFN + 11).ranges == ()
    assert world.vm.mmu.attributes.get(MAX_GFN + 10) == 8


@pytest.mark.parametrize("address_size", [(1, P), (0, 0), (0, P + 1), (P, (1 << 64) - P)])
@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_refused_attributes_leave_everything(abi: Abi, address_size: tuple[int, int]) -> None:
    world = World(abi)
    before = world.vm.key()

    def request() -> Zapped:
        if abi == "v7":
            return world.vm.encrypt_region(*address_size, private=True)
        return world.vm.set_memory_attributes(*address_size, 8)

    with pytest.raises(KvmError) as caught:
        request()
    assert caught.value.errno == EINVAL
    assert world.vm.key() == before


def test_each_interface_has_its_own_conversion_ioctl() -> None:
    with pytest.raises(KvmError) as caught:
        World("v7").vm.set_memory_attributes(0, P, 8)
    assert caught.value.errno == ENOTTY
    with pytest.raises(KvmError) as caught:
        World().vm.encrypt_region(0, P, private=True)
    assert caught.value.errno == ENOTTY


def test_refused_slots_leave_everything_and_another_try_may_follow() -> None:
    world = World()
    world.private(BASE, BASE + 1)
    world.touch(BASE, private=True)
    before = world.vm.key()
    with pytest.raises(KvmError) as caught:
        world.vm.set_user_memory_region2(replace(SLOT, slot=1), file=FILE)
    assert caught.value.errno == EEXIST
    assert world.vm.key() == before
    assert world.walk(BASE, private=True) is not None
    world.vm.set_user_memory_region2(Region(1, 0, 0, P))


def test_move_takes_the_old_place_and_serves_the_new() -> None:
    world = World()
    plain = Region(1, 0, 0x800 * P, 16 * P, 0x1000 * P)
    world.vm.set_user_memory_region2(plain, shared=world.ram)
    assert isinstance(world.touch(0x800, private=False), Installed)
    moved = world.vm.set_user_memory_region2(
        replace(plain, guest_phys_addr=0x900 * P), shared=world.ram
    )
    assert moved.leaves == 4
    assert _is_mmio(world.touch(0x800, private=False))
    assert isinstance(world.touch(0x901, private=False), Installed)
    assert world.walk(0x901, private=False) == RAM + 0x1001 * P


def test_creating_and_flagging_zap_nothing() -> None:
    world = World()
    seq = world.vm.mmu.invalidate.seq
    plain = Region(1, 0, 0x800 * P, 16 * P)
    assert world.vm.set_user_memory_region2(plain) == Zapped()
    assert world.vm.set_user_memory_region2(replace(plain, flags=1)) == Zapped()
    assert world.vm.mmu.invalidate.seq == seq


def test_invalidation_of_a_file_reaches_every_slot_and_only_its_pages() -> None:
    world = World()
    second = Region(1, GM, 0x800 * P, 8 * P, 0, 0)
    world.vm.set_user_memory_region2(second, shared=world.ram, file=FILE)  # file pages 0-7
    world.private(0, 0x1000)
    for gfn in (BASE, BASE + 1, 0x807):
        world.touch(gfn, private=True)
    world.touch(0x806, private=True)
    zapped = world.vm.invalidate_file(FILE.id, 7, 33)
    assert zapped == Zapped(((0x807 * P, 1), (BASE * P, 1)), 2)
    assert world.walk(BASE + 1, private=True) is not None
    assert world.walk(0x806, private=True) is not None
    assert world.vm.invalidate_file(FILE.id + 1, 0, 1024) == Zapped()
    assert world.vm.invalidate_file(FILE.id, 8, 32) == Zapped()


def test_invalidation_of_a_file_leaves_the_shared_side() -> None:
    world = World()
    world.touch(BASE, private=False)
    assert world.vm.invalidate_file(FILE.id, 0, 1024).leaves == 0
    assert world.walk(BASE, private=False) is not None


@pytest.mark.parametrize("abi", ["upstream", "v7"])
def test_invalidation_of_the_shared_side(abi: Abi) -> None:
    world = World(abi)
    plain = Region(1, 0, 0x800 * P, 16 * P, 0x1000 * P)
    world.vm.set_user_memory_region2(plain, shared=world.ram)
    world.touch(BASE, private=False)
    world.touch(0x800, private=False)
    if abi == "v7":
        world.touch(0x800, private=True)
    zapped = world.vm.invalidate_shared(world.ram, 0x1000, 0x1001)
    assert zapped.leaves == (3 if abi == "v7" else 2)
    assert world.walk(BASE, private=False) is None
    assert world.walk(0x800, private=False) is world.walk(0x800, private=True) is None
    assert world.walk(BASE + 1, private=False) is not None
    assert world.vm.invalidate_shared(Ram(), 0, 1 << 40) == Zapped()


def test_a_page_punched_between_grant_and_install_is_asked_for_again() -> None:
    world = World()
    world.private(BASE, BASE + 64)
    fault = Fault(0, BASE * P)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    late = world.answer(needed)
    world.pages.invalidated(32, 33)
    world.vm.invalidate_file(FILE.id, 32, 33)
    assert world.vm.page_arrived(fault, late) == Retry(RetryReason.NEWER)
    assert world.walk(BASE, private=True) is None
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    assert isinstance(world.vm.page_arrived(fault, world.answer(needed)), Installed)


def test_a_change_elsewhere_does_not_cost_a_second_request() -> None:
    world = World()
    world.private(BASE, BASE + 64)
    fault = Fault(0, BASE * P)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    late = world.answer(needed)
    world.private(0x4000, 0x4001)
    world.pages.invalidated(60, 61)
    world.vm.invalidate_file(FILE.id, 60, 61)
    assert world.vm.page_arrived(fault, late) == Installed(BASE * P, 1)


def test_a_grant_for_what_is_no_longer_wanted_is_not_installed() -> None:
    world = World()
    world.private(BASE, BASE + 64)
    fault = Fault(0, BASE * P)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    # The gfn now stands for another page of the same file: the fault asks for that one.
    world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    elsewhere = replace(SLOT, guest_memfd_offset=512 * P)
    world.vm.set_user_memory_region2(elsewhere, shared=world.ram, file=FILE)
    again = world.vm.page_arrived(fault, world.answer(needed))
    assert isinstance(again, NeedPage)
    assert again.page == 512
    assert isinstance(world.vm.page_arrived(fault, world.answer(again)), Installed)
    assert world.walk(BASE, private=True) == ARENA + 512 * P


def test_a_conversion_during_the_wait_becomes_an_exit() -> None:
    world = World()
    world.private(BASE, BASE + 64)
    fault = Fault(0, BASE * P)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    world.vm.set_memory_attributes(BASE * P, P, 0)
    assert convert(private=True)(world.vm.page_arrived(fault, world.answer(needed)))
    assert world.walk(BASE, private=True) is None


def test_slot_deleted_during_the_wait_is_a_private_memory_fault() -> None:
    # selftest private_mem_kvm_exits_test, access_memslot_deleted
    world = World()
    world.private(BASE, BASE + 64)
    fault = Fault(0, BASE * P)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    effect = world.vm.page_arrived(fault, world.answer(needed))
    assert isinstance(effect, LeaveGuest)
    assert isinstance(effect.exit, MemoryFaultExit)
    assert (effect.exit.gpa, effect.exit.size) == (BASE * P, P)
    assert (effect.exit.private, effect.exit.errno) == (True, EFAULT)


def test_two_halves_keep_faults_out_in_between() -> None:
    world = World()
    world.touch(BASE, private=False)
    change = world.vm.begin_set_memory_attributes(BASE * P, P, 8)
    assert change.zapped.leaves == 1
    for private in (False, True):
        effect = world.touch(BASE, private=private)
        # The old attribute still stands; what it allows must wait, what it forbids may leave.
        expected = convert(True)(effect) if private else isinstance(effect, Retry)
        assert expected, effect
    assert isinstance(world.touch(BASE + 4, private=False), Installed)
    world.vm.end(change)
    assert isinstance(world.touch(BASE, private=True), Installed)


def test_changes_of_slots_and_attributes_are_serialised() -> None:
    world = World()
    change = world.vm.begin_set_memory_attributes(BASE * P, P, 8)
    # An invalidation from below may come at any time and does not end the change.
    world.vm.invalidate_file(FILE.id, 0, 64)
    with pytest.raises(RuntimeError, match="slots_lock"):
        world.vm.set_memory_attributes(0, P, 8)
    with pytest.raises(RuntimeError, match="slots_lock"):
        world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    world.vm.end(change)
    world.vm.set_memory_attributes(0, P, 8)


def test_hole_in_the_userspace_side() -> None:
    world = World()
    world.ram.size = 1
    assert isinstance(world.touch(BASE, private=False), Installed)
    assert world.touch(BASE + 1, private=False) == LeaveGuest(BadHvaExit((BASE + 1) * P))
    world.vm.set_user_memory_region2(Region(1, 0, 0x800 * P, P))  # no shared side at all
    assert world.touch(0x800, private=False) == LeaveGuest(BadHvaExit(0x800 * P))


def test_full_table_pool_is_an_exit() -> None:
    world = World(tables=2)
    effect = world.touch(BASE, private=False)
    assert isinstance(effect, LeaveGuest)
    assert isinstance(effect.exit, MemoryFaultExit)
    assert effect.exit.errno == ENOMEM


def test_memory_and_statistics() -> None:
    world = World()
    world.vm.set_user_memory_region2(Region(1, 0, 0x800 * P, 16 * P, 0x1000 * P), shared=world.ram)
    world.private(BASE + 60, 0x804)
    assert world.vm.memory() == MemoryUse(private=4, shared=60 + 12, unbacked=4)
    assert world.vm.memory(BASE + 59, BASE + 61) == MemoryUse(1, 1, 0)
    assert world.vm.memory(0x2000, 0x3000) == MemoryUse()
    world.touch(BASE + 60, private=True, wide=True)
    world.touch(BASE, private=True)
    world.vm.invalidate_file(FILE.id, 0, 1024)
    told = world.vm.statistics()
    assert (told.faults, told.exits, told.retries) == (2, 1, 0)
    assert (told.installed_pages, told.zapped_leaves) == (4, 4)
    assert (told.invalidations, told.slots) == (2, 2)
    assert told.memory == world.vm.memory()


def test_copy_is_apart() -> None:
    world = World()
    world.private(BASE, BASE + 4)
    twin = world.vm.copy(Stage2(bytearray(64 * P), 1 << 28), Pages())
    assert twin.key() == world.vm.key()
    before = world.vm.key()
    twin.set_memory_attributes(BASE * P, P, 0)
    twin.set_user_memory_region2(replace(SLOT, memory_size=0))
    assert world.vm.key() == before != twin.key()


gfns = st.integers(BASE, BASE + 15)
spans = st.tuples(gfns, st.integers(1, 8)).map(lambda p: (p[0], min(BASE + 16, p[0] + p[1])))
steps = st.one_of(
    st.tuples(st.just("attributes"), spans, st.booleans()),
    st.tuples(st.just("touch"), gfns, st.booleans()),
    st.tuples(st.just("punch"), spans),
    st.tuples(st.just("slot"), st.integers(0, 3)),
)


@given(st.lists(steps, max_size=40), st.sampled_from(["upstream", "v7"]))
def test_a_leaf_always_agrees_with_slot_and_attribute(script: list[tuple], abi: Abi) -> None:  # type: ignore[type-arg]
    world = World(abi)
    vm, slots = world.vm, world.vm.mmu.slots
    for step in script:
        match step:
            case ("attributes", (first, last), private):
                if abi == "v7":
                    vm.encrypt_region(first * P, (last - first) * P, private=private)
                else:
                    vm.set_memory_attributes(first * P, (last - first) * P, 8 * private)
            case ("touch", gfn, private):
                effect = world.touch(gfn, private=private, wide=True)
                assert isinstance(effect, Installed | LeaveGuest)
            case ("punch", (first, last)):
                start, end = first - BASE + 32, last - BASE + 32
                world.pages.invalidated(start, end)
                vm.invalidate_file(FILE.id, start, end)
                assert all(world.walk(g, private=True) is None for g in range(first, last)) or (
                    (held := slots.get(0)) is None or held.file_page != 32
                )
            case ("slot", offset):
                if slots.get(0):
                    vm.set_user_memory_region2(replace(SLOT, memory_size=0))
                else:
                    region = replace(SLOT, guest_memfd_offset=offset * 32 * P)
                    vm.set_user_memory_region2(region, shared=world.ram, file=FILE)
        slot = slots.get(0)
        for gfn in range(BASE, BASE + 16):
            private = bool(vm.mmu.attributes.get(gfn) & ABIS[abi].attribute_private)
            for side in (False, True):
                hpa = world.walk(gfn, private=side)
                if hpa is not None:
                    assert slot is not None
                    assert side == private
                    page = slot.private_page(gfn) if side else slot.shared_page(gfn)
                    assert hpa == (ARENA if side else RAM) + page * P


def test_mmio_write_has_its_data() -> None:
    world = World()
    fault = Fault(0, 0x8_0000 * P | SHARED_BIT | 8, Access(write=True, length=2, data=b"ok"))
    effect = world.vm.begin_fault(fault)
    assert effect == LeaveGuest(MmioExit(0x8_0000 * P + 8, 2, True, b"ok"))
