# SPDX-License-Identifier: GPL-2.0-or-later
"""The leaves as data: which states of a TD and of an entry allow each, and what is asked first.

``seamcall_state_lookup`` and ``seamcall_sept_state_lookup`` of TDX 1.5, and the order of the checks
in each leaf's source. A leaf goes through ``order`` until one check refuses; then nothing has
changed. Otherwise its effect follows, which cannot fail.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from hwemu.tdx.entry import SeptState
from hwemu.tdx.locks import Mode
from hwemu.tdx.states import OpState
from hwemu.tdx.status import Operand, Status, TdxError

_O = Operand


class Check(enum.Enum):
    """What a leaf asks, in words."""

    VERSION = "RAX: a version this leaf has"
    TDR = "the TD's root: an aligned page in a TDMR, 4 KiB, TDR"
    TDVPR = "the vCPU's root: an aligned page in a TDMR, 4 KiB, TDVPR"
    LIVE = "the TD is not fatal, its key is configured, its TDCS complete"
    OP_STATE = "the operation state allows the leaf"
    GPA_INFO = "RCX: reserved bits 0, a level this leaf has, aligned to it"
    DEBUG = "a debug TD; RCX: a multiple of 8"
    CHUNK = "RCX: a multiple of 256"
    WALK = "a private gpa; the S-EPT has an entry of the level"
    WALK_LEAF = "a private gpa; the S-EPT has a leaf"
    ENTRY = "the state of the entry allows the leaf"
    SOURCE = "R9: a page of 4 KiB"
    TARGET = "the new page: aligned, in a TDMR, of the size, NDA as a whole"
    APART = "R8: another page than the mapped one"
    TRACKED = "where the TD may run: blocked, and no vCPU is left of the epoch of the block"
    EMPTY = "every entry of the table is FREE"
    UNIFORM = "512 leaves, MAPPED or PENDING alike, of one aligned run of pages"
    EPOCH = "no vCPU runs in the previous epoch"


#: The codes with which each check refuses; the operand stands in the low dword.
REFUSALS: Final[dict[Check, tuple[Status, ...]]] = {
    Check.VERSION: (Status.OPERAND_INVALID,),
    Check.TDR: (Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY,
                Status.PAGE_METADATA_INCORRECT),
    Check.TDVPR: (Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY,
                  Status.PAGE_METADATA_INCORRECT),
    Check.LIVE: (Status.TD_FATAL, Status.TD_KEYS_NOT_CONFIGURED, Status.TDCS_NOT_ALLOCATED),
    Check.OP_STATE: (Status.OPERAND_BUSY, Status.OP_STATE_INCORRECT),
    Check.GPA_INFO: (Status.OPERAND_INVALID,),
    Check.DEBUG: (Status.TD_NON_DEBUG, Status.OPERAND_INVALID),
    Check.CHUNK: (Status.OPERAND_INVALID,),
    Check.WALK: (Status.OPERAND_INVALID, Status.OPERAND_BUSY, Status.EPT_WALK_FAILED),
    Check.WALK_LEAF: (Status.OPERAND_INVALID, Status.OPERAND_BUSY, Status.EPT_ENTRY_NOT_PRESENT),
    Check.ENTRY: (Status.OPERAND_BUSY, Status.EPT_ENTRY_STATE_INCORRECT,
                  Status.GPA_RANGE_ALREADY_BLOCKED),
    Check.SOURCE: (Status.OPERAND_INVALID,),
    Check.TARGET: (Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY,
                   Status.PAGE_METADATA_INCORRECT),
    Check.APART: (Status.OPERAND_INVALID,),
    Check.TRACKED: (Status.OPERAND_BUSY, Status.GPA_RANGE_NOT_BLOCKED,
                    Status.TLB_TRACKING_NOT_DONE),
    Check.EMPTY: (Status.EPT_PAGE_NOT_FREE,),
    Check.UNIFORM: (Status.EPT_INVALID_PROMOTE_CONDITIONS,),
    Check.EPOCH: (Status.OPERAND_BUSY, Status.PREVIOUS_TLB_EPOCH_BUSY),
}  # fmt: skip

TOP: Final = -1  #: as a level: that of the root's entries, which depends on the TD


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of SEAMCALL."""

    number: int
    name: str
    order: tuple[Check, ...]
    effect: str
    op_states: frozenset[OpState] = frozenset()
    entry_states: frozenset[SeptState] = frozenset()
    levels: tuple[int, int] = (0, 0)
    root: Operand = Operand.RDX  #: the register with the TDR or TDVPR
    root_mode: Mode = Mode.SHARED
    tree: Mode | None = Mode.SHARED  #: of the S-EPT tree; None where the TDR is exclusive
    target: Operand = Operand.R8  #: the register with the new page
    versions: int = 1
    further: tuple[Status, ...] = ()  #: codes beyond those of its checks

    def refusals(self) -> tuple[Status, ...]:
        """Return every code with which the leaf may refuse, in the order of its checks."""
        found = dict.fromkeys(code for check in self.order for code in REFUSALS[check])
        found |= dict.fromkeys(self.further)
        if self.number != 7:
            found.pop(Status.GPA_RANGE_ALREADY_BLOCKED, None)
        return tuple(found)


def _states(*numbers: int) -> frozenset[OpState]:
    return frozenset(OpState(number) for number in numbers)


_S, _C = SeptState, Check
_ANY = frozenset(SeptState)
_TD = (_C.VERSION, _C.TDR, _C.LIVE, _C.OP_STATE)
_GPA = (*_TD, _C.GPA_INFO, _C.WALK, _C.ENTRY)
_VCPU = (_C.VERSION, _C.TDVPR, _C.LIVE, _C.OP_STATE)
_INITIALIZED = _states(*range(1, 11))
_CHANGING = _states(1, 2, 3, 4, 5, 8, 9)
_BLOCKABLE = frozenset({_S.NL_MAPPED, _S.MAPPED, _S.BLOCKEDW, _S.PENDING, _S.PENDING_BLOCKEDW})
_BLOCKED = frozenset({_S.NL_BLOCKED, _S.BLOCKED, _S.PENDING_BLOCKED})
_BIG = frozenset({_S.MAPPED, _S.BLOCKED, _S.PENDING, _S.PENDING_BLOCKED})
_TABLE = frozenset({_S.NL_MAPPED, _S.NL_BLOCKED})
_X = Mode.EXCLUSIVE

_ROWS: Final = (
    Leaf(0, "TDH.VP.ENTER", _VCPU, "the vCPU runs in the current epoch; its TLB is flushed if that "
         "has moved", _states(2, 3, 9), root=_O.RCX, further=(
             Status.VCPU_STATE_INCORRECT, Status.VCPU_ASSOCIATED, Status.OPERAND_BUSY)),
    Leaf(1, "TDH.MNG.ADDCX", (_C.VERSION, _C.TDR), "page NDA → TDCX", _states(0), root_mode=_X,
         target=_O.RCX, further=(
             Status.TD_FATAL, Status.TD_KEYS_NOT_CONFIGURED, Status.TDCX_NUM_INCORRECT,
             *REFUSALS[_C.TARGET], Status.OP_STATE_INCORRECT)),
    Leaf(2, "TDH.MEM.PAGE.ADD", (*_GPA, _C.SOURCE, _C.TARGET), "copy the source; entry MAPPED, "
         "page NDA → REG; MRTD takes the gpa", _states(1), frozenset({_S.FREE}), root_mode=_X,
         tree=None),
    Leaf(3, "TDH.MEM.SEPT.ADD", (*_GPA, _C.TARGET), "page NDA → EPT; entry NL_MAPPED",
         _states(1, 2, 3, 6, 7, 8, 9), frozenset({_S.FREE, _S.NL_MAPPED}), (1, TOP), versions=2),
    Leaf(4, "TDH.VP.ADDCX", _VCPU, "page NDA → TDCX", _states(1, 7), target=_O.RCX, root_mode=_X,
         further=(Status.VCPU_STATE_INCORRECT, Status.TDCX_NUM_INCORRECT, *REFUSALS[_C.TARGET])),
    Leaf(5, "TDH.MEM.PAGE.RELOCATE", (*_GPA, _C.APART, _C.TRACKED, _C.TARGET), "copy (not if "
         "pending); old page → NDA, new NDA → REG; entry unblocked", _CHANGING,
         frozenset(one for one in SeptState if one >= 4)),
    Leaf(6, "TDH.MEM.PAGE.AUG", (*_GPA, _C.TARGET), "entry PENDING, no rights; page NDA → REG",
         _states(1, 2, 3, 9), frozenset({_S.FREE, _S.REMOVED}), (0, 1)),
    Leaf(7, "TDH.MEM.RANGE.BLOCK", _GPA, "entry → *_BLOCKED; BEPOCH = TD epoch", _CHANGING,
         _BLOCKABLE, (0, TOP), tree=_X),
    Leaf(8, "TDH.MNG.KEY.CONFIG", (_C.VERSION, _C.TDR), "the package has the key; with the last "
         "package → KEYS_CONFIGURED", root=_O.RCX, root_mode=_X, further=(
             Status.TD_FATAL, Status.LIFECYCLE_STATE_INCORRECT, Status.KEY_CONFIGURED)),
    Leaf(9, "TDH.MNG.CREATE", (_C.VERSION,), "page NDA → TDR; the HKID is the TD's", root=_O.RCX,
         root_mode=_X, target=_O.RCX,
         further=(*REFUSALS[_C.TARGET], Status.HKID_NOT_FREE)),
    Leaf(10, "TDH.VP.CREATE", (*_TD, _C.TARGET), "page NDA → TDVPR", _states(1, 7), target=_O.RCX),
    Leaf(11, "TDH.MNG.RD", _TD, "R8 = the field that RDX names", _INITIALIZED, root=_O.RCX,
         further=(Status.METADATA_FIELD_ID_INCORRECT,)),
    Leaf(12, "TDH.MEM.RD", (*_TD, _C.DEBUG, _C.WALK_LEAF, _C.ENTRY), "R8 = 8 bytes of a debug TD",
         _INITIALIZED, frozenset({_S.MAPPED, _S.BLOCKEDW, _S.EXPORTED_BLOCKEDW, _S.EXPORTED_DIRTY,
                    _S.EXPORTED_DIRTY_BLOCKEDW})),
    Leaf(14, "TDH.MEM.WR", (*_TD, _C.DEBUG, _C.WALK_LEAF, _C.ENTRY), "store R8 into a debug TD; R8 "
         "= what was there", _states(1, 2, 3, 6, 7, 8, 9, 10),
         frozenset({_S.MAPPED, _S.EXPORTED_DIRTY})),
    Leaf(15, "TDH.MEM.PAGE.DEMOTE", (*_GPA, _C.TRACKED, _C.TARGET), "512 leaves in the new table "
         "(NDA → EPT); entry NL_MAPPED, unblocked", _CHANGING, _BIG, (1, 2),
         further=(Status.INTERRUPTED_RESTARTABLE,)),
    Leaf(16, "TDH.MR.EXTEND", (*_TD, _C.CHUNK, _C.WALK_LEAF), "MRTD takes 256 bytes", _states(1),
         frozenset({_S.MAPPED}), root_mode=_X, tree=None),
    Leaf(17, "TDH.MR.FINALIZE", _TD, "MRTD is final; → RUNNABLE", _states(1), root=_O.RCX,
         root_mode=_X, further=(Status.NO_VCPUS,)),
    Leaf(18, "TDH.VP.FLUSH", (_C.VERSION, _C.TDVPR), "the vCPU is of no processor; its TLB is "
         "flushed", root=_O.RCX, root_mode=_X, further=(
             Status.TD_KEYS_NOT_CONFIGURED, Status.TDCX_NUM_INCORRECT,
             Status.VCPU_NOT_ASSOCIATED)),
    Leaf(19, "TDH.MNG.VPFLUSHDONE", (_C.VERSION, _C.TDR), "→ BLOCKED: no vCPU can run any more",
         root=_O.RCX, root_mode=_X, further=(
             Status.LIFECYCLE_STATE_INCORRECT, Status.FLUSHVP_NOT_DONE)),
    Leaf(20, "TDH.MNG.KEY.FREEID", (_C.VERSION, _C.TDR), "→ TEARDOWN; the HKID is free",
         root=_O.RCX, root_mode=_X, further=(
             Status.LIFECYCLE_STATE_INCORRECT, Status.WBCACHE_NOT_COMPLETE)),
    Leaf(21, "TDH.MNG.INIT", _TD, "the TD takes TD_PARAMS; → INITIALIZED", _states(0),
         root=_O.RCX, root_mode=_X, further=(Status.OPERAND_INVALID,)),
    Leaf(22, "TDH.VP.INIT", _VCPU, "the vCPU is READY, of this processor", _states(1), root=_O.RCX,
         root_mode=_X, versions=2, further=(
             Status.TDCX_NUM_INCORRECT, Status.VCPU_STATE_INCORRECT, Status.MAX_VCPUS_EXCEEDED)),
    Leaf(23, "TDH.MEM.PAGE.PROMOTE", (*_GPA, _C.TRACKED, _C.UNIFORM), "one leaf for 512; the table "
         "→ NDA", _CHANGING, _TABLE, (1, 2), versions=2,
         further=(Status.INTERRUPTED_RESTARTABLE,)),
    Leaf(24, "TDH.PHYMEM.PAGE.RDMD", (_C.VERSION,), "RCX = type, RDX = TDR, R8 = size, R9 = BEPOCH",
         further=(Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY)),
    Leaf(25, "TDH.MEM.SEPT.RD", _GPA, "RCX, RDX = the entry", _INITIALIZED, _ANY, (0, TOP)),
    Leaf(28, "TDH.PHYMEM.PAGE.RECLAIM", (_C.VERSION,), "page → NDA; RCX = type, RDX = TDR, R8 = "
         "size",
         further=(Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY,
                  Status.PAGE_METADATA_INCORRECT, Status.LIFECYCLE_STATE_INCORRECT,
                  Status.TD_ASSOCIATED_PAGES_EXIST)),
    Leaf(29, "TDH.MEM.PAGE.REMOVE", (*_GPA, _C.TRACKED), "entry FREE (REMOVED while importing); "
         "page → NDA", _states(1, 2, 3, 4, 5, 8, 9, 10),
         frozenset({_S.MAPPED, _S.BLOCKED, _S.BLOCKEDW, _S.PENDING, _S.PENDING_BLOCKED,
                    _S.PENDING_BLOCKEDW}), (0, 2)),
    Leaf(30, "TDH.MEM.SEPT.REMOVE", (*_GPA, _C.TRACKED, _C.EMPTY), "entry FREE; the table → NDA",
         _INITIALIZED, _TABLE, (1, TOP), tree=_X, versions=2),
    Leaf(38, "TDH.MEM.TRACK", (*_TD, _C.EPOCH), "TD epoch + 1", _states(*range(1, 10)),
         root=_O.RCX),
    Leaf(39, "TDH.MEM.RANGE.UNBLOCK", (*_GPA, _C.TRACKED), "entry back to what it was", _CHANGING,
         _BLOCKED, (0, TOP), tree=_X),
    Leaf(40, "TDH.PHYMEM.CACHE.WB", (_C.VERSION,), "the package's caches hold nothing of flushed "
         "HKIDs", further=(
             Status.OPERAND_INVALID, Status.OPERAND_BUSY, Status.NO_HKID_READY_TO_WBCACHE,
             Status.WBCACHE_RESUME_ERROR, Status.INTERRUPTED_RESUMABLE)),
    Leaf(41, "TDH.PHYMEM.PAGE.WBINVD", (_C.VERSION,), "caches hold nothing of an NDA page",
         further=(Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY,
                  Status.PAGE_METADATA_INCORRECT)),
)  # fmt: skip

LEAVES: Final[dict[int, Leaf]] = {leaf.number: leaf for leaf in _ROWS}
NUMBERS: Final[dict[str, int]] = {leaf.name: leaf.number for leaf in _ROWS}

#: The leaves of TDCALL: number → (name, what it does).
GUEST: Final[dict[int, tuple[str, str]]] = {
    0: ("TDG.VP.VMCALL", "leave to the host with the registers that RCX selects"),
    1: ("TDG.VP.INFO", "RCX = GPA width, RDX = attributes, R8 = vCPUs, R9 = own index"),
    2: ("TDG.MR.RTMR.EXTEND", "RTMR[RDX] takes the 48 bytes at gpa RCX"),
    3: ("TDG.VP.VEINFO.GET", "what the last #VE was about, once"),
    4: ("TDG.MR.REPORT", "TDREPORT_STRUCT to gpa RCX over the 64 bytes at gpa RDX"),
    6: ("TDG.MEM.PAGE.ACCEPT", "zero a PENDING page of 4 KiB or 2 MiB and map it"),
    22: ("TDG.MR.VERIFYREPORT", "whether the REPORTMACSTRUCT at gpa RCX is of this machine"),
}


def leaf_of(rax: int) -> tuple[Leaf, int]:
    """Return leaf and version that RAX names; OPERAND_INVALID | RAX if there is no such leaf."""
    leaf = LEAVES.get(rax & 0xFFFF)
    if leaf is None or rax >> 24:
        raise TdxError(Status.OPERAND_INVALID, Operand.RAX, f"no leaf {rax:#x}")
    return leaf, rax >> 16 & 0xFF


def check_op_state(leaf: Leaf, state: OpState) -> None:
    """Raise OP_STATE_INCORRECT unless the TD's operation state allows the leaf."""
    if state not in leaf.op_states:
        raise TdxError(Status.OP_STATE_INCORRECT, 0, f"{leaf.name} of a TD that is {state.name}")
