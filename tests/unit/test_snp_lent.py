# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from snp_machine import (
    ASID,
    GCTX,
    LARGE,
    OTHER,
    PAGE,
    POLICY,
    Pages,
    assign,
    launched,
    machine,
    refused,
)

from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.guestcontext import Policy
from hwemu.snp.hostops import HYPERVISOR, psmash, rmpupdate
from hwemu.snp.launch import PageType
from hwemu.snp.rmpentry import PAGE_SIZE, Entry, PageState


def test_reclaim_lends_back_what_it_lent() -> None:
    firmware, _ = launched()
    rmp = firmware.rmp
    firmware.page_reclaim(PAGE)
    assert rmp.state(PAGE) is PageState.GUEST_INVALID
    before = rmp.key()
    firmware.page_reclaim(PAGE)  # not immutable: nothing to do
    firmware.page_reclaim(OTHER)
    assert rmp.key() == before
    assert refused(firmware, firmware.page_reclaim, 99) is FwStatus.INVALID_ADDRESS
    assert refused(firmware, firmware.page_reclaim, PAGE, 1) is FwStatus.INVALID_PAGE_SIZE
    assert refused(firmware, firmware.page_reclaim, GCTX) is FwStatus.INVALID_PAGE_STATE
    assign(rmp, OTHER, immutable=1)
    firmware.md_init(GCTX, OTHER)
    assert rmp.state(OTHER) is PageState.METADATA
    firmware.page_reclaim(OTHER)
    assert rmp.state(OTHER) is PageState.RECLAIM
    assert refused(firmware, firmware.md_init, GCTX, 9) is FwStatus.INVALID_PAGE_STATE


def test_small_pages_become_a_large_one_again() -> None:
    firmware, _ = launched()
    rmp = firmware.rmp
    assign(rmp, LARGE, size=1, gpa=0x8000, asid=ASID, immutable=1)
    firmware.launch_update(GCTX, LARGE, PageType.NORMAL, size=1)
    whole = rmp.key()
    assert psmash(rmp, LARGE).ok
    assert refused(firmware, firmware.page_unsmash, LARGE) is FwStatus.INVALID_PAGE_STATE
    assert refused(firmware, firmware.page_unsmash, LARGE + 1) is FwStatus.INVALID_PARAM
    for odd in ("pfn", "none"):
        for step in range(4):
            gpa = 0x8000 + step * 0x1000 + (0x9000 if odd == "pfn" and step == 2 else 0)
            rmp.store(LARGE + step, type(rmp.raw(LARGE))(
                True, 0, True, gpa, ASID, validated=True, permissions=(15, 0, 0, 0)))  # fmt: skip
        if odd == "pfn":
            assert refused(firmware, firmware.page_unsmash, LARGE) is FwStatus.INVALID_PAGE_STATE
    firmware.page_unsmash(LARGE)
    assert rmp.state(LARGE) is PageState.PRE_SWAP
    firmware.page_reclaim(LARGE, 1)
    assert rmp.key() == whole


def test_a_page_moves_with_its_address_and_permissions() -> None:
    firmware, memory = launched()
    rmp = firmware.rmp
    memory.write(PAGE, b"m" * PAGE_SIZE)
    assign(rmp, OTHER, gpa=0x7000, asid=ASID, immutable=1)
    assert refused(firmware, firmware.page_move, GCTX, PAGE, PAGE) is FwStatus.INVALID_PAGE_STATE
    rmp.store(PAGE, type(rmp.raw(PAGE))(
        True, 0, True, 0x5000, ASID, validated=True, permissions=(15, 3, 0, 0)))  # fmt: skip
    firmware.page_move(GCTX, PAGE, OTHER)
    assert (rmp.state(PAGE), rmp.state(OTHER)) == (PageState.GUEST_INVALID, PageState.GUEST_VALID)
    assert (rmp.entry(OTHER).gpa, rmp.entry(OTHER).permissions) == (0x5000, (15, 3, 0, 0))
    assert memory.read(OTHER) == b"m" * PAGE_SIZE
    assert refused(firmware, firmware.page_move, GCTX, PAGE, OTHER) is FwStatus.INVALID_PAGE_STATE
    assert refused(firmware, firmware.page_move, GCTX, PAGE, OTHER, 1) is FwStatus.INVALID_PAGE_SIZE
    for pfn, asid in ((8, 6), (9, ASID)):
        assign(rmp, pfn, gpa=0x5000, asid=asid, immutable=1)
    assert refused(firmware, firmware.page_move, GCTX, 8, 9) is FwStatus.INVALID_PAGE_OWNER


def test_metadata_pages_move_too() -> None:
    firmware, _ = launched()
    for pfn in (8, 9):
        assign(firmware.rmp, pfn, immutable=1)
    firmware.md_init(GCTX, 8)
    firmware.page_move(GCTX, 8, 9)
    assert firmware.rmp.state(8) is PageState.FIRMWARE
    assert firmware.rmp.state(9) is PageState.METADATA


def test_a_page_of_a_running_guest_is_moved_and_it_notices_nothing() -> None:
    """Guest-Valid, Pre-Swap by RMPUPDATE, moved, Guest-Valid."""
    firmware, _ = launched()
    rmp = firmware.rmp
    firmware.launch_update(GCTX, PAGE, PageType.NORMAL)
    rmp.store(PAGE, replace(rmp.raw(PAGE), permissions=(15, 3, 0, 1)))
    valid = rmp.raw(PAGE)
    firmware.launch_finish(GCTX)
    assign(rmp, PAGE, gpa=0x5000, asid=ASID, immutable=1)
    assert (rmp.state(PAGE), rmp.raw(PAGE).permissions) == (PageState.PRE_SWAP, (15, 3, 0, 1))
    assign(rmp, OTHER, asid=ASID, immutable=1)
    firmware.page_move(GCTX, PAGE, OTHER)
    assert rmp.raw(OTHER) == valid
    assert rmpupdate(rmp, PAGE, HYPERVISOR).ok


def test_nothing_moves_against_the_guests_policy() -> None:
    firmware, _ = machine()
    rmp = firmware.rmp
    assign(rmp, GCTX, immutable=1)
    firmware.gctx_create(GCTX)
    firmware.launch_start(GCTX, POLICY | Policy.PAGE_SWAP_DISABLE)
    firmware.activate(GCTX, ASID)
    for pfn in (PAGE, OTHER):
        assign(rmp, pfn, asid=ASID, immutable=1)
    assert refused(firmware, firmware.page_move, GCTX, PAGE, OTHER) is FwStatus.POLICY_FAILURE


def test_a_range_is_reclaimed_whole_or_not_at_all() -> None:
    firmware, _ = launched()
    rmp = firmware.rmp
    for pfn, valid in ((8, True), (9, False), (10, True), (11, True)):
        rmp.store(pfn, Entry(True, 0, pfn < 11, pfn * PAGE_SIZE, ASID, False, valid, (15, 1, 0, 0)))
    loop = firmware.copy()
    for pfn in range(8, 12):
        loop.page_reclaim(pfn)
    firmware.page_reclaim_range(8, 4)
    assert firmware.key() == loop.key()
    rmp.freeze(8, 4, immutable=True)
    firmware.page_reclaim_range(7, 4)  # one of them is nobody's
    assert [rmp.raw(pfn).immutable for pfn in range(7, 12)] == [False] * 4 + [True]
    assert refused(firmware, firmware.page_reclaim_range, 13, 4) is FwStatus.INVALID_ADDRESS
    assign(rmp, 12, size=1, gpa=0xC000, asid=ASID, immutable=1)
    assert refused(firmware, firmware.page_reclaim_range, 11, 2) is FwStatus.INVALID_PAGE_SIZE


def test_moves_of_a_range_are_a_loop_of_moves() -> None:
    """With pages of every state, owner and size in the way, and ranges that meet."""
    dice = random.Random(4)
    ends: Counter[str] = Counter()
    for _ in range(400):
        firmware, memory = launched()
        rmp, source, target = firmware.rmp, dice.randrange(4, 8), dice.randrange(8, 12)
        npages = dice.randrange(5)
        for pfn in range(4, 16):
            memory.write(pfn, bytes([pfn]) * PAGE_SIZE)
            valid = source <= pfn < source + npages and dice.random() < 0.95
            rmp.store(pfn, Entry(
                True, 0, dice.random() < 0.98, pfn * PAGE_SIZE, ASID, False,
                valid, (15, pfn % 4, 0, 0)))  # fmt: skip
        if dice.random() < 0.2:
            rmp.store(dice.randrange(4, 16), Entry())
        if dice.random() < 0.2:
            rmp.store(8, Entry(True, 1, True, 0x8000, ASID))
        if dice.random() < 0.1:
            target += 4  # behind the end of the table, some of it
        loop, moved = firmware.copy(twin := Pages()), 0
        twin.pages = dict(memory.pages)
        for moved in range(npages + 1):
            try:
                if moved < npages:
                    loop.page_move(GCTX, source + moved, target + moved)
            except FirmwareRefused as error:
                stopped = str(error)
                break
        else:
            stopped = ""
        done, why = firmware.page_move_range(GCTX, source, target, npages)
        assert (done, str(why or "")) == (moved, stopped)
        assert (firmware.key(), memory.pages) == (loop.key(), twin.pages)
        ends["whole" if done == npages > 1 else "part"] += 1
    assert min(ends.values()) > 50, ends
