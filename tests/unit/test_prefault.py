# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_PRE_FAULT_MEMORY: the errno grid, progress, and what may happen between two faults."""

from __future__ import annotations

from dataclasses import replace
from errno import EAGAIN, EFAULT, EINTR, EINVAL, ENOENT, ENOMEM, ENOTTY, EOPNOTSUPP

import pytest

from hwemu.stage2 import Stage2, WalkError
from kvmsim.fault import NeedPage, PageGrant, Retry, RetryReason
from kvmsim.kind import KINDS
from kvmsim.prefault import Finished, PreFault, Progress, Step
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import EHWPOISON, KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, PAGE_SIZE, Abi, KvmError
from kvmsim.vm import Vm

P = PAGE_SIZE
ARENA, RAM, SHARED = 1 << 39, 1 << 38, 1 << 39
BASE, NPAGES, FILE = 0x200, 0x400, 7
SLOT = Region(0, KVM_MEM_GUEST_MEMFD, BASE * P, NPAGES * P, 0x1000 * P)
TOP = 1 << 64


class Ram:
    def hpa(self, page: int) -> int | None:
        return RAM + page * P if page >= 0x1000 else None


class Pages:
    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * P


class World:
    def __init__(self, kind: str = "sw-protected", abi: Abi = "upstream", tables: int = 64) -> None:
        self.table = Stage2(bytearray(tables * P), 1 << 28)
        self.ram = Ram()
        self.vm = Vm(self.table, Pages(), abi=abi, kind=KINDS[kind], max_level=2)
        self.vm.set_user_memory_region2(SLOT, shared=self.ram, file=PrivateFile(FILE, NPAGES))
        self.asked: list[NeedPage] = []
        self.status = 0

    def private(self) -> World:
        self.vm.set_memory_attributes(BASE * P, NPAGES * P, 8)
        return self

    def answer(self, needed: NeedPage, *, npages: int = 1 << 20) -> PageGrant:
        self.asked.append(needed)
        end = min(needed.end, needed.page + npages)
        return PageGrant(FILE, needed.page, end, 0, 1, True, self.status)

    def run(self, call: PreFault, *, npages: int = 1 << 20) -> Finished:
        call.check(self.vm)
        for _ in range(5000):
            step: Step = call.step(self.vm)
            if isinstance(step, NeedPage):
                step = call.page_arrived(self.vm, self.answer(step, npages=npages))
            if isinstance(step, Finished):
                return step
            assert isinstance(step, Progress)
        raise AssertionError("no end")

    def mapped(self, gfn: int, half: int = 0) -> bool:
        try:
            self.table.walk(gfn * P | half)
        except WalkError:
            return False
        return True


def call(gfn: int = BASE, npages: int = 512) -> PreFault:
    return PreFault(0, gfn * P, npages * P)


REFUSED = [
    ("flags", PreFault(0, 0, P, 1), EINVAL),
    ("gpa unaligned", PreFault(0, 1, P), EINVAL),
    ("size unaligned", PreFault(0, 0, P + 1), EINVAL),
    ("size 0", PreFault(0, 0, 0), EINVAL),
    ("wraps", PreFault(0, TOP - P, 2 * P), EINVAL),
    ("wraps to 0", PreFault(0, TOP - P, P), EINVAL),
]


@pytest.mark.parametrize(("asked", "number"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(asked: PreFault, number: int) -> None:
    world = World()
    before = asked.key()
    with pytest.raises(KvmError) as caught:
        asked.check(world.vm)
    assert caught.value.errno == number
    assert (caught.value.start, caught.value.size) == (asked.gpa, asked.size)
    assert asked.key() == before


def test_v7_has_no_such_ioctl() -> None:
    with pytest.raises(KvmError) as caught:
        call().check(World("shared-bit", "v7").vm)
    assert caught.value.errno == ENOTTY


def test_shared_bit_is_not_the_callers_to_set() -> None:
    with pytest.raises(KvmError, match="bit of a side") as caught:
        PreFault(0, BASE * P | SHARED, P).check(World("shared-bit").vm)
    assert caught.value.errno == EINVAL


@pytest.mark.parametrize("kind", list(KINDS))
def test_not_before_a_protected_guest_is_finalized(kind: str) -> None:
    world = World(kind)
    if not KINDS[kind].protected_state:
        assert world.run(call()).errno == 0
        return
    with pytest.raises(KvmError) as caught:
        call().check(world.vm)
    assert caught.value.errno == EOPNOTSUPP
    world.vm.pre_fault_allowed = True
    assert world.run(call()).errno == 0


# The selftest's three: pre_fault_memory_test.c.


@pytest.mark.parametrize("private", [False, True])
def test_a_range_in_the_slot_is_mapped_whole(private: bool) -> None:
    world = World()
    if private:
        world.private()
    assert world.run(call()) == Finished(0, (BASE + 512) * P, 0)
    assert all(world.mapped(gfn) for gfn in range(BASE, BASE + 512))
    assert not world.mapped(BASE + 512)


@pytest.mark.parametrize("private", [False, True])
def test_a_range_half_outside_is_partial_success(private: bool) -> None:
    world = World()
    if private:
        world.private()
    last = BASE + NPAGES - 1
    assert world.run(call(last, 2)) == Finished(0, (last + 1) * P, P)
    assert world.mapped(last)


def test_a_range_outside_is_enoent_and_nothing() -> None:
    world = World()
    assert world.run(call(BASE + NPAGES, 1)) == Finished(ENOENT, (BASE + NPAGES) * P, P)
    assert world.run(call(0x8_0000_0000, 1)).errno == ENOENT  # beyond what any slot can reach


def test_a_private_gfn_without_a_slot_is_efault() -> None:
    """kvm_handle_noslot_fault(): a private access is never emulated."""
    world = World()
    world.vm.set_memory_attributes(0, P, 8)
    assert world.run(call(0, 1)).errno == EFAULT


@pytest.mark.parametrize("private", [False, True])
def test_the_type_is_the_gfns_own_where_the_gpa_says_it(private: bool) -> None:
    world = World("shared-bit")
    if private:
        world.private()
    assert world.run(call(BASE, 3)) == Finished(0, (BASE + 3) * P, 0)
    assert world.mapped(BASE, 0 if private else SHARED)
    assert not world.mapped(BASE, SHARED if private else 0)


def test_a_mixed_range_is_mapped_on_both_sides() -> None:
    world = World("shared-bit")
    world.vm.set_memory_attributes((BASE + 2) * P, P, 8)
    assert world.run(call(BASE, 4)).errno == 0
    halves = [SHARED, SHARED, 0, SHARED]
    assert [world.mapped(BASE + i, half) for i, half in enumerate(halves)] == [True] * 4


def test_a_large_leaf_that_reaches_out_is_progress_to_the_end_only() -> None:
    world = World().private()
    first = BASE + 100
    assert world.run(call(first, 10), npages=1 << 20) == Finished(0, (first + 10) * P, 0)
    assert len(world.asked) == 1


def test_one_page_at_a_time() -> None:
    world = World().private()
    assert world.run(call(BASE, 7), npages=1).size == 0
    assert [needed.page for needed in world.asked] == list(range(7))


@pytest.mark.parametrize("status", [ENOMEM, EHWPOISON])
def test_an_error_before_any_progress_is_told_and_later_it_is_not(status: int) -> None:
    world = World().private()
    world.status = status
    assert world.run(call()) == Finished(status, BASE * P, 512 * P)
    world.status = 0
    started = call()
    step = started.step(world.vm)
    assert isinstance(step, NeedPage)
    step = started.page_arrived(world.vm, world.answer(step, npages=1))
    assert step == Progress((BASE + 1) * P, 511 * P)
    world.status = status
    assert world.run(started) == Finished(0, (BASE + 1) * P, 511 * P)


def test_a_signal_is_eintr_without_progress_and_success_with_it() -> None:
    world = World().private()
    started = call()
    assert started.interrupted() == Finished(EINTR, BASE * P, 512 * P)
    step = started.step(world.vm)
    assert isinstance(step, NeedPage)
    assert started.interrupted().errno == EINTR
    step = started.step(world.vm)
    assert isinstance(step, NeedPage)
    started.page_arrived(world.vm, world.answer(step, npages=1))
    assert started.interrupted() == Finished(0, (BASE + 1) * P, 511 * P)


def test_a_slot_that_is_being_deleted_is_eagain() -> None:
    world = World().private()
    deletion = world.vm.begin_set_user_memory_region2(replace(SLOT, memory_size=0))
    assert world.run(call()) == Finished(EAGAIN, BASE * P, 512 * P)
    assert world.vm.deletes(BASE)
    world.vm.end(deletion)
    assert not world.vm.deletes(BASE)
    assert world.run(call()).errno == EFAULT  # private, and no slot any more


def test_a_page_that_arrives_while_its_slot_is_deleted_is_eagain() -> None:
    world = World().private()
    started = call()
    step = started.step(world.vm)
    assert isinstance(step, NeedPage)
    deletion = world.vm.begin_set_user_memory_region2(replace(SLOT, memory_size=0))
    assert started.page_arrived(world.vm, world.answer(step)) == Finished(EAGAIN, BASE * P, 512 * P)
    world.vm.end(deletion)
    assert not world.mapped(BASE)


def test_a_conversion_in_progress_is_a_retry_and_then_the_new_type() -> None:
    world = World("shared-bit")
    started = call(BASE, 1)
    conversion = world.vm.begin_set_memory_attributes(BASE * P, P, 8)
    assert started.step(world.vm) == Retry(RetryReason.IN_PROGRESS)
    world.vm.end(conversion)
    assert world.run(started).errno == 0
    assert world.mapped(BASE)
    assert not world.mapped(BASE, SHARED)


def test_a_read_only_slot_can_be_faulted() -> None:
    world = World()
    plain = Region(1, KVM_MEM_READONLY, 0x1000 * P, 16 * P, 0x2000 * P)
    world.vm.set_user_memory_region2(plain, shared=world.ram)
    assert world.run(call(0x1000, 16)).errno == 0
    assert not world.table.walk(0x1000 * P).writable


def test_a_hole_in_userspace_memory_is_efault() -> None:
    world = World()
    world.vm.set_user_memory_region2(Region(1, 0, 0x1000 * P, P, 0), shared=world.ram)
    assert world.run(call(0x1000, 1)).errno == EFAULT


def test_no_room_for_tables_is_enomem() -> None:
    world = World(tables=2).private()
    assert world.run(call()).errno == ENOMEM


def test_copies_go_apart() -> None:
    world = World().private()
    started = call()
    step = started.step(world.vm)
    assert isinstance(step, NeedPage)
    twin = started.copy()
    assert twin.key() == started.key()
    started.page_arrived(world.vm, world.answer(step))
    assert twin.key() != started.key()
    assert isinstance(twin.page_arrived(world.vm, world.answer(step)), Finished)


def test_a_page_that_nobody_asked_for_is_a_defect_of_the_caller() -> None:
    with pytest.raises(RuntimeError, match="not asked"):
        call().page_arrived(World().vm, PageGrant(FILE, 0, 1, 0, 1))
