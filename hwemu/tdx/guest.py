# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's side: what an access meets, and the leaves of TDCALL.

``td_ept_violation.c``, ``tdg_*.c``. A private access either goes through, leaves the TD with an EPT
violation, or (to a PENDING page, unless the TD disabled it) becomes #VE. What leaves the TD ends
the vCPU's run: the host must TDH.VP.ENTER again, and the guest repeats the instruction.
"""

from __future__ import annotations

from collections.abc import Mapping

from hwemu.tdx import measure
from hwemu.tdx.entry import (
    ACCESSIBLE,
    LEAVES,
    STATES,
    SeptState,
    W,
    counter_of,
    encode,
    hpa_of,
)
from hwemu.tdx.leaves import GUEST
from hwemu.tdx.locks import Kind, Lock, Mode
from hwemu.tdx.machine import Machine
from hwemu.tdx.pamt import PAGE_SIZE, span
from hwemu.tdx.result import (
    Access,
    DoubleFault,
    ExitReason,
    Extended,
    Result,
    SharedAccess,
    TdExit,
    Translation,
    VirtualException,
)
from hwemu.tdx.sept import Walk
from hwemu.tdx.status import Operand, Status, TdxError
from hwemu.tdx.td import ATTRIBUTE_SEPT_VE_DISABLE, Td, Vcpu, VeInfo

Registers = Mapping[str, int]


class _Left(Exception):
    """The leaf did not return to the guest: ``outcome`` says what came instead."""

    def __init__(self, outcome: TdExit | VirtualException | DoubleFault) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def leave(td: Td, vcpu: Vcpu, exit_: TdExit) -> TdExit:
    """End the vCPU's run."""
    td.leave(vcpu)
    return exit_


def _violation(td: Td, vcpu: Vcpu, gpa: int, qualification: int, extended: int) -> TdExit:
    exit_ = TdExit(vcpu.hpa, ExitReason.EPT_VIOLATION, qualification, gpa, extended)
    return leave(td, vcpu, exit_)


def access(machine: Machine, td: Td, vcpu: Vcpu, gpa: int, rights: int, gla: int) -> Access:
    """Return what an access with ``rights`` (1 read, 2 write, 4 fetch) to ``gpa`` meets.

    Only a translation and a shared access leave the vCPU where it is; a TD exit ends its run.
    """
    shared = machine.shared_bit(td)
    if gpa & shared:
        return SharedAccess(gpa & ~shared)
    at = td.tree.walk(gpa & -PAGE_SIZE, 0)
    state = at.state
    if state in LEAVES and at.word & rights == rights:
        hpa = hpa_of(at.word, at.level) + gpa % (PAGE_SIZE << 9 * at.level)
        return Translation(hpa, at.level, at.word & 7)
    if STATES[state].accepted is not None:
        if td.params.attributes & ATTRIBUTE_SEPT_VE_DISABLE:
            return _violation(td, vcpu, gpa, rights, Extended.PENDING)
        if vcpu.ve_info is not None:
            return DoubleFault(vcpu.hpa)
        vcpu.ve_info = VeInfo(ExitReason.EPT_VIOLATION, rights, gla, gpa)
        return VirtualException(vcpu.hpa, gpa, rights)
    return _violation(td, vcpu, gpa, rights, Extended.NONE)


def _translated(machine: Machine, td: Td, vcpu: Vcpu, gpa: int, rights: int) -> int:
    """Return where a private ``gpa`` is; leave the leaf if the access does not go through."""
    found = access(machine, td, vcpu, gpa, rights, gpa)
    if isinstance(found, Translation):
        return found.hpa
    assert not isinstance(found, SharedAccess)  # the caller has looked
    raise _Left(found)


def accept(
    machine: Machine, td: Td, vcpu: Vcpu, rcx: int, interrupt_after: int | None = None
) -> Result:
    """TDG.MEM.PAGE.ACCEPT of the page that ``rcx`` names: gpa 51:12, level 2:0 (0 or 1).

    A page of 2 MiB is accepted 4 KiB at a time. An interrupt after ``interrupt_after`` of them
    stops it: INTERRUPTED_RESTARTABLE; the entry counts, and the same call goes on from there.
    """
    level, gpa = rcx & 7, rcx & ~0xFFF
    wrong = rcx & 0xFF8 or rcx >> 52 or level > 1 or gpa & (PAGE_SIZE << 9 * level) - 1
    if wrong or gpa >= machine.shared_bit(td):
        raise TdxError(Status.OPERAND_INVALID, Operand.RCX, f"TDG.MEM.PAGE.ACCEPT of {rcx:#x}")
    at = td.tree.walk(gpa, level)
    what = (
        f"TDG.MEM.PAGE.ACCEPT at gpa {gpa:#x}, level {level}: {at.state.name} of level {at.level}"
    )
    if at.level == level:
        lock = Lock(Kind.SEPT_ENTRY, td.owner, (level, gpa))
        machine.locks.take(lock, Mode.EXCLUSIVE, Operand.RCX, guest=True)
        if at.state in (SeptState.NL_MAPPED, SeptState.NL_BLOCKED):
            raise TdxError(Status.PAGE_SIZE_MISMATCH, level, what)
    if at.state in ACCESSIBLE:
        raise TdxError(Status.PAGE_ALREADY_ACCEPTED, at.level, what)
    accepted = STATES[at.state].accepted
    if at.level != level or accepted is None:
        return Result(effects=(_violation(td, vcpu, gpa, 0, _accept_info(at, level)),))
    return _accept(machine, td, at, accepted, interrupt_after)


def _accept_info(at: Walk, level: int) -> int:
    """Return the extended qualification: who asked for what, and what is there instead."""
    state = STATES[at.state].public
    leaf = at.state in LEAVES
    return Extended.ACCEPT | (level | at.level << 3 | state << 6 | leaf << 14) << 32


def _accept(
    machine: Machine, td: Td, at: Walk, accepted: SeptState, interrupt_after: int | None
) -> Result:
    hpa = hpa_of(at.word, at.level)
    done = counter_of(at.word) if at.level else 0
    left = span(at.level) - done
    now = left if interrupt_after is None or not at.level else min(left, max(interrupt_after, 1))
    machine.memory.zero(hpa + done * PAGE_SIZE, now)
    if now < left:
        disabled = bool(td.params.attributes & ATTRIBUTE_SEPT_VE_DISABLE)
        at.store(encode(at.state, hpa, done + now, ve=not disabled))
        return Result(Status.INTERRUPTED_RESTARTABLE)
    at.store(td.word(accepted, hpa))
    return Result()


def _aligned(leaf: int, value: int, alignment: int, operand: Operand) -> None:
    if value % alignment:
        what = f"{GUEST[leaf][0]}: {operand.name} {value:#x} is not a multiple of {alignment}"
        raise TdxError(Status.OPERAND_INVALID, operand, what)


def _private(machine: Machine, td: Td, leaf: int, gpa: int, operand: Operand) -> None:
    if gpa >= machine.shared_bit(td):
        what = f"{GUEST[leaf][0]}: {operand.name} {gpa:#x} is not a private gpa"
        raise TdxError(Status.OPERAND_INVALID, operand, what)


def _vmcall(machine: Machine, td: Td, vcpu: Vcpu, regs: Registers) -> Result:
    mask = regs.get("rcx", 0)
    # RAX, RCX and RSP are never passed; XMM registers are not modelled
    if mask & 0b10011 or mask >> 16:
        raise TdxError(Status.OPERAND_INVALID, Operand.RCX, f"TDG.VP.VMCALL with RCX {mask:#x}")
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
             *(f"r{number}" for number in range(8, 16)))  # fmt: skip
    passed = tuple((one, regs.get(one, 0)) for bit, one in enumerate(names) if mask >> bit & 1)
    exit_ = TdExit(vcpu.hpa, ExitReason.TDCALL, registers=(("rcx", mask), *passed))
    return Result(effects=(leave(td, vcpu, exit_),))


def _info(machine: Machine, td: Td, vcpu: Vcpu, regs: Registers) -> Result:
    return Result(
        rcx=machine.shared_bit(td).bit_length(),
        rdx=td.params.attributes,
        r8=td.num_vcpus | td.params.max_vcpus << 32,
        r9=vcpu.index,
        r10=0,
    )


def _rtmr_extend(machine: Machine, td: Td, vcpu: Vcpu, regs: Registers) -> Result:
    gpa, index = regs.get("rcx", 0), regs.get("rdx", 0)
    _aligned(2, gpa, 64, Operand.RCX)
    _private(machine, td, 2, gpa, Operand.RCX)
    hpa = _translated(machine, td, vcpu, gpa, 1)
    if index >= measure.RTMRS:
        raise TdxError(Status.OPERAND_INVALID, Operand.RDX, f"TDG.MR.RTMR.EXTEND of {index}")
    lock = Lock(Kind.RTMR, td.owner)
    machine.locks.take(lock, Mode.EXCLUSIVE, Operand.RTMR, guest=True)
    value = machine.memory.read(hpa, measure.HASH_SIZE)
    td.rtmr[index] = measure.rtmr_extended(td.rtmr[index], value)
    return Result()


def _veinfo_get(machine: Machine, td: Td, vcpu: Vcpu, regs: Registers) -> Result:
    info = vcpu.ve_info
    if info is None:
        raise TdxError(Status.NO_VALID_VE_INFO, 0, "TDG.VP.VEINFO.GET: nothing to tell")
    vcpu.ve_info = None
    return Result(rcx=info.reason, rdx=info.qualification, r8=info.gla, r9=info.gpa)


def _report(machine: Machine, td: Td, vcpu: Vcpu, regs: Registers) -> Result:
    target, data = regs.get("rcx", 0), regs.get("rdx", 0)
    _aligned(4, target, measure.REPORT_ALIGNMENT, Operand.RCX)
    _aligned(4, data, measure.REPORT_DATA_SIZE, Operand.RDX)
    _private(machine, td, 4, data, Operand.RDX)
    read = _translated(machine, td, vcpu, data, 1)
    if regs.get("r8", 0):
        raise TdxError(Status.OPERAND_INVALID, Operand.R8, "TDG.MR.REPORT: only subtype 0")
    _private(machine, td, 4, target, Operand.RCX)
    write = _translated(machine, td, vcpu, target, W)
    params = td.params
    config = (params.mr_config_id, params.mr_owner, params.mr_owner_config)
    info = measure.td_info(params.attributes, params.xfam, td.mrtd, config, td.rtmr)
    given = machine.memory.read(read, measure.REPORT_DATA_SIZE)
    machine.memory.write(write, measure.report(machine.config.report_key, given, info))
    return Result()


def _verify_report(machine: Machine, td: Td, vcpu: Vcpu, regs: Registers) -> Result:
    gpa = regs.get("rcx", 0)
    _aligned(22, gpa, 256, Operand.RCX)
    _private(machine, td, 22, gpa, Operand.RCX)
    hpa = _translated(machine, td, vcpu, gpa, 1)
    if not measure.verified(machine.config.report_key, machine.memory.read(hpa, 256)):
        raise TdxError(Status.INVALID_REPORTMACSTRUCT, 0, "TDG.MR.VERIFYREPORT: another MAC")
    return Result()


_CALLS = {
    0: _vmcall,
    1: _info,
    2: _rtmr_extend,
    3: _veinfo_get,
    4: _report,
    22: _verify_report,
}


def tdcall(
    machine: Machine,
    td: Td,
    vcpu: Vcpu,
    rax: int,
    regs: Registers,
    interrupt_after: int | None = None,
) -> Result:
    """Run one leaf of TDCALL; raises `TdxError` where RAX would have it and nothing changed."""
    if rax not in GUEST:
        raise TdxError(Status.OPERAND_INVALID, Operand.RAX, f"no leaf {rax:#x} of TDCALL")
    if rax == 6:
        return accept(machine, td, vcpu, regs.get("rcx", 0), interrupt_after)
    try:
        return _CALLS[rax](machine, td, vcpu, regs)
    except _Left as left:
        return Result(effects=(left.outcome,))
