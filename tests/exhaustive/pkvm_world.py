# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine for pKVM's model: contents as words, and a TLB that forgets only what it is told to."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from pkvm_predictor import Guest, Page, Predictor

from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import Component, PageState, PkvmError

WHO = {"host": Component.HOST, "hyp": Component.HYP, "guest": Component.GUEST}


class Board:
    """Page contents, and what CPUs have cached of the host's stage 2 and of guests'."""

    def __init__(self) -> None:
        self.contents: dict[int, object] = {}
        self.host: set[int] = set()
        self.guests: set[tuple[int, int, int]] = set()  #: handle, gfn, pfn

    def zero(self, pfn: int, npages: int) -> None:
        pages = set(range(pfn, pfn + npages))
        stale = {entry for entry in self.guests if entry[2] in pages} | (pages & self.host)
        assert not stale, f"cleared while {stale} can be reached"
        self.contents.update(dict.fromkeys(pages, 0))

    def copy_pages(self, source: int, target: int, npages: int) -> None:
        for n in range(npages):
            assert not {source + n, target + n} & self.host, "the host may store meanwhile"
            assert all(pfn != source + n for _, _, pfn in self.guests), "a guest may"
            self.contents[target + n] = self.contents.get(source + n, "host's")

    def flush_host(self, pfn: int, npages: int) -> None:
        self.host -= set(range(pfn, pfn + npages))

    def flush_guest(self, handle: int, gfn: int, npages: int) -> None:
        self.guests = {
            entry
            for entry in self.guests
            if entry[0] != handle or not gfn <= entry[1] < gfn + npages
        }

    def key(self) -> Hashable:
        return (
            tuple(sorted(self.contents.items(), key=lambda item: item[0])),
            frozenset(self.host),
            frozenset(self.guests),
        )

    def copy(self) -> Board:
        twin = type(self)()
        twin.contents = self.contents.copy()
        twin.host, twin.guests = set(self.host), set(self.guests)
        return twin


def ask(hyp: Hypervisor, name: str, arguments: tuple[Any, ...]) -> int:
    """Make a call of the model as the predictor's are made; the errno."""
    try:
        if name == "create_vm":
            hyp.create_vm(arguments[0], protected=arguments[1])
        elif name == "pin":
            hyp.pin(WHO[arguments[0]], *arguments[1:])
        elif name in BLOCKS:
            getattr(hyp, name)(*arguments[:-1], block=arguments[-1])
        else:
            getattr(hyp, name)(*arguments)
    except PkvmError as refused:
        return refused.errno
    return 0


BLOCKS = {
    "host_donate_guest", "host_share_guest", "host_unshare_guest", "host_reclaim_guest",
    "host_move_guest",
}  # fmt: skip


def picture(hyp: Hypervisor, board: Board | None = None) -> object:
    """All that can be known of the model, to be compared with `predicted`."""
    columns = hyp.vmemmap
    pages = {}
    for row, memory in enumerate(columns.memory.tolist()):
        if not memory:
            continue
        host, lent = int(columns.host_state[row]), int(columns.share_count[row])
        away: object = None
        if host == PageState.NOPAGE:
            owner = Component(int(columns.owner[row]))
            away = int(columns.handle[row]) if owner is Component.GUEST else owner.name.lower()
        hyp_state, references = int(columns.hyp_state[row]), int(columns.refcount[row])
        content = board.contents.get(columns.first + row, "host's") if board else None
        pages[columns.first + row] = (host, hyp_state, references, lent, away, content)
    guests = {}
    for guest in hyp.vms:
        n = guest.npages
        slots = [
            (pfn, state, block) if valid else None
            for pfn, state, block, valid in zip(
                guest.pfns(0, n).tolist(),
                guest.states(0, n).tolist(),
                guest.blocks(0, n).tolist(),
                guest.valid(0, n).tolist(),
                strict=True,
            )
        ]
        guests[guest.handle] = (guest.protected, guest.dying, guest.loaded, slots)
    return pages, guests


def predicted(oracle: Predictor, *, contents: bool = False) -> object:
    """The same of the predictor."""

    def page(one: Page) -> object:
        away = one.owner if one.host == PageState.NOPAGE else None
        content = one.content if contents else None
        return one.host, one.hyp, one.references, one.guests, away, content

    def guest(one: Guest) -> object:
        slots = [slot and (slot.pfn, slot.state, slot.block) for slot in one.slots]
        return one.protected, one.dying, one.loaded, slots

    return (
        {pfn: page(one) for pfn, one in oracle.pages.items()},
        {handle: guest(one) for handle, one in oracle.guests.items()},
    )


Leaf = tuple[int, int, int]
"""handle, gfn, the guest's page state."""
MINE = (PageState.OWNED, PageState.SHARED_OWNED)


def leaves(hyp: Hypervisor) -> dict[int, list[Leaf]]:
    """The guests' leaves by the page that they lead to."""
    found: dict[int, list[Leaf]] = {}
    for guest in hyp.vms:
        states = guest.states(0, guest.npages).tolist()
        for gfn, pfn in enumerate(guest.pfns(0, guest.npages).tolist()):
            if states[gfn] != PageState.NOPAGE:
                found.setdefault(pfn, []).append((guest.handle, gfn, states[gfn]))
    return found


def broken(hyp: Hypervisor, board: Board) -> str | None:
    """The first thing that must never be so, or None."""
    columns, all_leaves = hyp.vmemmap, leaves(hyp)
    for row in columns.memory.nonzero()[0].tolist():
        pfn = columns.first + row
        host, el2 = PageState(int(columns.host_state[row])), PageState(int(columns.hyp_state[row]))
        mapped = all_leaves.get(pfn, [])
        whose: list[object] = [handle for handle, _, state in mapped if state in MINE]
        whose += ["host"] * (host in MINE) + ["hyp"] * (el2 in MINE)
        if len(whose) != 1:
            return f"page {pfn} is owned by {whose}"
        borrowers = [handle for handle, _, state in mapped if state == PageState.SHARED_BORROWED]
        lenders = [handle for handle, _, state in mapped if state == PageState.SHARED_OWNED]
        if el2 is PageState.SHARED_BORROWED:
            borrowers.append(-1)
        if borrowers and host is not PageState.SHARED_OWNED:
            return f"page {pfn} is borrowed by {borrowers} from a host that does not lend it"
        if host is PageState.SHARED_OWNED and not borrowers:
            return f"page {pfn} is lent by the host to nobody"
        if (host is PageState.SHARED_BORROWED) != bool(lenders):
            return f"page {pfn} is {host.name} of the host and lent by {lenders}"
        if int(columns.share_count[row]) != len([one for one in borrowers if one >= 0]):
            return f"page {pfn} is lent to {borrowers} and counted {columns.share_count[row]} times"
        away = Component(int(columns.owner[row])), int(columns.handle[row])
        if host is PageState.NOPAGE:
            right = (Component.HYP, 0) if whose == ["hyp"] else (Component.GUEST, whose[0])
            if away != right:
                return f"page {pfn} of {whose} is marked as {away}'s"
        elif away != (Component.HOST, 0):
            return f"page {pfn}, which the host reaches, is marked as {away}'s"
        if pfn in board.host and host is PageState.NOPAGE:
            return f"page {pfn} is not the host's, and its TLB has it"
        content = board.contents.get(pfn)
        if isinstance(content, tuple) and content[0] == "secret":
            reached = [handle for handle, _, _ in mapped if handle != content[1]]
            if reached or host is not PageState.NOPAGE or el2 is not PageState.NOPAGE:
                return f"page {pfn} with a secret of {content[1]} is open to others"
    for handle, gfn, pfn in board.guests:
        if not any(one[:2] == (handle, gfn) for one in all_leaves.get(pfn, [])):
            return f"the TLB has page {pfn} at gfn {gfn} of VM {handle:#x}, its table does not"
    return None
