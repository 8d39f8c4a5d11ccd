# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of an ASID: free, in use, and twice dirty until caches hold nothing of its guest.

A table of (state, event) → state; whatever is not in it is refused.  Sources: SEV-SNP firmware ABI
(56860) SNP_ACTIVATE, SNP_DECOMMISSION, SNP_DF_FLUSH; the order WBINVD on every core, then DF_FLUSH
is that of ``sev_flush_asids`` in ``arch/x86/kvm/svm/sev.c``.
"""

from __future__ import annotations

import enum
from typing import Final

from hwemu.snp.fwstatus import FirmwareRefused, FwStatus


class AsidState(enum.Enum):
    """Where an ASID is in its life."""

    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"
    UNFLUSHED = "unflushed"

    def __str__(self) -> str:
        return self.value


class AsidEvent(enum.Enum):
    """What can happen to an ASID."""

    ACTIVATE = "ACTIVATE"
    DEACTIVATE = "DECOMMISSION"
    WBINVD = "WBINVD"
    DF_FLUSH = "DF_FLUSH"

    def __str__(self) -> str:
        return self.value


_S, _E = AsidState, AsidEvent
ASIDS: Final[dict[tuple[AsidState, AsidEvent], AsidState]] = {
    (_S.FREE, _E.ACTIVATE): _S.ACTIVE,
    (_S.ACTIVE, _E.DEACTIVATE): _S.CACHED,
    (_S.CACHED, _E.WBINVD): _S.UNFLUSHED,
    (_S.UNFLUSHED, _E.DF_FLUSH): _S.FREE,
}
#: What ACTIVATE is answered in the other states.
REFUSED: Final = {
    _S.ACTIVE: FwStatus.ASID_OWNED,
    _S.CACHED: FwStatus.DFFLUSH_REQUIRED,
    _S.UNFLUSHED: FwStatus.DFFLUSH_REQUIRED,
}


class Asids:
    """The states of the ASIDs from 1 to ``last``; all are free at first."""

    def __init__(self, last: int) -> None:
        self.last = last
        self._states: dict[int, AsidState] = {}

    def state(self, asid: int) -> AsidState:
        """Return the state of an ASID; FirmwareRefused(INVALID_ASID) if it does not exist."""
        if not 0 < asid <= self.last:
            raise FirmwareRefused(
                FwStatus.INVALID_ASID, f"ASID {asid}: they go from 1 to {self.last}"
            )
        return self._states.get(asid, AsidState.FREE)

    def activate(self, asid: int) -> None:
        """Take a free ASID; else FirmwareRefused."""
        state = self.state(asid)
        if (state, AsidEvent.ACTIVATE) not in ASIDS:
            raise FirmwareRefused(REFUSED[state], f"ACTIVATE of ASID {asid}, which is {state}")
        self._states[asid] = ASIDS[state, AsidEvent.ACTIVATE]

    def deactivate(self, asid: int) -> None:
        """The guest is gone; what caches hold of it is not."""
        self._states[asid] = ASIDS[self.state(asid), AsidEvent.DEACTIVATE]

    def wbinvd(self) -> None:
        """Every core has written back its caches."""
        self._all(AsidEvent.WBINVD)

    def df_flush(self) -> None:
        """Flush the data fabric; FirmwareRefused(WBINVD_REQUIRED) if a cache may hold something."""
        cached = sorted(asid for asid, state in self._states.items() if state is AsidState.CACHED)
        if cached:
            raise FirmwareRefused(
                FwStatus.WBINVD_REQUIRED, f"DF_FLUSH with ASIDs {cached} still in caches"
            )
        self._all(AsidEvent.DF_FLUSH)

    def _all(self, event: AsidEvent) -> None:
        moved = {asid: ASIDS.get((old, event), old) for asid, old in self._states.items()}
        self._states = {asid: state for asid, state in moved.items() if state is not AsidState.FREE}

    def key(self) -> tuple[object, ...]:
        """Return a hashable value, equal for pools that behave alike."""
        return tuple(sorted((asid, state.value) for asid, state in self._states.items()))

    def copy(self) -> Asids:
        """Return an independent copy."""
        other = Asids(self.last)
        other._states = dict(self._states)
        return other
