# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwemu.npt import ACCESSED, LARGE, NX, PRESENT, USER, WRITABLE
from hwemu.stage2 import (
    PAGE_SIZE,
    PoolFullError,
    RangeError,
    Stage2,
    Translation,
    WalkError,
    WalkReason,
)

POOL_HPA = 0x1000_0000
HPA = 1 << 39
TWO_MIB = 2 << 20


def make(tables: int = 64) -> tuple[bytearray, Stage2]:
    pool = bytearray(tables * PAGE_SIZE)
    return pool, Stage2(pool, POOL_HPA)


def reason(stage2: Stage2, gpa: int, *, write: bool = False) -> WalkReason:
    with pytest.raises(WalkError) as caught:
        stage2.walk(gpa, write=write)
    return caught.value.reason


def test_one_page_is_mapped_and_nothing_beside_it() -> None:
    _, stage2 = make()
    stage2.map(0x5000, HPA + 0x9000, 1)
    assert stage2.walk(0x5123) == Translation(HPA + 0x9123, 1, True)
    for neighbour in (0x4FFF, 0x6000, 0x5000 | 1 << 39, TWO_MIB + 0x5000):
        assert reason(stage2, neighbour) is WalkReason.NOT_PRESENT


def test_both_halves_of_the_shared_bit_live_in_one_table() -> None:
    _, stage2 = make()
    stage2.map(0x5000, HPA, 1)
    stage2.map(0x5000 | 1 << 39, HPA + PAGE_SIZE, 1)
    assert stage2.walk(0x5000).hpa == HPA
    assert stage2.walk(0x5000 | 1 << 39).hpa == HPA + PAGE_SIZE
    assert stage2.zap(0, 1 << 27) == 1
    assert stage2.walk(0x5000 | 1 << 39).hpa == HPA + PAGE_SIZE


def test_read_only_leaf_refuses_writes_only() -> None:
    _, stage2 = make()
    stage2.map(0x5000, HPA, 1, writable=False)
    assert stage2.walk(0x5000) == Translation(HPA, 1, False)
    assert reason(stage2, 0x5000, write=True) is WalkReason.NOT_WRITABLE
    stage2.map(0x5000, HPA, 1)
    assert stage2.walk(0x5000, write=True).writable


def test_executable_is_kept_without_nx() -> None:
    """The engine follows a null pointer when an NX page serves as a guest page table."""
    pool, stage2 = make()
    stage2.map(0x5000, HPA, 1, executable=False)
    stage2.map(TWO_MIB, HPA, 512, executable=False, level=2)
    assert not stage2.walk(0x5000).executable
    assert not stage2.walk(TWO_MIB).executable
    assert not any(entry & NX for (entry,) in struct.iter_unpack("<Q", pool))


def test_non_leaf_entries_are_accessed_from_birth() -> None:
    """Otherwise the engine writes the bit itself, with a 32-bit store behind numpy's back."""
    pool, stage2 = make()
    stage2.map(0x5000, HPA, 1)
    entries = [entry for (entry,) in struct.iter_unpack("<Q", pool) if entry]
    assert len(entries) == 4
    assert all(entry & (PRESENT | USER | ACCESSED) == 0x25 for entry in entries)


def test_a_range_over_many_tables() -> None:
    _, stage2 = make()
    start = 0x1FF << 12
    stage2.map(start, HPA, 2000)
    assert stage2.walk(start).hpa == HPA
    assert stage2.walk(start + 1999 * PAGE_SIZE + 7).hpa == HPA + 1999 * PAGE_SIZE + 7
    assert reason(stage2, start - 1) is WalkReason.NOT_PRESENT
    assert reason(stage2, start + 2000 * PAGE_SIZE) is WalkReason.NOT_PRESENT
    assert stage2.statistics().mapped_pages == 2000
    assert stage2.zap(start + 10 * PAGE_SIZE, 1000) == 1000
    assert list(stage2.mapped(0, 1 << 28)) == [
        (start, HPA, 10),
        (start + 1010 * PAGE_SIZE, HPA + 1010 * PAGE_SIZE, 990),
    ]


def test_mapped_coalesces_only_what_is_contiguous_on_both_sides() -> None:
    _, stage2 = make()
    stage2.map(0x0000, HPA, 2)
    stage2.map(0x2000, HPA + 0x2000, 1)
    stage2.map(0x3000, HPA + 0x9000, 1)
    stage2.map(0x5000, HPA + 0xB000, 1)
    assert list(stage2.mapped(0, 16)) == [
        (0, HPA, 3),
        (0x3000, HPA + 0x9000, 1),
        (0x5000, HPA + 0xB000, 1),
    ]
    assert list(stage2.mapped(0x1000, 1)) == [(0x1000, HPA + 0x1000, 1)]
    assert list(stage2.mapped(0x1000, 0)) == []


def test_large_leaf_is_split_when_a_part_is_zapped() -> None:
    _, stage2 = make()
    stage2.map(TWO_MIB, HPA, 1024, level=2, writable=False)
    assert stage2.walk(TWO_MIB + 0x12345) == Translation(HPA + 0x12345, 2, False)
    assert stage2.statistics().large_leaves == 2
    assert stage2.zap(TWO_MIB + 0x3000, 2) == 2
    assert stage2.statistics().large_leaves == 1
    assert stage2.walk(TWO_MIB) == Translation(HPA, 1, False)
    assert reason(stage2, TWO_MIB + 0x4000) is WalkReason.NOT_PRESENT
    assert stage2.walk(TWO_MIB + 0x5000).hpa == HPA + 0x5000
    assert stage2.zap(0, 4096) == 1022
    assert stage2.statistics().tables == 1


def test_a_small_page_over_a_large_leaf_changes_that_page_only() -> None:
    _, stage2 = make()
    stage2.map(0, HPA, 512, level=2)
    stage2.map(0x5000, HPA + TWO_MIB, 1)
    assert stage2.walk(0x5000).hpa == HPA + TWO_MIB
    assert stage2.walk(0x6000).hpa == HPA + 0x6000
    assert stage2.statistics().mapped_pages == 512


def test_a_large_leaf_over_small_pages_replaces_them() -> None:
    _, stage2 = make()
    stage2.map(0x5000, HPA + TWO_MIB, 3)
    stage2.map(0, HPA, 512, level=2)
    assert stage2.walk(0x5000) == Translation(HPA + 0x5000, 2, True)
    assert stage2.statistics().mapped_pages == 512
    assert stage2.zap(0, 512) == 512
    assert stage2.statistics().mapped_pages == 0


def test_a_sparse_terabyte_costs_what_is_mapped() -> None:
    _, stage2 = make(4096)
    for index in range(512):
        stage2.map(index << 30, HPA + index * PAGE_SIZE, 1)
    assert stage2.statistics().mapped_pages == 512
    # by entry this would be 2**28 steps: the test's time limit is the assertion
    assert sum(count for _, _, count in stage2.mapped(0, 1 << 28)) == 512
    assert stage2.zap(0, 1 << 28) == 512
    assert stage2.statistics().tables == 1


def test_an_emptied_table_waits_until_reclaim() -> None:
    """An engine may be walking through it: only the same place may have it back before."""
    pool, stage2 = make(5)  # root, two upper, two leaf tables
    stage2.map(0, HPA, 1)
    stage2.map(TWO_MIB, HPA, 1)
    before = bytes(pool)
    assert stage2.zap(0, 1) == 1
    assert stage2.statistics().parked_tables == 1
    with pytest.raises(PoolFullError, match="reclaim"):
        stage2.map(2 * TWO_MIB, HPA, 1)
    stage2.map(0, HPA, 1)
    assert bytes(pool) == before, "the parked table went back to its place"
    stage2.zap(0, 1)
    assert stage2.reclaim() == 1
    stage2.map(2 * TWO_MIB, HPA, 1)
    assert stage2.walk(2 * TWO_MIB).hpa == HPA


def test_churn_does_not_leak_tables() -> None:
    _, stage2 = make(8)
    for _ in range(1000):
        stage2.map(0, HPA, 1)
        assert stage2.zap(0, 512) == 1
    assert stage2.statistics().mapped_pages == 0


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("map", (0x123, HPA, 1)),
        ("map", (0x1000, HPA + 1, 1)),
        ("map", (0x1000, HPA, -1)),
        ("map", ((1 << 40) - 0x1000, HPA, 2)),
        ("map", (0, (1 << 40) - 0x1000, 2)),
        ("zap", (0x123, 1)),
        ("zap", (0, (1 << 28) + 1)),
        ("whole_leaves", (0x123, 1)),
    ],
)
def test_bad_ranges_are_named_and_change_nothing(call: str, arguments: tuple[int, ...]) -> None:
    pool, stage2 = make()
    stage2.map(0, HPA, 4)
    before = bytes(pool)
    with pytest.raises(RangeError, match=f"stage-2 {call} of"):
        getattr(stage2, call)(*arguments)
    assert bytes(pool) == before


def test_large_leaves_need_alignment() -> None:
    _, stage2 = make()
    for gpa, hpa, count in ((0x1000, HPA, 512), (0, HPA + 0x1000, 512), (0, HPA, 511)):
        with pytest.raises(RangeError, match="2 MiB"):
            stage2.map(gpa, hpa, count, level=2)
    with pytest.raises(RangeError, match="1024 MiB"):
        stage2.map(0, HPA, 512, level=3)
    with pytest.raises(RangeError, match="level 4"):
        stage2.map(0, HPA, 1 << 27, level=4)


GIB = 1 << 30
GIB_PAGES = GIB // PAGE_SIZE


def test_a_gigabyte_leaf_splits_down_to_the_page() -> None:
    _, stage2 = make()
    stage2.map(GIB, HPA, 2 * GIB_PAGES, level=3, writable=False)
    assert stage2.walk(GIB + 0x1234_5678) == Translation(HPA + 0x1234_5678, 3, False)
    assert stage2.statistics().tables == 2
    assert stage2.zap(GIB + TWO_MIB + 0x3000, 2) == 2
    statistics = stage2.statistics()
    assert (statistics.large_leaves, statistics.mapped_pages) == (1 + 511, 2 * GIB_PAGES - 2)
    assert stage2.walk(GIB) == Translation(HPA, 2, False)
    assert stage2.walk(GIB + TWO_MIB) == Translation(HPA + TWO_MIB, 1, False)
    assert reason(stage2, GIB + TWO_MIB + 0x4000) is WalkReason.NOT_PRESENT
    assert stage2.walk(2 * GIB).level == 3
    assert list(stage2.mapped(0, 4 * GIB_PAGES)) == [
        (GIB, HPA, 515),
        (GIB + TWO_MIB + 0x5000, HPA + TWO_MIB + 0x5000, 2 * GIB_PAGES - 517),
    ]
    assert stage2.zap(0, 4 * GIB_PAGES) == 2 * GIB_PAGES - 2
    assert stage2.statistics().tables == 1


def test_a_gigabyte_leaf_replaces_what_is_below_it() -> None:
    _, stage2 = make()
    stage2.map(0, HPA + GIB, 512, level=2)
    stage2.map(4 * TWO_MIB, HPA + 3 * GIB, 100)
    stage2.map(0, HPA, GIB_PAGES, level=3)
    statistics = stage2.statistics()
    assert (statistics.large_leaves, statistics.mapped_pages) == (1, GIB_PAGES)
    assert (statistics.tables, statistics.parked_tables) == (2, 2)
    assert list(stage2.mapped(0, 2 * GIB_PAGES)) == [(0, HPA, GIB_PAGES)]


def test_a_range_is_widened_to_the_large_leaves_at_its_ends() -> None:
    _, stage2 = make()
    page = PAGE_SIZE
    assert stage2.whole_leaves(TWO_MIB + page, 1) == (TWO_MIB + page, 1)
    stage2.map(TWO_MIB, HPA, 1024, level=2)
    stage2.map(3 * TWO_MIB, HPA + GIB, 512)
    stage2.map(GIB, HPA, GIB_PAGES, level=3)
    for asked, widened in (
        ((0, 512), (0, 512)),
        ((0, 513), (0, 1024)),
        ((TWO_MIB + page, 1), (TWO_MIB, 512)),
        ((TWO_MIB + page, 512), (TWO_MIB, 1024)),
        ((3 * TWO_MIB - page, 3), (2 * TWO_MIB, 512 + 2)),
        ((3 * TWO_MIB + page, 1), (3 * TWO_MIB + page, 1)),
        ((GIB + 7 * page, 1), (GIB, GIB_PAGES)),
        ((2 * GIB, 1), (2 * GIB, 1)),
        ((TWO_MIB + page, 0), (TWO_MIB + page, 0)),
    ):
        assert stage2.whole_leaves(*asked) == widened
    assert stage2.zap(*stage2.whole_leaves(TWO_MIB + page, 1)) == 512
    assert stage2.statistics().tables == 4, "no large leaf was split"


def test_bad_pools_are_refused() -> None:
    for pool, hpa in (
        (bytearray(PAGE_SIZE), POOL_HPA),
        (bytearray(5000), POOL_HPA),
        (bytes(8 * PAGE_SIZE), POOL_HPA),
        (bytearray(8 * PAGE_SIZE), 0x123),
        (bytearray(8 * PAGE_SIZE), (1 << 40) - PAGE_SIZE),
    ):
        with pytest.raises(RangeError, match="pool"):
            Stage2(pool, hpa)


def test_hand_made_entries_give_named_errors() -> None:
    pool, stage2 = make()
    stage2.map(0, HPA, 1)
    words = memoryview(pool).cast("Q")
    leaf = next(
        index for index in range(len(words)) if words[index] & ~0xFFF == HPA and words[index] & 1
    )
    good = words[leaf]
    for entry, write, expected in (
        (0, False, WalkReason.NOT_PRESENT),
        (good & ~USER, False, WalkReason.NOT_USER),
        (good & ~WRITABLE, True, WalkReason.NOT_WRITABLE),
        (good | 1 << 45, False, WalkReason.RESERVED_BIT),
    ):
        words[leaf] = entry
        assert reason(stage2, 0, write=write) is expected
    root = words[0]
    words[0] = root | LARGE
    assert reason(stage2, 0) is WalkReason.RESERVED_BIT
    words[0] = 0x27
    assert reason(stage2, 0) is WalkReason.TABLE_OUTSIDE_POOL
    words[0] = root
    assert reason(stage2, 1 << 40) is WalkReason.GPA_TOO_WIDE


_ADDRESSES = st.sampled_from([0, 3, 500, 511, 512, 1024, 262144, 1 << 27, (1 << 28) - 600])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(["map", "read-only", "zap"]),
                _ADDRESSES,
                st.integers(0, 90),
                st.integers(1, 600),
            ),
            st.tuples(st.just("large"), _ADDRESSES, st.just(0), st.sampled_from([512, 1024])),
            st.tuples(st.just("reclaim"), st.just(0), st.just(0), st.just(0)),
        ),
        max_size=14,
    )
)
def test_agrees_with_a_dictionary(steps: list[tuple[str, int, int, int]]) -> None:
    """Any order of operations against the plainest model; statistics and tables included."""
    _, stage2 = make(256)
    model: dict[int, tuple[int, bool]] = {}
    for number, (what, base, offset, count) in enumerate(steps):
        gfn = base + offset
        if what == "large":
            gfn &= ~511
        count = min(count, (1 << 28) - gfn)
        hpa = HPA + number * (1 << 32)
        if what == "reclaim":
            stage2.reclaim()
        elif what == "zap":
            gone = [page for page in range(gfn, gfn + count) if model.pop(page, None)]
            assert stage2.zap(gfn * PAGE_SIZE, count) == len(gone)
        elif what != "large" or count % 512 == 0:
            writable = what != "read-only"
            level = 2 if what == "large" else 1
            stage2.map(gfn * PAGE_SIZE, hpa, count, writable=writable, level=level)
            for page in range(count):
                model[gfn + page] = (hpa + page * PAGE_SIZE, writable)
    seen = {
        gpa // PAGE_SIZE + page: hpa + page * PAGE_SIZE
        for gpa, hpa, count in stage2.mapped(0, 1 << 28)
        for page in range(count)
    }
    assert seen == {page: hpa for page, (hpa, _) in model.items()}
    assert stage2.statistics().mapped_pages == len(model)
    for page in list(model)[::37]:
        leaf = stage2.walk(page * PAGE_SIZE)
        assert (leaf.hpa, leaf.writable) == model[page]
    assert stage2.zap(0, 1 << 28) == len(model)
    statistics = stage2.statistics()
    assert (statistics.tables, statistics.mapped_pages, statistics.large_leaves) == (1, 0, 0)
