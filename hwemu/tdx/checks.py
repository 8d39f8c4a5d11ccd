# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks of `hwemu.tdx.leaves.Check`, one function each.

A check looks, may take a lock for the length of the leaf, notes what it found in the `Call` for the
next ones, and raises `TdxError` or returns. None changes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hwemu.tdx.entry import LEAVES, STATES, SeptState, details, hpa_of
from hwemu.tdx.leaves import TOP, Check, Leaf, check_op_state
from hwemu.tdx.locks import Kind, Lock, Mode
from hwemu.tdx.machine import Machine
from hwemu.tdx.measure import CHUNK
from hwemu.tdx.pamt import PAGE_SHIFT, PAGE_SIZE, PageType
from hwemu.tdx.sept import Walk
from hwemu.tdx.states import RUNNING_STATES, LifeCycle
from hwemu.tdx.status import Operand, Status, TdxError
from hwemu.tdx.td import ATTRIBUTE_DEBUG, Td, Vcpu

_NO_TD: Final = Td(0, 0)
_NO_VCPU: Final = Vcpu(0)


@dataclass(slots=True)
class Call:
    """One leaf under way: its registers, and what the checks have found so far."""

    leaf: Leaf
    version: int
    lp: int
    registers: dict[str, int]
    td: Td = field(default_factory=lambda: _NO_TD)
    vcpu: Vcpu = field(default_factory=lambda: _NO_VCPU)
    gpa: int = 0
    level: int = 0
    at: Walk | None = None
    target: int = 0

    def get(self, operand: Operand) -> int:
        """Return a register; one that was not given is 0."""
        return self.registers.get(operand.name.lower(), 0)

    @property
    def walk(self) -> Walk:
        """Where the walk ended."""
        if self.at is None:
            raise LookupError(f"{self.leaf.name}: asks for an entry before the walk")
        return self.at

    def refused(self, code: Status, operand: int, why: str, **registers: int) -> TdxError:
        """Return the error that names leaf, operand, gpa and why."""
        what = f"{self.leaf.name} at gpa {self.gpa:#x}, level {self.level}: {why}"
        return TdxError(code, operand, what, **registers)

    def refused_entry(self, code: Status, why: str) -> TdxError:
        """Return the error about the entry, which RCX and RDX show."""
        rcx, rdx = details(self.walk.word, self.walk.level)
        return self.refused(code, Operand.RCX, f"{why} ({self.walk.state.name})", rcx=rcx, rdx=rdx)


def private_page(
    machine: Machine, hpa: int, operand: int, pt: PageType, *, level: int = 0,
    mode: Mode = Mode.EXCLUSIVE, exact: bool = True,
) -> None:  # fmt: skip
    """Check that ``hpa`` is a page of ``level`` and ``pt`` (``check_and_lock_explicit_*``).

    With ``exact`` false, any page that holds the address will do, if it is of ``pt``.
    """
    what = f"page at hpa {hpa:#x}, level {level}"
    if hpa & (PAGE_SIZE << 9 * level) - 1 or hpa >> machine.config.hpa_width:
        raise TdxError(Status.OPERAND_INVALID, operand, f"{what}: not aligned, or too high")
    if hpa not in machine.pamt:
        raise TdxError(Status.OPERAND_ADDR_RANGE_ERROR, operand, f"{what}: in no TDMR")
    machine.locks.take(Lock(Kind.PAGE, hpa >> PAGE_SHIFT, (level,)), mode, operand)
    entry = machine.pamt.walk(hpa, level)
    if entry.pt is not pt or (exact and entry.level != level):
        why = f"{what}: is {entry.pt.name} of level {entry.level}, wanted {pt.name}"
        raise TdxError(Status.PAGE_METADATA_INCORRECT, operand, why)
    if level and not machine.pamt.is_free(hpa, level):
        raise TdxError(Status.PAGE_METADATA_INCORRECT, operand, f"{what}: not free as a whole")


def _version(machine: Machine, call: Call) -> None:
    if call.version >= call.leaf.versions:
        raise call.refused(Status.OPERAND_INVALID, Operand.RAX, f"no version {call.version}")


def _not_running(call: Call, td: Td, operand: int) -> None:
    """A vCPU that runs has its TDR's lock, shared."""
    if call.leaf.root_mode is Mode.EXCLUSIVE and td.running:
        raise call.refused(Status.OPERAND_BUSY, operand, f"{td.running} vCPUs run")


def _tdr(machine: Machine, call: Call) -> None:
    hpa, operand = call.get(call.leaf.root), call.leaf.root
    if call.leaf.number == 3 and call.version:
        hpa &= ~1  # ALLOW_EXISTING
    private_page(machine, hpa, operand, PageType.TDR, mode=call.leaf.root_mode)
    call.td = machine.tds[hpa]
    _not_running(call, call.td, operand)


def _tdvpr(machine: Machine, call: Call) -> None:
    hpa, operand = call.get(call.leaf.root), call.leaf.root
    private_page(machine, hpa, operand, PageType.TDVPR, mode=call.leaf.root_mode)
    call.td = machine.vcpus[hpa]
    call.vcpu = call.td.vcpus[hpa]
    if call.vcpu.running and call.leaf.root_mode is Mode.EXCLUSIVE:
        raise call.refused(Status.OPERAND_BUSY, operand, "the vCPU runs")
    machine.locks.take(Lock(Kind.PAGE, call.td.owner, (0,)), Mode.SHARED, Operand.TDR)


def _live(machine: Machine, call: Call) -> None:
    td = call.td
    if td.fatal:
        raise call.refused(Status.TD_FATAL, 0, "the TD met a fatal error")
    if td.life_cycle is not LifeCycle.KEYS_CONFIGURED:
        raise call.refused(Status.TD_KEYS_NOT_CONFIGURED, 0, f"the TD is {td.life_cycle.name}")
    if len(td.tdcx) < machine.config.tdcs_pages:
        why = f"{len(td.tdcx)} of {machine.config.tdcs_pages} TDCX pages"
        raise call.refused(Status.TDCS_NOT_ALLOCATED, 0, why)


def _op_state(machine: Machine, call: Call) -> None:
    if call.leaf.root_mode is Mode.SHARED or Check.TDVPR in call.leaf.order:
        lock = Lock(Kind.OP_STATE, call.td.owner)
        machine.locks.take(lock, Mode.SHARED, Operand.OP_STATE)
    check_op_state(call.leaf, call.td.op_state)


def _gpa_info(machine: Machine, call: Call) -> None:
    """RCX: level 2:0, gpa 51:12, all else 0 (``page_info_api_input_t``)."""
    rcx = call.get(Operand.RCX)
    level, low = rcx & 7, rcx & 0xFF8
    first, last = call.leaf.levels
    if last == TOP:
        last = call.td.tree.top
    gpa = rcx & ~0xFFF
    call.gpa, call.level = gpa, level
    if low or rcx >> 52 or not first <= level <= last or gpa & (PAGE_SIZE << 9 * level) - 1:
        raise call.refused(
            Status.OPERAND_INVALID, Operand.RCX, f"RCX {rcx:#x}, levels {first}-{last}"
        )


def private_gpa(machine: Machine, td: Td, gpa: int) -> bool:
    """Whether ``gpa`` has neither the SHARED bit nor one above it."""
    return gpa < machine.shared_bit(td)


def _take_tree(machine: Machine, call: Call) -> None:
    if not private_gpa(machine, call.td, call.gpa):
        raise call.refused(Status.OPERAND_INVALID, Operand.RCX, "not a private gpa")
    if call.leaf.tree is not None:
        lock = Lock(Kind.SEPT_TREE, call.td.owner)
        machine.locks.take(lock, call.leaf.tree, Operand.SEPT_TREE)


def _walk(machine: Machine, call: Call) -> None:
    _take_tree(machine, call)
    call.at = call.td.tree.walk(call.gpa, call.level)
    if call.at.level != call.level:
        raise call.refused_entry(Status.EPT_WALK_FAILED, f"stopped at level {call.at.level}")


def _walk_leaf(machine: Machine, call: Call) -> None:
    call.gpa = call.get(Operand.RCX)
    _take_tree(machine, call)
    call.at = call.td.tree.walk(call.gpa, 0)
    if not call.at.word & 7:
        raise call.refused_entry(Status.EPT_ENTRY_NOT_PRESENT, "nothing is mapped")
    call.level = call.at.level
    if Check.ENTRY not in call.leaf.order and call.at.state not in call.leaf.entry_states:
        raise call.refused(Status.EPT_ENTRY_NOT_PRESENT, 0, f"it is {call.at.state.name}")


def entry_lock(call: Call) -> Lock:
    """Return the lock of the entry that the walk ended at."""
    size = PAGE_SIZE << 9 * call.level
    return Lock(Kind.SEPT_ENTRY, call.td.owner, (call.level, call.gpa // size * size))


def _entry(machine: Machine, call: Call) -> None:
    if call.leaf.tree is not None:
        try:
            machine.locks.take(entry_lock(call), Mode.EXCLUSIVE, Operand.RCX)
        except TdxError as error:
            raise call.refused_entry(error.code, "the entry is locked") from None
    state = call.walk.state
    if state in call.leaf.entry_states:
        return
    if call.leaf.number == 7 and STATES[state].unblocked is not None:
        raise call.refused_entry(Status.GPA_RANGE_ALREADY_BLOCKED, "blocked before")
    raise call.refused_entry(Status.EPT_ENTRY_STATE_INCORRECT, "not from this state")


def _chunk(machine: Machine, call: Call) -> None:
    call.gpa = call.get(Operand.RCX)
    if call.gpa % CHUNK:
        raise call.refused(Status.OPERAND_INVALID, Operand.RCX, f"not a multiple of {CHUNK}")


def _debug(machine: Machine, call: Call) -> None:
    if not call.td.params.attributes & ATTRIBUTE_DEBUG:
        raise call.refused(Status.TD_NON_DEBUG, 0, "not a debug TD")
    if call.get(Operand.RCX) % 8:
        raise call.refused(Status.OPERAND_INVALID, Operand.RCX, "not a multiple of 8")


def _source(machine: Machine, call: Call) -> None:
    hpa = call.get(Operand.R9)
    if hpa % PAGE_SIZE or hpa >> machine.config.hpa_width:
        raise call.refused(Status.OPERAND_INVALID, Operand.R9, f"source at hpa {hpa:#x}")


def _target(machine: Machine, call: Call) -> None:
    operand = call.leaf.target
    hpa = call.get(operand)
    if call.leaf.number == 3:
        # TDH.MEM.SEPT.ADD: an entry that is a table already is refused, or left alone if allowed
        if call.walk.state is not SeptState.FREE:
            if call.version and call.get(Operand.RDX) & 1:
                return
            raise call.refused_entry(Status.EPT_ENTRY_STATE_INCORRECT, "a table is there")
        hpa &= ~(1 << 63)
    # only AUG takes pages of its own level; the others take one page of 4 KiB
    level = call.level if call.leaf.number == 6 else 0
    private_page(machine, hpa, operand, PageType.NDA, level=level)
    call.target = hpa


def page_of(call: Call) -> tuple[int, int]:
    """Return (hpa, level) of the page that the entry maps, or of the table it points to."""
    walk = call.walk
    return hpa_of(walk.word, walk.level), walk.level if walk.state in LEAVES else 0


def _apart(machine: Machine, call: Call) -> None:
    if page_of(call)[0] == call.get(Operand.R8):
        raise call.refused(Status.OPERAND_INVALID, Operand.R8, "the page that is mapped")


def _tracked(machine: Machine, call: Call) -> None:
    hpa, level = page_of(call)
    machine.locks.take(Lock(Kind.PAGE, hpa >> PAGE_SHIFT, (level,)), Mode.EXCLUSIVE, Operand.RCX)
    info = STATES[call.walk.state]
    if not info.tracked or call.td.op_state not in RUNNING_STATES:
        return
    if info.unblocked is None:
        raise call.refused_entry(Status.GPA_RANGE_NOT_BLOCKED, "the TD may use it")
    bepoch = machine.pamt.bepoch(hpa, level)
    if not call.td.tracked(bepoch):
        why = f"blocked in epoch {bepoch}, the TD is in {call.td.epoch}"
        raise call.refused(Status.TLB_TRACKING_NOT_DONE, Operand.RCX, why)


def _empty(machine: Machine, call: Call) -> None:
    if not call.td.tree.is_empty(page_of(call)[0]):
        raise call.refused_entry(Status.EPT_PAGE_NOT_FREE, "the table is in use")


def _uniform(machine: Machine, call: Call) -> None:
    if call.td.tree.uniform(page_of(call)[0], call.level - 1) is None:
        raise call.refused_entry(Status.EPT_INVALID_PROMOTE_CONDITIONS, "not 512 alike")


def _epoch(machine: Machine, call: Call) -> None:
    lock = Lock(Kind.EPOCH, call.td.owner)
    machine.locks.take(lock, Mode.EXCLUSIVE, Operand.TD_EPOCH)
    if call.td.refcount[1 - (call.td.epoch & 1)]:
        raise call.refused(Status.PREVIOUS_TLB_EPOCH_BUSY, 0, "a vCPU of the last epoch runs")


CHECKS: Final[dict[Check, Callable[[Machine, Call], None]]] = {
    Check.VERSION: _version,
    Check.TDR: _tdr,
    Check.TDVPR: _tdvpr,
    Check.LIVE: _live,
    Check.OP_STATE: _op_state,
    Check.GPA_INFO: _gpa_info,
    Check.DEBUG: _debug,
    Check.CHUNK: _chunk,
    Check.WALK: _walk,
    Check.WALK_LEAF: _walk_leaf,
    Check.ENTRY: _entry,
    Check.SOURCE: _source,
    Check.TARGET: _target,
    Check.APART: _apart,
    Check.TRACKED: _tracked,
    Check.EMPTY: _empty,
    Check.UNIFORM: _uniform,
    Check.EPOCH: _epoch,
}
