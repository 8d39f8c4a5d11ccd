# SPDX-License-Identifier: GPL-2.0-or-later
"""All that can happen to two or three pages of pKVM's model; and what each rule is needed for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from pkvm_world import Board, ask, broken

import hwemu.pkvm.engine
from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import PageState
from hwemu.pkvm.transition import TRANSITIONS, Deed, Transition
from privfs.testing import Report, explore

pytestmark = pytest.mark.exhaustive

A, B = 0x1000, 0x1001
Event = tuple[Any, ...]


class World:
    """``protected`` says how many VMs there are, and of which kind; each has two gfns.

    ``tlb``: CPUs cache what they touch. ``hyp``: the hypervisor is given pages, too.
    """

    def __init__(
        self,
        protected: Sequence[bool],
        pages: int,
        board: type[Board] = Board,
        *,
        hyp: bool = True,
        tlb: bool = True,
    ) -> None:
        self.board = board()
        self.hyp = Hypervisor(self.board, [(0, pages)], block_pages=2, max_shares=2)
        self.pages = pages
        self.with_hyp, self.tlb = hyp, tlb
        for kind in protected:
            self.hyp.create_vm(2, protected=kind)

    def events(self) -> Iterator[Event]:
        for guest in self.hyp.vms:
            handle = guest.handle
            for gfn in range(2):
                for pfn in range(self.pages):
                    name = "host_donate_guest" if guest.protected else "host_share_guest"
                    yield name, handle, pfn, gfn, 1, False
                    if guest.protected:
                        yield "host_move_guest", handle, pfn, gfn, 1, False
                for name in ("guest_share_host", "guest_unshare_host", "guest_relinquish"):
                    if guest.protected:
                        yield name, handle, gfn, 1
                if not guest.protected:
                    yield "host_unshare_guest", handle, gfn, 1, False
                yield "host_reclaim_guest", handle, gfn, 1, False
                if guest.valid(gfn, 1)[0] and not guest.dying:
                    yield "touch", handle, gfn, int(guest.pfns(gfn, 1)[0])
            yield "guest_share_host", handle, 0, 2
            yield "start_teardown", handle
            yield "finalize_teardown", handle
        for pfn in range(self.pages):
            if self.with_hyp:
                for name in ("host_share_hyp", "host_unshare_hyp", "host_donate_hyp"):
                    yield name, pfn, 1
                yield "hyp_donate_host", pfn, 1
            if self.tlb and self.hyp.vmemmap.host_state[pfn] != PageState.NOPAGE:
                yield "host touches", pfn

    def step(self, event: Hashable) -> World | None:
        assert isinstance(event, tuple)
        name, *arguments = event
        twin = object.__new__(World)
        twin.board = self.board.copy()
        twin.hyp, twin.pages = self.hyp.copy(twin.board), self.pages
        twin.with_hyp, twin.tlb = self.with_hyp, self.tlb
        if name == "touch":
            twin.touch(*arguments)
        elif name == "host touches":
            twin.board.host.add(*arguments)
        elif ask(twin.hyp, name, tuple(arguments)):
            assert twin.hyp.key() == self.hyp.key()
            return None
        elif name == "guest_share_host":
            twin.shown(*arguments)
        return twin

    def touch(self, handle: int, gfn: int, pfn: int) -> None:
        """A vCPU stores a secret, if the page is the guest's alone."""
        if self.tlb:
            self.board.guests.add((handle, gfn, pfn))
        guest = next(one for one in self.hyp.vms if one.handle == handle)
        if guest.states(gfn, 1)[0] == PageState.OWNED:
            self.board.contents[pfn] = ("secret", handle)

    def shown(self, handle: int, gfn: int, npages: int) -> None:
        guest = next(one for one in self.hyp.vms if one.handle == handle)
        for pfn in guest.pfns(gfn, npages).tolist():
            if pfn in self.board.contents:
                self.board.contents[pfn] = "shown"

    def key(self) -> Hashable:
        return (self.hyp.key(), self.board.key())

    def violations(self) -> str | None:
        return broken(self.hyp, self.board)


def go(world: World) -> Report:
    report = explore(world, goal=lambda it: not list(it.hyp.vms), fair=fair)
    print(report)
    return report


def fair(event: Hashable) -> bool:
    """What teardown needs; nobody counts on guests."""
    assert isinstance(event, tuple)
    return event[0] in (
        "start_teardown", "finalize_teardown", "host_reclaim_guest", "host_unshare_guest",
    )  # fmt: skip


WORLDS = {
    "a guest and two pages": lambda: World([True], 2, hyp=False),
    "a protected guest, an ordinary one and EL2": lambda: World([True, False], 1),
    "two guests and two pages, nothing cached": lambda: World([True] * 2, 2, hyp=False, tlb=False),
}
LARGER = {
    "two guests and two pages": lambda: World([True] * 2, 2, hyp=False),
    "two guests, three pages and EL2, nothing cached": lambda: World([True] * 2, 3, tlb=False),
}


@pytest.mark.parametrize("name", WORLDS)
def test_nothing_goes_wrong(name: str) -> None:
    report = go(WORLDS[name]())
    assert report.complete
    assert report.problem is None, report.script()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LARGER)
def test_nothing_goes_wrong_in_larger_worlds(name: str) -> None:
    report = go(LARGER[name]())
    assert report.complete
    assert report.problem is None, report.script()


# --- each rule, switched off ----------------------------------------------------------------------


class NoHostFlush(Board):
    def flush_host(self, pfn: int, npages: int) -> None:
        pass


class NoGuestFlush(Board):
    def flush_guest(self, handle: int, gfn: int, npages: int) -> None:
        pass


def other_states(
    deed: Deed, which: str, *before: PageState
) -> Callable[[], dict[Deed, Transition]]:
    def table() -> dict[Deed, Transition]:
        row = TRANSITIONS[deed]
        return {deed: replace(row, **{which: replace(getattr(row, which), before=before)})}

    return table


def unzeroed(deed: Deed) -> Callable[[], dict[Deed, Transition]]:
    return lambda: {deed: replace(TRANSITIONS[deed], zeroed=False)}


def unguarded(deed: Deed, which: str) -> Callable[[], dict[Deed, Transition]]:
    def table() -> dict[Deed, Transition]:
        row = TRANSITIONS[deed]
        return {deed: replace(row, **{which: replace(getattr(row, which), guards=())})}

    return table


OWN, LENT, LOAN, NONE = PageState
RULES = {
    "only what the host owns is donated": other_states(
        Deed.HOST_DONATE_GUEST, "initiator", OWN, LENT, LOAN, NONE
    ),
    "a guest's place is free": other_states(Deed.HOST_DONATE_GUEST, "completer", OWN, NONE),
    "what EL2 has borrowed goes to no guest": unguarded(Deed.HOST_SHARE_GUEST, "initiator"),
    "only what the host owns goes to EL2": other_states(
        Deed.HOST_DONATE_HYP, "initiator", OWN, LENT, NONE
    ),
    "relinquished pages are zeroed": unzeroed(Deed.GUEST_RELINQUISH),
    "reclaimed pages are zeroed": unzeroed(Deed.RECLAIM_OWNED),
    "only what the host owns comes in another's place": other_states(
        Deed.HOST_MOVE_OWNED, "initiator", OWN, NONE
    ),
    "pages are zeroed that a guest has moved from": unzeroed(Deed.HOST_MOVE_OWNED),
    "what a guest shares is not the host's": other_states(
        Deed.HOST_SHARE_HYP, "initiator", OWN, LOAN
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_needed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = MappingProxyType(dict(TRANSITIONS) | RULES[rule]())
    monkeypatch.setattr(hwemu.pkvm.engine, "TRANSITIONS", changed)
    kinds, pages = ([True, True], 2) if "place" in rule or "moved" in rule else ([True, False], 1)
    report = go(World(kinds, pages, hyp=pages == 1))
    assert report.problem is not None


@pytest.mark.parametrize("board", [NoHostFlush, NoGuestFlush])
def test_a_flush_is_needed(board: type[Board]) -> None:
    report = go(World([True], 1, board))
    assert report.problem is not None
    assert "TLB" in report.problem or "can be reached" in report.problem
