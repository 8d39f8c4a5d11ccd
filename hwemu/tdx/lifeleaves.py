# SPDX-License-Identifier: GPL-2.0-or-later
"""The leaves of a TD's life: TDH.MNG.*, TDH.VP.*, TDH.MR.FINALIZE, TDH.PHYMEM.*.

What they ask beyond the checks of the table is asked here, in the module's order, before anything
changes. Life cycles and operation states move by the tables of `hwemu.tdx.states` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hwemu.tdx.checks import Call, private_page
from hwemu.tdx.fields import FIELDS, parse_params
from hwemu.tdx.leaves import check_op_state
from hwemu.tdx.locks import Kind, Lock, Mode
from hwemu.tdx.machine import Machine
from hwemu.tdx.pamt import PAGE_SHIFT, PAGE_SIZE, PageType, span
from hwemu.tdx.result import FlushTlb, Result
from hwemu.tdx.sept import Sept
from hwemu.tdx.states import LIFE_CYCLE, OPERATION, KeyState, LifeCycle, VcpuState
from hwemu.tdx.status import Operand, Status
from hwemu.tdx.td import SEPT_ROOT_TDCX, Td, Vcpu

_MAX_TDCX: Final = 9
_TD_PARAMS: Final = 1024  #: bytes, and their alignment


def _next_life(call: Call) -> LifeCycle:
    after = LIFE_CYCLE.get((call.td.life_cycle, call.leaf.name))
    if after is None:
        why = f"the TD is {call.td.life_cycle.name}"
        raise call.refused(Status.LIFECYCLE_STATE_INCORRECT, 0, why)
    return after


def _take_kot(machine: Machine, mode: Mode) -> None:
    machine.locks.take(Lock(Kind.KOT), mode, Operand.KOT)


def _mng_create(machine: Machine, call: Call) -> Result:
    hpa, hkid = call.get(Operand.RCX), call.get(Operand.RDX)
    if hkid not in machine.keys:
        raise call.refused(Status.OPERAND_INVALID, Operand.RDX, f"HKID {hkid} is not private")
    private_page(machine, hpa, Operand.RCX, PageType.NDA)
    _take_kot(machine, Mode.EXCLUSIVE)
    if machine.keys[hkid].state is not KeyState.FREE:
        raise call.refused(Status.HKID_NOT_FREE, 0, f"HKID {hkid} is a TD's")
    machine.keys[hkid].state = KeyState.ASSIGNED
    machine.tds[hpa] = Td(hpa, hkid)
    machine.pamt.assign(hpa, 0, PageType.TDR, 0)
    return Result()


def _key_config(machine: Machine, call: Call) -> Result:
    td = call.td
    if td.fatal:
        raise call.refused(Status.TD_FATAL, 0, "the TD met a fatal error")
    after = _next_life(call)
    package = 1 << machine.config.package(call.lp)
    if td.packages & package:
        raise call.refused(Status.KEY_CONFIGURED, 0, "the package has the key")
    td.packages |= package
    if td.packages == (1 << machine.config.packages) - 1:
        td.life_cycle = after
    return Result()


def _new_child(machine: Machine, call: Call, pt: PageType) -> int:
    """Make the checked page in the target register one of the TD's; return its address."""
    hpa = call.get(call.leaf.target)
    machine.pamt.assign(hpa, 0, pt, call.td.owner)
    call.td.children += 1
    return hpa


def _mng_addcx(machine: Machine, call: Call) -> Result:
    td, config = call.td, machine.config
    if td.fatal:
        raise call.refused(Status.TD_FATAL, 0, "the TD met a fatal error")
    if td.life_cycle is not LifeCycle.KEYS_CONFIGURED:
        raise call.refused(Status.TD_KEYS_NOT_CONFIGURED, 0, f"the TD is {td.life_cycle.name}")
    if len(td.tdcx) >= max(_MAX_TDCX, config.tdcs_pages):
        raise call.refused(Status.TDCX_NUM_INCORRECT, 0, f"{len(td.tdcx)} TDCX pages")
    private_page(machine, call.get(Operand.RCX), Operand.RCX, PageType.NDA)
    if len(td.tdcx) >= config.tdcs_pages:
        check_op_state(call.leaf, td.op_state)
    td.tdcx = (*td.tdcx, _new_child(machine, call, PageType.TDCX))
    return Result()


def _mng_init(machine: Machine, call: Call) -> Result:
    td, address = call.td, call.get(Operand.RDX)
    if address % _TD_PARAMS or address >> machine.config.hpa_width:
        raise call.refused(Status.OPERAND_INVALID, Operand.RDX, f"TD_PARAMS at {address:#x}")
    td.params = parse_params(machine.memory.read(address, _TD_PARAMS))
    td.sept = Sept(td.tdcx[SEPT_ROOT_TDCX], td.params.levels - 1)
    td.op_state = OPERATION[td.op_state, call.leaf.name]
    return Result()


def _mng_rd(machine: Machine, call: Call) -> Result:
    field = FIELDS.get(call.get(Operand.RDX))
    if field is None:
        why = f"no field {call.get(Operand.RDX):#x}"
        raise call.refused(Status.METADATA_FIELD_ID_INCORRECT, Operand.RDX, why)
    return Result(r8=field.read(call.td))


def _vpflushdone(machine: Machine, call: Call) -> Result:
    td = call.td
    _take_kot(machine, Mode.EXCLUSIVE)
    after = _next_life(call)
    if td.associated:
        why = f"{td.associated} vCPUs are of a processor"
        raise call.refused(Status.FLUSHVP_NOT_DONE, 0, why)
    td.life_cycle = after
    key = machine.keys[td.hkid]
    key.state, key.dirty = KeyState.FLUSHED, (1 << machine.config.packages) - 1
    return Result()


def _key_freeid(machine: Machine, call: Call) -> Result:
    after = _next_life(call)
    _take_kot(machine, Mode.EXCLUSIVE)
    key = machine.keys[call.td.hkid]
    if key.dirty:
        why = f"packages {key.dirty:#b} were not written back"
        raise call.refused(Status.WBCACHE_NOT_COMPLETE, 0, why)
    key.state = KeyState.FREE
    call.td.life_cycle = after
    call.td.sept = None  # its pages are PAMT's alone from here on
    return Result()


def _cache_wb(machine: Machine, call: Call) -> Result:
    command = call.get(Operand.RCX)
    if command > 1:
        raise call.refused(Status.OPERAND_INVALID, Operand.RCX, f"no command {command}")
    package = machine.config.package(call.lp)
    _take_kot(machine, Mode.SHARED)
    flushed = tuple(hkid for hkid, key in machine.keys.items() if key.state is KeyState.FLUSHED)
    if command == 1:
        if package not in machine.interrupted:
            raise call.refused(Status.WBCACHE_RESUME_ERROR, 0, "nothing was interrupted")
        flushed = machine.interrupted[package]
    elif not flushed:
        machine.interrupted.pop(package, None)
        raise call.refused(Status.NO_HKID_READY_TO_WBCACHE, 0, "no HKID was flushed")
    if machine.host_interrupt:
        machine.interrupted[package] = flushed
        return Result(Status.INTERRUPTED_RESUMABLE)
    machine.interrupted.pop(package, None)
    for hkid in flushed:
        machine.keys[hkid].dirty &= ~(1 << package)
    return Result()


def _finalize(machine: Machine, call: Call) -> Result:
    td = call.td
    if not td.num_vcpus:
        raise call.refused(Status.NO_VCPUS, 0, "no vCPU is initialised")
    td.mrtd = td.sha.digest()
    td.op_state = OPERATION[td.op_state, call.leaf.name]
    return Result()


def _vp_create(machine: Machine, call: Call) -> Result:
    hpa = _new_child(machine, call, PageType.TDVPR)
    call.td.vcpus[hpa] = Vcpu(hpa)
    machine.vcpus[hpa] = call.td
    return Result()


def _uninitialised(call: Call) -> None:
    state = call.vcpu.state
    if state is not VcpuState.UNINITIALIZED:
        raise call.refused(Status.VCPU_STATE_INCORRECT, state, f"the vCPU is {state.name}")


def _vp_addcx(machine: Machine, call: Call) -> Result:
    _uninitialised(call)
    if call.vcpu.pages >= machine.config.tdvps_pages:
        raise call.refused(Status.TDCX_NUM_INCORRECT, 0, f"{call.vcpu.pages} TDVPS pages")
    private_page(machine, call.get(Operand.RCX), Operand.RCX, PageType.NDA)
    _new_child(machine, call, PageType.TDCX)
    call.vcpu.pages += 1
    return Result()


def _complete(machine: Machine, call: Call) -> None:
    if call.vcpu.pages < machine.config.tdvps_pages:
        raise call.refused(Status.TDCX_NUM_INCORRECT, 0, f"{call.vcpu.pages} TDVPS pages")


def _vp_init(machine: Machine, call: Call) -> Result:
    td, vcpu = call.td, call.vcpu
    _complete(machine, call)
    _uninitialised(call)
    if td.num_vcpus >= td.params.max_vcpus:
        raise call.refused(Status.MAX_VCPUS_EXCEEDED, 0, f"{td.num_vcpus} vCPUs")
    vcpu.index, vcpu.state, vcpu.lp = td.num_vcpus, VcpuState.READY, call.lp
    td.num_vcpus += 1
    td.associated += 1
    return Result()


def _vp_enter(machine: Machine, call: Call) -> Result:
    td, vcpu = call.td, call.vcpu
    _complete(machine, call)
    if vcpu.state is not VcpuState.READY:
        raise call.refused(Status.VCPU_STATE_INCORRECT, vcpu.state, f"is {vcpu.state.name}")
    if vcpu.lp is not None and vcpu.lp != call.lp:
        raise call.refused(Status.VCPU_ASSOCIATED, 0, f"of processor {vcpu.lp}")
    if vcpu.running:
        raise call.refused(Status.OPERAND_BUSY, Operand.RCX, "the vCPU runs")
    machine.locks.take(Lock(Kind.EPOCH, td.owner), Mode.SHARED, Operand.TD_EPOCH)
    fresh = vcpu.lp is None
    if fresh:
        vcpu.lp = call.lp
        td.associated += 1
    if td.enter(vcpu) and not fresh:
        return Result(effects=(FlushTlb(td.hpa, vcpu.hpa),))
    return Result()


def _vp_flush(machine: Machine, call: Call) -> Result:
    td, vcpu = call.td, call.vcpu
    if td.life_cycle is not LifeCycle.KEYS_CONFIGURED:
        raise call.refused(Status.TD_KEYS_NOT_CONFIGURED, 0, f"the TD is {td.life_cycle.name}")
    _complete(machine, call)
    if vcpu.lp != call.lp:
        raise call.refused(Status.VCPU_NOT_ASSOCIATED, 0, f"not of processor {call.lp}")
    vcpu.lp = None
    td.associated -= 1
    return Result(effects=(FlushTlb(td.hpa, vcpu.hpa),))


def _any_page(machine: Machine, call: Call, hpa: int, mode: Mode) -> None:
    if hpa % PAGE_SIZE or hpa >> machine.config.hpa_width:
        raise call.refused(Status.OPERAND_INVALID, Operand.RCX, f"hpa {hpa:#x}")
    if hpa not in machine.pamt:
        raise call.refused(Status.OPERAND_ADDR_RANGE_ERROR, Operand.RCX, f"hpa {hpa:#x}")
    level = machine.pamt.walk(hpa).level
    first = hpa >> PAGE_SHIFT + 9 * level << 9 * level
    machine.locks.take(Lock(Kind.PAGE, first, (level,)), mode, Operand.RCX)


def _rdmd(machine: Machine, call: Call) -> Result:
    hpa = call.get(Operand.RCX)
    _any_page(machine, call, hpa, Mode.SHARED)
    entry = machine.pamt.walk(hpa)
    bepoch = entry.bepoch if entry.pt in (PageType.REG, PageType.EPT) else 0
    return Result(rcx=entry.pt, rdx=entry.owner << PAGE_SHIFT, r8=entry.level, r9=bepoch)


def _reclaim(machine: Machine, call: Call) -> Result:
    hpa = call.get(Operand.RCX)
    _any_page(machine, call, hpa, Mode.EXCLUSIVE)
    entry = machine.pamt.walk(hpa)
    if entry.pt in (PageType.NDA, PageType.RSVD):
        raise call.refused(Status.PAGE_METADATA_INCORRECT, Operand.RCX, f"is {entry.pt.name}")
    tdr = entry.owner << PAGE_SHIFT
    seen = {"rcx": int(entry.pt), "rdx": tdr, "r8": entry.level}
    if hpa % (PAGE_SIZE << 9 * entry.level):
        why = f"within a page of level {entry.level}"
        raise call.refused(Status.OPERAND_INVALID, Operand.RCX, why, **seen)
    td = machine.tds[hpa if entry.pt is PageType.TDR else tdr]
    if td.life_cycle is not LifeCycle.TEARDOWN:
        why = f"the TD is {td.life_cycle.name}"
        raise call.refused(Status.LIFECYCLE_STATE_INCORRECT, 0, why, **seen)
    if entry.pt is PageType.TDR:
        if td.children:
            why = f"{td.children} pages are left"
            raise call.refused(Status.TD_ASSOCIATED_PAGES_EXIST, 0, why, **seen)
        del machine.tds[hpa]
    else:
        td.children -= span(entry.level)
        if entry.pt is PageType.TDVPR:
            del machine.vcpus[hpa], td.vcpus[hpa]
    machine.pamt.free(hpa, entry.level)
    return Result(rcx=seen["rcx"], rdx=tdr, r8=entry.level)


def _page_wbinvd(machine: Machine, call: Call) -> Result:
    # the key id stands above the address
    hpa = call.get(Operand.RCX) & (1 << machine.config.hpa_width) - 1
    private_page(machine, hpa, Operand.RCX, PageType.NDA, mode=Mode.SHARED, exact=False)
    return Result()


EFFECTS: Final[dict[int, Callable[[Machine, Call], Result]]] = {
    0: _vp_enter,
    1: _mng_addcx,
    4: _vp_addcx,
    8: _key_config,
    9: _mng_create,
    10: _vp_create,
    11: _mng_rd,
    17: _finalize,
    18: _vp_flush,
    19: _vpflushdone,
    20: _key_freeid,
    21: _mng_init,
    22: _vp_init,
    24: _rdmd,
    28: _reclaim,
    40: _cache_wb,
    41: _page_wbinvd,
}
