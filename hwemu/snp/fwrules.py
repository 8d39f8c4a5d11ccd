# SPDX-License-Identifier: GPL-2.0-or-later
"""What the AMD-SP asks before it does a command: a table of checks each, in its order.

Sources: SEV-SNP firmware ABI (56860), the command's page, unless a row says otherwise.  Frames are
numbers of 4 KiB pages.  A page is judged by the entry of its own frame: frames inside a large page
look reclaimed, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from hwemu.snp.asids import AsidState
from hwemu.snp.check import Check
from hwemu.snp.fwstatus import Command, FwStatus
from hwemu.snp.guestcontext import TRANSITIONS, GuestContext, IdBlock, Policy, policy_allowed
from hwemu.snp.launch import TYPES, PageType
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import Entry, PageState, state_of


@dataclass(frozen=True, slots=True)
class Asked:
    """A command in question; what it does not have is 0 or None."""

    command: Command
    rmp: Rmp
    initialized: bool
    smt: bool = False
    asid_state: Callable[[int], AsidState | None] = lambda asid: None
    gctx: int = 0
    guest: GuestContext | None = None
    page: int = 0
    target: int = 0
    size: int = 0
    page_type: int = 0
    imi: bool = False
    asid: int = 0
    policy: int = 0
    id_block: IdBlock | None = None

    def entry(self, pfn: int) -> Entry | None:
        """The entry of this very frame; None for one that has none."""
        return self.rmp.raw(pfn) if self.rmp.covered(pfn) else None

    def state(self, pfn: int) -> PageState | None:
        """The state of this very frame."""
        entry = self.entry(pfn)
        return state_of(entry) if entry else None

    @property
    def who(self) -> GuestContext:
        """The guest; asked below `_CONTEXT` only."""
        assert self.guest is not None
        return self.guest


_F, _S = FwStatus, PageState
_ABI = "56860"

_PLATFORM: Final[Check[Asked]] = Check(
    "SNP_INIT was done", _F.INVALID_PLATFORM_STATE, lambda a: a.initialized, _ABI
)
_CONTEXT: Final[Check[Asked]] = Check(
    "GCTX_PADDR is a Context page",
    _F.INVALID_GUEST,
    lambda a: a.state(a.gctx) is _S.CONTEXT and a.guest is not None,
    _ABI,
)
_GUEST_STATE: Final[Check[Asked]] = Check(
    "the guest's state takes the command",
    _F.INVALID_GUEST_STATE,
    lambda a: (a.who.state, a.command) in TRANSITIONS,
    "56860, guest state machine",
)
_ACTIVE: Final[Check[Asked]] = Check(
    "the guest has an ASID", _F.INACTIVE, lambda a: a.who.asid > 0, _ABI
)


def _is_firmware(what: str, pfn: Callable[[Asked], int]) -> Check[Asked]:
    return Check(
        f"{what} is a Firmware page",
        _F.INVALID_PAGE_STATE,
        lambda a: a.state(pfn(a)) is _S.FIRMWARE,
        _ABI,
    )


def _sized(pfn: int, asked: Asked) -> bool:
    entry = asked.entry(pfn)
    return entry is not None and entry.size == asked.size


def _owned(pfn: int, asked: Asked) -> bool:
    entry = asked.entry(pfn)
    return entry is not None and entry.asid == asked.who.asid


def _moves(asked: Asked) -> tuple[PageState | None, PageState | None]:
    return asked.state(asked.page), asked.state(asked.target)


#: (state of the source, of the target) → states of both afterwards.
MOVES: Final = {
    (_S.PRE_GUEST, _S.PRE_GUEST): (_S.GUEST_INVALID, _S.GUEST_INVALID),
    (_S.PRE_SWAP, _S.PRE_GUEST): (_S.GUEST_INVALID, _S.GUEST_VALID),
    (_S.METADATA, _S.FIRMWARE): (_S.FIRMWARE, _S.METADATA),
}
#: What SNP_PAGE_RECLAIM makes of an immutable page.
RECLAIMS: Final = {
    _S.FIRMWARE: _S.RECLAIM,
    _S.METADATA: _S.RECLAIM,
    _S.PRE_GUEST: _S.GUEST_INVALID,
    _S.PRE_SWAP: _S.GUEST_VALID,
}


def _owner_of_move(asked: Asked) -> bool:
    if asked.state(asked.page) is _S.METADATA:
        entry = asked.entry(asked.page)
        return entry is not None and entry.gpa >> 12 == asked.gctx
    return _owned(asked.page, asked) and _owned(asked.target, asked)


def _mergeable(asked: Asked) -> bool:
    """Whether 512 small pages are lent, alike, of one guest and consecutive from a 2 MiB gpa."""
    rmp = asked.rmp
    if not rmp.covered(asked.page, rmp.group):
        return False
    entries = [rmp.raw(asked.page + step) for step in range(rmp.group)]
    first = entries[0]
    steps = np.arange(rmp.group) * 4096 + first.gpa
    return (
        first.gpa % (rmp.group * 4096) == 0
        and not any(entry.vmsa or entry.large for entry in entries)
        and all(
            entry.immutable
            and entry.asid == first.asid > 0
            and entry.validated == first.validated
            and entry.permissions == first.permissions
            and entry.gpa == gpa
            for entry, gpa in zip(entries, steps.tolist(), strict=True)
        )
    )


COMMANDS: Final[dict[Command, tuple[Check[Asked], ...]]] = {
    Command.SNP_INIT: (
        Check(
            "SNP_INIT was not done",
            _F.INVALID_PLATFORM_STATE,
            lambda a: not a.initialized,
            _ABI,
        ),
        Check(
            "every page is the hypervisor's",
            _F.RMP_INITIALIZATION_FAILED,
            lambda a: not a.rmp.assigned(a.rmp.start, a.rmp.frames),
            "APM 15.36.4: the table is zeroed first",
        ),
    ),
    Command.SNP_DF_FLUSH: (_PLATFORM,),
    Command.SNP_GCTX_CREATE: (
        _PLATFORM,
        _is_firmware("the page", lambda a: a.gctx),
        Check(
            "the page is small", _F.INVALID_PAGE_SIZE, lambda a: _sized(a.gctx, a), "56860; ours"
        ),
    ),
    Command.SNP_LAUNCH_START: (
        _PLATFORM,
        _CONTEXT,
        _GUEST_STATE,
        Check(
            "the policy allows this machine, and is known to it",
            _F.POLICY_FAILURE,
            lambda a: policy_allowed(a.policy, smt=a.smt),
            _ABI,
        ),
    ),
    Command.SNP_ACTIVATE: (
        _PLATFORM,
        _CONTEXT,
        _GUEST_STATE,
        Check("the guest has no ASID yet", _F.ACTIVE, lambda a: a.who.asid == 0, _ABI),
        Check(
            "the ASID exists",
            _F.INVALID_ASID,
            lambda a: a.asid_state(a.asid) is not None,
            _ABI,
        ),
        Check(
            "no guest has the ASID",
            _F.ASID_OWNED,
            lambda a: a.asid_state(a.asid) is not AsidState.ACTIVE,
            _ABI,
        ),
        Check(
            "no cache may hold something of the last guest with the ASID",
            _F.DFFLUSH_REQUIRED,
            lambda a: a.asid_state(a.asid) is AsidState.FREE,
            _ABI,
        ),
        Check(
            "no page is assigned to the ASID",
            _F.ASID_OWNED,
            lambda a: a.rmp.frames_of(a.asid) == 0,
            "56860 counts the pages of an ASID; the status is ours",
        ),
    ),
    Command.SNP_LAUNCH_UPDATE: (
        _PLATFORM,
        _CONTEXT,
        Check(
            "the page is a Pre-Guest page",
            _F.INVALID_PAGE_STATE,
            lambda a: a.state(a.page) is _S.PRE_GUEST,
            _ABI,
        ),
        Check("the page has that size", _F.INVALID_PAGE_SIZE, lambda a: _sized(a.page, a), _ABI),
        Check(
            "the page type exists",
            _F.INVALID_PARAM,
            lambda a: a.page_type in PageType._value2member_map_,
            _ABI,
        ),
        Check(
            "VMSA, secrets and CPUID pages are small",
            _F.INVALID_PAGE_SIZE,
            lambda a: a.size == 0 or TYPES[PageType(a.page_type)].large,
            _ABI,
        ),
        _GUEST_STATE,
        _ACTIVE,
        Check("the page is the guest's", _F.INVALID_PAGE_OWNER, lambda a: _owned(a.page, a), _ABI),
        Check(
            "an image for incoming migration has no other pages",
            _F.INVALID_PARAM,
            lambda a: a.imi or not a.who.imi,
            _ABI,
        ),
    ),
    Command.SNP_LAUNCH_FINISH: (
        _PLATFORM,
        _CONTEXT,
        _GUEST_STATE,
        Check(
            "the ID block has version 1",
            _F.BAD_VERSION,
            lambda a: a.id_block is None or a.id_block.version == 1,
            _ABI,
        ),
        Check(
            "the ID block expects this launch digest",
            _F.BAD_MEASUREMENT,
            lambda a: a.id_block is None or a.id_block.launch_digest == a.who.digest,
            _ABI,
        ),
        Check(
            "the ID block expects this policy",
            _F.POLICY_FAILURE,
            lambda a: a.id_block is None or a.id_block.policy == a.who.policy,
            _ABI,
        ),
    ),
    Command.SNP_GUEST_STATUS: (_PLATFORM, _CONTEXT),
    Command.SNP_GUEST_REQUEST: (_PLATFORM, _CONTEXT, _GUEST_STATE),
    Command.SNP_DECOMMISSION: (_PLATFORM, _CONTEXT),
    Command.SNP_MD_INIT: (
        _PLATFORM,
        _CONTEXT,
        _is_firmware("the page", lambda a: a.page),
        _GUEST_STATE,
    ),
    Command.SNP_PAGE_MOVE: (
        _PLATFORM,
        _CONTEXT,
        Check(
            "both pages have that size",
            _F.INVALID_PAGE_SIZE,
            lambda a: _sized(a.page, a) and _sized(a.target, a),
            _ABI,
        ),
        _GUEST_STATE,
        _ACTIVE,
        Check(
            "the policy lets pages be moved (PAGE_SWAP_DISABLE)",
            _F.POLICY_FAILURE,
            lambda a: not a.who.policy & Policy.PAGE_SWAP_DISABLE,
            "56860, guest policy; ours for its place",
        ),
        Check(
            "the pages are lent, the target empty",
            _F.INVALID_PAGE_STATE,
            lambda a: a.page != a.target and _moves(a) in MOVES,
            _ABI,
        ),
        Check("both pages are the guest's", _F.INVALID_PAGE_OWNER, _owner_of_move, _ABI),
    ),
    Command.SNP_PAGE_RECLAIM: (
        _PLATFORM,
        Check("the page has an entry", _F.INVALID_ADDRESS, lambda a: a.rmp.covered(a.page), _ABI),
        Check("the page has that size", _F.INVALID_PAGE_SIZE, lambda a: _sized(a.page, a), _ABI),
        Check(
            "the page is not immutable, or one that is lent",
            _F.INVALID_PAGE_STATE,
            lambda a: not a.rmp.raw(a.page).immutable or a.state(a.page) in RECLAIMS,
            _ABI,
        ),
    ),
    Command.SNP_PAGE_UNSMASH: (
        _PLATFORM,
        Check(
            "the address begins a page of 2M",
            _F.INVALID_PARAM,
            lambda a: a.page % a.rmp.group == 0,
            _ABI,
        ),
        Check(
            "all small pages are lent, alike, one guest's and consecutive; none is a VMSA",
            _F.INVALID_PAGE_STATE,
            _mergeable,
            _ABI,
        ),
    ),
}
