# SPDX-License-Identifier: GPL-2.0-or-later
"""A TD's memory: added, augmented, accepted, blocked, tracked, moved, split, merged, removed."""

from __future__ import annotations

import pytest
from tdx_machine import BASE, DEBUG, GIB, MIB, SOURCE, Lab

from hwemu.tdx import Status, TdxError
from hwemu.tdx.locks import Kind
from hwemu.tdx.module import TdxModule
from hwemu.tdx.pamt import PAGE_SIZE, PageType, Tdmr
from hwemu.tdx.result import (
    DoubleFault,
    ExitReason,
    Extended,
    FlushTlb,
    NoMemory,
    SharedAccess,
    TdExit,
    Translation,
    VirtualException,
)
from hwemu.tdx.status import Operand, name, split
from hwemu.tdx.td import ATTRIBUTE_SEPT_VE_DISABLE

GPA = 0x1000
ACCEPT = 6


def refused(error: pytest.ExceptionInfo[TdxError]) -> str:
    return name(error.value.status)


def running(lab: Lab, **more: int) -> tuple[int, int]:
    """Return TDR and TDVPR of a TD whose only vCPU runs."""
    tdr, (tdvpr,) = lab.runnable(**more)
    lab.module.vp_enter(tdvpr)
    return tdr, tdvpr


def test_a_page_is_augmented_accepted_and_used() -> None:
    lab = Lab()
    module = lab.module
    tdr, tdvpr = running(lab)
    lab.tables(tdr, GPA)
    hpa = lab.page()
    module.mem_page_aug(tdr, GPA, hpa)
    assert module.access(tdvpr, GPA + 8, 2) == VirtualException(tdvpr, GPA + 8, 2)
    info = module.tdcall(tdvpr, 3)
    assert (info.rcx, info.rdx, info.r9) == (ExitReason.EPT_VIOLATION, 2, GPA + 8)
    assert split(module.tdcall(tdvpr, 3).status)[0] is Status.NO_VALID_VE_INFO
    assert module.tdcall(tdvpr, ACCEPT, rcx=GPA).ok
    assert lab.memory.read(hpa, 16) == bytes(16)
    assert module.access(tdvpr, GPA + 8, 3) == Translation(hpa + 8, 0, 7)
    again = module.tdcall(tdvpr, ACCEPT, rcx=GPA)
    assert again.status == Status.PAGE_ALREADY_ACCEPTED


def test_a_second_virtual_exception_before_the_first_was_read_is_a_double_fault() -> None:
    lab = Lab()
    tdr, tdvpr = running(lab)
    lab.tables(tdr, GPA)
    lab.module.mem_page_aug(tdr, GPA, lab.page())
    assert isinstance(lab.module.access(tdvpr, GPA), VirtualException)
    assert lab.module.access(tdvpr, GPA) == DoubleFault(tdvpr)


def test_a_td_without_virtual_exceptions_leaves_instead() -> None:
    lab = Lab()
    tdr, tdvpr = running(lab, attributes=ATTRIBUTE_SEPT_VE_DISABLE)
    lab.tables(tdr, GPA)
    lab.module.mem_page_aug(tdr, GPA, lab.page())
    left = lab.module.access(tdvpr, GPA, 4)
    assert left == TdExit(tdvpr, ExitReason.EPT_VIOLATION, 4, GPA, Extended.PENDING)
    with pytest.raises(ValueError, match="not in its TD"):
        lab.module.access(tdvpr, GPA)


def test_an_access_to_what_is_not_there_leaves_the_td() -> None:
    lab = Lab()
    _, tdvpr = running(lab)
    assert lab.module.access(tdvpr, GPA) == TdExit(tdvpr, ExitReason.EPT_VIOLATION, 1, GPA)
    lab.module.vp_enter(tdvpr)
    shared = 1 << 47
    assert lab.module.access(tdvpr, GPA | shared) == SharedAccess(GPA)
    left = lab.module.tdcall(tdvpr, ACCEPT, rcx=GPA)  # no table even: the host is told what for
    assert left.effects == (
        TdExit(tdvpr, ExitReason.EPT_VIOLATION, 0, GPA, Extended.ACCEPT | (3 << 3) << 32),
    )


def test_block_track_remove_with_a_vcpu_that_runs() -> None:
    lab = Lab()
    module = lab.module
    tdr, tdvpr = running(lab)
    lab.tables(tdr, GPA)
    hpa = lab.page()
    module.mem_page_aug(tdr, GPA, hpa)
    module.tdcall(tdvpr, ACCEPT, rcx=GPA)
    with pytest.raises(TdxError) as error:
        module.mem_page_remove(tdr, GPA)
    assert refused(error) == "GPA_RANGE_NOT_BLOCKED | RCX"
    assert error.value.rdx == 4 << 8  # MAPPED, level 0
    module.mem_range_block(tdr, GPA)
    with pytest.raises(TdxError) as error:
        module.mem_range_block(tdr, GPA)
    assert refused(error) == "GPA_RANGE_ALREADY_BLOCKED | RCX"
    for tracks in range(2):
        with pytest.raises(TdxError) as error:
            module.mem_page_remove(tdr, GPA)
        assert refused(error) == "TLB_TRACKING_NOT_DONE | RCX"
        if not tracks:
            module.mem_track(tdr)
    with pytest.raises(TdxError) as error:  # the vCPU is of the epoch before
        module.mem_track(tdr)
    assert refused(error) == "PREVIOUS_TLB_EPOCH_BUSY"
    module.td_exit(tdvpr)
    assert module.vp_enter(tdvpr).effects == (FlushTlb(tdr, tdvpr),)
    assert module.mem_page_remove(tdr, GPA).rcx == hpa
    assert hpa in module.pamt
    assert module.pamt.walk(hpa).pt is PageType.NDA
    assert isinstance(module.access(tdvpr, GPA), TdExit)
    assert not module.vp_enter(tdvpr).effects  # the epoch has not moved


def test_an_unblocked_page_is_as_before() -> None:
    lab = Lab()
    module = lab.module
    tdr, _ = lab.runnable()
    lab.tables(tdr, GPA)
    module.mem_page_aug(tdr, GPA, lab.page())
    before = module.mem_sept_rd(tdr, GPA, 0)
    for level in (0, 1):
        module.mem_range_block(tdr, GPA & -(PAGE_SIZE << 9 * level), level)
    with pytest.raises(TdxError) as error:  # the table above is blocked: nothing beneath is found
        module.mem_range_unblock(tdr, GPA, 0)
    assert refused(error) == "EPT_WALK_FAILED | RCX"
    assert error.value.rdx == 1 | 129 << 8
    module.mem_track(tdr)
    module.mem_range_unblock(tdr, 0, 1)
    module.mem_range_unblock(tdr, GPA, 0)
    assert module.mem_sept_rd(tdr, GPA, 0) == before


def test_a_relocated_page_keeps_its_content_and_unblocks() -> None:
    lab = Lab()
    module = lab.module
    tdr, tdvpr = running(lab)
    lab.tables(tdr, GPA)
    old, new = lab.page(), lab.page()
    module.mem_page_aug(tdr, GPA, old)
    module.tdcall(tdvpr, ACCEPT, rcx=GPA)
    lab.memory.write(old, b"moved")
    module.mem_range_block(tdr, GPA)
    module.td_exit(tdvpr)
    module.mem_track(tdr)
    with pytest.raises(TdxError) as error:
        module.mem_page_relocate(tdr, GPA, old)
    assert refused(error) == "OPERAND_INVALID | R8"
    assert module.mem_page_relocate(tdr, GPA, new).rcx == old
    assert lab.memory.read(new, 5) == b"moved"
    module.vp_enter(tdvpr)
    assert module.access(tdvpr, GPA, 7) == Translation(new, 0, 7)
    assert module.pamt.walk(old).pt is PageType.NDA


def test_a_large_page_is_accepted_in_parts_split_and_merged() -> None:
    lab = Lab()
    module = lab.module
    tdr, tdvpr = running(lab)
    gpa = 4 * MIB
    lab.tables(tdr, gpa, 1)
    hpa = lab.page(2 * MIB)
    module.mem_page_aug(tdr, gpa, hpa, 1)
    assert module.tdcall(tdvpr, ACCEPT, rcx=gpa).effects  # asked 4 KiB of 2 MiB: the host decides
    module.vp_enter(tdvpr)
    stopped = module.tdcall(tdvpr, ACCEPT, rcx=gpa | 1, interrupt_after=100)
    assert stopped.status == Status.INTERRUPTED_RESTARTABLE
    assert lab.memory.read(hpa + 99 * PAGE_SIZE, 1) == b"\0"
    assert lab.memory.read(hpa + 100 * PAGE_SIZE, 1) == b"\xaa"
    assert module.mem_sept_rd(tdr, gpa, 1).rcx & ~(1 << 63) == hpa | 0xF0
    assert module.tdcall(tdvpr, ACCEPT, rcx=gpa | 1).ok
    assert lab.memory.read(hpa + 511 * PAGE_SIZE, 1) == b"\0"

    table = lab.page()
    module.mem_range_block(tdr, gpa, 1)
    module.mem_track(tdr)
    module.td_exit(tdvpr)
    module.host_interrupt = True
    with pytest.raises(TdxError) as error:
        module.mem_page_demote(tdr, gpa, 1, table)
    assert refused(error) == "INTERRUPTED_RESTARTABLE"
    module.host_interrupt = False
    module.mem_page_demote(tdr, gpa, 1, table)
    module.vp_enter(tdvpr)
    assert module.access(tdvpr, gpa + 5 * PAGE_SIZE) == Translation(hpa + 5 * PAGE_SIZE, 0, 7)
    mismatch = module.tdcall(tdvpr, ACCEPT, rcx=gpa | 1)
    assert mismatch.status == Status.PAGE_SIZE_MISMATCH | 1
    assert module.pamt.counts()[PageType.REG] == 512

    module.mem_range_block(tdr, gpa, 1)
    module.mem_track(tdr)
    module.td_exit(tdvpr)
    assert module.mem_page_promote(tdr, gpa, 1).rcx == table
    module.vp_enter(tdvpr)
    assert module.access(tdvpr, gpa + 3 * MIB // 2) == Translation(hpa + 3 * MIB // 2, 1, 7)
    assert module.pamt.walk(table).pt is PageType.NDA


def test_pages_that_are_not_alike_do_not_merge() -> None:
    lab = Lab()
    module = lab.module
    tdr = lab.initialised()
    lab.tables(tdr, 0, 1)
    hpa, table = lab.page(2 * MIB), lab.page()
    module.mem_page_aug(tdr, 0, hpa, 1)
    module.mem_page_demote(tdr, 0, 1, table)
    module.mem_page_remove(tdr, 7 * PAGE_SIZE)
    with pytest.raises(TdxError) as error:
        module.mem_page_promote(tdr, 0, 1)
    assert refused(error) == "EPT_INVALID_PROMOTE_CONDITIONS | RCX"
    with pytest.raises(TdxError) as error:
        module.mem_sept_remove(tdr, 0, 1)
    assert refused(error) == "EPT_PAGE_NOT_FREE | RCX"
    module.mem_page_aug(tdr, 7 * PAGE_SIZE, hpa + 7 * PAGE_SIZE)
    module.mem_page_promote(tdr, 0, 1)


def test_a_gigabyte_of_large_pages_merges_and_splits() -> None:
    lab = Lab()
    lab.module = module = TdxModule([Tdmr(BASE, 64 * MIB), Tdmr(8 * GIB, GIB)], NoMemory())
    real = lab.memory
    module.memory = real
    tdr = lab.initialised()
    lab.tables(tdr, 0, 1)
    for at in range(0, GIB, 2 * MIB):
        module.mem_page_aug(tdr, at, 8 * GIB + at, 1)
    table = module.mem_page_promote(tdr, 0, 2).rcx
    assert module.pamt.walk(8 * GIB + 12345 * PAGE_SIZE).level == 2
    assert module.td(tdr).tree.leaves()[0][:3] == (0, 2, 8 * GIB)
    module.mem_page_demote(tdr, 0, 2, table)
    assert module.pamt.walk(8 * GIB).level == 1
    module.mem_page_promote(tdr, 0, 2)
    assert module.mem_page_remove(tdr, 0, 2).rcx == 8 * GIB
    assert not module.pamt.counts().get(PageType.REG)


def test_a_page_that_is_not_free_is_refused() -> None:
    lab = Lab()
    module = lab.module
    tdr = lab.initialised()
    lab.tables(tdr, GPA)
    taken = module.td(tdr).tree.root
    before = module.key()
    for hpa, what in (
        (taken, "PAGE_METADATA_INCORRECT | R8"),
        (BASE + 1, "OPERAND_INVALID | R8"),
        (1 << 46, "OPERAND_INVALID | R8"),
        (GIB, "OPERAND_ADDR_RANGE_ERROR | R8"),
    ):
        with pytest.raises(TdxError) as error:
            module.mem_page_aug(tdr, GPA, hpa)
        assert refused(error) == what
        assert "gpa" in str(error.value) or "hpa" in str(error.value)
    with pytest.raises(TdxError) as error:
        module.mem_page_add(tdr, GPA, lab.page(), SOURCE + 1)
    assert refused(error) == "OPERAND_INVALID | R9"
    with pytest.raises(TdxError) as error:
        module.mem_page_aug(tdr, 1 << 47, lab.page())
    assert refused(error) == "OPERAND_INVALID | RCX"
    with pytest.raises(TdxError) as error:
        module.mem_page_aug(tdr, 4 * GIB << 10, lab.page())
    assert refused(error) == "EPT_WALK_FAILED | RCX"
    assert error.value.rdx == 3  # FREE, at the root
    with pytest.raises(TdxError) as error:
        module.mem_sept_add(tdr, 0, 1, lab.page())
    assert refused(error) == "EPT_ENTRY_STATE_INCORRECT | RCX"
    assert module.key() == before


def test_a_table_that_is_there_may_be_allowed() -> None:
    lab = Lab()
    tdr = lab.initialised()
    lab.tables(tdr, 0)
    page = lab.page()
    version_1 = 3 | 1 << 16
    answer = lab.module.seamcall(version_1, rcx=1, rdx=tdr | 1, r8=page)
    assert (answer.status, answer.r8) == (Status.SUCCESS, page | 1 << 63)
    assert lab.module.pamt.walk(page).pt is PageType.NDA
    assert lab.module.seamcall(version_1, rcx=2 * MIB | 1, rdx=tdr, r8=page).r8 == (1 << 64) - 1


def test_the_host_reads_and_writes_a_debug_td_alone() -> None:
    lab = Lab()
    module = lab.module
    for attributes in (DEBUG, 0):
        tdr, _ = lab.runnable(attributes=attributes, hkid=33 + attributes)
        lab.tables(tdr, GPA)
        if not attributes:
            with pytest.raises(TdxError) as error:
                module.mem_rd(tdr, GPA)
            assert refused(error) == "TD_NON_DEBUG"
            break
        module.mem_page_aug(tdr, GPA, lab.page())
        with pytest.raises(TdxError) as error:
            module.mem_rd(tdr, GPA)
        assert refused(error) == "EPT_ENTRY_NOT_PRESENT | RCX"
        module.vp_enter(next(iter(module.td(tdr).vcpus)))
        module.tdcall(next(iter(module.td(tdr).vcpus)), ACCEPT, rcx=GPA)
        assert module.mem_wr(tdr, GPA + 8, 77).r8 == 0
        assert module.mem_rd(tdr, GPA + 8).r8 == 77


def test_leaves_that_meet_are_refused_and_the_host_comes_first() -> None:
    lab = Lab()
    module = lab.module
    tdr, tdvpr = running(lab)
    lab.tables(tdr, GPA)
    page = lab.page()
    module.mem_page_aug(tdr, GPA, page)
    held = module.begin_guest(tdvpr, ACCEPT, rcx=GPA)
    assert {lock.kind for lock, _ in held.locks} == {Kind.SEPT_ENTRY}
    before = module.mem_sept_rd(tdr, 0, 1)
    with pytest.raises(TdxError) as error:
        module.mem_range_block(tdr, GPA)
    assert refused(error) == "OPERAND_BUSY | RCX"
    module.end(held)
    # the host was refused: the guest waits until it has had its turn
    busy = module.tdcall(tdvpr, ACCEPT, rcx=GPA)
    assert busy.status == Status.OPERAND_BUSY_HOST_PRIORITY | Operand.RCX
    module.mem_range_block(tdr, GPA)
    assert module.mem_sept_rd(tdr, 0, 1) == before
    assert module.tdcall(tdvpr, ACCEPT, rcx=GPA).effects

    held = module.begin(7, rcx=0 | 1, rdx=tdr)  # RANGE.BLOCK: the tree is its own
    with pytest.raises(TdxError) as error:
        module.mem_page_aug(tdr, GPA + PAGE_SIZE, lab.page())
    assert refused(error) == "OPERAND_BUSY | SEPT_TREE"
    module.end(held)
    with pytest.raises(ValueError, match="not under way"):
        module.end(held)
    held = module.begin(38, rcx=tdr)
    with pytest.raises(TdxError) as error:
        module.vp_enter(tdvpr)
    assert refused(error) == "OPERAND_BUSY | TD_EPOCH"
    module.end(held)


def test_versions_and_leaves_that_do_not_exist() -> None:
    lab = Lab()
    tdr = lab.initialised()
    for rax in (99, 38 | 1 << 16, 38 | 1 << 24):
        assert lab.module.seamcall(rax, rcx=tdr).status == Status.OPERAND_INVALID
