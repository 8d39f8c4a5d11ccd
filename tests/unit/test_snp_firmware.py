# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pytest
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

from hwemu.snp import cpuidpage
from hwemu.snp.asids import AsidState
from hwemu.snp.firmware import Firmware, VmplMasks
from hwemu.snp.fwstatus import FwStatus
from hwemu.snp.guestcontext import GuestState, IdBlock, Policy
from hwemu.snp.guestops import Leaf, Vcpu, pvalidate
from hwemu.snp.hostops import HYPERVISOR, psmash, rmpupdate
from hwemu.snp.launch import NO_DIGEST, PageType
from hwemu.snp.outcome import Returned
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SIZE, PageState

# -- the life of a guest


def test_a_launch_makes_pages_the_guests_and_measures_them() -> None:
    firmware, memory = launched()
    memory.write(PAGE, b"kernel".ljust(PAGE_SIZE, b"\0"))
    masks = VmplMasks(vmpl1=7, vmpl2=1)
    firmware.launch_update(GCTX, PAGE, PageType.NORMAL, masks=masks)
    entry = firmware.rmp.entry(PAGE)
    assert firmware.rmp.state(PAGE) is PageState.GUEST_VALID
    assert (entry.gpa, entry.asid, entry.permissions) == (0x5000, ASID, (15, 7, 1, 0))
    contents = hashlib.sha384(b"kernel".ljust(PAGE_SIZE, b"\0")).digest()
    info = bytes(48) + contents + struct.pack("<HBBBBBBQ", 0x70, 1, 0, 0, 1, 7, 0, 0x5000)
    assert len(info) == 0x70
    assert firmware.guest_status(GCTX).digest == hashlib.sha384(info).digest()
    firmware.launch_finish(GCTX)
    assert firmware.guest_status(GCTX).state is GuestState.RUNNING


@pytest.mark.parametrize(
    ("kind", "hashed", "left"),
    [
        (PageType.NORMAL, True, "kept"),
        (PageType.VMSA, True, "kept"),
        (PageType.ZERO, False, "zero"),
        (PageType.UNMEASURED, False, "kept"),
        (PageType.SECRETS, False, "keys"),
        (PageType.CPUID, False, "kept"),
    ],
)
def test_page_types_differ_in_what_is_hashed_and_left(
    kind: PageType, hashed: bool, left: str
) -> None:
    firmware, memory = launched()
    page = b"x" * PAGE_SIZE
    memory.write(PAGE, page)
    firmware.launch_update(GCTX, PAGE, kind)
    expected = page
    if kind is PageType.VMSA:
        expected = page[:0x2F0] + bytes(16) + page[0x300:]
    contents = hashlib.sha384(expected).digest() if hashed else NO_DIGEST
    info = bytes(48) + contents + struct.pack("<HB5xQ", 0x70, kind, 0x5000)
    assert firmware.guest_status(GCTX).digest == hashlib.sha384(info).digest()
    state = PageState.VMSA if kind is PageType.VMSA else PageState.GUEST_VALID
    assert firmware.rmp.state(PAGE) is state
    after = memory.read(PAGE)
    if left == "keys":
        version, imi = struct.unpack_from("<II", after)
        assert (version, imi) == (3, 0)
        assert after[0x20:0xA0] == b"".join(firmware.guest_status(GCTX).keys)
        assert not any(after[0xA0:])
    else:
        assert after == (page if left == "kept" else bytes(PAGE_SIZE))


def test_a_large_page_is_measured_as_small_ones() -> None:
    firmware, memory = launched()
    large, memory_large = launched()
    for step in range(4):
        for pages in (memory, memory_large):
            pages.write(LARGE + step, bytes([step]) * PAGE_SIZE)
        assign(firmware.rmp, LARGE + step, immutable=1, gpa=0x8000 + step * 0x1000, asid=ASID)
        firmware.launch_update(GCTX, LARGE + step, PageType.NORMAL)
    assign(large.rmp, LARGE, immutable=1, gpa=0x8000, asid=ASID, size=1)
    large.launch_update(GCTX, LARGE, PageType.NORMAL, size=1)
    assert large.guest_status(GCTX).digest == firmware.guest_status(GCTX).digest
    assert psmash(large.rmp, LARGE).ok
    assert large.rmp.key() == firmware.rmp.key()


def test_order_of_pages_changes_the_digest() -> None:
    digests = set()
    for order in ((PAGE, OTHER), (OTHER, PAGE)):
        firmware, memory = launched()
        assign(firmware.rmp, OTHER, immutable=1, gpa=0x6000, asid=ASID)
        for pfn in order:
            memory.write(pfn, bytes([pfn]) * PAGE_SIZE)
            firmware.launch_update(GCTX, pfn, PageType.NORMAL)
        digests.add(firmware.guest_status(GCTX).digest)
    assert len(digests) == 2


def test_teardown_gives_everything_back() -> None:
    firmware, _ = launched()
    firmware.launch_update(GCTX, PAGE, PageType.NORMAL)
    firmware.launch_finish(GCTX)
    firmware.decommission(GCTX)
    assert firmware.rmp.state(GCTX) is PageState.FIRMWARE
    firmware.page_reclaim(GCTX)
    assert firmware.rmp.state(GCTX) is PageState.RECLAIM
    for pfn in (GCTX, PAGE):
        assert rmpupdate(firmware.rmp, pfn, HYPERVISOR).ok
    assert not firmware.rmp.assigned(0, 16)


# -- ASIDs


def test_an_asid_is_dirty_until_caches_are_flushed() -> None:
    firmware, _ = launched()
    rmp = firmware.rmp
    firmware.page_reclaim(PAGE)
    assert rmpupdate(rmp, PAGE, HYPERVISOR).ok
    firmware.decommission(GCTX)
    firmware.gctx_create(GCTX)
    firmware.launch_start(GCTX, POLICY)
    assert firmware.asid_state(ASID) is AsidState.CACHED
    assert refused(firmware, firmware.activate, GCTX, ASID) is FwStatus.DFFLUSH_REQUIRED
    assert refused(firmware, firmware.df_flush) is FwStatus.WBINVD_REQUIRED
    firmware.wbinvd()
    assert refused(firmware, firmware.activate, GCTX, ASID) is FwStatus.DFFLUSH_REQUIRED
    firmware.df_flush()
    firmware.activate(GCTX, ASID)
    assert refused(firmware, firmware.activate, GCTX, 6) is FwStatus.ACTIVE


def test_an_asid_has_one_guest_and_no_pages_of_the_last() -> None:
    firmware, _ = launched()
    assign(firmware.rmp, OTHER, immutable=1)
    firmware.gctx_create(OTHER)
    firmware.launch_start(OTHER, POLICY)
    assert refused(firmware, firmware.activate, OTHER, ASID) is FwStatus.ASID_OWNED
    for asid in (0, 10):
        assert refused(firmware, firmware.activate, OTHER, asid) is FwStatus.INVALID_ASID
    assign(firmware.rmp, 8, asid=7, gpa=0x1000)
    assert refused(firmware, firmware.activate, OTHER, 7) is FwStatus.ASID_OWNED


# -- refusals


def test_commands_want_an_initialized_platform() -> None:
    firmware = Firmware(Rmp(16, group=4, max_asid=9), Pages())
    for command in (
        firmware.df_flush,
        lambda: firmware.gctx_create(GCTX),
        lambda: firmware.page_reclaim(PAGE),
        lambda: firmware.page_unsmash(LARGE),
        lambda: firmware.launch_start(GCTX, POLICY),
    ):
        assert refused(firmware, command) is FwStatus.INVALID_PLATFORM_STATE
    firmware.init()
    assert refused(firmware, firmware.init) is FwStatus.INVALID_PLATFORM_STATE


def test_init_wants_an_empty_table() -> None:
    rmp = Rmp(16, group=4)
    assign(rmp, PAGE, asid=1)
    status = refused(Firmware(rmp, Pages()), Firmware(rmp, Pages()).init)
    assert status is FwStatus.RMP_INITIALIZATION_FAILED


def test_a_context_is_made_of_a_firmware_page() -> None:
    firmware, _ = launched()
    for pfn in (OTHER, PAGE, GCTX, 99):
        status = refused(firmware, firmware.gctx_create, pfn)
        assert status is FwStatus.INVALID_PAGE_STATE


@pytest.mark.parametrize(
    "policy",
    [0, int(Policy.SMT), POLICY | 2 << 8, POLICY | 1 << 8 | 99, POLICY | 1 << 40, 1 << 64],
)
def test_policies_that_are_refused(policy: int) -> None:
    firmware, _ = machine()
    assign(firmware.rmp, GCTX, immutable=1)
    firmware.gctx_create(GCTX)
    status = refused(firmware, firmware.launch_start, GCTX, policy)
    assert status is FwStatus.POLICY_FAILURE


def test_launch_update_refuses_in_order() -> None:
    firmware, _ = launched()
    rmp = firmware.rmp
    assign(rmp, OTHER, immutable=1, gpa=0x6000, asid=6)
    assign(rmp, LARGE, immutable=1, gpa=0x8000, asid=ASID, size=1)
    assign(rmp, 8, immutable=1)
    firmware.gctx_create(8)
    cases: list[tuple[Callable[[], object], FwStatus]] = [
        (lambda: firmware.launch_update(PAGE, PAGE, 1), FwStatus.INVALID_GUEST),
        (lambda: firmware.launch_update(99, PAGE, 1), FwStatus.INVALID_GUEST),
        (lambda: firmware.launch_update(GCTX, 9, 1), FwStatus.INVALID_PAGE_STATE),
        (lambda: firmware.launch_update(GCTX, 99, 1), FwStatus.INVALID_PAGE_STATE),
        (lambda: firmware.launch_update(GCTX, PAGE, 1, size=1), FwStatus.INVALID_PAGE_SIZE),
        (lambda: firmware.launch_update(GCTX, PAGE, 0), FwStatus.INVALID_PARAM),
        (lambda: firmware.launch_update(GCTX, PAGE, 7), FwStatus.INVALID_PARAM),
        (lambda: firmware.launch_update(GCTX, LARGE, 2, size=1), FwStatus.INVALID_PAGE_SIZE),
        (lambda: firmware.launch_update(GCTX, LARGE + 1, 1), FwStatus.INVALID_PAGE_STATE),
        (lambda: firmware.launch_update(8, PAGE, 1), FwStatus.INVALID_GUEST_STATE),
        (lambda: firmware.launch_update(GCTX, OTHER, 1), FwStatus.INVALID_PAGE_OWNER),
    ]
    for command, status in cases:
        assert refused(firmware, command) is status
    firmware.launch_start(8, POLICY, imi=True)
    assert refused(firmware, firmware.launch_update, 8, PAGE, 1) is FwStatus.INACTIVE
    firmware.activate(8, 9)
    assign(rmp, 9, immutable=1, gpa=0x1000, asid=9)
    assert refused(firmware, firmware.launch_update, 8, 9, 1) is FwStatus.INVALID_PARAM
    firmware.launch_update(8, 9, 1, imi=True)


def test_an_id_block_expects_digest_and_policy() -> None:
    firmware, _ = launched()
    digest = firmware.guest_status(GCTX).digest
    for block, status in (
        (IdBlock(digest, POLICY, version=2), FwStatus.BAD_VERSION),
        (IdBlock(b"\1" * 48, POLICY), FwStatus.BAD_MEASUREMENT),
        (IdBlock(digest, POLICY | Policy.DEBUG), FwStatus.POLICY_FAILURE),
    ):
        assert refused(firmware, firmware.launch_finish, GCTX, id_block=block) is status
    assert (
        refused(firmware, firmware.launch_finish, GCTX, host_data=b"short")
        is FwStatus.INVALID_PARAM
    )
    block = IdBlock(digest, POLICY, b"f" * 16, b"i" * 16, guest_svn=3)
    assert IdBlock.unpack(block.pack()) == block
    firmware.launch_finish(GCTX, id_block=block)
    assert refused(firmware, firmware.launch_update, GCTX, PAGE, 1) is FwStatus.INVALID_GUEST_STATE


def test_a_cpuid_page_that_claims_too_much_is_corrected_and_refused() -> None:
    limits = {(1, 0): (0xFF, 0xFFFF, 0x1, 0x2)}
    firmware, memory = launched(limits)
    memory.write(PAGE, cpuidpage.pack({(1, 0): (0x1FF, 1, 3, 2), (7, 0): (1, 0, 0, 0)}))
    assert (
        refused(firmware, firmware.launch_update, GCTX, PAGE, PageType.CPUID)
        is FwStatus.INVALID_PARAM
    )
    wanted = cpuidpage.pack({(1, 0): (0xFF, 1, 1, 2), (7, 0): (0, 0, 0, 0)})
    assert memory.read(PAGE) == wanted
    assert firmware.rmp.state(PAGE) is PageState.PRE_GUEST
    firmware.launch_update(GCTX, PAGE, PageType.CPUID)
    memory.write(OTHER, struct.pack("<IIQ", 65, 0, 0).ljust(PAGE_SIZE, b"\0"))
    assign(firmware.rmp, OTHER, immutable=1, gpa=0x6000, asid=ASID)
    assert (
        refused(firmware, firmware.launch_update, GCTX, OTHER, PageType.CPUID)
        is FwStatus.INVALID_PARAM
    )


# -- small worlds


def test_a_copy_is_independent() -> None:
    firmware, _ = launched()
    before = firmware.key()
    other = firmware.copy()
    assert other.key() == before
    other.launch_update(GCTX, PAGE, PageType.NORMAL)
    other.wbinvd()
    assert firmware.key() == before
    assert other.key() != before
    found = pvalidate(other.rmp, Vcpu(ASID), Leaf(0x5000, PAGE), 0, validate=False)
    assert isinstance(found, Returned)
    assert found.ok
