# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract as a world: the owner, the users and the fault path that ship, and what is between.

The one unforgivable state is a process that reaches a page of a generation that is gone.

A state is a tuple of numbers: that of the host's state, then that of each user's.  Users that start
alike are one machine, so what was computed for one holds for the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple

from contract_guest import Guest
from contract_host import Host
from contract_values import SHIPPING, Cores, Page, Setup, takeable

from privfs.testing import Parts, StepFailed, View

State = tuple[int, ...]
Words = tuple[Any, ...]

UNFAIR = frozenset({
    "call", "cancel", "hang", "stop", "close", "kill", "unregister", "register", "reconnect", "bye",
    "convert", "echo", "sample",
})  # fmt: skip


def fair(event: Hashable) -> bool:
    """Say whether liveness may rely on ``event``."""
    assert isinstance(event, tuple)
    return event[0] not in UNFAIR


class HostView(NamedTuple):
    """What others must know of the host.  Steps and mail are numbers, see :class:`Contract`."""

    events: tuple[tuple[tuple[Any, ...], int, frozenset[int]], ...]
    open: frozenset[int]
    deaf: frozenset[int]
    in_call: frozenset[int]
    unanswered: frozenset[int]
    quiet: bool


class GuestView(NamedTuple):
    """What others must know of a user: ``steps`` are its own, ``mail`` what it has sent."""

    steps: tuple[tuple[tuple[Any, ...], int], ...]
    talks: tuple[tuple[tuple[Any, ...], int, tuple[int, ...]], ...]
    mail: tuple[tuple[tuple[Any, ...], int, int, int], ...]
    dies: tuple[tuple[Any, ...], int] | None
    exits: int  #: the state after its exit was seen, -1 if there is none to see
    fenced: int  #: the same for the end of its threads
    echoed: int  #: the same for another end of its socket
    healthy: bool
    stopped: bool
    quiet: bool


class Contract:
    """Owner, users, memory.  Mutations derive from the parts and put their own here.

    What one part tells another is numbered too: to look at a number is quicker than at a record.
    """

    def __init__(
        self,
        setup: Setup,
        cores: Cores = SHIPPING,
        host: type[Host] = Host,
        guest: type[Guest] = Guest,
    ) -> None:
        self.setup, self.cores = setup, cores
        self._bits: dict[Page, int] = {}
        self._words: dict[Words, int] = {}
        self._meant: list[Words] = []
        self._told: dict[tuple[int, int], tuple[int, tuple[tuple[int, int], ...]]] = {}
        self._heard: dict[tuple[int, int], int] = {}
        self.hosts: Parts[Host] = Parts()
        self.guests: Parts[Guest] = Parts()
        self._host_views = View(self.hosts, self._view_host)
        self._guest_views = [
            View(self.guests, partial(self._view_guest, p)) for p in range(setup.users)
        ]
        self._alive = View(self.hosts, lambda _, part: self._mask(part.alive()))
        self._reach = View(self.guests, lambda _, part: self._mask(part.reach()))
        self._host_problem = View(self.hosts, lambda _, part: part.problem)
        self._guest_problem = View(self.guests, lambda _, part: part.problem)
        number = self.hosts.number(host(setup, cores))
        state: State = (number,)
        for p in range(setup.users):
            state += (self.guests.number(guest(setup, cores, setup.fates(p))),)
            state = self._begin(p, state)
        self._start = state

    # --- the protocol of the explorer ---------------------------------------------------------

    def start(self) -> State:
        return self._start

    def successors(self, state: State) -> Iterator[tuple[Hashable, State]]:
        number, *guests = state
        host = self._host_views[number]
        views = [view[guest] for view, guest in zip(self._guest_views, guests, strict=True)]
        for event, told, slow in host.events:
            if slow and any(views[p].healthy for p in slow):
                continue
            if event[0] == "timer":
                stopped = tuple([p for p, view in enumerate(views) if view.stopped])
                told = self._number((*event, stopped))
            elif event[0] == "call" and not self._may_call(event[1], state):
                continue
            yield event, self._tell(event, state, told)
        for at, view in enumerate(views, 1):
            before, behind = state[:at], state[at + 1 :]
            for event, after, told, sid in view.mail:
                if sid in host.open and self._reads(at - 1, state):
                    yield event, self._tell(event, (*before, after, *behind), told)
            if view.exits >= 0:
                event = ("exit", at - 1)
                told = self._number(("gone", at - 1))
                yield event, self._tell(event, (*before, view.exits, *behind), told)
            if view.fenced >= 0:
                event = ("fence", at - 1)
                told = self._number(("fenced", at - 1))
                yield event, self._tell(event, (*before, view.fenced, *behind), told)
            if view.echoed >= 0 and at - 1 in host.deaf:
                event = ("echo", at - 1)
                told = self._number(event)
                yield event, self._tell(event, (*before, view.echoed, *behind), told)
            if view.dies is not None and at - 1 not in host.in_call:
                yield view.dies[0], (*before, view.dies[1], *behind)
            for event, after, words in view.talks:
                changed = (*before, after, *behind)
                for told in words:
                    changed = self._tell(event, changed, told)
                yield event, changed
            for event, after in view.steps:
                yield event, (*before, after, *behind)

    def violation(self, state: State) -> str | None:
        number = state[0]
        problem = self._host_problem[number]
        if problem is not None:
            return problem
        alive = self._alive[number]
        for guest in state[1:]:
            if self._guest_problem[guest] is not None or self._reach[guest] & ~alive:
                return self._accuse(state)
        return self._trespass(state) if self.setup.exclusive else None

    def quiet(self, state: State) -> bool:
        """Every call has ended, every healthy fault is served, every healthy socket is empty.

        Nobody answers a process that has left.
        """
        host = self._host_views[state[0]]
        if not host.quiet:
            return False
        views = [view[guest] for view, guest in zip(self._guest_views, state[1:], strict=True)]
        return all(not view.healthy or view.quiet for view in views) and not any(
            p < 0 or views[p].healthy for p in host.unanswered
        )

    def _accuse(self, state: State) -> str | None:
        for p, number in enumerate(state[1:]):
            problem = self._guest_problem[number]
            if problem is not None:
                return f"user {p}: {problem}"
            gone = self._reach[number] & ~self._alive[state[0]]
            if gone:
                ino, page, made_for = min(page for page, bit in self._bits.items() if gone & bit)
                return (
                    f"user {p} reaches page {page} of file {ino}, generation {made_for}, "
                    "which is gone"
                )
        return None

    def _trespass(self, state: State) -> str | None:
        """Whether two users reach a page that one of them was given for itself."""
        for p in self.setup.exclusive:
            for q, number in enumerate(state[1:]):
                if q != p and self._reach[number] & self._reach[state[p + 1]]:
                    return f"user {q} reaches a page of user {p}, which has it for itself"
        return None

    # --- joining ------------------------------------------------------------------------------

    def _may_call(self, i: int, state: State) -> bool:
        """Whether the caller of a call can make it."""
        call = self.setup.calls[i]
        if call.caller < 0:
            return True
        guest = self.guests[state[call.caller + 1]]
        return guest.can_call(call.ino) if call.record else "dead" not in guest.flags

    def _reads(self, p: int, state: State) -> bool:
        """Whether the owner reads this user's socket now: always."""
        return True

    def _number(self, words: Words) -> int:
        number = self._words.get(words)
        if number is None:
            number = self._words[words] = len(self._meant)
            self._meant.append(words)
        return number

    def _tell(self, event: Hashable, state: State, told: int) -> State:
        """Tell the host, and the users what it says."""
        answer = self._told.get((state[0], told))
        if answer is None:
            try:
                number, words = self.hosts.step(state[0], self._meant[told])
            except Exception as crash:  # of the code under test: that is what we look for
                raise StepFailed(event) from crash
            numbered = tuple([(p + 1, self._number(tuple(word))) for p, *word in words])
            answer = self._told[state[0], told] = number, numbered
        number, numbered = answer
        if not numbered:
            return (number, *state[1:])
        after = [number, *state[1:]]
        for at, word in numbered:
            heard = self._heard.get((after[at], word))
            if heard is None:
                try:
                    heard, said = self.guests.step(after[at], self._meant[word])
                except Exception as crash:
                    raise StepFailed(event) from crash
                assert not said, "nobody talks back to the host in the same step"
                self._heard[after[at], word] = heard
            after[at] = heard
        return tuple(after)

    def _begin(self, p: int, state: State) -> State:
        """Let a user say HELLO and, unless it is late, register."""
        setup = self.setup
        state = self._tell("begin", state, self._number(("connect", p, 0)))
        if p in setup.mute:
            return state
        guest = self.guests[state[p + 1]].copy()
        guest.hello()
        state = (*state[: p + 1], self.guests.number(guest))
        if p in setup.fresh:
            return state
        state = self._settle(p, state)
        if p not in setup.late:
            for ino in setup.inos:
                number, _ = self.guests.step(state[p + 1], ("register", ino))
                state = self._settle(p, (*state[: p + 1], number))
        return state

    def _settle(self, p: int, state: State) -> State:
        """Deliver what a user has sent, and the answer."""
        for event, after, told, _ in self._guest_views[p][state[p + 1]].mail:
            state = self._tell(event, (*state[: p + 1], after), told)
        number = state[p + 1]
        while self.guests[number].inbox:
            number, _ = self.guests.step(number, ("lane", 0))
        return (*state[: p + 1], number)

    # --- views --------------------------------------------------------------------------------

    def _view_host(self, _: int, host: Host) -> HostView:
        events = [(event, self._number(event), slow) for event, slow in host.events()]
        return HostView(
            tuple(events), host.open(), host.deaf(), host.in_call(), host.unanswered(), host.quiet()
        )

    def _view_guest(self, p: int, number: int, guest: Guest) -> GuestView:
        steps, talks, mail, dies = [], [], [], None
        for name, *rest in guest.events():
            event = (name, p, *rest)
            try:
                after, words = self.guests.step(number, (name, *rest))
            except Exception as crash:
                raise StepFailed(event) from crash
            if words:
                told = [self._number((word, p, *rest)) for word, *rest in words]
                talks.append((event, after, tuple(told)))
            elif name == "die":
                dies = event, after
            elif after != number:
                steps.append((event, after))
        for session, outbox in enumerate(guest.outboxes):
            for i in takeable(outbox, self.setup.delivery):
                after, _ = self.guests.step(number, ("sent", session, i))
                told = self._number(("parcel", p, session, outbox[i]))
                sid = 1 + p + self.setup.users * session
                mail.append((("deliver", p, session, i), after, told, sid))
        exits = -1
        if "dead" in guest.flags and "reaped" not in guest.flags and p not in self.setup.immortal:
            exits, _ = self.guests.step(number, ("reaped",))
        fenced = -1
        if "still" in guest.flags and not guest.flags & {"told", "dead"}:
            fenced, _ = self.guests.step(number, ("fenced",))
        echoed = -1
        if "echoes" in guest.fates:
            echoed, _ = self.guests.step(number, ("echoed",))
        return GuestView(
            tuple(steps), tuple(talks), tuple(mail), dies, exits, fenced, echoed, guest.healthy,
            "stopped" in guest.flags, guest.quiet,
        )  # fmt: skip

    def _mask(self, pages: frozenset[Page]) -> int:
        mask = 0
        for page in pages:
            bit = self._bits.get(page)
            if bit is None:
                bit = self._bits[page] = 1 << len(self._bits)
            mask |= bit
        return mask
