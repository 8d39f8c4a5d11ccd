# SPDX-License-Identifier: GPL-2.0-or-later
"""The Secure-EPT entry: its bits, its 16 states and what each state means.

Layout and encodings are those of TDX 1.5 (``ia32e_sept_t``, ``sept_state_lookup.h``). A state is
seven bits that lie apart in the entry: PS and TDMEM (7, 6) above TDP, TDB, TDBW, TDEX (56:53)
above D (9). The address field holds the page's address without a key id.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

R: Final = 1 << 0
W: Final = 1 << 1
X: Final = 1 << 2
RWX: Final = R | W | X
MT_SHIFT: Final = 3  #: memory type, bits 5:3
MT_WB: Final = 6 << MT_SHIFT
TDMEM: Final = 1 << 6  #: a page of TD memory; where EPT has "ignore PAT"
PS: Final = 1 << 7  #: a leaf, at every level
TDGL: Final = 1 << 8  #: locked by the guest's side
D: Final = 1 << 9
TDEL: Final = 1 << 11  #: locked
HPA: Final = 0x000FFFFFFFFFF000
TDHP: Final = 1 << 52  #: the host's side was refused this entry and comes first
TDEX: Final = 1 << 53  #: exported
TDBW: Final = 1 << 54  #: blocked for writing
TDB: Final = 1 << 55  #: blocked
TDP: Final = 1 << 56  #: pending
TDWR: Final = 1 << 59  #: W as it was before blocking for writing
TDSA: Final = 1 << 60  #: reserved for software of the module
SVE: Final = 1 << 63  #: suppress #VE

STATE_MASK: Final = PS | TDMEM | TDP | TDB | TDBW | TDEX | D
#: Bits 20:12 of a PENDING leaf of 2 MiB: its pages that are accepted already.
ACCEPT_SHIFT: Final = 12
ACCEPT_MASK: Final = 0x1FF << ACCEPT_SHIFT
#: What the host is shown of a leaf and of an entry that points to a table.
ARCH_LEAF: Final = RWX | (7 << MT_SHIFT) | TDMEM | PS | HPA | SVE
ARCH_NON_LEAF: Final = RWX | PS


class SeptState(enum.IntEnum):
    """States by their index in the module's tables."""

    FREE = 0
    REMOVED = 1
    NL_MAPPED = 2
    NL_BLOCKED = 3
    MAPPED = 4
    BLOCKED = 5
    BLOCKEDW = 6
    EXPORTED_BLOCKEDW = 7
    EXPORTED_DIRTY = 8
    EXPORTED_DIRTY_BLOCKEDW = 9
    PENDING = 10
    PENDING_BLOCKED = 11
    PENDING_BLOCKEDW = 12
    PENDING_EXPORTED_BLOCKEDW = 13
    PENDING_EXPORTED_DIRTY = 14
    PENDING_EXPORTED_DIRTY_BLOCKEDW = 15


@dataclass(frozen=True, slots=True)
class StateInfo:
    """What a state means; ``sept_special_flags_lookup`` of the module."""

    code: int  #: the seven bits
    public: int  #: bits 15:8 of RDX, what the host is told
    rights: int = 0  #: R, W, X of an entry in this state
    tracked: bool = True  #: a running TD may have it in a TLB: block and track before changing it
    unblocked: SeptState | None = None  #: what RANGE.UNBLOCK makes of it
    blocked: SeptState | None = None  #: what RANGE.BLOCK makes of it
    accepted: SeptState | None = None  #: what TDG.MEM.PAGE.ACCEPT makes of it


_S = SeptState
STATES: Final[dict[SeptState, StateInfo]] = {
    _S.FREE: StateInfo(0x0E, 0, tracked=False),
    _S.REMOVED: StateInfo(0x0C, 5, tracked=False),
    _S.NL_MAPPED: StateInfo(0x00, 132, RWX, blocked=_S.NL_BLOCKED),
    _S.NL_BLOCKED: StateInfo(0x08, 129, unblocked=_S.NL_MAPPED),
    _S.MAPPED: StateInfo(0x60, 4, RWX, blocked=_S.BLOCKED),
    _S.BLOCKED: StateInfo(0x68, 1, unblocked=_S.MAPPED),
    _S.BLOCKEDW: StateInfo(0x64, 8, R | X, blocked=_S.BLOCKED),
    _S.EXPORTED_BLOCKEDW: StateInfo(0x66, 9, R | X, tracked=False),
    _S.EXPORTED_DIRTY: StateInfo(0x63, 11, RWX),
    _S.EXPORTED_DIRTY_BLOCKEDW: StateInfo(0x67, 12, R | X),
    _S.PENDING: StateInfo(0x70, 2, blocked=_S.PENDING_BLOCKED, accepted=_S.MAPPED),
    _S.PENDING_BLOCKED: StateInfo(0x78, 3, unblocked=_S.PENDING),
    _S.PENDING_BLOCKEDW: StateInfo(0x74, 16, blocked=_S.PENDING_BLOCKED),
    _S.PENDING_EXPORTED_BLOCKEDW: StateInfo(0x76, 17, tracked=False),
    _S.PENDING_EXPORTED_DIRTY: StateInfo(0x73, 19, accepted=_S.EXPORTED_DIRTY),
    _S.PENDING_EXPORTED_DIRTY_BLOCKEDW: StateInfo(0x77, 20),
}

#: Leaves have PS; FREE, REMOVED and the two NL states have not.
LEAVES: Final = frozenset(one for one, info in STATES.items() if info.code & 0x40)
PENDING: Final = frozenset(one for one, info in STATES.items() if info.code & 0x50 == 0x50)
ACCESSIBLE: Final = frozenset(one for one in LEAVES if STATES[one].rights)


def state_bits(code: int) -> int:
    """Return where the seven bits of ``code`` lie in an entry."""
    return (code & 1) << 9 | (code >> 1 & 0xF) << 53 | (code >> 5 & 3) << 6


_BY_BITS: Final = {state_bits(info.code): state for state, info in STATES.items()}
_BITS: Final = {state: state_bits(info.code) for state, info in STATES.items()}


def encode(state: SeptState, hpa: int = 0, counter: int = 0, *, ve: bool = False) -> int:
    """Return the entry of ``state`` for the page at ``hpa`` (bytes), with its accept counter.

    ``ve``: the TD takes #VE on pending pages (no SEPT_VE_DISABLE), so PENDING has no SVE.
    """
    info = STATES[state]
    if hpa & ~HPA or (hpa and state in (_S.FREE, _S.REMOVED)):
        raise ValueError(f"S-EPT entry {state.name} of hpa {hpa:#x}: not an address it can hold")
    word = _BITS[state] | info.rights | hpa | counter << ACCEPT_SHIFT
    if word & TDMEM:
        word |= MT_WB
        if info.code & 0x04 and state not in PENDING:
            word |= TDWR
    # an entry that points to a table is not the last of a walk: its SVE has no meaning
    if state is _S.NL_MAPPED or (ve and info.accepted is not None):
        return word
    return word | SVE


def decode(word: int) -> SeptState:
    """Return the state of an entry; ValueError if its bits are of none."""
    try:
        return _BY_BITS[word & STATE_MASK]
    except KeyError:
        raise ValueError(f"S-EPT entry {word:#018x}: no state has these bits") from None


def hpa_of(word: int, level: int) -> int:
    """Return the address in an entry of ``level`` (0 for 4 KiB) without an accept counter."""
    if decode(word) in PENDING and level == 1:
        return word & HPA & ~ACCEPT_MASK
    return word & HPA


def counter_of(word: int) -> int:
    """Return the accept counter of a pending leaf of 2 MiB, in 4 KiB pages."""
    return (word & ACCEPT_MASK) >> ACCEPT_SHIFT


def details(word: int, level: int) -> tuple[int, int]:
    """Return RCX and RDX as an error shows an entry: its visible bits; level 2:0, state 15:8."""
    state = decode(word)
    if state is _S.FREE:
        visible = SVE
    elif state in LEAVES:
        visible = word & ARCH_LEAF & ~(ACCEPT_MASK if state in PENDING and level == 1 else 0)
    else:
        visible = word & ARCH_NON_LEAF
    return visible, level | STATES[state].public << 8


def free_table_word() -> int:
    """Return what every entry of a new table is: FREE, with #VE suppressed."""
    return _BITS[_S.FREE] | SVE
