# SPDX-License-Identifier: GPL-2.0-or-later
"""Mapping levels: never wrong, never smaller than they could be, never over mixed attributes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwemu.stage2 import Stage2, WalkError
from kvmsim.attributes import Attributes
from kvmsim.fault import Fault, Installed, LeaveGuest, NeedPage, PageGrant
from kvmsim.kind import KINDS
from kvmsim.level import Leaves, mapping_levels, pages_per_leaf
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, PAGE_SIZE
from kvmsim.vm import Vm, Zapped

P = PAGE_SIZE
GM = KVM_MEM_GUEST_MEMFD
PRIVATE = 8
ARENA, RAM = 1 << 39, 1 << 38


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((0, 0, 0, 3), []),
        ((5, 10, 5, 2), [(5, 10, 1)]),
        ((0, 512, 0, 1), [(0, 512, 1)]),
        ((0, 512, 0, 2), [(0, 512, 2)]),
        ((0, 512, 1, 2), [(0, 512, 1)]),
        ((0, 511, 0, 2), [(0, 511, 1)]),
        ((512, 512, 1024, 3), [(512, 512, 2)]),
        ((511, 1026, 511, 2), [(511, 1, 1), (512, 1024, 2), (1536, 1, 1)]),
        ((1 << 18, 1 << 18, 0, 3), [(1 << 18, 1 << 18, 3)]),
        ((1 << 18, 1 << 18, 512, 3), [(1 << 18, 1 << 18, 2)]),
        (
            ((1 << 18) - 513, (1 << 18) + 1026, (1 << 18) - 513, 3),
            [
                ((1 << 18) - 513, 1, 1),
                ((1 << 18) - 512, 512, 2),
                (1 << 18, 1 << 18, 3),
                (2 << 18, 512, 2),
                ((2 << 18) + 512, 1, 1),
            ],
        ),
    ],
)
def test_levels(asked: tuple[int, int, int, int], expected: list[tuple[int, int, int]]) -> None:
    assert list(mapping_levels(*asked)) == [Leaves(*leaves) for leaves in expected]


@given(
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.sampled_from([0, 1, 512, 5 * 512, 1 << 18, (1 << 18) + 512]),
    st.integers(1, 3),
)
def test_levels_cover_the_range_once_and_are_aligned(
    gfn: int, npages: int, offset: int, top: int
) -> None:
    at = gfn
    for leaves in mapping_levels(gfn, npages, gfn + offset, top):
        size = pages_per_leaf(leaves.level)
        assert leaves.gfn == at
        assert leaves.level <= top
        assert leaves.gfn % size == (leaves.gfn + offset) % size == leaves.npages % size == 0
        assert leaves.npages > 0
        at += leaves.npages
    assert at == gfn + npages


# --- a VM over a real table -------------------------------------------------------------------


class Pages:
    """A file whose page p lies at ARENA + p pages, or ``offset`` pages behind that."""

    def __init__(self) -> None:
        self.offset = 0

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + (page + self.offset) * P


class Ram:
    def hpa(self, page: int) -> int | None:
        return RAM + page * P


class World:
    def __init__(
        self, *, gfn: int = 0, npages: int = 2048, page: int = 0, kind: str = "shared-bit"
    ) -> None:
        self.table = Stage2(bytearray(64 * P), 1 << 28)
        self.pages = Pages()
        self.ram = Ram()
        self.vm = Vm(self.table, self.pages, kind=KINDS[kind], max_level=2)
        region = Region(0, GM, gfn * P, npages * P, 0, page * P)
        file = PrivateFile(7, page + npages)
        self.vm.set_user_memory_region2(region, shared=self.ram, file=file)
        self.vm.set_memory_attributes(gfn * P, npages * P, PRIVATE)

    def touch(self, gfn: int, **changes: int) -> Installed:
        fault = Fault(0, gfn * P)
        effect = self.vm.begin_fault(fault)
        if isinstance(effect, NeedPage):
            start = max(effect.start, changes.get("start", 0))
            end = min(effect.end, changes.get("end", 1 << 40))
            effect = self.vm.page_arrived(fault, PageGrant(7, start, end, 0, 1))
        assert isinstance(effect, Installed), effect
        return effect

    def level(self, gfn: int) -> int:
        try:
            return self.table.walk(gfn * P).level
        except WalkError:
            return 0


def test_a_whole_block_granted_is_one_leaf() -> None:
    world = World()
    assert world.touch(700) == Installed(512 * P, 512)
    assert [world.level(gfn) for gfn in (511, 512, 1023, 1024)] == [0, 2, 2, 0]
    assert world.table.statistics().tables == 3  # no table of 4 KiB leaves


@pytest.mark.parametrize("grant", [{"start": 513}, {"end": 1023}])
def test_what_the_owner_did_not_grant_is_not_mapped(grant: dict[str, int]) -> None:
    world = World()
    assert world.touch(700, **grant).npages == 511
    assert world.level(700) == 1


def test_a_slot_whose_file_offset_is_not_congruent_has_small_leaves() -> None:
    world = World(page=3)
    assert world.touch(700) == Installed(512 * P, 512)
    assert world.level(700) == 1


def test_a_slot_that_ends_in_the_block_has_small_leaves_there() -> None:
    world = World(npages=1000)
    assert world.touch(700).npages == 1000 - 512
    assert world.level(700) == 1
    world.touch(3)
    assert world.level(3) == 2


def test_an_instance_that_is_placed_elsewhere_has_small_leaves() -> None:
    world = World()
    world.pages.offset = 5
    world.touch(700)
    assert world.level(700) == 1


def test_one_gfn_of_the_other_type_keeps_the_block_small() -> None:
    world = World()
    world.vm.set_memory_attributes(1000 * P, P, 0)
    assert world.touch(700) == Installed(512 * P, 1000 - 512)
    assert world.level(700) == 1


def test_a_conversion_inside_takes_the_whole_leaf_and_says_so() -> None:
    """As tdp_mmu_zap_leafs() does; the rest is faulted in again, small."""
    world = World()
    world.touch(700)
    zapped = world.vm.set_memory_attributes(1000 * P, P, 0)
    assert zapped == Zapped(((512 * P, 512), (1 << 39 | 1000 * P, 1)), 512)
    assert world.level(700) == 0
    world.touch(700)
    assert [world.level(gfn) for gfn in (700, 1000, 1001)] == [1, 0, 0]
    # and back: the block can be one leaf again
    world.vm.set_memory_attributes(1000 * P, P, PRIVATE)
    assert world.level(700) == 1
    world.touch(1000)
    assert [world.level(gfn) for gfn in (700, 1000)] == [2, 2]


def test_a_punch_inside_takes_the_whole_leaf() -> None:
    world = World()
    world.touch(3)
    world.touch(700)
    assert world.vm.invalidate_file(7, 510, 514) == Zapped(((0, 1024),), 1024)


def test_while_an_invalidation_is_in_progress_only_the_page_itself_is_mapped() -> None:
    world = World()
    world.touch(700)
    punch = world.vm.begin_invalidate_file(7, 1000, 1001)
    assert world.touch(700) == Installed(700 * P, 1)
    assert world.level(700) == 1
    world.vm.end(punch)


def test_a_poisoned_page_keeps_the_block_small() -> None:
    world = World()
    world.touch(700)
    assert world.vm.inject_memory_error(7, 1000) == Zapped(((512 * P, 512),), 512)
    assert world.touch(700) == Installed(512 * P, 1000 - 512)
    assert [world.level(gfn) for gfn in (700, 1000, 1001)] == [1, 0, 0]
    world.vm.freed(7, 1000, 1001)
    world.touch(1000)
    assert world.level(1000) == 2


def test_dirty_logging_keeps_leaves_small() -> None:
    world = World(kind="sw-protected", npages=512)
    world.vm.mmu.around = 512
    plain = Region(1, KVM_MEM_LOG_DIRTY_PAGES, 512 * P, 512 * P, 512 * P)
    world.vm.set_user_memory_region2(plain, shared=world.ram)
    world.touch(600)
    assert world.level(600) == 1
    world.vm.set_user_memory_region2(Region(1, 0, 512 * P, 512 * P, 512 * P), shared=world.ram)
    world.touch(600)
    assert world.level(600) == 2


# --- 100 000 steps against a naive model ------------------------------------------------------


def test_attributes_agree_with_one_entry_per_gfn_over_100_000_steps() -> None:
    rng = random.Random(20220706)
    size = 4096
    attributes, plain = Attributes(), np.zeros(size, dtype=np.int64)
    for _ in range(100_000):
        start = rng.randrange(size)
        end = min(size, start + rng.choice((1, 2, 16, 512, 513, 4096)))
        value = rng.choice((0, PRIVATE))
        if rng.random() < 0.5:
            assert attributes.set(start, end, value) == bool((plain[start:end] != value).any())
            plain[start:end] = value
        run = attributes.run(start)
        assert (plain[run.start : min(run.end, size)] == run.value).all()
        assert run.start == 0 or plain[run.start - 1] != run.value
        assert run.end >= size or plain[run.end] != run.value
        block = plain[start & -512 : (start & -512) + 512]
        assert attributes.uniform(start & -512, (start & -512) + 512) == (
            block.min() == block.max()
        )


def test_levels_agree_with_a_naive_table_over_100_000_steps() -> None:
    """Conversions, punches and faults at random; the model has one cell per gfn."""
    rng = random.Random(20150706)
    world, size = World(npages=2048), 2048
    vm, table = world.vm, world.table
    private = np.ones(size, dtype=bool)
    mapped = np.zeros(size, dtype=np.int64)  # level of the private leaf, 0: none

    def zap(start: int, end: int) -> None:
        for block in range(start >> 9, (end + 511) >> 9):
            if mapped[block << 9] == 2:
                mapped[block << 9 : (block + 1) << 9] = 0
        mapped[start:end] = 0

    for step in range(100_000):
        gfn = rng.randrange(size)
        end = min(size, gfn + rng.choice((1, 1, 1, 7, 512, 700)))
        if rng.random() < 0.7:
            fault = Fault(0, gfn * P)
            effect = vm.begin_fault(fault)
            if not private[gfn]:
                assert isinstance(effect, LeaveGuest)
                continue
            assert isinstance(effect, NeedPage)
            assert private[effect.start : effect.end].all()
            first = gfn - rng.choice((0, 0, 3, 511))
            last = gfn + rng.choice((1, 2, 512, 512))
            first, last = max(first, effect.start), min(last, effect.end)
            vm.page_arrived(fault, PageGrant(7, first, last, 0, 1))
            whole = last - first == 512
            block = slice(gfn & -512, (gfn & -512) + 512)
            if not whole and mapped[gfn] == 2:
                mapped[block] = 1  # split: the new leaves are small
            mapped[first:last] = 2 if whole else 1
        elif rng.random() < 0.5:
            vm.invalidate_file(7, gfn, end)
            zap(gfn, end)
        else:
            value = rng.random() < 0.8
            changes = bool((private[gfn:end] != value).any())
            vm.set_memory_attributes(gfn * P, (end - gfn) * P, PRIVATE * value)
            private[gfn:end] = value
            if changes:
                zap(gfn, end)
        if step % 50 == 0:
            seen = np.zeros(size, dtype=np.int64)
            for gpa, hpa, count in table.mapped(0, size):
                assert hpa - ARENA == gpa
                seen[gpa // P : gpa // P + count] = 1
            assert (seen == (mapped > 0)).all()
            for block in range(4):
                assert (world.level(block << 9) == 2) == (mapped[block << 9] == 2)
            assert table.statistics().large_leaves == int((mapped == 2).sum()) // 512
            assert not (mapped[~private] > 0).any()
        if step % 997 == 0:
            table.reclaim()
