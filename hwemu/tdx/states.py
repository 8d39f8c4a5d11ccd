# SPDX-License-Identifier: GPL-2.0-or-later
"""The states of a TD, of its key and of its vCPUs, and what moves them.

``tdr_tdcs`` structures and ``op_state_lookup.c`` of TDX 1.5. A TD has two states at once: the life
cycle in its TDR says what its key is good for, the operation state in its TDCS which leaves may
be used. Migration's states are here because the tables speak of them; its leaves are not modelled.
"""

from __future__ import annotations

import enum
from typing import Final


class LifeCycle(enum.IntEnum):
    """TDR.LIFECYCLE_STATE."""

    HKID_ASSIGNED = 0
    KEYS_CONFIGURED = 1
    BLOCKED = 2
    TEARDOWN = 3


class OpState(enum.IntEnum):
    """TDCS.OP_STATE."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    MEMORY_IMPORT = 6
    STATE_IMPORT = 7
    POST_IMPORT = 8
    LIVE_IMPORT = 9
    FAILED_IMPORT = 10


class VcpuState(enum.IntEnum):
    """TDVPS.VCPU_STATE."""

    UNINITIALIZED = 0
    READY = 1
    DISABLED = 2


class KeyState(enum.IntEnum):
    """An entry of the key ownership table (KOT), one a private HKID."""

    FREE = 0
    ASSIGNED = 1
    FLUSHED = 2


#: In these a vCPU may run: an entry must be blocked and tracked before it changes.
RUNNING_STATES: Final = frozenset({OpState.RUNNABLE, OpState.LIVE_EXPORT, OpState.LIVE_IMPORT})
#: In these PAGE.REMOVE leaves REMOVED, so that an older copy is not imported over it.
IMPORTING: Final = frozenset(
    {OpState.MEMORY_IMPORT, OpState.STATE_IMPORT, OpState.POST_IMPORT, OpState.LIVE_IMPORT}
)

#: (state, leaf) → state: every move of a life cycle. Nothing else changes it.
LIFE_CYCLE: Final[dict[tuple[LifeCycle, str], LifeCycle]] = {
    (LifeCycle.HKID_ASSIGNED, "TDH.MNG.KEY.CONFIG"): LifeCycle.KEYS_CONFIGURED,
    (LifeCycle.HKID_ASSIGNED, "TDH.MNG.VPFLUSHDONE"): LifeCycle.BLOCKED,
    (LifeCycle.KEYS_CONFIGURED, "TDH.MNG.VPFLUSHDONE"): LifeCycle.BLOCKED,
    (LifeCycle.BLOCKED, "TDH.MNG.KEY.FREEID"): LifeCycle.TEARDOWN,
}
#: (state, leaf) → state: every move of an operation state that is modelled.
OPERATION: Final[dict[tuple[OpState, str], OpState]] = {
    (OpState.UNINITIALIZED, "TDH.MNG.INIT"): OpState.INITIALIZED,
    (OpState.INITIALIZED, "TDH.MR.FINALIZE"): OpState.RUNNABLE,
}
