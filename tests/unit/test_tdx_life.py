# SPDX-License-Identifier: GPL-2.0-or-later
"""A TD's life: made, measured, run, reported on, torn down; and each step out of its order."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from tdx_machine import BASE, DEBUG, PARAMS, SOURCE, Lab

from hwemu.tdx import Status, TdxError, TdxModule
from hwemu.tdx.fields import FIELDS, pack_params, parse_params
from hwemu.tdx.leaves import LEAVES, REFUSALS, Check
from hwemu.tdx.locks import Kind, Lock, Locks, Mode
from hwemu.tdx.pamt import PAGE_SIZE, PageType, Tdmr
from hwemu.tdx.result import FlushTlb, NoMemory
from hwemu.tdx.states import LifeCycle, OpState
from hwemu.tdx.status import Operand, name, split
from hwemu.tdx.td import TdParams

GPA = 0x1000


def refusal(call: object, *args: object, **more: object) -> str:
    """Return how a leaf is refused; the module must not have changed."""
    module = call.__self__  # type: ignore[attr-defined]
    before = module.key()
    with pytest.raises(TdxError) as error:
        call(*args, **more)  # type: ignore[operator]
    assert module.key() == before
    return name(error.value.status)


def test_a_td_comes_and_goes_and_leaves_no_page() -> None:
    lab = Lab(packages=2)
    module = lab.module
    tdr = lab.page()
    assert refusal(module.mng_create, tdr, 5) == "OPERAND_INVALID | RDX"
    module.mng_create(tdr, 32)
    assert refusal(module.mng_create, lab.page(), 32) == "HKID_NOT_FREE"
    assert refusal(module.mng_create, tdr, 33) == "PAGE_METADATA_INCORRECT | RCX"
    page = lab.page()
    assert refusal(module.mng_addcx, tdr, page) == "TD_KEYS_NOT_CONFIGURED"
    module.mng_key_config(tdr, lp=0)
    assert refusal(module.mng_key_config, tdr, lp=1) == "KEY_CONFIGURED"
    module.mng_key_config(tdr, lp=63)
    assert refusal(module.mng_key_config, tdr, lp=0) == "LIFECYCLE_STATE_INCORRECT"
    assert refusal(module.mng_init, tdr, PARAMS) == "TDCS_NOT_ALLOCATED"
    for _ in range(6):
        module.mng_addcx(tdr, lab.page())
    assert refusal(module.mr_finalize, tdr) == "OP_STATE_INCORRECT"
    lab.memory.write(PARAMS, pack_params(TdParams(max_vcpus=1)))
    assert refusal(module.mng_init, tdr, PARAMS + 8) == "OPERAND_INVALID | RDX"
    module.mng_init(tdr, PARAMS)
    assert refusal(module.mng_addcx, tdr, lab.page()) == "OP_STATE_INCORRECT"
    assert refusal(module.mr_finalize, tdr) == "NO_VCPUS"

    tdvpr = lab.page()
    module.vp_create(tdr, tdvpr)
    assert refusal(module.vp_init, tdvpr) == "TDCX_NUM_INCORRECT"
    for _ in range(5):
        module.vp_addcx(tdvpr, lab.page())
    assert refusal(module.vp_addcx, tdvpr, page) == "TDCX_NUM_INCORRECT"
    module.vp_init(tdvpr)
    assert refusal(module.vp_init, tdvpr) == "VCPU_STATE_INCORRECT | RCX"  # state 1, READY
    second = lab.page()
    module.vp_create(tdr, second)
    for _ in range(5):
        module.vp_addcx(second, lab.page())
    assert refusal(module.vp_init, second) == "MAX_VCPUS_EXCEEDED"
    assert refusal(module.vp_enter, tdvpr) == "OP_STATE_INCORRECT"
    module.mr_finalize(tdr)
    assert refusal(module.vp_enter, second) == "VCPU_STATE_INCORRECT"  # state 0
    assert refusal(module.vp_enter, tdvpr, lp=9) == "VCPU_ASSOCIATED"

    module.vp_enter(tdvpr)
    assert refusal(module.vp_enter, tdvpr) == "OPERAND_BUSY | RCX"
    assert refusal(module.vp_flush, tdvpr) == "OPERAND_BUSY | RCX"
    assert refusal(module.mng_vpflushdone, tdr) == "OPERAND_BUSY | RCX"
    module.td_exit(tdvpr)
    assert refusal(module.mng_vpflushdone, tdr) == "FLUSHVP_NOT_DONE"
    assert refusal(module.vp_flush, tdvpr, lp=9) == "VCPU_NOT_ASSOCIATED"
    assert module.vp_flush(tdvpr).effects == (FlushTlb(tdr, tdvpr),)
    assert refusal(module.phymem_cache_wb) == "NO_HKID_READY_TO_WBCACHE"
    assert refusal(module.mng_key_freeid, tdr) == "LIFECYCLE_STATE_INCORRECT"
    module.mng_vpflushdone(tdr)
    assert refusal(module.mng_vpflushdone, tdr) == "LIFECYCLE_STATE_INCORRECT"
    assert refusal(module.vp_enter, tdvpr) == "TD_KEYS_NOT_CONFIGURED"
    assert refusal(module.phymem_cache_wb, resume=True) == "WBCACHE_RESUME_ERROR"
    module.host_interrupt = True
    assert module.phymem_cache_wb().status == Status.INTERRUPTED_RESUMABLE
    module.host_interrupt = False
    assert module.phymem_cache_wb(resume=True).ok
    assert refusal(module.mng_key_freeid, tdr) == "WBCACHE_NOT_COMPLETE"
    assert refusal(module.phymem_page_reclaim, tdvpr) == "LIFECYCLE_STATE_INCORRECT"
    module.phymem_cache_wb(lp=63)
    module.mng_key_freeid(tdr)
    assert refusal(module.phymem_page_reclaim, tdr) == "TD_ASSOCIATED_PAGES_EXIST"
    assert refusal(module.phymem_page_reclaim, page) == "PAGE_METADATA_INCORRECT | RCX"
    answer = module.phymem_page_reclaim(tdvpr)
    assert (answer.rcx, answer.rdx, answer.r8) == (PageType.TDVPR, tdr, 0)
    for hpa, _, _ in list(module.pamt.owned(tdr >> 12)):
        module.phymem_page_reclaim(hpa)
    module.phymem_page_reclaim(tdr)
    assert module.pamt.counts() == {}
    assert not module.tds
    assert not module.vcpus
    module.mng_create(lab.page(), 32)  # the HKID is free again


def test_a_td_with_memory_is_torn_down() -> None:
    lab = Lab()
    tdr, (tdvpr,) = lab.runnable()
    lab.tables(tdr, 0)
    lab.tables(tdr, 2 << 20, 1)
    lab.module.mem_page_aug(tdr, 0, lab.page())
    large = lab.page(2 << 20)
    lab.module.mem_page_aug(tdr, 2 << 20, large, 1)
    lab.module.vp_enter(tdvpr)
    lab.module.td_exit(tdvpr)
    other = lab.created(40)
    lab.torn_down(tdr)
    assert lab.module.pamt.counts() == {PageType.TDR: 1}
    assert refusal(lab.module.phymem_page_reclaim, other) == "LIFECYCLE_STATE_INCORRECT"


def test_a_large_page_is_reclaimed_as_a_whole() -> None:
    lab = Lab()
    tdr, _ = lab.runnable()
    lab.tables(tdr, 0, 1)
    large = lab.page(2 << 20)
    lab.module.mem_page_aug(tdr, 0, large, 1)
    known = lab.module.phymem_page_rdmd(large + PAGE_SIZE)
    assert (known.rcx, known.rdx, known.r8, known.r9) == (PageType.REG, tdr, 1, 0)
    assert refusal(lab.module.phymem_page_reclaim, large + PAGE_SIZE) == "OPERAND_INVALID | RCX"
    assert refusal(lab.module.phymem_page_wbinvd, large) == "PAGE_METADATA_INCORRECT | RCX"
    lab.torn_down(tdr)
    assert lab.module.phymem_page_wbinvd(large).ok
    assert refusal(lab.module.phymem_page_rdmd, 1 << 30) == "OPERAND_ADDR_RANGE_ERROR | RCX"
    assert refusal(lab.module.phymem_page_rdmd, 1) == "OPERAND_INVALID | RCX"


def test_what_is_no_root_page_is_refused() -> None:
    lab = Lab()
    tdr = lab.initialised()
    module = lab.module
    assert refusal(module.mem_track, tdr + 1) == "OPERAND_INVALID | RCX"
    assert refusal(module.mem_track, 1 << 30) == "OPERAND_ADDR_RANGE_ERROR | RCX"
    assert refusal(module.mem_track, tdr + PAGE_SIZE) == "PAGE_METADATA_INCORRECT | RCX"
    assert refusal(module.vp_enter, tdr) == "PAGE_METADATA_INCORRECT | RCX"
    module.td(tdr).fatal = True
    assert refusal(module.mem_track, tdr) == "TD_FATAL"


# -- measurements ---------------------------------------------------------------------------------


def test_mrtd_is_the_hash_of_the_records() -> None:
    lab = Lab()
    module = lab.module
    tdr = lab.initialised(TdParams(mr_owner=b"o" * 48))
    tdvpr = lab.with_vcpu(tdr)
    lab.tables(tdr, GPA)
    content = bytes(range(256)) * 16
    lab.memory.write(SOURCE, content)
    hpa = lab.page()
    module.mem_page_add(tdr, GPA, hpa, SOURCE)
    assert lab.memory.read(hpa, PAGE_SIZE) == content
    for at in range(GPA, GPA + PAGE_SIZE, 256):
        module.mr_extend(tdr, at)
    assert refusal(module.mr_extend, tdr, GPA + 8) == "OPERAND_INVALID | RCX"
    assert refusal(module.mr_extend, tdr, 0x2000) == "EPT_ENTRY_NOT_PRESENT | RCX"
    module.mr_finalize(tdr)
    expected = hashlib.sha384(b"MEM.PAGE.ADD".ljust(16, b"\0") + GPA.to_bytes(112, "little"))
    for at in range(0, PAGE_SIZE, 256):
        expected.update(b"MR.EXTEND".ljust(16, b"\0") + (GPA + at).to_bytes(112, "little"))
        expected.update(content[at : at + 256])
    assert module.td(tdr).mrtd == expected.digest()
    low = module.mng_rd(tdr, 0x1310000300000000).r8
    assert low.to_bytes(8, "little") == expected.digest()[:8]
    assert refusal(module.mng_rd, tdr, 1) == "METADATA_FIELD_ID_INCORRECT | RDX"
    assert refusal(module.mr_extend, tdr, GPA) == "OP_STATE_INCORRECT"

    module.vp_enter(tdvpr)
    info = module.tdcall(tdvpr, 1)
    assert (info.rcx, info.r8, info.r9) == (48, 1 | 1 << 32, 0)
    lab.memory.write(hpa, b"e" * 48 + b"d" * 16)
    assert module.tdcall(tdvpr, 2, rcx=GPA, rdx=2).ok
    assert module.td(tdr).rtmr[2] == hashlib.sha384(bytes(48) + b"e" * 48).digest()
    assert module.tdcall(tdvpr, 2, rcx=GPA, rdx=4).status == Status.OPERAND_INVALID | Operand.RDX
    assert module.tdcall(tdvpr, 2, rcx=GPA + 8).status == Status.OPERAND_INVALID | Operand.RCX

    assert module.tdcall(tdvpr, 4, rcx=GPA + 1024, rdx=GPA).ok
    report = lab.memory.read(hpa + 1024, 1024)
    assert report[0] == 0x81
    assert report[128:192] == b"e" * 48 + b"d" * 16
    assert report[80:128] == hashlib.sha384(report[512:]).digest()
    assert report[224:256] == hmac.digest(bytes(32), report[:224], "sha256")
    assert report[528:576] == expected.digest()
    assert report[624:672] == b"o" * 48
    assert report[720 + 96 : 720 + 144] == module.td(tdr).rtmr[2]
    assert module.tdcall(tdvpr, 22, rcx=GPA + 1024).ok
    lab.memory.write(hpa + 1024 + 130, b"!")
    assert module.tdcall(tdvpr, 22, rcx=GPA + 1024).status == Status.INVALID_REPORTMACSTRUCT
    assert module.tdcall(tdvpr, 4, rcx=GPA + 1, rdx=GPA).status == Status.OPERAND_INVALID | 1
    assert module.tdcall(tdvpr, 4, rcx=GPA, rdx=GPA, r8=1).status == Status.OPERAND_INVALID | 8
    assert module.tdcall(tdvpr, 99).status == Status.OPERAND_INVALID
    # a report to where nothing is leaves the TD first
    assert module.tdcall(tdvpr, 4, rcx=GPA + PAGE_SIZE, rdx=GPA).effects


def test_a_call_to_the_host_carries_the_registers_it_names() -> None:
    lab = Lab()
    _, (tdvpr,) = lab.runnable()
    lab.module.vp_enter(tdvpr)
    wrong = lab.module.tdcall(tdvpr, 0, rcx=1)
    assert wrong.status == Status.OPERAND_INVALID | Operand.RCX
    mask = 1 << 11 | 1 << 12
    (left,) = lab.module.tdcall(tdvpr, 0, rcx=mask, r11=0x10001, r12=0x5000, r13=9).effects
    assert left.registers == (("rcx", mask), ("r11", 0x10001), ("r12", 0x5000))
    assert lab.module.vp_enter(tdvpr).ok


# -- parameters -----------------------------------------------------------------------------------


def test_parameters_read_back() -> None:
    params = TdParams(DEBUG, 7, 300, 5, True, b"a" * 48, b"b" * 48, b"c" * 48)
    packed = pack_params(params)
    assert len(packed) == 1024
    assert parse_params(packed) == params
    assert packed[80:128] == b"a" * 48


@pytest.mark.parametrize(
    ("params", "operand"),
    [
        (TdParams(attributes=2), Operand.ATTRIBUTES),
        (TdParams(xfam=1), Operand.XFAM),
        (TdParams(max_vcpus=0), Operand.MAX_VCPUS),
        (TdParams(levels=3), Operand.EPTP_CONTROLS),
        (TdParams(wide=True), Operand.EPTP_CONTROLS),
    ],
)
def test_wrong_parameters_name_themselves(params: TdParams, operand: Operand) -> None:
    with pytest.raises(TdxError) as error:
        parse_params(pack_params(params))
    assert split(error.value.status) == (Status.OPERAND_INVALID, operand)


def test_five_levels_reach_further() -> None:
    lab = Lab()
    tdr = lab.initialised(TdParams(levels=5, wide=True))
    high = 1 << 50
    lab.tables(tdr, high)
    lab.module.mem_page_add(tdr, high, lab.page(), SOURCE)
    assert lab.module.td(tdr).tree.leaves()[0][:2] == (high, 0)


def test_the_machine_may_say_which_bit_is_shared() -> None:
    lab = Lab(gpa_width=40)
    tdr, (tdvpr,) = lab.runnable()
    assert refusal(lab.module.mem_page_aug, tdr, 1 << 39, lab.page()) == "OPERAND_INVALID | RCX"
    lab.module.vp_enter(tdvpr)
    assert lab.module.tdcall(tdvpr, 1).rcx == 40


# -- tables and values ----------------------------------------------------------------------------


def test_the_table_of_leaves_is_whole() -> None:
    assert len({leaf.name for leaf in LEAVES.values()}) == len(LEAVES)
    assert set(REFUSALS) == set(Check)
    for leaf in LEAVES.values():
        if Check.OP_STATE in leaf.order:
            assert leaf.op_states, leaf.name
        if Check.ENTRY in leaf.order:
            assert leaf.entry_states, leaf.name
        assert Status.SUCCESS not in leaf.refusals()
    assert all(field.name for field in FIELDS.values())


def test_every_field_can_be_read() -> None:
    lab = Lab()
    tdr, _ = lab.runnable(2)
    read = {field.name: lab.module.mng_rd(tdr, number).r8 for number, field in FIELDS.items()}
    assert read["TDCS.OP_STATE"] == OpState.RUNNABLE
    assert read["TDR.LIFECYCLE_STATE"] == LifeCycle.KEYS_CONFIGURED
    assert read["TDCS.NUM_VCPUS"] == read["TDCS.NUM_ASSOC_VCPUS"] == 2
    assert read["TDR.CHLDCNT"] == 6 + 2 * 6


def test_locks_are_shared_or_not() -> None:
    locks = Locks()
    lock = Lock(Kind.SEPT_TREE, 1)
    held = locks.hold(((lock, Mode.SHARED),))
    locks.take(lock, Mode.SHARED, 0)
    with pytest.raises(TdxError):
        locks.take(lock, Mode.EXCLUSIVE, 0)
    assert locks.key() != Locks().key()
    assert locks.copy().key() == locks.key()
    locks.release(held)
    locks.take(lock, Mode.EXCLUSIVE, 0)
    assert locks.key() == Locks().key()


def test_wrong_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="TDCS needs 4"):
        TdxModule([Tdmr(BASE, PAGE_SIZE)], tdcs_pages=3)
    module = TdxModule([Tdmr(BASE, PAGE_SIZE)], NoMemory())
    with pytest.raises(ValueError, match="logical processor 64"):
        module.mng_create(BASE, 32) and module.mng_key_config(BASE, lp=64)
    assert name(0xDEAD << 48) == "0xdead000000000000"
