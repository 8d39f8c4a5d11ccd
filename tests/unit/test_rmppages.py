# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of SNP guests that are lent to be moved, in a table whose large pages have four frames."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from snp_machine import ASID, GCTX, POLICY, Pages

from hwemu.snp.firmware import Firmware
from hwemu.snp.hostops import NewState, rmpupdate
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SIZE, Entry, PageState
from kvmsim.confidential.rmppages import Lost, RmpPages

FRAMES, GROUP = 64, 4
OLD, NEW = 8, 32  #: both begin a large page


@pytest.fixture
def memory() -> Pages:
    return Pages()


@pytest.fixture
def rmp() -> Rmp:
    return Rmp(FRAMES, group=GROUP, max_asid=9)


@pytest.fixture
def firmware(rmp: Rmp, memory: Pages) -> Firmware:
    made = Firmware(rmp, memory)
    made.init()
    assert rmpupdate(rmp, GCTX, NewState(True, immutable=True)).ok
    made.gctx_create(GCTX)
    made.launch_start(GCTX, POLICY)
    made.activate(GCTX, ASID)
    return made


@pytest.fixture
def pages(rmp: Rmp, firmware: Firmware) -> RmpPages:
    return RmpPages(rmp, firmware)


def put(rmp: Rmp, pfn: int, *, large: bool = False, valid: bool = True, asid: int = ASID) -> Entry:
    entry = Entry(True, int(large), False, pfn * PAGE_SIZE, asid, False, valid, (15, pfn % 8, 0, 1))
    rmp.store(pfn, entry)
    return entry


def states(rmp: Rmp, pfn: int, npages: int) -> list[str]:
    return [rmp.state(frame).value for frame in range(pfn, pfn + npages)]


def test_what_moves_keeps_size_validation_and_permissions(
    rmp: Rmp, pages: RmpPages, memory: Pages
) -> None:
    large, small = put(rmp, OLD, large=True), put(rmp, OLD + 5)
    pending = put(rmp, OLD + 6, valid=False)
    for frame in range(OLD, OLD + 8):
        memory.write(frame, bytes([frame]) * PAGE_SIZE)
    pages.lend(ASID, OLD, 8)
    lent = [*["Pre-Swap"] * 4, "Hypervisor", "Pre-Swap", "Pre-Guest", "Hypervisor"]
    assert states(rmp, OLD, 8) == lent
    assert pages.any_of(ASID, OLD, 8)
    assert list(pages.move(GCTX, ASID, OLD, NEW, 8)) == []
    assert states(rmp, OLD, 8) == ["Hypervisor"] * 8
    assert [rmp.raw(NEW), rmp.raw(NEW + 5), rmp.raw(NEW + 6)] == [large, small, pending]
    assert not pages.any_of(ASID, OLD, 8)
    assert all(memory.read(NEW + at)[0] == OLD + at for at in (0, 1, 2, 3, 5, 6))
    assert not any(memory.read(NEW + at)[0] for at in (4, 7)), "those are nobody's"


def test_a_large_page_whose_frames_lie_otherwise_becomes_small(rmp: Rmp, pages: RmpPages) -> None:
    large = put(rmp, OLD, large=True)
    pages.lend(ASID, OLD, 4)
    assert list(pages.move(GCTX, ASID, OLD, NEW + 1, 4)) == []
    for step in range(4):
        gpa = (OLD + step) * PAGE_SIZE
        assert rmp.raw(NEW + 1 + step) == replace(large, size=0, gpa=gpa)
    assert not rmp.assigned(OLD, 4)


def test_so_does_one_of_which_a_part_leaves(rmp: Rmp, pages: RmpPages) -> None:
    put(rmp, OLD, large=True)
    pages.lend(ASID, OLD + 2, 4)
    assert states(rmp, OLD, 4) == ["Guest-Valid"] * 2 + ["Pre-Swap"] * 2
    assert list(pages.move(GCTX, ASID, OLD + 2, NEW + 2, 4)) == []
    assert states(rmp, OLD, 4) == ["Guest-Valid"] * 2 + ["Hypervisor"] * 2
    assert states(rmp, NEW, 4) == ["Hypervisor"] * 2 + ["Guest-Valid"] * 2


def test_what_is_freed_on_its_way_takes_nothing_along(rmp: Rmp, pages: RmpPages) -> None:
    put(rmp, OLD, large=True)
    pages.lend(ASID, OLD, 4)
    pages.take_back(OLD + 1, 1)
    assert states(rmp, OLD, 4) == ["Pre-Swap", "Hypervisor", "Pre-Swap", "Pre-Swap"]
    assert list(pages.move(GCTX, ASID, OLD, NEW, 4)) == []
    assert states(rmp, NEW, 4) == ["Guest-Valid", "Hypervisor", "Guest-Valid", "Guest-Valid"]


def test_others_are_left_alone(rmp: Rmp, pages: RmpPages) -> None:
    other = put(rmp, OLD, asid=ASID + 1)
    pages.lend(ASID, 0, FRAMES)
    assert rmp.raw(OLD) == other
    assert list(pages.move(GCTX, ASID, OLD, NEW, 8)) == []
    assert rmp.raw(OLD) == other
    assert not rmp.assigned(NEW, 8)


@pytest.mark.parametrize("large", [False, True])
def test_what_cannot_be_had_is_lost_and_no_more_than_that(
    rmp: Rmp, pages: RmpPages, large: bool
) -> None:
    """The new frames are behind the end of the table, or somebody has one of them."""
    for frame in range(OLD, OLD + 8, GROUP if large else 1):
        put(rmp, frame, large=large)
    put(rmp, NEW + 6, asid=ASID + 1, valid=False)
    rmp.freeze(NEW + 6, 1, immutable=True)
    pages.lend(ASID, OLD, 8)
    (lost,) = pages.move(GCTX, ASID, OLD, NEW, 8)
    assert (lost.gpa, lost.npages) == ((OLD + 6) * PAGE_SIZE, 2)
    assert "immutable" in lost.why
    assert states(rmp, OLD, 8) == ["Hypervisor"] * 8
    assert states(rmp, NEW, 8) == ["Guest-Valid"] * 6 + ["Pre-Guest", "Hypervisor"]
    assert rmp.entry(NEW + 6).asid == ASID + 1
    pages.lend(ASID, NEW, 4)
    assert list(pages.move(GCTX, ASID, NEW, FRAMES, 4)) == [
        Lost(OLD * PAGE_SIZE, 4, "every frame of the page has an entry")
    ]
    assert not rmp.assigned(NEW, 4)


def test_what_was_not_lent_is_refused_by_the_firmware(rmp: Rmp, pages: RmpPages) -> None:
    put(rmp, OLD)
    (lost,) = pages.move(GCTX, ASID, OLD, NEW, 1)
    assert "SNP_PAGE_MOVE" in lost.why
    assert "the pages are lent" in lost.why
    assert not rmp.assigned(OLD)
    assert not rmp.assigned(NEW)


def test_any_order_of_leaving_freeing_and_arriving(rmp: Rmp, pages: RmpPages) -> None:
    """A page is where it should be, or freed; it is its guest's as before, or nobody's."""
    dice = random.Random(5)
    at = OLD
    alive: dict[int, PageState] = {}
    for _ in range(80):
        for frame in range(at, at + 16):
            offset = frame - at
            if offset not in alive and not rmp.assigned(frame) and dice.random() < 0.3:
                fits = not frame % GROUP and offset <= 16 - GROUP
                large = fits and not rmp.assigned(frame, GROUP)
                valid = dice.random() < 0.7
                put(rmp, frame, large=large, valid=valid)
                state = PageState.GUEST_VALID if valid else PageState.GUEST_INVALID
                alive |= dict.fromkeys(range(offset, offset + (GROUP if large else 1)), state)
        pages.lend(ASID, at, 16)
        for _ in range(dice.randrange(3)):
            start = dice.randrange(16)
            end = min(start + dice.choice((1, 1, 4, 7)), 16)
            pages.take_back(at + start, end - start)
            for offset in range(start, end):
                alive.pop(offset, None)
        new = NEW if at < NEW else OLD
        if dice.random() < 0.2:
            new += 1  # nothing large fits
        assert list(pages.move(GCTX, ASID, at, new, 16)) == []
        assert not rmp.assigned(at, 16)
        at = new
        for offset in range(16):
            assert rmp.state(at + offset) is alive.get(offset, PageState.HYPERVISOR)
