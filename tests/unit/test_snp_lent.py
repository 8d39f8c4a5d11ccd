# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from snp_machine import (
    ASID,
    GCTX,
    LARGE,
    OTHER,
    PAGE,
    assign,
    launched,
    refused,
)

from hwemu.snp.fwstatus import FwStatus
from hwemu.snp.hostops import psmash
from hwemu.snp.launch import PageType
from hwemu.snp.rmpentry import PAGE_SIZE, PageState


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
