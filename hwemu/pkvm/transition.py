# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way in which pages change hands, as one table.

Sources: arch/arm64/kvm/hyp/nvhe/mem_protect.c and pkvm.c of Linux, and of Android's common kernel
where a row says so (guests that give pages back, ranges of guests, pins for DMA).

A transition of many pages is one: each check is made of the whole range before the next, and
nothing changes unless all pass.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hwemu.pkvm.state import Component, PageState

_OWNED, _SHARED, _BORROWED, _NOPAGE = PageState
_HOST, _HYP, _GUEST = Component


class Deed(enum.Enum):
    """What may happen to pages."""

    HOST_DONATE_GUEST = "host donates to guest"
    HOST_SHARE_GUEST = "host shares with guest"
    HOST_UNSHARE_GUEST = "host unshares with guest"
    GUEST_SHARE_HOST = "guest shares with host"
    GUEST_UNSHARE_HOST = "guest unshares with host"
    GUEST_RELINQUISH = "guest relinquishes to host"
    HOST_MOVE_OWNED = "host moves a page that the guest owns"
    HOST_MOVE_SHARED = "host moves a page that the guest shares"
    RECLAIM_OWNED = "host reclaims a page that the dead guest owned"
    RECLAIM_SHARED = "host reclaims a page that the dead guest shared"
    HOST_SHARE_HYP = "host shares with hyp"
    HOST_UNSHARE_HYP = "host unshares with hyp"
    HOST_DONATE_HYP = "host donates to hyp"
    HYP_DONATE_HOST = "hyp donates to host"


class Vm(enum.Enum):
    """What a VM must be for a transition with it; EINVAL otherwise (hyp-main.c)."""

    NONE = "–"
    PROTECTED = "protected, alive"
    ORDINARY = "not protected, alive"
    ORDINARY_ANY = "not protected, alive or dying"
    DYING = "dying"


class Guard(enum.Enum):
    """What else is checked of the pages, right after a side's state."""

    UNPINNED = "EBUSY while somebody holds a reference"
    SHARED_WITH_GUESTS = "EPERM if it is shared, and not with guests"
    COUNT_LEFT = "EBUSY if it is shared as often as can be counted"


@dataclass(frozen=True, slots=True)
class Side:
    """What a component must be to the pages, any of ``before``, and what it is then."""

    who: Component
    before: tuple[PageState, ...]
    after: PageState
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True, slots=True)
class Transition:
    """One row."""

    initiator: Side
    completer: Side
    source: str
    vm: Vm = Vm.NONE
    completer_first: bool = False  #: whose state is checked first
    zeroed: bool = False  #: before the completer reaches it (hyp_poison_page())
    replaced: Side | None = None
    """Of a page that comes in the place of another, with its contents: what the host is to the
    other one, which alone is zeroed then.
    """

    def side(self, who: Component) -> Side | None:
        """The part that ``who`` has in it."""
        sides = (self.initiator, self.completer)
        return next((side for side in sides if side.who is who), None)

    @property
    def checked(self) -> tuple[Side, Side]:
        """Both sides in the order of the checks."""
        both = self.initiator, self.completer
        return both[::-1] if self.completer_first else both


_HOST_GIVES: Final = Side(_HOST, (_OWNED,), _NOPAGE, (Guard.UNPINNED,))
_HOST_GETS: Final = Side(_HOST, (_NOPAGE,), _OWNED)
_HOST_GETS_LENT: Final = Side(_HOST, (_BORROWED,), _OWNED)
_GUEST_GIVES: Final = Side(_GUEST, (_OWNED,), _NOPAGE)
#: Upstream moves nothing: a donation and a reclaim in one, while the guest lives.
_MOVE: Final = "none; as __pkvm_host_donate_guest() with __pkvm_host_reclaim_page_guest()"

TRANSITIONS: Final[Mapping[Deed, Transition]] = MappingProxyType(
    {
        Deed.HOST_DONATE_GUEST: Transition(
            _HOST_GIVES,
            Side(_GUEST, (_NOPAGE,), _OWNED),
            "__pkvm_host_donate_guest(); the reference: Android",
            Vm.PROTECTED,
        ),
        Deed.HOST_SHARE_GUEST: Transition(
            Side(_HOST, (_OWNED, _SHARED), _SHARED, (Guard.SHARED_WITH_GUESTS, Guard.COUNT_LEFT)),
            Side(_GUEST, (_NOPAGE,), _BORROWED),
            "__pkvm_host_share_guest()",
            Vm.ORDINARY,
            completer_first=True,
        ),
        # the host's state goes back to OWNED when the last guest has gone
        Deed.HOST_UNSHARE_GUEST: Transition(
            Side(_HOST, (_SHARED,), _OWNED, (Guard.SHARED_WITH_GUESTS,)),
            Side(_GUEST, (_BORROWED,), _NOPAGE),
            "__pkvm_host_unshare_guest()",
            Vm.ORDINARY_ANY,
            completer_first=True,
        ),
        Deed.GUEST_SHARE_HOST: Transition(
            Side(_GUEST, (_OWNED,), _SHARED),
            Side(_HOST, (_NOPAGE,), _BORROWED),
            "__pkvm_guest_share_host()",
            Vm.PROTECTED,
        ),
        Deed.GUEST_UNSHARE_HOST: Transition(
            Side(_GUEST, (_SHARED,), _OWNED),
            Side(_HOST, (_BORROWED,), _NOPAGE),
            "__pkvm_guest_unshare_host()",
            Vm.PROTECTED,
        ),
        Deed.GUEST_RELINQUISH: Transition(
            _GUEST_GIVES,
            _HOST_GETS,
            "__pkvm_guest_relinquish_to_host(), Android",
            Vm.PROTECTED,
            zeroed=True,
        ),
        Deed.HOST_MOVE_OWNED: Transition(
            _HOST_GIVES,
            Side(_GUEST, (_OWNED,), _OWNED),
            _MOVE,
            Vm.PROTECTED,
            zeroed=True,
            replaced=_HOST_GETS,
        ),
        Deed.HOST_MOVE_SHARED: Transition(
            Side(_HOST, (_OWNED,), _BORROWED, (Guard.UNPINNED,)),
            Side(_GUEST, (_SHARED,), _SHARED),
            _MOVE,
            Vm.PROTECTED,
            zeroed=True,
            replaced=_HOST_GETS_LENT,
        ),
        Deed.RECLAIM_OWNED: Transition(
            _GUEST_GIVES,
            _HOST_GETS,
            "__pkvm_host_reclaim_page_guest()",
            Vm.DYING,
            zeroed=True,
        ),
        # the host has seen it already
        Deed.RECLAIM_SHARED: Transition(
            Side(_GUEST, (_SHARED,), _NOPAGE),
            _HOST_GETS_LENT,
            "__pkvm_host_reclaim_page_guest()",
            Vm.DYING,
        ),
        Deed.HOST_SHARE_HYP: Transition(
            Side(_HOST, (_OWNED,), _SHARED),
            Side(_HYP, (_NOPAGE,), _BORROWED),
            "__pkvm_host_share_hyp()",
        ),
        Deed.HOST_UNSHARE_HYP: Transition(
            Side(_HOST, (_SHARED,), _OWNED),
            Side(_HYP, (_BORROWED,), _NOPAGE, (Guard.UNPINNED,)),
            "__pkvm_host_unshare_hyp()",
        ),
        Deed.HOST_DONATE_HYP: Transition(
            _HOST_GIVES,
            Side(_HYP, (_NOPAGE,), _OWNED),
            "__pkvm_host_donate_hyp(); the reference: Android",
        ),
        # the hypervisor clears what it gives back (teardown_donated_memory() of pkvm.c)
        Deed.HYP_DONATE_HOST: Transition(
            Side(_HYP, (_OWNED,), _NOPAGE),
            _HOST_GETS,
            "__pkvm_hyp_donate_host()",
            zeroed=True,
        ),
    }
)
