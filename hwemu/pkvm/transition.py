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
    RECLAIM_OWNED = "host reclaims a page that the guest owned"
    RECLAIM_SHARED = "host reclaims a page that the guest shared"
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


Change = tuple[tuple[PageState, PageState], tuple[PageState, PageState]]
"""(before, after) of the initiator, and of the completer."""

# what mem_protect.c calls so, whoever does it with whom
_DONATE: Final = (_OWNED, _NOPAGE), (_NOPAGE, _OWNED)
_SHARE: Final = (_OWNED, _SHARED), (_NOPAGE, _BORROWED)
_UNSHARE: Final = (_SHARED, _OWNED), (_BORROWED, _NOPAGE)
#: A page that was shared goes to whom it was shared with.
_DONATE_SHARED: Final = (_SHARED, _NOPAGE), (_BORROWED, _OWNED)


def _row(
    change: Change,
    initiator: Component,
    completer: Component,
    source: str,
    vm: Vm = Vm.NONE,
    *,
    guards: tuple[Guard, ...] = (),
    also: tuple[PageState, ...] = (),
    completer_guards: tuple[Guard, ...] = (),
    completer_first: bool = False,
    zeroed: bool = False,
    replaced: Side | None = None,
) -> Transition:
    """``also``: in what other states the initiator may be before; ``guards`` are its, too."""
    (mine, mine_after), (theirs, theirs_after) = change
    return Transition(
        Side(initiator, (mine, *also), mine_after, guards),
        Side(completer, (theirs,), theirs_after, completer_guards),
        source,
        vm,
        completer_first,
        zeroed,
        replaced,
    )


_UNPINNED: Final = (Guard.UNPINNED,)
_RECLAIM: Final = "__pkvm_host_reclaim_page_guest()"
#: No kernel moves pages: this is a donation and a reclaim in one, while the guest lives.
_MOVE: Final = f"none; as __pkvm_host_donate_guest() with {_RECLAIM}"

TRANSITIONS: Final[Mapping[Deed, Transition]] = MappingProxyType(
    {
        Deed.HOST_DONATE_GUEST: _row(
            _DONATE, _HOST, _GUEST, "__pkvm_host_donate_guest(); the reference: Android",
            Vm.PROTECTED, guards=_UNPINNED,
        ),
        Deed.HOST_SHARE_GUEST: _row(
            _SHARE, _HOST, _GUEST, "__pkvm_host_share_guest()", Vm.ORDINARY, also=(_SHARED,),
            guards=(Guard.SHARED_WITH_GUESTS, Guard.COUNT_LEFT), completer_first=True,
        ),
        # the host's state goes back to OWNED when the last guest has gone
        Deed.HOST_UNSHARE_GUEST: _row(
            _UNSHARE, _HOST, _GUEST, "__pkvm_host_unshare_guest()", Vm.ORDINARY_ANY,
            guards=(Guard.SHARED_WITH_GUESTS,), completer_first=True,
        ),
        Deed.GUEST_SHARE_HOST: _row(
            _SHARE, _GUEST, _HOST, "__pkvm_guest_share_host()", Vm.PROTECTED
        ),
        Deed.GUEST_UNSHARE_HOST: _row(
            _UNSHARE, _GUEST, _HOST, "__pkvm_guest_unshare_host()", Vm.PROTECTED
        ),
        Deed.GUEST_RELINQUISH: _row(
            _DONATE, _GUEST, _HOST, "__pkvm_guest_relinquish_to_host(), Android", Vm.PROTECTED,
            zeroed=True,
        ),
        Deed.HOST_MOVE_OWNED: _row(
            ((_OWNED, _NOPAGE), (_OWNED, _OWNED)), _HOST, _GUEST, _MOVE, Vm.PROTECTED,
            guards=_UNPINNED, zeroed=True, replaced=Side(_HOST, (_NOPAGE,), _OWNED),
        ),
        Deed.HOST_MOVE_SHARED: _row(
            ((_OWNED, _BORROWED), (_SHARED, _SHARED)), _HOST, _GUEST, _MOVE, Vm.PROTECTED,
            guards=_UNPINNED, zeroed=True, replaced=Side(_HOST, (_BORROWED,), _OWNED),
        ),
        Deed.RECLAIM_OWNED: _row(_DONATE, _GUEST, _HOST, _RECLAIM, Vm.DYING, zeroed=True),
        # the host has seen it already
        Deed.RECLAIM_SHARED: _row(_DONATE_SHARED, _GUEST, _HOST, _RECLAIM, Vm.DYING),
        Deed.HOST_SHARE_HYP: _row(_SHARE, _HOST, _HYP, "__pkvm_host_share_hyp()"),
        Deed.HOST_UNSHARE_HYP: _row(
            _UNSHARE, _HOST, _HYP, "__pkvm_host_unshare_hyp()", completer_guards=_UNPINNED
        ),
        Deed.HOST_DONATE_HYP: _row(
            _DONATE, _HOST, _HYP, "__pkvm_host_donate_hyp(); the reference: Android",
            guards=_UNPINNED,
        ),
        # the hypervisor clears what it gives back (teardown_donated_memory() of pkvm.c)
        Deed.HYP_DONATE_HOST: _row(
            _DONATE, _HYP, _HOST, "__pkvm_hyp_donate_host()", zeroed=True
        ),
    }
)  # fmt: skip
