# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwemu.shootdown import Shootdown
from hwemu.stage2 import PAGE_SIZE, Stage2, WalkError
from hwemu.tlb import Tlb


def test_lookup_returns_what_was_filled_with_the_offset_in_the_page() -> None:
    tlb = Tlb()
    assert tlb.lookup(0x5123) is None
    tlb.fill(0x5000, 0x8000_9000)
    assert tlb.lookup(0x5123) == 0x8000_9123
    assert tlb.lookup(0x6123) is None
    statistics = tlb.statistics()
    assert (statistics.hits, statistics.misses, statistics.fills) == (1, 2, 1)


def test_read_only_entry_answers_reads_only() -> None:
    tlb = Tlb()
    tlb.fill(0x5000, 0x9000, writable=False)
    assert tlb.lookup(0x5000) == 0x9000
    assert tlb.lookup(0x5000, write=True) is None
    tlb.fill(0x5000, 0x9000, writable=True)
    assert tlb.lookup(0x5000, write=True) == 0x9000


def test_guests_do_not_see_each_other() -> None:
    tlb = Tlb()
    tlb.fill(0x5000, 0x9000, asid=1)
    tlb.fill(0x5000, 0xA000, asid=2)
    assert tlb.lookup(0x5000, asid=1) == 0x9000
    assert tlb.lookup(0x5000, asid=2) == 0xA000
    tlb.flush_asid(1)
    assert tlb.lookup(0x5000, asid=1) is None
    assert tlb.lookup(0x5000, asid=2) == 0xA000


def test_a_full_set_evicts_in_turn() -> None:
    tlb = Tlb(entries=8, ways=2)  # four sets
    for gfn in (0, 4, 8):
        tlb.fill(gfn * PAGE_SIZE, gfn * PAGE_SIZE)
    assert tlb.lookup(0) is None
    assert tlb.lookup(4 * PAGE_SIZE) == 4 * PAGE_SIZE
    assert tlb.lookup(8 * PAGE_SIZE) == 8 * PAGE_SIZE
    assert tlb.statistics().evictions == 1


def test_flush_range_forgets_exactly_the_range() -> None:
    tlb = Tlb()
    for gfn in range(100):
        tlb.fill(gfn * PAGE_SIZE, gfn * PAGE_SIZE)
    assert tlb.flush_range(10 * PAGE_SIZE, 20) == 20
    cached = [gfn for gfn in range(100) if tlb.lookup(gfn * PAGE_SIZE) is not None]
    assert cached == [gfn for gfn in range(100) if not 10 <= gfn < 30]


def test_a_forgotten_flush_reaches_the_old_page() -> None:
    """The reason why this cache exists."""
    stage2 = Stage2(bytearray(64 * PAGE_SIZE), 0x1000_0000)
    tlb = Tlb()

    def reach(gpa: int) -> int:
        cached = tlb.lookup(gpa)
        if cached is None:
            cached = stage2.walk(gpa).hpa
            tlb.fill(gpa, cached)
        return cached

    stage2.map(0x5000, 0x9000, 1)
    assert reach(0x5008) == 0x9008
    assert stage2.zap(0x5000, 1) == 1
    assert reach(0x5008) == 0x9008, "no flush: the stale page is still reached"
    tlb.flush_range(0x5000, 1)
    with pytest.raises(WalkError, match="not-present"):
        reach(0x5008)


@pytest.mark.parametrize(("entries", "ways"), [(0, 1), (12, 4), (7, 2), (8, 0)])
def test_impossible_shapes_are_refused(entries: int, ways: int) -> None:
    with pytest.raises(ValueError, match="power"):
        Tlb(entries, ways)


def test_copy_is_independent_and_key_follows_contents() -> None:
    tlb = Tlb(entries=8, ways=2)
    tlb.fill(0x1000, 0x2000)
    other = tlb.copy()
    assert other.key() == tlb.key()
    other.flush_all()
    assert tlb.lookup(0x1000) == 0x2000
    assert other.key() != tlb.key()
    assert other.key() == Tlb(entries=8, ways=2).key()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["fill", "flush"]), st.integers(0, 40), st.integers(1, 9)),
        max_size=60,
    )
)
def test_never_answers_with_something_flushed(steps: list[tuple[str, int, int]]) -> None:
    tlb = Tlb(entries=16, ways=2)
    truth: dict[int, int] = {}
    for count, (what, gfn, length) in enumerate(steps):
        if what == "flush":
            tlb.flush_range(gfn * PAGE_SIZE, length)
            for gone in range(gfn, gfn + length):
                truth.pop(gone, None)
        else:
            tlb.fill(gfn * PAGE_SIZE, count * PAGE_SIZE)
            truth[gfn] = count * PAGE_SIZE
        for page in range(50):
            answer = tlb.lookup(page * PAGE_SIZE)
            assert answer is None or answer == truth.get(page)


# -- flush epochs -------------------------------------------------------------------------------


def test_an_idle_vcpu_flushes_at_its_next_entry() -> None:
    shootdown = Shootdown(2)
    assert shootdown.enter(0) is False
    shootdown.leave(0)
    epoch = shootdown.request()
    assert shootdown.drained(epoch)
    assert shootdown.pending(0)
    assert shootdown.pending(1)
    assert shootdown.enter(0) is True
    assert not shootdown.pending(0)
    shootdown.leave(0)
    assert shootdown.enter(0) is False


def test_a_running_vcpu_keeps_the_epoch_open_until_it_leaves() -> None:
    shootdown = Shootdown(2)
    shootdown.enter(1)
    epoch = shootdown.request()
    assert not shootdown.drained(epoch)
    assert shootdown.stragglers(epoch) == (1,)
    assert shootdown.in_guest() == (1,)
    shootdown.leave(1)
    assert shootdown.drained(epoch)
    assert shootdown.enter(1) is True
    assert shootdown.drained(epoch), "it entered after the request and has flushed"


def test_entering_twice_is_an_error() -> None:
    shootdown = Shootdown(1)
    shootdown.enter(0)
    with pytest.raises(RuntimeError, match="twice"):
        shootdown.enter(0)
    with pytest.raises(ValueError, match="none is the least"):
        Shootdown(-1)


def test_a_vcpu_that_comes_later_has_nothing_to_forget() -> None:
    shootdown = Shootdown()
    epoch = shootdown.request()
    assert shootdown.drained(epoch)
    assert shootdown.add() == 0
    assert not shootdown.enter(0)
    assert shootdown.drained(epoch)
    newer = shootdown.request()
    assert shootdown.stragglers(newer) == (0,)
    shootdown.leave(0)
    assert shootdown.add() == 1
    assert shootdown.enter(0)
    assert not shootdown.enter(1)


def test_every_order_of_zap_and_entry_is_safe() -> None:
    """Zap, request and drained against enter, use and leave, every interleaving of two runs.

    The vCPU's TLB is a set. Once drained, no use may hit a translation older than the zap.
    """
    lane = ["zap", "request", "drained"]
    vcpu = ["enter", "use", "leave", "enter", "use", "leave"]
    for order in _merges(len(lane), len(vcpu)):
        shootdown = Shootdown(1)
        table = {"page"}
        cached: set[str] = set()
        steps = {"L": iter(lane), "V": iter(vcpu)}
        proven = False
        epoch = 0
        for who in order:
            step = next(steps[who])
            if step == "zap":
                table.clear()
            elif step == "request":
                epoch = shootdown.request()
            elif step == "drained":
                proven = shootdown.drained(epoch)
            elif step == "enter":
                if shootdown.enter(0):
                    cached.clear()
            elif step == "use":
                cached |= table
                assert not (proven and cached), f"stale use after proof in order {order}"
            else:
                shootdown.leave(0)


def _merges(left: int, right: int) -> list[str]:
    if not left or not right:
        return ["L" * left + "V" * right]
    return ["L" + rest for rest in _merges(left - 1, right)] + [
        "V" + rest for rest in _merges(left, right - 1)
    ]


def test_key_is_relative_and_copy_independent() -> None:
    one, two = Shootdown(2), Shootdown(2)
    for _ in range(3):
        two.request()
    two.enter(0)
    two.leave(0)
    two.enter(1)
    two.leave(1)
    assert one.key() == two.key()
    copy = two.copy()
    copy.request()
    assert copy.key() != two.key()
    assert not two.pending(0)


@pytest.mark.parametrize("level", [2, 3])
def test_a_large_entry_translates_all_of_its_page(level: int) -> None:
    tlb = Tlb(64, 4)
    size = PAGE_SIZE << 9 * (level - 1)
    tlb.fill(size + 0x12_3456, (1 << 39) + 0x12_3456, level=level)
    for offset in (0, 0x5123, size - 1):
        assert tlb.lookup(size + offset) == (1 << 39) + offset
    assert tlb.lookup(size - 1) is tlb.lookup(2 * size) is None
    assert tlb.statistics().fills == 1


def test_a_flush_of_one_page_takes_the_large_entry_over_it() -> None:
    tlb = Tlb(64, 4)
    two = 2 << 20
    tlb.fill(0, 1 << 39, level=2)
    tlb.fill(two, 1 << 38, level=2)
    assert tlb.flush_range(0x7000, 1) == 1
    assert tlb.lookup(0) is None
    assert tlb.lookup(two) == 1 << 38
    assert tlb.flush_range(two - PAGE_SIZE, 1) == 0
    assert tlb.flush_range(two - PAGE_SIZE, 2) == 1


def test_a_forgotten_flush_of_a_split_leaf_is_visible() -> None:
    """The smaller entry answers first, the larger one for all that is not cached small."""
    tlb = Tlb(64, 4)
    tlb.fill(0, 1 << 39, level=2)
    tlb.fill(0x5000, 1 << 38)
    assert tlb.lookup(0x5000) == 1 << 38
    assert tlb.lookup(0x6000) == (1 << 39) + 0x6000


def test_a_large_read_only_entry_lets_a_small_one_answer_a_write() -> None:
    tlb = Tlb(64, 4)
    tlb.fill(0, 1 << 39, level=2, writable=False)
    assert tlb.lookup(0x5000, write=True) is None
    tlb.fill(0x5000, (1 << 39) + 0x5000)
    assert tlb.lookup(0x5000, write=True) == (1 << 39) + 0x5000


@pytest.mark.parametrize("level", [0, 4])
def test_there_are_three_levels(level: int) -> None:
    with pytest.raises(ValueError, match="level"):
        Tlb().fill(0, 0, level=level)


def test_copies_of_large_entries_go_apart() -> None:
    tlb = Tlb(64, 4)
    tlb.fill(0, 1 << 39, level=2)
    twin = tlb.copy()
    assert twin.key() == tlb.key()
    twin.flush_range(0x5000, 1)
    assert tlb.lookup(0x5000) == (1 << 39) + 0x5000
    assert twin.key() != tlb.key()
