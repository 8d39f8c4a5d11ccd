# SPDX-License-Identifier: GPL-2.0-or-later
"""What the leaves on a TD's memory do once every check has passed: TDH.MEM.*, TDH.MR.EXTEND.

Here nothing can be refused any more, but by an interrupt that waits (DEMOTE and PROMOTE look for
one before they begin to change anything).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from hwemu.tdx.checks import Call, page_of
from hwemu.tdx.entry import PENDING, STATES, SeptState, details, encode
from hwemu.tdx.machine import Machine
from hwemu.tdx.measure import CHUNK, extended, page_added
from hwemu.tdx.pamt import PAGE_SIZE, PageType, span
from hwemu.tdx.result import Result
from hwemu.tdx.states import IMPORTING
from hwemu.tdx.status import Operand, Status

_NULL_PA: Final = (1 << 64) - 1


def _sept_add(machine: Machine, call: Call) -> Result:
    td, hpa = call.td, call.target
    if call.walk.state is not SeptState.FREE:
        # ALLOW_EXISTING: bit 63 says that the page was not needed
        return Result(r8=call.get(Operand.R8) | 1 << 63)
    td.tree.add(hpa)
    machine.pamt.assign(hpa, 0, PageType.EPT, td.owner)
    td.children += 1
    call.walk.store(encode(SeptState.NL_MAPPED, hpa))
    return Result(r8=_NULL_PA) if call.version else Result()


def _page_add(machine: Machine, call: Call) -> Result:
    td = call.td
    machine.memory.copy(call.get(Operand.R9), call.target)
    _map_new(machine, call, SeptState.MAPPED)
    page_added(td.sha, call.gpa)
    return Result()


def _page_aug(machine: Machine, call: Call) -> Result:
    _map_new(machine, call, SeptState.PENDING)
    return Result()


def _map_new(machine: Machine, call: Call, state: SeptState) -> None:
    machine.pamt.assign(call.target, call.level, PageType.REG, call.td.owner)
    call.td.children += span(call.level)
    call.walk.store(call.td.word(state, call.target))


def _range_block(machine: Machine, call: Call) -> Result:
    hpa, level = page_of(call)
    after = STATES[call.walk.state].blocked
    assert after is not None  # the leaf's entry states are those that have one
    call.walk.store(call.td.word(after, hpa))
    machine.pamt.set_bepoch(hpa, level, call.td.epoch)
    return Result()


def _unblocked(call: Call) -> SeptState:
    """Return what an unblocked entry in the walk's state would be."""
    return STATES[call.walk.state].unblocked or call.walk.state


def _range_unblock(machine: Machine, call: Call) -> Result:
    call.walk.store(call.td.word(_unblocked(call), page_of(call)[0]))
    return Result()


def _track(machine: Machine, call: Call) -> Result:
    call.td.epoch += 1
    return Result()


def _page_remove(machine: Machine, call: Call) -> Result:
    hpa, level = page_of(call)
    gone = SeptState.REMOVED if call.td.op_state in IMPORTING else SeptState.FREE
    call.walk.store(encode(gone))
    machine.pamt.free(hpa, level)
    call.td.children -= span(level)
    return Result(rcx=hpa)


def _page_relocate(machine: Machine, call: Call) -> Result:
    hpa, _ = page_of(call)
    if call.walk.state not in PENDING:
        machine.memory.copy(hpa, call.target)
    machine.pamt.free(hpa, 0)
    machine.pamt.assign(call.target, 0, PageType.REG, call.td.owner)
    call.walk.store(call.td.word(_unblocked(call), call.target))
    return Result(rcx=hpa)


def _page_demote(machine: Machine, call: Call) -> Result:
    if machine.host_interrupt:
        raise call.refused(Status.INTERRUPTED_RESTARTABLE, 0, "an interrupt waits")
    td = call.td
    hpa, level = page_of(call)
    td.tree.fill(call.target, level - 1, td.word(_unblocked(call), hpa))
    machine.pamt.split(hpa, level)
    machine.pamt.assign(call.target, 0, PageType.EPT, td.owner)
    td.children += 1
    call.walk.store(encode(SeptState.NL_MAPPED, call.target))
    return Result()


def _page_promote(machine: Machine, call: Call) -> Result:
    if machine.host_interrupt:
        raise call.refused(Status.INTERRUPTED_RESTARTABLE, 0, "an interrupt waits")
    td, level = call.td, call.level
    table, _ = page_of(call)
    word = td.tree.uniform(table, level - 1)
    assert word is not None  # checked
    td.tree.drop(table)
    machine.pamt.free(table, 0)
    td.children -= 1
    call.walk.store(word)
    machine.pamt.merge(page_of(call)[0], level)
    return Result(rcx=table)


def _sept_remove(machine: Machine, call: Call) -> Result:
    hpa, _ = page_of(call)
    call.td.tree.drop(hpa)
    machine.pamt.free(hpa, 0)
    call.td.children -= 1
    call.walk.store(encode(SeptState.FREE))
    return Result(rcx=hpa)


def _sept_rd(machine: Machine, call: Call) -> Result:
    rcx, rdx = details(call.walk.word, call.walk.level)
    return Result(rcx=rcx, rdx=rdx)


def hpa_at(call: Call, gpa: int) -> int:
    """Return where the leaf that the walk ended at maps ``gpa``."""
    hpa, level = page_of(call)
    return hpa + gpa % (PAGE_SIZE << 9 * level)


def _mr_extend(machine: Machine, call: Call) -> Result:
    extended(call.td.sha, call.gpa, machine.memory.read(hpa_at(call, call.gpa), CHUNK))
    return Result()


def _mem_rd(machine: Machine, call: Call) -> Result:
    (value,) = struct.unpack("<Q", machine.memory.read(hpa_at(call, call.gpa), 8))
    return Result(r8=value)


def _mem_wr(machine: Machine, call: Call) -> Result:
    before = _mem_rd(machine, call)
    machine.memory.write(hpa_at(call, call.gpa), struct.pack("<Q", call.get(Operand.R8)))
    return before


EFFECTS: Final[dict[int, Callable[[Machine, Call], Result]]] = {
    2: _page_add,
    3: _sept_add,
    5: _page_relocate,
    6: _page_aug,
    7: _range_block,
    12: _mem_rd,
    14: _mem_wr,
    15: _page_demote,
    16: _mr_extend,
    23: _page_promote,
    25: _sept_rd,
    29: _page_remove,
    30: _sept_remove,
    38: _track,
    39: _range_unblock,
}
